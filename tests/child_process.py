"""A function in a process of its own that a test kills, or that kills itself.

Children are spawned: a fork of a process with threads (a server's, pyarrow's allocator) has the locks that they held,
and may wait for one for ever.
"""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

LIMIT_S = 120.0


def start_child(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Starts a function of a module that imports little; all of it is imported again."""
    child = multiprocessing.get_context("spawn").Process(target=function, args=arguments, daemon=True)
    child.start()
    return child


def exit_code(child: BaseProcess, limit_s: float = LIMIT_S) -> int:
    """Waits for the end of a child; one that takes longer is killed, and the test fails."""
    child.join(limit_s)
    if child.exitcode is None:
        child.kill()
        child.join()
        pytest.fail(f"child process {child.pid} had not ended after {limit_s} s.")
    return child.exitcode


def wait_until(is_so: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Waits for a condition; the test fails where it does not come."""
    end = time.monotonic() + limit_s
    while not is_so():
        if time.monotonic() > end:
            pytest.fail(f"what was waited for had not come after {limit_s} s.")
        time.sleep(0.005)
