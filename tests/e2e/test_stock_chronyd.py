"""A stock chronyd as a member's client, with the very commands that `make demo KEEP=1` prints."""

import os

import pytest

from lab.demo import stock_chronyd
from lab.processes import wait_until

_AUTH_MODE, _COOKIES = 1, 8


@pytest.mark.skipif(os.geteuid() != 0, reason="a hosts file of its own takes root")
def test_a_stock_chronyd_takes_time_from_a_member_by_its_pool_name(pool):
    member = pool.add("clock").start()
    pool.wait_for_state(member, "active")
    with stock_chronyd(pool, member) as chronyd:
        wait_until(lambda: _selected(chronyd), "chronyd selects the member")
        auth = chronyd.report("authdata")[0]

    assert auth[_AUTH_MODE] == "NTS"
    assert int(auth[_COOKIES]) == 8


def _selected(chronyd):
    rows = chronyd.report("sources")
    return bool(rows) and rows[0][1] == "*"
