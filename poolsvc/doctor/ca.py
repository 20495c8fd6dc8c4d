"""The CAs, as far as they can be asked without an account, and the processes that hold the accounts."""

import asyncio
import os
import stat
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from nts_core.acme import AcmeError, read_terms
from nts_core.verdict import Verdict
from poolsvc.acme_client import RemoteAccount
from poolsvc.acme_process import account_of, is_open_to_others
from poolsvc.config import AUTO_PROFILE, AuthoritySettings, Settings
from poolsvc.doctor.report import (
    DEADLINE,
    QUESTION_TIMEOUT,
    Examination,
    Finding,
    fail,
    ok,
    skipped,
    warn,
    worst,
)

# Of no CA: the process refuses to ask there, without a word to its CA.
_NOWHERE = "https://doctor.invalid/"


async def directory(at: Examination) -> Finding:
    """Each reachable over TLS that we trust, and of the name, profile and terms that the settings suppose."""
    authorities = at.settings.ca.with_rehearsal
    found = await asyncio.gather(*map(_directory, authorities))
    last = max(found, key=lambda finding: list(Verdict).index(finding.verdict))
    texts = [f"{ca.name}: {finding.found}" for ca, finding in zip(authorities, found, strict=True)]
    return replace(last, found="; ".join(texts)) if len(texts) > 1 else last


async def _directory(ca: AuthoritySettings) -> Finding:
    try:
        terms = await read_terms(replace(account_of(ca), timeout=int(DEADLINE / 3)))
    except AcmeError as error:
        return fail(
            f"{ca.directory_url}: {error.detail}",
            "check ca.directory_url and ca.ca_file, the network, and the CA's status page",
        )
    if terms.account_binding and ca.binding_key_id is None:
        return fail(
            "the CA wants accounts that are bound to a customer",
            "set ca.binding_key_id and ca.binding_key_file to what the CA gave you",
        )
    if ca.profile != AUTO_PROFILE and ca.profile not in terms.profiles:
        offered = ", ".join(terms.profiles) or "none"
        return fail(
            f"the CA has no profile {ca.profile}",
            f'set ca.profile to "{AUTO_PROFILE}" or to one that it has: {offered}',
        )
    if terms.caa_identities and ca.caa_identity not in terms.caa_identities:
        names = ", ".join(terms.caa_identities)
        return fail(
            f"the CA does not know itself as {ca.caa_identity}",
            f"set ca.caa_identity to one of its names: {names}",
        )
    if not terms.caa_identities:
        return warn(
            "reachable; its directory names no CAA identity",
            f"see in the CA's documents that {ca.caa_identity} is its name in CAA records",
        )
    return ok(f"reachable, {ca.caa_identity}; terms of service: {terms.terms_of_service or 'none'}")


async def sockets(at: Examination) -> Finding:
    """Each `socket` that the settings name: there, out of strangers' reach, and our process answers this user."""
    found = [
        _exposed(ca.socket) or await _answers(at.settings, ca)
        for ca in at.settings.ca.with_rehearsal
        if ca.socket is not None
    ]
    return (
        worst(found) if found else skipped("no CA has a socket: `serve` holds the accounts by its children")
    )


def _exposed(path: Path) -> Finding | None:
    """Whether somebody else may have put it there, or may use it; None if not."""
    try:
        found = path.lstat()
        is_open = is_open_to_others(path.parent, found.st_uid)
    except OSError as error:
        return fail(
            f"{path}: {error.strerror}", "start `poolsvc acme serve`, and let this user enter the directory"
        )
    if not stat.S_ISSOCK(found.st_mode):
        return fail(f"{path} is no socket", "remove it, and start `poolsvc acme serve` again")
    if is_open:
        return fail(
            f"others than user {found.st_uid} may write to {path.parent}",
            f"chmod go-w {path.parent}, and let it belong to that user or to root",
        )
    if found.st_mode & stat.S_IRWXO:
        return fail(f"everybody may connect to {path}", f"chmod o= {path}")
    return None


async def _answers(settings: Settings, ca: AuthoritySettings) -> Finding:
    remedy = (
        f"start `poolsvc acme serve --ca {ca.name}` again, and let this user (uid {os.geteuid()})"
        " be its user or in ca.socket_group"
    )
    try:
        with closing(await RemoteAccount.connect(settings, ca)) as account:
            try:
                async with asyncio.timeout(QUESTION_TIMEOUT):
                    await account.poll(_NOWHERE)
            except AcmeError:
                if account.has_ended:
                    return fail(f"{ca.socket}: who listens there refuses this user, or is not ours", remedy)
            except TimeoutError:
                return fail(f"{ca.socket}: no answer within {QUESTION_TIMEOUT:g} s", remedy)
    except AcmeError as error:
        return fail(error.detail, remedy)
    return ok(f"{ca.socket}: our process answers")
