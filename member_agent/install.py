"""Certificate generations on the agent's disk: a key never leaves it, a half-written pair is never used.

    DIRECTORY/pending/ORDER/{key,csr}.pem                 waits for the certificate of that order
    DIRECTORY/generations/ORDER-FINGERPRINT/{fullchain,key}.pem
    DIRECTORY/current -> generations/...                  switched by one rename

Every step writes aside (`.tmp-`), syncs and renames; changes are made under one lock file. The functions
block; a daemon calls them in a thread.
"""

import datetime as dt
import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from nts_core.shell import sync
from nts_core.tls import new_key_and_csr

FILE_LIMIT = 262_144  # octets of a PEM file
PENDING_LIMIT = 4  # orders whose keys are kept; the oldest go first
LOCK_DEADLINE = 10.0  # seconds
CHAIN, KEY, CSR = "fullchain.pem", "key.pem", "csr.pem"

_FAULTS = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension)


class InstallError(Exception):
    """A pair that cannot be used: what is wrong, and what the member can do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}; {remedy}")
        self.message = message
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class InstalledPair:
    """Files that belong together. `fingerprint` is SHA-256 of the leaf's DER in lower-case hex."""

    chain_path: Path
    key_path: Path
    fingerprint: str
    not_after: dt.datetime


def load_pair(cert_file: Path, key_file: Path) -> InstalledPair:
    """Check that both files can be read, are PEM, and belong together; else InstallError."""
    leaf = _parse_chain(_read(cert_file, "certificate"), cert_file)[0]
    _match(leaf, _read(key_file, "key"), cert_file, key_file)
    return InstalledPair(cert_file, key_file, _fingerprint(leaf), leaf.not_valid_after_utc)


class CertificateStore:
    """The keys and certificates of one domain under `directory`, which is made with mode 0700."""

    def __init__(self, directory: Path, domain: str) -> None:
        self._directory = directory
        self._domain = domain
        self._pending = directory / "pending"
        self._generations = directory / "generations"
        self._current = directory / "current"
        for path in (directory, self._pending, self._generations):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def pending(self, order: int) -> str:
        """The CSR (PEM) for an order: the same one each time until its certificate is installed."""
        place = self._pending / str(order)
        with self._lock():
            if not place.exists():
                key, csr = new_key_and_csr(self._domain)
                self._write(place, {KEY: key, CSR: csr})
                for old in sorted(self._pending.iterdir(), key=_order_of)[:-PENDING_LIMIT]:
                    shutil.rmtree(old)
            return (place / CSR).read_text()

    def install(self, order: int, chain_pem: str, *, now: dt.datetime) -> Path:
        """Check the chain against the order's key, the domain and `now`, then switch `current` to it.

        The generation directory is returned, also when that certificate is installed already. The
        generation before it stays, older ones go. InstallError leaves everything as it was.
        """
        source, key_file = Path(f"order {order}"), self._pending / str(order) / KEY
        chain = _parse_chain(chain_pem.encode(), source)
        with self._lock():
            place = self._generations / f"{order:010}-{_fingerprint(chain[0])[:16]}"
            before = self._target()
            if before != place or self._usable(place) is None:
                key = _read(key_file, "key")
                _match(chain[0], key, source, key_file)
                _check_chain(chain, self._domain, now)
                if place.exists():
                    shutil.rmtree(place)
                self._write(place, {CHAIN: _pem(chain), KEY: key.decode()})
                self._switch(place)
                for old in set(self._generations.iterdir()) - {place, before}:
                    shutil.rmtree(old)
            for old in self._pending.iterdir():
                if _order_of(old) <= order:
                    shutil.rmtree(old)
        return place

    def current(self) -> InstalledPair | None:
        """The pair in use, at paths whose content never changes; None when there is none.

        A `current` that is missing or leads to nothing usable is turned to the newest usable generation.
        """
        target = self._target()
        if target is not None and (pair := self._usable(target)):
            return pair
        with self._lock():  # an install may have switched meanwhile, or the state is half written
            target = self._target()
            for place in [*([target] if target else []), *sorted(self._generations.iterdir(), reverse=True)]:
                if pair := self._usable(place):
                    if place != target:
                        self._switch(place)
                    return pair
        return None

    def _target(self) -> Path | None:
        try:
            return self._generations / self._current.readlink().name
        except OSError:
            return None

    def _usable(self, place: Path) -> InstalledPair | None:
        with suppress(InstallError):
            return load_pair(place / CHAIN, place / KEY)
        return None

    def _switch(self, place: Path) -> None:
        aside = self._directory / ".tmp-current"
        aside.unlink(missing_ok=True)
        aside.symlink_to(place.relative_to(self._directory))
        aside.replace(self._current)
        sync(self._directory)

    def _write(self, place: Path, files: Mapping[str, str]) -> None:
        aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=place.parent))  # mkdtemp gives 0700
        for name, text in files.items():
            (aside / name).touch(mode=0o600)
            (aside / name).write_text(text)
            sync(aside / name)
        sync(aside)
        aside.rename(place)
        sync(place.parent)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """The one writer, in any process; what an earlier one left half written is removed first."""
        end = time.monotonic() + LOCK_DEADLINE
        with (self._directory / ".lock").open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise InstallError(
                            f"{self._directory} is locked by another process", "end the other agent"
                        ) from None
                    time.sleep(0.02)
            for parent in (self._pending, self._generations):
                for leftover in parent.glob(".tmp-*"):
                    shutil.rmtree(leftover)
            yield


