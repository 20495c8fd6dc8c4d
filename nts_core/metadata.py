"""What a pool says of who runs a server and where: one TXT record beside its addresses (docs/dns-records.md). Pure.

It lets a client choose servers that do not fail together. It is a hint: whoever signs the zone can say anything.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

VERSION = b"v=truechimer1"
MAX_TEXT = 255  # octets of one character-string (RFC 1035 section 3.3.14)
MAX_VALUES = 8  # of a list; so many addresses a server may have
MAX_AS = 2**32 - 1  # RFC 6793

_PAIR = re.compile(rb"([a-z][a-z0-9-]{0,15})=([!-~]+)")
_OPERATOR = re.compile(r"[a-z2-7]{10,26}")
_NUMBER = re.compile(rb"[1-9][0-9]{0,9}")
_COUNTRY = re.compile(r"[A-Z]{2}")


@dataclass(frozen=True, slots=True)
class Metadata:
    """`operator` is the same for all servers of one member; AS numbers and ISO 3166-1 countries are of its addresses.

    What is not known is empty. Raises ValueError for what no record can hold.
    """

    operator: str
    networks: tuple[int, ...] = ()
    countries: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if _OPERATOR.fullmatch(self.operator) is None:
            raise ValueError(f"not an operator id: {self.operator!r}")
        if not all(0 < number <= MAX_AS for number in self.networks):
            raise ValueError(f"not AS numbers: {self.networks}")
        if not all(map(_COUNTRY.fullmatch, self.countries)):
            raise ValueError(f"not countries: {self.countries}")
        for values in (self.networks, self.countries):
            if len(values) > MAX_VALUES or len(set(values)) < len(values):
                raise ValueError(f"too many values, or one twice: {values}")

    def to_text(self) -> str:
        """The record's one character-string; it needs no escapes."""
        words = [VERSION.decode(), f"op={self.operator}"]
        if self.networks:
            words.append(f"as={','.join(map(str, self.networks))}")
        if self.countries:
            words.append(f"cc={','.join(self.countries)}")
        return " ".join(words)


def parse(records: Iterable[tuple[bytes, ...]]) -> Metadata | None:
    """The metadata in a TXT RRset, each record given as its character-strings; None when there is none to rely on.

    Records of other kinds and versions do not count. Two of this version contradict each other, and one that breaks
    the grammar says nothing.
    """
    ours = [strings for strings in records if strings and _is_ours(strings[0])]
    if len(ours) != 1 or len(ours[0]) != 1:
        return None
    try:
        return _read(ours[0][0])
    except ValueError:
        return None


def _is_ours(text: bytes) -> bool:
    return text == VERSION or text.startswith(VERSION + b" ")


def _read(text: bytes) -> Metadata:
    if len(text) > MAX_TEXT:
        raise ValueError("longer than a character-string")
    pairs: dict[bytes, bytes] = {}
    for word in text.split(b" ")[1:]:
        found = _PAIR.fullmatch(word)
        if found is None or found[1] in pairs:
            raise ValueError(f"not a new pair: {word!r}")
        pairs[found[1]] = found[2]
    return Metadata(
        operator=pairs.get(b"op", b"").decode("ascii"),
        networks=tuple(map(_number, _list(pairs, b"as"))),
        countries=tuple(word.decode("ascii") for word in _list(pairs, b"cc")),
    )


def _list(pairs: dict[bytes, bytes], key: bytes) -> list[bytes]:
    return pairs[key].split(b",") if key in pairs else []


def _number(word: bytes) -> int:
    if _NUMBER.fullmatch(word) is None:
        raise ValueError(f"not a number: {word!r}")
    return int(word)
