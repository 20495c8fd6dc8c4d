"""What the laboratory's CAs do and Debian 12's Pebble does not: the other proofs stand on it."""

import asyncio
import base64
import contextlib
import dataclasses
import datetime as dt
import secrets
import ssl

import httpx
import pytest
from cryptography import x509

from lab.pebble import PROFILES
from lab.peers import PEBBLE_SID
from nts_core.control import ACME_PATH
from nts_core.tls import new_key_and_csr
from poolsvc.acme import AcmeAccount, AcmeError, OrderState, read_terms
from poolsvc.certificates import chain_facts

NAME = "alice.servers.pool.example"

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
async def test_the_newer_pebble_refuses_a_profile_that_it_has_not(lab, newer):
    config = dataclasses.replace(lab.config(newer(profiles=PROFILES, nonce_reject=0)), profile="weekly")
    with (
        contextlib.closing(await AcmeAccount.open(config)) as account,
        pytest.raises(AcmeError) as caught,
    ):
        await account.order(new_key_and_csr(NAME)[1], NAME)
    assert (caught.value.code, caught.value.permanent) == ("invalidProfile", True)


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
