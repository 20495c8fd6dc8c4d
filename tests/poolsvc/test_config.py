"""Settings: one file and the environment, every mistake told by the setting's name, secrets by file only."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from poolsvc.cli.common import authority
from poolsvc.config import ConfigError, SignUp, load_settings, split_endpoint

MINIMAL = """\
pool = "pool.example"

[dns]
primary = "192.0.2.53:53"
tsig_name = "publisher.pool.example"
tsig_secret_file = "tsig.secret"
nameservers = ["192.0.2.53:53", "[2001:db8::53]:5353"]

[ca]
directory_url = "https://ca.example/dir"
caa_identity = "ca.example"
account_key_file = "keys/account.pem"
"""


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch):
    for name in [name for name in os.environ if name.startswith("POOLSVC_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path):
    """Writes a settings file from the minimal one: lines before it, and replacements in it."""

    def write(before="", **replacements):
        text = MINIMAL
        for old, new in replacements.items():
            assert f"{old} = " in text
            text = "".join(
                (f"{old} = {new}\n" if new is not None else "") if line.startswith(f"{old} = ") else line
                for line in text.splitlines(keepends=True)
            )
        path = tmp_path / "poolsvc.toml"
        path.write_text(before + text)
        return path

    return write


def refused(path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_minimal_file_gives_the_defaults_of_a_public_pool(file):
    settings = load_settings(file())
    assert (settings.pool, settings.servers_domain) == ("pool.example", "servers.pool.example")
    assert settings.domain_of("alice") == "alice.servers.pool.example"
    assert (settings.ports.http, settings.ports.ke) == (80, 4460)
    assert settings.allow_private_addresses is False
    assert settings.policy.require_source_address is True
    assert settings.policy.opening_size == 4
    assert settings.policy.admission_probes == 3
    assert settings.policy.proofs_per_hour == 5
    assert settings.policy.retry == (60, 600, 6000, 86400)
    assert settings.join_token_life == timedelta(hours=72)


def test_relative_paths_are_relative_to_the_file(file, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    settings = load_settings(file('roots_file = "roots.pem"\n'))
    assert settings.dns.tsig_secret_file == tmp_path / "tsig.secret"
    assert settings.ca.account_key_file == tmp_path / "keys" / "account.pem"
    assert settings.roots_file == tmp_path / "roots.pem"
    assert settings.ca.ca_file is None
    assert settings.database == f"sqlite+aiosqlite:///{tmp_path}/registry.db"


def test_files_of_networks_are_one_or_several(file, tmp_path):
    assert load_settings(file()).geo.database == ()
    one = load_settings(file('geo = { database = "a.mmdb" }\n'))
    assert one.geo.database == (tmp_path / "a.mmdb",)
    two = load_settings(file('geo = { database = ["a.mmdb", "/b.mmdb"] }\n'))
    assert two.geo.database == (tmp_path / "a.mmdb", Path("/b.mmdb"))
    with pytest.raises(ConfigError, match=r"geo\.database"):
        load_settings(file('geo = { database = ["a", "b", "c", "d", "e"] }\n'))


@pytest.mark.parametrize(("length", "fits"), [(132, True), (133, False), (240, False)])
def test_a_pool_whose_name_leaves_no_room_for_servers_is_refused(file, length, fits):
    pool = ("a" * 50 + ".") * 5
    path = file(pool=f'"{pool[-length - 1 : -1]}"')
    if fits:
        assert len(load_settings(path).pool) == length
        return
    with pytest.raises(ConfigError, match=r"pool: .*4 are needed"):
        load_settings(path)


def test_absolute_paths_and_other_databases_stay_as_they_are(file):
    url = "postgresql+psycopg://registry@db.example/registry"
    settings = load_settings(file(f'database = "{url}"\n', tsig_secret_file='"/etc/truechimer/tsig"'))
    assert settings.database == url
    assert str(settings.dns.tsig_secret_file) == "/etc/truechimer/tsig"
    settings = load_settings(file('database = "sqlite+aiosqlite:////var/lib/registry.db"\n'))
    assert settings.database == "sqlite+aiosqlite:////var/lib/registry.db"


def test_a_pool_is_a_domain_name_in_lower_case_without_the_last_dot(file):
    assert load_settings(file(pool='"Pool.Example."')).pool == "pool.example"


def test_the_environment_comes_before_the_file(file, monkeypatch):
    monkeypatch.setenv("POOLSVC_POOL", "other.example")
    monkeypatch.setenv("POOLSVC_POLICY__OPENING_SIZE", "9")
    monkeypatch.setenv("POOLSVC_DNS__PRIMARY", "192.0.2.54:53")
    settings = load_settings(file("allow_private_addresses = false\n"))
    assert settings.pool == "other.example"
    assert settings.policy.opening_size == 9
    assert settings.dns.primary == "192.0.2.54:53"
    assert settings.dns.tsig_name == "publisher.pool.example", "the rest of the section is the file's"


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("POOLSVC_POLICY__OPENING_SIZE", "none", "policy.opening_size"),
        ("POOLSVC_POLICY__OPENING_SISE", "1", "policy.opening_sise"),
        ("POOLSVC_PORTS__KE", "0", "ports.ke"),
        ("POOLSVC_POOL", "not a name", "pool"),
    ],
)
def test_a_mistake_in_the_environment_names_the_setting(file, monkeypatch, name, value, setting):
    monkeypatch.setenv(name, value)
    assert f"{setting}: " in refused(file())


@pytest.mark.parametrize(
    ("before", "replacements", "setting"),
    [
        ("pol = 1\n", {}, "pol: "),
        ("", {"pool": None}, "pool: "),
        ("", {"pool": '"localhost"'}, "pool: "),
        ("", {"pool": '"-.example"'}, "pool: "),
        ("", {"pool": "7"}, "pool: "),
        ("", {"primary": '"ns1.example:53"'}, "dns.primary: "),
        ("", {"primary": '"192.0.2.1"'}, "dns.primary: "),
        ("", {"primary": '"192.0.2.1:70000"'}, "dns.primary: "),
        ("", {"primary": '"2001:db8::1:53:x"'}, "dns.primary: "),
        ("", {"primary": '"192.0.2.1:²"'}, "dns.primary: "),
        ("", {"nameservers": "[]"}, "dns.nameservers: "),
        ("", {"nameservers": '["192.0.2.1:53", "x"]'}, "dns.nameservers.1: "),
        ("", {"tsig_name": None}, "dns.tsig_name: "),
        ("", {"account_key_file": None}, "ca.account_key_file: "),
        ("", {"caa_identity": '"ca_example"'}, "ca.caa_identity: "),
        ("listen = []\n", {}, "listen: "),
        ('listen = ["localhost:80"]\n', {}, "listen.0: "),
        (f'listen = ["127.0.0.1:{"9" * 5000}"]\n', {}, "listen.0: write it as ADDRESS:PORT"),
        ("[ports]\nke = 70000\n", {}, "ports.ke: "),
        ("[policy]\nretry = []\n", {}, "policy.retry: "),
        ("[policy]\ntick = 0\n", {}, "policy.tick: "),
        ("[policy]\nmax_stratum = 16\n", {}, "policy.max_stratum: "),
        ("[policy]\nopeningsize = 1\n", {}, "policy.openingsize: "),
        ('database = "sqlite:///registry.db"\n', {}, "database: "),
        ('database = "mysql+aiomysql://registry@localhost/registry"\n', {}, "database: "),
        ('database = "nonsense"\n', {}, "database: "),
    ],
)
def test_a_mistake_in_the_file_names_the_setting(file, before, replacements, setting):
    path = file()
    text = file("", **replacements).read_text()
    if before.startswith("["):
        path.write_text(f"{text}\n{before}")
    else:
        path.write_text(f"{before}{text}")
    message = refused(path)
    assert f"{setting}" in message
    assert "\n" not in message


def test_a_list_is_not_blamed_for_its_only_entry(file):
    message = refused(file('listen = ["127.0.0.1:99999"]\n'))
    assert message.count("listen") == 1
    assert "listen.0: " in message


def test_a_variable_that_sets_nothing_is_told(file, monkeypatch):
    monkeypatch.setenv("POOLSVC_POL", "pool.example")
    with pytest.raises(ConfigError, match="POOLSVC_POL sets nothing"):
        load_settings(file())


@pytest.mark.parametrize("host", ["pool.example", "registry.pool.example", "A.servers.Pool.Example.:8443"])
def test_the_registry_does_not_live_where_members_do(file, host):
    assert "public_url: the registry's address must not be under" in refused(
        file(f'public_url = "https://{host}"\n')
    )


def test_another_domain_that_ends_like_the_pool_is_no_part_of_it(file):
    assert (
        load_settings(file('public_url = "https://mypool.example"\n')).public_url == "https://mypool.example"
    )


def test_a_certificate_for_the_api_needs_its_key(file, tmp_path):
    assert "go together" in refused(file('tls_certificate = "api.pem"\n'))
    settings = load_settings(file('tls_certificate = "api.pem"\ntls_key = "api.key"\n'))
    assert (settings.tls_certificate, settings.tls_key) == (tmp_path / "api.pem", tmp_path / "api.key")


ACME = "[web_tls]\nacme = true\n"


@pytest.mark.parametrize(
    ("lines", "is_taken"),
    [
        ('listen = ["127.0.0.1:80", "[::1]:80"]\n', True),
        ('listen = ["192.0.2.1:80"]\n', False),
        ('listen = ["127.0.0.1:80", "0.0.0.0:80"]\n', False),
        ('listen = ["[::]:80"]\n', False),
        ('listen = ["[::]:80"]\ntrusted_proxies = ["192.0.2.80"]\n', True),
        ('listen = ["[::]:443"]\ntls_certificate = "api.pem"\ntls_key = "api.key"\n', True),
        (f'listen = ["[::]:443"]\npublic_url = "https://registry.example.net"\n{ACME}', True),
    ],
)
def test_tokens_do_not_travel_in_the_open(file, lines, is_taken):
    path = file()
    path.write_text(lines.replace(ACME, "") + path.read_text() + (ACME if ACME in lines else ""))
    if is_taken:
        load_settings(path)
    else:
        message = refused(path)
        assert "listen " in message
        assert "tokens would travel in the open; set tls_certificate" in message


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("", "public_url must be https"),
        ('public_url = "http://registry.example.net"\n', "public_url must be https"),
        ('public_url = "https://192.0.2.1"\n', "public_url must be https"),
        ('public_url = "https://[2001:db8::1]"\n', "public_url must be https"),
        (
            'public_url = "https://registry.example.net"\ntls_certificate = "a.pem"\ntls_key = "a.key"\n',
            "exclude each other",
        ),
    ],
)
def test_a_certificate_by_acme_needs_a_name_and_no_other_certificate(file, lines, fault):
    path = file()
    path.write_text(lines + path.read_text() + ACME)
    assert fault in refused(path)


def test_a_certificate_by_acme_is_kept_beside_the_settings(file, tmp_path):
    path = file('public_url = "https://registry.example.net:8443"\n')
    path.write_text(path.read_text() + ACME)
    settings = load_settings(path)
    assert settings.web_tls.directory == tmp_path / "web-tls"
    assert settings.web_tls.http_listen == ("0.0.0.0:80",)
    assert settings.web_host == "registry.example.net"


def test_metrics_are_allowed_to_networks(file):
    assert "metrics_allow.0: " in refused(file('metrics_allow = ["prometheus.example"]\n'))
    (network,) = load_settings(file('metrics_allow = ["2001:db8::/32"]\n')).metrics_allow
    assert str(network) == "2001:db8::/32"


def test_trusted_proxies_are_addresses(file):
    assert "trusted_proxies.0: " in refused(file('trusted_proxies = ["proxy.example"]\n'))
    (proxy,) = load_settings(file('trusted_proxies = ["::1"]\n')).trusted_proxies
    assert str(proxy) == "::1"


def test_a_missing_section_is_named(file):
    path = file()
    path.write_text(path.read_text().split("[ca]")[0])
    assert "ca: " in refused(path)


def test_every_mistake_is_told_at_once(file):
    message = refused(file("pol = 1\n", primary='"x"', caa_identity=None))
    for setting in ("pol: ", "dns.primary: ", "ca.caa_identity: "):
        assert setting in message


def test_a_file_that_is_missing_or_no_toml_is_told_by_its_path(tmp_path):
    assert "no such settings file" in refused(tmp_path / "missing.toml")
    assert "no such settings file" in refused(tmp_path)
    for content in (b"pool = ", b"\xff\xfe", b"pool = 'x\x00'"):
        path = tmp_path / "broken.toml"
        path.write_bytes(content)
        refused(path)


FALLBACK = """
[[ca.fallback]]
directory_url = "https://acme.second.example/dir"
caa_identity = "second.example"
account_key_file = "keys/second.pem"
ca_file = "second-root.pem"
binding_key_id = "customer-7"
binding_key_file = "keys/binding.key"
"""


def test_other_cas_stand_behind_the_first_and_each_is_known_by_its_host(file, tmp_path):
    path = file()
    path.write_text(path.read_text() + FALLBACK)
    first, second = load_settings(path).ca.all
    assert (first.name, second.name) == ("ca.example", "acme.second.example")
    assert (first.profile, second.profile, first.binding_key_id) == ("auto", "auto", None)
    assert second.account_key_file == tmp_path / "keys" / "second.pem"
    assert second.binding_key_file == tmp_path / "keys" / "binding.key"
    assert second.ca_file == tmp_path / "second-root.pem"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("acme.second.example/dir", "ca.example/other", "directory_url of its own"),
        ("keys/second.pem", "keys/account.pem", "account_key_file of its own"),
        ('binding_key_id = "customer-7"\n', "", "go together"),
        ('binding_key_file = "keys/binding.key"\n', "", "go together"),
        ('caa_identity = "second.example"\n', "", "ca.fallback.0.caa_identity: "),
        ("[[ca.fallback]]", 'contact = ["operator"]\n[[ca.fallback]]', "ca.contact.0: write it as a URL"),
        ("[[ca.fallback]]", 'profile = "a b"\n[[ca.fallback]]', "ca.profile: "),
    ],
)
def test_a_mistake_in_the_settings_of_cas_is_told(file, old, new, fault):
    path = file()
    text = path.read_text() + FALLBACK
    assert old in text
    path.write_text(text.replace(old, new))
    assert fault in refused(path)


REHEARSAL = FALLBACK.replace("[[ca.fallback]]", "[ca.rehearsal]")


def test_a_staging_ca_is_none_of_those_that_issue(file, tmp_path):
    path = file()
    path.write_text(path.read_text() + REHEARSAL + 'socket = "run/staging.sock"\n')
    ca = load_settings(path).ca
    assert [one.name for one in ca.all] == ["ca.example"]
    assert [one.name for one in ca.with_rehearsal] == ["ca.example", "acme.second.example"]
    assert ca.rehearsal.account_key_file == tmp_path / "keys" / "second.pem"
    assert ca.rehearsal.binding_key_file == tmp_path / "keys" / "binding.key"
    assert ca.rehearsal.ca_file == tmp_path / "second-root.pem"
    assert ca.rehearsal.socket == tmp_path / "run" / "staging.sock"
    assert authority(load_settings(path), "acme.second.example") == ca.rehearsal, "commands know it"
    path.write_text(path.read_text().replace(REHEARSAL, "").replace('socket = "run/staging.sock"', ""))
    ca = load_settings(path).ca
    assert ca.with_rehearsal == ca.all


@pytest.mark.parametrize("others", ["", FALLBACK.replace("second", "third")])
@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("acme.second.example/dir", "ca.example/other", "a directory_url of its own"),
        ("acme.second.example/dir", "acme.third.example/dir", "a directory_url of its own"),
        ("keys/second.pem", "keys/account.pem", "an account_key_file of its own"),
        ("keys/second.pem", "keys/third.pem", "an account_key_file of its own"),
        (
            "[ca.rehearsal]",
            'socket = "acme.sock"\n[ca.rehearsal]\nsocket = "acme.sock"',
            "a socket of its own",
        ),
        ("[ca.rehearsal]", "[[ca.rehearsal]]", "ca.rehearsal: "),
    ],
)
def test_a_staging_ca_shares_nothing_with_another_one(file, others, old, new, fault):
    path = file()
    text = path.read_text()
    path.write_text(text + REHEARSAL.replace(old, new) + others)
    if "third" in new and not others:
        load_settings(path)
    else:
        assert fault in refused(path)


def test_of_cas_there_are_four_at_most(file):
    path = file()
    more = "".join(
        FALLBACK.replace("second.example", f"ca{number}.example").replace("second.pem", f"{number}.pem")
        for number in range(4)
    )
    path.write_text(path.read_text() + more)
    assert "ca.fallback: " in refused(path)


def test_settings_cannot_be_changed(file):
    settings = load_settings(file())
    with pytest.raises(ValidationError):
        settings.pool = "other.example"
    with pytest.raises(ValidationError):
        settings.policy.tick = 2


def test_a_password_in_the_databases_url_is_in_no_error_and_no_repr(file):
    secret = "correct-horse"
    database = f'database = "postgresql+psycopg://registry:{secret}@localhost/registry"\n'
    assert secret not in repr(load_settings(file(database)))
    assert secret not in refused(file(database, pool='"x"'))


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [("192.0.2.1:53", ("192.0.2.1", 53)), ("[2001:db8::1]:0", ("2001:db8::1", 0))],
)
def test_endpoints_are_split_at_the_last_colon(text, endpoint):
    assert split_endpoint(text) == endpoint


TERMS = """
[[terms]]
document = "ca"
version = "1.4"
title = "Subscriber agreement"
url = "https://ca.example/sa"
"""
OIDC = """
[[oidc]]
name = "club"
issuer = "https://id.example"
client_id = "pool"
client_secret_file = "club.secret"
"""


def append(path, text):
    path.write_text(path.read_text() + text)
    return path


def test_accounts_wait_for_approval_and_nothing_has_to_be_accepted_unless_the_file_says_so(file):
    settings = load_settings(file())
    assert (settings.sign_up, settings.terms, settings.oidc) == (SignUp.APPROVAL, (), ())


def test_terms_and_providers_are_tables_and_their_paths_relative_to_the_file(file, tmp_path):
    settings = load_settings(append(file('sign_up = "open"\n'), TERMS + OIDC))
    assert settings.sign_up is SignUp.OPEN
    assert [(entry.document, entry.version) for entry in settings.terms] == [("ca", "1.4")]
    assert settings.oidc[0].client_secret_file == tmp_path / "club.secret"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (TERMS + TERMS, "terms.document"),
        (OIDC + OIDC, "oidc.name"),
        (OIDC + OIDC.replace("club", "other"), "oidc.issuer"),
        (OIDC.replace("https://", "http://"), "oidc.0.issuer"),
        (OIDC.replace('"club"', '"a/b"'), "oidc.0.name"),
        (OIDC + 'client_secret = "x"\n', "oidc.0.client_secret"),
        (TERMS.replace("https://ca.example/sa", "javascript:x"), "terms.0.url"),
        (TERMS.replace('"ca"', '"C A"'), "terms.0.document"),
    ],
)
def test_terms_and_providers_that_cannot_be_meant_are_refused(file, text, named):
    assert named in refused(append(file(), text))


EMBEDDED = """\
pool = "pool.example"

