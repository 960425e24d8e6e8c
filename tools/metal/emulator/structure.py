"""What a Metal text declares: scopes, attributes, kernels, instantiations, function constants.

Kernels are read from tokens rather than from clang's syntax tree: the text is preprocessed, so no
macro hides them, the attributes stand where Metal puts them (a parameter may be named like its own
attribute, which rules out spelling attributes as macros), and no dump of tens of megabytes has to
be read. The types are left to C++: the launcher takes them from the function itself.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

from .declarations import Declaration, declarations
from .errors import SourceError
from .expressions import constants, evaluate
from .records import Record, find_records
from .tokens import (
    Token,
    matching,
    matching_angle,
    matching_angle_back,
    parts_of,
    spelled,
    tokenize,
)
from .typenames import find_type_ranges, find_types

SCALARS = [
    "bool",
    "char",
    "uchar",
    "short",
    "ushort",
    "int",
    "uint",
    "long",
    "ulong",
    "half",
    "bfloat",
    "float",
    "int8_t",
    "uint8_t",
    "int16_t",
    "uint16_t",
    "int32_t",
    "uint32_t",
    "int64_t",
    "uint64_t",
    "size_t",
    "ptrdiff_t",
]
VECTOR_ELEMENTS = [
    "bool",
    "char",
    "uchar",
    "short",
    "ushort",
    "int",
    "uint",
    "long",
    "ulong",
    "half",
    "bfloat",
    "float",
]
VECTORS = [f"{e}{n}" for e in VECTOR_ELEMENTS for n in (2, 3, 4)]
PACKED = [f"packed_{v}" for v in VECTORS]
MATRICES = [f"{e}{c}x{r}" for e in ("float", "half") for c in (2, 3, 4) for r in (2, 3, 4)]
LIBRARY_TYPES = [
    "simdgroup_half8x8",
    "simdgroup_float8x8",
    "simdgroup_bfloat8x8",
    "simdgroup_matrix",
    "vec",
    "matrix",
    "atomic_int",
    "atomic_uint",
    "atomic_bool",
    "atomic_float",
    "atomic_ulong",
    "atomic",
]
BUILTIN_ARGUMENTS = {
    "thread_position_in_grid": "position",
    "threadgroup_position_in_grid": "position",
    "threadgroups_per_grid": "position",
    "thread_position_in_threadgroup": "position",
    "threads_per_threadgroup": "position",
    "dispatch_threads_per_threadgroup": "position",
    "threads_per_grid": "position",
    "thread_index_in_threadgroup": "scalar",
    "thread_index_in_simdgroup": "simdgroup",
    "simdgroup_index_in_threadgroup": "simdgroup",
    "threads_per_simdgroup": "simdgroup",
    "simdgroups_per_threadgroup": "simdgroup",
    "dispatch_simdgroups_per_threadgroup": "simdgroup",
    "thread_execution_width": "simdgroup",
    "thread_index_in_quadgroup": "quadgroup",
    "quadgroup_index_in_threadgroup": "quadgroup",
    "quadgroups_per_threadgroup": "quadgroup",
    "dispatch_quadgroups_per_threadgroup": "quadgroup",
}
# The same value under another name.
BUILTIN_SYNONYMS = {
    "dispatch_threads_per_threadgroup": "threads_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup": "simdgroups_per_threadgroup",
    "thread_execution_width": "threads_per_simdgroup",
    "dispatch_quadgroups_per_threadgroup": "quadgroups_per_threadgroup",
}
KNOWN_ATTRIBUTES = {
    *BUILTIN_ARGUMENTS,
    *("buffer", "threadgroup", "function_constant", "host_name", "kernel", "maybe_unused"),
    *("max_total_threads_per_threadgroup", "unused", "clang", "id", "user", "visible"),
    *("stitchable", "texture", "sampler"),
    *("fallthrough", "nodiscard", "noreturn", "deprecated", "gnu"),
}


@dataclass
class Attribute:
    name: str
    arguments: list[Token]
    token: Token

    @property
    def text(self) -> str:
        return spelled(self.arguments)


@dataclass
class Parameter:
    """A kernel's parameter: what it is bound to, and the tokens of its declaration."""

    name: str
    kind: str  # buffer, threadgroup or builtin
    index: int  # of the buffer or threadgroup memory
    builtin: str
    condition: str  # name of the function constant without which it is absent
    declaration: list[Token]

    @property
    def type(self) -> str:
        return spelled([t for t in self.declaration if t.original != self.name])


