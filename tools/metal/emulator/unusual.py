"""Forms that one token does not tell: what a reference is bound to, how an array is passed on, what
a struct is assigned from, how a kernel template is instantiated.

All of these are C++, and clang compiles them; what they have in common is that Apple's compiler, a
fork with memories in its types, was found to treat some of them otherwise, or that nobody has
published them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from .declarations import Declaration
from .reading import SPACES, Form, Reading
from .tokens import matching, matching_angle, matching_back, parts_of


class Unusual(Reading):
    """Forms of more than a token."""

    def all(self) -> Iterator[Form]:
        for part in (
            *(self.templates, self.kernels, self.instantiations, self.elements),
            *(self.sub_arrays, self.overloads, self.assignments, self.references),
        ):
            yield from part()

    # ----------------------------------------------------------------------------- templates

    def templates(self) -> Iterator[Form]:
        """What is a template of what, and which specialisations there are."""
        for i, token in enumerate(self.tokens):
            if token.text != "template" or self.text(i + 1) != "<":
                continue
            close = matching_angle(self.tokens, i + 1) or i + 1
            for a, b in parts_of(self.tokens, i + 2, close):
                yield Form("template parameter", self.template_parameter(a, b), self.tokens[a])
            k = close + 1
            while self.text(k) == "[":
                k = matching(self.tokens, k) + 1
            if self.text(k) == "template":
                yield Form("template", "in a template", token)
                continue
            yield Form("template", self.template_of(k, close == i + 2), token)

    def template_parameter(self, a: int, b: int) -> str:
        found = self.words_in(a, b)
        shown = "typename" if found[0] in ("typename", "class") else found[0]
        if shown == "template":
            return "template"
        kind = "type" if shown == "typename" else f"of type {self.kind_of_type(shown)}"
        pack = "..." if "..." in found else ""
        return kind + pack + (" = default" if "=" in found else "")

    def template_of(self, k: int, explicit: bool) -> str:
        first = self.text(k)
        if first in ("struct", "class", "union"):
            while self.text(k) not in ("{", ";", ":", "<"):
                k += 1
            special = self.text(k) == "<"
            if special:
                k = (matching_angle(self.tokens, k) or k) + 1
            form = {
                (True, True): "explicit specialisation of a struct",
                (False, True): "partial specialisation of a struct",
                (False, False): "of a struct",
            }.get((explicit, special), "of a struct")
            return form + (", declared" if self.text(k) == ";" else "")
        if first == "using":
            return "of an alias"
        while k < len(self.tokens) and self.text(k) not in ("{", ";", "=", "("):
            k += 1
        if self.text(k) == "=":
            return "of a variable"
        return "explicit specialisation of a function" if explicit else "of a function"

    # ------------------------------------------------------------------------------- kernels

    def kernels(self) -> Iterator[Form]:
        for kernel in self.s.all_kernels():
            around = self.s.scope_of(kernel.body[0])
            where = "in a namespace" if around else "at global scope"
            template = "template of a kernel" if kernel.is_template else "kernel"
            yield Form("kernel", f"{template} {where}", kernel.token)

    def instantiations(self) -> Iterator[Form]:
        for start, end, expression in self.s.instantiations:
            shown = ["template"]
            for i, close, found in self.s.attributes:
                if start <= i and close < end:
                    shown += [f"[[{a.name}]]" for a in found]
            body = self.words_in(start, end)
            shown += [w for w in ("kernel", "void") if w in body and f"[[{w}]]" not in shown]
            shown += ["decltype"] if "decltype" in body else []
            shown.append("A::f<...>" if "::" in expression.split("<")[0] else "f<...>")
            shown += ["(...)"] if body[-1] == ")" or body[-2:] == [")", ";"] else []
            yield Form("instantiation", " ".join(shown), self.tokens[start])

    # ------------------------------------------------------------------------------ elements

    def elements(self) -> Iterator[Form]:
        """thread_elements()[...] of a matrix: by a number, by a name, or by what is computed."""
        for i, token in enumerate(self.tokens):
            if token.text != "thread_elements" or self.text(i + 1) != "(":
                continue
            k = matching(self.tokens, i + 1) + 1
            form = "as a whole"
            if self.text(k) == "[":
                close = matching(self.tokens, k)
                inner = self.tokens[k + 1 : close]
                one = len(inner) == 1
                kinds = {"number": "by a number", "name": "by a name"}
                form = kinds.get(inner[0].kind, "by a computed index") if one else ""
                form = form or "by a computed index"
            yield Form("thread_elements()", form, token)

    # -------------------------------------------------------------------------------- arrays

    def dimensions(self, d: Declaration) -> int:
        k = d.at + 1
        if self.text(k) == ")":
            k += 1
        count = 0
        while self.text(k) == "[" and self.text(k + 1) != "[":
            k, count = matching(self.tokens, k) + 1, count + 1
        return count

    def functions_by_name(self) -> dict[str, list[tuple[Declaration, list[tuple[int, int]]]]]:
        """Functions of the text, with the ranges of their parameters."""
        found = defaultdict(list)
        for d in self.s.declared:
            if d.kind in ("function", "member") and self.text(d.at + 1) == "(":
                close = matching(self.tokens, d.at + 1)
                found[d.token.text].append((d, parts_of(self.tokens, d.at + 2, close)))
        return dict(found)

    def owner(self, d: Declaration) -> int:
        """The type that a member belongs to, by where it opens; 0 of what is in a namespace."""
        return max((x.open for x in self.s.scope_of(d.at) if x.kind == "type"), default=0)

    def sub_arrays(self) -> Iterator[Form]:
        """f(x[0]), where x has two dimensions and f takes T (&)[N]."""
        functions = self.functions_by_name()
        for i, token in enumerate(self.tokens):
            if token.text not in functions or i in self.names:
                continue
            k = i + 1
            if self.text(k) == "<":
                k = (matching_angle(self.tokens, k) or k) + 1
            if self.text(k) != "(":
                continue
            given = parts_of(self.tokens, k + 1, matching(self.tokens, k))
            for n, (a, b) in enumerate(given):
                if self.is_sub_array(a, b) and any(
                    n < len(taken) and self.takes_array(*taken[n])
                    for _, taken in functions[token.text]
                ):
                    yield Form("array", "a part of an array bound to T (&)[N]", self.tokens[a])

    def takes_array(self, a: int, b: int) -> bool:
        found = self.words_in(a, b)
        return "(" in found and found[found.index("(") + 1] == "&" and found[-1] == "]"

    def is_sub_array(self, a: int, b: int) -> bool:
        if not (self.tokens[a].kind == "name" and self.text(a + 1) == "["):
            return False
        k, used = a + 1, 0
        while k < b and self.text(k) == "[":
            k, used = matching(self.tokens, k) + 1, used + 1
        d = self.nearest(self.text(a), a)
        return k == b and d is not None and self.dimensions(d) > used

    def overloads(self) -> Iterator[Form]:
        """Functions of one name that only the element type of an array tells apart."""
        for found in self.functions_by_name().values():
            shapes = defaultdict(list)
            for d, parameters in found:
                if self.text(matching(self.tokens, d.at + 1) + 1) != "{":
                    continue
                shape = tuple(
                    "(&)[]" if self.takes_array(a, b) else " ".join(self.words_in(a, b - 1))
                    for a, b in parameters
                )
                if "(&)[]" in shape and not self.is_template(d):
                    shapes[self.owner(d), shape].append(d)
            for same in shapes.values():
                for d in same if len(same) > 1 else ():
                    yield Form("array", "overloads that differ in an array's elements", d.token)

    def is_template(self, d: Declaration) -> bool:
        k = d.at - len(d.type)
        while self.text(k - 1) == "]":
            k = matching_back(self.tokens, k - 1)
        return self.text(k - 1) == ">"

    # ------------------------------------------------------------------- structs and references

    def assignments(self) -> Iterator[Form]:
        """a = b of structs, where b is not in the thread's memory; and T a = b."""
        for i, token in enumerate(self.tokens):
            if token.text != "=" or i in self.in_attribute or not self.s.scope_of(i):
                continue
            end = i + 1
            while end < len(self.tokens) and self.text(end) not in (";", "}"):
                end = (
                    matching(self.tokens, end) + 1 if self.text(end) in ("(", "[", "{") else end + 1
                )
            space = self.memory_of(i + 1, end)
            if not space:
                continue
            left = self.tokens[i - 1]
            declared = self.names.get(i - 1)
            if declared is not None and declared.kind == "variable":
                record = any(t.text in self.s.records for t in declared.type)
                if record and not {"*", "&"} & {t.text for t in declared.type}:
                    yield Form("struct", f"initialised from {space}", left)
            elif left.kind == "name" and self.is_record(i - 1):
                yield Form("struct", f"assigned from {space}", left)

    def memory_of(self, i: int, end: int) -> str:
        """The memory where the whole right side lies, if it names an object there."""
        first = self.tokens[i]
        if first.text == "*":
            first = self.tokens[i := i + 1]
        if first.kind != "name":
            return ""
        k = i + 1
        while k < end and self.text(k) in (".", "->", "["):
            k = matching(self.tokens, k) + 1 if self.text(k) == "[" else k + 2
        d = self.nearest(first.text, i)
        if k != end or d is None:
            return ""
        return next((t.text for t in d.type if t.text in SPACES and t.text != "thread"), "")

    def is_record(self, i: int) -> bool:
        """Whether the object that ends at token ``i`` is of a struct of the text."""
        name = self.text(i)
        if self.text(i - 1) in (".", "->"):
            candidates = [d for d in self.by_name.get(name, ()) if d.kind == "member"]
        else:
            d = self.nearest(name, i)
            candidates = [] if d is None else [d]
        return any(
            t.text in self.s.records and not {"*", "["} & {x.text for x in c.type}
            for c in candidates
            for t in c.type
        )

    def references(self) -> Iterator[Form]:
        """T& a = condition ? b : c."""
        for d in self.s.declared:
            if d.kind != "variable" or "&" not in {t.text for t in d.type[-2:]}:
                continue
            if self.text(d.at + 1) != "=":
                continue
            end = d.at + 2
            while self.text(end) not in (";", ","):
                end = matching(self.tokens, end) + 1 if self.text(end) in ("(", "[") else end + 1
            asks = any(self.text(k) == "?" for k in self.top_level(d.at + 2, end))
            yield Form("reference", "bound to ?:" if asks else "bound to an object", d.token)
