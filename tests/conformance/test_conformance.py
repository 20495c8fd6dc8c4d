"""`docs/conformance.md`, its clauses and the tests' markers fit together."""

import subprocess
import sys
from pathlib import Path

import pytest

from lab.conformance import ConformanceError, faults, load, render

ENTRY = {
    "id": "4.2-1",
    "level": "MUST",
    "who": "client",
    "asks": "wait",
    "does": "It waits.",
    "status": "met",
    "reason": "",
}


def text(*changes):
    """A file with one clause for each dictionary of changes."""
    lines = ["[sections]", '"3" = "TLS"', '"4.2" = "Retry"', '"4.10" = "Later"']
    for change in changes:
        lines.append("[[clause]]")
        lines += [f'{key} = "{value}"' for key, value in (ENTRY | change).items() if value]
    return "\n".join(lines)


def test_the_page_is_what_clauses_and_markers_say():
    """A process of its own, as pytest cannot collect inside of pytest."""
    done = subprocess.run(
        [sys.executable, "-m", "lab.conformance", "--check"],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_marker_must_name_a_clause():
    (fault,) = faults(load(text({})), {"4.2-1": ["a.py::test_a"], "4.2-7": ["a.py::test_b"]})
    assert "4.2-7" in fault
    assert "a.py::test_b" in fault


@pytest.mark.parametrize("change", [{}, {"status": "partly met", "reason": "x"}])
def test_what_is_met_has_a_test(change):
    assert faults(load(text(change)), {"4.2-1": ["a.py::test_a"]}) == []
    (fault,) = faults(load(text(change)), {})
    assert "4.2-1" in fault


@pytest.mark.parametrize("status", ["planned", "not met", "not applicable"])
def test_what_is_not_met_has_none(status):
    standard = load(text({"status": status, "reason": "x"}))
    assert faults(standard, {}) == []
    (fault,) = faults(standard, {"4.2-1": ["a.py::test_a"]})
    assert "a.py::test_a" in fault


def test_a_page():
    standard = load(text({}, {"id": "4.2-2", "status": "not met", "reason": "It forgets."}))
    page = render(standard, {"4.2-1": ["tests/x/test_a.py::test_it", "tests/x/test_a.py::test_too"]})
    tests = "[test_a.test_it](../tests/x/test_a.py), [test_a.test_too](../tests/x/test_a.py)"
    assert f"| 4.2-1 | MUST | client | wait | It waits. | {tests} |\n" in page
    assert "| 4.2-2 | MUST | client | wait | It waits. **Not met:** It forgets. |  |\n" in page
    assert "- 4.2-2 (MUST, client): It forgets.\n" in page
    assert "| met | 1 |\n" in page


@pytest.mark.parametrize(
    "changes",
    [
        [{"id": "4.2-2"}],
        [{}, {}],
        [{}, {"id": "4.2-3"}],
        [{}, {"id": "3-1"}],
        [{"id": "5-1"}],
        [{"id": "4.2"}],
        [{"id": "4.2-01"}],
        [{"level": "must"}],
        [{"who": "anybody"}],
        [{"status": "so-so"}],
        [{"status": "planned"}],
        [{"reason": "x"}],
        [{"asks": ""}],
        [{"does": ""}],
        [{"does": "a | b"}],
        [{"colour": "red"}],
    ],
)
def test_clauses_out_of_order_or_incomplete(changes):
    with pytest.raises(ConformanceError):
        load(text(*changes))


def test_sections_are_numbers():
    assert len(load(text({"id": "3-1"}, {"id": "4.2-1"}, {"id": "4.10-1"})).clauses) == 3


@pytest.mark.parametrize(
    "content", ["", "=", "clause = 3", "[sections]\n[[clause]]\n", "sections = 1\nclause = []"]
)
def test_what_is_no_file_of_clauses(content):
    with pytest.raises(ConformanceError):
        load(content)
