"""An agent killed at the moments of a member's life: the next start ends in the same place, with nothing done twice."""

import asyncio
import json
import signal
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from lab.certificates import shown_certificate
from lab.processes import free_port
from lab.programs import NO_DAEMON
from lab.stand_in import StandIn, http, saying
from member_agent.errors import ExitStatus
from member_agent.state import StateDirectory

DOMAIN = "alice.servers.pool.example"
HOST = "127.0.0.1"
TOKEN = "tc_join_x"
DEADLINE = 60
# Files of the host's, which outlive its servers.
HOSTS = {"lock", "cookie-keys.json", "engine.json"}


class Life(StandIn):
    """A registry that leads alice through all of it: proof, two certificates, the end."""

    def __init__(self, authority):
        super().__init__(
            ke_port=free_port(),
            http_port=free_port(),
            addresses=[{"address": HOST, "proved": False, "call": True}],
        )
        self.authority, self.heed = authority, self.lead
        self.keys, self.requests, self.chains = set(), {}, {}
        self.served = []

    async def lead(self, path, said):
        if path == "/v1/agent/join":
            self.keys.add(said["public_key"])
        if path != "/v1/agent/sync":
            return
        if "nonce-1" in said["serving"]:
            self.wanted |= {"addresses": [{"address": HOST, "proved": True, "call": False}], "csr_for": 1}
        if said["csr"]:
            self.requests.setdefault(said["csr"]["order"], set()).add(said["csr"]["pem"])
        order = len(self.chains) + 1
        if order in self.requests:
            token = str(order) * 43
            challenge = {"token": token, "key_authorization": f"{token}.{'k' * 43}"}
            self.wanted |= {"csr_for": None, "challenges": [challenge]}
            if token in said["serving"]:
                (csr,) = self.requests[order]
                self.chains[order] = chain = self.authority.chain_for(csr)
                wanted = {"order": order, "chain": chain, "fingerprint": fingerprint(chain)}
                self.wanted |= {"challenges": [], "certificate": wanted}
        elif self.chains and said["installed"] == self.wanted["certificate"]["fingerprint"]:
            self.served.append(await asyncio.to_thread(shown, self.wanted["ke_port"]))
            if order <= 2:
                self.wanted["csr_for"] = order
            else:
                body = {"code": "removed", "detail": "alice has left", "remedy": "stop"}
                self.fault = saying(http("410 Gone", json.dumps(body).encode()))


def fingerprint(chain):
    return x509.load_pem_x509_certificate(chain.encode()).fingerprint(hashes.SHA256()).hex()


def shown(port):
    return fingerprint(shown_certificate(HOST, port))


async def ended(*argv):
    """How a program ends, and what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(DEADLINE):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, output.decode()


async def dies_once(number, when, arguments):
    """The statuses of a program that dies at that moment, and of the same once more, if it did die."""
    first, said = await ended("lab.mortal_agent", str(number), when, *arguments)
    if first != -signal.SIGKILL:
        return [first], said
    second, said = await ended("lab.mortal_agent", "0", when, *arguments)
    return [first, second], said


def joining(life, state):
    return ["join", life.url, "--token", TOKEN, "--state", str(state), "--wait", "0", "--engine", "builtin"]


async def dies_joining(tmp_path, authority, number, when):
    """Whether it died at that moment of joining; that joining again makes it good."""
    state = tmp_path / f"{when}{number}"
    async with Life(authority) as life:
        statuses, said = await dies_once(number, when, joining(life, state))
        assert statuses[-1] == ExitStatus.OK, said
        assert len(life.keys) == 1, "another key would be another agent, and the token is used up"
        joined = StateDirectory(state)
        (member,) = joined.members().values()
        assert member.membership() == joined.joined_by(TOKEN)
        assert list((state / "joining").iterdir()) == []
        joins = life.calls.count("/v1/agent/join")
        again, said = await ended("lab.mortal_agent", "0", when, *joining(life, state))
        assert (again, member.membership()) == (ExitStatus.OK, joined.joined_by(TOKEN)), said
        assert life.calls.count("/v1/agent/join") == joins, "who has joined does not join again"
    return len(statuses) > 1


async def dies_living(tmp_path, authority, number, when):
    """Whether it died at that moment of running; that it comes to the same end."""
    state = tmp_path / f"{when}{number}"
    async with Life(authority) as life:
        status, said = await ended("lab.mortal_agent", "0", "after", *joining(life, state))
        assert status == ExitStatus.OK, said
        options = ["--local-stratum=10", NO_DAEMON, f"--ntp-port={free_port()}"]
        statuses, said = await dies_once(number, when, ["run", "--state", str(state), *options])
        # Killed in the midst of the end, it finds no server any more.
        assert statuses[-1] in {ExitStatus.REMOVED, ExitStatus.STATE}, said
        assert [len(life.requests[order]) for order in (1, 2)] == [1, 1], "one key an order, whatever happens"
        issued = [fingerprint(life.chains[order]) for order in (1, 2)]
        assert list(dict.fromkeys(life.served)) == issued
    assert {path.name for path in state.rglob("*") if path.is_file()} == HOSTS
    assert [*(state / "members").iterdir(), *(state / "joining").iterdir()] == []
    return len(statuses) > 1


async def at_each(dies, numbers, when, tmp_path, authority, *, together=4):
    """How many of these moments there are."""
    deaths = 0
    for begin in range(0, len(numbers), together):
        some = numbers[begin : begin + together]
        found = await asyncio.gather(*(dies(tmp_path, authority, number, when) for number in some))
        deaths += sum(found)
        if not all(found):
            break
    return deaths


@pytest.mark.parametrize(("when", "numbers"), [("before", [6]), ("after", [10])])
async def test_killed_at_some_moments_of_joining(tmp_path, authority, when, numbers):
    assert await at_each(dies_joining, numbers, when, tmp_path, authority) == len(numbers)


@pytest.mark.parametrize(("when", "numbers"), [("before", [14, 38]), ("after", [26, 44])])
async def test_killed_at_some_moments_of_its_life(tmp_path, authority, when, numbers):
    assert await at_each(dies_living, numbers, when, tmp_path, authority) == len(numbers)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_killed_at_every_moment_of_joining(tmp_path, authority, when):
    assert await at_each(dies_joining, range(1, 100), when, tmp_path, authority) >= 10


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_killed_at_every_moment_of_its_life(tmp_path, authority, when):
    """From the first start to the last file that is removed."""
    assert await at_each(dies_living, range(1, 400), when, tmp_path, authority) >= 40
