"""Signing in with providers of OpenID Connect: a real one, and one that lies in every way."""

import asyncio
import base64
import hmac
import json
import ssl
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, OctKey
from sqlalchemy import select

from lab.certificates import Authority
from lab.oidc_provider import OidcProvider, has_node
from lab.processes import free_port
from lab.web import WebServer, http
from poolsvc import sign_in
from poolsvc.app import create_app
from poolsvc.config import OidcSettings, SignUp
from poolsvc.derived import RegistryKey
from poolsvc.errors import ProviderFailed, SignInInvalid
from poolsvc.models import Identity, Member, SignIn, StaffRole, Token, User
from poolsvc.notices import NoticeKind
from poolsvc.oidc import Claims, Detour, Provider

KEY = RegistryKey(bytes(32))
CALLBACK = "http://127.0.0.1:8080/sign-in/oidc"
ANN = "ann@example.org"
WISH = {"name": "Ann", "member": {"name": "Ann's clocks"}}
BEGIN = "/v1/oidc/lab/begin"
ACCOUNTS = {
    "s-ann": {"email": ANN, "email_verified": True, "name": "Ann"},
    "s-ben": {"email": "ben@example.org", "email_verified": False},
    "s-cat": {},
    "s-dan": {"email": "dan@example.org", "email_verified": True},
}


def now():
    return datetime.now(UTC)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not has_node():
        pytest.skip("node is not installed")
    with OidcProvider(tmp_path_factory.mktemp("oidc"), redirect_uri=CALLBACK, accounts=ACCOUNTS) as provider:
        yield provider


def with_provider(settings, tmp_path, issuer, ca_file, client_id, secret, name="lab"):
    file = tmp_path / f"{name}.secret"
    file.write_text(secret + "\n")
    entry = OidcSettings(
        name=name, issuer=issuer, client_id=client_id, client_secret_file=file, ca_file=ca_file
    )
    return settings.model_copy(update={"oidc": (*settings.oidc, entry), "sign_up": SignUp.OPEN})


class Visitor:
    """Somebody with a browser, between the registry and the real provider."""

    def __init__(self, client, real, app):
        self.client, self.real, self.app = client, real, app

    async def begin(self, token=None, wish=None):
        async with self.client(token, app=self.app) as http:
            if token is None:
                answer = await http.post(BEGIN, json={"sign_up": wish})
            else:
                answer = await http.post("/v1/me/identities", json={"provider": "lab"})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def back(self, begun, account):
        parameters = await asyncio.to_thread(self.real.visit, begun["url"], account)
        return {**parameters, "binding": begun["binding"]}

    async def finish(self, body, token=None):
        path = "/v1/oidc/finish" if token is None else "/v1/me/identities/finish"
        async with self.client(token, app=self.app) as http:
            return await http.post(path, json=body)

    async def sign_in(self, account, wish=None):
        return await self.finish(await self.back(await self.begin(wish=wish), account))

    async def link(self, account, token):
        return await self.finish(await self.back(await self.begin(token), account), token)


@pytest.fixture
def visitor(client, real, database, settings, tmp_path):
    changed = with_provider(settings, tmp_path, real.issuer, real.ca_file, real.client_id, real.client_secret)
    return Visitor(client, real, create_app(changed, database, [], KEY))


