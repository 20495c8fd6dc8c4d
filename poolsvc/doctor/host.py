"""What is on this host: files, database, clock, ports, the registry's own certificate and address."""

import asyncio
import errno
import os
import shutil
import socket
from datetime import datetime, timedelta
from ipaddress import ip_address
from urllib.parse import urlsplit

import httpx
from cryptography import x509
from sqlalchemy import false, update
from sqlalchemy.exc import SQLAlchemyError

from nts_core.acme import secret_file
from nts_core.certificates import ChainError, chain_facts, load_chain
from nts_core.kernel import KernelClock, read_kernel
from nts_core.verdict import Verdict
from poolsvc import schema
from poolsvc.config import split_endpoint
from poolsvc.db import Database
from poolsvc.doctor.report import (
    QUESTION_TIMEOUT,
    Examination,
    Finding,
    fail,
    ok,
    skipped,
    warn,
    worst,
)
from poolsvc.files import exposed, faults
from poolsvc.models import Server

LITTLE_SPACE, NO_SPACE = 1024**3, 100 * 1024**2  # octets free for SQLite
POOR_CLOCK_NS = 500_000_000
LATE = 0.2  # of a certificate's life; whoever renews it should have done so


async def files(at: Examination) -> Finding:
    found = [fail(fault.detail, fault.remedy) for fault in await asyncio.to_thread(list, faults(at.settings))]
    keyless = [
        ca.name
        for ca in at.settings.ca.with_rehearsal
        if ca.socket is None and not secret_file(ca.account_key_file).exists()
    ]
    if keyless and not found:
        return warn(
            f"there is no ca.account_key_file for {', '.join(keyless)}",
            "`serve` makes it at its first start; keep a copy of it then",
        )
    return worst(found) if found else ok("all can be used")


async def secrets(at: Examination) -> Finding:
    found = [fail(fault.detail, fault.remedy) for fault in exposed(at.settings, at.file)]
    return worst(found) if found else ok("for this user's eyes only")


async def database(at: Examination) -> Finding:
    file = at.settings.database_file
    if file is not None and not file.exists():
        return fail(f"there is no {file}", "run `poolsvc migrate --config FILE`")
    await asyncio.to_thread(schema.check_current, at.settings)
    opened = Database(at.settings.database)
    try:
        async with opened.transaction() as session:
            # Asks for the right to write and changes no row.
            await session.execute(update(Server).where(false()).values(name=Server.name))
    except (SQLAlchemyError, OSError) as error:
        return fail(f"it cannot be written: {error}", "let this user write to the database and its directory")
    finally:
        await opened.close()
    if file is None:
        return ok("up to date and writable")
    free = shutil.disk_usage(file.parent).free
    text = f"up to date and writable, {free // 1024**2:,} MiB free"
    if free < NO_SPACE:
        return fail(text, f"make room on the disk of {file.parent}")
    return warn(text, f"make room on the disk of {file.parent}") if free < LITTLE_SPACE else ok(text)


async def clock(_: Examination) -> Finding:
    return judge_clock(read_kernel())


def judge_clock(kernel: KernelClock) -> Finding:
    """A registry with a wrong clock would judge its members by it."""
    remedy = "run a time daemon (chronyd, ntpd) and wait until it has set the clock"
    if not kernel.synchronised:
        return fail("the kernel says that it is not synchronised", remedy)
    text = f"synchronised, error at most {kernel.max_error_ns / 1e6:.3g} ms, leap second: {kernel.leap.name.lower()}"
    return warn(text, remedy) if kernel.max_error_ns > POOR_CLOCK_NS else ok(text)


async def listen(at: Examination) -> Finding:
    return worst(await asyncio.gather(*(_endpoint(at, endpoint) for endpoint in at.settings.listen)))


