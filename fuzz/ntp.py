"""Targets of NTP: codecs, cookies, both ends (RFC 5905, RFC 8915 section 5).

No fuzzer guesses a tag of 128 bits. Targets named `-sealed` therefore take a datagram in its *null form*: cookies
are any octets, the authenticator's ciphertext is a tag of any octets and the plain fields. Before it is given to the
code under test, the target puts in true cookies and seals it with the true key, in place: every length stays as it
was written, so the rules of section 5.6 are met or broken as the input will have it.

Where the packet engine is built, it has to answer every datagram as the Python engine does, octet for octet.
"""

from fuzz import native
from fuzz.mutate import Layout
from fuzz.target import NOW, Drawn, OracleError, Plan, Target, hold
from nts_core import ntptime
from nts_core.aead import KEY_LENGTH, SUPPORTED, TAG_LENGTH, Aead, AeadId, SessionKeys
from nts_core.association import Association
from nts_core.cookies import MAX_COOKIES, NONCE_LENGTH, Keyring
from nts_core.errors import KissOfDeath, NotAuthentic, WireError
from nts_core.ke import KeResult
from nts_core.packet import (
    HEADER_LENGTH,
    MAX_DATAGRAM,
    Authenticator,
    ClockState,
    Field,
    FieldType,
    Header,
    Leap,
    Mode,
    Packet,
    encode_fields,
    parse_fields,
)
from nts_core.server import Drop, Kiss, NtpServer, Outcome, Reply

_NOW_NS = NOW * ntptime.NANOSECONDS
_CLOCK = ClockState(Leap.NONE, 2, -20, 655, 66, b"FUZZ", ntptime.timestamp(_NOW_NS))
_KEYRING = Keyring.new(NOW, Drawn(b"keyring"))
# The order is part of the corpus.
_ALGORITHMS = tuple(algorithm for algorithm in AeadId if algorithm in SUPPORTED)
_KISSES = (None, Kiss.RATE, Kiss.DENY)
# A nonce for each cookie, and the authenticator's.
_MOST_DRAWN = (MAX_COOKIES + 1) * NONCE_LENGTH
# A new cookie is as long as the old one, so that a request which meets section 5.6 has room for its answer.
_UNREACHED = {Outcome.TOO_SHORT_FOR_ANSWER}
_TYPES = (*FieldType, 0x0002, 0x2005)
_TOKENS = (
    *(kind.to_bytes(2) for kind in _TYPES),
    *(Field(kind, bytes(12)).encode() for kind in FieldType),
    b"\x00\x10\x00\x10",
    b"NTSN",
)


def _session(aead: AeadId) -> SessionKeys:
    draw = Drawn(b"session")
    return SessionKeys(aead, draw(KEY_LENGTH[aead]), draw(KEY_LENGTH[aead]))


_SESSIONS = {aead: _session(aead) for aead in _ALGORITHMS}


def _layout(clear: int) -> Layout:
    return Layout(clear=clear + HEADER_LENGTH, counts_head=True, unit=4, types=_TYPES)


# Null form


def _sealed(datagram: bytes, aead: Aead) -> bytes:
    """The datagram with its first authenticator sealed in place; as it was when that has no room for a tag."""
    items, rest = _layout(0).split(datagram)
    clear = bytearray(datagram[:HEADER_LENGTH])
    for place, (kind, value) in enumerate(items):
        if kind == FieldType.AUTHENTICATOR:
            after = _layout(0).join(items[place + 1 :]) + rest
            return bytes(clear) + _layout(0).join([(kind, _sealed_body(value, bytes(clear), aead))]) + after
        clear += _layout(0).join([(kind, value)])
    return datagram


def _sealed_body(value: bytes, clear: bytes, aead: Aead) -> bytes:
    nonce_length, ciphertext_length = int.from_bytes(value[:2]), int.from_bytes(value[2:4])
    start = 4 + nonce_length + -nonce_length % 4
    end = start + ciphertext_length
    if ciphertext_length < TAG_LENGTH or end > len(value):
        return value
    try:
        ciphertext = aead.seal(value[4 : 4 + nonce_length], value[start + TAG_LENGTH : end], clear)
    except ValueError:
        # A nonce of a length that the algorithm does not have: nobody could seal this.
        return value
    return value[:start] + ciphertext + value[end:]