class TestRealProvider:
    async def test_a_newcomer_gets_the_account_that_they_wished_for_and_signs_in_with_it(
        self, visitor, people
    ):
        made = await visitor.sign_in("s-ann", WISH)
        assert made.status_code == 200, made.text
        account = made.json()["account"]
        assert (account["email"], account["name"]) == (ANN, "Ann")
        again = await visitor.sign_in("s-ann")
        assert again.json()["account"]["id"] == account["id"]
        assert again.json()["token"] != made.json()["token"]
        (user,) = await people.all(User)
        assert user.confirmed_at is not None
        assert [row.name for row in await people.all(Member)] == ["Ann's clocks"]
        async with visitor.client(made.json()["token"], app=visitor.app) as http:
            shown = (await http.get("/v1/me/identities")).json()["items"]
            assert [(row["issuer"], row["subject"]) for row in shown] == [(visitor.real.issuer, "s-ann")]
            assert [row["name"] for row in (await http.get("/v1/oidc")).json()] == ["lab"]

    @pytest.mark.parametrize("account", ["s-ben", "s-cat"])
    async def test_an_address_that_the_provider_did_not_verify_is_none(self, visitor, people, account):
        await people.make("ben@example.org")
        made = await visitor.sign_in(account, WISH)
        assert made.json()["account"]["email"] is None
        assert [row.email for row in await people.all(User)] == ["ben@example.org", None]

    async def test_who_has_no_account_and_wishes_for_none_gets_none(self, visitor, people):
        answer = await visitor.sign_in("s-cat")
        assert (answer.status_code, answer.json()["code"]) == (403, "sign-up-needed")
        assert "POST /v1/oidc" in answer.json()["remedy"]
        assert await people.count(User) == 0

    async def test_a_confirmed_address_links_and_its_person_is_told(self, visitor, people):
        user = await people.make()
        refused = await visitor.sign_in("s-ann")
        assert (refused.status_code, refused.json()["code"]) == (409, "identity-taken")
        async with people.database.transaction() as session:
            (await session.get_one(User, user.id)).confirmed_at = now()
        linked = await visitor.sign_in("s-ann", WISH)
        assert linked.json()["account"]["id"] == user.id
        assert await people.count(Member) == 0
        assert [(mail.kind, mail.to, mail.what) for mail in await people.mails()] == [
            (NoticeKind.IDENTITY_CHANGED, user.id, "identity-linked")
        ]

    async def test_staff_are_never_found_by_their_address(self, visitor, people):
        user = await people.make(staff=StaffRole.SUPPORT)
        async with people.database.transaction() as session:
            (await session.get_one(User, user.id)).confirmed_at = now()
        answer = await visitor.sign_in("s-ann", WISH)
        assert (answer.status_code, answer.json()["code"]) == (409, "identity-taken")
        assert await people.count(Identity) == await people.count(Token) == 0

    async def test_who_is_signed_in_links_and_unlinks(self, visitor, people):
        user = await people.make("other@example.org", staff=StaffRole.OPERATOR)
        token = await people.session(user)
        linked = await visitor.link("s-dan", token)
        assert [row["subject"] for row in linked.json()["items"]] == ["s-dan"]
        assert (await visitor.sign_in("s-dan")).json()["account"]["id"] == user.id
        async with visitor.client(token, app=visitor.app) as http:
            path = f"/v1/me/identities/{linked.json()['items'][0]['id']}"
            assert (await http.delete(path)).status_code == 204
            assert (await http.delete(path)).status_code == 404
            assert (await http.get("/v1/me/identities")).json()["items"] == []
        assert (await visitor.sign_in("s-dan")).json()["code"] == "sign-up-needed"
        assert [mail.what for mail in await people.mails()] == ["identity-linked", "identity-unlinked"]

    async def test_an_identity_is_one_accounts_and_the_last_way_in_stays(self, visitor, people):
        made = (await visitor.sign_in("s-cat", WISH)).json()
        stranger = await people.session(await people.make("other@example.org"))
        answer = await visitor.link("s-cat", stranger)
        assert (answer.status_code, answer.json()["code"]) == (409, "identity-taken")
        async with visitor.client(made["token"], app=visitor.app) as http:
            (own,) = (await http.get("/v1/me/identities")).json()["items"]
            answer = await http.delete(f"/v1/me/identities/{own['id']}")
        assert (answer.status_code, answer.json()["code"]) == (409, "identity-taken")

    async def test_a_blocked_person_does_not_get_in(self, visitor, people):
        await visitor.sign_in("s-cat", WISH)
        async with people.database.transaction() as session:
            (await session.scalars(select(User))).one().blocked_at = now()
        answer = await visitor.sign_in("s-cat")
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")

    async def test_a_way_back_is_good_once_for_who_began_and_for_what_they_began(self, visitor, people):
        token = await people.session(await people.make("other@example.org"))
        body = await visitor.back(await visitor.begin(wish=WISH), "s-cat")
        other = await visitor.begin(wish=WISH)
        # In another browser, for an account that did not ask, with another state, or for a made-up provider.
        for change in (
            {"binding": other["binding"]},
            {"state": parse_qs(urlsplit(other["url"]).query)["state"][0]},
            {"iss": "https://evil.example"},
        ):
            answer = await visitor.finish({**body, **change})
            assert (answer.status_code, answer.json()["code"]) == (401, "sign-in-invalid")
        assert (await visitor.finish(body, token)).status_code == 401
        body = await visitor.back(await visitor.begin(wish=WISH), "s-cat")
        assert (await visitor.finish(body)).status_code == 200
        assert (await visitor.finish(body)).status_code == 401

    async def test_a_detour_that_began_for_an_account_ends_there_only(self, visitor, people):
        """Otherwise somebody could make another person link theirs to an account that is not theirs."""
        ann, ben = [await people.session(await people.make(f"{name}@example.net")) for name in "ab"]
        body = await visitor.back(await visitor.begin(ann), "s-cat")
        for token in (ben, None):
            answer = await visitor.finish(body, token)
            assert (answer.status_code, answer.json()["code"]) == (401, "sign-in-invalid")
        assert (await visitor.finish(body, ann)).status_code == 200

    async def test_one_that_took_too_long_is_over(self, visitor, people):
        body = await visitor.back(await visitor.begin(wish=WISH), "s-cat")
        await people.age(SignIn, sign_in.LIFE)
        assert (await visitor.finish(body)).status_code == 401

    async def test_a_code_that_the_provider_does_not_know_is_the_callers_fault(self, visitor):
        body = await visitor.back(await visitor.begin(wish=WISH), "s-cat")
        answer = await visitor.finish({**body, "code": "x" * 43})
        assert (answer.status_code, answer.json()["code"]) == (401, "sign-in-invalid")


