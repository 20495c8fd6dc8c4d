"""Targets of texts: JSON documents, key files, endpoints, trust anchors."""

import asyncio
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fuzz.target import NOW, Drawn, Plan, Target, hold
from member_agent.cookie_keys import describe
from member_agent.errors import AgentError
from member_agent.sockets import parse_endpoint as parse_listening
from member_agent.tracking import (
    MAX_STRATUM,
    Daemon,
    ntpd_tracking,
    parse_chronyc,
)
from nts_core.aead import KEY_LENGTH, AeadId, SessionKeys
from nts_core.asking import Unanswered, parse_variables
from nts_core.cli import parse_endpoint as parse_peer
from nts_core.client import ClientError
from nts_core.control import (
    AgentReport,
    Assignment,
    CheckAnswer,
    JoinAnswer,
    JoinRequest,
    ProofAnswer,
    ProofRequest,
    ServerStatus,
)
from nts_core.cookies import MAX_COOKIE_LENGTH, MAX_COOKIES, NONCE_LENGTH, Keyring
from nts_core.errors import WireError
from nts_core.ntptime import NANOSECONDS
from nts_core.resolve import MAX_ANCHORS, ResolveError, TrustAnchors
from nts_core.store import Binding, CookieFile, TimeRecord

_BINDING = Binding("ntp.example", 4460, "00" * 32)
# Nanoseconds that fit 63 bits: the year 2262.
_LATEST = (1 << 63) - 1
_KINDS = (
    JoinRequest,
    JoinAnswer,
    ProofRequest,
    ProofAnswer,
    AgentReport,
    Assignment,
    ServerStatus,
    CheckAnswer,
)
_ADAPTERS: tuple[TypeAdapter[Any], ...] = tuple(TypeAdapter(kind) for kind in _KINDS)
_JSON = (b'{"', b'":', b"null", b"true", b"[]", b"{}", b"1e999", b"NaN", b"\\ud800")

# How far a ratchet is at least turned at once, so that it is bounded what one call may cost.
_TURNS = 10_000


def _text(octets: bytes) -> str:
    """Any octets as text, as the operating system's arguments are."""
    return octets.decode("utf-8", "surrogateescape")


def _is_finite(value: Any) -> bool:
    match value:
        case float():
            return -1e300 < value < 1e300
        case dict():
            return all(map(_is_finite, value.values()))
        case list() | tuple():
            return all(map(_is_finite, value))
        case _:
            return True


def _control(data: bytes) -> str:
    """First octet: the kind of document."""
    plan = Plan(data)
    adapter = _ADAPTERS[plan.octet() % len(_ADAPTERS)]
    try:
        document = adapter.validate_json(plan.rest())
    except ValidationError:
        return "refused"
    repr(document)
    if not _is_finite(asdict(document)):
        # JSON has no infinity; who reads such a figure bounds it itself.
        return "boundless"
    hold(adapter.validate_json(adapter.dump_json(document)) == document, "a document survives being sent")
    return type(document).__name__


def _keyring(data: bytes) -> str:
    try:
        keyring = Keyring.load(data)
    except WireError as error:
        hold(len(str(error)) < 1000 + len(data), "an error is not longer than what it is about")
        return "refused"
    again = Keyring.load(keyring.dump())
    hold(again.dump() == keyring.dump(), "a key file survives being read and written")
    hold(describe(keyring), "a keyring can be described")
    current = keyring.at(NOW, Drawn(b"next"))
    schedule = keyring.schedule
    if not schedule.ratchet or NOW - keyring.next_at < _TURNS * schedule.rotation:
        hold(current.next_at > NOW, "the sealing key is current")
        hold(current.at(NOW, Drawn()) is current, "a current keyring stays as it is")
    keys = SessionKeys(AeadId.AES_SIV_CMAC_256, bytes(32), bytes(32))
    hold(current.open(current.seal(keys, bytes(NONCE_LENGTH))) == keys, "what it seals it opens")
    return "ratchet" if keyring.schedule.ratchet else "random"


def _endpoints(data: bytes) -> str:
    text, read = _text(data), []
    try:
        listening = parse_listening(text, "--ke")
        hold(0 <= listening.port < 65536, "a port has 16 bits")
        hold(parse_listening(str(listening), "--ke") == listening, "an endpoint reads as it is written")
        read.append("listening")
    except AgentError as error:
        hold(error.remedy, "an error has a remedy")
    try:
        peer = parse_peer(text, 4460)
        hold(0 < peer.port < 65536, "a peer's port has 16 bits and is not 0")
        hold(peer.host and not peer.host.endswith("."), "a host has no final dot")
        read.append("peer")
    except ClientError as error:
        hold("HOST:PORT" in error.remedy, "an error has a remedy")
    return "-and-".join(read) or "refused"


def _anchors(data: bytes) -> str:
    try:
        anchors = TrustAnchors.parse(_text(data))
    except ResolveError as error:
        hold(error.code == "anchor", "the error says that it is the anchor")
        return "refused"
    hold(1 <= sum(map(len, anchors.zones.values())) <= MAX_ANCHORS, "anchors are few")
    return "read"


