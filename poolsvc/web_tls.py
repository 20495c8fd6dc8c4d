"""The certificate of the registry's own web address: from files that somebody renews, or from the pool's CA.

New connections get the newest certificate, those under way keep theirs. The CA is asked as for members' servers, by
the same account and HTTP-01; chain and key are one file, so that they always belong together.
"""

import asyncio
import ssl
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from itertools import count
from pathlib import Path
from secrets import SystemRandom

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nts_core.acme import AcmeAccount, AcmeError, OrderFailed, OrderState, PendingOrder, poll_wait
from nts_core.certificates import ChainError, ChainFacts, chain_facts, check_chain, renew_at
from nts_core.control import ACME_PATH
from nts_core.shell import replace_file
from nts_core.tls import new_key_and_csr
from poolsvc.acme_client import RemoteAccount
from poolsvc.config import Settings
from poolsvc.gate import insecure_transport, may_carry_secret, problem
from poolsvc.worker import Health

# How often files are looked at, and the clock, which may be set while we wait for a renewal.
_INTERVAL = 60.0
# For one order; CAs that queue take minutes.
_ORDER_DEADLINE = 600.0
# Renewals of many registries, and repetitions of one, are not to come at the same moment.
_JITTER = 0.25
_random = SystemRandom()

_log = structlog.get_logger()


class WebCertificate:
    """What the API shows of itself."""

    def __init__(self, health: Health) -> None:
        self.ready = asyncio.Event()
        self._health = health
        self._context: ssl.SSLContext | None = None

    @property
    def context(self) -> ssl.SSLContext:
        """For a new connection; there is one as soon as `ready` is set."""
        assert self._context is not None
        return self._context

    def load(self, chain_file: Path, key_file: Path | None = None) -> ChainFacts:
        """Show this pair from now on. Raises OSError or ChainError, and goes on showing what it has."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Without a password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(chain_file, key_file, password="")
        facts = chain_facts(chain_file.read_text(errors="replace"))
        self._context = context
        self._health.web_certificate_ends_at = facts.not_after
        _log.info("web_certificate", serial=facts.serial, ends=facts.not_after.isoformat())
        return facts


class CertificateFiles:
    """`tls_certificate` and `tls_key`, read again when they change."""

    def __init__(self, certificate: WebCertificate, chain_file: Path, key_file: Path) -> None:
        """Raises OSError or ChainError when they cannot be used."""
        self._certificate = certificate
        self._files = (chain_file, key_file)
        self._seen = self._stamps()
        certificate.load(*self._files)
        certificate.ready.set()

    async def follow(self, interval: float = _INTERVAL) -> None:
        """Look again and again. Files that do not fit together are told once, and read when they change again."""
        while True:
            await asyncio.sleep(interval)
            await asyncio.to_thread(self._look)

    def _look(self) -> None:
        stamps = self._stamps()
        if stamps == self._seen:
            return
        self._seen = stamps
        try:
            self._certificate.load(*self._files)
        except (OSError, ChainError) as error:
            _log.error("web_certificate_unusable", detail=str(error))

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_stamp, self._files))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class AcmeCertificate:
    """A certificate for the host of `public_url` by ACME, renewed in time."""

    def __init__(self, settings: Settings, certificate: WebCertificate, health: Health) -> None:
        self.challenges: dict[str, str] = {}  # token to key authorization, for PlainHttp
        self._settings = settings
        self._host = settings.web_host
        assert settings.certificate_file is not None
        self._file = settings.certificate_file
        self._certificate = certificate
        self._health = health
        self._failures = 0

    async def run(self) -> None:
        """Show what is kept, and get a certificate whenever one is due. A CA that is away only delays that."""
        due = await asyncio.to_thread(self._load_kept, datetime.now(UTC))
        if not self._certificate.ready.is_set():
            _log.warning("api_waits_for_certificate", host=self._host)
        while True:
            now = datetime.now(UTC)
            if now < due:
                await asyncio.sleep(min((due - now).total_seconds(), _INTERVAL))
                continue
            try:
                due = await self._renew()
                self._failures = 0
                self._health.work.pop("web_certificate", None)
            except Exception as error:  # noqa: BLE001 - a task's root: whatever it was, the next renewal must come
                due = now + self._wait(error)
                self._failures += 1
                self._health.work["web_certificate"] = type(error).__name__
                _log.error(
                    "web_certificate_failed",
                    detail=str(error),
                    again=due.isoformat(),
                    shown=self._certificate.ready.is_set(),
                )

    def _load_kept(self, now: datetime) -> datetime:
        """Show the certificate of an earlier process if it is good; when the next one is due."""
        try:
            facts = chain_facts(self._file.read_text(errors="replace"))
            if facts.not_after <= now:
                return now
            self._certificate.load(self._file)
        except FileNotFoundError:
            return now
        except (OSError, ChainError) as error:
            _log.error("web_certificate_unusable", detail=str(error))
            return now
        self._certificate.ready.set()
        return _due(facts)

    def _wait(self, error: Exception) -> timedelta:
        """As for members' orders: long after a refusal, short while the CA is away or busy."""
        policy = self._settings.policy
        asked = (error.retry_after or 0) if isinstance(error, AcmeError) else 0
        if isinstance(error, OrderFailed) or (isinstance(error, AcmeError) and error.permanent):
            wait = policy.order_wait(self._failures)
        else:
            wait = policy.step_wait(self._failures)
        return max(wait, timedelta(seconds=asked)) * _random.uniform(1, 1 + _JITTER)

    async def _renew(self) -> datetime:
        """One order with a new key; when the next one is due."""
        account = await RemoteAccount.reach(self._settings, self._settings.ca)
        try:
            key, csr = new_key_and_csr(self._host)
            order = await account.order(csr, self._host)
            try:
                async with asyncio.timeout(_ORDER_DEADLINE):
                    chain = await self._obtain(account, order, csr)
            except Exception:
                await self._end_authorization(account, order)
                raise
            await self._end_authorization(account, order)
        finally:
            account.close()
        check_chain(chain, csr, self._host)
        facts = await asyncio.to_thread(self._keep, key + chain)
        self._certificate.ready.set()
        # Never at once again, whatever times a CA writes into its certificates.
        return max(_due(facts), datetime.now(UTC) + self._settings.policy.order_wait(0))

    async def _obtain(self, account: AcmeAccount, order: PendingOrder, csr: str) -> str:
        if (
            order.token is not None
            and order.key_authorization is not None
            and order.challenge_url is not None
        ):
            self.challenges[order.token] = order.key_authorization
            try:
                await account.answer(order.challenge_url)
                await _poll(account, order.url, OrderState.READY, OrderState.VALID)
            finally:
                del self.challenges[order.token]
        await account.finalize(order.url, csr)
        await _poll(account, order.url, OrderState.VALID)
        return await account.download(order.url)

    @staticmethod
    async def _end_authorization(account: AcmeAccount, order: PendingOrder) -> None:
        """None outlives its order, as for members. What the CA says to that does not matter here."""
        with suppress(AcmeError):
            await account.deactivate_authorization(order.authorization_url)

    def _keep(self, pem: str) -> ChainFacts:
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(self._file, pem.encode())
        return self._certificate.load(self._file)


