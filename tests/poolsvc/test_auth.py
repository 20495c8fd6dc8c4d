"""Who may do what: the permission table, every endpoint by role, and the life of tokens."""

import base64
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from sqlalchemy import select, update

from nts_core.control import ServerState
from poolsvc import auth, members, notices, teams, transfers
from poolsvc.auth import PERMISSIONS, Operation, Principal, Role
from poolsvc.derived import Purpose, RegistryKey
from poolsvc.errors import Forbidden, TokenExpired, TokenUsed, Unauthenticated
from poolsvc.models import (
    Base,
    Delivery,
    DeliveryStatus,
    Invitation,
    Member,
    MemberRole,
    Scope,
    StaffRole,
    Token,
    TokenKind,
    User,
    Webhook,
)
from poolsvc.notices import NoticeKind

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SOON = (datetime.now(UTC) + timedelta(days=1)).isoformat()
LATER = (datetime.now(UTC) + timedelta(days=30)).isoformat()
KEY = base64.b64encode(bytes(range(32))).decode()

# Written out once more, so that a slip in the table is seen.
ROLES = {
    "read-self": "user",
    "change-self": "user",
    "accept-terms": "user",
    "change-identity": "user",
    "found-member": "user",
    "read-member": "operator support owner technician",
    "change-member": "operator owner",
    "manage-users": "operator owner",
    "manage-webhooks": "operator owner technician",
    "close-member": "operator owner",
    "export-member": "operator owner",
    "register-server": "owner technician",
    "read-server": "operator support owner technician agent",
    "read-server-details": "operator support owner technician",
    "change-server": "operator owner technician",
    "tend-server": "operator owner technician agent",
    "leave-server": "operator owner technician agent",
    "remove-server": "operator owner technician",
    "offer-server": "operator owner",
    "take-server": "owner",
    "prove-address": "owner technician",
    "read-pool": "operator support",
    "create-member": "operator",
    "judge-member": "operator",
    "judge-user": "operator",
    "view-as": "operator support",
    "judge-server": "operator",
    "invite": "operator",
    "appoint-staff": "operator",
    "set-ca-limits": "operator",
    "set-regions": "operator",
    "judge-monitor": "operator",
    "read-monitor": "operator support owner technician",
    "register-monitor": "operator owner",
    "change-monitor": "operator owner",
    "join": "join",
    "agent": "agent",
    "monitor": "monitor",
}
PROGRAMS = (Role.JOIN, Role.AGENT, Role.MONITOR)
WHEN_BLOCKED = {
    "read-self",
    "change-self",
    "accept-terms",
    "change-identity",
    "read-member",
    "close-member",
    "export-member",
    "read-server",
    "read-server-details",
    "leave-server",
    "remove-server",
    "read-monitor",
}
MINE, OTHER = 1, 2


def bearer(role, **options):
    """Somebody with that role, towards the member MINE if it is a member's."""
    match role:
        case Role.JOIN | Role.AGENT:
            return Principal(1, TokenKind(role.value), server_id=1)
        case Role.MONITOR:
            return Principal(1, TokenKind.MONITOR, monitor_id=1)
        case Role.OPERATOR | Role.SUPPORT:
            return Principal(1, TokenKind.SESSION, user_id=1, staff=StaffRole(role.value), **options)
        case Role.USER:
            return Principal(1, TokenKind.SESSION, user_id=1, **options)
        case _:
            members = {MINE: MemberRole(role.value)}
            return Principal(1, TokenKind.SESSION, user_id=1, members=members, **options)


def may(principal, operation, member=MINE):
    try:
        principal.may(operation, member=member)
    except Forbidden:
        return False
    return True


@pytest.mark.parametrize("operation", Operation)
@pytest.mark.parametrize("role", Role)
def test_each_role_may_do_what_the_table_says(role, operation):
    allowed = set(ROLES[operation].split())
    own = {role.value} if role in PROGRAMS else {role.value, "user"}
    assert may(bearer(role), operation) == bool(own & allowed)
    # Towards another member, the role in one's own is worth nothing.
    if role in (Role.OWNER, Role.TECHNICIAN):
        assert may(bearer(role), operation, OTHER) == ("user" in allowed)


def test_the_table_has_a_row_for_every_operation():
    assert set(PERMISSIONS) == set(Operation) == set(ROLES)


