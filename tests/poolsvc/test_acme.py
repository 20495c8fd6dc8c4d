"""The registry's ACME adapter against a strict Pebble, with the agent's responder and a DNS server of ours."""

import asyncio
import base64
import contextlib
import datetime as dt
import json
import socket
import time
from dataclasses import replace

import pytest
import requests
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from urllib3.exceptions import MaxRetryError, NewConnectionError, ProtocolError

from nts_core import acme
from nts_core.acme import (
    AcmeAccount,
    AcmeConfig,
    AcmeError,
    OrderState,
    RevocationReason,
    load_account_key,
    new_account_key,
    retry_after_seconds,
    roll_account_key,
)
from nts_core.certificates import CsrError, chain_facts, check_chain, key_sha256
from nts_core.control import ACME_PATH
from nts_core.tls import new_key_and_csr

NAME = "alice.servers.pool.example"
NOW = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)


async def polled(account, url, *, until=(OrderState.READY, OrderState.VALID, OrderState.INVALID)):
    end = time.monotonic() + 20
    while (status := await account.poll(url)).status not in until:
        assert time.monotonic() < end, f"still {status}"
        await asyncio.sleep(0.02)
    return status


def make_csr(name=NAME) -> str:
    return new_key_and_csr(name)[1]


async def validated(lab, account, csr_pem):
    """An order whose challenge was answered with success."""
    order = await patient(lambda: account.order(csr_pem, NAME))
    lab.responder.publish(NAME, ACME_PATH + order.token, order.key_authorization.encode())
    await patient(lambda: account.answer(order.challenge_url))
    status = await patient(lambda: polled(account, order.url))
    assert status.status is OrderState.READY, status
    return order


async def patient(step):
    """A step as a worker does it: one that failed for nonces alone is repeated once."""
    try:
        return await step()
    except AcmeError as error:
        if error.code != "badNonce":
            raise
        return await step()


async def test_a_whole_issue_with_half_of_the_nonces_refused(lab):
    pebble = lab.pebble(nonce_reject=50, validity=5 * 86_400)
    csr = make_csr()
    account = await patient(lambda: lab.account(pebble))
    order = await validated(lab, account, csr)
    assert order.expires > dt.datetime.now(dt.UTC)
    await patient(lambda: account.finalize(order.url, csr))
    status = await patient(lambda: polled(account, order.url, until=(OrderState.VALID,)))
    assert status.error_detail is None
    chain = await patient(lambda: account.download(order.url))
    check_chain(chain, csr, NAME)
    facts = chain_facts(chain)
    assert dt.timedelta(days=4.9) < facts.not_after - facts.not_before < dt.timedelta(days=5.1)
    leaf = x509.load_pem_x509_certificate(chain.encode())
    intermediate, root = map(
        x509.load_pem_x509_certificate,
        (pebble.issuer_intermediate().encode(), pebble.issuer_roots().encode()),
    )
    leaf.verify_directly_issued_by(intermediate)
    intermediate.verify_directly_issued_by(root)
    assert pebble.certificate_status(facts.serial) == "Valid"


async def test_refused_nonces_are_tried_again_far_more_often_than_the_stock_client_does(lab):
    """At 50 % one request in 512 still fails; with the stock client's one retry 25 of 100 would."""
    pebble = lab.pebble(nonce_reject=50)
    account = await patient(lambda: lab.account(pebble))
    order = await patient(lambda: account.order(make_csr(), NAME))
    failed, before = [], pebble.process.output().count("POST /")
    for _ in range(50):
        try:
            await account.poll(order.url)
        except AcmeError as error:
            failed.append(error.code)
    assert set(failed) <= {"badNonce"}
    assert len(failed) <= 5
    assert pebble.process.output().count("POST /") - before > 130, "no nonce was refused"


def _connection():
    return urllib3.connection.HTTPSConnection("ca.example", 443)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            requests.ConnectionError(
                MaxRetryError(None, "/", NewConnectionError(_connection(), "no route (): to it"))
            ),
            "no route (): to it",
        ),
        (
            requests.ConnectionError(
                ProtocolError("Connection aborted.", ConnectionResetError(104, "Connection reset by peer"))
            ),
            "Connection reset by peer",
        ),
        (FileNotFoundError(2, "No such file or directory", "roots.pem"), "No such file or directory"),
        (requests.ReadTimeout("read timed out"), "read timed out"),
        (OSError(), "OSError"),
    ],
)
def test_what_keeps_us_from_a_ca_is_told_without_the_librarys_parts(error, words):
    with pytest.raises(AcmeError) as caught, acme._translated():
        raise error
    assert (caught.value.code, caught.value.detail) == ("unreachable", words)


