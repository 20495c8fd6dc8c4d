"""What a volunteer installs: the package's content, its units, its pages, and a clean Debian that takes it and loses it."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import packages_distributions
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cryptography import x509
from typer.testing import CliRunner

from lab import manuals
from lab.certificates import Authority
from lab.processes import Process, free_port, require
from lab.programs import scrape, script
from member_agent.cli import app
from member_agent.config import AgentSettings
from member_agent.errors import ExitStatus
from nts_core.cli import ExitStatus as ClientStatus
from nts_core.client import establish
from nts_core.tls import Trust

from .conftest import SOURCE, build

PACKAGING = SOURCE / "packaging"
WHEELS = SOURCE / "engine" / "target" / "wheels"
UNITS = sorted((PACKAGING / "systemd").iterdir())
PROJECT = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]


def call(*argv, deadline=60, **options):
    """What a program printed; its own words where it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=deadline, check=False, **options)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


# The two locks


def locked(name):
    """Each pinned package of a lock with its hashes."""
    entries = re.findall(
        r"^([a-z0-9.-]+==\S+)((?: \\\n +--hash=\S+)+)", (SOURCE / name).read_text(), re.MULTILINE
    )
    return {pin: set(re.findall(r"--hash=(\S+)", hashes)) for pin, hashes in entries}


def test_the_agents_lock_is_a_part_of_the_other():
    agent, whole = locked("requirements-agent.lock"), locked("requirements.lock")
    assert set(agent) < set(whole)
    assert all(hashes == whole[pin] for pin, hashes in agent.items())


def test_the_agents_lock_names_no_index():
    text = (SOURCE / "requirements-agent.lock").read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)


def test_what_agent_and_client_import_is_required_by_them():
    def is_same(one, other):
        return re.sub(r"[-_.]+", "-", one).lower() == re.sub(r"[-_.]+", "-", other).lower()

    ours = {"nts_core", "member_agent", "nts_engine", *sys.stdlib_module_names}
    imported = set()
    for directory in ("nts_core", "member_agent"):
        for file in (SOURCE / directory).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module.partition(".")[0])
    distributions = packages_distributions()
    pinned = [pin.partition("==")[0] for pin in locked("requirements-agent.lock")]
    missing = {
        module
        for module in imported - ours
        if not any(is_same(pin, name) for pin in pinned for name in distributions[module])
    }
    assert not missing


# Pages, completion and the sample


@pytest.mark.parametrize("path", sorted(manuals.render()), ids=lambda path: str(path.relative_to(PACKAGING)))
def test_what_is_generated_is_current(path):
    assert path.read_text() == manuals.render()[path], "run `make docs`"


@pytest.mark.parametrize("page", ["pool-agent.1", "pool-client.1", "agent.toml.5"])
def test_pages_are_well_formed(page):
    call(require("mandoc"), "-Tlint", "-Wwarning", PACKAGING / "man" / page)


@pytest.mark.parametrize(
    ("page", "statuses"), [("pool-agent.1", ExitStatus), ("pool-client.1", ClientStatus)]
)
def test_pages_have_every_exit_status(page, statuses):
    section = (PACKAGING / "man" / page).read_text().partition(".SH EXIT STATUS")[2].partition("\n.SH")[0]
    assert {int(number) for number in re.findall(r"^\.B (\d+)$", section, re.MULTILINE)} == set(statuses)


def test_the_sample_holds_what_holds_without_it(tmp_path):
    sample = tmp_path / "agent.toml"
    sample.write_text(manuals.SAMPLE.read_text())
    assert AgentSettings.load(sample).model_dump() == AgentSettings().model_dump()
    sample.write_text(re.sub(r"^#(?=\w+ = \S)", "", sample.read_text(), flags=re.MULTILINE))
    assert sample.read_text().count("\nntp_port = 123\n") == 1
    assert AgentSettings.load(sample).model_dump() == AgentSettings().model_dump()


# The units


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    """The units, with a program that is there: systemd looks for it."""
    directory = tmp_path_factory.mktemp("units")
    for unit in UNITS:
        text = unit.read_text().replace(
            "/usr/bin/pool-agent", str(Path(sys.executable).with_name("pool-agent"))
        )
        (directory / unit.name).write_text(text)
    return directory


