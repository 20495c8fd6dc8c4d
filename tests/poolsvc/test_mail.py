"""Mail through a real SMTP server: what arrives, and what becomes of every way in which it does not."""

import asyncio
import ssl
import time
from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from lab.certificates import Authority
from lab.processes import free_port
from lab.smtp import MailServer
from nts_core.errors import DETAIL_LIMIT
from nts_core.verdict import Verdict
from poolsvc import mail
from poolsvc.config import MailSettings
from poolsvc.doctor.mail import server as examine_server
from poolsvc.doctor.report import Examination
from poolsvc.mail import Mailer, MailError, envelope
from poolsvc.texts import Text

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TEXT = Text("alice is suspended (score)", "Grüße an alle.\n.\n\nLook at: https://registry.example.net\n")
TO = "member@example.org"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


def tls(pair):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    return context


@pytest.fixture
def good(authority):
    return tls(authority.issue("127.0.0.1"))


@pytest.fixture
def mailer(authority, tmp_path):
    """A mailer for a server's port: `mailer(port, security="tls")`."""

    def make(port, *, username=None, password="correct", **options):
        if username is not None:
            file = tmp_path / "password"
            file.write_text(f"{password}\n")
            options |= {"username": username, "password_file": file}
        settings = MailSettings(
            smtp=f"127.0.0.1:{port}", sender="pool@registry.example.net", ca_file=authority.root, **options
        )
        return Mailer(settings, pool="pool.example", public_url="https://registry.example.net")

    return make


async def send(mailer, to=TO, text=TEXT, deliveries=(7,), kinds=("suspended",)):
    recipient = envelope(to)
    message = mailer.compose(recipient, text, deliveries=deliveries, kinds=kinds, now=NOW)
    await mailer.send(message, recipient)


async def failure(mailer, **options):
    with pytest.raises(MailError) as caught:
        await send(mailer, **options)
    return caught.value


async def test_a_mail_arrives_whole_encrypted_and_with_its_headers(mailer, good):
    async with MailServer(tls=good, password=("registry", "correct")) as server:
        await send(mailer(server.port, username="registry", sender_name='Pool "of" Ünits'))
    (received,) = server.received
    assert (received.encrypted, received.user) == (True, "registry")
    assert (received.sender, received.recipients) == ("pool@registry.example.net", [TO])
    message = received.message
    assert message["From"].addresses[0].display_name == 'Pool "of" Ünits'
    assert message["From"].addresses[0].addr_spec == "pool@registry.example.net"
    assert message["To"] == TO
    assert message["Subject"] == "[pool.example] alice is suspended (score)"
    assert message["Date"].datetime == NOW
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["X-Truechimer-Notice"] == "suspended; delivery=7"
    assert message.get_content_type() == "text/plain"
    assert message.get_content().replace("\r\n", "\n") == TEXT.body


async def test_a_second_try_has_the_same_message_id_and_another_delivery_has_not(mailer, good):
    async with MailServer(tls=good) as server:
        sender = mailer(server.port)
        for deliveries in ((7,), (7,), (8,), (7, 8, 9, 10)):
            await send(sender, deliveries=deliveries, kinds=["admitted"] * len(deliveries))
    ids = [received.message["Message-ID"] for received in server.received]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    assert all(identifier.endswith("@registry.example.net>") for identifier in ids)
    assert len(server.received[3].message.get_all("X-Truechimer-Notice")) == 4


async def test_tls_from_the_first_octet(mailer, good):
    async with MailServer(tls=good, implicit_tls=True) as server:
        await send(mailer(server.port, security="tls"))
    assert server.received[0].encrypted


async def test_without_encryption_only_when_the_settings_say_so(mailer):
    async with MailServer() as server:
        error = await failure(mailer(server.port, security="starttls"))
        assert server.received == []
        assert not error.permanent
        assert "STARTTLS" in error.detail
        await send(mailer(server.port, security="none"))
    assert not server.received[0].encrypted


@pytest.mark.parametrize("implicit", [False, True])
async def test_a_server_with_a_certificate_that_does_not_fit_gets_nothing(mailer, authority, implicit):
    async with MailServer(tls=tls(authority.issue("mail.example")), implicit_tls=implicit) as server:
        error = await failure(mailer(server.port, security="tls" if implicit else "starttls"))
    assert server.received == []
    assert not error.permanent


async def test_a_refused_password_is_the_operators_to_repair_and_in_no_error(mailer, good):
    async with MailServer(tls=good, password=("registry", "other")) as server:
        error = await failure(mailer(server.port, username="registry", password="secret-password"))
    assert not error.permanent
    assert error.code == 535
    assert "secret-password" not in error.detail
    assert server.received == []


@pytest.mark.parametrize("where", ["to_recipients", "to_messages"])
@pytest.mark.parametrize(
    ("answer", "permanent"), [("451 greylisted, come back", False), ("550 nobody here", True)]
)
async def test_what_the_server_says_of_a_mail_is_final_or_not(mailer, good, where, answer, permanent):
    async with MailServer(tls=good) as server:
        getattr(server, where).append(answer)
        error = await failure(mailer(server.port))
        assert (error.permanent, error.code) == (permanent, int(answer[:3]))
        assert answer in error.detail
        await send(mailer(server.port))
    assert len(server.received) == 1


async def test_a_servers_words_are_bounded_and_printable(mailer, good):
    async with MailServer(tls=good) as server:
        server.to_messages.append("550-\x1b[31m" + f"{'x' * 400}\r\n550-" * 3 + "\r\n550 end")
        error = await failure(mailer(server.port))
    assert error.detail.isprintable()
    assert len(error.detail) <= DETAIL_LIMIT