class Liar:
    """A provider whose documents and tokens a test can change."""

    def __init__(self, tls):
        self.port = free_port()
        self.server = WebServer(self._serve, port=self.port, tls=tls)
        self.issuer = f"https://localhost:{self.port}"
        self.key = ECKey.generate_key("P-256", {"kid": "k1", "use": "sig", "alg": "ES256"})
        self.jwks = json.dumps(KeySet([self.key]).as_dict(private=False)).encode()
        self.metadata = {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/keys",
            "userinfo_endpoint": f"{self.issuer}/userinfo",
        }
        self.userinfo = {"sub": "s-ann"}
        self.status = "200 OK"
        self.id_token = ""

    def claims(self, **changes):
        at = int(now().timestamp())
        claims = {
            "iss": self.issuer,
            "sub": "s-ann",
            "aud": "us",
            "iat": at,
            "exp": at + 300,
            "nonce": DETOUR.nonce,
            "email": ANN,
            "email_verified": True,
        } | changes
        return {name: value for name, value in claims.items() if value is not None}

    def sign(self, key=None, *, alg="ES256", kid="k1", **changes):
        header = {"alg": alg} | ({} if kid is None else {"kid": kid})
        self.id_token = jwt.encode(header, self.claims(**changes), key or self.key, [alg])

    async def _serve(self, _reader, writer):
        path = self.server.heads[-1].split(" ", 2)[1]
        documents = {
            "/.well-known/openid-configuration": lambda: json.dumps(self.metadata).encode(),
            "/keys": lambda: self.jwks,
            "/token": lambda: json.dumps({"id_token": self.id_token, "access_token": "a"}).encode(),
            "/userinfo": lambda: json.dumps(self.userinfo).encode(),
        }
        writer.write(http(self.status if path == "/token" else "200 OK", documents[path]()))
        await writer.drain()

    def asked(self, path):
        return sum(head.split(" ", 2)[1] == path for head in self.server.heads)


DETOUR = Detour.of(KEY, 1)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "ca")