@dataclass
class Kernel:
    """A kernel function, or the template of one."""

    name: str
    is_template: bool
    parameters: list[Parameter]
    token: Token
    body: tuple[int, int]  # of its braces, as token indices
    max_threads: str
    # Of its template: for each parameter whether it is a type, and whether it has a default.
    template: list[tuple[bool, bool]] = field(default_factory=list)

    def takes(self, arguments: list[list[Token]]) -> bool:
        """Whether these may be its template arguments, by their number and kind."""
        needed = sum(1 for _, default in self.template if not default)
        return (
            needed <= len(arguments) <= len(self.template)
            and all(
                is_type or not _is_type(a)
                for a, (is_type, _) in zip(arguments, self.template, strict=False)
            )
            and all(
                not is_type or _is_type(a) or a[0].kind == "name"
                for a, (is_type, _) in zip(arguments, self.template, strict=False)
            )
        )


def _is_type(argument: list[Token]) -> bool:
    names = {*SCALARS, *VECTORS, *PACKED, *MATRICES, *LIBRARY_TYPES, "unsigned", "void"}
    return argument[0].text in names


@dataclass
class EntryPoint:
    """What the host can ask for by name."""

    host_name: str
    expression: str  # the function, as C++
    kernel: Kernel
    token: Token


@dataclass
class FunctionConstant:
    name: str
    qualified: str
    type: str
    index: int
    statement: tuple[int, int]


@dataclass
class Scope:
    kind: str  # namespace, type, function, kernel or block
    name: str
    open: int
    close: int


@dataclass
class Structure:
    tokens: list[Token]
    attributes: list[tuple[int, int, list[Attribute]]] = field(default_factory=list)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    overloads: dict[str, list[Kernel]] = field(default_factory=dict)  # templates of one name
    entries: dict[str, EntryPoint] = field(default_factory=dict)
    instantiations: list[tuple[int, int, str]] = field(default_factory=list)
    constants: list[FunctionConstant] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    around: list[tuple[Scope, ...]] = field(default_factory=list)  # of each token
    record_list: list[Record] = field(default_factory=list)
    records: set[str] = field(default_factory=set)  # struct, class and union names
    aliases: set[str] = field(default_factory=set)
    vector_aliases: set[str] = field(default_factory=set)  # those that name vectors, and only they
    type_parameters: set[str] = field(default_factory=set)
    attribute_at: dict[int, int] = field(default_factory=dict)
    integers: dict[str, int] = field(default_factory=dict)  # constants of the text, when asked for
    # Where names of types mean types: token ranges of templates and scopes.
    type_ranges: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def all_kernels(self) -> list[Kernel]:
        return [k for group in self.overloads.values() for k in group]

    @functools.cached_property
    def declared(self) -> list[Declaration]:
        return declarations(self.tokens)

    def scope_of(self, i: int) -> tuple[Scope, ...]:
        """Scopes around token ``i``, outermost first."""
        return self.around[i]

    def is_type(self, name: str, i: int) -> bool:
        """Whether a type parameter or an alias of this name is in scope at token ``i``."""
        ranges = self.type_ranges.get(name)
        return ranges is not None and any(first <= i <= last for first, last in ranges)

    def fail(self, token: Token, rule: str, message: str) -> SourceError:
        return SourceError(f"{token.location}: error: {message} [{rule}]", (rule,))


def read(text: str) -> Structure:
    """Reads the preprocessed text of a library."""
    tokens = tokenize(text)
    s = Structure(tokens)
    _find_attributes(s)
    find_types(s)
    s.record_list = find_records(tokens)
    _find_kernels(s)
    _find_scopes(s)
    find_type_ranges(s)
    _find_constants(s)
    return s


def _find_attributes(s: Structure) -> None:
    tokens = s.tokens
    i = 0
    while i + 1 < len(tokens):
        if not (tokens[i].text == "[" and tokens[i + 1].text == "["):
            i += 1
            continue
        end = matching(tokens, i)
        found: list[Attribute] = []
        k = i + 2
        while k < end - 1:
            token = tokens[k]
            name = token.text
            k += 1
            while k + 1 < end and tokens[k].text == "::":
                name += "::" + tokens[k + 1].text
                k += 2
            arguments: list[Token] = []
            if tokens[k].text == "(":
                close = matching(tokens, k)
                arguments = tokens[k + 1 : close]
                k = close + 1
            found.append(Attribute(name, arguments, token))
            if tokens[k].text == ",":
                k += 1
        s.attributes.append((i, end, found))
        s.attribute_at[i] = end
        i = end + 1


