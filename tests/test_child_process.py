"""A child process that never ends fails its test instead of stopping it."""

import time

import pytest

from tests.child_process import exit_code, start_child, wait_until


def test_a_child_that_does_not_end_fails():
    child = start_child(time.sleep, 600)
    with pytest.raises(pytest.fail.Exception, match=r"had not ended after 0\.1 s"):
        exit_code(child, 0.1)
    assert not child.is_alive()
    assert exit_code(start_child(time.sleep, 0)) == 0


def test_what_does_not_come_fails():
    wait_until(lambda: True, 0.0)
    with pytest.raises(pytest.fail.Exception, match=r"had not come after 0\.01 s"):
        wait_until(lambda: False, 0.01)
