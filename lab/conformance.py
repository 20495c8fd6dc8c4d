"""`docs/conformance.md`: RFC 8915 clause by clause, and the tests that prove what is said there.

    python -m lab.conformance            writes the page
    python -m lab.conformance --check    says what does not fit together, and changes nothing

The clauses have one home, `tests/conformance/rfc8915.toml`. A test names those that it proves by the marker
`rfc8915`; pytest's own collection finds them. Nothing is run for the page: that the tests pass is for the suite
to say.
"""

import argparse
import contextlib
import io
import re
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parent.parent
CLAUSES = _ROOT / "tests" / "conformance" / "rfc8915.toml"
PAGE = _ROOT / "docs" / "conformance.md"
_MARKER = "rfc8915"
_ID = re.compile(r"(?P<section>[1-9][0-9]*(?:\.[1-9][0-9]*)*)-(?P<number>[1-9][0-9]*)")

Proofs = Mapping[str, Sequence[str]]


class ConformanceError(Exception):
    """The file of clauses or the collection of tests cannot be used; the text says where and why."""


class Level(StrEnum):
    """The RFC's word; ADVICE is what it suggests without one of them (sections 6 and 8)."""

    MUST = "MUST"
    MUST_NOT = "MUST NOT"
    SHALL = "SHALL"
    REQUIRED = "REQUIRED"
    SHOULD = "SHOULD"
    SHOULD_NOT = "SHOULD NOT"
    RECOMMENDED = "RECOMMENDED"
    MAY = "MAY"
    OPTIONAL = "OPTIONAL"
    ADVICE = "advice"


class Party(StrEnum):
    """Whom a clause is addressed to."""

    CLIENT = "client"
    SERVER = "server"
    BOTH = "both"
    OPERATOR = "operator"


class Status(StrEnum):
    """Whether we do what a clause asks. All but MET have a reason; only MET and PARTLY have tests."""

    MET = "met"
    PARTLY = "partly met"
    NOT_MET = "not met"
    PLANNED = "planned"
    NOT_APPLICABLE = "not applicable"


_PROVED = frozenset({Status.MET, Status.PARTLY})


@dataclass(frozen=True, slots=True)
class Clause:
    """One demand of the RFC in our own words, and what we do about it."""

    id: str
    level: Level
    who: Party
    asks: str
    does: str
    status: Status
    reason: str = ""

    @property
    def section(self) -> str:
        return self.id.partition("-")[0]


@dataclass(frozen=True, slots=True)
class Standard:
    """The clauses in the order of the RFC, and the titles of their sections."""

    titles: Mapping[str, str]
    clauses: tuple[Clause, ...]


