"""A pool with a staging CA: members notice nothing of the rehearsal, whether that CA is there or not."""

import pytest

from lab.pool import LabPool

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with LabPool(tmp_path_factory.mktemp("pool"), addresses=2, opening_size=1, staged=True) as running:
        yield running


def events(pool, name):
    return [line for line in pool.registry.output().splitlines() if name in line]


def test_a_member_gets_its_certificate_after_a_rehearsal(pool):
    view = pool.wait_for_state(pool.add("alice").start(), "active")
    (certificate,) = view["certificates"]
    assert pool.pebble.certificate_status(certificate["serial"]) == "Valid"
    assert len(events(pool, "order_rehearsed")) == 1
    assert len(events(pool, "order_placed")) == 2


def test_a_member_gets_its_certificate_while_the_staging_ca_is_away(pool):
    pool.staging.stop()
    view = pool.wait_for_state(pool.add("bob").start(), "active", 60)
    assert pool.pebble.certificate_status(view["certificates"][-1]["serial"]) == "Valid"
    assert len(events(pool, "rehearsal_given_up")) == 1
