"""A whole pool for the tests of a module."""

import pytest

from lab.pool import LabPool


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """CA, zone, resolver and registry; each test adds the members it needs."""
    with LabPool(tmp_path_factory.mktemp("pool"), addresses=12, opening_size=1) as running:
        yield running