def _statement_start(s: Structure, i: int) -> int:
    """First token of the declaration that holds token ``i`` at namespace scope."""
    k = i
    while k > 0 and s.tokens[k - 1].text not in (";", "{", "}"):
        k -= 1
    return k


def _integer(s: Structure, attribute: Attribute) -> int:
    text = attribute.text.strip()
    try:
        if not s.integers and any(t.kind == "name" for t in attribute.arguments):
            s.integers = constants(s.tokens)
        return evaluate(attribute.arguments, s.integers)
    except ValueError as error:
        message = f"[[{attribute.name}]] needs an integer, not '{text}': {error}"
        raise s.fail(attribute.token, "attribute", message) from None


def _find_kernels(s: Structure) -> None:
    tokens = s.tokens
    instantiations: list[tuple[int, int, int]] = []
    for i, token in enumerate(tokens):
        if token.text != "kernel" or token.kind != "name":
            continue
        start = _statement_start(s, i)
        if tokens[start].text == "template" and tokens[start + 1].text != "<":
            end = i
            while tokens[end].text != ";":
                end = matching(tokens, end) + 1 if tokens[end].text in "([{" else end + 1
            instantiations.append((start, end, i))
        else:
            _read_kernel(s, start, i)
    for start, end, _ in instantiations:
        _read_instantiation(s, start, end)
    for kernel in s.all_kernels():
        if not kernel.is_template:
            _add_entry(s, EntryPoint(kernel.name, kernel.name, kernel, kernel.token))


def _skip_attributes(s: Structure, i: int) -> int:
    while i in s.attribute_at:
        i = s.attribute_at[i] + 1
    return i


def _attributes_between(s: Structure, start: int, end: int) -> list[Attribute]:
    return [a for i, close, found in s.attributes if start <= i and close < end for a in found]


def _read_kernel(s: Structure, start: int, at: int) -> None:
    tokens = s.tokens
    i = start
    if tokens[i].text == "template":
        close = matching_angle(tokens, i + 1)
        i = (close or i) + 1
    while i < len(tokens):
        i = _skip_attributes(s, i)
        if tokens[i].text in (";", "{", "}", "="):
            i = len(tokens)
            break
        if (
            tokens[i].kind == "name"
            and tokens[i + 1].text == "("
            and tokens[i].text
            not in (
                "decltype",
                "__attribute__",
                "alignas",
            )
        ):
            break
        if tokens[i].text == "(":
            i = matching(tokens, i)
        i += 1
    if i >= len(tokens):
        raise s.fail(tokens[at], "keyword-name", "'kernel' begins a function, and none is here")
    name = tokens[i]
    if "void" not in {t.text for t in tokens[start:i]}:
        raise s.fail(name, "kernel-void", f"kernel '{name.text}' must return void")
    close = matching(tokens, i + 1)
    attributes = _attributes_between(s, start, i)
    body = close + 1
    while body in s.attribute_at:
        end = s.attribute_at[body]
        attributes += _attributes_between(s, body, end + 1)
        body = end + 1
    if tokens[body].text != "{":
        return  # a declaration
    limits = [a.text for a in attributes if a.name == "max_total_threads_per_threadgroup"]
    kernel = Kernel(
        name.text,
        tokens[start].text == "template",
        _read_parameters(s, i + 2, close),
        name,
        (body, matching(tokens, body)),
        limits[0] if limits else "",
    )
    if kernel.is_template:
        kernel.template = _template_parameters(s, start)
    others = s.overloads.setdefault(name.text, [])
    if any(not (k.is_template and kernel.is_template) for k in others):
        raise s.fail(name, "kernel-overload", f"kernel '{name.text}' is defined twice")
    if name.text == "main":
        raise s.fail(name, "kernel-name", "a kernel may not be named 'main'")
    others.append(kernel)
    s.kernels.setdefault(name.text, kernel)


def _template_parameters(s: Structure, start: int) -> list[tuple[bool, bool]]:
    """Of the template at ``start``: for each parameter whether it is a type, has a default."""
    close = matching_angle(s.tokens, start + 1) or start + 1
    found = []
    for first, last in _split(s, start + 2, close):
        words = [t.text for t in s.tokens[first:last]]
        found.append((words[0] in ("typename", "class"), "=" in words))
    return found