@pytest.mark.parametrize("operation", [row for row in Operation if PERMISSIONS[row].scope])
@pytest.mark.parametrize("scope", Scope)
def test_an_api_token_does_what_its_scopes_allow_and_a_session_all(operation, scope):
    role = Role(ROLES[operation].split()[0])
    person = bearer(role)
    assert may(person, operation)
    program = replace(person, kind=TokenKind.API, scopes=frozenset({scope}))
    assert may(program, operation) == (PERMISSIONS[operation].scope is scope)


def test_what_takes_a_session_is_nothing_for_an_api_token_with_all_scopes():
    person = bearer(Role.USER)
    assert may(person, Operation.CHANGE_IDENTITY)
    with pytest.raises(Forbidden, match="a program's token") as caught:
        replace(person, kind=TokenKind.API).may(Operation.CHANGE_IDENTITY)
    assert "sign in" in caught.value.remedy


@pytest.mark.parametrize("operation", Operation)
def test_people_of_a_blocked_member_read_and_leave_and_operators_go_on(operation):
    owner = bearer(Role.OWNER, blocked=frozenset({MINE}))
    if "owner" in ROLES[operation].split():
        assert may(owner, operation) == (operation in WHEN_BLOCKED)
    if "operator" in ROLES[operation].split():
        assert may(bearer(Role.OPERATOR, blocked=frozenset({MINE})), operation)


def test_a_token_for_one_member_is_none_of_an_operator_nor_of_another_member():
    members = {MINE: MemberRole.OWNER, OTHER: MemberRole.OWNER}
    token = Principal(1, TokenKind.API, user_id=1, staff=StaffRole.OPERATOR, members=members, member_id=MINE)
    assert may(token, Operation.CHANGE_MEMBER, MINE)
    assert not may(token, Operation.CHANGE_MEMBER, OTHER)
    assert not may(token, Operation.CREATE_MEMBER, None)


@pytest.mark.parametrize(
    ("principal", "member", "is_foreign"),
    [
        (bearer(Role.OWNER), MINE, False),
        (bearer(Role.OWNER), OTHER, True),
        (bearer(Role.OWNER, member_id=OTHER), MINE, True),
        (bearer(Role.SUPPORT), MINE, True),
        (bearer(Role.AGENT), MINE, False),
        (bearer(Role.OWNER), None, False),
    ],
)
def test_a_refusal_says_of_another_member_to_who_does_not_act_for_it(principal, member, is_foreign):
    with pytest.raises(Forbidden) as caught:
        principal.may(Operation.JUDGE_SERVER, member=member)
    assert caught.value.detail == "you cannot judge-server" + " of another member" * is_foreign


def test_who_acts_for_several_members_has_to_name_one():
    both = Principal(1, TokenKind.SESSION, members={1: MemberRole.OWNER, 2: MemberRole.TECHNICIAN})
    with pytest.raises(Forbidden, match="you act for 2 members") as caught:
        both.member_for(Operation.REGISTER_SERVER, None)
    assert caught.value.field == "member"
    assert both.member_for(Operation.REGISTER_SERVER, 2) == 2
    assert bearer(Role.OWNER).member_for(Operation.REGISTER_SERVER, None) == MINE
    with pytest.raises(Forbidden):
        bearer(Role.OWNER).member_for(Operation.REGISTER_SERVER, 3)
    with pytest.raises(Forbidden, match="you act for 0 members"):
        bearer(Role.OPERATOR).member_for(Operation.REGISTER_SERVER, None)


