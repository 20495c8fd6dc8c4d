"""The engine inside the agent: NTS-KE and NTP in this process, certificates and keys swapped while it runs."""

import secrets
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from member_agent.clock import Clock
from member_agent.ke_server import KeListeners
from member_agent.ntp_server import NtpListeners
from member_agent.sockets import Endpoint
from nts_core.cookies import Keyring
from nts_core.ke import NtpEndpoint
from nts_core.tls import ServerCredentials

ROTATION = timedelta(days=1)
# Clients that poll once a day must find their key for longer than that; NTPsec came to ten days.
HISTORY = 10


class BuiltinEngine:
    """Serves from `start` to `stop`.

    `save` is called with every new keyring before the keyring is used, so that no cookie outlives its key in
    a crash.
    """

    name = "builtin"

    def __init__(
        self,
        credentials: ServerCredentials,
        clock: Clock,
        *,
        keyring: Keyring | None,
        save: Callable[[Keyring], None],
    ) -> None:
        if keyring is None:
            keyring = Keyring.new(int(time.time()), secrets.token_bytes)
            save(keyring)
        self._keyring = keyring
        self._save = save
        self.clock = clock
        self.ke = KeListeners(credentials, keyring)
        self.ntp = NtpListeners(clock, keyring)

    async def start(self, ke: Sequence[Endpoint], ntp: Sequence[Endpoint]) -> None:
        """Bind everything, then answer. Raises AgentError when something cannot be bound."""
        sockets = [self.ke.bind(endpoint) for endpoint in ke]
        for endpoint in ntp:
            self.ntp.listen(endpoint)
        for sock, endpoint in zip(sockets, self.ke.endpoints, strict=True):
            await self.ke.listen(sock, _ntp_for(endpoint, self.ntp.endpoints))

    async def stop(self) -> None:
        await self.ke.close()
        self.ntp.close()

    def use_credentials(self, credentials: ServerCredentials) -> None:
        """The certificate for new connections; those under way are not touched."""
        self.ke.credentials = credentials

    def rotate_if_due(self) -> None:
        """Make a fresh cookie key when the sealing one is older than a day."""
        now = int(time.time())
        age = now - self._keyring.sealing_since
        # A key from the future means that the clock was set back: its age cannot be told.
        if 0 <= age < ROTATION.total_seconds():
            return
        rotated = self._keyring.rotated(now, secrets.token_bytes, history=HISTORY)
        self._save(rotated)
        self._keyring = rotated
        self.ke.keyring = rotated
        self.ntp.use_keyring(rotated)

    def seconds_to_rotation(self) -> float:
        return max(1.0, ROTATION.total_seconds() - (time.time() - self._keyring.sealing_since))


def _ntp_for(ke: Endpoint, served: Sequence[Endpoint]) -> NtpEndpoint:
    """Where clients of a KE address find NTP: on the same address if it is served there."""
    for ntp in served:
        if ntp.address == ke.address or (ntp.is_wildcard and ntp.family == ke.family):
            return NtpEndpoint(None, ntp.port)
    return NtpEndpoint(None if served[0].is_wildcard else served[0].address, served[0].port)