def _split(s: Structure, start: int, end: int) -> list[tuple[int, int]]:
    """Token ranges between the commas at the top level of [start, end)."""
    return parts_of(s.tokens, start, end)


def _read_parameters(s: Structure, start: int, end: int) -> list[Parameter]:
    parameters: list[Parameter] = []
    used: dict[str, dict[int, str]] = {"buffer": {}, "threadgroup": {}}
    pending: list[int] = []
    for first, last in _split(s, start, end):
        attributes = _attributes_between(s, first, last + 1)
        declaration = []
        i = first
        while i < last:
            if i in s.attribute_at:
                i = s.attribute_at[i] + 1
                continue
            declaration.append(s.tokens[i])
            i += 1
        if not declaration or spelled(declaration) == "void":
            continue
        name = next((t.text for t in reversed(declaration) if t.kind == "name"), "")
        parameter = Parameter(name, "", -1, "", "", declaration)
        for a in attributes:
            if a.name in ("buffer", "threadgroup"):
                parameter.kind, parameter.index = a.name, _integer(s, a)
                if not 0 <= parameter.index <= 30:
                    raise s.fail(
                        a.token, "buffer-index", f"index {parameter.index} is not in 0..30"
                    )
            elif a.name == "function_constant":
                parameter.condition = a.text
            elif a.name in BUILTIN_ARGUMENTS:
                parameter.kind = "builtin"
                parameter.builtin = a.name
        if not parameter.kind:
            for a in attributes:
                if a.name not in KNOWN_ATTRIBUTES:
                    raise s.fail(a.token, "unknown-attribute", f"unknown attribute [[{a.name}]]")
            words = {t.text for t in declaration}
            if not words & {"*", "&", "["}:
                raise s.fail(
                    declaration[0], "kernel-parameter", f"parameter '{name}' has no attribute"
                )
            # Metal gives the next free index to a parameter without one.
            parameter.kind = "threadgroup" if "threadgroup" in words else "buffer"
            pending.append(len(parameters))
        elif parameter.kind != "builtin":
            other = used[parameter.kind].get(parameter.index)
            if other is not None and not parameter.condition:
                raise s.fail(
                    declaration[0],
                    "buffer-index-twice",
                    f"'{name}' and '{other}' both have {parameter.kind}({parameter.index})",
                )
            used[parameter.kind][parameter.index] = name
        parameters.append(parameter)
    for i in pending:
        taken = used[parameters[i].kind]
        parameters[i].index = next(n for n in range(31) if n not in taken)
        taken[parameters[i].index] = parameters[i].name
    return parameters


def _read_instantiation(s: Structure, start: int, end: int) -> None:
    tokens = s.tokens
    names = [a for a in _attributes_between(s, start, end) if a.name == "host_name"]
    last = end - 1
    if tokens[last].text == ")":  # spelled with its parameters
        depth = 0
        while True:
            depth += {")": 1, "(": -1}.get(tokens[last].text, 0)
            last -= 1
            if depth == 0:
                break
    first = last
    if tokens[last].text == ">":
        opening = matching_angle_back(tokens, last)
        first = (opening if opening is not None else last) - 1
    function = tokens[first].text
    while first >= 2 and tokens[first - 1].text == "::":
        first -= 2
    expression = spelled(tokens[first : last + 1])
    candidates = [k for k in s.overloads.get(function, []) if k.is_template]
    if not candidates:
        raise s.fail(tokens[first], "instantiation", f"'{function}' is no kernel template")
    kernel = candidates[0]
    if len(candidates) > 1:
        close = matching_angle_back(tokens, last) if tokens[last].text == ">" else None
        given = [tokens[a:b] for a, b in _split(s, (close or last) + 1, last)]
        kernel = next((k for k in candidates if k.takes(given)), kernel)
    if not names:
        raise s.fail(
            tokens[start], "host-name", f"the instantiation of '{function}' has no [[host_name]]"
        )
    pieces = re.findall(r'"([^"]*)"', names[0].text)
    s.instantiations.append((start, end, expression))
    _add_entry(s, EntryPoint("".join(pieces), expression, kernel, names[0].token))


def _add_entry(s: Structure, entry: EntryPoint) -> None:
    if entry.host_name in s.entries:
        raise s.fail(entry.token, "host-name-twice", f"two kernels are named '{entry.host_name}'")
    s.entries[entry.host_name] = entry