@pytest.fixture
async def liar(authority):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("localhost"))
    liar = Liar(context)
    async with liar.server:
        yield liar


@pytest.fixture
def provider(liar, settings, tmp_path, authority):
    changed = with_provider(settings, tmp_path, liar.issuer, authority.root, "us", "s3cret%")
    return Provider(changed.oidc[0], changed)


async def identify(provider, *, iss=None, at=None):
    return await provider.identify(DETOUR, "code", iss, at or now())


async def refused(provider, match):
    with pytest.raises(ProviderFailed, match=match) as caught:
        await identify(provider)
    assert caught.value.status == 502
    assert "s3cret" not in caught.value.detail


async def test_what_is_asked_at_the_provider_is_what_the_standards_say(provider, liar):
    url = urlsplit(await provider.authorization_url(DETOUR, now()))
    asked = {name: values[0] for name, values in parse_qs(url.query).items()}
    assert asked.pop("code_challenge") != DETOUR.verifier
    assert asked == {
        "response_type": "code",
        "client_id": "us",
        "redirect_uri": CALLBACK,
        "scope": "openid email profile",
        "state": DETOUR.state,
        "nonce": DETOUR.nonce,
        "code_challenge_method": "S256",
    }
    liar.sign()
    assert await identify(provider) == Claims(liar.issuer, "s-ann", ANN)
    # RFC 6749 section 2.3.1: the secret is form-encoded within Basic.
    assert "Authorization: Basic dXM6czNjcmV0JTI1" in liar.server.heads[-1]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"nonce": "other"}, "nonce"),
        ({"nonce": None}, "nonce"),
        ({"aud": "them"}, "aud"),
        ({"aud": ["them"]}, "aud"),
        ({"aud": ["us", "them"], "azp": "them"}, "azp"),
        ({"aud": ["us", "them"]}, "azp"),
        ({"azp": "them"}, "azp"),
        ({"iss": "https://evil.example"}, "iss"),
        ({"iss": None}, "iss"),
        ({"exp": 1}, "expired"),
        ({"exp": None}, "exp"),
        ({"exp": "soon"}, "exp"),
        ({"iat": 2**40}, "issued in the future"),
        ({"iat": None}, "iat"),
        ({"nbf": 2**40}, "not yet valid"),
        ({"at_hash": "AAAA"}, "at_hash"),
        ({"sub": None}, "sub"),
        ({"sub": ""}, "sub|nobody"),
        ({"sub": 7}, "sub"),
        ({"sub": "x" * 256}, "nobody"),
        ({"sub": "a\x00b"}, "nobody"),
        ({"sub": ["s-ann"]}, "sub"),
    ],
)
async def test_claims_that_are_not_for_us_now_are_not_believed(provider, liar, changes, match):
    liar.sign(**changes)
    await refused(provider, match)


async def test_an_unsigned_token_is_not_believed(provider, liar):
    liar.sign()
    body = liar.id_token.split(".")[1]
    liar.id_token = f"eyJhbGciOiJub25lIn0.{body}."
    await refused(provider, "id_token is not valid")


async def test_a_token_signed_with_the_clients_secret_is_not_believed(provider, liar):
    liar.sign(OctKey.import_key("s3cret%" * 5), alg="HS256", kid=None)
    await refused(provider, "id_token is not valid")


async def test_a_public_key_is_no_shared_secret(provider, liar):
    # By hand: the library does not sign so.
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"k1"}').decode().rstrip("=")
    liar.sign()
    signed = f"{head}.{liar.id_token.split('.')[1]}"
    tag = hmac.digest(liar.key.as_pem(private=False), signed.encode(), "sha256")
    liar.id_token = f"{signed}.{base64.urlsafe_b64encode(tag).decode().rstrip('=')}"
    await refused(provider, "id_token is not valid")


async def test_a_token_of_another_key_is_not_believed(provider, liar):
    liar.sign(ECKey.generate_key("P-256"))
    await refused(provider, "id_token is not valid")


