"""Why a server is, or is not, in DNS: the first stage that is not met, and a remedy for each."""

from datetime import UTC, datetime, timedelta

import pytest

from nts_core.control import ServerState, Stage, StageStatus
from poolsvc.budget import Place
from poolsvc.explain import REMEDIES, expected_at, explain, why_not
from poolsvc.models import Address, Hold, HoldKind, Order, OrderStatus, Pool, Server, StageRecord

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
S, MET, FAILED, WAITING = ServerState, StageStatus.MET, StageStatus.FAILED, StageStatus.WAITING
PROBED = list(Stage)[list(Stage).index(Stage.TCP) : list(Stage).index(Stage.OFFSET) + 1]


def at(minutes):
    return NOW + timedelta(minutes=minutes)


def make_pool(*, opened=True, quorum=1):
    return Pool(id=1, domain="pool.example", epoch=1, opened_at=NOW if opened else None, quorum=quorum)


def make_server(state=S.REGISTERED, *, addresses=1, **values):
    """A server as far as its state says, without a database."""
    path = list(S)[: list(S).index(state) + 1]
    values = {"ipv4": True, "ipv6": True} | values
    server = Server(name="alice", state=state, created_at=NOW, state_since=at(9), **values)
    for number in range(addresses):
        row = Address(address=f"198.18.0.{number}", full_probes=0)
        server.addresses.append(row)
        if S.VERIFIED in path:
            row.proved_at = at(2)
    if S.VERIFIED in path:
        server.joined_at, server.named_at = at(1), at(3)
    if S.CERTIFIED in path:
        server.orders.append(Order(status=OrderStatus.ISSUED, created_at=at(4), issued_at=at(5)))
        server.stages += [StageRecord(stage=stage, status=MET, since=at(6), detail="") for stage in PROBED]
    if S.ACTIVE in path:
        server.listed_at = at(10)
    return server


@pytest.fixture
def told(settings):
    """The stages by name and the sentence of a server."""

    def tell(server, pool=None, *, active=5):
        views = explain(server, pool or make_pool(), settings, active=active)
        assert [view.stage for view in views] == list(Stage)
        for view in views:
            assert bool(view.remedy) is (view.status is not MET), f"{view.stage}: {view.remedy!r}"
        return {view.stage: view for view in views}, why_not(views, server)

    return tell


def test_there_is_a_remedy_for_every_stage():
    assert set(REMEDIES) == set(Stage)
    assert all(REMEDIES.values())


@pytest.mark.parametrize(
    ("state", "first"),
    [
        (S.REGISTERED, Stage.NAME),
        (S.VERIFIED, Stage.ISSUANCE),
        (S.CERTIFIED, Stage.SCORE),
        (S.ACTIVE, None),
    ],
)
def test_the_first_stage_not_met_in_each_state(told, state, first):
    views, why = told(make_server(state))
    assert next((stage for stage, view in views.items() if view.status is not MET), None) == first
    assert why.startswith(f"{first}: ") if first else why == ""


def test_every_stage_of_an_active_listed_server_is_met_and_says_since_when(told):
    views, why = told(make_server(S.ACTIVE))
    assert why == ""
    assert {stage: view.since for stage, view in views.items()} == {
        Stage.NAME: at(1),
        Stage.ADDRESSES: at(3),
        Stage.ISSUANCE: at(5),
        **dict.fromkeys(PROBED, at(6)),
        Stage.SCORE: at(9),
        Stage.POOL: at(10),
    }


def test_a_joined_server_waits_for_its_addresses_and_learns_each_ones_error(told):
    server = make_server(addresses=2, joined_at=at(1))
    views, why = told(server)
    assert views[Stage.ADDRESSES].status is WAITING
    server.addresses[1].proof_error = "no answer on the HTTP port within 10 s"
    views, why = told(server)
    assert views[Stage.ADDRESSES].status is FAILED
    assert why == (
        "addresses: 198.18.0.0: not proved yet; 198.18.0.1: no answer on the HTTP port within 10 s "
        f"({REMEDIES[Stage.ADDRESSES]})"
    )


def test_one_proved_address_is_enough_and_the_other_one_is_still_told_of(told):
    server = make_server(S.VERIFIED, addresses=2)
    server.addresses[1].proved_at = None
    views, _ = told(server)
    assert (views[Stage.ADDRESSES].status, views[Stage.ADDRESSES].since) == (MET, at(3))
    assert views[Stage.ADDRESSES].detail == "198.18.0.1: not proved yet"


def test_a_proved_server_waits_until_its_name_is_in_dns_everywhere(told):
    server = make_server(S.VERIFIED, addresses=2)
    server.named_at, server.addresses[1].proved_at = None, at(7)
    views, why = told(server)
    assert (views[Stage.ADDRESSES].status, views[Stage.ADDRESSES].since) == (WAITING, at(7))
    assert "on the way into DNS" in why


@pytest.mark.parametrize(
    ("orders", "status", "detail"),
    [
        ([], WAITING, "no order yet"),
        ([(OrderStatus.WANTED, None)], WAITING, "order wanted"),
        ([(OrderStatus.PENDING, None)], WAITING, "order pending"),
        ([(OrderStatus.PENDING, "precheck: no answer")], FAILED, "precheck: no answer"),
        ([(OrderStatus.FAILED, "caa: no")], FAILED, "caa: no"),
        ([(OrderStatus.FAILED, "caa: no"), (OrderStatus.REQUESTED, None)], WAITING, "order requested"),
        ([(OrderStatus.ISSUED, None)], MET, ""),
        ([(OrderStatus.ISSUED, None), (OrderStatus.FAILED, "caa: no")], MET, "renewal: caa: no"),
    ],
)
def test_the_latest_order_speaks_and_a_failed_renewal_does_not_take_the_stage_back(
    told, orders, status, detail
):
    server = make_server(S.VERIFIED)
    for order_status, error in orders:
        server.orders.append(Order(status=order_status, error=error, created_at=at(4), issued_at=at(5)))
    views, _ = told(server)
    assert (views[Stage.ISSUANCE].status, views[Stage.ISSUANCE].detail) == (status, detail)


