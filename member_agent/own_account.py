"""An account of this host's own at a CA, which orders in place of the registry's: `acme.mode = "own-account"`.

Imported in that mode alone, as the ACME library takes 7 MB. What the CA has been asked for is in a journal on the disk
before it is told to look, so that an agent that died goes on with the same order. A registry that is away is not missed:
what it last said of CAA holds until it says otherwise.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from random import SystemRandom

import structlog
from pydantic import AwareDatetime, TypeAdapter, ValidationError

from member_agent.challenges import ChallengeError, validate_challenge
from member_agent.config import Acme
from member_agent.errors import AgentError
from member_agent.install import CertificateStore, InstalledPair, InstallError
from member_agent.state import MemberDirectory
from nts_core.acme import (
    AcmeAccount,
    AcmeConfig,
    AcmeError,
    Challenge,
    OrderFailed,
    OrderState,
    RenewalInfo,
    poll_wait,
)
from nts_core.certificates import (
    ChainError,
    CsrError,
    certificate_id,
    moment_of,
    renew_at,
    renew_by,
)
from nts_core.control import HttpChallenge, TlsChallenge, Validation
from nts_core.errors import printable
from nts_core.shell import replace_file

JOURNAL, KEY = "own-account.json", "acme-account.pem"

_DAY = timedelta(days=1)
# After failures in a row; and after certificates of one day, from the second on.
_RETRIES = (timedelta(minutes=1), timedelta(minutes=10), timedelta(minutes=100), _DAY)
# Many agents whose CA comes back are not to ask it at the same moment.
_JITTER = 0.25
# No wait is longer: one that is comes of a clock that was set back.
_LONGEST = timedelta(days=9)
# Seconds for one attempt at an order, which the next one goes on with, and for a wait within it.
_ATTEMPT, _PATIENCE = 600.0, 60.0
_ORDER_LIFE = timedelta(days=7)  # after which it is given up
# Before a CA is asked again for renewal information that it does not have, refused, or could not give now.
_NOT_OFFERED, _REFUSED, _FAILED = _DAY, timedelta(hours=6), timedelta(hours=1)
# How often the clock is looked at, which may be set while we wait.
_LOOK = timedelta(minutes=1)

_random = SystemRandom()
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class OpenOrder:
    """An order at the CA; `number` is that of its key in the CertificateStore, `by` how the host answers the challenge."""

    number: int
    began_at: AwareDatetime
    url: str
    authorization_url: str
    challenge_url: str | None
    challenge: HttpChallenge | None  # None where control was proved before
    by: Validation


@dataclass(frozen=True, slots=True)
class Plan:
    """What the CA said of when the certificate with this fingerprint is to be renewed, and when it is asked again."""

    fingerprint: str
    look_at: AwareDatetime
    start: AwareDatetime | None = None
    end: AwareDatetime | None = None
    renew_at: AwareDatetime | None = None  # drawn once for each window


@dataclass(frozen=True, slots=True)
class Journal:
    """All that has to outlive the process, for one CA. Before `again_at` the CA is not asked for certificates."""

    directory_url: str
    account_uri: str | None = None
    may_order: bool = False
    by_hand: bool = False
    order: OpenOrder | None = None
    plan: Plan | None = None
    issued: tuple[AwareDatetime, ...] = ()  # of the last day
    failures: int = 0
    again_at: AwareDatetime | None = None
    problem: str | None = None


_journal_adapter = TypeAdapter(Journal)


def order_at(journal: Journal, pair: InstalledPair | None, now: datetime) -> datetime:
    """When a certificate is ordered, or an order gone on with."""
    if journal.order is not None or journal.by_hand or pair is None:
        due = now
    else:
        plan = _plan_of(journal, pair, now)
        due = plan.renew_at or renew_at(pair.not_before, pair.not_after)
    held = journal.again_at
    return due if held is None or held - now > _LONGEST else max(due, held)


def look_at(journal: Journal, pair: InstalledPair, now: datetime) -> datetime:
    """When the CA is asked for renewal information."""
    at = _plan_of(journal, pair, now).look_at
    return now if at - now > _LONGEST else at


def _plan_of(journal: Journal, pair: InstalledPair, now: datetime) -> Plan:
    known = journal.plan
    return (
        known if known is not None and known.fingerprint == pair.fingerprint else Plan(pair.fingerprint, now)
    )


def after_failure(
    journal: Journal, problem: str, now: datetime, *, asked: float | None, draw: float
) -> Journal:
    """Wait as the CA asked in its Retry-After, and longer each time; `draw` is a random number from 0 to 1."""
    wait = max(_RETRIES[min(journal.failures, len(_RETRIES) - 1)], timedelta(seconds=asked or 0))
    return replace(
        journal,
        failures=journal.failures + 1,
        again_at=now + wait * (1 + _JITTER * draw),
        problem=printable(problem),
    )


def after_issue(journal: Journal, now: datetime) -> Journal:
    """A CA that wants everything renewed at once gets that, but each time of a day later than the last."""
    today = (*(at for at in journal.issued if abs(now - at) < _DAY), now)[-len(_RETRIES) - 1 :]
    again_at = now + _RETRIES[len(today) - 2] if len(today) > 1 else None
    return replace(
        journal, order=None, by_hand=False, issued=today, failures=0, again_at=again_at, problem=None
    )


def after_look(
    journal: Journal,
    pair: InstalledPair,
    info: RenewalInfo | None,
    now: datetime,
    *,
    wait: timedelta,
    draw: float,
) -> Journal:
    """Draw the moment once for each window. What the CA does not say, or cannot say now, is left as it was."""
    plan = replace(_plan_of(journal, pair, now), look_at=now + wait)
    if info is not None and (plan.start, plan.end) != (info.start, info.end):
        at = min(moment_of(info.start, info.end, draw), renew_by(pair.not_before, pair.not_after))
        plan = replace(plan, start=info.start, end=info.end, renew_at=at)
    return replace(journal, plan=plan)


class OwnAccount:
    """The account and the certificates of one server. `uri` and `problem` are what the member tells.

    `install` is given the number of an order and its chain, `changed` is called when there is another challenge to answer,
    certificate to serve, or thing to tell.
    """

    def __init__(
        self,
        directory: MemberDirectory,
        store: CertificateStore,
        domain: str,
        settings: Acme,
        *,
        install: Callable[[int, str], Awaitable[None]],
        changed: Callable[[], None],
    ) -> None:
        """Raises OSError for a journal that cannot be read. One that is damaged is begun anew."""
        assert settings.directory_url is not None
        self._store = store
        self._domain = domain
        self._by = settings.validation
        self._install, self._changed = install, changed
        self._path = directory.path / JOURNAL
        self._config = AcmeConfig(
            directory_url=settings.directory_url,
            account_key_file=directory.path / KEY,
            contact=settings.contact,
            ca_file=settings.ca_file,
        )
        self._journal = self._read()
        self._is_answering = False
        # Why the pool does not let this account order, as the registry says.
        self.refused = ""
        self._wake = asyncio.Event()

    @property
    def uri(self) -> str | None:
        return self._journal.account_uri

    @property
    def problem(self) -> str | None:
        problem = self._journal.problem
        if self.refused:
            problem = f"the registry refuses it: {self.refused}; let acme.directory_url be that of a CA of the pool's"
        return None if problem is None else f"own ACME account: {problem}"

    @property
    def challenges(self) -> tuple[HttpChallenge, ...]:
        return self._answered(Validation.HTTP_01)

    @property
    def tls_challenges(self) -> tuple[TlsChallenge, ...]:
        texts = (challenge.key_authorization.encode() for challenge in self._answered(Validation.TLS_ALPN_01))
        return tuple(TlsChallenge(hashlib.sha256(text).hexdigest()) for text in texts)

    def _answered(self, by: Validation) -> tuple[HttpChallenge, ...]:
        order = self._journal.order
        return () if order is None or order.challenge is None or order.by is not by else (order.challenge,)

    @property
    def _may_order(self) -> bool:
        return self._journal.may_order and self._is_answering

    def allow(self, *, may_order: bool | None) -> None:
        """The host answers the CA now. `may_order`: whether CAA names the account, None of a registry that is away."""
        if may_order is not None and may_order != self._journal.may_order:
            self._keep(replace(self._journal, may_order=may_order))
        elif self._is_answering:
            return
        self._is_answering = True
        self._wake.set()

    def hold(self) -> None:
        """The host does not answer the CA: an order would fail."""
        self._is_answering = False

    def renew(self) -> None:
        """Order now, as soon as the CA may be asked."""
        self._keep(replace(self._journal, by_hand=True))
        self._wake.set()

    def facts(self, pair: InstalledPair | None, now: datetime) -> dict[str, object]:
        """For `pool-agent status`, with the certificate in use; times are Unix seconds."""
        at = order_at(self._journal, pair, now)
        return {
            "uri": self.uri,
            "may_order": self._journal.may_order,
            "ordering": self._journal.order is not None,
            "order_at": int(at.timestamp()),
        }

    async def follow(self) -> None:
        """Have a certificate ordered whenever one is due, until cancelled."""
        while True:
            self._wake.clear()
            now = datetime.now(UTC)
            try:
                due = await self.step(now)
            except Exception as error:  # noqa: BLE001 - a task's root: whatever it was, the next renewal must come
                self._fail(error, type(error).__name__, now)
                due = now + _LOOK
            wait = min(due - datetime.now(UTC), _LOOK).total_seconds()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(wait, 0.0))

    async def step(self, now: datetime) -> datetime:
        """Do what is due, and say when to look again. What the CA refuses is the problem until something succeeds."""
        pair = await asyncio.to_thread(self._store.newest)
        if self.uri is not None and pair is not None and look_at(self._journal, pair, now) <= now:
            await self._look(pair, now)
        if self.uri is not None and not self._may_order:
            return now + _LOOK
        due = order_at(self._journal, None if self.uri is None else pair, now)
        if due > now:
            return due
        try:
            async with asyncio.timeout(_ATTEMPT), self._account() as account:
                if self._may_order:
                    await self._obtain(account, pair, now)
        except TimeoutError as error:
            self._fail(error, "the CA has not come to an end with the order yet", now)
        except AcmeError as error:
            self._fail(error, error.detail, now, asked=error.retry_after)
        except InstallError as error:  # whose remedy is the registry's next order
            self._fail(error, error.message, now)
        except AgentError as error:
            self._fail(error, f"{error.message}; {error.remedy}", now)
        except (OrderFailed, OSError) as error:
            self._fail(error, str(error), now)
        return now

    @asynccontextmanager
    async def _account(self) -> AsyncIterator[AcmeAccount]:
        """Opened for each order: a CA that has lost the account makes another one, which CAA has to name first."""
        account = await AcmeAccount.open(self._config)
        try:
            if account.uri != self.uri:
                self._save(
                    replace(
                        self._journal,
                        account_uri=account.uri,
                        may_order=False,
                        order=None,
                        failures=0,
                        again_at=None,
                        problem=None,
                    )
                )
                _log.info("acme_account", domain=self._domain, uri=account.uri)
                self._changed()
            yield account
        finally:
            account.close()

    async def _obtain(self, account: AcmeAccount, pair: InstalledPair | None, now: datetime) -> None:
        """One certificate, of the order that is open or of another one."""
        order = self._journal.order
        if order is not None and (order.by is not self._by or now - order.began_at > _ORDER_LIFE):
            order = None
        try:
            number = await asyncio.to_thread(self._store.next_order) if order is None else order.number
            csr = await asyncio.to_thread(self._store.pending, number)
            if order is None:
                order = await self._place(account, number, csr, pair, now)
            # Also of one that is known: the write before may have failed.
            self._save(replace(self._journal, order=order))
            self._changed()
            chain = await self._bring_to_end(account, order, csr)
            await self._install(number, chain)
        except (OrderFailed, InstallError):
            self._keep(replace(self._journal, order=None))
            raise
        except AcmeError as error:
            if error.permanent or error.status in {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}:
                self._keep(replace(self._journal, order=None))
            raise
        # None outlives its order. What the CA says to that does not matter here.
        with suppress(AcmeError):
            await account.deactivate_authorization(order.authorization_url)
        self._save(after_issue(self._journal, now))
        self._changed()

    async def _place(
        self, account: AcmeAccount, number: int, csr: str, pair: InstalledPair | None, now: datetime
    ) -> OpenOrder:
        kind, challenge = Challenge(self._by), None
        try:
            placed = await account.order(csr, self._domain, challenge=kind, replaces=_identifier(pair))
            if placed.token is not None and placed.key_authorization is not None:
                challenge = HttpChallenge(placed.token, placed.key_authorization)
                validate_challenge(challenge)
        except (CsrError, ChallengeError) as error:
            raise OrderFailed(str(error)) from error
        _log.info("certificate_ordered", domain=self._domain, order=number, url=placed.url)
        return OpenOrder(
            number,
            now,
            placed.url,
            placed.authorization_url,
            placed.challenge_url,
            challenge,
            self._by,
        )

    async def _bring_to_end(self, account: AcmeAccount, order: OpenOrder, csr: str) -> str:
        """The chain. What is next follows from how the CA has the order, whoever brought it there."""
        asked: OrderState | None = None
        attempts = 0
        while True:
            found = await account.poll(order.url)
            match found.status:
                case OrderState.VALID:
                    return await account.download(order.url)
                case OrderState.INVALID:
                    raise OrderFailed(found.error_detail or "the CA declared the order invalid")
                case OrderState.PENDING if asked is None and order.challenge_url is not None:
                    await account.answer(order.challenge_url)
                    asked, attempts = OrderState.PENDING, 0
                case OrderState.READY if asked is not OrderState.READY:
                    await account.finalize(order.url, csr)
                    asked, attempts = OrderState.READY, 0
                case _:
                    attempts += 1
            asked_wait = found.retry_after or 0.0
            if asked_wait > _PATIENCE:
                raise AcmeError(
                    "orderNotReady", f"the order is {found.status}", retry_after=found.retry_after
                )
            await asyncio.sleep(max(poll_wait(attempts).total_seconds(), asked_wait))

    async def _look(self, pair: InstalledPair, now: datetime) -> None:
        """Ask the CA when it would have the certificate renewed (RFC 9773)."""
        info, wait = None, _NOT_OFFERED
        identifier = _identifier(pair)
        try:
            if identifier is not None:
                async with self._account() as account:
                    info = await account.renewal_info(identifier)
        except AcmeError as error:
            is_refused = error.status is not None and error.status < HTTPStatus.INTERNAL_SERVER_ERROR
            wait = max(_REFUSED if is_refused else _FAILED, timedelta(seconds=error.retry_after or 0))
            _log.info("renewal_not_told", domain=self._domain, code=error.code, detail=error.detail)
        if info is not None:
            wait = timedelta(seconds=info.retry_after)
        self._keep(after_look(self._journal, pair, info, now, wait=wait, draw=_random.random()))

    def _fail(self, error: Exception, problem: str, now: datetime, *, asked: float | None = None) -> None:
        self._keep(after_failure(self._journal, problem, now, asked=asked, draw=_random.random()))
        _log.error(
            "no_certificate_by_own_account",
            domain=self._domain,
            error=type(error).__name__,
            detail=self._journal.problem,
            again=None if self._journal.again_at is None else self._journal.again_at.isoformat(),
        )
        self._changed()

    # The journal

    def _read(self) -> Journal:
        fresh = Journal(str(self._config.directory_url))
        try:
            journal = _journal_adapter.validate_json(self._path.read_bytes())
            if journal.order is not None and journal.order.challenge is not None:
                validate_challenge(journal.order.challenge)
        except FileNotFoundError:
            return fresh
        except (ValidationError, ChallengeError):
            _log.error("journal_damaged", path=str(self._path))
            return fresh
        # At another CA nothing of it is known.
        return journal if journal.directory_url == fresh.directory_url else fresh

    def _save(self, journal: Journal) -> None:
        """Raises OSError, and the process knows it all the same."""
        self._journal = journal
        replace_file(self._path, _journal_adapter.dump_json(journal))

    def _keep(self, journal: Journal) -> None:
        """Save what the next start can do without."""
        try:
            self._save(journal)
        except OSError as error:
            _log.error("journal_not_written", path=str(self._path), detail=str(error))


def _identifier(pair: InstalledPair | None) -> str | None:
    """How the CA knows the certificate in use; None of one that it cannot know."""
    if pair is None:
        return None
    try:
        return certificate_id(pair.chain_path.read_text())
    except (OSError, ChainError):
        return None
