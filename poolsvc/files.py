"""The files that the settings name: whether `serve` can use them, and whether others can read the secrets."""

import os
import ssl
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from sqlalchemy import make_url

from nts_core.acme import AcmeError, load_account_key, load_binding_key, secret_file
from nts_core.client import ClientError, load_roots
from poolsvc.config import AuthoritySettings, Settings
from poolsvc.derived import RegistryKey
from poolsvc.errors import PoolError
from poolsvc.geo import GeoError, check_file
from poolsvc.primary import read_secret


class UnusableFile(PoolError):
    """`field` is the setting that names the file."""

    code = "unusable-file"


# What only the process that holds the account reads.
ACCOUNT_FILES = ("ca.account_key_file", "ca.binding_key_file")
# Without them less is known of servers, which is an alarm and no reason not to serve.
GEO_FILES = ("geo.database",)


def check_files(settings: Settings, without: Collection[str] = ()) -> None:
    """Raise the first fault. A mistake is better said at the start than in an alarm."""
    for fault in faults(settings, without):
        raise fault


def check_account_files(ca: AuthoritySettings) -> None:
    """Raise the first fault of those files that only the process reads which holds the account."""
    for setting, check in _ACCOUNT_CHECKS.items():
        try:
            check(ca)
        except AcmeError as error:
            raise _fault(setting, error.detail, _REMEDIES[setting]) from None


def faults(settings: Settings, without: Collection[str] = ()) -> Iterator[UnusableFile]:
    """What keeps `serve` and its children from using their files, each with the setting's name.

    Of a CA with `socket` the account's files are another user's, and looked at by `acme serve`.
    """
    for setting, check in (
        ("dns.tsig_secret_file", _tsig_secret),
        ("dns.embedded.secondaries.tsig_secret_file", _secondary_secrets),
        ("key_file", _registry_key),
        *((setting, _of_all(check)) for setting, check in _ACCOUNT_CHECKS.items()),
        ("ca.ca_file", _ca_roots),
        ("mail.password_file", _mail_password),
        ("mail.ca_file", _mail_roots),
        ("roots_file", _roots),
        ("tls_certificate, tls_key", _tls),
        ("oidc", _oidc),
        ("geo.database", _geo),
    ):
        if setting in without:
            continue
        try:
            check(settings)
        except ClientError as error:
            yield _fault(setting, error.message, error.remedy)
        except (AcmeError, GeoError, OSError, ValueError) as error:
            yield _fault(setting, str(error), _REMEDIES[setting])


def exposed(settings: Settings, file: Path) -> Iterator[UnusableFile]:
    """Secrets that others than the owner may read or change, or that belong to somebody else.

    `file` is the settings' own, which holds a secret when the database has a password.
    """
    for setting, path in _secrets(settings, file):
        try:
            status = path.stat()
        except OSError:  # `faults` tells of files that must exist
            continue
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            mode = stat.S_IMODE(status.st_mode)
            yield _fault(setting, f"{path} has the mode {mode:04o}", f"chmod 600 {path}")
        if status.st_uid != os.geteuid():
            yield _fault(setting, f"{path} belongs to user {status.st_uid}", f"chown {os.geteuid()} {path}")


def _secrets(settings: Settings, file: Path) -> Iterator[tuple[str, Path]]:
    """The settings that name secrets, and the files."""
    yield from _tsig_secrets(settings)
    yield "key_file", settings.key_file
    for ca in settings.ca.with_rehearsal:
        if ca.socket is None:
            yield "ca.account_key_file", ca.account_key_file
            if ca.binding_key_file is not None:
                yield "ca.binding_key_file", ca.binding_key_file
    for provider in settings.oidc:
        yield f"oidc {provider.name}: client_secret_file", provider.client_secret_file
    if settings.mail is not None and settings.mail.password_file is not None:
        yield "mail.password_file", settings.mail.password_file
    if settings.tls_key is not None:
        yield "tls_key", settings.tls_key
    if settings.web_tls.acme and settings.certificate_file is not None:
        yield "web_tls.directory", settings.certificate_file  # the key as well
    if settings.database_file is not None:
        yield "database", settings.database_file
    elif make_url(settings.database).password is not None:
        yield "database", file


