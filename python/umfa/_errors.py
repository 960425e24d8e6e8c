"""The errors of umfa, spelled the same everywhere: ``[function] what; got …; expected …``."""

from __future__ import annotations

from ._ext import UnsupportedError

__all__ = ["UnsupportedError", "message"]

UnsupportedError.__module__ = "umfa"  # where users find it; tracebacks print this


def message(function: str, what: str, got: object, expected: str) -> str:
    """The text of an error; `got` is the offending value."""
    return f"[{function}] {what}; got {got}; expected {expected}"


class HostReadsError(Exception):
    """A call whose tables were to stay on the GPU needs them on the host. Never leaves umfa."""


class OutOfRangeError(ValueError):
    """What the GPU has found out of range, in a call that is over."""