{dns}

[ca]
directory_url = "https://ca.example/dir"
caa_identity = "ca.example"
account_key_file = "keys/account.pem"
"""


@pytest.fixture
def embedded(tmp_path):
    """Writes a settings file with sections of DNS."""

    def write(dns=""):
        path = tmp_path / "poolsvc.toml"
        path.write_text(EMBEDDED.format(dns=dns))
        return path

    return write


def test_without_a_primary_the_registry_serves_the_zone(embedded, tmp_path):
    dns = load_settings(embedded('[dns.embedded]\nlisten = ["127.0.0.1:53", "[::1]:53"]')).dns
    assert dns.embedded is not None
    assert (dns.primary, dns.nameservers) == ("127.0.0.1:53", ("127.0.0.1:53", "[::1]:53"))
    assert dns.tsig_secret_file == tmp_path / "dns" / "publisher.secret"
    dns = load_settings(embedded('[dns.embedded]\nlisten = ["192.0.2.1:5353"]\ndirectory = "/srv/dns"')).dns
    assert (dns.primary, dns.nameservers) == ("192.0.2.1:5353", ("192.0.2.1:5353",))
    assert str(dns.tsig_secret_file) == "/srv/dns/publisher.secret"


def test_all_nameservers_of_the_zone_are_asked(embedded):
    names = (
        '[[dns.embedded.nameservers]]\nname = "ns1.pool.example"\naddresses = ["192.0.2.53", "2001:db8::53"]'
    )
    dns = load_settings(embedded(names)).dns
    assert (dns.primary, dns.nameservers) == ("127.0.0.1:53", ("192.0.2.53:53", "[2001:db8::53]:53"))


OWN_PRIMARY = """\
[dns]
primary = "192.0.2.1:53"
tsig_name = "a"
tsig_secret_file = "a"
nameservers = ["192.0.2.1:53"]
"""
SECONDARY = """
[[dns.embedded.nameservers]]
name = "ns{number}.pool.example"
addresses = ["192.0.2.53"]