@pytest.fixture
async def world(registry):
    """Two members, and a token of every role around the first and its server alice."""
    owner = await registry.member("Owner")
    server = await registry.server("alice", state=ServerState.REGISTERED, member=owner)
    foreigner = await registry.member("Foreigner")
    foreign = await registry.owner_token(foreigner)
    bob = await registry.server("bob", "198.18.6.6", state=ServerState.ACTIVE, member=owner)
    await registry.server("erin", "198.18.0.1", state=ServerState.VERIFIED, member=owner, agentless=True)
    eyes, _ = await registry.monitor("eyes", member=owner)
    colleague = await registry.person(owner, MemberRole.TECHNICIAN)
    numbers = await offers(registry, owner, foreigner, colleague.id)
    async with registry.database.transaction() as session:
        operator, _ = await members.create_operator(session, NOW)
        support = await members.create_user(session, NOW, staff=StaffRole.SUPPORT)
        nobody = await members.create_user(session, NOW)
        tokens = {}
        for role, options in (
            (Role.OPERATOR, {"user_id": operator.id}),
            (Role.SUPPORT, {"user_id": support.id}),
            (Role.USER, {"user_id": nobody.id}),
            (Role.JOIN, {"server_id": server}),
            (Role.AGENT, {"server_id": server}),
            (Role.MONITOR, {"monitor_id": eyes}),
        ):
            kind = TokenKind.SESSION if "user_id" in options else TokenKind(role.value)
            _, tokens[role] = await auth.issue(session, kind, now=NOW, **options)
        _, agent_of_bob = await auth.issue(session, TokenKind.AGENT, now=NOW, server_id=bob)
    for role in (MemberRole.OWNER, MemberRole.TECHNICIAN):
        tokens[Role(role.value)] = await registry.owner_token(owner, role, TokenKind.SESSION)
    async with registry.database.transaction() as session:
        await session.execute(update(User).values(confirmed_at=NOW))
        await session.execute(update(Member).where(Member.id == foreigner).values(opaque_id=OPAQUE))
    numbers |= await hooks_of(registry, owner)

    def path(template):
        """An endpoint's path with what the world has for it."""
        own = numbers.get(template.partition("?")[0], {})
        return template.format(
            **{"name": "alice", "member": owner, "user": colleague.id, "monitor": "eyes", "region": "de"}
            | GONE
            | own
        )

    def bearer(role, template):
        """A token of that role; an agent's is that of the server in the endpoint's path."""
        is_bobs = role is Role.AGENT and path(template).startswith("/v1/servers/bob/")
        return {"Authorization": f"Bearer {agent_of_bob if is_bobs else tokens[role]}"}

    return SimpleNamespace(
        tokens=tokens, foreign=foreign, server=server, owner=owner, path=path, bearer=bearer, eyes=eyes
    )


async def hooks_of(registry, owner):
    """Webhooks and a delivery: the ids for the endpoints that each take one in a state of its own."""
    async with registry.database.transaction() as session:
        given_up, enabled = [
            Webhook(member_id=owner, url="https://example.org/", created_at=NOW, enabled_at=at)
            for at in (None, NOW)
        ]
        session.add_all((given_up, enabled))
        notice = await notices.announce(session, NoticeKind.ADMITTED, member_id=owner, now=NOW)
        failed = await session.scalar(
            select(Delivery).where(Delivery.notice_id == notice.id, Delivery.webhook_id == enabled.id)
        )
        failed.status = DeliveryStatus.FAILED
    return {
        HOOKS + "/{hook}": {"hook": enabled.id},
        HOOKS + "/{hook}/rotate": {"hook": enabled.id},
        HOOKS + "/{hook}/test": {"hook": enabled.id},
        HOOKS + "/{hook}/enable": {"hook": given_up.id},
        "/v1/deliveries/{delivery}/retry": {"delivery": failed.id},
    }


async def offers(registry, owner, foreigner, colleague):
    """What can be accepted, declined and revoked: the ids for the endpoints that do so."""
    now, settings = datetime.now(UTC), registry.settings
    moving = [
        await registry.server(name, f"198.18.5.{last}", member=foreigner)
        for last, name in enumerate(("moving", "staying"), start=1)
    ]
    async with registry.database.transaction() as session:
        to = (await session.get_one(Member, owner)).opaque_id
        taken, declined = [(await transfers.offer(session, settings, row, to, now)).id for row in moving]
        accepted, own, pool = [
            (await teams.invite(session, settings, "x@example.org", now, by=colleague, **to_whom)).id
            for to_whom in ({"member_id": foreigner}, {"member_id": owner}, {})
        ]
        # Their ids are drawn by chance; the table of endpoints has a token for this one.
        await session.execute(update(Invitation).where(Invitation.id == accepted).values(id=INVITATION))
    return {
        "/v1/servers/{name}/maintenance/{window}": {"window": 1},
        "/v1/servers/{name}/leaving": {"name": "bob"},
        "/v1/servers/{name}/proofs": {"name": "erin"},
        "/v1/servers/{name}/proofs/{address}/ready": {"name": "erin", "address": "198.18.0.1"},
        "/v1/servers/{name}/acme-account": {"name": "erin"},
        "/v1/transfers/{transfer}/accept": {"transfer": taken},
        "/v1/transfers/{transfer}/decline": {"transfer": declined},
        "/v1/members/{member}/invitations/{invitation}": {"invitation": own},
        "/v1/invitations/{invitation}": {"invitation": pool},
    }


