"""Compiling for macOS needs zig's clang, on any system; see cross.py."""

import importlib.util

import pytest

collect_ignore = [] if importlib.util.find_spec("ziglang") else ["test_cross_compile.py"]


@pytest.fixture(autouse=True)
def _has_nanobind() -> None:
    pytest.importorskip("nanobind")