async def test_every_step_goes_on_in_a_new_process_by_url(lab):
    """Each step has a new account object, and those a crash could repeat are done twice."""
    pebble, csr = lab.pebble(), make_csr()

    async def account():
        return await lab.account(pebble)

    order = await (await account()).order(csr, NAME)
    lab.responder.publish(NAME, ACME_PATH + order.token, order.key_authorization.encode())
    await (await account()).answer(order.challenge_url)
    await (await account()).answer(order.challenge_url)
    assert (await polled(await account(), order.url)).status is OrderState.READY
    await (await account()).answer(order.challenge_url)
    await (await account()).finalize(order.url, csr)
    await (await account()).finalize(order.url, csr)
    assert (await polled(await account(), order.url, until=(OrderState.VALID,))).status is OrderState.VALID
    await (await account()).finalize(order.url, csr)
    chain = await (await account()).download(order.url)
    assert chain == await (await account()).download(order.url)
    check_chain(chain, csr, NAME)


async def test_a_wrong_body_makes_the_order_invalid_with_the_cas_words(lab):
    pebble = lab.pebble()
    account = await lab.account(pebble)
    order = await account.order(make_csr(), NAME)
    wrong = f"{order.token}.{'x' * 43}"
    lab.responder.publish(NAME, ACME_PATH + order.token, wrong.encode())
    await account.answer(order.challenge_url)
    status = await polled(account, order.url)
    assert status.status is OrderState.INVALID
    assert status.error_detail.startswith("unauthorized: ")
    assert "key authorization" in status.error_detail
    with pytest.raises(AcmeError) as caught:
        await account.download(order.url)
    assert caught.value.code == "orderNotReady"


async def test_a_name_without_address_makes_the_order_invalid(lab):
    name = "alice.nowhere.example"
    csr = make_csr(name)
    account = await lab.account(lab.pebble())
    order = await account.order(csr, name)
    await account.answer(order.challenge_url)
    status = await polled(account, order.url)
    assert status.status is OrderState.INVALID
    assert name in status.error_detail


async def test_a_ca_that_is_down_is_unreachable_and_works_when_it_returns(lab):
    pebble, csr = lab.pebble(), make_csr()
    account = await lab.account(pebble)
    order = await account.order(csr, NAME)
    pebble.stop()
    for attempt in (
        account.order(csr, NAME),
        account.poll(order.url),
        AcmeAccount.open(lab.config(pebble)),
    ):
        with pytest.raises(AcmeError) as caught:
            await attempt
        assert caught.value.code == "unreachable"
        assert not caught.value.permanent
    assert not account.lost, "a CA that is away has not forgotten anybody"
    pebble.start()
    with pytest.raises(AcmeError) as caught:
        await account.poll(order.url)
    assert caught.value.code == "accountDoesNotExist", "Pebble forgets its accounts"
    account = await lab.account(pebble)
    await account.finalize((await validated(lab, account, csr)).url, csr)


@pytest.mark.parametrize("call", ["order", "answer", "poll", "finalize", "download", "revoke", "deactivate"])
async def test_a_ca_that_forgot_the_account_makes_it_lost_whatever_was_called(lab, call):
    pebble, csr = lab.pebble(), make_csr()
    account = await lab.account(pebble)
    order = await account.order(csr, NAME)
    calls = {
        "order": lambda: account.order(csr, NAME),
        "answer": lambda: account.answer(order.challenge_url),
        "poll": lambda: account.poll(order.url),
        "finalize": lambda: account.finalize(order.url, csr),
        "download": lambda: account.download(order.url),
        "revoke": lambda: account.revoke(pebble.ca_file.read_text(), RevocationReason.CESSATION_OF_OPERATION),
        "deactivate": lambda: account.deactivate_authorization(order.authorization_url),
    }
    pebble.restart()
    assert not account.lost
    with pytest.raises(AcmeError):
        await calls[call]()
    assert account.lost
    again = await lab.account(pebble)
    assert not again.lost
    assert (await again.order(csr, NAME)).token is not None
    assert account.lost, "a lost account stays lost"


