"""`poolsvc key`: a new TSIG secret at a real Knot, a new account key at a real Pebble, and deaths in between."""

import asyncio
import shutil
from types import SimpleNamespace

import pytest

from lab.processes import free_port, wait_until
from lab.programs import run
from nts_core.acme import (
    AcmeAccount,
    AcmeConfig,
    AcmeError,
    load_account_key,
    new_account_key,
    read_account,
    roll_account_key,
)
from poolsvc.acme_process import account_of
from poolsvc.cli import ExitStatus
from poolsvc.config import load_settings
from poolsvc.embedded_dns import Charge
from poolsvc.keys import KeyNotRenewed, renew_tsig
from poolsvc.primary import PublishError
from poolsvc.publication import primary_config, zone_policy
from poolsvc.publisher import Publisher


def publishes(settings_file) -> bool:
    """Whether a registry that starts now could write the zone."""
    settings = load_settings(settings_file)
    try:
        asyncio.run(Publisher(zone_policy(settings), primary_config(settings)).rehearse())
    except PublishError:
        return False
    return True


def test_a_new_tsig_secret_by_the_printed_steps(first_day):
    """The primary reads its part from the registry's directory here, so that nothing has to be copied."""
    directory = first_day.settings.parent
    before = (directory / "tsig.secret").read_text()
    assert publishes(first_day.settings)
    done = run("poolsvc", "key", "tsig", f"--config={first_day.settings}")
    assert done.status == ExitStatus.OK, done.stderr
    after = (directory / "tsig.secret").read_text()
    assert after != before
    assert (directory / "tsig.secret.old").read_text() == before
    assert before.strip() not in done.stdout
    assert after.strip() not in done.stdout
    for name in ("tsig.secret", "tsig.secret.old", "knot-tsig.conf", "bind-tsig.conf", "pdns-tsig.sh"):
        assert (directory / name).stat().st_mode & 0o777 == 0o600
    assert not publishes(first_day.settings), "the primary has the old one"
    assert "knotc reload" in done.stdout
    assert first_day.control("knotc reload") == 0
    wait_until(lambda: publishes(first_day.settings), "the new secret at the primary")


def test_a_renewal_that_was_not_finished_is_not_begun_again(init, tmp_path):
    """Otherwise the one secret that the primary knows would be lost."""
    init()
    config = tmp_path / "new" / "poolsvc.toml"
    known = (tmp_path / "new" / "tsig.secret").read_text()
    assert run("poolsvc", "key", "tsig", f"--config={config}").status == ExitStatus.OK
    again = run("poolsvc", "key", "tsig", f"--config={config}")
    assert again.status == ExitStatus.CONFIGURATION
    assert "tsig.secret.old" in again.stderr
    assert (tmp_path / "new" / "tsig.secret.old").read_text() == known


def test_a_renewal_that_died_before_the_new_secret_is_begun_again(init, tmp_path):
    init()
    settings = load_settings(tmp_path / "new" / "poolsvc.toml")
    secret = settings.dns.tsig_secret_file
    known = secret.read_text()
    shutil.copy(secret, f"{secret}.old")
    made = renew_tsig(settings)
    assert made.old.read_text() == known
    assert secret.read_text() != known
    assert secret.read_text().strip() in made.knot.read_text()


def test_a_tsig_secret_that_was_lost_is_made_anew(first_day):
    (first_day.settings.parent / "tsig.secret").unlink()
    done = run("poolsvc", "key", "tsig", f"--config={first_day.settings}")
    assert done.status == ExitStatus.OK, done.stderr
    assert not (first_day.settings.parent / "tsig.secret.old").exists()
    assert first_day.control("knotc reload") == 0
    wait_until(lambda: publishes(first_day.settings), "the new secret at the primary")


def test_the_embedded_server_gets_a_new_secret_with_its_registry(init, tmp_path):
    init(embedded=True)
    settings = load_settings(tmp_path / "new" / "poolsvc.toml")
    before_there_is_one = run("poolsvc", "key", "tsig", f"--config={tmp_path / 'new' / 'poolsvc.toml'}")
    assert before_there_is_one.status == ExitStatus.CONFIGURATION
    assert "first start" in before_there_is_one.stderr
    Charge.of(settings).prepare()
    known = settings.dns.tsig_secret_file.read_text()
    done = run("poolsvc", "key", "tsig", f"--config={tmp_path / 'new' / 'poolsvc.toml'}")
    assert done.status == ExitStatus.OK, done.stderr
    assert "Restart `poolsvc serve`" in done.stdout
    assert settings.dns.tsig_secret_file.read_text() not in {known, ""}
    assert settings.dns.tsig_secret_file.stat().st_mode & 0o777 == 0o600
    assert {path.name for path in (tmp_path / "new" / "dns").iterdir()} == {"publisher.secret"}


def test_a_directory_that_is_gone_is_told(init, tmp_path):
    init()
    settings = load_settings(tmp_path / "new" / "poolsvc.toml")
    shutil.rmtree(tmp_path / "new")
    with pytest.raises(KeyNotRenewed, match=r"dns\.tsig_secret_file"):
        renew_tsig(settings)