def test_probed_stages_are_as_the_last_probe_left_them(told):
    server = make_server(S.CERTIFIED)
    server.stages[:] = [
        StageRecord(stage=Stage.TCP, status=MET, since=at(6), detail=""),
        StageRecord(stage=Stage.TLS, status=FAILED, since=at(7), detail="198.18.0.0: not TLS"),
        StageRecord(stage=Stage.CERTIFICATE, status=WAITING, since=at(7), detail=""),
    ]
    views, why = told(server)
    assert (views[Stage.TLS].status, views[Stage.TLS].since) == (FAILED, at(7))
    assert views[Stage.KE].detail == "not probed yet"
    assert why == f"tls: 198.18.0.0: not TLS ({REMEDIES[Stage.TLS]})"


def test_the_way_to_admission_is_counted_on_the_address_that_is_furthest_behind(told, settings):
    server = make_server(S.CERTIFIED, addresses=3)
    for row, probes in zip(server.addresses, (3, 1, 0), strict=True):
        row.full_probes = probes
    server.addresses[2].proved_at = None
    views, _ = told(server)
    needed = settings.policy.admission_probes
    assert views[Stage.SCORE].detail == f"1 of {needed} full probes in a row"


def test_what_keeps_a_probe_from_being_full_is_told_by_address(told):
    server = make_server(S.CERTIFIED, addresses=2)
    server.addresses[1].step_reason = "1 of 2 cookies"
    assert told(server)[1].startswith("score: 0 of 3 full probes in a row; 198.18.0.1: 1 of 2 cookies (")


def test_every_open_hold_is_named(told):
    server = make_server(S.SUSPENDED)
    for number, (kind, lifted) in enumerate(
        [(HoldKind.MAINTENANCE, at(8)), (HoldKind.SCORE, None), (HoldKind.OPERATOR, None)]
    ):
        server.holds.append(Hold(kind=kind, reason=f"r{number}", set_at=at(number), lifted_at=lifted))
    views, why = told(server)
    assert (views[Stage.SCORE].status, views[Stage.SCORE].since) == (FAILED, at(1))
    assert why.startswith("score: score: r1; operator: r2 (")


def test_an_active_server_of_a_pool_that_has_not_opened_waits_for_others(told):
    server = make_server(S.ACTIVE)
    server.listed_at = None
    views, why = told(server, make_pool(opened=False), active=2)
    assert views[Stage.POOL].status is WAITING
    assert why.startswith("pool: 2 of the 4 active servers that the pool opens with")


def test_an_active_server_of_an_open_pool_waits_for_dns(told):
    server = make_server(S.ACTIVE)
    server.listed_at = None
    _, why = told(server)
    assert why.startswith("pool: on the way into DNS")


@pytest.mark.parametrize("state", [S.LEAVING, S.REMOVED])
def test_who_leaves_is_told_why_whatever_the_stages_say(told, state):
    assert told(make_server(state, leave_reason="removed by member"))[1] == f"{state}: removed by member"
    assert told(make_server(state))[1] == f"{state}: the registration expired"


@pytest.mark.parametrize("state", S)
def test_the_sentence_fits_one_line_in_every_state(told, state):
    _, why = told(make_server(state), make_pool(opened=False))
    assert "\n" not in why
    assert "None" not in why


@pytest.mark.parametrize(
    ("state", "values", "place", "minutes"),
    [
        (S.REGISTERED, {"joined_at": None}, None, None),
        (S.REGISTERED, {"joined_at": at(1)}, None, 2 + 1 + 3),
        (S.VERIFIED, {"order_due_at": at(15)}, None, 5 + 1 + 3),
        (S.VERIFIED, {"order_due_at": at(5)}, None, 1 + 3),
        (S.VERIFIED, {"order_due_at": at(15)}, Place(7, 9, at(10 + 2880), 50), 2880 + 1 + 3),
        (S.CERTIFIED, {}, None, 3),
        (S.ACTIVE, {}, None, None),
        (S.LEAVING, {}, None, None),
    ],
)
def test_who_is_on_the_way_knows_when_it_can_be_there(settings, state, values, place, minutes):
    server, now = make_server(state), at(10)
    for name, value in values.items():
        setattr(server, name, value)
    found = expected_at(server, make_pool(), settings, place, now)
    assert found == (None if minutes is None else now + timedelta(minutes=minutes))


def test_probes_that_were_passed_are_not_waited_for_again(settings):
    server = make_server(S.CERTIFIED, addresses=2)
    server.addresses[0].full_probes, server.addresses[1].full_probes = 3, 2
    assert expected_at(server, make_pool(), settings, None, at(10)) == at(11)


def test_a_quorum_of_several_takes_fewer_probes_of_each(settings):
    server = make_server(S.CERTIFIED, addresses=1)
    server.addresses[0].full_probes = 1
    assert expected_at(server, make_pool(quorum=3), settings, None, at(10)) == at(11)
    views = explain(server, make_pool(quorum=3), settings, active=5)
    (score,) = (view for view in views if view.stage is Stage.SCORE)
    assert score.detail == "1 of 2 full probes in a row by each of 3 monitors"
