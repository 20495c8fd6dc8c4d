"""What notices say: a subject and plain words for each kind, made from the data of the notice.

1. A line that names a value which the notice does not have is left out.
2. A value is one line of printable text and bounded, whoever it comes from: nothing in it can begin a line or a
   header of its own.
3. Every text says what happened, when, why, what to do, and where to look.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from string import Formatter
from typing import Any

from nts_core.control import Stage
from nts_core.errors import printable
from poolsvc.explain import REMEDIES
from poolsvc.models import HoldKind
from poolsvc.notices import Letter, NoticeKind

_MAX_VALUE = 300
_MAX_SUBJECT = 150
_MAX_ITEMS = 16


@dataclass(frozen=True, slots=True)
class Text:
    """What one notice says; the body's lines end with a line feed."""

    subject: str
    body: str


@dataclass(frozen=True, slots=True)
class _Words:
    subject: str
    lines: tuple[str, ...]


def _words(subject: str, *lines: str) -> _Words:
    return _Words(subject, lines)


_K = NoticeKind
_REASON = "Reason: {reason}"
_REMEDY = "What to do: {remedy}"
_NOT_YOU = "If you do not expect this, tell the pool's operator at once."

_TEXTS: Mapping[NoticeKind, _Words] = {
    _K.SIGN_IN: _words(
        "sign in to {pool}",
        "Somebody, probably you, wants to sign in with this mail address. Open this link to go on:",
        "    {url}/sign-in#{token}",
        "It is good once and for a short time. For programs that use the API, the token alone:",
        "    {token}",
        "If it was not you, do nothing: without the link nobody gets in. Never pass it on.",
    ),
    _K.INVITATION: _words(
        "you are invited to {pool}",
        "You are invited to help run NTS time servers in the pool {pool}.",
        "Member: {member}",
        "Your role: {role}",
        "Open this link to accept:",
        "    {url}/invitation#{token}",
        "For programs that use the API, the token alone:",
        "    {token}",
        "It is good until {expires_at}.",
        "If you do not know the pool, do nothing: your address is forgotten when the invitation ends.",
    ),
    _K.MEMBER_APPROVED: _words(
        "your account is approved",
        "The pool's operator has approved your account on {at}.",
        "What to do: register your servers.",
    ),
    _K.MEMBER_BLOCKED: _words(
        "your account is blocked",
        "The pool's operator has blocked your account on {at}. You can still look, export and leave.",
        _REASON,
        "What to do: ask the pool's operator.",
    ),
    _K.MEMBER_UNBLOCKED: _words(
        "your account is no longer blocked",
        "The pool's operator has unblocked your account on {at}. You can do all that you could before.",
        _REASON,
    ),
    _K.USER_JOINED: _words(
        "somebody has joined your account",
        "A person can act for your account since {at}.",
        "Person: user {user}",
        "Role: {role}",
        f"What to do: nothing, if you invited them. {_NOT_YOU}",
    ),
    _K.USER_LEFT: _words(
        "somebody has left your account",
        "A person can no longer act for your account since {at}.",
        "Person: user {user}",
        _REASON,
        f"What to do: nothing, if you know of it. {_NOT_YOU}",
    ),
    _K.IDENTITY_CHANGED: _words(
        "how somebody signs in has changed",
        "A person of your account has changed on {at} how they sign in.",
        "Person: user {user}",
        "What changed: {what}",
        f"What to do: nothing, if it was you or somebody you know. {_NOT_YOU}",
    ),
    _K.SERVER_OFFERED: _words(
        "{server} is offered to another member",
        "The server {server} was offered on {at} to another member of the pool.",
        "Offer: number {transfer}",
        "What to do: an owner of the other member accepts or declines it.",
    ),
    _K.SERVER_MOVED: _words(
        "{server} has moved to another member",
        "The server {server} belongs to another member since {at}. It went on serving meanwhile.",
        "Offer: number {transfer}",
        _NOT_YOU,
    ),
    _K.WEBHOOK_DISABLED: _words(
        "a webhook is disabled",
        "A webhook of your account gets no more notices since {at}.",
        "Webhook: {webhook}",
        "Host: {host}",
        _REASON,
        "What to do: repair it, then enable it again; what was not delivered can be read in the account.",
    ),
    _K.WEBHOOK_TEST: _words(
        "a test of your webhook",
        "This is a test that somebody of your account asked for on {at}. It means nothing.",
    ),
    _K.JOINED: _words(
        "{server}: an agent has joined",
        "An agent has joined as {server} on {at}, with a key of its own. Agents before it are shut out.",
        "What to do: nothing, if you ran `pool-agent join`. The pool now proves the server's addresses.",
        _NOT_YOU,
    ),
    _K.ADMITTED: _words(
        "{server} is admitted",
        "{server} is admitted to the pool since {at}. It gets into the pool's answers when the pool is open.",
        _REASON,
        "What to do: nothing. Thank you.",
    ),
    _K.SUSPENDED: _words(
        "{server} is suspended ({hold})",
        "{server} is suspended since {at}: it is not in the pool's answers. Name and certificate are kept.",
        "Kind of hold: {hold}",
        "First stage that failed: {stage}",
        _REASON,
        _REMEDY,
    ),
    _K.RECOVERED: _words(
        "{server} is back",
        "{server} is active again since {at}, and gets back into the pool's answers.",
        _REASON,
        "It was suspended since {suspended_at}.",
        "What to do: nothing.",
    ),
    _K.ADDRESS_WITHDRAWN: _words(
        "{server}: {address} is withdrawn",
        "The address {address} of {server} is out of DNS since {at}.",
        "The server's other addresses go on. Without any it is out of the pool until one is proved.",
        _REASON,
        "What to do: repair the address. One with a bad score comes back by itself when that is good again.",
    ),
    _K.CERTIFICATE_TROUBLE: _words(
        "{server}: trouble with its certificate",
        "The certificate of {server} could not be renewed or issued; noticed on {at}.",
        _REASON,
        "The certificate that is in use ends on {ends_at}. Without a newer one the server is then suspended.",
        "The order is repeated by itself; next on {next_at}.",
        "What to do: let the agent run, and let everybody reach the HTTP port of each address.",
    ),
    _K.CERTIFICATE_NOT_ORDERED: _words(
        "{server}: a certificate that the pool did not order",
        "On {at} {address} showed a valid certificate for {server} that the pool did not order. Its serial number is"
        " {serial}.",
        "The pool's CAA records let no other account order for this name. The operators see an alarm.",
        "What to do: if it is yours, let the agent's be the only one. If not, somebody else controls the host or its"
        " network: tell the operators, and look who has access.",
    ),
    _K.AGENT_SILENT: _words(
        "{server}: its agent is silent",
        "The agent of {server} has not reported since {seen_at}.",
        "The server may go on serving, but its certificate is not renewed while the agent is silent.",
        "What to do: look whether `pool-agent run` runs and reaches {url}.",
    ),
    _K.AGENT_TROUBLE: _words(
        "{server}: its agent reports a problem",
        "The agent of {server} reports a problem; noticed on {at}.",
        "It says: {problem}",
        "What to do: look at the agent's log on the server.",
    ),
    _K.DEAD_WARNING: _words(
        "{server} will be removed",
        "{server} has not been good for {days} days.",
        "It will be removed for good on {remove_at}, and its name is never given again.",
        "What to do: repair it, and it stays; or remove it yourself.",
    ),
    _K.LEAVING_SCHEDULED: _words(
        "{server} is to leave the pool",
        "{server} is to leave the pool for good on {leave_at}. It is not in the pool's answers any more.",
        _REASON,
        "What to do: nothing; until then it can be cancelled. Let the server run until then.",
        _NOT_YOU,
    ),
    _K.LEAVING_CANCELLED: _words(
        "{server} stays in the pool",
        "The leaving of {server} was cancelled on {at}.",
        _REASON,
        "What to do: nothing.",
    ),
    _K.LEAVING: _words(
        "{server} is leaving the pool",
        "{server} is being taken out of the pool for good since {at}. A receipt follows when all steps are done.",
        _REASON,
        "What to do: let the server run until then; clients may still know its name for some minutes.",
        _NOT_YOU,
    ),
    _K.REMOVED: _words(
        "{server} has left the pool",
        "{server} has left the pool for good on {at}.",
        _REASON,
        "Out of the pool's answers: {srv_withdrawn_at}",
        "Addresses and CAA out of DNS: {name_broken_at}",
        "Authorization at the CA ended: {authorization_deactivated_at}",
        "Certificate revoked: {certificate_revoked_at}",
        "Certificate not revoked, because: {not_revoked}",
        "CAA closed: {caa_closed_at}",
        "Last certificate ends: {last_certificate_ends_at}",
        "What remains possible: {exposure}",
        "What to do: stop and remove the agent.",
    ),
}
# The kind SIGN_IN with another letter than SIGN_IN.
_LETTERS: Mapping[Letter, _Words] = {
    Letter.SIGN_UP: _words(
        "your new account at {pool}",
        "Somebody, probably you, wants to make an account with this mail address. Open this link to make it:",
        "    {url}/sign-in#{token}",
        "It is good once and for a short time. For programs that use the API, the token alone:",
        "    {token}",
        "If it was not you, do nothing: no account is made, and your address is forgotten.",
    ),
    Letter.HAS_ACCOUNT: _words(
        "you have an account at {pool}",
        "Somebody, probably you, wants a new account with this mail address, which has one. To sign in:",
        "    {url}/sign-in#{token}",
        "It is good once and for a short time. For programs that use the API, the token alone:",
        "    {token}",
        "If it was not you, do nothing: without the link nobody gets in. Never pass it on.",
    ),
    Letter.NEW_ADDRESS: _words(
        "your new mail address at {pool}",
        "Somebody, probably you, wants an account to have this mail address. Sign in, then open this link:",
        "    {url}/sign-in#{token}",
        "It is good once and for a short time. For programs that use the API, the token alone:",
        "    {token}",
        "If it was not you, do nothing: the account does not get the address.",
    ),
    Letter.NO_ACCOUNT: _words(
        "you have no account at {pool}",
        "Somebody, probably you, wanted to sign in with this mail address, which has no account here.",
        "What to do: make one, or use the address that your account has.",
        "If it was not you, do nothing.",
    ),
}
_HOLD_REMEDIES = {
    HoldKind.SCORE: REMEDIES[Stage.SCORE],
    HoldKind.CERTIFICATE: REMEDIES[Stage.CERTIFICATE],
    HoldKind.MAINTENANCE: "nothing: it comes back by itself with the first good probe after the maintenance",
    HoldKind.OPERATOR: "ask the pool's operator",
}


