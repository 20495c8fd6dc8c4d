"""What every request passes, and what operators and their machines can see: secrets, identifiers, health, metrics."""

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network

import httpx
import pytest
import structlog
from sqlalchemy import update

from lab.processes import free_port
from nts_core.control import ServerState
from poolsvc.app import create_app
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.models import Order, OrderStatus, Server
from poolsvc.readiness import Look
from poolsvc.worker import KINDS, Health, Worker

PROXY = "192.0.2.80"
TOKEN = {"Authorization": "Bearer secret-token"}


async def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not (found := await condition()):
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.01)
    return found


def asking(app, source="192.0.2.1", scheme="http"):
    """An HTTP client whose connection comes from an address, in the open unless told otherwise."""
    transport = httpx.ASGITransport(app, client=(source, 40_000))
    return httpx.AsyncClient(transport=transport, base_url=f"{scheme}://registry")


@pytest.fixture
def proxied(database, settings):
    """The application behind a trusted proxy."""
    return create_app(
        settings.model_copy(update={"trusted_proxies": (ip_address(PROXY),)}),
        database,
        [],
        RegistryKey(bytes(32)),
    )


@pytest.mark.parametrize(
    ("source", "scheme", "forwarded", "is_refused"),
    [
        ("192.0.2.1", "http", [], True),
        ("192.0.2.1", "https", [], False),
        ("127.0.0.1", "http", [], False),
        ("::1", "http", [], False),
        ("192.0.2.1", "http", ["https"], True),
        (PROXY, "http", [], False),
        (PROXY, "http", ["https"], False),
        (PROXY, "http", ["http"], True),
        (PROXY, "https", ["http"], True),
        (PROXY, "http", ["https, http"], True),
        (PROXY, "http", ["https", "http"], True),
        (PROXY, "http", ["HTTP"], True),
        (PROXY, "http", ["garbage"], True),
        ("127.0.0.1", "http", ["http"], True),
    ],
)
async def test_a_token_in_the_open_is_refused_whoever_says_otherwise(
    proxied, source, scheme, forwarded, is_refused
):
    headers = [("X-Forwarded-Proto", value) for value in forwarded]
    headers += [("X-Forwarded-For", "127.0.0.1"), *TOKEN.items()]
    async with asking(proxied, source, scheme) as http:
        answer = await http.get("/healthz", headers=headers)
    assert answer.status_code == (403 if is_refused else 200)
    if is_refused:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"] == "insecure-transport"
        assert answer.json()["remedy"]
        assert "secret-token" not in answer.text


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {}, 200),
        ("GET", {"Cookie": "session=secret"}, 403),
        ("GET", {"Authorization": ""}, 403),
        ("POST", {}, 403),
        ("DELETE", {}, 403),
        ("GARBAGE", {}, 403),
    ],
)
async def test_what_may_carry_a_secret_is_refused_in_the_open(app, method, headers, status):
    async with asking(app) as http:
        assert (await http.request(method, "/healthz", headers=headers)).status_code == status


@pytest.mark.parametrize(
    ("target", "headers", "status"),
    [
        ("/healthz", [("X-Long", "x" * 15_000)], 200),
        ("/healthz", [("X-Long", "x" * 100_000)], 431),
        ("/healthz", [("x" * 100_000, "")], 431),
        ("/healthz", [("X-Long", "x" * 9_000)] * 2, 431),
        ("/healthz", [("X-Many", "")] * 90, 200),
        ("/healthz", [("X-Many", "")] * 5_000, 431),
        ("/" + "x" * 15_000, [], 404),
        ("/" + "x" * 60_000, [], 431),
        ("/healthz?" + "x" * 60_000, [], 431),
        ("/" + "x" * 9_000, [("X-Long", "x" * 9_000)], 431),
    ],
)
async def test_a_head_that_is_too_large_is_refused(app, target, headers, status):
    async with asking(app) as http:
        answer = await http.get(target, headers=headers)
    assert answer.status_code == status
    if status == 431:
        assert answer.json()["code"] == "head-too-large"
        assert answer.json()["remedy"]


async def test_every_answer_has_an_identifier_that_the_caller_does_not_choose(app):
    async with asking(app, "127.0.0.1") as http:
        answers = [
            await http.get(path, headers={"X-Request-Id": "chosen", **headers})
            for path, headers in (
                ("/healthz", {}),
                ("/nothing", {}),
                ("/v1/servers/alice", TOKEN),
                ("/healthz", {}),
            )
        ]
        answers.append(await http.post("/v1/servers", content=b"x" * 70_000))
    identifiers = [answer.headers.get_list("x-request-id") for answer in answers]
    assert all(len(each) == 1 and len(each[0]) == 16 for each in identifiers)
    assert len({each[0] for each in identifiers}) == len(answers)
    assert "chosen" not in str(identifiers)


