"""A stage's part of the report: every line is on disk as soon as it is written."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Part:
    """Markdown lines, appended to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.failures = 0  # reported, and the stage went on
        self.wrong = 0  # wrong numbers

    def write(self, *lines: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def fail(self, what: str, text: str) -> None:
        """Something went wrong: its text in full, and the stage goes on."""
        self.failures += 1
        self.write("", f"**{what}**", "", "````text", text.rstrip(), "````", "")

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """What is raised inside is written, and the stage goes on."""
        try:
            yield
        except Exception as error:
            self.fail(f"{what}: {type(error).__name__}", f"{error}\n\n{traceback.format_exc()}")
