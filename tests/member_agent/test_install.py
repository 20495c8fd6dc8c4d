"""Certificate generations: what is refused, what a crash leaves, and that a switch is atomic."""

import datetime as dt
import shutil
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from member_agent.install import (
    PENDING_LIMIT,
    CertificateStore,
    InstallError,
    load_pair,
)
from nts_core.certificates import check_csr
from nts_core.tls import new_key_and_csr

NAME = "alice.servers.pool.example"
NOW = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


class Issuer:
    """A root that issues for any CSR."""

    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root of the test")])
        self.pem = self._sign(self.name, self.key.public_key(), [])

    def _sign(self, subject, key, names, days=6):
        builder = x509.CertificateBuilder(
            self.name, subject, key, x509.random_serial_number(), NOW, NOW + days * DAY
        )
        if names:
            san = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
            builder = builder.add_extension(san, critical=True)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()

    def chain(self, csr_pem: str, *, names=(NAME,), days=6) -> str:
        key = x509.load_pem_x509_csr(csr_pem.encode()).public_key()
        return self._sign(x509.Name([]), key, names, days) + self.pem


@pytest.fixture(scope="module")
def issuer():
    return Issuer()


@pytest.fixture
def store(tmp_path):
    return CertificateStore(tmp_path / "certificates", NAME)


def fingerprint(chain: str) -> str:
    return x509.load_pem_x509_certificate(chain.encode()).fingerprint(hashes.SHA256()).hex()


def install(store, issuer, order: int) -> str:
    chain = issuer.chain(store.pending(order))
    take(store, order, chain)
    return fingerprint(chain)


def take(store, order: int, chain: str) -> Path:
    """Staged, then served."""
    place = store.stage(order, chain, now=NOW).chain_path.parent
    store.adopt()
    return place


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): bytes(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in directory.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_the_request_is_what_the_registry_accepts():
    key, csr = new_key_and_csr(NAME)
    check_csr(csr, NAME)
    assert not list(x509.load_pem_x509_csr(csr.encode()).subject)
    private = serialization.load_pem_private_key(key.encode(), None)
    assert private.public_key() == x509.load_pem_x509_csr(csr.encode()).public_key()


def test_the_csr_of_an_order_stays_the_same_over_a_restart(store, tmp_path):
    csr = store.pending(7)
    assert store.pending(7) == csr
    assert CertificateStore(tmp_path / "certificates", NAME).pending(7) == csr
    assert store.pending(8) != csr


def test_a_certificate_is_installed_with_narrow_permissions(store, issuer, tmp_path):
    chain = issuer.chain(store.pending(1))
    assert store.current() is None
    place = take(store, 1, chain)
    pair = store.current()
    assert (pair.chain_path, pair.key_path) == (place / "fullchain.pem", place / "key.pem")
    assert (pair.fingerprint, pair.not_after) == (fingerprint(chain), NOW + 6 * DAY)
    assert pair.chain_path.read_text() == chain
    link = tmp_path / "certificates" / "current"
    assert link.resolve() == place
    assert load_pair(link / "fullchain.pem", link / "key.pem").fingerprint == fingerprint(chain)
    for path in (tmp_path / "certificates").rglob("*"):
        if not path.is_symlink():
            mode = path.stat().st_mode & 0o777
            assert mode == (0o700 if path.is_dir() else 0o600), path


def test_the_pending_key_waits_with_narrow_permissions_and_goes_after_the_install(store, issuer, tmp_path):
    pending = tmp_path / "certificates" / "pending"
    chain = issuer.chain(store.pending(1))
    assert (pending / "1" / "key.pem").stat().st_mode & 0o777 == 0o600
    assert (pending / "1").stat().st_mode & 0o777 == 0o700
    store.pending(2)
    take(store, 1, chain)
    assert names_in(pending) == {"2"}


def test_pending_keys_are_bounded_and_the_newest_stay(store, tmp_path):
    for order in range(7, 13):
        store.pending(order)
    assert names_in(tmp_path / "certificates" / "pending") == {
        str(order) for order in range(13 - PENDING_LIMIT, 13)
    }


def test_the_previous_generation_stays_and_older_ones_go(store, issuer, tmp_path):
    prints = [install(store, issuer, order) for order in (1, 2, 3)]
    kept = names_in(tmp_path / "certificates" / "generations")
    assert kept == {f"{order:010}-{prints[order - 1][:16]}" for order in (2, 3)}
    assert store.current().fingerprint == prints[2]


def test_installing_the_same_certificate_again_changes_nothing(store, issuer, tmp_path):
    install(store, issuer, 1)
    chain = issuer.chain(store.pending(2))
    place = take(store, 2, chain)
    before = tree(tmp_path)
    assert take(store, 2, chain) == place
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("make", "now", "fault"),
    [
        (lambda issuer, csr: issuer.chain(new_key_and_csr(NAME)[1]), NOW, "do not match"),
        (lambda issuer, csr: issuer.chain(csr, names=["bob.example"]), NOW, f"not for {NAME}"),
        (lambda issuer, csr: issuer.chain(csr, names=[]), NOW, "chain"),
        (lambda issuer, csr: issuer.chain(csr), NOW + 6 * DAY, "not now"),
        (lambda issuer, csr: issuer.chain(csr), NOW - dt.timedelta(seconds=1), "not now"),
        (lambda issuer, csr: issuer.chain(csr) + Issuer().pem, NOW, "chain"),
        (lambda issuer, csr: issuer.pem + issuer.chain(csr), NOW, "do not match"),
        (lambda issuer, csr: "garbage", NOW, "not a PEM"),
        (lambda issuer, csr: "", NOW, "not a PEM"),
    ],
    ids=["key", "name", "no-name", "expired", "early", "foreign-issuer", "order", "garbage", "empty"],
)
def test_a_chain_that_does_not_fit_is_refused_and_nothing_changes(store, issuer, tmp_path, make, now, fault):
    first = install(store, issuer, 1)
    csr = store.pending(2)
    before = tree(tmp_path)
    with pytest.raises(InstallError, match=fault) as caught:
        store.stage(2, make(issuer, csr), now=now)
    assert caught.value.remedy
    assert tree(tmp_path) == before
    assert store.current().fingerprint == first
    take(store, 2, issuer.chain(csr))


