"""One mail to one recipient, by the operator's SMTP server (RFC 5321, RFC 3207 STARTTLS).

1. The connection is encrypted and the server's certificate checked, unless the settings say "none"; a server that
   offers no STARTTLS when it must gets nothing.
2. Only what the server says of this recipient or this message can be final. A server that is away, refuses our
   password or our sender address is the operator's to repair: the mail waits.
3. A mail whose fate is not known is sent again, with the same Message-ID.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from urllib.parse import urlsplit

import aiosmtplib
from email_validator import EmailNotValidError, validate_email

from nts_core.errors import printable
from poolsvc.config import MailSettings, split_endpoint
from poolsvc.texts import Text

DEADLINE = 20.0
_GOODBYE = 1.0
_FINAL = 500


class MailError(Exception):
    """A mail was not taken. `permanent` when it never will be; `code` is the server's, if it said one."""

    def __init__(self, detail: str, *, permanent: bool = False, code: int | None = None) -> None:
        super().__init__(detail)
        self.detail = printable(detail)
        self.permanent = permanent
        self.code = code


class Mailer:
    """The operator's SMTP server. Raises OSError, ValueError when a file of the settings cannot be used."""

    def __init__(self, settings: MailSettings, *, pool: str, public_url: str) -> None:
        self._settings = settings
        self._pool = pool
        self._own_name = urlsplit(public_url).hostname or pool
        self._password = settings.password_file.read_text().strip() if settings.password_file else None
        self._trust = ssl.create_default_context(cafile=settings.ca_file)

    def compose(
        self, recipient: str, text: Text, *, deliveries: Sequence[int], kinds: Sequence[str], now: datetime
    ) -> EmailMessage:
        """A message about these deliveries, to an address as `envelope` makes it."""
        message = EmailMessage(SMTP)
        sender = self._settings.sender
        message["From"] = Address(self._settings.sender_name or self._pool, addr_spec=sender)
        message["To"] = recipient
        message["Subject"] = f"[{self._pool}] {text.subject}"
        message["Date"] = now
        numbers = "-".join(map(str, (deliveries[0], *deliveries[1:][-1:], len(deliveries))))
        message["Message-ID"] = f"<notice-{numbers}@{sender.rpartition('@')[2]}>"
        # RFC 3834: no machine answers this.
        message["Auto-Submitted"] = "auto-generated"
        for delivery, kind in zip(deliveries, kinds, strict=True):
            message["X-Truechimer-Notice"] = f"{kind}; delivery={delivery}"
        message.set_content(text.body)
        return message

    async def send(self, message: EmailMessage, recipient: str) -> None:
        """Hand the message over. Raises MailError."""
        async with self._connection() as client:
            await client.send_message(message, sender=self._settings.sender, recipients=[recipient])

    async def try_out(self) -> None:
        """Connect as for a mail, and send none. Raises MailError."""
        async with self._connection() as client:
            await client.noop()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[aiosmtplib.SMTP]:
        """A connection on which we may send; whatever goes wrong with it is a MailError."""
        host, port = split_endpoint(self._settings.smtp)
        client = aiosmtplib.SMTP(
            hostname=host,
            port=port,
            username=self._settings.username,
            password=self._password,
            local_hostname=self._own_name,
            timeout=DEADLINE,
            use_tls=self._settings.security == "tls",
            start_tls=self._settings.security == "starttls",
            tls_context=None if self._settings.security == "none" else self._trust,
        )
        try:
            async with asyncio.timeout(DEADLINE):
                await client.connect()
                yield client
        except aiosmtplib.SMTPRecipientsRefused as error:
            raise _refused(error.recipients[0]) from None
        except aiosmtplib.SMTPDataError as error:
            raise _refused(error) from None
        except aiosmtplib.SMTPNotSupported as error:
            raise MailError(f"the mail server cannot do this: {error.message}", permanent=True) from None
        except aiosmtplib.SMTPResponseException as error:
            raise MailError(f"{error.code} {error.message}", code=error.code) from None
        except (aiosmtplib.SMTPTimeoutError, TimeoutError):
            raise MailError(f"the mail server did not answer within {DEADLINE:g} s") from None
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            raise MailError(f"the mail server cannot be used: {error}") from None
        else:
            # It has taken the mail, whatever it makes of the end.
            with suppress(aiosmtplib.SMTPException, OSError):
                await client.quit(timeout=_GOODBYE)
        finally:
            client.close()


def envelope(text: str) -> str:
    """A mail address as SMTP takes it: in ASCII where that is possible. Raises MailError."""
    try:
        found = validate_email(text, check_deliverability=False, test_environment=True)
    except EmailNotValidError:
        raise MailError("not a mail address", permanent=True) from None
    return found.ascii_email or found.normalized


def _refused(error: aiosmtplib.SMTPResponseException) -> MailError:
    return MailError(f"{error.code} {error.message}", permanent=error.code >= _FINAL, code=error.code)