def keys(config: AcmeConfig):
    """The account key, and the one beside it."""
    path = config.account_key_file
    aside = path.with_name(f"{path.name}.new")
    return path, aside


async def uri(config: AcmeConfig) -> str:
    account = await AcmeAccount.open(config)
    account.close()
    return account.uri


async def test_a_new_account_key_for_the_same_account(lab):
    config = lab.config(lab.pebble(nonce_reject=30))
    account = await uri(config)
    path, aside = keys(config)
    before = path.read_bytes()
    assert await roll_account_key(config) == account
    assert path.read_bytes() != before
    assert path.stat().st_mode & 0o777 == 0o600
    assert not aside.exists()
    assert await uri(config) == account
    path.write_bytes(before)
    assert await uri(config) != account, "the old key is still the account's"


async def test_the_key_is_not_changed_under_those_who_use_it(lab):
    config = lab.config(lab.pebble())
    account = await AcmeAccount.open(config)
    path, aside = keys(config)
    before = path.read_bytes()
    with pytest.raises(AcmeError, match="a program uses it"):
        await roll_account_key(config)
    assert path.read_bytes() == before
    assert not aside.exists()
    account.close()
    assert await roll_account_key(config) == account.uri


async def test_the_command_rolls_the_key(lab, tmp_path, init):
    pebble = lab.pebble()
    await asyncio.to_thread(init)
    settings = tmp_path / "new" / "poolsvc.toml"
    text = settings.read_text().replace(
        '"https://acme-v02.api.letsencrypt.org/directory"',
        f'"{pebble.directory_url}"\nca_file = "{pebble.ca_file}"',
    )
    settings.write_text(text)
    account = await uri(account_of(load_settings(settings).ca))
    before = (tmp_path / "new" / "acme-account.pem").read_bytes()
    done = await asyncio.to_thread(run, "poolsvc", "key", "acme-account", f"--config={settings}")
    assert done.status == ExitStatus.OK, done.stderr
    assert account in done.stdout
    assert (tmp_path / "new" / "acme-account.pem").read_bytes() != before
    pebble.stop()
    after = (tmp_path / "new" / "acme-account.pem").read_bytes()
    away = await asyncio.to_thread(run, "poolsvc", "key", "acme-account", f"--config={settings}")
    assert away.status == ExitStatus.PEER
    assert "repeat the command" in away.stderr
    assert (tmp_path / "new" / "acme-account.pem").read_bytes() == after


async def test_a_ca_that_is_away_changes_nothing(lab):
    pebble = lab.pebble()
    config = lab.config(pebble)
    account = await uri(config)
    path, aside = keys(config)
    before = path.read_bytes()
    pebble.stop()
    with pytest.raises(AcmeError) as caught:
        await roll_account_key(config)
    assert caught.value.code == "unreachable"
    assert (path.read_bytes(), aside.exists()) == (before, False)
    assert account


@pytest.mark.parametrize(
    "next_step", [roll_account_key, uri], ids=["the command again", "the registry's start"]
)
async def test_a_death_after_the_cas_yes_is_made_good(lab, next_step):
    """The CA has the new key, which is still beside the file; the old one would make another account."""
    config = lab.config(lab.pebble())
    account = await uri(config)
    path, aside = keys(config)
    before = path.read_bytes()
    await roll_account_key(config)
    path.rename(aside)
    path.write_bytes(before)
    new = aside.read_bytes()
    assert await next_step(config) == account
    assert (path.read_bytes(), aside.exists()) == (new, False)


async def test_a_death_before_the_ca_heard_is_made_good(lab):
    """The registry goes on with the old key; the command goes on with the key that it had made."""
    config = lab.config(lab.pebble())
    account = await uri(config)
    path, aside = keys(config)
    before, new = path.read_bytes(), new_account_key()
    aside.touch(mode=0o600)
    aside.write_bytes(new)
    assert await uri(config) == account
    assert path.read_bytes() == before
    assert await roll_account_key(config) == account
    assert (path.read_bytes(), aside.exists()) == (new, False)


async def test_an_account_that_the_ca_does_not_know_is_not_made(lab):
    pebble = lab.pebble()
    config = lab.config(pebble)
    await uri(config)
    path, aside = keys(config)
    before = path.read_bytes()
    pebble.restart()
    with pytest.raises(AcmeError) as caught:
        await roll_account_key(config)
    assert caught.value.code == "accountDoesNotExist"
    assert (path.read_bytes(), aside.exists()) == (before, False)


async def test_a_key_that_is_gone_is_not_made(lab):
    config = lab.config(lab.pebble())
    with pytest.raises(AcmeError, match=r"account\.pem") as caught:
        await roll_account_key(config)
    assert caught.value.code == "account-key"
    assert not config.account_key_file.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 4096])
async def test_a_new_key_that_cannot_be_read_is_named(lab, content):
    config = lab.config(lab.pebble())
    await uri(config)
    path, aside = keys(config)
    before = path.read_bytes()
    aside.write_bytes(content)
    with pytest.raises(AcmeError, match=r"account\.pem\.new"):
        await roll_account_key(config)
    assert path.read_bytes() == before
    load_account_key(path)