@pytest.mark.parametrize("text", ["", ".", "a.b.c", "x" * 10_000, "..", "é", "a.b.c.d.e"])
async def test_what_is_no_token_is_not_believed(provider, liar, text):
    liar.id_token = text
    await refused(provider, "id_token")


async def test_a_new_key_is_fetched_once_and_a_made_up_one_does_not_make_us_ask_again(provider, liar):
    start = now()
    liar.sign()
    await identify(provider, at=start)
    assert liar.asked("/keys") == 1
    liar.key = ECKey.generate_key("P-256", {"kid": "k2"})
    liar.jwks = json.dumps(KeySet([liar.key]).as_dict(private=False)).encode()
    liar.sign(kid="k2")
    assert (await identify(provider, at=start + timedelta(seconds=20))).subject == "s-ann"
    assert liar.asked("/keys") == 2
    liar.sign(kid="k3")
    for _ in range(5):
        with pytest.raises(ProviderFailed, match="k3"):
            await identify(provider, at=start + timedelta(seconds=25))
    assert liar.asked("/keys") == 2


async def test_documents_are_kept_for_an_hour(provider, liar):
    start = now()
    for minutes, fetched in ((0, 1), (59, 1), (61, 2)):
        await provider.authorization_url(DETOUR, start + timedelta(minutes=minutes))
        assert liar.asked("/.well-known/openid-configuration") == fetched


async def test_many_who_begin_at_once_make_one_request(provider, liar):
    await asyncio.gather(*(provider.authorization_url(DETOUR, now()) for _ in range(20)))
    assert liar.asked("/.well-known/openid-configuration") == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"issuer": "https://evil.example"}, "another issuer"),
        ({"issuer": None}, "issuer"),
        ({"authorization_endpoint": "javascript:alert(1)"}, "authorization_endpoint"),
        ({"token_endpoint": "http://localhost/token"}, "token_endpoint"),
        ({"jwks_uri": 7}, "jwks_uri"),
        ({"jwks_uri": "https://localhost:1/keys"}, "no HTTP answer"),
    ],
)
async def test_a_discovery_document_that_cannot_be_followed_is_refused(provider, liar, change, match):
    liar.metadata |= change
    await refused(provider, match)


@pytest.mark.parametrize(
    ("jwks", "match"),
    [
        (b'{"keys": [' + b" " * 300_000 + b"]}", "octets"),
        (b"[]", "documents"),
        (b"\xff\xfe", "documents"),
        (b'{"keys": 7}', "keys"),
        (b'{"keys": [7]}', "keys"),
        (b"[" * 100_000, "documents"),
        (b'{"keys": []}', "id_token"),
        (b'{"keys": [{"kty": "EC", "kid": "k1", "crv": "P-256", "x": "AA", "y": 7}]}', "id_token"),
        (b'{"keys": [{"kty": "RSA", "kid": "k1", "n": "", "e": ""}, {"kty": ["x"]}]}', "id_token"),
        (b'{"keys": [{"kty": "oct", "kid": "k1", "k": "AAAA"}]}', "id_token"),
    ],
)
async def test_keys_that_are_none_are_refused(provider, liar, jwks, match):
    liar.sign()
    liar.jwks = jwks
    await refused(provider, match)


async def test_a_provider_that_is_away_is_asked_again_after_ten_seconds(provider, liar):
    start = now()
    good, liar.metadata = liar.metadata, {}
    for seconds in (0, 1, 9):
        with pytest.raises(ProviderFailed):
            await provider.authorization_url(DETOUR, start + timedelta(seconds=seconds))
    assert liar.asked("/.well-known/openid-configuration") == 1
    liar.metadata = good
    assert await provider.authorization_url(DETOUR, start + timedelta(seconds=11))


@pytest.mark.parametrize(
    ("userinfo", "email"),
    [
        ({"sub": "s-ann", "email": ANN, "email_verified": True}, ANN),
        ({"sub": "s-ann", "email": ANN, "email_verified": "true"}, None),
        ({"sub": "s-ann", "email": ANN}, None),
        ({"sub": "s-ann"}, None),
    ],
)
async def test_the_address_may_come_from_userinfo_if_it_is_verified(provider, liar, userinfo, email):
    liar.sign(email=None, email_verified=None)
    liar.userinfo = userinfo
    assert (await identify(provider)).email == email


