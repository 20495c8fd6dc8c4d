"""The engine inside the agent: NTS-KE and NTP in this process, certificates and keys swapped while it runs."""

import secrets
import time
from collections.abc import Sequence

import structlog

from member_agent.clock import Clock
from member_agent.config import AgentSettings
from member_agent.ke_server import KeListeners
from member_agent.ntp_server import NtpListeners
from member_agent.sockets import Endpoint
from member_agent.state import StateDirectory
from nts_core.cookies import Keyring, Schedule
from nts_core.ke import NtpEndpoint, NtpService
from nts_core.tls import ServerCredentials

_log = structlog.get_logger()


class BuiltinEngine:
    """Serves from `start` to `stop`."""

    name = "builtin"

    def __init__(
        self,
        credentials: ServerCredentials,
        clock: Clock,
        settings: AgentSettings,
        state: StateDirectory | None,
    ) -> None:
        """Cookie keys are kept in `state`; without one they die with the process. Raises AgentError."""
        self._settings = settings
        self._state = state
        self._keyring = self._first_keyring()
        self.clock = clock
        self.ke = KeListeners(credentials, self._keyring, settings.limits, settings.aead)
        self.ntp = NtpListeners(clock, self._keyring, settings.limits)

    def _first_keyring(self) -> Keyring:
        """The keys of the last run under the schedule that holds now, or fresh ones."""
        schedule = Schedule(self._settings.cookie_rotation, self._settings.cookie_history)
        keyring = self._state.keyring() if self._state else None
        if keyring is None:
            keyring = Keyring.new(int(time.time()), secrets.token_bytes, schedule)
            self._save(keyring)
            return keyring
        kept, keyring = keyring, keyring.under(schedule.rotation, schedule.history)
        if keyring.schedule != kept.schedule:
            self._save(keyring)
        if keyring.schedule.rotation != schedule.rotation:
            _log.info("cookie_rotation_is_that_of_the_ratchet", seconds=keyring.schedule.rotation)
        return keyring

    def _save(self, keyring: Keyring) -> None:
        """Before the keyring is used, so that no cookie outlives its key in a crash."""
        if self._state is not None:
            self._state.save_keyring(keyring)

    async def start(self, ke: Sequence[Endpoint], ntp: Sequence[Endpoint]) -> None:
        """Bind everything, then answer. Raises AgentError when something cannot be bound."""
        sockets = [self.ke.bind(endpoint) for endpoint in ke]
        for endpoint in ntp:
            self.ntp.listen(endpoint)
        for sock in sockets:
            self.ke.listen(sock, self._service)

    def _service(self, local: str) -> NtpService:
        """Where clients of the KE address `local` find NTP: there if it is served there.

        Otherwise at an address of the same family, at another, or by the certificate's name, which may lead to
        any (RFC 8915 section 4.1.7). Addresses with a zone mean nothing elsewhere and are not told.
        """
        family = Endpoint(local, 0).family
        names = self.ke.credentials.names
        here: list[NtpEndpoint] = []
        told: list[NtpEndpoint] = []
        for ntp in sorted(self.ntp.endpoints, key=lambda ntp: ntp.family != family):
            if ntp.address == local or (ntp.is_wildcard and ntp.family == family):
                here.append(NtpEndpoint(None, ntp.port))
                # By these names, too, a client may ask for what it would get anyway.
                told += [NtpEndpoint(name, ntp.port) for name in (local, *names)]
            elif ntp.is_wildcard:
                told += [NtpEndpoint(name, ntp.port) for name in names]
            else:
                told.append(NtpEndpoint(ntp.address, ntp.port))
        told = [endpoint for endpoint in told if endpoint.host and "%" not in endpoint.host]
        elsewhere = [self._settings.ntp_server] if self._settings.ntp_server else []
        choices = [*elsewhere, *here, *told, NtpEndpoint(None, self.ntp.endpoints[0].port)]
        return NtpService(choices[0], tuple(told))

    async def stop(self) -> None:
        await self.ke.close()
        self.ntp.close()

    def use_credentials(self, credentials: ServerCredentials) -> None:
        """The certificate for new connections; those under way are not touched."""
        self.ke.credentials = credentials

    def rotate_if_due(self) -> None:
        """Seal with the key that was made ahead once its time has come, and make the next."""
        rotated = self._keyring.at(int(time.time()), secrets.token_bytes)
        if rotated is self._keyring:
            return
        self._save(rotated)
        self._keyring = rotated
        self.ke.keyring = rotated
        self.ntp.use_keyring(rotated)

    def seconds_to_rotation(self) -> float:
        return max(1.0, self._keyring.next_at - time.time())
