"""Certificate generations on the agent's disk: a key never leaves it, a half-written pair is never used.

    DIRECTORY/pending/ORDER/{key,csr}.pem                 waits for the certificate of that order
    DIRECTORY/generations/ORDER-FINGERPRINT/{fullchain,key}.pem
    DIRECTORY/next -> generations/...                     checked, and not served yet
    DIRECTORY/current -> generations/...                  what is served; one rename makes it of `next`

Every step writes aside (`.tmp-`), syncs and renames; changes are made under one lock file. The functions
block; a daemon calls them in a thread.
"""

import datetime as dt
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from nts_core.shell import locked, sync
from nts_core.tls import new_key_and_csr

FILE_LIMIT = 262_144  # octets of a PEM file
PENDING_LIMIT = 4  # orders whose keys are kept; the oldest go first
LOCK_DEADLINE = 10.0  # seconds
CHAIN, KEY, CSR = "fullchain.pem", "key.pem", "csr.pem"

_FAULTS = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension)


class InstallError(Exception):
    """A pair that cannot be used: what is wrong, and what the member can do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}; {remedy}")
        self.message = message
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class InstalledPair:
    """Files that belong together. `fingerprint` is SHA-256 of the leaf's DER in lower-case hex."""

    chain_path: Path
    key_path: Path
    fingerprint: str
    not_before: dt.datetime
    not_after: dt.datetime

    @property
    def order(self) -> int:
        """Of a pair in a CertificateStore: the number that its order had."""
        return _order(self.chain_path.parent)

    def left(self, now: dt.datetime) -> float:
        """The part of its life that is left, 0 to 1."""
        return min(1.0, max(0.0, (self.not_after - now) / (self.not_after - self.not_before)))


def load_pair(cert_file: Path, key_file: Path) -> InstalledPair:
    """Check that both files can be read, are PEM, and belong together; else InstallError."""
    leaf = _parse_chain(_read(cert_file, "certificate"), cert_file)[0]
    _match(leaf, _read(key_file, "key"), cert_file, key_file)
    return InstalledPair(
        cert_file, key_file, _fingerprint(leaf), leaf.not_valid_before_utc, leaf.not_valid_after_utc
    )


@dataclass(frozen=True, slots=True)
class Bundle:
    """A key and its chain as one PEM text: what is one file cannot be half of two."""

    pem: str = field(repr=False)
    fingerprint: str


def bundle(chain: bytes, key: bytes, domain: str) -> Bundle:
    """Key before chain, written anew from what was read, for a server of `domain`; InstallError otherwise."""
    certificates = _parse_chain(chain, Path(CHAIN))
    _match(certificates[0], key, Path(CHAIN), Path(KEY))
    names: list[str] = []
    with suppress(*_FAULTS, x509.ExtensionNotFound):
        names = _names(certificates[0])
    if domain not in names:
        raise InstallError(f"the certificate is not for {domain}", "use the pair that was issued for it")
    private = load_pem_private_key(key, password=None)
    text = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return Bundle(text + _pem(certificates), _fingerprint(certificates[0]))


