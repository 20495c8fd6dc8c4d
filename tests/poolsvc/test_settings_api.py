"""A server's settings over the API: what may be chosen, by whom, and two people who choose at once."""

import asyncio
from datetime import UTC, datetime

import pytest
from sqlalchemy import select

from nts_core.control import ServerState
from poolsvc import issuance, members
from poolsvc.api.etags import is_known, require_match
from poolsvc.app import create_app
from poolsvc.derived import RegistryKey
from poolsvc.errors import PreconditionFailed, WrongState
from poolsvc.models import CaAccount, Server, StaffRole

URL = "/v1/servers/alice/settings"
ONE, SIX = "198.18.0.1", "fd00::1"


@pytest.fixture
async def alice(registry):
    """A server of a member whose token is `registry.token`."""
    owner = await registry.member("Owner")
    registry.alice = await registry.server("alice", ONE, SIX, state=ServerState.ACTIVE, member=owner)
    registry.token = await registry.owner_token(owner)
    return registry


async def test_settings_are_read_changed_and_read_again(alice, client):
    async with client(alice.token) as http:
        first = await http.get(URL)
        assert first.json() == {
            "weight": 1,
            "ipv4": True,
            "ipv6": True,
            "public": False,
            "addresses": [ONE, SIX],
            "short_lived": False,
            "dns_01": False,
            "waive_source": False,
            "traffic_cap": None,
            "ke_cap": None,
        }
        wanted = {"weight": 1000, "ipv6": False, "public": True, "addresses": [ONE, "198.18.0.2"]}
        changed = await http.patch(URL, json=wanted)
        assert changed.status_code == 200, changed.text
        assert changed.json() == first.json() | wanted
        again = await http.get(URL)
    assert (again.json(), again.headers["ETag"]) == (changed.json(), changed.headers["ETag"])
    assert again.headers["ETag"] != first.headers["ETag"]


async def test_a_change_of_nothing_keeps_the_tag(alice, client):
    async with client(alice.token) as http:
        before = (await http.get(URL)).headers["ETag"]
        assert (await http.patch(URL, json={})).headers["ETag"] == before
        assert (await http.patch(URL, json={"weight": None})).headers["ETag"] == before


async def test_who_knows_the_settings_is_not_told_them_again(alice, client):
    async with client(alice.token) as http:
        tag = (await http.get(URL)).headers["ETag"]
        known = await http.get(URL, headers={"If-None-Match": f'"old", W/{tag}'})
        assert (known.status_code, known.content, known.headers["ETag"]) == (304, b"", tag)
        await http.patch(URL, json={"weight": 3})
        assert (await http.get(URL, headers={"If-None-Match": tag})).status_code == 200


async def test_a_change_meant_for_other_settings_is_refused(alice, client):
    async with client(alice.token) as http:
        tag = (await http.get(URL)).headers["ETag"]
        assert (await http.patch(URL, json={"weight": 2}, headers={"If-Match": tag})).status_code == 200
        late = await http.patch(URL, json={"weight": 3}, headers={"If-Match": tag})
        assert (late.status_code, late.json()["code"]) == (412, "precondition-failed")
        assert late.json()["remedy"]
        assert (await http.get(URL)).json()["weight"] == 2


async def test_of_two_changes_at_once_for_one_tag_one_is_refused(alice, client):
    async with client(alice.token) as http:
        tag = (await http.get(URL)).headers["ETag"]
        answers = await asyncio.gather(
            *(http.patch(URL, json={"weight": weight}, headers={"If-Match": tag}) for weight in (2, 3, 4))
        )
    assert sorted(answer.status_code for answer in answers) == [200, 412, 412]


@pytest.mark.parametrize("header", ["", '"', '""', "x", 'W/"%s"', "%s", '"%s', "W/*", '"%s"x' * 20])
def test_a_tag_that_is_none_matches_nothing(header):
    current = '"' + "0a" * 16 + '"'
    header = header.replace("%s", "0b" * 16)
    with pytest.raises(PreconditionFailed):
        require_match(header, current)
    assert not is_known(header, current)


def test_a_weak_tag_is_known_and_matches_no_change():
    """RFC 9110 section 13.1.1: the comparison for `If-Match` is the strong one."""
    assert is_known('W/"a"', '"a"')
    with pytest.raises(PreconditionFailed):
        require_match('W/"a"', '"a"')
    require_match('"b", "a"', '"a"')
    require_match("*", '"a"')
    require_match(None, '"a"')
    assert not is_known(None, '"a"')


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        ({"weight": 0}, 422, "invalid-document", "weight"),
        ({"weight": 1001}, 422, "invalid-document", "weight"),
        ({"weight": True}, 422, "invalid-document", "weight"),
        ({"weight": "9"}, 422, "invalid-document", "weight"),
        ({"short_lived": "yes"}, 422, "invalid-document", "short_lived"),
        ({"dns_01": "yes"}, 422, "invalid-document", "dns_01"),
        ({"ipv4": "no"}, 422, "invalid-document", "ipv4"),
        ({"ipv4": False, "ipv6": False}, 422, "invalid-document", "ipv4"),
        ({"addresses": []}, 422, "invalid-address", "addresses"),
        ({"addresses": ["x"] * 65}, 422, "invalid-document", "addresses"),
        ({"addresses": ["::ffff:198.18.0.1"]}, 422, "invalid-address", "addresses"),
        ({"name": "bob"}, 422, "invalid-document", "name"),
        ([], 422, "invalid-document", None),
    ],
)
async def test_what_cannot_be_set_is_refused_and_named(alice, client, body, status, code, field):
    async with client(alice.token) as http:
        before = await http.get(URL)
        answer = await http.patch(URL, json=body)
        assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (status, code, field)
        assert (await http.get(URL)).json() == before.json()