async def test_a_valid_authorization_is_used_again_unless_it_was_deactivated(lab):
    pebble = lab.pebble(authz_reuse=100)
    account = await lab.account(pebble)
    first = await validated(lab, account, make_csr())
    again = await account.order(make_csr(), NAME)
    assert (again.token, again.challenge_url, again.key_authorization) == (None, None, None)
    assert again.authorization_url == first.authorization_url
    await account.deactivate_authorization(first.authorization_url)
    await account.deactivate_authorization(first.authorization_url)  # a worker may repeat any step
    fresh = await account.order(make_csr(), NAME)
    assert fresh.token is not None
    assert fresh.authorization_url != first.authorization_url
    assert (await account.poll(again.url)).status is OrderState.INVALID


async def test_an_order_whose_authorization_was_deactivated_while_pending_is_invalid(lab):
    account = await lab.account(lab.pebble())
    order = await account.order(make_csr(), NAME)
    assert (await account.poll(order.url)).status is OrderState.PENDING
    await account.deactivate_authorization(order.authorization_url)
    status = await account.poll(order.url)
    assert status.status is OrderState.INVALID
    assert status.error_detail


async def test_deactivating_what_never_was_is_success(lab):
    pebble = lab.pebble()
    account = await lab.account(pebble)
    order = await account.order(make_csr(), NAME)
    await account.deactivate_authorization(order.authorization_url[:-4] + "gone")


async def test_a_certificate_can_be_fetched_after_its_authorization_was_deactivated(lab):
    account, csr = await lab.account(lab.pebble()), make_csr()
    order = await validated(lab, account, csr)
    await account.finalize(order.url, csr)
    await polled(account, order.url, until=(OrderState.VALID,))
    await account.deactivate_authorization(order.authorization_url)
    assert (await account.poll(order.url)).status is OrderState.VALID
    check_chain(await account.download(order.url), csr, NAME)


async def test_revoking_twice_is_success_and_the_ca_says_revoked(lab):
    pebble, csr = lab.pebble(), make_csr()
    account = await lab.account(pebble)
    order = await validated(lab, account, csr)
    await account.finalize(order.url, csr)
    await polled(account, order.url, until=(OrderState.VALID,))
    chain = await account.download(order.url)
    serial = chain_facts(chain).serial
    assert pebble.certificate_status(serial) == "Valid"
    await account.revoke(chain, RevocationReason.CESSATION_OF_OPERATION)
    assert pebble.certificate_status(serial) == "Revoked"
    await account.revoke(chain, RevocationReason.CESSATION_OF_OPERATION)


async def test_a_foreign_certificate_is_not_revoked_silently(lab):
    pebble = lab.pebble()
    account = await lab.account(pebble)
    with pytest.raises(AcmeError):
        await account.revoke(pebble.ca_file.read_text(), RevocationReason.CESSATION_OF_OPERATION)


async def test_finalize_before_validation_is_refused_but_not_for_ever(lab):
    account, csr = await lab.account(lab.pebble()), make_csr()
    order = await account.order(csr, NAME)
    with pytest.raises(AcmeError) as caught:
        await account.finalize(order.url, csr)
    assert caught.value.code == "orderNotReady"
    assert caught.value.status == 403
    assert not caught.value.permanent


