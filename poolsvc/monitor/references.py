"""Asking the references what time it is (I/O): each over each family that it has, all at once, within a deadline."""

import asyncio
import secrets
import time
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from ipaddress import ip_address

from cryptography import x509

from nts_core.association import Association, Plain, Sample
from nts_core.client import ClientError, establish, exchange, ntp_address, system_addresses
from nts_core.errors import KissOfDeath, OutOfCookies, printable
from nts_core.tls import Trust
from poolsvc.monitor.soundness import Kind, Reading, Reference

# Seconds for all of it; for how long a name's addresses are used before they are looked up again.
_DEADLINE = 15.0
_NAMES_KEPT = 3600.0
_TRIES = 2
_MAX_WHY = 120


class References:
    """Keeps the cookies of those with NTS, so that they are asked for keys seldom. `versions` are the families to ask over."""

    def __init__(
        self, references: Sequence[Reference], roots: Sequence[x509.Certificate], versions: Collection[int]
    ) -> None:
        self._references = tuple(references)
        self._roots = tuple(roots)
        self._versions = sorted(versions)
        self._addresses: dict[str, tuple[list[str], float]] = {}
        self._sessions: dict[tuple[Reference, str], tuple[Association, str, int]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """By which readings are told apart; one server asked in two ways is two."""
        return tuple(map(str, self._references))

    async def read(self) -> list[Reading]:
        """What they say now; none of it raises."""
        found: list[Reading] = []
        try:
            async with asyncio.timeout(_DEADLINE):
                await asyncio.gather(*(self._read(reference, found) for reference in self._references))
        except TimeoutError:
            # Whoever is missing is silent.
            pass
        return found

    async def _read(self, reference: Reference, found: list[Reading]) -> None:
        try:
            addresses = await self._resolve(reference.host)
        except ClientError as error:
            found += [self._fault(reference, version, error.message) for version in self._versions]
            return
        chosen = {ip_address(address).version: address for address in reversed(addresses)}
        asked = [(version, chosen[version]) for version in self._versions if version in chosen]

        async def one(version: int, address: str) -> None:
            try:
                sample = await self._sample(reference, address)
            except (ClientError, KissOfDeath, OutOfCookies) as error:
                self._addresses.pop(reference.host, None)
                found.append(self._fault(reference, version, str(error)))
            else:
                found.append(Reading(str(reference), version, sample))

        await asyncio.gather(*(one(version, address) for version, address in asked))

    @staticmethod
    def _fault(reference: Reference, version: int, why: str) -> Reading:
        return Reading(str(reference), version, None, printable(why, _MAX_WHY))

    async def _resolve(self, host: str) -> list[str]:
        """The addresses of a host; it is looked up again after an hour, and when it did not answer."""
        known = self._addresses.get(host)
        if known is not None and known[1] > time.monotonic():
            return known[0]
        addresses = await system_addresses(host)
        self._addresses[host] = addresses, time.monotonic() + _NAMES_KEPT
        return addresses

    async def _sample(self, reference: Reference, address: str) -> Sample:
        for attempt in range(_TRIES):
            try:
                if reference.kind is Kind.NTP:
                    return await exchange(Plain(secrets.token_bytes), address, reference.port)
                association, host, port = await self._session(reference, address)
                return await exchange(association, host, port)
            except (ClientError, KissOfDeath, OutOfCookies):
                self._sessions.pop((reference, address), None)
                if attempt == _TRIES - 1:
                    raise
        raise AssertionError

    async def _session(self, reference: Reference, address: str) -> tuple[Association, str, int]:
        key = reference, address
        if key not in self._sessions:
            trust = Trust.of(self._roots, datetime.now(UTC))
            established = await establish(reference.host, address, reference.port, trust)
            host = await ntp_address(established)
            association = Association(established.result, secrets.token_bytes)
            self._sessions[key] = association, host, established.ntp_port
        return self._sessions[key]