def _with_cookies(datagram: bytes, keys: SessionKeys) -> bytes:
    """The datagram with a true cookie in each cookie field, whatever its length was."""
    if len(datagram) < HEADER_LENGTH:
        return datagram
    items, rest = _layout(0).split(datagram)
    draw = Drawn(b"cookies")
    given = [
        (kind, _KEYRING.seal(keys, draw(NONCE_LENGTH)) if kind == FieldType.COOKIE else value)
        for kind, value in items
    ]
    return datagram[:HEADER_LENGTH] + _layout(0).join(given) + rest


# Codecs


def _packet(data: bytes) -> str:
    try:
        header = Header.decode(data)
    except WireError:
        return "no-header"
    hold(header.encode() == data[:HEADER_LENGTH], "a header encodes to what it was")
    try:
        fields = parse_fields(data, HEADER_LENGTH)
    except WireError:
        fields = None
    try:
        packet = Packet.decode(data)
    except WireError:
        hold(fields is None or len(data) > MAX_DATAGRAM, "a packet of good fields is good")
        return "malformed"
    if fields is None:
        raise OracleError("a packet has good fields")
    end = fields[-1].start + 4 + len(fields[-1].value) if fields else HEADER_LENGTH
    hold(end == len(data) or packet.authenticator is not None, "nothing but an authenticator ends the fields")
    hold(header.encode() + encode_fields(fields) == data[:end], "fields encode to what they were")
    for field in fields:
        hold(
            data[field.start : field.start + 4 + len(field.value)] == field.encode(),
            "a field knows its place",
        )
    if packet.authenticator is None:
        return "plain"
    hold(all(f.start < packet.authenticator.start for f in packet.fields), "nothing after the authenticator")
    return _authenticator(packet.authenticator.value)


def _authenticator(value: bytes) -> str:
    try:
        body = Authenticator.decode(value)
    except WireError:
        return "authenticator-malformed"
    again = body.encode()[4:]
    hold(len(again) <= len(value), "an authenticator holds what it says")
    hold(Authenticator.decode(again) == body, "an authenticator encodes to itself")
    lengths = Authenticator.length(len(body.nonce), max(len(body.ciphertext) - TAG_LENGTH, 0))
    hold(len(body.ciphertext) < TAG_LENGTH or lengths == 4 + len(again), "its length is known beforehand")
    return "protected"


def _cookie(data: bytes) -> str:
    """First octet: the algorithm; then what is changed of a true cookie, octet by octet; more makes it longer."""
    plan = Plan(data)
    keys = _SESSIONS[_ALGORITHMS[plan.octet() % len(_ALGORITHMS)]]
    cut, mask = plan.octet(), plan.rest()
    true = _KEYRING.seal(keys, Drawn(b"cookie")(NONCE_LENGTH))
    shown = bytearray(true[: len(true) - cut] if cut else true)
    shown.extend(bytes(max(len(mask) - len(shown), 0)))
    for place, octet in enumerate(mask):
        shown[place] ^= octet
    opened: SessionKeys | None
    try:
        opened = _KEYRING.open(bytes(shown))
    except NotAuthentic:
        opened = None
    hold((opened is not None) == (shown == true), "a cookie opens exactly when we made it")
    hold(opened in {None, keys}, "a cookie holds what was put in")
    return "refused" if opened is None else "opened"


def _raw_cookie(data: bytes) -> str:
    try:
        _KEYRING.open(data)
    except NotAuthentic:
        return "refused"
    raise OracleError("nobody makes a cookie without the key")


# Server