def _order_of(pending: Path) -> int:
    return int(pending.name)


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            octets = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise InstallError(
            f"the {what} file {path} cannot be read: {error.strerror}",
            "check the path and that the agent's user may read it",
        ) from error
    if len(octets) > FILE_LIMIT:
        raise InstallError(f"the {what} file {path} is too large", "give a PEM file")
    return octets


def _parse_chain(pem: bytes, source: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except _FAULTS as error:
        raise InstallError(
            f"{source} is not a PEM certificate chain", "give the full chain in PEM"
        ) from error


def _match(leaf: x509.Certificate, key_pem: bytes, source: Path, key_file: Path) -> None:
    try:
        public = load_pem_private_key(key_pem, password=None).public_key()
    except _FAULTS as error:
        raise InstallError(
            f"{key_file} is not an unencrypted PEM private key", "give the key in PEM without a passphrase"
        ) from error
    spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public.public_bytes(*spki) != leaf.public_key().public_bytes(*spki):
        raise InstallError(
            f"the certificate {source} and the key {key_file} do not match",
            "give the key that the certificate was issued for",
        )


def _check_chain(chain: list[x509.Certificate], domain: str, now: dt.datetime) -> None:
    """Name, order of the chain and validity; the remedy of each is a new order."""
    leaf, remedy = chain[0], "wait for the registry's next order; it is asked for at the next report"
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        for certificate, issuer in pairwise(chain):
            certificate.verify_directly_issued_by(issuer)
    except (*_FAULTS, x509.ExtensionNotFound, InvalidSignature) as error:
        raise InstallError(
            "the chain does not lead from leaf to issuer, each signing the one before", remedy
        ) from error
    if domain not in names.get_values_for_type(x509.DNSName):
        raise InstallError(f"the certificate is not for {domain}", remedy)
    if not leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc:
        raise InstallError(
            f"the certificate is valid from {leaf.not_valid_before_utc} to {leaf.not_valid_after_utc}, not now",
            "check the clock of this host, then " + remedy,
        )


def _pem(chain: list[x509.Certificate]) -> str:
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in chain)


def _fingerprint(leaf: x509.Certificate) -> str:
    return leaf.fingerprint(hashes.SHA256()).hex()