INVITATION, OPAQUE = 1, "0123456789abcdef"
ACCEPT = {"token": RegistryKey(bytes(32)).token(Purpose.INVITATION, INVITATION)}
EMAIL, REASON = {"email": "new@example.org"}, {"reason": "a test"}
MEMBER, USER = "/v1/members/{member}", "/v1/users/{user}"
HOOKS, HOOK = MEMBER + "/webhooks", {"url": "https://example.org/"}
# Method, path, body, and the operation that it needs; in an order in which each can succeed once.
ENDPOINTS = [
    ("GET", "/v1/me", None, Operation.READ_SELF),
    ("PATCH", "/v1/me", {"name": "A. Person"}, Operation.CHANGE_SELF),
    ("GET", "/v1/me/export", None, Operation.READ_SELF),
    ("GET", "/v1/me/sessions", None, Operation.READ_SELF),
    ("DELETE", "/v1/me/sessions", None, Operation.CHANGE_SELF),
    ("GET", "/v1/me/tokens", None, Operation.READ_SELF),
    ("POST", "/v1/me/tokens", {"label": "cron", "scopes": ["read"]}, Operation.CHANGE_SELF),
    ("GET", "/v1/me/terms", None, Operation.READ_SELF),
    ("POST", "/v1/me/terms", {"accept": []}, Operation.ACCEPT_TERMS),
    ("GET", "/v1/me/identities", None, Operation.READ_SELF),
    ("GET", "/v1/me/events", None, Operation.READ_SELF),
    ("GET", "/v1/members", None, Operation.READ_SELF),
    ("POST", "/v1/members", {"name": "New member"}, Operation.FOUND_MEMBER),
    ("GET", MEMBER, None, Operation.READ_MEMBER),
    ("PATCH", MEMBER, {"public": True}, Operation.CHANGE_MEMBER),
    ("PUT", MEMBER + "/approval", None, Operation.JUDGE_MEMBER),
    ("PUT", MEMBER + "/block", REASON, Operation.JUDGE_MEMBER),
    ("DELETE", MEMBER + "/block", None, Operation.JUDGE_MEMBER),
    ("GET", MEMBER + "/events", None, Operation.READ_MEMBER),
    ("GET", MEMBER + "/export", None, Operation.EXPORT_MEMBER),
    ("POST", HOOKS, HOOK, Operation.MANAGE_WEBHOOKS),
    ("GET", HOOKS, None, Operation.READ_MEMBER),
    ("POST", HOOKS + "/{hook}/rotate", None, Operation.MANAGE_WEBHOOKS),
    ("POST", HOOKS + "/{hook}/enable", None, Operation.MANAGE_WEBHOOKS),
    ("POST", HOOKS + "/{hook}/test", None, Operation.MANAGE_WEBHOOKS),
    ("POST", "/v1/deliveries/{delivery}/retry", None, Operation.MANAGE_WEBHOOKS),
    ("DELETE", HOOKS + "/{hook}", None, Operation.MANAGE_WEBHOOKS),
    ("GET", MEMBER + "/notices", None, Operation.READ_MEMBER),
    ("GET", MEMBER + "/users", None, Operation.READ_MEMBER),
    ("PATCH", MEMBER + "/users/{user}", {"role": "owner"}, Operation.MANAGE_USERS),
    ("POST", MEMBER + "/invitations", EMAIL, Operation.MANAGE_USERS),
    ("GET", MEMBER + "/invitations", None, Operation.MANAGE_USERS),
    ("DELETE", MEMBER + "/invitations/{invitation}", None, Operation.MANAGE_USERS),
    ("DELETE", MEMBER + "/users/{user}", None, Operation.MANAGE_USERS),
    ("POST", "/v1/invitations", EMAIL, Operation.INVITE),
    ("GET", "/v1/invitations", None, Operation.INVITE),
    ("DELETE", "/v1/invitations/{invitation}", None, Operation.INVITE),
    ("POST", "/v1/invitations/accept", ACCEPT, Operation.CHANGE_SELF),
    ("GET", "/v1/users", None, Operation.READ_POOL),
    ("PUT", USER + "/block", REASON, Operation.JUDGE_USER),
    ("DELETE", USER + "/block", None, Operation.JUDGE_USER),
    ("POST", USER + "/view", REASON, Operation.VIEW_AS),
    ("PUT", USER + "/staff", {"role": "support"}, Operation.APPOINT_STAFF),
    ("DELETE", USER + "/staff", None, Operation.APPOINT_STAFF),
    ("GET", "/v1/acme/budget", None, Operation.READ_POOL),
    ("GET", "/v1/acme/limits", None, Operation.READ_POOL),
    ("PUT", "/v1/acme/limits", {"certificates": 300}, Operation.SET_CA_LIMITS),
    ("DELETE", "/v1/regions/{region}", None, Operation.SET_REGIONS),
    ("GET", "/v1/events", None, Operation.READ_POOL),
    ("GET", "/v1/servers", None, Operation.READ_SELF),
    (
        "POST",
        "/v1/servers",
        {"name": "carol", "addresses": ["198.18.7.7"], "member": 1},
        Operation.REGISTER_SERVER,
    ),
    ("GET", "/v1/servers/{name}", None, Operation.READ_SERVER),
    ("GET", "/v1/servers/{name}/events", None, Operation.READ_SERVER_DETAILS),
    ("GET", "/v1/servers/{name}/history", None, Operation.READ_SERVER_DETAILS),
    ("GET", "/v1/servers/{name}/monitors?dry_run=true", None, Operation.READ_SERVER_DETAILS),
    ("GET", "/v1/scorers", None, Operation.READ_POOL),
    ("GET", "/v1/disagreements", None, Operation.READ_POOL),
    ("GET", "/v1/servers/{name}/settings", None, Operation.READ_SERVER_DETAILS),
    ("PATCH", "/v1/servers/{name}/settings", {"weight": 2}, Operation.CHANGE_SERVER),
    ("GET", "/v1/servers/{name}/maintenance", None, Operation.READ_SERVER),
    ("POST", "/v1/servers/{name}/maintenance", {"ends_at": SOON}, Operation.TEND_SERVER),
    ("DELETE", "/v1/servers/{name}/maintenance/{window}", None, Operation.TEND_SERVER),
    ("PUT", "/v1/servers/{name}/hold", REASON, Operation.JUDGE_SERVER),
    ("DELETE", "/v1/servers/{name}/hold", None, Operation.JUDGE_SERVER),
    ("POST", "/v1/servers/{name}/proofs", {"address": "198.18.0.1"}, Operation.PROVE_ADDRESS),
    ("POST", "/v1/servers/{name}/proofs/{address}/ready", None, Operation.PROVE_ADDRESS),
    (
        "PUT",
        "/v1/servers/{name}/acme-account",
        {"account_uri": "https://ca.example/1"},
        Operation.CHANGE_SERVER,
    ),
    ("POST", "/v1/servers/{name}/leaving", {"at": LATER}, Operation.LEAVE_SERVER),
    ("DELETE", "/v1/servers/{name}/leaving", None, Operation.TEND_SERVER),
    ("POST", "/v1/servers/{name}/join-token", None, Operation.CHANGE_SERVER),
    ("POST", "/v1/servers/{name}/transfer", {"to": OPAQUE}, Operation.OFFER_SERVER),
    ("DELETE", "/v1/servers/{name}/transfer", None, Operation.OFFER_SERVER),
    ("GET", MEMBER + "/transfers", None, Operation.READ_MEMBER),
    ("POST", "/v1/transfers/{transfer}/accept", None, Operation.TAKE_SERVER),
    ("POST", "/v1/transfers/{transfer}/decline", None, Operation.TAKE_SERVER),
    ("GET", "/v1/monitors", None, Operation.READ_SELF),
    ("POST", "/v1/monitors", {"name": "ears", "member": 1}, Operation.REGISTER_MONITOR),
    ("GET", "/v1/monitors/{monitor}", None, Operation.READ_MONITOR),
    ("GET", "/v1/monitor/work", None, Operation.MONITOR),
    ("POST", "/v1/monitor/report", {"sequence": 1, "sound": True}, Operation.MONITOR),
    ("PATCH", "/v1/monitors/{monitor}", {"status": "paused", **REASON}, Operation.CHANGE_MONITOR),
    ("POST", "/v1/monitors/{monitor}/token", None, Operation.CHANGE_MONITOR),
    ("PUT", "/v1/quorum", {"quorum": 1, **REASON}, Operation.JUDGE_MONITOR),
    ("POST", "/v1/agent/proof", {"address": "198.18.0.1"}, Operation.AGENT),
    ("POST", "/v1/agent/sync", {"engine": "builtin"}, Operation.AGENT),
    ("DELETE", "/v1/servers/{name}", None, Operation.REMOVE_SERVER),
    ("DELETE", MEMBER + "?remove_servers=true", None, Operation.CLOSE_MEMBER),
    ("POST", "/v1/agent/join", {"public_key": KEY}, Operation.JOIN),
]