async def _poll(account: AcmeAccount, url: str, *wanted: OrderState) -> None:
    for attempts in count():
        found = await account.poll(url)
        if found.status in wanted:
            return
        if found.status is OrderState.INVALID:
            raise OrderFailed(found.error_detail or "the CA declared the order invalid")
        await asyncio.sleep(max(poll_wait(attempts).total_seconds(), found.retry_after or 0))


def _due(facts: ChainFacts) -> datetime:
    """A little after the time that is right for its life."""
    begin = renew_at(facts.not_before, facts.not_after)
    return begin + (facts.not_after - begin) * _random.uniform(0, _JITTER)


class PlainHttp:
    """Port 80 of a registry that has HTTPS: the CA's questions, the way to HTTPS, and nothing for whoever sends
    secrets in the open.
    """

    def __init__(self, challenges: Mapping[str, str], public_url: str) -> None:
        self._challenges = challenges
        self._public_url = public_url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope)(scope, receive, send)

    def _answer(self, scope: Scope) -> Response:
        if may_carry_secret(scope):
            return insecure_transport(scope)
        path: str = scope["raw_path"].decode("ascii")
        if path.startswith(ACME_PATH):
            text = self._challenges.get(path.removeprefix(ACME_PATH))
            if text is None:
                return problem(scope, HTTPStatus.NOT_FOUND, "not-found", "there is no such challenge")
            return Response(
                text, media_type="application/octet-stream", headers={"Cache-Control": "no-store"}
            )
        # A target that is a whole address, or an asterisk, leads to the root.
        target = path if path.startswith("/") else "/"
        query = scope["query_string"].decode("ascii")
        location = self._public_url + target + (f"?{query}" if query else "")
        return Response(status_code=HTTPStatus.MOVED_PERMANENTLY, headers={"Location": location})
