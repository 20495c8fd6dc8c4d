"""Mutators that keep lengths true, so that what lies behind a length check is reached as well.

Records and extension fields alike are a type, a length and a value. Half of the time the engine changes octets
anywhere; else whole items are doubled, dropped, moved, retyped, or get another value.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

Octets = Callable[[bytes, int], bytes]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where items begin, how they count their length, and which types are worth trying."""

    clear: int  # octets before the first item
    counts_head: bool  # whether an item's length includes its own four octets
    unit: int  # an item's value is filled up to a multiple of this
    types: tuple[int, ...]

    def split(self, octets: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
        """The items that are whole, and what is left over."""
        items: list[tuple[int, bytes]] = []
        position, head = self.clear, 4 if self.counts_head else 0
        while position + 4 <= len(octets):
            kind = int.from_bytes(octets[position : position + 2])
            length = int.from_bytes(octets[position + 2 : position + 4]) - head
            if length < 0 or position + 4 + length > len(octets):
                break
            items.append((kind, octets[position + 4 : position + 4 + length]))
            position += 4 + length
        return items, octets[position:]

    def join(self, items: list[tuple[int, bytes]]) -> bytes:
        head = 4 if self.counts_head else 0
        whole = bytearray()
        for kind, value in items:
            filled = value + bytes(-len(value) % self.unit)
            # Only a mutated value can be too long for its length.
            filled = filled[: 0xFFFC - head]
            whole += kind.to_bytes(2) + (len(filled) + head).to_bytes(2) + filled
        return bytes(whole)

    def mutate(self, data: bytes, longest: int, seed: int, octets: Octets) -> bytes:
        """Other octets than `data`; `octets` is the engine's own mutator, told the longest result."""
        draw = random.Random(seed)
        if draw.random() < 0.5:
            return octets(data, longest)
        items, rest = self.split(data)
        clear = data[: self.clear]
        if not items or draw.random() < 0.1:
            clear = octets(clear, self.clear).ljust(self.clear, b"\0")
        self._change(items, draw, octets)
        return (clear + self.join(items) + rest)[:longest]

    def _change(self, items: list[tuple[int, bytes]], draw: random.Random, octets: Octets) -> None:
        place = draw.randrange(len(items) + 1)
        kind, value = items[place] if place < len(items) else (draw.choice(self.types), bytes(16))
        match draw.randrange(6) if place < len(items) else 0:
            case 0:
                items.insert(place, (kind, value))
            case 1:
                del items[place]
            case 2:
                items[place] = (draw.choice(self.types), value)
            case 3:
                other = draw.randrange(len(items))
                items[place], items[other] = items[other], items[place]
            case 4:
                items[place] = (kind, value[: draw.randrange(len(value) + 1)])
            case _:
                items[place] = (kind, octets(value, len(value) + 64))