def test_systemd_accepts_the_units(units):
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(units / unit.name for unit in UNITS)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (said.returncode, said.stdout + said.stderr) == (0, "")


@pytest.mark.parametrize(
    ("unit", "most"),
    [("pool-agent.service", 23), ("pool-agent-join@.service", 23), ("pool-agent-engine.service", 28)],
)
def test_units_are_as_closed_as_the_documentation_says(unit, most, units):
    """Tenths of systemd's measure, of which docs/members.md has the figure."""
    call("systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={most}", units / unit)
    assert f"{most / 10:g}" in (SOURCE / "docs" / "members.md").read_text()


def allowed(unit):
    """The system calls that a unit's filter allows, by systemd's own sets."""
    sets, current = {}, ""
    for line in call("systemd-analyze", "--no-pager", "syscall-filter").splitlines():
        if line.startswith("@"):
            current = line.split()[0]
            sets[current] = set()
        elif line.startswith("    ") and not line.strip().startswith("#"):
            sets[current].add(line.strip())

    def expand(name):
        return set().union(*map(expand, sets[name])) if name in sets else {name}

    found = set()
    for words in re.findall(r"^SystemCallFilter=(.*)$", unit.read_text(), re.MULTILINE):
        named = set().union(*map(expand, words.removeprefix("~").split()))
        found = found - named if words.startswith("~") else found | named
    return found


@pytest.mark.long
async def test_the_unit_allows_every_system_call_of_a_server(tmp_path):
    """Start, cookie keys on the disk, a time daemon asked, key establishment, metrics, end."""
    authority = Authority(tmp_path)
    pair = authority.issue("ntp.example", "127.0.0.1")
    port, metrics = free_port(), free_port()
    chronyc = tmp_path / "chronyc"
    chronyc.write_text("#!/bin/sh\nexit 1\n")
    chronyc.chmod(0o755)
    server = Process(
        "traced",
        [
            *("strace", "-D", "-f", "-o", str(tmp_path / "calls"), script("pool-agent"), "serve"),
            *(f"--cert={pair.cert}", f"--key={pair.key}", f"--ke=127.0.0.1:{port}", "--ntp=127.0.0.1:0"),
            "--local-stratum=3",
            *(f"--state={tmp_path / 'state'}", f"--metrics=127.0.0.1:{metrics}"),
        ],
        tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    with server.start(lambda: "ready ke=" in server.output()):
        roots = x509.load_pem_x509_certificates(authority.root.read_bytes())
        await establish("ntp.example", "127.0.0.1", port, Trust.of(roots, datetime.now(UTC)))
        scrape(metrics)
    traced = (tmp_path / "calls").read_text()
    used = set(re.findall(r"^\d+ +(?:<\.\.\. )?([a-z_0-9]+)(?:\(| resumed)", traced, re.MULTILINE))
    assert {"pipe2", "execve", "accept4", "clock_adjtime", "fsync"} <= used
    assert used <= allowed(PACKAGING / "systemd" / "pool-agent.service")
    assert "PROT_WRITE|PROT_EXEC" in traced, "MemoryDenyWriteExecute= may be in the units now"


COMMANDS = [
    line
    for file in (*UNITS, PACKAGING / "debian" / "pool-agent.prerm")
    for line in re.findall(
        r"pool-agent (?=[a-z]+ .*--state)(.*?)(?: \|\| true)?$", file.read_text(), re.MULTILINE
    )
]


@pytest.mark.parametrize("line", COMMANDS)
def test_what_units_and_scripts_call_exists(line):
    done = CliRunner().invoke(app, [*shlex.split(line), "--help"])
    assert done.exit_code == 0, done.output


def test_every_unit_that_calls_the_program_was_looked_at():
    assert len(COMMANDS) == 4


# The package


def test_the_package_says_what_it_is(unpacked):
    fields = call("dpkg-deb", "--field", unpacked.package)
    assert f"\nVersion: {PROJECT['version']}\n" in fields
    depends = re.search(r"^Depends: (.*)$", fields, re.MULTILINE)[1].split(", ")
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"python3 (>= {python}~)" in depends
    assert {each.split()[0] for each in depends} == {
        "python3",
        "adduser",
        "ca-certificates",
        "libc6",
        "libgcc-s1",
    }


def test_the_package_holds_the_agent_and_not_the_registry(unpacked):
    (site,) = unpacked.home.glob("lib/python3*/site-packages")
    names = {path.name for path in site.iterdir()}
    assert {"nts_core", "member_agent"} <= names
    assert not names & {"poolsvc", "migrations", "lab", "sqlalchemy", "fastapi", "pip"}
    assert {pin.partition("==")[0] for pin in locked("requirements-agent.lock")} == {
        re.sub(r"[_.]+", "-", name.partition("-")[0]).lower()
        for name in names
        if name.endswith(".dist-info") and not name.startswith(("truechimer", "nts_engine"))
    }
    assert ("nts_engine" in names) == any(WHEELS.glob("*.whl")), "the engine in Rust, where it was built"
    if "nts_engine" in names:
        (texts,) = site.glob("nts_engine-*.dist-info/licenses/**/CRATES.txt")
        dependencies = tomllib.loads((SOURCE / "engine/Cargo.toml").read_text())["dependencies"]
        named = {line.split()[0] for line in texts.read_text().splitlines() if ": " in line}
        assert named >= {*dependencies, "aws-lc-sys"}
        assert "the fiat-crypto authors" in texts.read_text(), "a text within a crate's text"


def test_nothing_in_the_package_knows_where_it_was_built(unpacked):
    """Scripts and notes of pip would, and no two builds would be the same."""
    for file in unpacked.home.rglob("*"):
        assert file.name not in {"RECORD", "direct_url.json", "__pycache__"}
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            assert str(SOURCE).encode() not in content, file
            assert file.suffix not in {"", ".cfg", ".txt"} or b"/debian/pool-agent/" not in content, file


@pytest.mark.parametrize("name", ["pool-agent", "pool-client"])
def test_the_programs_run_from_the_package_alone(name, unpacked):
    """Not by what the tests have installed: the variable would lead there."""
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SOURCE), "COLUMNS": "100"}
    assert f"Usage: {name}" in call(*unpacked.program(name), "--help", env=env, cwd="/")


