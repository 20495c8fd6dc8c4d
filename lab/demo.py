"""`make demo`: the whole life of a pool on this machine. Ends with status 0 only if every statement was checked."""

import argparse
import asyncio
import json
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.query
import dns.rcode
from rich.console import Console
from rich.live import Live
from rich.table import Table

from lab.peers import ChronydClient
from lab.pool import POOL, LabPool, Member
from lab.processes import LabError, wait_until
from member_agent.challenges import Responder
from member_agent.errors import ExitStatus
from nts_core.acme import AcmeAccount, AcmeConfig, OrderState
from nts_core.control import ACME_PATH, Stage, StageStatus
from nts_core.tls import new_key_and_csr

GOOD = ("alice", "bob", "carol", "dave", "erin")
WRONG = "mallory"
WRONG_CLOCK = 5
SOURCES = 4
_WAIT = 40.0
# Pebble's words for a name that does not exist.
_UNRESOLVED = "could not resolve"


class Unproved(Exception):
    """A statement of the demo that turned out false."""


@dataclass(slots=True)
class Story:
    """What was said on the screen, each with how it was checked; and what is worth keeping as JSON."""

    console: Console
    started: float = field(default_factory=time.monotonic)
    began: float = field(default_factory=time.time)
    statements: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def at(self) -> float:
        return round(time.monotonic() - self.started, 2)

    def chapter(self, title: str) -> None:
        self.console.print(f"\n[bold]{title}[/]", soft_wrap=True)

    def check(self, statement: str, holds: object) -> None:
        """Say a statement, once it has been found true. Raises Unproved when it has not."""
        self.statements.append({"statement": statement, "holds": bool(holds), "at": self.at()})
        mark = "[green]✓[/]" if holds else "[red]✗[/]"
        self.console.print(f"  {mark} {statement} [dim]{self.at():.1f} s[/]", soft_wrap=True)
        if not holds:
            raise Unproved(statement)


def tell(story: Story, pool: LabPool) -> None:
    """The story, chapter by chapter."""
    members = _join(story, pool)
    _admit(story, pool, members)
    first = _look_up(story, pool)
    leaver = next(member for member in members if member.domain == first[0])
    _leave(story, pool, leaver)
    _replace(story, pool, leaver, first)


def _join(story: Story, pool: LabPool) -> list[Member]:
    story.chapter("Six servers join; one of them has a wrong clock")
    good = [pool.add(name) for name in GOOD]
    wrong = pool.add(WRONG, "--clock-offset", str(WRONG_CLOCK))
    with ThreadPoolExecutor(len(GOOD) + 1) as threads:
        list(threads.map(Member.start, (*good, wrong)))
    story.check(
        "all six registered, joined with their tokens, and run an agent",
        all(member.process.running() for member in (*good, wrong)),
    )
    return [*good, wrong]


def _admit(story: Story, pool: LabPool, members: list[Member]) -> None:
    views: dict[str, dict[str, Any]] = {}

    def settled() -> bool:
        views.update((member.name, member.view()) for member in members)
        return all(views[name]["in_dns"] for name in GOOD) and _failed_stage(views[WRONG]) is not None

    with Live(console=story.console, refresh_per_second=8, transient=True) as live:

        def look() -> bool:
            done = settled()
            live.update(_progress(story, views))
            return done

        wait_until(look, "five servers in DNS, one refused", _WAIT)
    story.console.print(_progress(story, views))
    story.check(
        f"{', '.join(GOOD)} proved their addresses, hold certificates, were probed, and are active",
        all(views[name]["state"] == "active" for name in GOOD),
    )
    refused = _failed_stage(views[WRONG])
    assert refused is not None
    story.check(
        f"{WRONG} is refused at the stage [bold]{refused['stage']}[/]: {refused['detail']}",
        refused["stage"] == "offset"
        and f"+{WRONG_CLOCK}." in refused["detail"]
        and not views[WRONG]["in_dns"],
    )
    targets = set(_srv(pool.primary.address, pool.primary.port))
    story.check(
        f"the SRV record _ntske._tcp.{POOL} holds the five, and not {WRONG}",
        targets == {f"{name}.servers.{POOL}" for name in GOOD},
    )
    story.facts["stages"] = {name: views[name]["stages"] for name in views}


def _failed_stage(view: dict[str, Any]) -> dict[str, Any] | None:
    return next((stage for stage in view["stages"] if stage["status"] == "failed"), None)


def _progress(story: Story, views: dict[str, dict[str, Any]]) -> Table:
    """Each stage of each member with the second at which it was met, or what stands in its way."""
    table = Table(box=None, pad_edge=False)
    table.add_column("  stage")
    for name in views:
        table.add_column(name, justify="right")
    for position, stage in enumerate(Stage):
        cells = (_cell(story, view["stages"][position]) for view in views.values())
        table.add_row(f"  {stage}", *cells)
    table.add_row("  [bold]state[/]", *(f"[bold]{view['state']}[/]" for view in views.values()))
    return table