async def test_the_account_key_is_no_key_for_a_certificate(lab):
    account = await lab.account(lab.pebble())
    key_file = lab.directory / "keys" / "account.pem"
    key = serialization.load_pem_private_key(await asyncio.to_thread(key_file.read_bytes), None)
    csr = (
        x509.CertificateSigningRequestBuilder(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )
    with pytest.raises(CsrError, match="account at the CA"):
        await account.order(csr, NAME)
    order = await validated(lab, account, make_csr())
    with pytest.raises(CsrError, match="account at the CA"):
        await account.finalize(order.url, csr)


async def test_no_other_host_than_the_cas_is_asked(lab):
    """Whoever names a URL, a caller or the CA itself: nothing is signed for somebody else."""
    account, calls = await lab.account(lab.pebble()), []

    async def note(_reader, writer):
        calls.append(writer)
        writer.close()

    async with await asyncio.start_server(note, "127.0.0.1", 0) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
        for call in (account.poll, account.answer, account.download, account.deactivate_authorization):
            for there in (url, "https://[", "", "file:///etc/passwd"):
                with pytest.raises(AcmeError, match="not an address of this CA"):
                    await call(there)
    assert calls == []


async def test_a_key_that_others_can_read_is_refused(lab):
    config = lab.config(lab.pebble())
    (await AcmeAccount.open(config)).close()
    config.account_key_file.chmod(0o640)
    with pytest.raises(AcmeError, match="0640") as caught:
        await AcmeAccount.open(config)
    assert caught.value.code == "account-key"


def bound_only(lab):
    """A Pebble that takes only accounts which are bound to its customer kid-1; the customer's key."""
    pebble, key = lab.pebble(), base64.urlsafe_b64encode(bytes(range(32))).decode().rstrip("=")
    pebble.stop()
    file = lab.directory / "pebble" / "pebble.json"
    document = json.loads(file.read_text())
    binding = {"externalAccountBindingRequired": True, "externalAccountMACKeys": {"kid-1": key}}
    file.write_text(json.dumps({"pebble": document["pebble"] | binding}))
    return pebble.start(), key


async def test_an_account_is_bound_to_a_customer_of_the_cas(lab, tmp_path):
    pebble, key = await asyncio.to_thread(bound_only, lab)
    plain = lab.config(pebble)
    with pytest.raises(AcmeError) as caught:
        await AcmeAccount.open(plain)
    assert (caught.value.code, caught.value.permanent) == ("externalAccountRequired", True)
    file = tmp_path / "binding.key"
    config = replace(plain, binding_key_id="kid-1", binding_key_file=file)
    with pytest.raises(AcmeError, match=r"binding\.key"):
        await AcmeAccount.open(config)
    file.touch(mode=0o600)
    for wrong in ("", "no key: ü", base64.urlsafe_b64encode(bytes(32)).decode()):
        file.write_text(wrong)
        with pytest.raises(AcmeError):
            await AcmeAccount.open(config)
    file.write_text(f"{key}\n")
    account = await AcmeAccount.open(config)
    account.close()
    again = await AcmeAccount.open(config)
    again.close()
    assert again.uri == account.uri
    file.chmod(0o644)
    with pytest.raises(AcmeError, match="0644"):
        await AcmeAccount.open(config)


async def test_the_key_may_be_a_credential_of_systemds(lab, tmp_path, monkeypatch):
    """It comes before the file, whatever its mode is: systemd guards it by access lists as well."""
    config = lab.config(lab.pebble())
    (await AcmeAccount.open(config)).close()
    credential = tmp_path / config.account_key_file.name
    credential.write_bytes(new_account_key())
    credential.chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    account = await AcmeAccount.open(config)
    account.close()
    assert account._network.key_sha256 == key_sha256(load_account_key(config.account_key_file).public_key())
    with pytest.raises(AcmeError, match="cannot be replaced"):
        await roll_account_key(config)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    other = await AcmeAccount.open(config)
    other.close()
    assert other.uri != account.uri


async def test_calls_that_wait_when_the_account_is_closed_end_in_an_error(lab):
    pebble = lab.pebble()
    account = await AcmeAccount.open(lab.config(pebble))
    url = pebble.directory_url.replace("dir", "my-order/1")
    calls = [asyncio.create_task(account.poll(url)) for _ in range(5)]
    await asyncio.sleep(0)
    account.close()
    with pytest.raises(AcmeError, match="closed"):
        await account.poll(url)
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, AcmeError)


async def test_the_account_is_found_again_by_its_key(lab):
    pebble = lab.pebble()
    config = lab.config(pebble)
    first = await lab.account(pebble)
    assert config.account_key_file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in config.account_key_file.parent.iterdir()] == ["account.pem"]
    assert (await lab.account(pebble)).uri == first.uri
    config.account_key_file.unlink()
    assert (await lab.account(pebble)).uri != first.uri


@pytest.mark.parametrize("content", [b"garbage", b""])
async def test_an_unusable_account_key_is_an_error_that_names_the_file(lab, content):
    config = lab.config(lab.pebble())
    config.account_key_file.parent.mkdir()
    config.account_key_file.write_bytes(content)
    with pytest.raises(AcmeError, match=r"account\.pem") as caught:
        await AcmeAccount.open(config)
    assert (caught.value.code, caught.value.permanent) == ("account-key", True)
    assert config.account_key_file.read_bytes() == content


async def test_a_front_certificate_of_another_ca_is_not_trusted(lab):
    config = lab.config(lab.pebble())
    with pytest.raises(AcmeError) as caught:
        await AcmeAccount.open(AcmeConfig(config.directory_url, config.account_key_file))
    assert caught.value.code == "unreachable"
    assert "certificate" in caught.value.detail


async def answered_with(tmp_path, answer: bytes) -> AcmeError:
    """The error of `open` at a server that answers everything with these octets."""

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(AcmeError) as caught:
            await AcmeAccount.open(AcmeConfig(f"http://127.0.0.1:{port}/dir", tmp_path / "account.pem"))
    return caught.value