async def _endpoint(at: Examination, endpoint: str) -> Finding:
    address, port = split_endpoint(endpoint)
    try:
        socket.create_server(
            (address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        ).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            if await _is_ours(at, endpoint):
                return ok(f"{endpoint}: our registry answers")
            return fail(f"{endpoint}: another program has it", "end that program, or choose another `listen`")
        return fail(
            f"{endpoint}: {os.strerror(error.errno or 0)}",
            "choose an address of this host and a port that this user may take",
        )
    return ok(f"{endpoint}: free")


async def _is_ours(at: Examination, endpoint: str) -> bool:
    """Whether the registry of this pool answers there; its certificate is another check's."""
    scheme = "http" if at.settings.certificate_file is None else "https"
    try:
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=QUESTION_TIMEOUT) as client:  # noqa: S501
            answer = await client.get(f"{scheme}://{endpoint}/v1/pool")
            return bool(answer.json().get("pool") == at.settings.pool)
    except (httpx.HTTPError, ValueError, AttributeError):
        return False


async def certificate(at: Examination) -> Finding:
    path = at.settings.certificate_file
    if path is None:
        return skipped("a reverse proxy's: neither tls_certificate nor web_tls.acme is set")
    remedy = "renew tls_certificate; `serve` sees that by itself"
    if at.settings.web_tls.acme:
        remedy = "see web_certificate_failed in the log of `serve`, and let the CA reach web_tls.http_listen"
        if not path.exists():
            return warn("there is none yet", "run `serve`, which gets it from the CA")
    host = urlsplit(at.settings.public_url).hostname or ""
    try:
        text = path.read_text()
        facts, leaf = chain_facts(text), load_chain(text)[0]
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, ChainError, x509.ExtensionNotFound) as error:
        return fail(f"{path}: {error}", "give a PEM chain whose first certificate names the registry")
    if not _names(names, host):
        return fail(f"it does not name {host}, the host of public_url", "get a certificate for that name")
    return judge_certificate(facts.not_before, facts.not_after, at.now, remedy)


def judge_certificate(not_before: datetime, not_after: datetime, now: datetime, remedy: str) -> Finding:
    left = not_after - now
    if now < not_before:
        return fail(f"not valid before {not_before:%Y-%m-%d %H:%M} UTC", "check the clock, or wait")
    if left <= timedelta(0):
        return fail(f"it ended on {not_after:%Y-%m-%d %H:%M} UTC", remedy)
    text = f"good for {left.days} days" if left.days else f"good for {left.seconds // 3600} hours"
    return warn(text, remedy) if left < (not_after - not_before) * LATE else ok(text)


def _names(names: x509.SubjectAlternativeName, host: str) -> bool:
    try:
        return ip_address(host) in names.get_values_for_type(x509.IPAddress)
    except ValueError:
        known = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
        return host in known or f"*.{host.partition('.')[2]}" in known


async def public_url(at: Examination) -> Finding:
    parts = urlsplit(at.settings.public_url)
    host = parts.hostname or ""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, parts.port, type=socket.SOCK_STREAM)
    except OSError as error:
        return fail(f"{host}: {error.strerror or error}", "publish an address for the host of public_url")
    except UnicodeError:
        return fail(f"{host!r} is not a host", "correct public_url")
    addresses = sorted({str(entry[4][0]) for entry in found})
    text = host if [host] == addresses else f"{host} is {', '.join(addresses)}"
    public = [address for address in addresses if ip_address(address.partition("%")[0]).is_global]
    if not public and not at.settings.allow_private_addresses:
        return warn(f"members cannot reach {text}", "set public_url to the registry's public address")
    if parts.scheme == "http" and public:
        return fail(f"{text}, over plain http", "set public_url to https://: agents accept nothing else")
    if at.settings.allow_private_addresses:
        remedy = "leave allow_private_addresses out but for a trial on one machine"
        return warn(f"{text}; the registry dials private addresses as well", remedy)
    return Finding(Verdict.OK, text)
