"""What the laboratory's CAs do and Debian 12's Pebble does not: the other proofs stand on it."""

import asyncio
import base64
import contextlib
import dataclasses
import datetime as dt
import secrets
import socket
import ssl

import dns.rcode
import httpx
import pytest
from cryptography import x509

from lab import caa as caa_rule
from lab.ca_front import Limit, Limits, Resource
from lab.pebble import PROFILES
from lab.peers import PEBBLE_SID
from nts_core.acme import AcmeAccount, AcmeError, Challenge, OrderState, RevocationReason, read_terms
from nts_core.certificates import chain_facts
from nts_core.control import ACME_PATH
from nts_core.tls import new_key_and_csr

NAME, ANOTHER = "alice.servers.pool.example", "bob.servers.pool.example"
ISSUER = caa_rule.Issuer("ca.example", "https://ca.example/account/1", "http-01")
OURS = '0 issue "ca.example; accounturi=https://ca.example/account/1; validationmethods=dns-01,http-01"'
CLOSED = '0 issue ";"'
SERVFAIL, NXDOMAIN = dns.rcode.SERVFAIL, dns.rcode.NXDOMAIN

needs_newer_pebble = pytest.mark.skipif(
    not PEBBLE_SID.is_there(), reason=f"{PEBBLE_SID} has left the archive; see lab/newer_peers.py"
)


@pytest.fixture
def newer(lab):
    """`newer(**options)`: Debian sid's Pebble."""
    return lambda **options: lab.pebble(newer=True, **options)


async def issued(lab, account):
    """A chain by HTTP-01."""
    csr = new_key_and_csr(NAME)[1]
    order = await account.order(csr, NAME)
    if order.token is not None:
        lab.responder.publish(NAME, ACME_PATH + order.token, order.key_authorization.encode())
        await account.answer(order.challenge_url)
    async with asyncio.timeout(20):
        while (status := (await account.poll(order.url)).status) is not OrderState.VALID:
            assert status is not OrderState.INVALID
            if status is OrderState.READY:
                await account.finalize(order.url, csr)
            await asyncio.sleep(0.02)
    return await account.download(order.url)


