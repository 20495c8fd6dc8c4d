"""New keys in place of those that were lost or seen by others; docs/runbook.md has the rest of each case."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nts_core.shell import replace_file, sync
from poolsvc.config import Settings
from poolsvc.derived import RegistryKey
from poolsvc.errors import PoolError
from poolsvc.primary import new_secret
from poolsvc.setup import tsig_files


class KeyNotRenewed(PoolError):
    """The key in use is still the one before."""

    code = "key-not-renewed"


@dataclass(frozen=True, slots=True)
class TsigRenewal:
    """`secret` has the new key, `old` the one before if there was one; the others are for the primary, by its kind."""

    secret: Path
    old: Path
    knot: Path
    bind: Path
    powerdns: Path


def renew_tsig(settings: Settings) -> TsigRenewal:
    """Put a new TSIG secret into its file and keep the one before beside it. Raises KeyNotRenewed.

    A call that died is repeated; one that was not followed by the primary is not, or both keys would be lost.
    """
    secret = settings.dns.tsig_secret_file
    old = secret.with_name(f"{secret.name}.old")
    key = new_secret()
    files = tsig_files(settings.dns.tsig_name, settings.dns.tsig_algorithm, key)
    knot, bind, powerdns = (secret.with_name(name) for name in files)
    try:
        if not old.exists():
            with suppress(FileNotFoundError):  # a secret that was lost has nothing to keep
                os.link(secret, old)
        elif old.read_bytes() != secret.read_bytes():
            raise KeyNotRenewed(
                f"{old} is there: the renewal before this one was not finished",
                remedy=f"finish it: see that `poolsvc doctor` is content with the primary, then remove {old}",
            )
        for name, content in files.items():
            replace_file(secret.with_name(name), content)
        replace_file(secret, f"{key}\n".encode())
        sync(secret.parent)
    except OSError as error:
        raise KeyNotRenewed(
            f"dns.tsig_secret_file: {error}",
            remedy="run this as the user that owns the secret and its directory",
        ) from None
    return TsigRenewal(secret, old, knot, bind, powerdns)


def renew_embedded_tsig(settings: Settings) -> None:
    """Put a new TSIG secret into the file that the embedded server and its publisher read. Raises KeyNotRenewed."""
    try:
        replace_file(settings.dns.tsig_secret_file, f"{new_secret()}\n".encode())
    except OSError as error:
        raise KeyNotRenewed(
            f"dns.tsig_secret_file: {error}",
            remedy="run this as the user that owns the secret and its directory; `serve` makes both at its first start",
        ) from None


def renew_registry_key(settings: Settings) -> None:
    """Put another registry key into its file. Raises KeyNotRenewed."""
    try:
        RegistryKey.renew(settings.key_file)
    except OSError as error:
        raise KeyNotRenewed(
            f"key_file: {error}", remedy="run this as the user that owns the key and its directory"
        ) from None
