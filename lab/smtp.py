"""A mail server that keeps what it is given, and says what a test wants it to say."""

import asyncio
import email
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.policy import SMTPUTF8
from typing import Any, Self

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

_TAKEN = "250 taken"


@dataclass(frozen=True, slots=True)
class Received:
    """One message as it came."""

    sender: str
    recipients: Sequence[str]
    octets: bytes = field(repr=False)
    encrypted: bool
    user: str | None

    @property
    def message(self) -> EmailMessage:
        return email.message_from_bytes(self.octets, policy=SMTPUTF8)


class MailServer:
    """aiosmtpd on a port of loopback, for a block of code.

    `answers` are given to the next messages in turn, by their RCPT or DATA command; afterwards all are taken. With
    `silent` nobody is ever greeted.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        implicit_tls: bool = False,
        password: tuple[str, str] | None = None,
        smtputf8: bool = True,
        silent: bool = False,
        port: int = 0,
    ) -> None:
        self._tls, self._implicit_tls, self._password = tls, implicit_tls, password
        self._smtputf8, self._silent = smtputf8, silent
        self.port = port
        self.to_recipients: list[str] = []
        self.to_messages: list[str] = []
        self.received: list[Received] = []
        self.connections = 0

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._protocol, "127.0.0.1", self.port, ssl=self._tls if self._implicit_tls else None
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    def _protocol(self) -> asyncio.BaseProtocol:
        self.connections += 1
        if self._silent:
            return asyncio.Protocol()
        return SMTP(
            self,
            hostname="mail.example",
            enable_SMTPUTF8=self._smtputf8,
            tls_context=None if self._implicit_tls else self._tls,
            require_starttls=self._tls is not None and not self._implicit_tls,
            auth_required=self._password is not None,
            auth_require_tls=not self._implicit_tls,
            authenticator=self._authenticate,
            loop=asyncio.get_running_loop(),
        )

    def _authenticate(
        self, _server: SMTP, _session: Session, _envelope: Envelope, _mechanism: str, data: Any
    ) -> AuthResult:
        given = (data.login.decode(), data.password.decode()) if isinstance(data, LoginPassword) else None
        return AuthResult(success=given == self._password, auth_data=data.login, handled=False)

    async def handle_RCPT(  # noqa: N802 - the name is aiosmtpd's
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: Sequence[str]
    ) -> str:
        answer = self.to_recipients.pop(0) if self.to_recipients else _TAKEN
        if answer == _TAKEN:
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(self, _server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        answer = self.to_messages.pop(0) if self.to_messages else _TAKEN
        if answer == _TAKEN:
            user = session.auth_data
            self.received.append(
                Received(
                    envelope.mail_from or "",
                    list(envelope.rcpt_tos),
                    envelope.original_content or b"",
                    encrypted=session.ssl is not None or self._implicit_tls,
                    user=None if user is None else user.decode(),
                )
            )
        return answer
