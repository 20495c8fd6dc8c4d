"""`pool-client`: what it makes of its command line, and one JSON object whatever happens."""

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.certificates import Authority
from lab.processes import free_port
from lab.programs import run
from nts_core.cli import Endpoint, ExitStatus, exit_status, load_roots, parse_endpoint
from nts_core.client import ClientError, Failure

MANUAL = Path(__file__).parents[2] / "docs/clients.md"
QUERY_FIELDS = {
    "authenticated",
    "server",
    "ke_port",
    "ntp_address",
    "ntp_port",
    "aead",
    "cookies",
    "key_establishment",
    "certificate_time",
    "offset_ns",
    "delay_ns",
    "stratum",
    "leap",
    "warnings",
    "error",
}


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("ntp.example", "ntp.example", 4460),
        ("NTP.Example.", "ntp.example", 4460),
        ("ntp.example:123", "ntp.example", 123),
        ("ntp.example.:65535", "ntp.example", 65535),
        ("192.0.2.1:1", "192.0.2.1", 1),
        ("2001:db8::1", "2001:db8::1", 4460),
        ("[2001:DB8::1]", "2001:db8::1", 4460),
        ("[2001:db8::1]:99", "2001:db8::1", 99),
    ],
)
def test_endpoints(text, host, port):
    assert parse_endpoint(text, 4460) == Endpoint(host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        ":",
        ":123",
        "a:",
        "a:0",
        "a:65536",
        "a:-1",
        "a:1x",
        "a:\u0661",
        "a:" + "9" * 5000,
        "a: 1",
        "[::1",
        "[::1]x",
        "[::1]123",
        "[::1]:",
        "[]",
    ],
)
def test_what_is_no_endpoint(text):
    with pytest.raises(ClientError) as caught:
        parse_endpoint(text, 4460)
    assert caught.value.code == Failure.CONFIGURATION
    assert "HOST:PORT" in caught.value.remedy


@given(st.text(max_size=30))
def test_any_text_is_an_endpoint_or_an_error(text):
    try:
        found = parse_endpoint(text, 4460)
    except ClientError:
        return
    assert found.host
    assert 0 < found.port < 65536


def test_roots_of_a_file(authority):
    assert len(load_roots(authority.root)) == 1


@pytest.mark.parametrize("content", [None, b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\nxx\n"])
def test_files_without_roots(tmp_path, content):
    file = tmp_path / "roots.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ClientError) as caught:
        load_roots(file)
    assert caught.value.code == Failure.CONFIGURATION


# The program itself


def query_fails(status, code, *arguments):
    """Run a query that must fail, with exactly one JSON object on standard output."""
    done = run("pool-client", "query", *arguments, "--json")
    assert done.status == status, done
    assert len(done.stdout.splitlines()) == 1
    document = done.document
    assert set(document) == QUERY_FIELDS
    assert document["authenticated"] is False
    assert set(document["error"]) == {"code", "message", "remedy"}
    assert document["error"]["code"] == code
    assert all(document["error"].values())
    assert "Traceback" not in done.stderr
    return document


def test_a_bad_port():
    document = query_fails(ExitStatus.USAGE, "configuration", "ntp.example:99999")
    assert document["server"] == "ntp.example:99999"
    assert document["ke_port"] is None


def test_a_bad_address(authority):
    query_fails(
        ExitStatus.USAGE,
        "configuration",
        "ntp.example",
        "--address",
        "localhost",
        "--ca",
        str(authority.root),
    )


def test_a_missing_file_of_roots(tmp_path):
    document = query_fails(
        ExitStatus.USAGE, "configuration", "ntp.example", "--address=127.0.0.1", f"--ca={tmp_path}/none.pem"
    )
    assert "none.pem" in document["error"]["message"]


def test_a_file_without_roots(tmp_path):
    (tmp_path / "empty.pem").touch()
    query_fails(
        ExitStatus.USAGE, "configuration", "ntp.example", "--address=127.0.0.1", f"--ca={tmp_path}/empty.pem"
    )


def test_an_unreachable_host(authority):
    document = query_fails(
        ExitStatus.NOT_ESTABLISHED,
        "tcp",
        f"ntp.example:{free_port()}",
        "--address=127.0.0.1",
        f"--ca={authority.root}",
    )
    assert document["server"] == "ntp.example"


def test_a_port_that_is_silent(authority):
    """A listener that accepts and says nothing costs one deadline, and the stage is TLS."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        query_fails(
            ExitStatus.NOT_ESTABLISHED,
            "tls",
            f"ntp.example:{port}",
            "--address=127.0.0.1",
            f"--ca={authority.root}",
        )


def test_a_name_that_does_not_resolve(authority):
    # Reserved by RFC 6761: no resolver knows it.
    query_fails(ExitStatus.DNS, "dns", "nowhere.invalid", f"--ca={authority.root}")


@pytest.mark.parametrize("name", ["a..b", "zeit.müller.example", "a b"])
def test_a_name_that_no_server_can_have(authority, name):
    document = query_fails(ExitStatus.USAGE, "configuration", name, f"--ca={authority.root}")
    assert repr(name) in document["error"]["message"]


@pytest.mark.parametrize("samples", [-1, 0, 65])
def test_a_number_out_of_range(samples):
    document = query_fails(ExitStatus.USAGE, "configuration", "ntp.example", f"--samples={samples}")
    assert "--samples" in document["error"]["message"]


@pytest.mark.parametrize("arguments", [("--samples=x",), ("--colour",), ("two", "hosts")])
def test_a_command_line_that_cannot_be_read(arguments):
    """One object here too; without --json nothing that could be taken for a result."""
    told = run("pool-client", "query", "ntp.example", "--json", *arguments)
    shown = run("pool-client", "query", "ntp.example", *arguments)
    assert (told.status, told.document["error"]["code"]) == (ExitStatus.USAGE, "configuration")
    assert (shown.status, shown.stdout) == (ExitStatus.USAGE, "")
    assert "Traceback" not in told.stderr + shown.stderr
    assert shown.stderr


def test_errors_for_people_name_the_remedy(authority):
    done = run(
        "pool-client", "query", f"ntp.example:{free_port()}", "--address=127.0.0.1", f"--ca={authority.root}"
    )
    assert done.status == ExitStatus.NOT_ESTABLISHED
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("error (tcp): ")
    assert second.startswith("  ")


def test_sources_without_a_usable_anchor_or_resolver(tmp_path, authority):
    anchor = tmp_path / "anchor"
    for content, extra in ((None, ()), ("nonsense", ()), ("", ())):
        if content is not None:
            anchor.write_text(content)
        done = run("pool-client", "sources", "pool.example", f"--trust-anchor={anchor}", "--json", *extra)
        assert done.status == ExitStatus.USAGE
        document = done.document
        assert document["sources"] == []
        assert document["error"]["code"] == "configuration"
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("code", Failure)
def test_the_manual_has_the_status_of_every_failure(code):
    status = exit_status(code)
    (row,) = [line for line in MANUAL.read_text().splitlines() if line.startswith(f"| {status:d} |")]
    assert f"`{code}`" in row.split("|")[3]
