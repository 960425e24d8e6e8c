"""Writes the C++ between the runtime and the kernels: one entry function per kernel."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import SourceError
from .structure import BUILTIN_SYNONYMS, EntryPoint, FunctionConstant, Structure

ABSENT_BUFFER = 31  # no index of Metal's: the runtime reports its use


def launcher(s: Structure, constants: Mapping[int, Any]) -> str:
    """Text to append to the library: definitions of the function constants, and the entries."""
    lines = ["", '# 1 "<launcher>"', "#include <umfa_launch.h>"]
    lines += definitions(s, constants)
    for i, entry in enumerate(s.entries.values()):
        lines += _entry(i, entry)
    return "\n".join(lines) + "\n"


def definitions(s: Structure, constants: Mapping[int, Any]) -> list[str]:
    """The function constants' values, as far as they are given."""
    return [_definition(c, constants) for c in s.constants]


def _definition(c: FunctionConstant, constants: Mapping[int, Any]) -> str:
    given = c.index in constants
    text = f"constant bool {_scoped(c, 'umfa_defined_' + c.name)} = {str(given).lower()};"
    if given:
        text += f" constant {c.type} {c.qualified} = {_value(c, constants[c.index])};"
    return text


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
        raise SourceError(
            f"function constant '{c.name}' (index {c.index}) has type {c.type}; got {value!r}",
            ("function-constant-type",),
        )
    if is_bool:
        return "true" if value else "false"
    if is_integer and scalar not in ("float", "half", "bfloat"):
        return f"static_cast<{scalar}>({int(value)}L)"
    return f"static_cast<{scalar}>({float(value).hex()})"


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