def _respond(datagram: bytes, kiss: Kiss | None, session: SessionKeys | None) -> str:
    """What the server makes of a datagram; `session` is what its cookies hold, if anybody but us can know."""
    draw, taken = Drawn(b"server"), []

    def transmit_time() -> int:
        taken.append(_NOW_NS)
        return _NOW_NS

    server = NtpServer(_KEYRING, draw)
    made = server.respond(datagram, received=_NOW_NS, transmit_time=transmit_time, clock=_CLOCK, kiss=kiss)
    hold(draw.octets <= _MOST_DRAWN, "work is bounded: no more is drawn than eight cookies need")
    hold(len(taken) <= 1, "the transmit time is taken once")
    if native.IS_BUILT:
        _check_native(datagram, kiss)
    if isinstance(made, Drop):
        return made.outcome
    _check_reply(datagram, made, kiss, session)
    return made.outcome


def _check_native(datagram: bytes, kiss: Kiss | None) -> None:
    request = native.Request(datagram, kiss, Drawn(b"server")(native.MOST_RANDOM))
    times = native.Times(_NOW_NS, _NOW_NS, _CLOCK)
    (found,) = native.respond(_KEYRING, [request], times)
    hold(found == native.respond_in_python(_KEYRING, request, times), "both engines answer the same")


def _check_reply(datagram: bytes, made: Reply, kiss: Kiss | None, session: SessionKeys | None) -> None:
    hold(len(made.octets) <= len(datagram), "a reply is never longer than its request")
    asked, told = Packet.decode(datagram), Packet.decode(made.octets)
    hold(asked.header.mode == Mode.CLIENT, "nothing is answered but mode 3")
    hold(told.header.mode == Mode.SERVER, "a reply is of mode 4")
    hold(told.header.version == asked.header.version in {3, 4}, "versions 3 and 4 are answered in kind")
    hold(told.header.origin == asked.header.transmit, "a reply names the request's transmit time")
    code = told.header.reference_id.decode("ascii") if told.header.stratum == 0 else None
    wanted = Kiss.NTSN if made.outcome is Outcome.NTSN else kiss
    hold(code == wanted, "a kiss is given exactly when one is due")
    names = [field.value for field in asked.of_type(FieldType.UNIQUE_IDENTIFIER)]
    echo = [field.value for field in told.of_type(FieldType.UNIQUE_IDENTIFIER)]
    hold(len(told.fields) == len(echo), "nothing is in clear but the unique identifier")
    hold(echo == names[:1], "the unique identifier comes back")
    is_nts = asked.authenticator is not None or bool(asked.of_type(FieldType.COOKIE))
    if made.outcome is Outcome.NTSN:
        hold(
            asked.authenticator and asked.of_type(FieldType.COOKIE),
            "NTSN is for requests with all three fields",
        )
        hold(names, "NTSN is for requests with all three fields")
    if made.outcome is Outcome.NTSN or not is_nts:
        hold(told.authenticator is None, "nothing is sealed for who has no key")
        return
    if session is None:
        raise OracleError("nobody is authentic without the key")
    _check_cookies(
        asked, asked.decrypt(datagram, Aead(session.aead, session.c2s)), told, made.octets, session
    )


def _check_cookies(
    asked: Packet, hidden: list[Field], told: Packet, octets: bytes, session: SessionKeys
) -> None:
    """The cookies of an authentic answer; `hidden` are the fields that the request's authenticator held."""
    given = told.decrypt(octets, Aead(session.aead, session.s2c))
    hold({field.type for field in given} == {FieldType.COOKIE}, "nothing is hidden but cookies")
    hold(1 <= len(given) <= MAX_COOKIES, "one to eight cookies")
    hold(len({field.value for field in given}) == len(given), "no two cookies are the same")
    hold({_KEYRING.open(field.value) for field in given} == {session}, "new cookies hold the same keys")
    length = len(asked.of_type(FieldType.COOKIE)[0].value)
    hold(all(len(field.value) == length for field in given), "new cookies are as long as the old one")
    fields = (*asked.fields, *hidden)
    wanted = [f for f in fields if f.type == FieldType.COOKIE_PLACEHOLDER and len(f.value) == length]
    hold(len(given) <= 1 + len(wanted), "one for the cookie, one for each placeholder of its length, no more")