@pytest.mark.parametrize("userinfo", [{"sub": "s-ben", "email": ANN, "email_verified": True}, {}, [], 7])
async def test_userinfo_of_somebody_else_is_not_believed(provider, liar, userinfo):
    liar.sign(email=None)
    liar.userinfo = userinfo
    await refused(provider, "userinfo")


async def test_an_address_that_is_none_makes_no_account(
    client, liar, authority, settings, tmp_path, database
):
    changed = with_provider(settings, tmp_path, liar.issuer, authority.root, "us", "x")
    async with client(app=create_app(changed, database, [], KEY)) as http:
        begun = (await http.post(BEGIN, json={"sign_up": WISH})).json()
        asked = parse_qs(urlsplit(begun["url"]).query)
        liar.sign(nonce=asked["nonce"][0], email="not an address")
        body = {"state": asked["state"][0], "binding": begun["binding"], "code": "x"}
        answer = await http.post("/v1/oidc/finish", json=body)
    assert (answer.status_code, answer.json()["code"]) == (502, "provider-failed")


@pytest.mark.parametrize(("status", "error"), [("500 Oops", ProviderFailed), ("302 Found", ProviderFailed)])
async def test_a_token_endpoint_that_fails_is_the_providers_fault(provider, liar, status, error):
    liar.status = status
    with pytest.raises(error, match="token endpoint"):
        await identify(provider)


async def test_the_answers_issuer_is_asked_for_where_the_provider_says_it(provider, liar):
    liar.sign()
    liar.metadata["authorization_response_iss_parameter_supported"] = True
    with pytest.raises(SignInInvalid):
        await identify(provider)
    assert (await identify(provider, iss=liar.issuer)).subject == "s-ann"


async def test_a_state_of_one_provider_is_never_taken_to_another(
    client, real, liar, authority, settings, tmp_path, database, people
):
    """The mix-up: a provider that lies gets a code that is another's, and wants it to be redeemed."""
    both = with_provider(settings, tmp_path, real.issuer, real.ca_file, real.client_id, real.client_secret)
    both = with_provider(both, tmp_path, liar.issuer, authority.root, "us", "x", name="liar")
    visitor = Visitor(client, real, create_app(both, database, [], KEY))
    async with client(app=visitor.app) as http:
        begun = (await http.post("/v1/oidc/liar/begin", json={"sign_up": WISH})).json()
    asked = parse_qs(urlsplit(begun["url"]).query)
    honest = await visitor.back(await visitor.begin(wish=WISH), "s-ann")
    body = {"state": asked["state"][0], "binding": begun["binding"], "code": honest["code"]}
    # With the honest provider's name beside the code it stops before the code is sent anywhere.
    assert (await visitor.finish({**body, "iss": honest["iss"]})).status_code == 401
    assert liar.asked("/token") == 0
    assert await people.count(User) == 0


async def test_a_provider_that_nobody_named_is_not_there(client):
    async with client() as http:
        assert (await http.get("/v1/oidc")).json() == []
        answer = await http.post("/v1/oidc/nobody/begin", json={})
    assert (answer.status_code, answer.json()["code"]) == (404, "not-found")


@pytest.mark.parametrize(
    "body",
    [
        {"state": "", "code": "x", "binding": "x"},
        {"state": "1.x", "code": "x", "binding": "é"},
        {"state": KEY.token("oidc-state", 5), "code": "x", "binding": "x"},
        {"state": Detour.of(KEY, 5).state, "code": "x", "binding": Detour.of(KEY, 5).binding},
    ],
)
async def test_a_way_back_that_nobody_went_is_refused(client, body):
    async with client() as http:
        answer = await http.post("/v1/oidc/finish", json=body)
    assert (answer.status_code, answer.json()["code"]) == (401, "sign-in-invalid")