class CertificateStore:
    """The keys and certificates of one domain under `directory`, which is made with mode 0700."""

    def __init__(self, directory: Path, domain: str) -> None:
        self._directory = directory
        self._domain = domain
        self._pending = directory / "pending"
        self._generations = directory / "generations"
        self._current, self._next = directory / "current", directory / "next"
        for path in (directory, self._pending, self._generations):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def pending(self, order: int) -> str:
        """The CSR (PEM) for an order: the same one each time until its certificate is installed."""
        place = self._pending / str(order)
        with self._lock():
            if not place.exists():
                key, csr = new_key_and_csr(self._domain)
                self._write(place, {KEY: key, CSR: csr})
                # By age, as the numbers of a registry that was restored begin lower again.
                others = sorted(self._pending.iterdir(), key=lambda path: path.stat().st_mtime_ns)
                for old in others[:-PENDING_LIMIT]:
                    if old != place:
                        _remove(old)
            return (place / CSR).read_text()

    def next_order(self) -> int:
        """A number above those of all orders that something is kept of here, whoever numbered them."""
        generations = map(_order, self._generations.glob("[0-9]*"))
        pending = (int(path.name) for path in self._pending.iterdir() if path.name.isdecimal())
        return 1 + max((*generations, *pending), default=0)

    def stage(self, order: int, chain_pem: str, *, now: dt.datetime) -> InstalledPair:
        """Check the chain against the order's key, the domain and `now`; it is the one to serve `next`.

        Also one that is kept may be staged. InstallError leaves everything as it was.
        """
        source, key_file = Path(f"order {order}"), self._pending / str(order) / KEY
        chain = _parse_chain(chain_pem.encode(), source)
        with self._lock():
            place = self._generations / f"{order:010}-{_fingerprint(chain[0])[:16]}"
            pair = self._usable(place)
            key = None if pair else _read(key_file, "key")
            if key is not None:
                _match(chain[0], key, source, key_file)
            _check_chain(chain, self._domain, now)
            if key is not None:
                if place.exists():
                    shutil.rmtree(place)
                self._write(place, {CHAIN: _pem(chain), KEY: key.decode()})
            current, staged = self._target(self._current), self._target(self._next)
            if place != current:
                self._point(self._next, place)
                if staged is not None and staged not in {place, current} and staged.exists():
                    _remove(staged)
            for old in tuple(self._pending.iterdir()):
                if old.name.isdecimal() and int(old.name) <= order:
                    _remove(old)
            return pair or load_pair(place / CHAIN, place / KEY)

    def next(self) -> InstalledPair | None:
        """The pair that was staged and is not served yet; None when there is none."""
        target = self._target(self._next)
        return None if target is None else self._usable(target)

    def adopt(self) -> None:
        """What was staged is served now. The generation before it stays until `settle`, older ones go.

        Raises InstallError for one that cannot be used any more.
        """
        with self._lock():
            place, before = self._target(self._next), self._target(self._current)
            if place is not None:
                load_pair(place / CHAIN, place / KEY)
                self._next.replace(self._current)
                sync(self._directory)
                self._keep_only(place, before)

    def settle(self) -> None:
        """What is served works, as seen from outside: the generation before it is needed no more."""
        with self._lock():
            self._keep_only(self._target(self._current), self._target(self._next))

    def current(self) -> InstalledPair | None:
        """The pair in use, at paths whose content never changes; None when there is none.

        A `current` that is missing or leads to nothing usable is turned to the newest usable generation but that which is
        only staged.
        """
        target = self._target(self._current)
        if target is not None and (pair := self._usable(target)):
            return pair
        with self._lock():  # an `adopt` may have switched meanwhile, or the state is half written
            target, staged = self._target(self._current), self._target(self._next)
            others = [place for place in sorted(self._generations.iterdir(), reverse=True) if place != staged]
            for place in [*([target] if target else []), *others]:
                if pair := self._usable(place):
                    if place != target:
                        self._point(self._current, place)
                    return pair
        return None

    def newest(self) -> InstalledPair | None:
        """The last one that was issued, whether it is served already or not."""
        return self.next() or self.current()

    def fingerprints(self) -> frozenset[str]:
        """Of all pairs that are kept."""
        pairs = map(self._usable, tuple(self._generations.glob("[0-9]*")))
        return frozenset(pair.fingerprint for pair in pairs if pair is not None)

    def _target(self, link: Path) -> Path | None:
        try:
            return self._generations / link.readlink().name
        except OSError:
            return None

    def _usable(self, place: Path) -> InstalledPair | None:
        with suppress(InstallError):
            return load_pair(place / CHAIN, place / KEY)
        return None

    def _point(self, link: Path, place: Path) -> None:
        aside = self._directory / f".tmp-{link.name}"
        aside.symlink_to(place.relative_to(self._directory))
        aside.replace(link)
        sync(self._directory)

    def _keep_only(self, *places: Path | None) -> None:
        for old in set(self._generations.iterdir()) - {*places}:
            _remove(old)

    def _write(self, place: Path, files: Mapping[str, str]) -> None:
        aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=place.parent))  # mkdtemp gives 0700
        for name, text in files.items():
            (aside / name).touch(mode=0o600)
            (aside / name).write_text(text)
            sync(aside / name)
        sync(aside)
        aside.rename(place)
        sync(place.parent)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """The one writer, in any process; what an earlier one left half written is removed first."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self._directory / ".lock", LOCK_DEADLINE))
            except TimeoutError as error:
                raise InstallError(str(error), "end the other agent") from None
            for link in self._directory.glob(".tmp-*"):
                link.unlink()
            for parent in (self._pending, self._generations):
                for leftover in parent.glob(".tmp-*"):
                    shutil.rmtree(leftover)
            yield


def _order(place: Path) -> int:
    return int(place.name.partition("-")[0])


def _remove(place: Path) -> None:
    """As a whole or not at all: of a request without its key, or half a generation, nobody could make sense."""
    aside = place.with_name(f".tmp-{place.name}")
    place.rename(aside)
    shutil.rmtree(aside)


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            octets = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise InstallError(
            f"the {what} file {path} cannot be read: {error.strerror}",
            "check the path and that the agent's user may read it",
        ) from error
    if len(octets) > FILE_LIMIT:
        raise InstallError(f"the {what} file {path} is too large", "give a PEM file")
    return octets


def chain_fingerprint(pem: str) -> str:
    """SHA-256 of the leaf's DER, lower-case hex. Raises InstallError."""
    return _fingerprint(_parse_chain(pem.encode(), Path("the certificate"))[0])