def test_a_certificate_for_an_order_without_key_is_refused(store, issuer):
    with pytest.raises(InstallError, match=r"key\.pem cannot be read"):
        take(store, 5, issuer.chain(new_key_and_csr(NAME)[1]))


def test_what_a_crash_left_half_written_is_removed(store, issuer, tmp_path):
    first = install(store, issuer, 1)
    home = tmp_path / "certificates"
    csr = store.pending(2)
    for parent in ("pending", "generations"):
        (home / parent / ".tmp-crash").mkdir()
        (home / parent / ".tmp-crash" / "key.pem").write_text("half a key")
    (home / ".tmp-current").symlink_to("generations/nowhere")
    assert store.current().fingerprint == first
    assert store.pending(2) == csr
    assert names_in(home / "pending") == {"2"}
    take(store, 2, issuer.chain(csr))
    assert not [path for path in home.rglob("*") if path.name.startswith(".tmp")]


def test_what_is_staged_is_not_in_use_before_it_is_served(store, issuer, tmp_path):
    first, chain = install(store, issuer, 1), issuer.chain(store.pending(2))
    assert (store.next(), store.newest().fingerprint) == (None, first)
    staged = store.stage(2, chain, now=NOW)
    again = CertificateStore(tmp_path / "certificates", NAME)
    for each in (store, again):
        assert (each.current().fingerprint, each.next(), each.newest()) == (first, staged, staged)
    assert (staged.fingerprint, staged.order) == (fingerprint(chain), 2)
    assert names_in(tmp_path / "certificates" / "pending") == set()
    assert again.stage(2, chain, now=NOW) == staged, "its key is in the generation"
    again.adopt()
    assert (store.current(), store.next(), store.newest()) == (staged, None, staged)
    store.adopt()
    assert store.current() == staged, "nothing was staged"


def test_another_certificate_takes_the_place_of_one_that_was_never_served(store, issuer, tmp_path):
    first, places = install(store, issuer, 1), []
    for order in range(2, 6):
        staged = store.stage(order, issuer.chain(store.pending(order)), now=NOW)
        places.append(staged.chain_path.parent.name)
    assert store.current().fingerprint == first
    assert store.next() == staged
    kept = names_in(tmp_path / "certificates" / "generations")
    assert kept == {f"{1:010}-{first[:16]}", places[-1]}


def test_the_generation_before_goes_once_the_new_one_was_seen_to_work(store, issuer, tmp_path):
    first = install(store, issuer, 1)
    second = install(store, issuer, 2)
    assert store.fingerprints() == {first, second}
    store.settle()
    assert store.fingerprints() == {second}
    assert names_in(tmp_path / "certificates" / "generations") == {f"{2:010}-{second[:16]}"}
    assert store.current().fingerprint == second
    staged = store.stage(3, issuer.chain(store.pending(3)), now=NOW)
    store.settle()
    assert (store.current().fingerprint, store.next()) == (second, staged)
    shutil.rmtree(staged.chain_path.parent)
    assert (store.next(), store.newest().fingerprint) == (None, second)
    with pytest.raises(InstallError):
        store.adopt()
    assert store.current().fingerprint == second, "nothing is adopted that cannot be served"


def test_what_is_only_staged_takes_no_place_that_is_empty(store, issuer):
    """Or whoever looks for the pair in use would take it past the member's hook and the engine."""
    staged = store.stage(1, issuer.chain(store.pending(1)), now=NOW)
    assert (store.current(), store.next()) == (None, staged)
    store.adopt()
    assert store.current() == staged
    again = store.stage(2, issuer.chain(store.pending(2)), now=NOW)
    damage_key(staged.key_path.parent)
    assert (store.current(), store.next()) == (None, again)