# Those that ask for something that is not there: who may is told so.
GONE = dict.fromkeys(("session_id", "token_id", "identity_id"), 999_999)
BACK = {"state": "1.x", "code": "x", "binding": "x"}
IN_VAIN = [
    ("PUT", "/v1/regions/{region}", None, Operation.SET_REGIONS, 409),  # there is no server
    ("DELETE", "/v1/me/sessions/{session_id}", None, Operation.CHANGE_SELF, 404),
    ("POST", "/v1/servers/{name}/certificate/compromised", None, Operation.CHANGE_SERVER, 409),
    ("POST", "/v1/servers/{name}/renewal", None, Operation.TEND_SERVER, 409),
    ("POST", "/v1/servers/{name}/check", None, Operation.TEND_SERVER, 409),
    ("DELETE", "/v1/me/tokens/{token_id}", None, Operation.CHANGE_SELF, 404),
    ("POST", "/v1/me/email", {"token": "1.x"}, Operation.CHANGE_IDENTITY, 401),
    ("POST", "/v1/me/identities", {"provider": "nobody"}, Operation.CHANGE_IDENTITY, 404),
    ("POST", "/v1/me/identities/finish", BACK, Operation.CHANGE_IDENTITY, 401),
    ("DELETE", "/v1/me/identities/{identity_id}", None, Operation.CHANGE_IDENTITY, 404),
]
# Those after which the token is worth nothing.
LAST = [
    ("DELETE", "/v1/me/session", None, Operation.READ_SELF),
    ("DELETE", "/v1/me", None, Operation.CHANGE_IDENTITY),
]
# These need no token: what everybody may see, and how somebody comes by a token.
PUBLIC = {
    ("GET", "/v1/pool"),
    ("GET", "/v1/pool/servers"),
    ("GET", "/v1/pool/history"),
    ("GET", "/v1/regions"),
    ("GET", "/v1/pool/independence"),
    ("GET", "/v1/pool/monitors"),
    ("POST", "/v1/agent/rejoin-challenge"),
    ("POST", "/v1/agent/rejoin"),
    ("GET", "/v1/sign-up"),
    ("POST", "/v1/sign-up"),
    ("POST", "/v1/sign-in"),
    ("POST", "/v1/sign-in/confirm"),
    ("GET", "/v1/oidc"),
    ("POST", "/v1/oidc/{name}/begin"),
    ("POST", "/v1/oidc/finish"),
}


