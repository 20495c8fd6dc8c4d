"""The agent's settings: where they come from, and what is said of bad ones."""

import pytest

from member_agent.config import load_settings
from member_agent.errors import AgentError
from nts_core.aead import SUPPORTED, AeadId
from nts_core.ke import NtpEndpoint


def test_defaults():
    settings = load_settings(None, {})
    assert settings.aead == SUPPORTED
    assert settings.ntp_server is None
    assert (settings.cookie_rotation, settings.cookie_history) == (86400, 864000)


@pytest.mark.parametrize(
    ("content", "aead"),
    [
        ('aead = "15"', (15,)),
        ('aead = "AES-128-GCM-SIV, 15"', (30, 15)),
        ('aead = "AEAD_AES_SIV_CMAC_512,aes-siv-cmac-256,15"', (17, 15)),
        ("aead = [30, 15]", (30, 15)),
        ('aead = ["AES_SIV_CMAC_384", "15"]', (16, 15)),
    ],
)
def test_algorithms_as_people_write_them(tmp_path, content, aead):
    (tmp_path / "agent.toml").write_text(content)
    assert load_settings(tmp_path, {}).aead == tuple(map(AeadId, aead))


@pytest.mark.rfc8915("4.1.7-1", "4.1.7-3")
@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("ntp.example", NtpEndpoint("ntp.example", 123)),
        ("NTP.example.:4123", NtpEndpoint("ntp.example", 4123)),
        ("192.0.2.1", NtpEndpoint("192.0.2.1", 123)),
        ("[2001:db8::1]:4123", NtpEndpoint("2001:db8::1", 4123)),
    ],
)
def test_another_ntp_server(monkeypatch, text, endpoint):
    monkeypatch.setenv("POOL_AGENT_NTP_SERVER", text)
    assert load_settings(None, {}).ntp_server == endpoint


@pytest.mark.parametrize("content", ["limits = 3", "limits = [1]", 'limits = "none"'])
def test_limits_that_are_none_are_not_passed_over(tmp_path, content):
    (tmp_path / "agent.toml").write_text(content)
    with pytest.raises(AgentError, match="limits"):
        load_settings(tmp_path, {"limits": None})


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "agent.toml").symlink_to(tmp_path / "nowhere")
    with pytest.raises(AgentError, match="not a file"):
        load_settings(tmp_path, {})


def test_lists_in_the_environment_are_json(monkeypatch):
    monkeypatch.setenv("POOL_AGENT_AEAD", "[15, 30]")
    monkeypatch.setenv("POOL_AGENT_LIMITS__DENY", '["10.0.0.0/8"]')
    settings = load_settings(None, {})
    assert settings.aead == (AeadId(15), AeadId(30))
    assert [str(prefix) for prefix in settings.limits.deny] == ["10.0.0.0/8"]
    monkeypatch.setenv("POOL_AGENT_LIMITS__DENY", "10.0.0.0/8")
    with pytest.raises(AgentError, match="JSON"):
        load_settings(None, {})


OWN_ACCOUNT = {"mode": "own-account", "directory_url": "https://ca.example/dir"}


@pytest.mark.rfc8915("4.1.7-1", "4.1.7-2", "4.1.7-4", "4.1.7-5")
@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"aead": "30"}, "aead: a server has to support 15"),
        ({"aead": "15,99"}, "aead: '99' is not an AEAD algorithm known here; known are 30 (AES-128-GCM-SIV)"),
        ({"aead": ""}, "aead: ''"),
        ({"ntp_server": "a:b"}, "ntp_server: 'a:b' is not a host and a port"),
        ({"ntp_server": "[::1"}, "ntp_server: '[::1'"),
        ({"ntp_server": "a b"}, "ntp_server: 'a b'"),
        ({"ntp_server": "192.0.2.256"}, "ntp_server: '192.0.2.256'"),
        ({"ntp_server": "127.1"}, "ntp_server: '127.1'"),
        ({"ntp_server": "z\u00fcrich.example"}, "not ASCII"),
        ({"ntp_server": "[fe80::1%eth0]"}, "zone identifier"),
        ({"ntp_server": "-x"}, "ntp_server: '-x'"),
        ({"ntp_server": "0.0.0.0"}, "not that of a host"),
        ({"ntp_server": 5}, "ntp_server: write HOST"),
        ({"limits": {"allow": ["10.0.0.1/8"]}}, "limits.allow.0: 10.0.0.1/8 has host bits set; write one"),
        ({"limits": {"allow": ["fe80::1%lo"]}}, "a prefix has no zone"),
        ({"limits": 3}, "limits: write a table of settings"),
        ({"limits": {"deny": "10.0.0.0/8"}}, "limits.deny: write a list, in brackets"),
        ({"limits": {"ntp_intervall": 8}}, "limits.ntp_intervall: there is no such setting"),
        ({"acme": {"mode": "own-account"}}, "directory_url: own-account needs the CA's"),
        ({"acme": {"mode": "own-account", "directory_url": "http://ca.example/dir"}}, "https://HOST/PATH"),
        ({"acme": {**OWN_ACCOUNT, "validation": "redirect"}}, "validation: the registry has no answer"),
        ({"acme": {**OWN_ACCOUNT, "validation": "dns-01"}}, "validation: the registry has no answer"),
        ({"acme": {**OWN_ACCOUNT, "contact": ["ann@example.org"]}}, "mailto:NAME@DOMAIN"),
        ({"cookie_rotation": 60}, "cookie_rotation 60 with cookie_history 864000"),
        ({"cookie_rotation": 5}, "cookie_rotation: Input should be greater"),
        ({"cookie_rotation": 600, "cookie_history": 86400 * 30}, "a history of 2592000 s is more than 1022"),
    ],
)
def test_bad_settings_are_named(flags, text):
    with pytest.raises(AgentError) as caught:
        load_settings(None, flags)
    assert text in caught.value.message
    assert "POOL_AGENT_" in caught.value.remedy
