"""The corpus through every target, the engine on each for a moment, and faults that are made on purpose."""

import subprocess
import sys
from dataclasses import replace

import pytest

from fuzz.__main__ import NO_ENGINE, fuzz, has_engine, replay
from fuzz.target import CORPUS
from fuzz.targets import CANARY, TARGETS

each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
# An engine takes seconds to start: every run has one target of each module, the long one has all.
FIRST = {target.run.__module__: target for target in reversed(TARGETS.values())}
each_for_the_engine = pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, id=name, marks=[] if target in FIRST.values() else [pytest.mark.long])
        for name, target in TARGETS.items()
    ],
)
needs_engine = pytest.mark.skipif(not has_engine(), reason=NO_ENGINE)


@each_target
def test_no_input_of_the_corpus_breaks_an_oracle_and_together_they_reach_what_they_should(target):
    faults = replay(target)
    assert not faults, "\n".join(map(str, faults))


def test_the_corpus_is_small_files_of_targets_that_there_are():
    assert {path.name for path in CORPUS.iterdir()} == {CANARY.name, *TARGETS}
    for target in TARGETS.values():
        for path in target.inputs():
            assert path.stat().st_size <= target.longest, path


@needs_engine
@each_for_the_engine
def test_the_engine_finds_nothing_in_a_moment(target, tmp_path):
    fault, figures = fuzz(target, 1, tmp_path)
    assert fault is None, str(fault)
    assert "?" not in figures


# A target whose oracle does not hold


@needs_engine
def test_the_engine_finds_an_input_that_breaks_an_oracle_and_keeps_it(tmp_path):
    fault, _ = fuzz(CANARY, 30, tmp_path)
    assert fault is not None
    assert fault.input is not None
    assert fault.input.read_bytes().startswith(b"bad")
    assert "no input begins with bad" in str(fault)
    assert fault.input.read_bytes().hex() in str(fault)


@needs_engine
def test_an_engine_that_does_not_start_is_a_fault_and_not_a_sound_target(tmp_path):
    fault, _ = fuzz(replace(CANARY, name="nothing"), 1, tmp_path)
    assert fault is not None
    assert "KeyError" in str(fault)


def test_a_replay_names_the_input_that_breaks_an_oracle(tmp_path, monkeypatch):
    monkeypatch.setattr("fuzz.target.CORPUS", tmp_path)
    (tmp_path / "canary").mkdir()
    (tmp_path / "canary" / "bad").write_bytes(b"bad\xff")
    (tmp_path / "canary" / "good").write_bytes(b"")
    (fault,) = replay(CANARY)
    assert fault.input == tmp_path / "canary" / "bad"
    assert "no input begins with bad" in str(fault)
    assert "626164ff" in str(fault)


def test_a_corpus_that_no_longer_reaches_what_it_should_is_a_fault():
    assert replay(CANARY) == []
    (fault,) = replay(replace(CANARY, reaches=frozenset({"alive", "well"})))
    assert "well" in str(fault)


def test_without_the_engine_the_corpus_is_replayed_and_fuzzing_says_why_not():
    hidden = (
        "import sys, runpy; sys.modules['atheris'] = None; sys.argv[1:] = {!r};"
        "runpy.run_module('fuzz', run_name='__main__')"
    )
    for arguments, status, words in ((["cookie"], 2, "no wheel"), (["cookie", "--replay"], 0, "sound")):
        done = subprocess.run(
            [sys.executable, "-c", hidden.format(arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert words in done.stdout + done.stderr