@pytest.mark.parametrize("role", Role)
async def test_every_endpoint_by_role(world, client, role):
    own = {role.value} if role in PROGRAMS else {role.value, "user"}
    async with client(source="198.18.0.1") as http:
        for method, path, body, operation in ENDPOINTS:
            answer = await http.request(method, world.path(path), json=body, headers=world.bearer(role, path))
            if own & set(ROLES[operation].split()):
                assert answer.status_code in {200, 201, 202, 204}, f"{path}: {answer.text}"
            else:
                assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), path


@pytest.mark.parametrize("role", Role)
async def test_every_endpoint_that_finds_nothing_by_role(world, client, role):
    async with client(world.tokens[role]) as http:
        for method, path, body, operation, found in IN_VAIN:
            answer = await http.request(method, world.path(path), json=body)
            own = {role.value} if role in PROGRAMS else {role.value, "user"}
            allowed = own & set(ROLES[operation].split())
            assert answer.status_code == (found if allowed else 403), path


@pytest.mark.parametrize(("method", "path", "body", "operation"), LAST)
@pytest.mark.parametrize("role", Role)
async def test_every_endpoint_that_ends_the_token_by_role(
    world, registry, client, role, method, path, body, operation
):
    await registry.person(staff=StaffRole.OPERATOR)  # the last one could not go
    async with client(world.tokens[role]) as http:
        answer = await http.request(method, path, json=body)
        if role in PROGRAMS:
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
            return
        assert "user" in ROLES[operation].split()
        assert answer.status_code == 204
        assert (await http.get("/v1/me")).status_code == 401


