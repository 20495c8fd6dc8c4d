"""What all tests share."""

import gc
from importlib.util import find_spec

import pytest


@pytest.fixture(scope="module", autouse=True)
def _leftovers():
    """What a module leaves open is reported there, not in whichever test the collector happens to run."""
    yield
    gc.collect()
    gc.freeze()  # or each module would have what all before it have left looked at once more


NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        find_spec("nts_engine") is None,
        reason="nts_engine is not built: make setup builds it where cargo is there",
    ),
)


def _answering(packets):
    """Have agents answer by these, in this process and in those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POOL_AGENT_ENGINE__PACKETS", packets)
        yield packets


@pytest.fixture(scope="module", params=[NATIVE, "python"])
def packets(request):
    """Both of an agent's packet engines in turn."""
    yield from _answering(request.param)


@pytest.fixture(
    scope="module",
    params=[NATIVE, pytest.param("python", marks=[pytest.mark.long] if find_spec("nts_engine") else [])],
)
def slow_packets(request):
    """The same for what takes long: Python's only in `make test-long`, where there are others."""
    yield from _answering(request.param)


@pytest.fixture(params=[NATIVE])
def native_packets(request):
    """For what is so in Rust alone."""
    yield from _answering(request.param)


@pytest.fixture
def python_packets():
    """For what is so in Python alone."""
    yield from _answering("python")