def _cell(story: Story, stage: dict[str, Any]) -> str:
    if stage["status"] == StageStatus.MET:
        return f"{datetime.fromisoformat(stage['since']).timestamp() - story.began:.1f} s"
    return "[red]failed[/]" if stage["status"] == StageStatus.FAILED else "[dim]waiting[/]"


def _look_up(story: Story, pool: LabPool) -> list[str]:
    story.chapter(f"A client asks the pool for {SOURCES} independent sources")
    found = pool.client("--count", str(SOURCES))
    document = found.document
    _show_sources(story, document)
    good = [source for source in document["sources"] if source["verdict"] == "truechimer"]
    story.check(
        f"DNSSEC validated from the zone's key, {SOURCES} sources agree (pool-client ended with 0)",
        found.status == 0 and len(good) == SOURCES and document["error"] is None,
    )
    story.check(
        "the four have four different addresses, and none is the wrong clock's",
        len({source["address"] for source in good}) == SOURCES
        and all(not source["name"].startswith(WRONG) for source in good),
    )
    story.facts["first_sources"] = document["sources"]
    return [source["name"] for source in good]


def _show_sources(story: Story, document: dict[str, Any]) -> None:
    for source in document["sources"]:
        offset = source["offset_ns"]
        shown = "" if offset is None else f"{offset / 1e6:+.3f} ms"
        story.console.print(
            f"    {source['name']:<32} {source['address'] or '':<12} {shown:>10}  {source['verdict']}"
        )


def _leave(story: Story, pool: LabPool, leaver: Member) -> None:
    story.chapter(f"{leaver.name} is taken out")
    serial = leaver.view()["certificates"][-1]["serial"]
    story.check(
        f"until now its certificate is good ({serial})", pool.pebble.certificate_status(serial) == "Valid"
    )
    pool.member.call("DELETE", f"/v1/servers/{leaver.name}")
    view = pool.wait_for_state(leaver, "removed")
    receipt = view["receipt"]
    for step in (
        "srv_withdrawn_at",
        "name_broken_at",
        "authorization_deactivated_at",
        "certificate_revoked_at",
        "removed_at",
    ):
        moment = datetime.fromisoformat(receipt[step])
        story.console.print(f"    {step.removesuffix('_at').replace('_', ' '):<26} {moment:%H:%M:%S.%f}")
    story.facts["receipt"] = receipt
    _check_gone(story, pool, leaver)
    story.check("its certificate is revoked at the CA", pool.pebble.certificate_status(serial) == "Revoked")
    wait_until(lambda: not leaver.process.running(), "the agent ends")
    story.check(
        "its agent was told by the registry that there is no renewal, and ended",
        leaver.process.wait() == ExitStatus.REMOVED,
    )
    refusal = asyncio.run(_try_to_renew(pool, leaver))
    story.check(
        f"the CA refuses it a renewal, asked with an account of its own: {refusal.partition(': ')[0]}, the name"
        " does not resolve",
        _UNRESOLVED in refusal,
    )
    story.check(
        "the pool's own account has no valid authorization left for the name either",
        asyncio.run(_needs_validation(pool, leaver)),
    )


def _check_gone(story: Story, pool: LabPool, leaver: Member) -> None:
    authority = (pool.primary.address, pool.primary.port)
    story.check("its SRV record is gone", leaver.domain not in _srv(*authority))
    kinds = ("A", "AAAA", "CAA")
    story.check(
        f"{leaver.domain} does not exist any more",
        all(_ask(*authority, leaver.domain, kind).rcode() == dns.rcode.NXDOMAIN for kind in kinds),
    )

    def gone_for_resolvers() -> bool:
        answer = _ask(pool.unbound.address, pool.unbound.port, leaver.domain, "A")
        proved = bool(answer.flags & dns.flags.AD)
        targets = _srv(pool.unbound.address, pool.unbound.port)
        return answer.rcode() == dns.rcode.NXDOMAIN and proved and leaver.domain not in targets

    wait_until(gone_for_resolvers, "the resolver forgets the name")
    story.check("a validating resolver proves that, one TTL later", holds=True)


def _replace(story: Story, pool: LabPool, leaver: Member, before: list[str]) -> None:
    story.chapter("The client asks again")
    found = pool.client("--count", str(SOURCES))
    document = found.document
    _show_sources(story, document)
    names = {source["name"] for source in document["sources"] if source["verdict"] == "truechimer"}
    story.check(f"{leaver.name} is gone from its sources", found.status == 0 and leaver.domain not in names)
    fresh = names - set(before)
    story.check(f"{', '.join(sorted(fresh))} has taken its place", len(fresh) == 1 and len(names) == SOURCES)
    story.facts["second_sources"] = document["sources"]


def _ask(address: str, port: int, name: str, kind: str) -> dns.message.Message:
    query = dns.message.make_query(f"{name}.", kind, want_dnssec=True)
    answer, _ = dns.query.udp_with_fallback(query, address, timeout=3, port=port)
    return answer


