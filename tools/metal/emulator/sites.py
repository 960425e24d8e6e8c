"""Places in the source, as the debug information of LLVM IR tells them."""

from __future__ import annotations

import re

_METADATA = re.compile(r"^!(\d+) = (?:distinct )?!DI(\w+)\((.*)\)$")
_FIELD = re.compile(r'(\w+): (?:!(\d+)|(\d+)|"((?:[^"\\]|\\.)*)")')


class Sites:
    """Places in the source, numbered. Inlined code is told apart by the whole chain of calls, but
    shown as the innermost place that is not in the emulator's own headers."""

    def __init__(self, lines: list[str], own_headers: tuple[str, ...]) -> None:
        self.nodes: dict[int, tuple[str, dict[str, str]]] = {}
        for line in lines:
            found = _METADATA.match(line)
            if found:
                fields = {
                    f.group(1): f.group(2) or f.group(3) or f.group(4) or ""
                    for f in _FIELD.finditer(found.group(3))
                }
                self.nodes[int(found.group(1))] = (found.group(2), fields)
        self.own = own_headers
        self.by_location: dict[int, int] = {}
        self.by_chain: dict[tuple[tuple[str, str, str], ...], int] = {}
        self.table: list[tuple[str, int]] = [("", 0)]

    def file(self, scope: int) -> str:
        while scope in self.nodes:
            fields = self.nodes[scope][1]
            if "file" in fields:
                return self.nodes[int(fields["file"])][1].get("filename", "")
            if "scope" not in fields:
                return ""
            scope = int(fields["scope"])
        return ""

    def number(self, location: int) -> int:
        known = self.by_location.get(location)
        if known is not None:
            return known
        chain = []
        at: int | None = location
        while at is not None and at in self.nodes:
            fields = self.nodes[at][1]
            file = self.file(int(fields.get("scope", "-1")))
            if not file.startswith(self.own):
                chain.append((file, fields.get("line", "0"), fields.get("column", "0")))
            at = int(fields["inlinedAt"]) if "inlinedAt" in fields else None
        key = tuple(chain)
        number = self.by_chain.get(key)
        if number is None:
            number = len(self.table)
            self.by_chain[key] = number
            shown = next((c for c in chain if c[1] != "0"), chain[0] if chain else ("", "0", "0"))
            self.table.append((shown[0], int(shown[1])))
        self.by_location[location] = number
        return number

    def is_known(self, number: int) -> bool:
        file, line = self.table[number]
        return bool(file) and line > 0

    def of_function(self, subprogram: int) -> int:
        """The place of a function, for what in it has no place of its own; 0 if it has none."""
        fields = self.nodes.get(subprogram, ("", {}))[1]
        key = ((self.file(subprogram), fields.get("line", "0"), "function"),)
        if not key[0][0] or key[0][0].startswith(self.own) or key[0][1] == "0":
            return 0
        if key not in self.by_chain:
            self.by_chain[key] = len(self.table)
            self.table.append((key[0][0], int(key[0][1])))
        return self.by_chain[key]