def _tracking(data: bytes) -> str:
    """First octet: whether chronyd or ntpd says the rest; what ntpd says of its peer stands after a NUL."""
    plan = Plan(data)
    by_ntpd, text = plan.octet() & 1, plan.rest().decode("ascii", "replace")
    now_ns = NOW * NANOSECONDS
    try:
        if by_ntpd:
            system, _, peer = text.partition("\0")
            told = ntpd_tracking(parse_variables(system), parse_variables(peer), asked_at=0, now_ns=now_ns)
        else:
            told = parse_chronyc(text, asked_at=0, now_ns=now_ns)
    except Unanswered as error:
        hold(str(error).isprintable() and len(str(error)) < 200, "the reason can be shown")
        return "refused"
    hold(0 <= told.stratum <= MAX_STRATUM and len(told.reference_id) == 4, "the header can be written")
    hold(told.root_delay_ns >= 0, "no distance is negative")
    hold(told.dispersion_ns(10**9) >= told.root_dispersion_ns >= 0, "an error grows with time")
    hold(told.remark.isprintable(), "the remark can be shown")
    return told.daemon


def _store(data: bytes) -> str:
    """First octet: whether the rest is a file of cookies or the recorded time."""
    plan = Plan(data)
    is_time, content = plan.octet() & 1, plan.rest()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        record = TimeRecord(directory)
        file = directory / ("recorded-time.json" if is_time else f"{_BINDING.stem}.json")
        file.touch(0o600)
        file.write_bytes(content)
        if not is_time:
            return asyncio.run(_kept(directory))
        found, fault = record.load()
        _check_fault(fault, is_kept=found is not None)
        if found is None:
            return "refused"
        later = min(found + 1, _LATEST)
        record.save(later)
        hold(record.load() == (later, None), "a later time is recorded")
        record.save(found)
        hold(record.load() == (later, None), "the recorded time never goes back")
        return "time"


async def _kept(directory: Path) -> str:
    file = await CookieFile.open(directory, _BINDING)
    try:
        kept, fault = file.load(NOW * NANOSECONDS)
        _check_fault(fault, is_kept=kept is not None)
        if kept is None:
            return "not-ours" if fault is None else "refused"
        held = kept.credentials
        hold(len(held.cookies) <= MAX_COOKIES, "eight cookies are kept at most")
        hold(all(0 < len(cookie) <= MAX_COOKIE_LENGTH for cookie in held.cookies), "cookies are usable")
        for keys in (held.keys, held.alternative or held.keys):
            hold(
                {len(keys.c2s), len(keys.s2c)} == {KEY_LENGTH[keys.aead]},
                "keys are as long as their algorithm's",
            )
        file.save(kept)
        hold(file.load(NOW * NANOSECONDS) == (kept, None), "what is kept survives being written")
        return "kept"
    finally:
        file.close()


def _check_fault(fault: str | None, *, is_kept: bool) -> None:
    hold(fault is None or not is_kept, "what is damaged is not believed")
    hold(fault is None or fault.isprintable(), "the fault can be shown")


TARGETS = (
    Target(
        "control",
        "Only ValidationError; what is read survives being sent.",
        _control,
        frozenset({"refused", "boundless", *(kind.__name__ for kind in _KINDS)}),
        longest=6000,
        tokens=_JSON,
    ),
    Target(
        "keyring",
        "Only WireError; a key file survives being read and written; it can be described and brought up to date.",
        _keyring,
        frozenset({"refused", "ratchet", "random"}),
        longest=6000,
        tokens=(
            *_JSON,
            b'"version"',
            b'"keys"',
            b'"id"',
            b'"starts_at"',
            b'"secret"',
            b'"rotation"',
            b'"history"',
            b'"ratchet"',
        ),
    ),
    Target(
        "store",
        "No exception; what is damaged is not believed; usable cookies and whole keys; what is kept survives being"
        " written; the recorded time never goes back.",
        _store,
        frozenset({"refused", "not-ours", "kept", "time"}),
        tokens=(*_JSON, b'"cookies"', b'"keys"', b'"alternative"', b'"aead"', b'"recorded_ns"'),
    ),
    Target(
        "tracking",
        "Only Unanswered, fit to be shown; stratum, reference and distances that a header can hold.",
        _tracking,
        frozenset({"refused", *Daemon}),
        tokens=(b",", b"=", b'"', b"Normal", b"stratum=", b"refid=", b"reftime=0x", b"7F7F01FF"),
    ),
    Target(
        "endpoints",
        "Only AgentError and ClientError, with a remedy; an endpoint reads as it is written.",
        _endpoints,
        frozenset({"refused", "peer", "listening-and-peer"}),
        longest=6000,
        tokens=(b"[::1]:123", b"127.0.0.1:123", b"%1", b"xn--"),
    ),
    Target(
        "trust-anchors",
        "Only ResolveError about the anchor; at least one anchor and not too many.",
        _anchors,
        frozenset({"refused", "read"}),
        longest=6000,
        tokens=(
            b" IN DS ",
            b" DNSKEY 257 3 13 ",
            b"$ORIGIN ",
            b"$TTL ",
            b"$GENERATE ",
            b"$INCLUDE ",
            b"(",
            b";",
        ),
    ),
)