def _srv(address: str, port: int) -> list[str]:
    """The targets in the pool's SRV answer."""
    answer = _ask(address, port, f"_ntske._tcp.{POOL}", "SRV")
    return [
        rdata.target.to_text(omit_final_dot=True)
        for rrset in answer.answer
        if rrset.rdtype == dns.rdatatype.SRV
        for rdata in rrset
    ]


async def _try_to_renew(pool: LabPool, leaver: Member) -> str:
    """What a determined former member would do: an account of its own, a responder that works. The CA's words."""
    account = await AcmeAccount.open(_ca(pool, "former-member.pem"))
    try:
        _, csr = new_key_and_csr(leaver.domain)
        order = await account.order(csr, leaver.domain)
        assert order.token is not None
        assert order.key_authorization is not None
        assert order.challenge_url is not None
        async with Responder([leaver.domain]) as responder:
            await responder.listen((leaver.address, pool.http_port))
            responder.publish(leaver.domain, ACME_PATH + order.token, order.key_authorization.encode("ascii"))
            await account.answer(order.challenge_url)
            deadline = time.monotonic() + _WAIT
            while (status := await account.poll(order.url)).status is OrderState.PENDING:
                if time.monotonic() > deadline:
                    break
        if status.status is not OrderState.INVALID:
            return f"NOT refused: the order is {status.status}"
        return status.error_detail or "invalid"
    finally:
        account.close()


async def _needs_validation(pool: LabPool, leaver: Member) -> bool:
    account = await AcmeAccount.open(_ca(pool, "acme-account.pem"))
    try:
        _, csr = new_key_and_csr(leaver.domain)
        return (await account.order(csr, leaver.domain)).token is not None
    finally:
        account.close()


def _ca(pool: LabPool, key: str) -> AcmeConfig:
    return AcmeConfig(
        directory_url=pool.pebble.directory_url,
        account_key_file=pool.directory / key,
        ca_file=pool.pebble.ca_file,
    )


def _how_to_go_on(story: Story, pool: LabPool) -> None:
    """What `--keep` prints: how to look at the pool, and how a stock chronyd uses it."""
    member = next(member for member in pool.members if member.process.running())
    chronyd = stock_chronyd(pool, member)
    story.console.print(
        f"""
[bold]The pool goes on until Ctrl-C.[/]
  client    pool-client watch {POOL} --resolver {pool.unbound.address}:{pool.unbound.port} \\
              --trust-anchor {pool.trust_anchor} --ca {pool.roots}
  member    curl --cacert {pool.registry_root} -H 'Authorization: Bearer {pool.member_token}' \\
              {pool.url}/v1/servers/{member.name}
  documents {pool.url}/openapi.json

A stock chronyd does not look SRV records up: it is pointed at one member by name. As the name exists in this
pool's DNS only, this chronyd gets a hosts file of its own; it leaves the clock alone (-x):
  {shlex.join(chronyd.process.argv)}
and in another terminal:
  {chronyd.chronyc("sources")}
  {chronyd.chronyc("authdata")}
""",
        soft_wrap=True,
        markup=True,
    )


def stock_chronyd(pool: LabPool, member: Member) -> ChronydClient:
    """A stock chronyd whose source is one member, not started."""
    return ChronydClient(
        pool.directory / "chrony", pool.roots, member.domain, pool.ke_port, address=member.address
    )


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Something to wait on until Ctrl-C or SIGTERM."""

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield signal.pause
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--keep", action="store_true", help="leave the pool running until Ctrl-C")
    parser.add_argument("--directory", type=Path, help="work there, and keep it")
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="truechimer-demo-"))
    story = Story(Console(stderr=options.json, highlight=False))
    story.console.print(f"[bold]Truechimer: the life of a pool[/], in {directory}")
    error = _run(story, directory, keep=options.keep)
    seconds = story.statements[-1]["at"] if story.statements else story.at()
    if options.json:
        document = {"ok": error is None, "seconds": seconds, "error": error}
        print(json.dumps({**document, "statements": story.statements, **story.facts}))
    if error is not None:
        print(f"demo failed after {seconds:.0f} s: {error}\n  logs: {directory}", file=sys.stderr)
        return 1
    story.console.print(f"\n[green]all {len(story.statements)} statements were checked[/] in {seconds:.0f} s")
    if options.directory is None:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


def _run(story: Story, directory: Path, *, keep: bool) -> str | None:
    """Tell the story; the reason when it could not be told to its end."""
    try:
        story.chapter("Pebble (the CA), Knot (a signed zone), unbound (a resolver) and the registry start")
        with LabPool(directory, authz_reuse=100) as pool:
            story.check("all four answer", pool.registry.running())
            tell(story, pool)
            if keep:
                with _interruptible() as wait:
                    _how_to_go_on(story, pool)
                    wait()
    except (LabError, Unproved, OSError, dns.exception.DNSException, TimeoutError) as error:
        return str(error) or type(error).__name__
    return None


if __name__ == "__main__":
    sys.exit(main())