def _server(data: bytes) -> str:
    """First octet: the kiss that is asked for, if any."""
    plan = Plan(data)
    kiss = _KISSES[plan.octet() % len(_KISSES)]
    return _respond(plan.rest(), kiss, None)


def _server_sealed(data: bytes) -> str:
    """First octet: the algorithm in its two lowest bits, and above them the kiss that is asked for."""
    plan = Plan(data)
    choice = plan.octet()
    keys, kiss = _SESSIONS[_ALGORITHMS[choice % 4 % len(_ALGORITHMS)]], _KISSES[choice // 4 % len(_KISSES)]
    return _respond(_sealed(_with_cookies(plan.rest(), keys), Aead(keys.aead, keys.c2s)), kiss, keys)


# Client

_FITTING_ORIGIN, _FITTING_IDENTIFIER, _SEALED = 1, 2, 4


def _client(data: bytes) -> str:
    """First two octets: what the target puts right in the answer, and the algorithm."""
    plan = Plan(data)
    fitting, keys = plan.octet(), _SESSIONS[_ALGORITHMS[plan.octet() % len(_ALGORITHMS)]]
    draw = Drawn(b"client")
    cookie = _KEYRING.seal(keys, draw(NONCE_LENGTH))
    association = Association(KeResult(keys, (cookie,)), draw)
    request = association.poll()
    datagram = _fitted(plan.rest(), request, fitting, keys)
    before = len(association.jar)
    try:
        sample = association.receive(datagram, sent=_NOW_NS, received=_NOW_NS + 1000)
    except KissOfDeath as kiss:
        hold(kiss.code.isascii() and kiss.code.isalnum(), "a kiss code can be shown")
        hold(not kiss.authentic or fitting & _SEALED, "only who has the key makes an authentic kiss")
        if kiss.authentic:
            _check_spent(association, datagram)
            return "kiss-authentic"
        _check_unmoved(association, request, before)
        return "kiss-hint"
    except NotAuthentic:
        _check_unmoved(association, request, before)
        return "ignored"
    hold(fitting & _SEALED, "only who has the key is believed")
    hold(len(association.jar) <= MAX_COOKIES, "eight cookies are kept at most")
    hold(len(association.jar) - before <= sample.cookies <= MAX_COOKIES, "cookies come from the answer")
    hold(sample.delay >= 0 and sample.root_distance >= 0, "no time is negative")
    _check_spent(association, datagram)
    return "sample"


def _fitted(datagram: bytes, request: bytes, fitting: int, keys: SessionKeys) -> bytes:
    asked = Packet.decode(request)
    if len(datagram) < HEADER_LENGTH:
        return datagram
    if fitting & _FITTING_ORIGIN:
        datagram = datagram[:24] + asked.header.transmit.to_bytes(8) + datagram[32:]
    if fitting & _FITTING_IDENTIFIER:
        items, rest = _layout(0).split(datagram)
        name = asked.of_type(FieldType.UNIQUE_IDENTIFIER)[0].value
        items = [(kind, name if kind == FieldType.UNIQUE_IDENTIFIER else value) for kind, value in items]
        datagram = datagram[:HEADER_LENGTH] + _layout(0).join(items) + rest
    return _sealed(datagram, Aead(keys.aead, keys.s2c)) if fitting & _SEALED else datagram


def _genuine(request: bytes) -> bytes:
    server = NtpServer(_KEYRING, Drawn(b"genuine"))
    made = server.respond(request, received=_NOW_NS, transmit_time=lambda: _NOW_NS, clock=_CLOCK)
    if not isinstance(made, Reply) or made.outcome is not Outcome.NTS_TIME:
        raise OracleError("our server answers what our client asks")
    return made.octets


def _check_unmoved(association: Association, request: bytes, before: int) -> None:
    """Whatever is not the authentic answer changes nothing: the answer is awaited and accepted as before."""
    hold(len(association.jar) == before, "an unauthentic datagram leaves the cookies alone")
    sample = association.receive(_genuine(request), sent=_NOW_NS, received=_NOW_NS + 1000)
    hold(sample.synchronised, "the true answer is still accepted")
    hold(sample.cookies == sample.asked == len(association.jar) - before, "all cookies come back")


def _check_spent(association: Association, datagram: bytes) -> None:
    kept = len(association.jar)
    try:
        association.receive(datagram, sent=_NOW_NS, received=_NOW_NS + 1000)
    except NotAuthentic:
        hold(len(association.jar) == kept, "a replay leaves the cookies alone")
        return
    raise OracleError("an answer is accepted once")


def _times(data: bytes) -> str:
    plan = Plan(data)
    near, away = int.from_bytes(plan.take(9), signed=True), int.from_bytes(plan.take(8), signed=True)
    stamp, other = int.from_bytes(plan.take(8)), int.from_bytes(plan.take(8))
    half = (1 << 63) * ntptime.NANOSECONDS >> 32
    hold(0 <= ntptime.timestamp(near) < 1 << 64, "a timestamp has 64 bits")
    found = ntptime.unix_ns(stamp, near)
    hold(abs(found - near) <= half + 1, "a time is read within half an era")
    hold((ntptime.timestamp(found) - stamp + 4) % (1 << 64) <= 8, "a time has the timestamp it was read from")
    forth, back = ntptime.difference(stamp, other), ntptime.difference(other, stamp)
    hold(abs(forth + back) <= 1 or (stamp - other) % (1 << 64) == 1 << 63, "back is as far as forth")
    is_near = abs(away) < half - 1
    if is_near:
        again = ntptime.unix_ns(ntptime.timestamp(near + away), near)
        hold(abs(again - near - away) <= 1, "a time close by survives its timestamp")
    length = abs(away)
    short = ntptime.short(length)
    hold(0 <= short <= 0xFFFF_FFFF, "the short format has 32 bits")
    hold(
        short == 0xFFFF_FFFF or 0 <= ntptime.short_ns(short) - length + 1 <= 15260,
        "rounded up, by one step at most",
    )
    return "near" if is_near else "far"


TARGETS = (
    Target(
        "ntp-packet",
        "Only WireError; header, fields and authenticator encode to what was read; nothing after the authenticator.",
        _packet,
        frozenset({"no-header", "malformed", "plain", "authenticator-malformed", "protected"}),
        longest=MAX_DATAGRAM + 8,
        layout=_layout(0),
        tokens=_TOKENS,
    ),
    Target(
        "ntp-times",
        "Any integers: timestamps have 64 bits, times survive them across eras, short values round up and saturate.",
        _times,
        frozenset({"near", "far"}),
        longest=33,
    ),
    Target(
        "cookie",
        "Only NotAuthentic, and that for each cookie that differs from a true one in one bit or in length.",
        _cookie,
        frozenset({"opened", "refused"}),
        longest=300,
    ),
    Target("cookie-raw", "Only NotAuthentic, always.", _raw_cookie, frozenset({"refused"}), longest=300),
    Target(
        "ntp-server",
        "No exception; a reply only to mode 3, never longer than its request, with the identifier back and nothing"
        " else in clear; few draws; never authenticated time, as no input can be authentic.",
        _server,
        frozenset(Outcome) - {Outcome.NTS_TIME} - _UNREACHED,
        longest=MAX_DATAGRAM + 8,
        layout=_layout(1),
        tokens=_TOKENS,
    ),
    Target(
        "ntp-server-sealed",
        "The same for requests of a client that has keys and cookies; one to eight new cookies, as long as the old"
        " one, that hold the same keys.",
        _server_sealed,
        frozenset(Outcome) - _UNREACHED,
        longest=MAX_DATAGRAM + 8,
        layout=_layout(1),
        tokens=_TOKENS,
    ),
    Target(
        "ntp-client",
        "Only NotAuthentic and KissOfDeath; without the key nothing changes and the true answer is still accepted;"
        " with it one answer is accepted once; eight cookies at most.",
        _client,
        frozenset({"ignored", "kiss-hint", "kiss-authentic", "sample"}),
        longest=MAX_DATAGRAM + 8,
        layout=_layout(2),
        tokens=_TOKENS,
    ),
)
