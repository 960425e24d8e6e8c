"""The emulator's own headers as clang keeps them once they are read: reading them takes 0.05 s, a
third of a kernel's time in the front end."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_INCLUDE = re.compile(r"^#include <\w+(?:\.h)?>$", re.MULTILINE)


def flags(folder: Path, text: str, command: Sequence[str], fingerprint: str) -> list[str]:
    """What makes `command` take the headers that `text` includes, and no others, from `folder`."""
    if text.startswith("#define"):  # a name that the text takes from them: see rewrite._own_names
        return []
    headers = "\n".join(sorted(set(_INCLUDE.findall(text)))) + "\n"
    key = hashlib.sha256("\0".join([fingerprint, headers, *command]).encode()).hexdigest()[:32]
    path = folder / f"headers-{key}.pch"
    if not path.exists():
        _compile(headers, command, path)
    return ["-include-pch", str(path)]


def _compile(headers: str, command: Sequence[str], path: Path) -> None:
    handle, work = tempfile.mkstemp(suffix=".pch", dir=path.parent)
    os.close(handle)
    # Headers are told apart by what is in them, not by their times: see toolchain.fingerprint.
    as_header = ["c++-header" if w == "c++" else w for w in command if w != "-fsyntax-only"]
    kept = ["-Xclang", "-fno-pch-timestamp", "-o", work, "-"]
    subprocess.run([*as_header, *kept], input=headers, text=True, check=True, capture_output=True)
    os.replace(work, path)