def http(status: str, body: str, more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    return (head + body).encode()


async def test_retry_after_of_a_plain_text_refusal_is_kept(tmp_path):
    error = await answered_with(tmp_path, http("429 Too Many Requests", "slow down", "Retry-After: 120\r\n"))
    assert (error.code, error.retry_after, error.status) == ("rate-limited", 120.0, 429)
    assert "slow down" in error.detail
    assert not error.permanent


async def test_retry_after_as_a_date_is_utc(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        date = (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=600)).strftime("%a, %d %b %Y %H:%M:%S GMT")
        error = await answered_with(
            tmp_path, http("503 Service Unavailable", "<html>", f"Retry-After: {date}\r\n")
        )
    finally:
        monkeypatch.undo()
        time.tzset()
    assert (error.code, error.status) == ("server-error", 503)
    assert 580 < error.retry_after <= 600


@pytest.mark.parametrize(
    ("status", "body", "code", "permanent"),
    [
        ("400 x", '{"type":"urn:ietf:params:acme:error:rejectedIdentifier"}', "rejectedIdentifier", True),
        ("500 x", '{"type":"urn:ietf:params:acme:error:rejectedIdentifier"}', "rejectedIdentifier", False),
        ("403 x", '{"type":"urn:ietf:params:acme:error:caa","detail":"no"}', "caa", False),
        ("503 x", '{"type":"urn:ietf:params:acme:error:rateLimited"}', "rate-limited", False),
        ("500 x", '{"type":"urn:ietf:params:acme:error:serverInternal"}', "server-error", False),
        ("403 x", "forbidden by a proxy", "server-error", False),
        ("403 x", '{"type":"about:blank","detail":"x"}', "server-error", False),
        ("200 x", "not json", "server-error", False),
        ("200 x", "[]", "server-error", False),
        ("200 x", "{}", "server-error", False),
    ],
)
async def test_codes_and_permanence(tmp_path, status, body, code, permanent):
    error = await answered_with(tmp_path, http(status, body))
    assert (error.code, error.permanent) == (code, permanent)


async def test_the_cas_words_are_kept_bounded_and_printable(tmp_path):
    subproblem = '{"type":"urn:ietf:params:acme:error:caa","detail":"sub\\u0007words"}'
    body = (
        '{"type":"urn:ietf:params:acme:error:compound","detail":"the words","subproblems":['
        + subproblem
        + "]}"
    )
    error = await answered_with(tmp_path, http("403 x", body))
    assert error.detail == "compound: the words; sub words"
    error = await answered_with(tmp_path, http("403 x", "w" * 5000))
    assert len(error.detail) == 1000


async def test_a_server_that_says_nothing_ends_by_the_timeout(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/dir"
        with pytest.raises(AcmeError) as caught:
            await AcmeAccount.open(AcmeConfig(url, tmp_path / "account.pem", timeout=1))
    assert caught.value.code == "unreachable"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, None),
        ("120", 120.0),
        (" 0 ", 0.0),
        ("9" * 400, 7 * 86_400.0),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("\u0661", None),
        ("Sun, 01 Mar 2026 12:01:00 GMT", 60.0),
        ("Sunday, 01-Mar-26 12:01:00 GMT", 60.0),
        ("Sun Mar  1 12:01:00 2026", 60.0),
        ("Sun, 01 Mar 2026 11:00:00 GMT", 0.0),
        ("Sun, 01 Mar 2036 11:00:00 GMT", 7 * 86_400.0),
        ("Sun, 99 Mar 2026 11:00:00 GMT", None),
    ],
)
def test_retry_after_in_both_forms(value, wanted):
    assert retry_after_seconds(value, now=NOW) == wanted


async def test_a_refused_request_never_reaches_the_ca(lab):
    pebble = lab.pebble()
    account = await lab.account(pebble)
    with pytest.raises(CsrError):
        await account.order(make_csr("bob.servers.pool.example"), NAME)
    assert "new order" not in pebble.process.output().lower().replace("-", " ")


async def test_only_an_authorization_is_ended(lab):
    """The same request to the account's own address would end the account for good (RFC 8555 section 7.3.6)."""
    account = await lab.account(lab.pebble())
    with pytest.raises(AcmeError) as caught:
        await account.deactivate_authorization(account.uri)
    assert (caught.value.code, caught.value.permanent) == ("refused", True)
    assert (await account.order(new_key_and_csr(NAME)[1], NAME)).token