def test_bash_completes_commands_and_options(unpacked, tmp_path):
    program = tmp_path / "pool-agent"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, unpacked.program("pool-agent")))} "$@"\n')
    program.chmod(0o755)
    completion = unpacked.tree / "usr/share/bash-completion/completions/pool-agent"

    def complete(*words):
        script = (
            f'source {completion}; COMP_WORDS=(pool-agent "$@"); COMP_CWORD=$#; '
            f'_pool_agent_completion {program}; printf "%s\\n" "${{COMPREPLY[@]}}"'
        )
        return call("bash", "--norc", "-c", script, "bash", *words, cwd="/").split()

    assert complete("cook") == ["cookie-keys"]
    assert "--ntp-port" in complete("run", "--ntp")


# The clean Debian


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_same_source_gives_the_same_package(package, tmp_path):
    """Elsewhere, with other rights for new files, and with files of Python's that a run leaves."""
    copy = tmp_path / "elsewhere"
    copied = (
        "nts_core",
        "member_agent",
        "packaging",
        "pyproject.toml",
        "README.md",
        "requirements-agent.lock",
    )
    copy.mkdir()
    call("cp", "-r", *(SOURCE / name for name in copied), copy)
    if WHEELS.exists():
        (copy / "engine" / "target").mkdir(parents=True)
        call("cp", "-r", WHEELS, copy / "engine" / "target")
    (copy / "nts_core" / "__pycache__").mkdir(exist_ok=True)
    (copy / "nts_core" / "__pycache__" / "stray.pyc").write_bytes(b"stray")
    before = os.umask(0o077)
    try:
        again = build(tmp_path / "again", copy)
    finally:
        os.umask(before)
    assert sha256(again.read_bytes()).digest() == sha256(package.read_bytes()).digest()