@pytest.fixture
def free_udp():
    """A resolver that never answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        yield silent.getsockname()


@needs_newer_pebble
@pytest.mark.parametrize("profile", PROFILES)
async def test_the_newer_pebble_has_profiles_with_their_lives(lab, newer, profile):
    pebble = newer(profiles=PROFILES, nonce_reject=0)
    config = dataclasses.replace(lab.config(pebble), profile=profile)
    assert set((await read_terms(config)).profiles) == set(PROFILES)
    with contextlib.closing(await AcmeAccount.open(config)) as account:
        facts = chain_facts(await issued(lab, account))
    assert abs((facts.not_after - facts.not_before).total_seconds() - PROFILES[profile]) < 60


@needs_newer_pebble
async def test_a_profile_that_the_ca_has_not_is_not_asked_for(lab, newer):
    config = dataclasses.replace(lab.config(newer(profiles=PROFILES, nonce_reject=0)), profile="weekly")
    with contextlib.closing(await AcmeAccount.open(config)) as account:
        pending = await account.order(new_key_and_csr(NAME)[1], NAME)
    assert pending.profile is None


@needs_newer_pebble
async def test_the_newer_pebble_says_when_to_renew_and_is_told_otherwise(lab, newer):
    pebble = newer(nonce_reject=0)
    chain = await issued(lab, await lab.account(pebble))
    leaf = x509.load_pem_x509_certificate(chain.encode())
    authority = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    serial = leaf.serial_number.to_bytes(leaf.serial_number.bit_length() // 8 + 1, "big")
    identifier = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (authority, serial))
    tls = ssl.create_default_context(cafile=str(pebble.ca_file))
    async with httpx.AsyncClient(verify=tls, trust_env=False) as client:
        directory = (await client.get(pebble.directory_url)).json()

        async def window():
            answer = await client.get(f"{directory['renewalInfo']}/{identifier}")
            assert int(answer.headers["Retry-After"]) > 0
            return {
                name: dt.datetime.fromisoformat(moment)
                for name, moment in answer.json()["suggestedWindow"].items()
            }

        suggested = await window()
        assert leaf.not_valid_before_utc < suggested["start"] < suggested["end"] < leaf.not_valid_after_utc
        start = dt.datetime.now(dt.UTC).replace(microsecond=0) - dt.timedelta(hours=2)
        pebble.set_renewal_window(chain, start, start + dt.timedelta(hours=1))
        assert await window() == {"start": start, "end": start + dt.timedelta(hours=1)}


@pytest.mark.parametrize("release", ["bookworm", pytest.param("sid", marks=needs_newer_pebble)])
async def test_an_account_needs_a_binding_where_there_are_keys_for_it(lab, release):
    keys = {"pool": secrets.token_bytes(32)}
    pebble = lab.pebble(newer=release == "sid", binding_keys=keys, nonce_reject=0)
    assert (await read_terms(lab.config(pebble))).account_binding
    with pytest.raises(AcmeError) as caught:
        await lab.account(pebble)
    assert (caught.value.code, caught.value.permanent) == ("externalAccountRequired", True)


@pytest.mark.parametrize(
    ("own", "parent", "why"),
    [
        (None, None, None),
        (NXDOMAIN, None, None),
        (['0 iodef "mailto:a@example.org"'], [CLOSED], None),
        ([OURS], [CLOSED], None),
        ([CLOSED, OURS], [CLOSED], None),
        (['0 issue "ca.example"'], [CLOSED], None),
        (['0 issuewild ";"'], None, None),
        (None, [CLOSED], "CAA record for servers.pool.example prevents issuance"),
        (NXDOMAIN, [CLOSED], "CAA record for servers.pool.example prevents issuance"),
        ([CLOSED], None, f"CAA record for {NAME} prevents issuance"),
        (['0 issue "other.example"'], None, "prevents"),
        ([OURS.replace("account/1", "account/2")], None, "prevents"),
        ([OURS.replace("dns-01,http-01", "dns-01")], None, "prevents"),
        ([OURS.replace("; valid", "; accounturi=x; valid")], None, "prevents"),
        (['128 tomorrow "x"', OURS], None, "prevents"),
        (SERVFAIL, None, "SERVFAIL"),
        (SERVFAIL, [OURS], "SERVFAIL"),
        ([OURS], SERVFAIL, None),
    ],
)
async def test_caa_decides_as_at_a_real_ca(resolver, caa, own, parent, why):
    caa |= {f"{NAME}.": own} if own is not None else {}
    caa |= {"servers.pool.example.": parent} if parent is not None else {}
    address, _, port = resolver.rpartition(":")
    found = await caa_rule.refusal((address, int(port)), NAME, ISSUER)
    assert (found is None) if why is None else (why in found)


async def test_a_resolver_that_is_silent_refuses(free_udp):
    assert "no answer" in await caa_rule.refusal(free_udp, NAME, ISSUER)


async def test_the_front_refuses_a_challenge_by_caa_and_says_why(lab, caa):
    front = lab.front(lab.pebble(nonce_reject=0))
    account = await lab.account(front)
    caa[f"{NAME}."] = [f'0 issue "ca.example; accounturi={account.uri}; validationmethods=http-01"']
    assert chain_facts(await issued(lab, account))
    caa[f"{ANOTHER}."] = ['0 issue "ca.example; accounturi=https://ca.example/another"']
    order = await account.order(new_key_and_csr(ANOTHER)[1], ANOTHER)
    await account.answer(order.challenge_url)
    status = await account.poll(order.url)
    assert status.status is OrderState.INVALID
    assert status.error_detail == f"caa: CAA record for {ANOTHER} prevents issuance"
    assert account.uri.startswith(front.directory_url.removesuffix("/dir"))


@pytest.mark.parametrize(
    ("methods", "lets"), [("http-01", False), ("dns-01", True), ("http-01,dns-01", True)]
)
async def test_the_front_looks_by_which_method_control_is_proved(lab, caa, txt, methods, lets):
    account = await lab.account(lab.front(lab.pebble(nonce_reject=0)))
    caa[f"{NAME}."] = [f'0 issue "ca.example; accounturi={account.uri}; validationmethods={methods}"']
    order = await account.authorize(NAME, Challenge.DNS_01)
    txt[f"_acme-challenge.{NAME}."] = [order.txt]
    await account.answer(order.challenge_url)
    status = await lab.decided(account, order.url)
    assert status.status is (OrderState.READY if lets else OrderState.INVALID)
    assert ("caa: " in (status.error_detail or "")) is not lets


async def test_the_front_looks_at_caa_again_for_an_authorization_of_before(lab, caa):
    """What a deactivated authorization and a CAA lock are both needed for: Pebble alone issues."""
    pebble = lab.pebble(nonce_reject=0, authz_reuse=100)
    account = await lab.account(lab.front(pebble))
    await issued(lab, account)
    caa["servers.pool.example."] = [CLOSED]
    csr = new_key_and_csr(NAME)[1]
    order = await account.order(csr, NAME)
    assert order.token is None, "the authorization is valid still"
    with pytest.raises(AcmeError) as caught:
        await account.finalize(order.url, csr)
    assert caught.value.code == "caa"
    assert "servers.pool.example prevents issuance" in caught.value.detail
    caa["servers.pool.example."] = [OURS.replace("https://ca.example/account/1", account.uri)]
    await account.finalize(order.url, csr)


@pytest.mark.parametrize("fronted", [True, False])
async def test_the_front_lets_an_account_revoke_by_its_authorizations_and_pebble_does_not(lab, fronted):
    pebble = lab.pebble(nonce_reject=0)
    ca = lab.front(pebble) if fronted else pebble
    owner, other = [
        await AcmeAccount.open(dataclasses.replace(lab.config(ca), account_key_file=lab.directory / name))
        for name in ("owner.pem", "other.pem")
    ]
    lab.callback(owner.close)
    lab.callback(other.close)
    chain = await issued(lab, owner)
    serial = chain_facts(chain).serial

    async def refused():
        with pytest.raises(AcmeError) as caught:
            await other.revoke(chain, RevocationReason.CESSATION_OF_OPERATION)
        assert (caught.value.code, ca.certificate_status(serial)) == ("unauthorized", "Valid")

    await refused()
    order = await other.authorize(NAME, Challenge.HTTP_01)
    await refused()
    lab.responder.publish(NAME, ACME_PATH + order.token, order.key_authorization.encode())
    await other.answer(order.challenge_url)
    assert (await lab.decided(other, order.url)).status is OrderState.READY
    if not fronted:
        await refused()
        return
    for _ in range(2):  # the second time it is revoked already
        await other.revoke(chain, RevocationReason.CESSATION_OF_OPERATION)
    assert ca.certificate_status(serial) == "Revoked"
    await other.deactivate_authorization(order.authorization_url)
    with pytest.raises(AcmeError) as caught:
        await other.revoke(chain, RevocationReason.CESSATION_OF_OPERATION)
    assert caught.value.code == "unauthorized"


LIMITS = Limits(domain=Limit(2, 1000), name=Limit(2, 5000), orders=Limit(5, 10), failures=Limit(1, 300))


async def limited(account, name=NAME):
    with pytest.raises(AcmeError) as caught:
        await account.order(new_key_and_csr(name)[1], name)
    assert (caught.value.code, caught.value.permanent) == ("rate-limited", False)
    return caught.value


@pytest.mark.parametrize("dates", [False, True])
async def test_the_front_limits_new_names_and_renewals_of_one_name(lab, dates):
    now = [dt.datetime.now(dt.UTC).timestamp()]
    front = lab.front(lab.pebble(nonce_reject=0), limits=LIMITS, dates=dates, clock=lambda: now[0])
    account = await lab.account(front)
    await issued(lab, account)
    await issued(lab, account)
    error = await limited(account)
    assert "this exact set of names" in error.detail
    assert 4900 < error.retry_after <= 5001, "a date has whole seconds"
    now[0] += 5001
    await account.order(new_key_and_csr(NAME)[1], NAME)


async def test_the_front_limits_a_domain_and_gives_back_with_time(lab):
    now = [0.0]
    front = lab.front(
        lab.pebble(nonce_reject=0),
        limits=dataclasses.replace(LIMITS, domain=Limit(1, 1000)),
        clock=lambda: now[0],
    )
    account = await lab.account(front)
    await issued(lab, account)
    other = "bob.servers.pool.example"
    error = await limited(account, other)
    assert "already issued for pool.example" in error.detail
    assert error.retry_after == 1000
    await issued(lab, account)  # a renewal is no new certificate
    now[0] = 1000
    await account.order(new_key_and_csr(other)[1], other)


async def test_the_front_limits_orders_and_failures(lab, caa):
    now = [0.0]
    front = lab.front(lab.pebble(nonce_reject=0), limits=LIMITS, clock=lambda: now[0])
    account = await lab.account(front)
    caa["servers.pool.example."] = [CLOSED]
    order = await account.order(new_key_and_csr(NAME)[1], NAME)
    await account.answer(order.challenge_url)
    error = await limited(account)
    assert "failed authorizations for alice" in error.detail
    assert error.retry_after == 300
    for name in "bcde":
        await account.order(new_key_and_csr(f"{name}.pool.example")[1], f"{name}.pool.example")
    assert "new orders from this account" in (await limited(account, "f.pool.example")).detail
    assert front.asked[Resource.NEW_ORDER] == 7
