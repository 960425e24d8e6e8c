"""Refuses forms of the language that nobody has published.

No Mac compiles umfa's shaders before they are released, so they say nothing that Apple's compiler
has not been seen to accept: each form in them has a row in ``forms.tsv``, with a place in published
Metal that uses it, or the section of the specification that gives it. `forms` and `unusual` say
what a form is.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from .forms import Vocabulary, loop_forms, raw_forms
from .reading import Form
from .structure import Structure
from .unusual import Unusual

__all__ = ["Form", "faults", "forms", "raw_forms", "table"]

# Beside the package, whose files decide what the emulator compiles anew.
TABLE = Path(__file__).with_name("forms.tsv")
COLUMNS = ["kind", "form", "source", "place"]

Key = tuple[str, str]


def table(path: Path = TABLE) -> dict[Key, tuple[str, str]]:
    """(kind, form) to (source, place): a repository and a file with its line, or the specification
    and its section."""
    lines = [x for x in path.read_text().splitlines() if x and not x.startswith("#")]
    header, *rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    assert header == COLUMNS, f"the columns of {path} are {COLUMNS}; got {header}"
    found: dict[Key, tuple[str, str]] = {}
    for row in rows:
        assert len(row) == len(COLUMNS), f"{path} has a row of {len(row)} columns: {row}"
        assert all(row), f"{path} has a row with an empty column: {row}"
        assert (row[0], row[1]) not in found, f"{path} has two rows for {row[:2]}"
        found[row[0], row[1]] = (row[2], row[3])
    return found


def forms(s: Structure, flat: str) -> Iterator[Form]:
    """Every form in a preprocessed text; ``s`` is its structure."""
    yield from Vocabulary(s).all()
    yield from Unusual(s).all()
    yield from loop_forms(s, flat)


def faults(found: Iterator[Form], known: dict[Key, tuple[str, str]]) -> list[str]:
    """``file:line: error: ... [provenance]`` of each form that is not in the table."""
    return [
        f"{f.token.location}: error: {f.kind} '{f.form}' has no published precedent:"
        " write it otherwise, or add it to forms.tsv with its source [provenance]"
        for f in found
        if f.key not in known
    ]