def test_the_endpoints_above_are_all_that_there_are(app):
    """A new endpoint has to be added to the tables."""
    routes = {
        (method.upper(), path)
        for path, entry in app.openapi()["paths"].items()
        for method in entry
        if path.startswith("/v1/")
    }
    known = {(method, path.partition("?")[0]) for method, path, *_ in (*ENDPOINTS, *IN_VAIN, *LAST)}
    assert routes == known | PUBLIC


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic b3A6b3A=", "Bearer tc_operator_"])
async def test_no_endpoint_without_a_valid_token(world, client, header):
    async with client() as http:
        for method, path, body, *_ in (*ENDPOINTS, *IN_VAIN, *LAST):
            answer = await http.request(
                method,
                world.path(path),
                json=body,
                headers={} if header is None else {"Authorization": header},
            )
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), path
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.json()["remedy"]


async def test_a_foreign_member_reaches_nothing_of_a_member_or_its_server(world, registry, client):
    own = [row for row in ENDPOINTS if "{member}" in row[1] or "{name}" in row[1]]
    assert len(own) >= 20
    async with client(world.foreign) as http:
        for method, path, body, _ in own:
            answer = await http.request(method, world.path(path), json=body)
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), path
    assert (await registry.get(world.server)).state is ServerState.REGISTERED


async def test_an_agents_token_reaches_its_own_server_only(world, registry, client):
    """At its own endpoints an agent names no server; where it does, that has to be its own."""
    other = await registry.server("dave", "198.18.0.2")
    async with client(world.tokens[Role.AGENT], source="198.18.0.2") as http:
        answer = await http.post("/v1/agent/sync", json={"engine": "builtin"})
        assert answer.json()["server"] == "alice"
        proof = await http.post("/v1/agent/proof", json={"address": "198.18.0.2"})
        assert (proof.status_code, proof.json()["code"]) == (404, "not-found")
        for method, template, body, operation, *_ in (*ENDPOINTS, *IN_VAIN):
            if "{name}" in template and "agent" in ROLES[operation].split():
                path = template.format(name="dave", window=1)
                answer = await http.request(method, path, json=body)
                assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), path
    assert (await registry.get(other)).agent_seen_at is None


async def authenticated(registry, secret, now=NOW):
    async with registry.database.transaction() as session:
        return await auth.authenticate(session, secret, now)


@pytest.mark.parametrize("role", Role)
async def test_a_token_names_its_bearer(world, registry, role):
    principal = await authenticated(registry, world.tokens[role])
    if role in PROGRAMS:
        whose = world.eyes if role is Role.MONITOR else world.server
        assert (principal.monitor_id or principal.server_id, principal.actor) == (whose, f"{role} {whose}")
        assert principal.roles() == {role}
        return
    assert principal.actor == f"user {principal.user_id}"
    assert principal.roles(world.owner) == {role, Role.USER}


async def test_a_join_token_ends_at_its_time(world, registry):
    life = timedelta(hours=72)
    async with registry.database.transaction() as session:
        _, token = await auth.issue(
            session, TokenKind.JOIN, now=NOW, server_id=world.server, expires_at=NOW + life
        )
    await authenticated(registry, token, NOW + life - timedelta(seconds=1))
    with pytest.raises(TokenExpired) as caught:
        await authenticated(registry, token, NOW + life)
    assert "join-token" in caught.value.remedy


async def test_a_join_token_is_used_up_once(world, registry):
    secret = world.tokens[Role.JOIN]
    principal = await authenticated(registry, secret)
    async with registry.database.transaction() as session:
        await auth.use_up(session, principal, NOW)
    with pytest.raises(TokenUsed):
        (await authenticated(registry, secret)).may(Operation.JOIN)
    with pytest.raises(TokenUsed):
        async with registry.database.transaction() as session:
            await auth.use_up(session, principal, NOW)


