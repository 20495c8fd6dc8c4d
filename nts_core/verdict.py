"""How a step of an examination ended: the words that `poolsvc doctor` and `pool-client check` share. Pure."""

from enum import StrEnum


class Verdict(StrEnum):
    """The worst last."""

    SKIPPED = "skipped"
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