def test_the_command_without_a_key(init, tmp_path):
    init(f"--ca=https://127.0.0.1:{free_port()}/dir", "--caa-identity=ca.example")
    (tmp_path / "new" / "acme-account.pem").unlink()
    done = run("poolsvc", "key", "acme-account", f"--config={tmp_path / 'new' / 'poolsvc.toml'}")
    assert done.status == ExitStatus.CONFIGURATION
    assert "docs/runbook.md" in done.stderr
    assert not (tmp_path / "new" / "acme-account.pem").exists()


@pytest.fixture
async def two(lab, tmp_path, init):
    """Settings with two real CAs, and the registry's accounts there, by their CA."""
    await asyncio.to_thread(init)
    file = tmp_path / "new" / "poolsvc.toml"
    first, second = lab.pebble(), lab.pebble("second")
    text = file.read_text().replace(
        '"https://acme-v02.api.letsencrypt.org/directory"',
        f'"{first.directory_url}"\nca_file = "{first.ca_file}"',
    )
    more = f"""
[[ca.fallback]]
directory_url = "{second.directory_url}"
caa_identity = "second.example"
account_key_file = "second.pem"
ca_file = "{second.ca_file}"
contact = ["mailto:old@example.net"]
"""
    file.write_text(text + more)
    cas = load_settings(file).ca.all
    return SimpleNamespace(file=file, cas=cas, uris=[await uri(account_of(ca)) for ca in cas], second=second)


async def poolsvc(two, *arguments):
    return await asyncio.to_thread(run, "poolsvc", *arguments, f"--config={two.file}")


async def test_the_key_of_one_of_several_accounts(two):
    before = [ca.account_key_file.read_bytes() for ca in two.cas]
    done = await poolsvc(two, "key", "acme-account", f"--ca={two.cas[1].name}")
    assert done.status == ExitStatus.OK, done.stderr
    assert two.uris[1] in done.stdout
    assert two.cas[0].account_key_file.read_bytes() == before[0]
    assert two.cas[1].account_key_file.read_bytes() != before[1]
    assert [await uri(account_of(ca)) for ca in two.cas] == two.uris


async def test_an_account_and_its_contact_by_command(two):
    shown = await poolsvc(two, "acme", "account", f"--ca={two.cas[1].name}")
    assert shown.status == ExitStatus.OK, shown.stderr
    for words in (two.uris[1], two.cas[1].name, "mailto:old@example.net", "second.example"):
        assert words in shown.stdout
    first = await poolsvc(two, "acme", "account")
    assert two.uris[0] in first.stdout
    changed = await poolsvc(
        two, "acme", "contact", f"--ca={two.cas[1].name}", "mailto:new@example.net", "mailto:b@example.net"
    )
    assert changed.status == ExitStatus.OK, changed.stderr
    assert "in the settings likewise" in changed.stdout
    known = await read_account(account_of(two.cas[1]))
    assert (known.uri, set(known.contact)) == (
        two.uris[1],
        {"mailto:new@example.net", "mailto:b@example.net"},
    )
    same = await poolsvc(two, "acme", "contact", f"--ca={two.cas[1].name}", "mailto:old@example.net")
    assert "likewise" not in same.stdout, "the settings say the same"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("account", "--ca=acme.gone.example"), ExitStatus.USAGE, "acme.gone.example"),
        (("contact", "operator@example.net"), ExitStatus.USAGE, "operator@example.net"),
        (("contact", "mailto:a b@example.net"), ExitStatus.USAGE, "mailto:a b"),
        (("contact", "mailto:" + "o" * 400), ExitStatus.USAGE, "mailto:ooo"),
        (("contact", "tel:+49123"), ExitStatus.PEER, "mailto:NAME@DOMAIN"),
        (("contact",), ExitStatus.USAGE, "URL"),
    ],
)
async def test_a_mistake_about_an_account_is_told(two, arguments, status, words):
    done = await poolsvc(two, "acme", *arguments)
    assert done.status == status, done.stderr
    assert words in done.stderr
    assert (await read_account(account_of(two.cas[1]))).contact == ("mailto:old@example.net",)


async def test_an_account_that_is_out_of_reach_or_not_there(two):
    two.second.stop()
    name = f"--ca={two.cas[1].name}"
    away = await poolsvc(two, "acme", "contact", name, "mailto:new@example.net")
    assert (away.status, "repeat the command" in away.stderr) == (ExitStatus.PEER, True)
    two.second.start()
    unknown = await poolsvc(two, "acme", "account", name)
    assert (unknown.status, "which makes the account" in unknown.stderr) == (ExitStatus.PEER, True)
    two.cas[1].account_key_file.unlink()
    lost = await poolsvc(two, "acme", "account", name)
    assert (lost.status, "second.pem" in lost.stderr) == (ExitStatus.CONFIGURATION, True)
    assert not two.cas[1].account_key_file.exists()
