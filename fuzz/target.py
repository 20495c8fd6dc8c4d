"""What a target is, and the small tools that targets are made of.

Rules:

1. A target takes any octets, and one input always does the same as far as the code under test decides: keys,
   times and randomness are fixed (but TLS and DNS signatures draw their own).
2. It returns one word for what became of the input. `reaches` names the words that the corpus must bring forth, so
   that a corpus that has rotted is noticed.
3. It lets no exception through but a fault: the documented ones become words.
4. Beyond that it states an oracle: what holds for every input. `hold` enforces it.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz.mutate import Layout

CORPUS = Path(__file__).parent / "corpus"
# 2023-11-14; every target's present.
NOW = 1_700_000_000


class OracleError(Exception):
    """Something that must hold for every input does not hold for this one."""


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to fuzz. `oracle` is in words, for the reader of a report; `longest` counts octets of an input.

    `layout` is the input's structure; without it the engine changes octets only. `tokens` are octets worth trying.
    """

    name: str
    oracle: str
    run: Callable[[bytes], str]
    reaches: frozenset[str]
    longest: int = 4096
    layout: Layout | None = None
    tokens: tuple[bytes, ...] = ()

    @property
    def corpus(self) -> Path:
        return CORPUS / self.name

    def inputs(self) -> list[Path]:
        """The files of the corpus in the tree."""
        return sorted(path for path in self.corpus.iterdir() if path.is_file())


def hold(condition: object, sentence: str) -> None:
    """Raise OracleError with the sentence that does not hold."""
    if not condition:
        raise OracleError(sentence)


class Plan:
    """An input read from its beginning; what is missing reads as zero or as nothing."""

    def __init__(self, octets: bytes) -> None:
        self._octets = octets
        self._position = 0

    def __bool__(self) -> bool:
        return self._position < len(self._octets)

    def octet(self) -> int:
        return int.from_bytes(self.take(1))

    def number(self) -> int:
        """16 bits, big-endian."""
        return int.from_bytes(self.take(2))

    def take(self, length: int) -> bytes:
        found = self._octets[self._position : self._position + length]
        self._position += length
        return found

    def rest(self) -> bytes:
        return self.take(len(self._octets))


def pieces(octets: bytes, length: int) -> Iterator[bytes]:
    """`octets` in pieces of `length`; all in one when that is 0."""
    step = length or max(len(octets), 1)
    return (octets[start : start + step] for start in range(0, len(octets), step))


class Drawn:
    """Randomness that is the same for every run, and counts the octets that it gives."""

    def __init__(self, salt: bytes = b"") -> None:
        self._stream = hashlib.shake_128(salt)
        self.octets = 0

    def __call__(self, length: int) -> bytes:
        start, self.octets = self.octets, self.octets + length
        return self._stream.digest(self.octets)[start:]