def text_of(
    kind: NoticeKind,
    data: Mapping[str, Any],
    *,
    at: datetime,
    pool: str,
    public_url: str,
    token: str | None = None,
) -> Text:
    """The words of a notice. `token` is the secret of a sign-in link or an invitation."""
    receipt = data.get("receipt")
    nested = receipt if isinstance(receipt, dict) else {}
    known = {**data, **nested, "remedy": _remedy(data), "at": at.isoformat()}
    known |= {"pool": pool, "url": public_url, "token": token}
    values = {name: _value(name, value) for name, value in known.items() if value is not None}
    words = _TEXTS[kind]
    letter = data.get("letter")
    if kind is NoticeKind.SIGN_IN and letter in tuple(Letter):
        words = _LETTERS.get(Letter(letter), words)
    lines = [line.format_map(values) for line in words.lines if _names(line) <= values.keys()]
    missing = dict.fromkeys(_names(words.subject) - values.keys(), "?")
    subject = words.subject.format_map(values | missing)[:_MAX_SUBJECT]
    return Text(subject, "\n\n".join((*lines, f"Look at: {values['url']}")) + "\n")


def joined(texts: Sequence[Text]) -> Text:
    """Several notices as one."""
    parts = (f"{text.subject}\n{'-' * len(text.subject)}\n\n{text.body}" for text in texts)
    return Text(f"{len(texts)} notices", "\n\n".join(parts))


def _names(line: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(line) if name}


def _value(name: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_value(name, item) for item in value[:_MAX_ITEMS])[:_MAX_VALUE]
    text = str(value)
    if name == "at" or name.endswith("_at"):
        text = _moment(text)
    return printable(text, _MAX_VALUE)


def _moment(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if moment.tzinfo else text
    except (ValueError, OverflowError):
        return text


def _remedy(data: Mapping[str, Any]) -> str | None:
    """What a member can do about the stage that failed, or else about the hold."""
    stage, hold = data.get("stage"), data.get("hold")
    if stage in tuple(Stage):
        return REMEDIES.get(Stage(stage))
    return _HOLD_REMEDIES[HoldKind(hold)] if hold in tuple(HoldKind) else None