def _find_scopes(s: Structure) -> None:
    """Kinds of all braces. Inside of a function everything is a block of it."""
    tokens = s.tokens
    kernel_bodies = {k.body[0]: k.name for group in s.overloads.values() for k in group}
    stack: tuple[Scope, ...] = ()
    for i, token in enumerate(tokens):
        if token.text == "}" and stack:
            stack[-1].close = i
            stack = stack[:-1]
        s.around.append(stack)
        if token.text == "{":
            inside = any(x.kind in ("function", "kernel") for x in stack)
            kind, name = "block", ""
            if i in kernel_bodies:
                kind, name = "kernel", kernel_bodies[i]
            elif not inside or _opens_type(s, i):
                kind, name = _brace_kind(s, i)
            s.scopes.append(Scope(kind, name, i, len(tokens)))
            stack = (*stack, s.scopes[-1])


def _opens_type(s: Structure, i: int) -> bool:
    start = _statement_start(s, i)
    words = [t.text for t in s.tokens[start:i]]
    return any(w in ("struct", "class", "union", "enum") for w in words) and "(" not in words


def _brace_kind(s: Structure, i: int) -> tuple[str, str]:
    start = _statement_start(s, i)
    words = [t.text for t in s.tokens[start:i]]
    if "namespace" in words:
        at = words.index("namespace")
        return "namespace", "".join(words[at + 1 :])
    if "=" in words and "operator" not in words and "template" not in words:
        return "block", ""  # an initialiser
    if words and words[-1] in (")", "const", "thread", "device", "constant", "threadgroup"):
        return "function", ""
    if ")" in words and not any(w in ("struct", "class", "union", "enum") for w in words):
        return "function", ""  # a constructor with initialisers, a trailing return type
    for word in ("struct", "class", "union", "enum"):
        if word in words:
            return "type", ""
    return "block", ""


_SPECIFIERS = ("constant", "const", "constexpr", "static", "extern", "inline")


def _find_constants(s: Structure) -> None:
    for i, end, found in s.attributes:
        constants = [a for a in found if a.name == "function_constant"]
        if not constants or s.tokens[end + 1].text not in (";", "=", "{"):
            continue
        start = _statement_start(s, i)
        declared = [t.text for t in s.tokens[start:i]]
        if s.tokens[end + 1].text != ";":
            raise s.fail(s.tokens[i], "function-constant", "a function constant has no initialiser")
        if "constant" not in declared:
            raise s.fail(s.tokens[i], "function-constant", "a function constant is 'constant'")
        words = [t for t in s.tokens[start:i] if t.text not in _SPECIFIERS]
        scope = "".join(x.name + "::" for x in s.scope_of(i) if x.kind == "namespace" and x.name)
        name = words[-1].text
        index = _integer(s, constants[0])
        if not 0 <= index <= 65535:
            raise s.fail(s.tokens[i], "function-constant", f"index {index} is not in 0..65535")
        if any(t.text in s.records for t in words[:-1]):
            raise s.fail(
                s.tokens[i], "function-constant", "a function constant is a scalar or a vector"
            )
        s.constants.append(
            FunctionConstant(
                name,
                scope + name,
                spelled(words[:-1]),
                index,
                (start, end + 1),
            )
        )
    seen: dict[int, str] = {}
    for c in s.constants:
        if c.index in seen:
            raise s.fail(
                s.tokens[c.statement[0]],
                "function-constant-twice",
                f"'{c.name}' and '{seen[c.index]}' both have index {c.index}",
            )
        seen[c.index] = c.name


def initialised_late(s: Structure) -> frozenset[str]:
    """Places of the program's constants whose values follow from function constants, or that are
    objects with constructors: they may be computed when the library is loaded."""
    names = {c.name for c in s.constants} | {r.name for r in s.record_list if r.has_constructor}
    places: set[str] = set()
    tokens, i = s.tokens, 0
    while i < len(tokens):
        if tokens[i].text == "constant" and all(x.kind == "namespace" for x in s.scope_of(i)):
            end = i
            while end + 1 < len(tokens) and tokens[end].text != ";":
                end = matching(tokens, end) + 1 if tokens[end].text in "([{" else end + 1
            words = [t.text for t in tokens[i:end]]
            if names & set(words) or "is_function_constant_defined" in words:
                if "=" in words:
                    names.add(words[words.index("=") - 1])
                places |= {t.location for t in tokens[i:end]}
            i = end
        i += 1
    return frozenset(places)
