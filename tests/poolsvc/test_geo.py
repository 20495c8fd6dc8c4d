"""Networks and countries from real files, as the vendors write them; and files that are missing, replaced or damaged."""

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.mmdb import write
from poolsvc.geo import Geo, GeoError, Place, check_file

ASN = {"autonomous_system_number": 64500, "autonomous_system_organization": "Example"}
COUNTRY = {"continent": {"code": "EU"}, "country": {"iso_code": "DE", "names": {"en": "Germany"}}}
WHOLE = Place(64500, "DE")


def opened(*paths):
    geo = Geo(paths)
    geo.refresh()
    return geo


@pytest.mark.parametrize(
    "records",
    [
        [ASN, COUNTRY],
        [COUNTRY, ASN],
        [ASN | COUNTRY],
        [COUNTRY | {"traits": ASN}],
        [{"asn": "AS64500", "as_name": "Example", "country": "Germany", "country_code": "DE"}],
        [{"asn": "AS64500", "country": "DE", "country_name": "Germany"}],
        [{"asn": "64500"}, {"country_code": "DE"}],
    ],
    ids=[
        "GeoLite2",
        "in-another-order",
        "one-file",
        "DB-IP-ISP",
        "IPinfo-Lite",
        "IPinfo-free",
        "ip-location-db",
    ],
)
def test_each_vendors_files(tmp_path, records):
    networks = ["192.0.2.0/24", "2001:db8::/32"]
    geo = opened(
        *(
            write(tmp_path / f"{number}.mmdb", dict.fromkeys(networks, record))
            for number, record in enumerate(records)
        )
    )
    assert geo.trouble is None
    assert geo.places(["192.0.2.1", "2001:db8::1", "198.51.100.1", "2001:db9::1"]) == {
        "192.0.2.1": WHOLE,
        "2001:db8::1": WHOLE,
        "198.51.100.1": Place(),
        "2001:db9::1": Place(),
    }


@pytest.mark.parametrize(
    "record",
    [
        {"autonomous_system_number": 0, "country": {"iso_code": "de"}},
        {"autonomous_system_number": 2**32, "country": {"iso_code": "EUR"}},
        {"autonomous_system_number": -1, "country": {"iso_code": 49}},
        {"asn": "none", "country": ["DE"]},
        {"asn": 'AS1" op=x', "country_code": "D "},
        {"traits": "AS1", "country": {"names": {"en": "Germany"}}},
        {},
        "DE",
        [1, 2],
    ],
)
def test_what_no_record_can_hold_is_unknown(tmp_path, record):
    geo = opened(write(tmp_path / "odd.mmdb", {"192.0.2.0/24": record}))
    assert geo.places(["192.0.2.1"]) == {"192.0.2.1": Place()}
    assert geo.trouble is None


def test_the_first_file_that_knows_counts(tmp_path):
    files = [
        write(tmp_path / "a.mmdb", {"192.0.2.0/25": ASN}),
        write(tmp_path / "b.mmdb", {"192.0.2.0/24": {"asn": "AS2", "country_code": "FR"}}),
    ]
    assert opened(*files).places(["192.0.2.1", "192.0.2.200"]) == {
        "192.0.2.1": Place(64500, "FR"),
        "192.0.2.200": Place(2, "FR"),
    }


def test_a_file_for_ipv4_only_knows_no_other_address(tmp_path):
    geo = opened(write(tmp_path / "v4.mmdb", {"192.0.2.0/24": ASN}, ip_version=4))
    assert geo.places(["192.0.2.1", "2001:db8::1"]) == {"192.0.2.1": Place(64500), "2001:db8::1": Place()}


def test_without_files_nothing_is_known():
    geo = opened()
    assert geo.places(["192.0.2.1"]) == {"192.0.2.1": Place()}
    assert geo.trouble is None