async def test_a_mistake_of_ours_is_a_document_for_the_caller_and_a_line_for_the_operator(app):
    @app.get("/broken/{name}")
    async def broken(name: str):
        raise RuntimeError(name)

    with structlog.testing.capture_logs() as logs:
        async with asking(app) as http:
            answer = await http.get("/broken/alice")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal-error")
    assert "alice" not in answer.text
    (entry,) = logs
    assert entry["event"] == "request_failed"
    assert entry["request"] == answer.headers["x-request-id"]
    assert (entry["route"], entry["status"], entry["code"]) == ("/broken/{name}", 500, "internal-error")
    assert isinstance(entry["exc_info"], RuntimeError)


async def test_an_answer_that_breaks_off_is_told_once(app, caplog):
    async def breaks_off(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError

    app.mount("/broken", breaks_off)
    with structlog.testing.capture_logs() as logs, pytest.raises(AssertionError):
        async with asking(app) as http:
            await http.get("/broken/")
    assert [entry["event"] for entry in logs] == ["request_failed"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_words_of_strangers_become_no_labels(app):
    async with asking(app, "127.0.0.1") as http:
        await http.request("EVIL-METHOD", "/evil-path")
        text = (await http.get("/metrics")).text
    assert 'poolsvc_requests_total{method="other",route="none",status="404"} 1.0' in text
    assert "evil" not in text.lower()


@pytest.mark.parametrize(
    ("source", "forwarded", "status"),
    [
        ("127.0.0.1", None, 200),
        ("::1", None, 200),
        ("192.0.2.1", None, 404),
        (PROXY, "192.0.2.1", 404),
        (PROXY, "garbage", 404),
    ],
)
async def test_metrics_are_for_loopback_unless_told_otherwise(proxied, source, forwarded, status):
    headers = {"X-Forwarded-For": forwarded} if forwarded else {}
    async with asking(proxied, source) as http:
        answer = await http.get("/metrics", headers=headers)
    assert answer.status_code == status
    if status == 404:
        assert answer.json()["code"] == "not-found"


async def test_metrics_are_for_those_who_are_allowed(database, settings):
    allowed = (ip_network("192.0.2.0/28"), ip_network("2001:db8::/32"))
    app = create_app(
        settings.model_copy(update={"metrics_allow": allowed}), database, [], RegistryKey(bytes(32))
    )
    for source, status in (("192.0.2.1", 200), ("2001:db8::1", 200), ("192.0.2.16", 404), ("127.0.0.1", 404)):
        async with asking(app, source) as http:
            assert (await http.get("/metrics")).status_code == status


async def figures(app):
    async with asking(app, "127.0.0.1") as http:
        lines = (await http.get("/metrics")).text.splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


async def test_metrics_tell_of_states_and_of_what_is_late(app, registry):
    now = datetime.now(UTC)
    server = await registry.server("alice", state=ServerState.VERIFIED)
    await registry.server("bob", "198.18.0.2")
    async with registry.database.transaction() as session:
        await session.execute(update(Server).values(probe_due_at=now - timedelta(minutes=5)))
        session.add(
            Order(server_id=server, status=OrderStatus.WANTED, created_at=now, due_at=now + timedelta(days=1))
        )
    found = await figures(app)
    assert found['poolsvc_servers{state="verified"}'] == 1
    assert found['poolsvc_servers{state="registered"}'] == 1
    assert found['poolsvc_servers{state="active"}'] == 0
    assert found['poolsvc_due{kind="probe"}'] == 2
    assert 300 <= found['poolsvc_due_age_seconds{kind="probe"}'] < 400
    assert found['poolsvc_due{kind="advance_orders"}'] == 0
    names = {kind.name for kind in KINDS} | {"journal"}
    assert names == {name.split('"')[1] for name in found if name.startswith("poolsvc_due{")}
    methods = {name.strip("_") for name in vars(Worker)}
    assert names <= methods, "what is due has the name of the pass that does it"
    assert found['poolsvc_due_age_seconds{kind="advance_orders"}'] == 0
    assert found['poolsvc_up{part="database"}'] == 1
    assert "poolsvc_publish_age_seconds" not in found, "nothing was published yet"
    assert (found["poolsvc_zone_drift_total"], found["poolsvc_zone_held"]) == (0, 0)


async def test_metrics_tell_of_the_queue(app, registry):
    now = datetime.now(UTC)
    found = await figures(app)
    assert (found["poolsvc_queue"], found["poolsvc_queue_wait_seconds"]) == (0, 0)
    for number, name in enumerate(("alice", "bob"), start=1):
        server = await registry.server(name, f"198.18.0.{number}", state=ServerState.VERIFIED)
        async with registry.change(server) as (_, row):
            row.queue_round, row.order_due_at = 0, now + timedelta(hours=number)
    again = create_app(registry.settings, registry.database, [], RegistryKey(bytes(32)))
    found = await figures(again)
    assert found["poolsvc_queue"] == 2
    assert 7100 < found["poolsvc_queue_wait_seconds"] <= 7200


async def test_metrics_tell_of_the_worker(database, tuned):
    settings = tuned(
        tick=0.01,
        step_retry=0.01,
        dns={"primary": f"127.0.0.1:{free_port()}"},
        ca={"directory_url": f"https://127.0.0.1:{free_port()}/dir"},
    )
    app = create_app(settings, database, [], RegistryKey(bytes(32)))
    async with app.router.lifespan_context(app):
        await until(lambda: told(app, 'poolsvc_up{part="ca"}', 0))
        await until(lambda: told(app, 'poolsvc_passes_total{kind="begin_orders"}'))
        found = await figures(app)
        assert found['poolsvc_pass_failures_total{kind="begin_orders"}'] == 0
        assert found['poolsvc_pass_seconds_total{kind="begin_orders"}'] > 0
        assert found["poolsvc_database_connections"] >= 0


async def told(app, name, value=None):
    """Whether a figure has a value; without one, whether it has begun to count."""
    found = (await figures(app)).get(name, 0)
    return found == value if value is not None else found > 0


async def test_without_the_database_metrics_are_what_is_left(settings, tmp_path):
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'empty.db'}")
    found = await figures(create_app(settings, database, [], RegistryKey(bytes(32))))
    await database.close()
    assert found['poolsvc_up{part="database"}'] == 0
    assert not [name for name in found if name.startswith("poolsvc_servers")]


@pytest.fixture
async def running(database, tuned):
    """The application with its worker."""
    settings = tuned(
        dns={"primary": f"127.0.0.1:{free_port()}"},
        ca={"directory_url": f"https://127.0.0.1:{free_port()}/dir"},
    )
    app = create_app(settings, database, [], RegistryKey(bytes(32)))
    async with app.router.lifespan_context(app):
        yield app


async def get(app, path):
    async with asking(app) as http:
        return await http.get(path)


async def test_a_running_registry_is_ready(running):
    answer = await get(running, "/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})


async def not_ready(app):
    answer = await get(app, "/readyz")
    assert answer.status_code == 503
    assert answer.json()["code"] == "not-ready"
    assert (await get(app, "/healthz")).status_code == 200, "not being ready is no reason for a restart"
    return answer.json()["detail"]


async def test_who_stops_is_not_ready(running):
    with structlog.testing.capture_logs() as logs:
        running.state.metrics.health.stopping.set()
        assert "stopping" in await not_ready(running)
    assert not [entry for entry in logs if entry["event"] == "request_failed"]


async def test_without_a_worker_nothing_is_ready(app):
    assert "worker" in await not_ready(app)


async def test_tables_of_another_version_are_not_ready(running, database):
    async with database.transaction() as session:
        connection = await session.connection()
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'other'")
    assert "version" in await not_ready(running)


async def test_a_database_that_fails_is_not_ready_and_its_words_stay_here(running, database):
    async with database.transaction() as session:
        connection = await session.connection()
        await connection.exec_driver_sql("ALTER TABLE alembic_version RENAME TO secret_name")
    assert await not_ready(running) == "the database does not answer"


class TestLook:
    async def test_one_question_is_asked_for_all_who_ask_at_the_same_time(self):
        asked, go = [], asyncio.Event()

        async def question():
            asked.append(1)
            await go.wait()
            return "answer"

        look = Look(question, keep=60)
        waiting = [asyncio.create_task(look.answer()) for _ in range(100)]
        await asyncio.sleep(0)
        go.set()
        assert set(await asyncio.gather(*waiting)) == {"answer"}
        assert await look.answer() == "answer"
        assert len(asked) == 1

    async def test_who_asks_waits_only_so_long_and_the_question_goes_on(self):
        asked, go = [], asyncio.Event()

        async def question():
            asked.append(1)
            await go.wait()
            return "answer"

        look = Look(question, keep=0, patience=0.01)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await look.answer()
        go.set()
        assert await Look.answer(look) == "answer"
        assert len(asked) == 1
        await look.close()

    async def test_an_answer_is_old_after_a_while_and_so_is_a_failure(self):
        outcomes = iter([OSError("away"), "here"])

        async def question():
            outcome = next(outcomes)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        look = Look(question, keep=0)
        with pytest.raises(OSError, match="away"):
            await look.answer()
        assert await look.answer() == "here"
        await look.close()

    async def test_a_question_under_way_is_ended(self):
        look = Look(asyncio.Event().wait, keep=0, patience=0.01)
        with pytest.raises(TimeoutError):
            await look.answer()
        await asyncio.wait_for(look.close(), 5)


async def test_steps_under_way_may_end_when_the_process_is_to_stop(database, settings):
    """No other pass begins."""
    health, began, go = Health(), [], asyncio.Event()

    async def work(_now):
        began.append(1)
        await go.wait()

    worker = asyncio.create_task(Worker(database, settings, [], health, RegistryKey(bytes(32)))._repeat(work))
    await until(lambda: asyncio.sleep(0, began))
    health.stopping.set()
    await asyncio.sleep(0)
    assert not worker.done()
    go.set()
    await asyncio.wait_for(worker, 5)
    assert began == [1]
    assert health.passes["work"].count == 1
