"""Whose network an address is in, and in which country: from files in MaxMind's format, and from nowhere else.

The operator gets the files (GeoLite2, DB-IP, IPinfo) and replaces them; `refresh` takes new ones. What no file knows is
unknown. A file that is missing or damaged is `trouble`, and what was read before goes on to hold.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import maxminddb
from maxminddb.types import Record

from nts_core.metadata import MAX_AS

MAX_OCTETS = 1024**3  # of one file
_KEPT = 2**18  # addresses whose place is known without looking again
_COUNTRY = re.compile(r"[A-Z]{2}")
_NUMBER = re.compile(r"(?:AS)?([1-9][0-9]{0,9})")

# Where the files have it, path by path: MaxMind and DB-IP; DB-IP's ISP files; IPinfo.
_NETWORK = (("autonomous_system_number",), ("traits", "autonomous_system_number"), ("asn",))
# MaxMind and DB-IP; IPinfo Lite; IPinfo's older files.
_COUNTRIES = (("country", "iso_code"), ("country_code",), ("country",))
# What the reader raises for a file whose end is right and whose inside is not.
_DAMAGE = (maxminddb.InvalidDatabaseError, ValueError, KeyError, TypeError, OverflowError, RecursionError)


class GeoError(Exception):
    """A file that cannot be used; the text has its name and not its place, as alarms are public."""


@dataclass(frozen=True, slots=True)
class Place:
    """AS number and ISO 3166-1 country of an address, as far as they are known."""

    network: int | None = None
    country: str | None = None


NOWHERE = Place()


class _File:
    """One file, mapped into memory from a copy of our own.

    Of the operator's file itself a process would die (SIGBUS) whenever it is overwritten in place and not replaced.
    """

    def __init__(self, path: Path) -> None:
        """Raises GeoError."""
        self.path = path
        self.mark = mark(path)
        if not path.is_file():
            raise GeoError(f"{path.name}: there is no such file")
        try:
            with path.open("rb") as theirs, tempfile.NamedTemporaryFile() as ours:
                if os.fstat(theirs.fileno()).st_size > MAX_OCTETS:
                    raise GeoError(f"{path.name} has more than {MAX_OCTETS} octets")
                shutil.copyfileobj(theirs, ours)
                ours.flush()
                # Not by the library's extension, which a damaged file can make crash.
                self._reader = maxminddb.open_database(ours.name, maxminddb.MODE_MMAP)
        except OSError as error:
            raise GeoError(f"{path.name}: {error.strerror or error}") from None
        except _DAMAGE:
            raise GeoError(f"{path.name} is not a file in MaxMind's format, or is damaged") from None
        self._is_ipv4_only = self._reader.metadata().ip_version == 4

    def find(self, address: IPv4Address | IPv6Address) -> Place:
        """Raises GeoError."""
        if self._is_ipv4_only and address.version == 6:
            return NOWHERE
        try:
            record = self._reader.get(address)
        except _DAMAGE:
            raise GeoError(f"{self.path.name} is damaged") from None
        return Place(_network(record), _country(record))

    def close(self) -> None:
        self._reader.close()


class Geo:
    """What the files of the settings say; for one thread at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._files: dict[Path, _File] = {}
        self._troubles: dict[Path, str] = {}
        self._find = lru_cache(_KEPT)(self._look_up)

    @property
    def trouble(self) -> str | None:
        return "; ".join(self._troubles.values()) or None

    def refresh(self) -> None:
        """Take files that are new or were replaced. Blocks as long as it takes to copy them."""
        for path in self._paths:
            known = self._files.get(path)
            if known is not None and known.mark == mark(path) and path not in self._troubles:
                continue
            try:
                self._files[path] = _File(path)
            except GeoError as error:
                self._troubles[path] = str(error)
            else:
                self._troubles.pop(path, None)
                self._find.cache_clear()
                if known is not None:
                    known.close()

    def places(self, addresses: Iterable[str]) -> dict[str, Place]:
        """Where each address is. May wait for the disk."""
        return {text: self._find(text) if self._files else NOWHERE for text in addresses}

    def _look_up(self, text: str) -> Place:
        """For each of the two the first file counts that knows it."""
        address, network, country = ip_address(text), None, None
        for path in self._paths:
            file = self._files.get(path)
            try:
                found = NOWHERE if file is None else file.find(address)
            except GeoError as error:
                self._troubles[path] = str(error)
                continue
            network, country = network or found.network, country or found.country
        return Place(network, country)


def check_file(path: Path) -> None:
    """Whether a file can be used. Raises GeoError."""
    _File(path).close()


def mark(path: Path) -> tuple[int, ...] | None:
    """What is another one when the file is; None without a file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _values(record: Record | None, paths: Iterable[Sequence[str]]) -> Iterable[Record]:
    for path in paths:
        value: Record | None = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            yield value


def _network(record: Record | None) -> int | None:
    for value in _values(record, _NETWORK):
        found = _NUMBER.fullmatch(str(value)) if isinstance(value, int | str) else None
        if found is not None and int(found[1]) <= MAX_AS:
            return int(found[1])
    return None


def _country(record: Record | None) -> str | None:
    for value in _values(record, _COUNTRIES):
        if isinstance(value, str) and _COUNTRY.fullmatch(value):
            return value
    return None