def test_one_that_is_kept_and_has_ended_is_not_staged_again(store, issuer):
    """By a registry that was restored from a copy of before the renewal, or means us no good."""
    old = issuer.chain(store.pending(1))
    take(store, 1, old)
    second = install(store, issuer, 2)
    with pytest.raises(InstallError, match="not now"):
        store.stage(1, old, now=NOW + 6 * DAY)
    assert (store.next(), store.current().fingerprint) == (None, second)


def damage_key(place: Path) -> None:
    (place / "key.pem").write_text("")


def damage_chain(place: Path) -> None:
    (place / "fullchain.pem").unlink()


def damage_pair(place: Path) -> None:
    (place / "key.pem").write_text(new_key_and_csr(NAME)[0])


@pytest.mark.parametrize("damage", [damage_key, damage_chain, damage_pair, shutil.rmtree])
def test_a_broken_generation_is_left_for_the_one_before_and_can_be_installed_again(
    store, issuer, tmp_path, damage
):
    first, csr = install(store, issuer, 1), store.pending(2)
    pending = tmp_path / "certificates" / "pending" / "2"
    shutil.copytree(pending, tmp_path / "kept")
    chain = issuer.chain(csr)
    damage(take(store, 2, chain))
    link = tmp_path / "certificates" / "current"
    assert store.current().fingerprint == first
    assert load_pair(link / "fullchain.pem", link / "key.pem").fingerprint == first
    shutil.copytree(tmp_path / "kept", pending)
    take(store, 2, chain)
    assert store.current().fingerprint == fingerprint(chain)


def test_a_lost_link_is_made_again(store, issuer, tmp_path):
    install(store, issuer, 1)
    second = install(store, issuer, 2)
    (tmp_path / "certificates" / "current").unlink()
    assert store.current().fingerprint == second
    assert (tmp_path / "certificates" / "current").is_symlink()


def test_nothing_usable_is_none(store, issuer):
    install(store, issuer, 1)
    damage_key(store.current().key_path.parent)
    assert store.current() is None


def test_a_reader_sees_only_whole_pairs_while_generations_change(store, issuer, tmp_path):
    """Through `current()` and through the link itself, over 30 switches."""
    known, done, faults, seen = {install(store, issuer, 1)}, threading.Event(), [], set()
    chains = {order: issuer.chain(store.pending(order)) for order in (2,)}

    def read():
        reader = CertificateStore(tmp_path / "certificates", NAME)
        while not done.is_set():
            pair = reader.current()
            if pair is None:
                faults.append("no pair")
            else:
                seen.add(pair.fingerprint)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for order in range(2, 32):
            chains[order] = issuer.chain(store.pending(order))
            known.add(fingerprint(chains[order]))
            take(store, order, chains[order])
    finally:
        done.set()
        thread.join(20)
    assert not thread.is_alive()
    assert not faults
    assert len(seen) > 1
    assert seen <= known


def write_pair(directory: Path, issuer) -> tuple[Path, Path]:
    key, csr = new_key_and_csr(NAME)
    cert_file, key_file = directory / "cert.pem", directory / "server.key"
    cert_file.write_text(issuer.chain(csr))
    key_file.write_text(key)
    return cert_file, key_file


def test_a_members_own_pair_is_loaded(tmp_path, issuer):
    cert_file, key_file = write_pair(tmp_path, issuer)
    pair = load_pair(cert_file, key_file)
    assert (pair.chain_path, pair.key_path) == (cert_file, key_file)
    assert pair.fingerprint == fingerprint(cert_file.read_text())


def encrypted_key(_path: Path) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))


def other_key(_path: Path) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("which", "content", "fault"),
    [
        ("cert.pem", None, "certificate file .*cert.pem cannot be read: No such file"),
        ("server.key", None, "key file .*server.key cannot be read: No such file"),
        ("cert.pem", lambda path: b"\x30\x82", "cert.pem is not a PEM certificate chain"),
        ("cert.pem", lambda path: b"", "cert.pem is not a PEM certificate chain"),
        ("server.key", lambda path: b"no", "server.key is not an unencrypted PEM private key"),
        ("server.key", encrypted_key, "server.key is not an unencrypted PEM private key"),
        ("server.key", lambda path: path.with_name("cert.pem").read_bytes(), "not an unencrypted PEM"),
        ("server.key", other_key, "certificate .*cert.pem and the key .*server.key do not match"),
        ("cert.pem", lambda path: b"x" * 300_000, "too large"),
    ],
)
def test_a_pair_that_cannot_be_used_is_refused_by_file_and_fault(tmp_path, issuer, which, content, fault):
    cert_file, key_file = write_pair(tmp_path, issuer)
    damaged = tmp_path / which
    secret = key_file.read_text().splitlines()[1]
    if content is None:
        damaged.unlink()
    else:
        damaged.write_bytes(content(damaged))
    with pytest.raises(InstallError, match=fault) as caught:
        load_pair(cert_file, key_file)
    assert caught.value.remedy
    assert secret not in str(caught.value)


def test_a_directory_instead_of_a_file_is_unreadable(tmp_path, issuer):
    cert_file, _ = write_pair(tmp_path, issuer)
    with pytest.raises(InstallError, match="cannot be read: Is a directory"):
        load_pair(cert_file, tmp_path)