async def test_a_server_that_is_away_and_comes_back(mailer, good):
    port = free_port()
    error = await failure(mailer(port))
    assert not error.permanent
    async with MailServer(tls=good, port=port) as server:
        await send(mailer(port))
    assert len(server.received) == 1


async def test_a_server_that_hangs_takes_no_longer_than_the_deadline(mailer, monkeypatch):
    monkeypatch.setattr(mail, "DEADLINE", 0.3)
    async with MailServer(silent=True) as server:
        begin = time.monotonic()
        error = await failure(mailer(server.port))
        assert time.monotonic() - begin >= 0.3
    assert (error.permanent, error.detail) == (False, "the mail server did not answer within 0.3 s")


async def test_a_server_that_ends_after_taking_a_mail_has_taken_it(mailer):
    """Whatever happens to QUIT: the mail is not sent twice."""
    lines = []

    async def serve(reader, writer):
        writer.write(b"220 x\r\n")
        while line := await reader.readline():
            lines.append(line)
            if line.startswith(b"QUIT"):
                break
            if line.startswith(b"DATA"):
                writer.write(b"354 go on\r\n")
                await reader.readuntil(b"\r\n.\r\n")
            writer.write(b"250 good\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        await send(mailer(server.sockets[0].getsockname()[1], security="none"))
        server.close()
    assert any(line.startswith(b"DATA") for line in lines)


async def test_the_doctor_tells_whether_mail_would_go_out_and_sends_none(settings, mailer, good, tmp_path):
    async def examined(port, **options):
        made = None if port is None else mailer(port, **options)._settings
        changed = settings.model_copy(update={"mail": made})
        return await examine_server(Examination(changed, tmp_path / "x", NOW))

    assert (await examined(None)).verdict is Verdict.WARN
    async with MailServer(tls=good, password=("registry", "correct")) as server:
        assert (await examined(server.port, username="registry")).verdict is Verdict.OK
        wrong = await examined(server.port, username="registry", password="other")
        assert (wrong.verdict, "535" in wrong.found) == (Verdict.FAIL, True)
        assert server.received == []
    assert (await examined(free_port())).verdict is Verdict.FAIL


@pytest.mark.parametrize(
    "octets", [b"", b"\x00\xff" * 100, b"HTTP/1.1 200 OK\r\n\r\n", b"220-x\r\n" * 1000, b"999 \xff\r\n"]
)
async def test_what_is_no_mail_server_is_told(mailer, octets):
    async def serve(_reader, writer):
        writer.write(octets)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        error = await failure(mailer(server.sockets[0].getsockname()[1]))
    assert not error.permanent
    assert error.detail.isprintable()


@pytest.mark.parametrize(
    "address",
    [
        "",
        "x",
        "a@b@c",
        "member@example.org\r\nBcc: victim@example.org",
        "member@example.org, victim@example.org",
        "Member <member@example.org>",
        "member@example.org> SIZE=1",
        "x" * 300 + "@example.org",
    ],
)
def test_what_is_no_address_is_refused_before_anything_is_sent(address):
    with pytest.raises(MailError) as caught:
        envelope(address)
    assert caught.value.permanent


async def test_addresses_beyond_ascii_go_where_the_server_takes_them(mailer, good):
    async with MailServer(tls=good) as server:
        await send(mailer(server.port), to="member@bücher.example")
        await send(mailer(server.port), to="müller@bücher.example")
    assert [received.recipients for received in server.received] == [
        ["member@xn--bcher-kva.example"],
        ["müller@bücher.example"],
    ]
    async with MailServer(tls=good, smtputf8=False) as server:
        error = await failure(mailer(server.port), to="müller@bücher.example")
        assert error.permanent
        assert server.received == []


async def test_no_subject_makes_a_header_of_its_own(mailer, good):
    """Texts are clean already; the message would not let it through either."""
    sender = mailer(free_port())
    with pytest.raises(ValueError, match="linefeed"):
        await send(sender, text=Text("x\r\nBcc: victim@example.org", ""))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smtp": "mail.example"}, "HOST:PORT"),
        ({"smtp": "mail.example:0x19"}, "HOST:PORT"),
        ({"smtp": "mail.example:70000"}, "HOST:PORT"),
        ({"smtp": "-:25"}, "HOST:PORT"),
        ({"sender": "Pool <pool@example.net>"}, "NAME@DOMAIN"),
        ({"sender": "pool@example.net\n"}, "NAME@DOMAIN"),
        ({"security": "ssl"}, "starttls"),
        ({"username": "x"}, "go together"),
        ({"password_file": "x"}, "go together"),
        ({"username": "x", "password_file": "x", "security": "none"}, "in the open"),
        ({"mails_per_minute": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        MailSettings(**{"smtp": "mail.example:587", "sender": "pool@example.net", **options})


@pytest.mark.parametrize("smtp", ["localhost:25", "127.0.0.1:25", "[::1]:25"])
def test_a_password_may_stay_unencrypted_on_this_host(smtp):
    options = {"username": "x", "password_file": "x", "security": "none"}
    assert MailSettings(smtp=smtp, sender="pool@example.net", **options).smtp == smtp


@pytest.mark.parametrize("smtp", ["mail:25", "mail.example.net:587", "192.0.2.1:25", "[2001:db8::1]:25"])
def test_mail_servers_are_named_by_host_or_address(smtp):
    settings = MailSettings(smtp=smtp, sender="pool@example.net")
    assert (settings.security, settings.mails_per_hour_and_recipient) == ("starttls", 20)