def test_a_file_that_is_replaced_is_read_again(tmp_path):
    file = write(tmp_path / "geo.mmdb", {"192.0.2.0/24": ASN})
    geo = opened(file)
    write(file, {"192.0.2.0/24": COUNTRY})
    assert geo.places(["192.0.2.1"]) == {"192.0.2.1": Place(64500)}
    geo.refresh()
    assert geo.places(["192.0.2.1"]) == {"192.0.2.1": Place(None, "DE")}


def test_without_a_change_nothing_is_read_again(tmp_path):
    file = write(tmp_path / "geo.mmdb", {"192.0.2.0/24": ASN})
    geo = opened(file)
    before = dict(geo._files)
    geo.refresh()
    assert geo._files == before


@pytest.mark.parametrize("spoil", ["missing", "empty", "text", "directory", "cut", "unreadable-end", "pipe"])
def test_a_file_that_cannot_be_used_is_told_and_what_was_read_stays(tmp_path, spoil):
    file = write(tmp_path / "geo.mmdb", {"192.0.2.0/24": ASN})
    geo = opened(file)
    whole = file.read_bytes()
    file.unlink()
    match spoil:
        case "empty":
            file.touch()
        case "text":
            file.write_text("autonomous_system_number: 64500\n" * 1000)
        case "directory":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "cut":
            file.write_bytes(whole[: len(whole) // 2])
        case "unreadable-end":
            file.write_bytes(whole[:-40] + bytes(40))
    geo.refresh()
    assert geo.trouble.startswith("geo.mmdb")
    assert str(tmp_path) not in geo.trouble
    assert geo.places(["192.0.2.1"]) == {"192.0.2.1": Place(64500)}
    assert opened(file).places(["192.0.2.1"]) == {"192.0.2.1": Place()}
    with pytest.raises(GeoError, match=r"geo\.mmdb"):
        check_file(file)
    if spoil == "directory":
        file.rmdir()
    write(file, {"192.0.2.0/24": COUNTRY})
    geo.refresh()
    assert geo.trouble is None
    assert geo.places(["192.0.2.1"]) == {"192.0.2.1": Place(None, "DE")}


def test_a_file_that_is_overwritten_in_place_ends_no_process(tmp_path):
    """Mapped itself, it would: the process gets SIGBUS when it looks beyond the new end."""
    file = write(tmp_path / "geo.mmdb", {f"192.0.{number}.0/24": ASN for number in range(200)})
    program = (
        "import sys, pathlib; from {module}; path = pathlib.Path(sys.argv[1]); {open};"
        "path.open('wb').close(); print({find})"
    )
    kind = {"module": "maxminddb import open_database", "open": "known = open_database(path)"}
    ours = {"module": "poolsvc.geo import Geo", "open": "known = Geo([path]); known.refresh()"}
    theirs = program.format(**kind, find="known.get('192.0.2.1')")
    whole = file.read_bytes()
    assert run(theirs, file).returncode == -signal.SIGBUS
    file.write_bytes(whole)
    done = run(program.format(**ours, find="known.places(['192.0.2.1'])"), file)
    assert done.returncode == 0
    assert "64500" in done.stdout


def run(program, file):
    return subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, timeout=60, check=False
    )


def test_no_copy_is_left(tmp_path, monkeypatch):
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    geo = opened(write(tmp_path / "geo.mmdb", {"192.0.2.0/24": ASN}))
    assert geo.places(["192.0.2.1"]) == {"192.0.2.1": Place(64500)}
    assert not any(place.iterdir())


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    records = {f"192.0.{number}.0/24": ASN | COUNTRY for number in range(8)}
    return write(tmp_path_factory.mktemp("geo") / "geo.mmdb", records)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, 300))
def test_any_damage_is_trouble_or_unknown(sound, changes, cut):
    octets = bytearray(sound.read_bytes())
    for position, octet in changes:
        octets[position % len(octets)] = octet
    file = sound.with_name("damaged.mmdb")
    file.write_bytes(octets[: len(octets) - cut])
    geo = opened(file)
    geo.places([f"192.0.{number}.1" for number in range(9)])
    assert geo.trouble is None or "damaged.mmdb" in geo.trouble
