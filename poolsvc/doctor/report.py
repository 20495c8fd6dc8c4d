"""The form of an examination: what every check is given and what it gives back."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nts_core.resolve import TrustAnchors
from nts_core.verdict import Verdict
from poolsvc.config import Settings
from poolsvc.primary import Nameserver

QUESTION_TIMEOUT = 3.0  # seconds, for one question and its answer
DEADLINE = 25.0  # seconds, for one check


class Unknowable(Exception):
    """A check cannot be made for a reason that another check tells."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, in words, and what to do about it."""

    verdict: Verdict
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Examination:
    """What the checks may know; `file` has the settings. Without a resolver the parent zone is not asked about."""

    settings: Settings
    file: Path
    now: datetime
    resolver: Nameserver | None = None
    anchors: TrustAnchors | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """`run` may raise PoolError for a fault, and Unknowable."""

    name: str
    run: Callable[[Examination], Awaitable[Finding]]


@dataclass(frozen=True, slots=True)
class Result:
    """A line of the report."""

    name: str
    verdict: Verdict
    found: str
    remedy: str


def ok(found: str) -> Finding:
    return Finding(Verdict.OK, found)


def warn(found: str, remedy: str) -> Finding:
    return Finding(Verdict.WARN, found, remedy)


def fail(found: str, remedy: str) -> Finding:
    return Finding(Verdict.FAIL, found, remedy)


def skipped(found: str, remedy: str = "") -> Finding:
    return Finding(Verdict.SKIPPED, found, remedy)


_RANK = tuple(Verdict)


def worst(findings: list[Finding]) -> Finding:
    """One finding for several: the worst verdict, with the words of all that have it."""
    verdict = max((finding.verdict for finding in findings), key=_RANK.index)
    these = [finding for finding in findings if finding.verdict is verdict]
    remedies = dict.fromkeys(finding.remedy for finding in these if finding.remedy)
    return Finding(verdict, "; ".join(finding.found for finding in these), "; ".join(remedies))