async def test_no_token_of_a_program_is_made_to_last_for_ever(world, registry, client):
    now = datetime.now(UTC)
    async with registry.database.transaction() as session:
        _, operator = await members.create_operator(session, now)
    async with client(operator) as http:
        assert (await http.post("/v1/members", json={"name": "New"})).json()["token"]
    async with registry.database.transaction() as session:
        made = select(Token.expires_at).where(Token.label == "first token", Token.created_at >= now)
        ends = list(await session.scalars(made))
    assert len(ends) == 2
    assert all(end is not None and end <= datetime.now(UTC) + auth.TOKEN_LIFE for end in ends)


async def test_an_expired_join_token_is_told_from_a_used_one_by_the_api(world, registry, client):
    async with registry.database.transaction() as session:
        await session.execute(update(Token).where(Token.kind == TokenKind.JOIN).values(expires_at=NOW))
    async with client(world.tokens[Role.JOIN]) as http:
        answer = await http.post("/v1/agent/join", json={"public_key": KEY})
    assert (answer.status_code, answer.json()["code"]) == (401, "token-expired")
    assert "join-token" in answer.json()["remedy"]


async def test_joining_twice_with_one_token_is_refused_and_leaves_the_first_agent_in_place(
    world, registry, client
):
    async with client(world.tokens[Role.JOIN]) as http:
        first = await http.post("/v1/agent/join", json={"public_key": KEY})
        other = base64.b64encode(b"\x01" * 32).decode()
        second = await http.post("/v1/agent/join", json={"public_key": other})
    assert first.status_code == 200
    assert (second.status_code, second.json()["code"]) == (401, "token-used")
    assert (await registry.get(world.server)).agent_key == KEY
    async with client(first.json()["token"]) as http:
        assert (await http.post("/v1/agent/sync", json={"engine": "e"})).status_code == 200


async def test_joining_ends_the_tokens_of_agents_before(world, client):
    async with client(world.tokens[Role.JOIN]) as http:
        await http.post("/v1/agent/join", json={"public_key": KEY})
    async with client(world.tokens[Role.AGENT]) as http:
        answer = await http.post("/v1/agent/sync", json={"engine": "e"})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")


async def test_a_new_join_token_ends_the_one_before(world, client):
    async with client(world.tokens[Role.OWNER]) as http:
        new = await http.post("/v1/servers/alice/join-token")
    async with client(world.tokens[Role.JOIN]) as http:
        old = await http.post("/v1/agent/join", json={"public_key": KEY})
    assert (old.status_code, old.json()["code"]) == (401, "unauthenticated")
    async with client(new.json()["join_token"]) as http:
        assert (await http.post("/v1/agent/join", json={"public_key": KEY})).status_code == 200


async def test_a_revoked_token_opens_nothing(world, registry):
    async with registry.database.transaction() as session:
        ended = await auth.revoke(
            session, NOW, Token.server_id == world.server, Token.kind == TokenKind.AGENT
        )
        assert ended == 1
    with pytest.raises(Unauthenticated, match="revoked"):
        await authenticated(registry, world.tokens[Role.AGENT])
    await authenticated(registry, world.tokens[Role.JOIN])


@pytest.mark.parametrize("secret", [None, "", "x", "tc_agent_" + "A" * 43, "\x00", "é" * 10_000])
async def test_what_is_no_token_is_refused(registry, secret):
    with pytest.raises(Unauthenticated):
        await authenticated(registry, secret)


async def test_no_token_is_in_the_database(world, registry):
    """Every value of every table is searched for the secrets' texts."""
    async with registry.database.transaction() as session:
        found = [await session.execute(select(table)) for table in Base.metadata.sorted_tables]
        dump = "\n".join(repr(row) for result in found for row in result.all())
        hashes = list(await session.scalars(select(Token.sha256)))
    assert "alice" in dump
    secrets = [*world.tokens.values(), world.foreign]
    for secret in secrets:
        assert secret not in dump
        assert secret.split("_", 2)[2] not in dump
    assert len(set(secrets)) == len(secrets) <= len(hashes)
