"""Compiling for macOS needs zig's clang; see cross.py."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("ziglang") else ["test_*.py"]
