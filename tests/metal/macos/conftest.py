"""Compiling for macOS needs zig's clang; see cross.py."""

import importlib.util

collect_ignore = (
    [] if importlib.util.find_spec("ziglang") else ["test_apple_names.py", "test_cross_compile.py"]
)
