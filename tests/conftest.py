"""What all tests share."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _leftovers():
    """What a module leaves open is reported there, not in whichever test the collector happens to run."""
    yield
    gc.collect()
    gc.freeze()  # or each module would have what all before it have left looked at once more