async def test_only_an_operator_waives_the_source_address(alice, client):
    async with alice.database.transaction() as session:
        _, operator = await members.create_operator(session, datetime.now(UTC))
        await members.create_user(session, alice.now, staff=StaffRole.SUPPORT)
    async with client(alice.token) as http:
        refused = await http.patch(URL, json={"waive_source": True, "weight": 7})
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert (await http.get(URL)).json()["weight"] == 1, "nothing of a refused change is kept"
        assert (await http.patch(URL, json={"waive_source": False, "weight": 7})).status_code == 200
    async with client(operator) as http:
        assert (await http.patch(URL, json={"waive_source": True})).json()["waive_source"] is True


async def test_short_life_is_chosen_where_a_ca_has_it(alice, client):
    await alice.open_account()
    async with client(alice.token) as http:
        refused = await http.patch(URL, json={"short_lived": True})
        assert (refused.status_code, refused.json()["field"]) == (409, "short_lived")
        assert refused.json()["remedy"]
        async with alice.database.transaction() as session:
            (await session.scalars(select(CaAccount))).one().profiles = ["shortlived"]
        assert (await http.patch(URL, json={"short_lived": True})).json()["short_lived"] is True
        assert (await http.patch(URL, json={"short_lived": False})).json()["short_lived"] is False


async def test_the_registry_answers_the_ca_where_the_policy_and_the_member_want_it(alice, client, app, tuned):
    async with client(alice.token) as http:
        refused = await http.patch(URL, json={"dns_01": True})
        assert (refused.status_code, refused.json()["field"]) == (409, "dns_01")
        assert "policy.dns_01" in refused.json()["remedy"]
        assert (await http.patch(URL, json={"dns_01": False})).json()["dns_01"] is False
    other = create_app(tuned(dns_01=True), alice.database, [], RegistryKey(bytes(32)))
    async with client(alice.token, app=other) as http:
        assert (await http.patch(URL, json={"dns_01": True})).json()["dns_01"] is True
    async with client(alice.token) as http:
        kept = await http.patch(URL, json={"dns_01": True})
        assert kept.status_code == 200, (
            "what was chosen stays, and takes effect where the policy lets it again"
        )


async def test_without_an_agent_only_its_members_client_answers(registry, settings):
    server = Server(name="carol", agentless=True, dns_01=False)
    allowed = settings.model_copy(update={"policy": settings.policy.model_copy(update={"dns_01": True})})
    with pytest.raises(WrongState) as caught:
        issuance.set_dns_01(allowed, server, wanted=True)
    assert (caught.value.field, server.dns_01) == ("dns_01", False)
    assert caught.value.remedy


@pytest.mark.parametrize("state", [ServerState.LEAVING, ServerState.REMOVED])
async def test_a_server_that_is_out_has_settings_to_read_only(alice, client, state):
    other = await alice.server("carol", "198.18.4.4", state=state)
    owner = (await alice.get(other)).member_id
    async with client(await alice.owner_token(owner)) as http:
        assert (await http.get("/v1/servers/carol/settings")).status_code == 200
        answer = await http.patch("/v1/servers/carol/settings", json={"weight": 2})
    assert (answer.status_code, answer.json()["code"]) == (410, "removed")


@pytest.mark.parametrize("path", ["/v1/me", "/v1/members/{member}"])
async def test_people_and_members_have_a_tag_too(registry, client, path):
    member = await registry.member("Club")
    path = path.format(member=member)
    async with client((await registry.person(member)).token) as http:
        first = await http.get(path)
        tag = {"If-Match": first.headers["ETag"]}
        known = await http.get(path, headers={"If-None-Match": tag["If-Match"]})
        assert (known.status_code, known.content) == (304, b"")
        answers = await asyncio.gather(
            *(http.patch(path, json={"name": f"Name {number}"}, headers=tag) for number in range(3))
        )
        (changed,) = [answer for answer in answers if answer.is_success]
        assert {answer.json()["code"] for answer in answers if answer.is_error} == {"precondition-failed"}
        again = await http.get(path)
        assert (again.json(), again.headers["ETag"]) == (changed.json(), changed.headers["ETag"])
        assert (await http.patch(path, json={"name": "Last"}, headers={"If-Match": "*"})).is_success
