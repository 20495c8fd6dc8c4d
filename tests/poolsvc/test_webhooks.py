"""Webhooks at a real endpoint: enabled by an echo, signed, retried, ended. The API around them."""

import asyncio
import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from sqlalchemy import select, update

from lab.processes import free_port
from lab.web import WebServer, http
from poolsvc import webhooks
from poolsvc.deliveries import WEBHOOK_WAITS
from poolsvc.derived import RegistryKey
from poolsvc.errors import LimitReached
from poolsvc.models import Channel, Delivery, DeliveryStatus, Notice, Webhook
from poolsvc.notices import NoticeKind, announce
from poolsvc.worker import Health, Worker

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
KEY = RegistryKey(bytes(32))
S = DeliveryStatus


class Endpoint:
    """Keeps what it is sent. `answers` are given in turn; then it answers challenges as it should, and 200."""

    def __init__(self):
        self.calls, self.answers = [], []

    async def serve(self, reader, writer):
        head = self.server.heads[-1]
        fields = (line.partition(": ") for line in head.split("\r\n")[1:])
        headers = httpx.Headers({name: value for name, _, value in fields if name})
        body = await reader.readexactly(int(headers["content-length"]))
        self.calls.append((headers, body))
        document = json.loads(body)
        if self.answers:
            answer = self.answers.pop(0)
            if callable(answer):
                answer = answer(document, body)
        else:
            answer = http("200 OK", document.get("challenge", "").encode())
        if answer is None:
            await asyncio.Event().wait()
        writer.write(answer)
        await writer.drain()

    async def __aenter__(self):
        self.server = await WebServer(self.serve).__aenter__()
        self.url = f"http://127.0.0.1:{self.server.port}/hook?x=1"
        return self

    async def __aexit__(self, *error):
        await self.server.__aexit__(*error)


@pytest.fixture
async def endpoint():
    async with Endpoint() as endpoint:
        yield endpoint