[[dns.embedded.secondaries]]
address = "192.0.2.{number}:53"
tsig_name = "{name}"
tsig_secret_file = "transfer.secret"
signs = {signs}
"""


@pytest.mark.parametrize(
    ("dns", "words"),
    [
        ('[dns]\nprimary = "192.0.2.1:53"\n[dns.embedded]', ["dns", "tsig_name"]),
        (
            f'{OWN_PRIMARY}[dns.embedded]\nlisten = ["192.0.2.2:53"]',
            ["dns", "exclude each other"],
        ),
        ("", ["dns.embedded", "nameservers: name each NS"]),
        ("[dns.embedded]\nfoo = 1", ["dns.embedded.foo", "there is no such setting"]),
        ('[dns.embedded]\nlisten = ["ns1:53"]', ["dns.embedded.listen.0"]),
        ('[dns.embedded]\nlisten = ["127.0.0.1:0"]', ["dns.embedded.listen.0", "give a port"]),
        ("[dns.embedded]\nttl = 0", ["dns.embedded.ttl"]),
        (SECONDARY.format(number=1, name="a..b", signs="false"), ["dns.embedded.secondaries.0.tsig_name"]),
        (SECONDARY.format(number=1, name="Publisher.", signs="false"), ["is the publisher's"]),
        (
            SECONDARY.format(number=1, name="t", signs="false")
            + SECONDARY.format(number=2, name="T.", signs="true"),
            ["dns.embedded", "192.0.2.2:53 and 192.0.2.1:53", "a key of their own"],
        ),
        (
            '[[dns.embedded.nameservers]]\nname = "ns1.pool.example"\naddresses = ["192.0.2.53"]\n' * 2,
            ["dns.embedded", "the same name"],
        ),
    ],
)
def test_a_mistake_in_the_embedded_server_is_told_by_its_setting(embedded, dns, words):
    told = refused(embedded(dns))
    for word in words:
        assert word in told
