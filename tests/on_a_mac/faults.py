"""Stages that go wrong, for test_on_a_mac.py."""

from __future__ import annotations

import os
import signal
import time

from tests.on_a_mac.part import Part


def raises(part: Part, *, quick: bool) -> None:
    part.write("before the fault")
    raise RuntimeError("what went wrong")


def killed(part: Part, *, quick: bool) -> None:
    part.write("before the fault")
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(part: Part, *, quick: bool) -> None:
    part.write("before the fault")
    time.sleep(60)


def silent(part: Part, *, quick: bool) -> None:
    os._exit(0)


def wrong(part: Part, *, quick: bool) -> None:
    part.write("**WRONG**")
    part.wrong += 1


def good(part: Part, *, quick: bool) -> None:
    part.write(f"all is well in {os.path.expanduser('~')}/somewhere")