def verified(secret, headers, body):
    """Whether a call is signed by a secret, as a member's program would check it."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    right = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return f"v1,{right}" in headers["webhook-signature"].split(" ")


class Hooks:
    """A member, its webhooks through the API, and a worker."""

    def __init__(self, registry, client):
        self.registry, self.database, self.client = registry, registry.database, client
        self.worker = Worker(self.database, registry.settings, [], Health(), KEY)

    async def start(self):
        self.member = await self.registry.member()
        self.token = await self.registry.owner_token(self.member)
        return self

    async def ask(self, method, path, **options):
        async with self.client(self.token) as asking:
            return await asking.request(method, f"/v1/members/{self.member}/{path}", **options)

    async def create(self, url):
        answer = await self.ask("POST", "webhooks", json={"url": url})
        assert answer.status_code == 201, answer.text
        document = answer.json()
        self.hook, self.secret = document["webhook"]["id"], document["secret"]
        # The API's time is that of the machine, the tests' is their own.
        await self.change(update(Webhook).values(created_at=NOW, challenge_due_at=NOW))
        return document

    async def enabled(self, endpoint):
        await self.create(endpoint.url)
        await self.worker._challenge_webhooks(NOW)
        assert (await self.row()).enabled_at == NOW
        endpoint.calls.clear()
        return self

    async def tell(self, now=NOW, count=1):
        async with self.database.transaction("test") as session:
            for number in range(count):
                name = f"server{number}"
                await announce(session, NoticeKind.ADMITTED, member_id=self.member, now=now, server=name)

    async def change(self, statement):
        async with self.database.transaction("test") as session:
            await session.execute(statement)

    async def row(self):
        async with self.database.transaction() as session:
            return await session.get_one(Webhook, self.hook)

    async def deliveries(self):
        async with self.database.transaction() as session:
            found = select(Delivery).where(Delivery.channel == Channel.WEBHOOK).order_by(Delivery.id)
            return list(await session.scalars(found))

    async def kinds(self):
        async with self.database.transaction() as session:
            return list(await session.scalars(select(Notice.kind).order_by(Notice.id)))


@pytest.fixture
async def hooks(registry, client):
    return await Hooks(registry, client).start()


async def test_a_webhook_is_enabled_by_its_endpoint_and_gets_nothing_before(hooks, endpoint):
    document = await hooks.create(endpoint.url)
    assert (document["webhook"]["enabled"], document["webhook"]["challenged"]) == (False, True)
    assert document["secret"].startswith("whsec_")
    await hooks.tell()
    await hooks.worker._call_webhooks(NOW)
    assert endpoint.calls == []
    await hooks.worker._challenge_webhooks(NOW)
    ((headers, body),) = endpoint.calls
    assert json.loads(body)["type"] == "challenge"
    assert verified(hooks.secret, headers, body)
    (view,) = (await hooks.ask("GET", "webhooks")).json()["items"]
    assert (view["enabled"], view["challenged"], view["error"]) == (True, False, None)
    assert "whsec_" not in json.dumps(view)


async def test_the_challenge_may_come_back_as_json(hooks, endpoint):
    endpoint.answers.append(
        lambda document, _: http("200 OK", json.dumps({"challenge": document["challenge"]}).encode())
    )
    await hooks.create(endpoint.url)
    await hooks.worker._challenge_webhooks(NOW)
    assert (await hooks.row()).enabled_at == NOW


@pytest.mark.parametrize(
    "answer",
    [
        lambda _document, body: http("200 OK", body),
        lambda document, _: http("200 OK", b"you said " + document["challenge"].encode()),
        lambda document, _: http("500 Oops", document["challenge"].encode()),
        lambda document, _: http("302 Found", document["challenge"].encode(), "Location: /hook\r\n"),
        lambda document, _: http("410 Gone", document["challenge"].encode()),
        lambda document, _: http("200 OK", document["challenge"][:-2].encode()),
        lambda *_: http("200 OK", b"[" * 5000),
        lambda *_: http("200 OK", b"x" * 100_000),
        lambda *_: b"\x00\xff garbage",
        lambda *_: b"",
    ],
    ids=[
        "reflected",
        "quoted",
        "error",
        "redirect",
        "gone",
        "shortened",
        "nested",
        "long",
        "garbage",
        "nothing",
    ],
)
async def test_anything_else_is_no_consent(hooks, endpoint, answer):
    endpoint.answers.append(answer)
    await hooks.create(endpoint.url)
    await hooks.worker._challenge_webhooks(NOW)
    row = await hooks.row()
    assert (row.enabled_at, row.failures) == (None, 1)
    assert row.error.startswith("challenge: ")
    assert row.error.isprintable()
    assert len(endpoint.calls) == 1


async def test_a_challenge_is_sent_five_times_in_an_hour_and_then_only_when_asked_for(hooks, endpoint):
    endpoint.answers += [http("404 Not Found")] * 5
    await hooks.create(endpoint.url)
    assert (await hooks.ask("POST", f"webhooks/{hooks.hook}/enable")).status_code == 409
    for minute in range(600):
        await hooks.worker._challenge_webhooks(NOW + minute * MINUTE / 4)
        if (await hooks.row()).challenge_due_at is None:
            break
    assert len(endpoint.calls) == 5
    assert minute <= 240, "within an hour"
    (view,) = (await hooks.ask("GET", "webhooks")).json()["items"]
    assert (view["enabled"], view["challenged"]) == (False, False)
    assert view["error"] == "challenge: HTTP status 404 instead of 2xx"
    challenges = {json.loads(body)["challenge"] for _, body in endpoint.calls}
    assert len(challenges) == 5, "an old challenge is worth nothing"
    assert (await hooks.ask("POST", f"webhooks/{hooks.hook}/enable")).status_code == 202
    await hooks.worker._challenge_webhooks(datetime.now(UTC))
    assert webhooks.is_enabled(await hooks.row())
    assert (await hooks.ask("POST", f"webhooks/{hooks.hook}/enable")).status_code == 409


async def test_a_notice_is_signed_and_says_what_a_mail_would(hooks, endpoint):
    await hooks.enabled(endpoint)
    await hooks.tell()
    await hooks.worker._call_webhooks(NOW)
    ((headers, body),) = endpoint.calls
    document = json.loads(body)
    (row,) = await hooks.deliveries()
    assert document["type"] == "admitted"
    assert document["at"] == NOW.isoformat()
    assert document["server"] == "server0"
    assert document["data"] == {"server": "server0"}
    assert document["text"].startswith("server0 is admitted to the pool since 2026-03-01 12:00 UTC")
    assert headers["webhook-id"] == f"notice_{row.id}"
    assert headers["webhook-timestamp"] == str(int(NOW.timestamp()))
    assert headers["content-type"] == "application/json"
    assert verified(hooks.secret, headers, body)
    assert not verified(hooks.secret, headers, body + b" ")
    assert not verified("whsec_" + base64.b64encode(bytes(32)).decode(), headers, body)
    assert (row.status, row.attempts, row.error) == (S.SENT, 1, None)


async def test_a_new_secret_signs_beside_the_old_one_for_a_day(hooks, endpoint):
    await hooks.enabled(endpoint)
    old = hooks.secret
    new = (await hooks.ask("POST", f"webhooks/{hooks.hook}/rotate")).json()["secret"]
    assert new != old
    await hooks.change(update(Webhook).values(rotated_at=NOW))
    for now, both in ((NOW, True), (NOW + 24 * HOUR - SECOND, True), (NOW + 24 * HOUR, False)):
        await hooks.tell(now)
        await hooks.worker._call_webhooks(now)
        headers, body = endpoint.calls[-1]
        assert verified(new, headers, body)
        assert verified(old, headers, body) == both


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (http("500 Oops"), "HTTP status 500 instead of 2xx"),
        (http("302 Found", more="Location: http://127.0.0.1:1/\r\n"), "HTTP status 302 instead of 2xx"),
        (b"garbage\r\n\r\n", "no HTTP answer"),
        (None, "no HTTP answer within 0.3 s"),
    ],
    ids=["error", "redirect", "garbage", "hangs"],
)
async def test_a_failure_is_shown_and_tried_again_under_the_same_id(
    hooks, endpoint, monkeypatch, answer, error
):
    monkeypatch.setattr(webhooks, "DEADLINE", 0.3)
    await hooks.enabled(endpoint)
    endpoint.answers.append(answer)
    await hooks.tell()
    await hooks.worker._call_webhooks(NOW)
    (row,) = await hooks.deliveries()
    assert (row.status, row.attempts, row.due_at) == (S.PENDING, 1, NOW + 10 * SECOND)
    assert error in row.error
    assert (await hooks.row()).failures == 1
    await hooks.worker._call_webhooks(NOW + 10 * SECOND)
    (row,) = await hooks.deliveries()
    assert (row.status, row.attempts, row.error) == (S.SENT, 2, None)
    assert len({headers["webhook-id"] for headers, _ in endpoint.calls}) == 1
    found = await hooks.row()
    assert (found.failures, found.failing_since, found.error) == (0, None, None)


async def test_an_endpoint_that_is_away_is_tried_for_days_and_then_the_delivery_has_failed(hooks, endpoint):
    await hooks.enabled(endpoint)
    await hooks.change(update(Webhook).values(url=f"http://127.0.0.1:{free_port()}/"))
    await hooks.tell()
    now = NOW
    for wait in WEBHOOK_WAITS:
        await hooks.worker._call_webhooks(now)
        (row,) = await hooks.deliveries()
        assert (row.status, row.due_at) == (S.PENDING, now + wait)
        now += wait
    await hooks.worker._call_webhooks(now)
    (row,) = await hooks.deliveries()
    assert (row.status, row.due_at) == (S.FAILED, None)
    assert "no HTTP answer" in row.error


async def test_notices_come_in_their_order_and_wait_behind_one_that_fails(hooks, endpoint):
    await hooks.enabled(endpoint)
    await hooks.tell(count=4)
    endpoint.answers += [http("204 No Content"), http("500 Oops")]
    await hooks.worker._call_webhooks(NOW)
    assert len(endpoint.calls) == 2
    rows = await hooks.deliveries()
    assert [row.status for row in rows] == [S.SENT, S.PENDING, S.PENDING, S.PENDING]
    assert {row.due_at for row in rows[1:]} == {NOW + 10 * SECOND}
    assert [row.attempts for row in rows] == [1, 1, 0, 0]
    await hooks.worker._call_webhooks(NOW + 10 * SECOND)
    servers = [json.loads(body)["server"] for _, body in endpoint.calls]
    assert servers == ["server0", "server1", "server1", "server2", "server3"]


async def test_twenty_failures_and_a_day_disable_a_webhook_and_its_member_is_told(hooks, endpoint):
    await hooks.enabled(endpoint)
    await hooks.change(update(Webhook).values(failures=19, failing_since=NOW - 24 * HOUR + SECOND))
    await hooks.tell(count=2)
    endpoint.answers += [http("500 Oops")] * 2
    await hooks.worker._call_webhooks(NOW)
    assert webhooks.is_enabled(await hooks.row()), "not yet a day"
    await hooks.worker._call_webhooks(NOW + 10 * SECOND)
    row = await hooks.row()
    assert (row.disabled_at, row.failures) == (NOW + 10 * SECOND, 21)
    assert [(entry.status, entry.error) for entry in await hooks.deliveries()] == [
        (S.SUPPRESSED, "the webhook was disabled")
    ] * 2
    assert await hooks.kinds() == ["admitted", "admitted", "webhook-disabled"]
    await hooks.tell()
    assert len(await hooks.deliveries()) == 2, "a disabled webhook gets nothing"


async def test_an_endpoint_that_says_gone_is_disabled_at_once(hooks, endpoint):
    await hooks.enabled(endpoint)
    await hooks.tell(count=2)
    endpoint.answers.append(http("410 Gone"))
    await hooks.worker._call_webhooks(NOW)
    assert not webhooks.is_enabled(await hooks.row())
    assert [entry.status for entry in await hooks.deliveries()] == [S.FAILED, S.SUPPRESSED]
    assert len(endpoint.calls) == 1
    assert (await hooks.kinds())[-1] == "webhook-disabled"
    assert (await hooks.ask("POST", f"webhooks/{hooks.hook}/enable")).status_code == 202
    await hooks.worker._challenge_webhooks(datetime.now(UTC))
    assert webhooks.is_enabled(await hooks.row())


async def test_an_address_that_is_not_public_is_never_called(hooks, endpoint, registry):
    await hooks.create(endpoint.url)
    strict = registry.settings.model_copy(update={"allow_private_addresses": False})
    await Worker(hooks.database, strict, [], Health(), KEY)._challenge_webhooks(NOW)
    assert endpoint.server.connections == 0
    row = await hooks.row()
    assert row.enabled_at is None
    assert "not dialled" in row.error


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/",
        "https:///x",
        "https://user:password@example.org/",
        "https://example.org/#x",
        "ftp://example.org/",
        "//example.org/",
        "x",
        "",
        "https://example.org/ä",
        "https://example.org/\r\nX: y",
        "https://[::1/",
        "https://example.org:99999999999/",
        "https://example.org/" + "x" * 500,
    ],
)
async def test_what_is_no_webhooks_address_is_refused(hooks, app, url):
    services = app.state.services
    strict = services.settings.model_copy(update={"allow_private_addresses": False})
    app.state.services = type(services)(
        **{name: getattr(services, name) for name in services.__slots__} | {"settings": strict}
    )
    answer = await hooks.ask("POST", "webhooks", json={"url": url})
    assert answer.status_code == 422
    assert answer.json()["field"] == "url"
    assert (await hooks.ask("GET", "webhooks")).json()["items"] == []


async def test_a_member_has_five_webhooks_and_makes_ten_an_hour(hooks, endpoint):
    for _ in range(5):
        assert (await hooks.ask("POST", "webhooks", json={"url": endpoint.url})).status_code == 201
    sixth = await hooks.ask("POST", "webhooks", json={"url": endpoint.url})
    assert (sixth.status_code, sixth.json()["code"]) == (409, "limit-reached")
    for _ in range(5):
        (first, *_) = (await hooks.ask("GET", "webhooks")).json()["items"]
        assert (await hooks.ask("DELETE", f"webhooks/{first['id']}")).status_code == 200
        assert (await hooks.ask("POST", "webhooks", json={"url": endpoint.url})).status_code == 201
    (first, *_) = (await hooks.ask("GET", "webhooks")).json()["items"]
    await hooks.ask("DELETE", f"webhooks/{first['id']}")
    late = await hooks.ask("POST", "webhooks", json={"url": endpoint.url})
    assert (late.status_code, late.json()["code"]) == (429, "too-many-requests")


async def test_a_deleted_webhook_gets_nothing_any_more_and_what_was_under_way_says_so(hooks, endpoint):
    await hooks.enabled(endpoint)
    await hooks.tell()
    assert (await hooks.ask("DELETE", f"webhooks/{hooks.hook}")).status_code == 200
    await hooks.worker._call_webhooks(NOW)
    assert endpoint.calls == []
    (row,) = await hooks.deliveries()
    assert (row.status, row.error) == (S.SUPPRESSED, "the webhook was deleted")
    for method, path in (("DELETE", ""), ("POST", "/rotate"), ("POST", "/enable"), ("POST", "/test")):
        assert (await hooks.ask(method, f"webhooks/{hooks.hook}{path}")).status_code == 404


async def test_a_test_reaches_one_webhook_and_is_shown(hooks, endpoint):
    await hooks.create(endpoint.url)
    assert (await hooks.ask("POST", f"webhooks/{hooks.hook}/test")).status_code == 409
    await hooks.worker._challenge_webhooks(NOW)
    assert (await hooks.ask("POST", f"webhooks/{hooks.hook}/test")).status_code == 202
    assert (await hooks.ask("POST", f"webhooks/{hooks.hook}/test")).status_code == 409, "one at a time"
    await hooks.worker._call_webhooks(datetime.now(UTC))
    assert json.loads(endpoint.calls[-1][1])["type"] == "webhook-test"
    (notice,) = (await hooks.ask("GET", "notices")).json()["items"]
    assert notice["kind"] == "webhook-test"
    (delivery,) = notice["deliveries"]
    assert (delivery["channel"], delivery["status"]) == ("webhook", "sent")
    assert delivery["webhook"] == hooks.hook


async def test_a_webhook_of_another_member_is_out_of_reach(hooks, endpoint, registry):
    await hooks.create(endpoint.url)
    hook, hooks.member = hooks.hook, await registry.member("Other")
    assert (await hooks.ask("DELETE", f"webhooks/{hook}")).status_code == 403
    hooks.token = await registry.owner_token(hooks.member)
    assert (await hooks.ask("DELETE", f"webhooks/{hook}")).status_code == 404


async def test_notices_come_in_pages_newest_first_with_what_became_of_them(hooks):
    await hooks.tell(count=5)
    pages, query = [], "limit=2"
    while query:
        page = (await hooks.ask("GET", f"notices?{query}")).json()
        pages.append([notice["server"] for notice in page["items"]])
        query = page["next"] and f"limit=2&cursor={page['next']}"
    assert pages == [["server4", "server3"], ["server2", "server1"], ["server0"]]
    newest = (await hooks.ask("GET", "notices?limit=1")).json()["items"][0]
    assert newest["subject"] == "server4 is admitted"
    assert newest["text"].startswith("server4 is admitted")
    assert {row["error"] for row in newest["deliveries"]} == {"the account has no mail address"}
    assert {row["status"] for row in newest["deliveries"]} == {"suppressed"}


async def test_a_delivery_that_was_given_up_is_tried_again_by_its_member_only(hooks, endpoint, registry):
    await hooks.enabled(endpoint)
    await hooks.tell()
    await hooks.change(update(Delivery).values(status=S.FAILED, error="x", due_at=None, done_at=NOW))
    (row,) = await hooks.deliveries()
    stranger = await registry.owner_token(await registry.member("Other"))
    async with hooks.client(stranger) as asking:
        assert (await asking.post(f"/v1/deliveries/{row.id}/retry")).status_code == 403
    async with hooks.client(hooks.token) as asking:
        assert (await asking.post(f"/v1/deliveries/{row.id}/retry")).status_code == 202
        assert (await asking.post(f"/v1/deliveries/{row.id}/retry")).status_code == 409
        assert (await asking.post("/v1/deliveries/999999/retry")).status_code == 404
    await hooks.worker._call_webhooks(datetime.now(UTC))
    (row,) = await hooks.deliveries()
    assert row.status is S.SENT


async def test_many_webhooks_at_once_keep_the_limit(postgresql, settings, registry_of):
    registry = registry_of(postgresql, settings)
    member = await registry.member()

    async def create():
        async with registry.database.transaction() as session:
            await webhooks.create(session, settings, member, "https://hooks.example.org/", NOW)

    outcomes = await asyncio.gather(*(create() for _ in range(8)), return_exceptions=True)
    assert sum(outcome is None for outcome in outcomes) == webhooks.MAX_WEBHOOKS
    assert sum(isinstance(outcome, LimitReached) for outcome in outcomes) == 3


async def test_another_key_of_the_registry_disables_every_webhook_and_says_what_to_do(hooks, endpoint):
    await hooks.create(endpoint.url)
    asked = hooks.hook
    await hooks.enabled(endpoint)
    await hooks.change(
        update(Webhook).where(Webhook.id == asked).values(enabled_at=None, challenge_due_at=NOW)
    )
    await hooks.tell()
    async with hooks.database.transaction("console") as session:
        assert await webhooks.disable_all(session, NOW + SECOND) == 2
        assert await webhooks.disable_all(session, NOW + SECOND) == 0
    row = await hooks.row()
    assert (row.disabled_at, webhooks.is_enabled(row)) == (NOW + SECOND, False)
    assert "rotate the secret" in row.error
    await hooks.worker._call_webhooks(NOW + HOUR)
    await hooks.worker._challenge_webhooks(NOW + HOUR)
    assert endpoint.calls == [], "nobody could check the signature"
    assert await hooks.kinds() == ["admitted", "webhook-disabled", "webhook-disabled"]
    assert [entry.status for entry in await hooks.deliveries()] == [S.SUPPRESSED]


async def test_over_the_hourly_limit_calls_wait_and_none_is_lost(hooks, endpoint, tuned):
    await hooks.enabled(endpoint)
    hooks.worker = Worker(hooks.database, tuned(webhook_calls_per_hour=2), [], Health(), KEY)
    await hooks.tell(count=5)
    for hour, total in ((0, 2), (0, 2), (1, 4), (2, 5)):
        await hooks.worker._call_webhooks(NOW + hour * HOUR)
        assert len(endpoint.calls) == total
        waiting = [row for row in await hooks.deliveries() if row.status is S.PENDING]
        assert {row.due_at for row in waiting} <= {NOW + (hour + 1) * HOUR}
        assert all("2 calls within an hour" in row.error for row in waiting[:1])
    assert {row.status for row in await hooks.deliveries()} == {S.SENT}