def mirror():
    """Where apt gets this release from."""
    targets = call(
        "apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages"
    )
    found = [line.split()[0] for line in targets.splitlines() if line.split()[1:] == ["bookworm", "main"]]
    assert found, "apt of this machine knows no bookworm"
    return found[0]


# What changes with every package, or is made anew.
PASSING = (
    *("/run/", "/tmp/", "/var/cache/", "/var/lib/apt/", "/var/lib/dpkg/", "/var/log/"),
    *(f"/etc/{name}-/" for name in ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")),
)


class CleanDebian:
    """A bookworm in a directory."""

    def __init__(self, root):
        self.root = root
        call(require("debootstrap"), "--variant=minbase", "bookworm", root, mirror(), deadline=900)

    def run(self, *argv, deadline=600):
        env = {
            **os.environ,
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "DEBIAN_FRONTEND": "noninteractive",
            "LC_ALL": "C.UTF-8",
        }
        return call(require("chroot"), self.root, *argv, deadline=deadline, env=env)

    def files(self):
        """All that a package may have left, and who there is."""
        names = self.run("find", "/", "-xdev").splitlines()
        accounts = {name: (self.root / "etc" / name).read_text() for name in ("passwd", "group")}
        return {name for name in names if not f"{name}/".startswith(PASSING)}, accounts


@pytest.fixture(scope="module")
def clean():
    if os.geteuid():
        pytest.skip("only root makes a Debian in a directory")
    # Not in memory, where there may be no devices.
    with TemporaryDirectory(dir="/var/tmp") as directory:
        root = Path(directory) / "root"
        try:
            yield CleanDebian(root)
        finally:
            # A debootstrap that was stopped leaves them.
            for place in ("proc", "sys"):
                if (root / place).is_mount():
                    call("umount", root / place)


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_a_clean_debian_takes_the_package_and_loses_it_whole(clean, package):
    name = package.name
    (clean.root / "tmp" / name).write_bytes(package.read_bytes())
    clean.run("apt-get", "install", "-y", "--no-install-recommends", "python3", "adduser", "ca-certificates")
    before, accounts = clean.files()

    clean.run("apt-get", "install", "-y", "--no-install-recommends", f"/tmp/{name}")
    assert "Usage: pool-agent" in clean.run("pool-agent", "--help")
    assert "Usage: pool-client" in clean.run("pool-client", "--help")
    state = clean.root / "var" / "lib" / "pool-agent"
    assert state.stat().st_mode & 0o777 == 0o700
    assert clean.run(
        "stat", "-c", "%U:%G", "/var/lib/pool-agent", "/var/lib/pool-agent/agent.toml"
    ).split() == [
        "pool-agent:pool-agent",
        "root:root",
    ]
    wants = clean.root / "etc/systemd/system/multi-user.target.wants"
    assert (wants / "pool-agent.service").is_symlink()
    assert not (clean.root / "etc/systemd/system/sockets.target.wants").exists()
    as_agent = ["setpriv", "--reuid=pool-agent", "--regid=pool-agent", "--clear-groups", "pool-agent"]
    clean.run(*as_agent, "cookie-keys", "show", "--state", "/var/lib/pool-agent")

    (state / "agent.toml").write_text("ntp_port = 1123\n")
    (state / "members").mkdir()
    clean.run("apt-get", "install", "-y", "--reinstall", f"/tmp/{name}")
    assert (state / "agent.toml").read_text() == "ntp_port = 1123\n"
    clean.run("apt-get", "remove", "-y", "pool-agent")
    assert (state / "members").exists()
    assert not (clean.root / "usr/lib/pool-agent").exists()
    clean.run("apt-get", "purge", "-y", "pool-agent")
    after, left = clean.files()
    assert after == before
    assert left == accounts


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_lintian_has_nothing_to_say(clean, package):
    (clean.root / "tmp" / package.name).write_bytes(package.read_bytes())
    clean.run("apt-get", "install", "-y", "--no-install-recommends", "lintian")
    assert clean.run("lintian", "--allow-root", "--fail-on=error,warning", f"/tmp/{package.name}") == ""