def _tsig_secrets(settings: Settings) -> Iterator[tuple[str, Path]]:
    yield "dns.tsig_secret_file", settings.dns.tsig_secret_file
    if settings.dns.embedded is not None:
        for each in settings.dns.embedded.secondaries:
            yield "dns.embedded.secondaries.tsig_secret_file", each.tsig_secret_file


_REMEDIES = {
    "dns.tsig_secret_file": "give a readable file with the key's base64 secret",
    "dns.embedded.secondaries.tsig_secret_file": "give a readable file with the key's base64 secret",
    "key_file": "give the registry's key, 32 octets in base64, readable for this user; "
    "without the file `serve` makes one",
    "ca.account_key_file": "give the account's P-256 key in PEM, for this user's eyes only (chmod 600); "
    "without the file a new account is made",
    "ca.binding_key_file": "give the key as the CA gave it, for this user's eyes only (chmod 600)",
    "mail.password_file": "give a readable file with the password in one line",
    "tls_certificate, tls_key": "give a PEM chain and its key",
    "geo.database": "give files in MaxMind's format (.mmdb), and replace one by renaming a whole new one over it",
    "oidc": "give a readable file with the secret that the provider gave for the client",
}


def _fault(setting: str, message: str, remedy: str) -> UnusableFile:
    return UnusableFile(f"{setting}: {message}", remedy=remedy, field=setting)


def _tsig_secret(settings: Settings) -> None:
    file = settings.dns.tsig_secret_file
    if settings.dns.embedded is None or file.exists():  # `serve` makes the embedded server's own
        read_secret(file)


def _secondary_secrets(settings: Settings) -> None:
    for each in settings.dns.embedded.secondaries if settings.dns.embedded is not None else ():
        read_secret(each.tsig_secret_file)


def _registry_key(settings: Settings) -> None:
    if settings.key_file.exists():
        RegistryKey.load(settings.key_file)


def _account_key(ca: AuthoritySettings) -> None:
    if secret_file(ca.account_key_file).exists():
        load_account_key(ca.account_key_file)


def _binding_key(ca: AuthoritySettings) -> None:
    if ca.binding_key_file is not None:
        load_binding_key(ca.binding_key_file)


_ACCOUNT_CHECKS = dict(zip(ACCOUNT_FILES, (_account_key, _binding_key), strict=True))


def _of_all(check: Callable[[AuthoritySettings], None]) -> Callable[[Settings], None]:
    """A check of all CAs whose accounts are ours to hold."""

    def check_all(settings: Settings) -> None:
        for ca in settings.ca.with_rehearsal:
            if ca.socket is None:
                check(ca)

    return check_all


def _ca_roots(settings: Settings) -> None:
    for ca in settings.ca.with_rehearsal:
        if ca.ca_file is not None:
            load_roots(ca.ca_file)


def _mail_password(settings: Settings) -> None:
    if settings.mail is not None and settings.mail.password_file is not None:
        password = settings.mail.password_file.read_text().strip()
        if not password or not password.isprintable():
            raise ValueError("there is no password in the file")


def _mail_roots(settings: Settings) -> None:
    if settings.mail is not None and settings.mail.ca_file is not None:
        load_roots(settings.mail.ca_file)


def _roots(settings: Settings) -> None:
    load_roots(settings.roots_file)


def _tls(settings: Settings) -> None:
    if settings.tls_certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Without a password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password="")


def _oidc(settings: Settings) -> None:
    for provider in settings.oidc:
        if not provider.client_secret_file.read_text().strip():
            raise ValueError(f"{provider.name}: there is no secret in {provider.client_secret_file}")
        if provider.ca_file is not None:
            load_roots(provider.ca_file)


def _geo(settings: Settings) -> None:
    for file in settings.geo.database:
        check_file(file)