def _parse_chain(pem: bytes, source: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except _FAULTS as error:
        raise InstallError(
            f"{source} is not a PEM certificate chain", "give the full chain in PEM"
        ) from error


def _match(leaf: x509.Certificate, key_pem: bytes, source: Path, key_file: Path) -> None:
    try:
        public = load_pem_private_key(key_pem, password=None).public_key()
    except _FAULTS as error:
        raise InstallError(
            f"{key_file} is not an unencrypted PEM private key", "give the key in PEM without a passphrase"
        ) from error
    spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public.public_bytes(*spki) != leaf.public_key().public_bytes(*spki):
        raise InstallError(
            f"the certificate {source} and the key {key_file} do not match",
            "give the key that the certificate was issued for",
        )


def _check_chain(chain: list[x509.Certificate], domain: str, now: dt.datetime) -> None:
    """Name, order of the chain and validity; the remedy of each is a new order."""
    leaf, remedy = chain[0], "wait for the registry's next order; it is asked for at the next report"
    try:
        names = _names(leaf)
        for certificate, issuer in pairwise(chain):
            certificate.verify_directly_issued_by(issuer)
    except (*_FAULTS, x509.ExtensionNotFound, InvalidSignature) as error:
        raise InstallError(
            "the chain does not lead from leaf to issuer, each signing the one before", remedy
        ) from error
    if domain not in names:
        raise InstallError(f"the certificate is not for {domain}", remedy)
    if not leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc:
        raise InstallError(
            f"the certificate is valid from {leaf.not_valid_before_utc} to {leaf.not_valid_after_utc}, not now",
            "check the clock of this host, then " + remedy,
        )


def _names(leaf: x509.Certificate) -> list[str]:
    """The DNS names of a certificate; one of `_FAULTS` or ExtensionNotFound where there are none."""
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.DNSName)


def _pem(chain: list[x509.Certificate]) -> str:
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in chain)


def _fingerprint(leaf: x509.Certificate) -> str:
    return leaf.fingerprint(hashes.SHA256()).hex()
