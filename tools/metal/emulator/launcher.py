"""Writes the C++ between the runtime and the kernels: one entry function per kernel."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import SourceError
from .structure import BUILTIN_SYNONYMS, EntryPoint, FunctionConstant, Structure

_EXTERNAL = re.compile(
    r"^@(\S+) = external addrspace\(2\) constant (i8|i32)(, align \d+)$", re.MULTILINE
)
ABSENT_BUFFER = 31  # no index of Metal's: the runtime reports its use


def launcher(s: Structure, constants: Mapping[int, Any]) -> str:
    """Text to append to the library: the entries, and definitions of those function constants that
    `constants_in_ir` does not define."""
    lines = ["", '# 1 "<launcher>"', "#include <umfa_launch.h>"]
    lines += constants_in_text(s.constants, constants)
    for i, entry in enumerate(s.entries.values()):
        lines += _entry(i, entry)
    return "\n".join(lines) + "\n"


def constants_in_text(
    declared: Sequence[FunctionConstant], constants: Mapping[int, Any]
) -> list[str]:
    """Definitions of the given constants that are neither bool nor int."""
    return [_given(c, constants) for c in declared if not _in_ir(c) and c.index in constants]


def constants_in_ir(
    declared: Sequence[FunctionConstant], constants: Mapping[int, Any]
) -> dict[str, int]:
    """Values of bool and int constants, by their symbols in LLVM IR, and whether each constant is
    defined: one reading of a text serves all of these values."""
    values = {}
    for c in declared:
        values[_symbol(_scoped(c, "umfa_defined_" + c.name))] = int(c.index in constants)
        if _in_ir(c) and c.index in constants:
            given = constants[c.index]
            _value_of_scalar(c, given)  # refuses another type
            if not -(1 << 31) <= int(given) < 1 << 31:
                raise _unfit(c, given)
            values[_symbol(c.qualified)] = int(given)
    return values


def with_constants(ir: str, values: Mapping[str, int]) -> str:
    """The IR with these values, as a definition in the text would give them."""

    def defined(found: re.Match[str]) -> str:
        symbol, type_, rest = found.groups()
        if symbol not in values:
            return found.group()  # it has no value: the runtime reports its use
        return f"@{symbol} = addrspace(2) constant {type_} {values[symbol]}{rest}"

    return _EXTERNAL.sub(defined, ir)


def _in_ir(c: FunctionConstant) -> bool:
    return c.type in ("bool", "int")


def _symbol(qualified: str) -> str:
    """The mangled name of a variable with external linkage."""
    *spaces, name = qualified.split("::")
    names = "".join(f"{len(x)}{x}" for x in (*spaces, name))
    return f"_ZN{names}E" if spaces else name


def definitions(s: Structure, constants: Mapping[int, Any]) -> list[str]:
    """The function constants' values, as far as they are given."""
    return [_definition(c, constants) for c in s.constants]


def _definition(c: FunctionConstant, constants: Mapping[int, Any]) -> str:
    given = str(c.index in constants).lower()
    text = f"constant bool {_scoped(c, 'umfa_defined_' + c.name)} = {given};"
    return f"{text} {_given(c, constants)}" if c.index in constants else text


def _given(c: FunctionConstant, constants: Mapping[int, Any]) -> str:
    return f"constant {c.type} {c.qualified} = {_value(c, constants[c.index])};"


def _scoped(c: FunctionConstant, name: str) -> str:
    return c.qualified[: len(c.qualified) - len(c.name)] + name


def _value(c: FunctionConstant, value: Any) -> str:
    if isinstance(value, (tuple, list, np.ndarray)):
        return "{" + ", ".join(_value_of_scalar(c, x) for x in value) + "}"
    return _value_of_scalar(c, value)


def _value_of_scalar(c: FunctionConstant, value: Any) -> str:
    is_bool = isinstance(value, (bool, np.bool_))
    is_integer = isinstance(value, numbers.Integral) and not is_bool
    scalar = c.type.rstrip("234")
    fits = (
        is_bool
        if scalar == "bool"
        else isinstance(value, numbers.Real) and not is_bool
        if scalar in ("float", "half", "bfloat")
        else is_integer
    )
    if not fits:
        raise _unfit(c, value)
    if is_bool:
        return "true" if value else "false"
    if is_integer and scalar not in ("float", "half", "bfloat"):
        return f"static_cast<{scalar}>({int(value)}L)"
    return f"static_cast<{scalar}>({float(value).hex()})"


def _unfit(c: FunctionConstant, value: Any) -> SourceError:
    return SourceError(
        f"function constant '{c.name}' (index {c.index}) has type {c.type}; got {value!r}",
        ("function-constant-type",),
    )


def _entry(number: int, entry: EntryPoint) -> list[str]:
    arguments, writable = [], []
    kernel = entry.kernel
    for i, p in enumerate(kernel.parameters):
        type_ = f"umfa_signature_{number}::parameter<{i}>"
        if p.kind == "builtin":
            name = BUILTIN_SYNONYMS.get(p.builtin, p.builtin)
            arguments.append(f"umfa_backend::launch_value<{type_}>(umfa_backend::{name})")
        elif p.kind == "threadgroup":
            arguments.append(f"umfa_backend::bound<{type_}>::threadgroup_memory({p.index})")
        else:
            index = f"({p.condition}) ? {p.index} : {ABSENT_BUFFER}" if p.condition else p.index
            arguments.append(f"umfa_backend::bound<{type_}>::buffer({index})")
            writable.append(f"(umfa_backend::bound<{type_}>::writable ? 1u << {p.index} : 0u)")
    mask = " | ".join(writable) or "0u"
    token = kernel.token
    # Errors in how a kernel's parameters are made point at the kernel.
    file = token.file.replace("\\", "\\\\").replace('"', '\\"')
    return [
        f'# {token.line} "{file}"',
        f"typedef umfa_backend::signature<decltype({entry.expression})> umfa_signature_{number};",
        f'# {token.line} "{file}"',
        f'extern "C" unsigned umfa_writable_{number} = {mask};',
        f'# {token.line} "{file}"',
        f'extern "C" void umfa_entry_{number}() {{ {entry.expression}({", ".join(arguments)}); }}',
    ]