def load(text: str) -> Standard:
    """The clauses in a TOML text. Raises ConformanceError for one that is out of order or incomplete."""
    try:
        document = tomllib.loads(text)
        titles = {str(section): str(title) for section, title in document["sections"].items()}
        clauses = tuple(_clause(entry) for entry in document["clause"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConformanceError(f"the clauses cannot be read: {error}") from None
    _check_order(titles, clauses)
    return Standard(titles, clauses)


def _clause(entry: Mapping[str, Any]) -> Clause:
    number = entry.get("id")
    try:
        clause = Clause(
            **{
                **entry,
                "level": Level(entry["level"]),
                "who": Party(entry["who"]),
                "status": Status(entry["status"]),
            }
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConformanceError(f"clause {number}: {error}") from None
    texts = (clause.id, clause.asks, clause.does, clause.reason)
    if not all(isinstance(text, str) and "|" not in text and "\n" not in text for text in texts):
        raise ConformanceError(f"clause {number}: texts are single lines without |")
    if not clause.asks or not clause.does:
        raise ConformanceError(f"clause {number}: say what is asked and what we do")
    if bool(clause.reason) is (clause.status is Status.MET):
        raise ConformanceError(f"clause {number}: give a reason for everything but `met`, and none for that")
    return clause


def _check_order(titles: Mapping[str, str], clauses: Sequence[Clause]) -> None:
    before = (list[int](), 0)
    for clause in clauses:
        found = _ID.fullmatch(clause.id)
        if found is None or found["section"] not in titles:
            raise ConformanceError(f"clause {clause.id}: not SECTION-NUMBER of a section with a title")
        here = ([int(part) for part in found["section"].split(".")], int(found["number"]))
        is_next = here[1] == (before[1] + 1 if here[0] == before[0] else 1)
        if here[0] < before[0] or not is_next:
            raise ConformanceError(
                f"clause {clause.id}: number the clauses of a section from 1, in its order"
            )
        before = here


class _Collector:
    """A pytest plugin that reads the markers of what was collected."""

    def __init__(self) -> None:
        self.proofs: defaultdict[str, set[str]] = defaultdict(set)
        self.empty: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            test = item.nodeid.partition("[")[0]
            for marker in item.iter_markers(_MARKER):
                if not marker.args:
                    self.empty.add(test)
                for clause in marker.args:
                    self.proofs[str(clause)].add(test)


def collect() -> dict[str, list[str]]:
    """The tests that name each clause. Only files with the marker are imported, which is most of the cost."""
    files = [
        str(path)
        for path in sorted((_ROOT / "tests").rglob("test_*.py"))
        if f"mark.{_MARKER}(" in path.read_text()
    ]
    if not files:
        raise ConformanceError(f"no test has the marker {_MARKER}")
    collector = _Collector()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = pytest.main(
            ["--collect-only", "-qq", f"--rootdir={_ROOT}", "-p", "no:cacheprovider", *files],
            plugins=[collector],
        )
    if status != pytest.ExitCode.OK:
        raise ConformanceError(f"pytest cannot collect the tests:\n{said.getvalue()}")
    if collector.empty:
        raise ConformanceError(f"the marker {_MARKER} names no clause: {', '.join(sorted(collector.empty))}")
    return {clause: sorted(tests) for clause, tests in collector.proofs.items()}


def faults(standard: Standard, proofs: Proofs) -> list[str]:
    """What clauses and markers say against each other, a sentence each."""
    by_id = {clause.id: clause for clause in standard.clauses}
    found = [
        f"{', '.join(tests)}: there is no clause {number}"
        for number, tests in sorted(proofs.items())
        if number not in by_id
    ]
    for clause in standard.clauses:
        if clause.status in _PROVED and clause.id not in proofs:
            found.append(f"clause {clause.id} is {clause.status}, but no test names it")
        if clause.status not in _PROVED and clause.id in proofs:
            found.append(
                f"clause {clause.id} is {clause.status}, but {', '.join(proofs[clause.id])} proves it"
            )
    return found


_HEAD = """\
# Conformance with RFC 8915

<!-- Written by `make docs` from tests/conformance/rfc8915.toml and the tests' markers. Do not edit. -->

Every demand of sections 3 to 6 and 8, in the RFC's order and in our words. MAY and OPTIONAL are listed where we chose
one way. Section 6 and most of section 8 only advise. A test is named where it would fail if we did not do what the
line says; a test in the suite keeps this page, the clauses and the markers together.

"""
_COLUMNS = "| clause | level | who | what is asked | what we do | tests |\n|---|---|---|---|---|---|\n"


def render(standard: Standard, proofs: Proofs) -> str:
    """The page in Markdown."""
    return "".join((_HEAD, *_summary(standard.clauses), *_sections(standard, proofs)))


def _summary(clauses: Sequence[Clause]) -> Iterator[str]:
    count = Counter(clause.status for clause in clauses)
    yield "| status | clauses |\n|---|---|\n"
    yield from (f"| {status} | {count[status]} |\n" for status in Status)
    for status in (Status.NOT_MET, Status.PARTLY, Status.PLANNED):
        if chosen := [clause for clause in clauses if clause.status is status]:
            yield f"\n## {status.capitalize()}\n\n"
            yield from (
                f"- {clause.id} ({clause.level}, {clause.who}): {clause.reason}\n" for clause in chosen
            )


def _sections(standard: Standard, proofs: Proofs) -> Iterator[str]:
    for section, clauses in groupby(standard.clauses, key=lambda clause: clause.section):
        yield f"\n## {section} {standard.titles[section]}\n\n{_COLUMNS}"
        yield from (_row(clause, proofs.get(clause.id, ())) for clause in clauses)


def _row(clause: Clause, tests: Sequence[str]) -> str:
    does = clause.does
    if clause.status is not Status.MET:
        does += f" **{clause.status.capitalize()}:** {clause.reason}"
    named = ", ".join(_link(test) for test in tests)
    return f"| {clause.id} | {clause.level} | {clause.who} | {clause.asks} | {does} | {named} |\n"


def _link(test: str) -> str:
    path, *names = test.split("::")
    return f"[{Path(path).stem}.{'.'.join(names)}](../{path})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.conformance", description="writes docs/conformance.md"
    )
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if the page is not so")
    options = parser.parse_args(arguments)
    try:
        standard, proofs = load(CLAUSES.read_text()), collect()
    except ConformanceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = faults(standard, proofs)
    page = render(standard, proofs)
    if not options.check and not found:
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        found.append(f"{PAGE.relative_to(_ROOT)} is not what the clauses and tests say: run `make docs`")
    for fault in found:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
