"""Kernels of umfa's shaders in the form that MLX's launcher takes: a body and what precedes it.

`mx.fast.metal_kernel` writes the kernel's signature itself: the inputs in their order, then the
outputs, each at the next buffer index, then those of Metal's attributes whose names the body has.
It offers neither function constants nor parameters in constant memory: an input of eight elements
or more is in device memory. So the constants are text, the template's parameters are declarations
at the top of the body, and ``constant SomeParams&`` is ``device const SomeParams&``. An array of
MLX's may start at any element of its memory: loads of several elements at once are loads of
elements, which the compiler may join.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from .. import _ext

_KERNEL = re.compile(r"^template <([^>]*)>\n\[\[kernel[^\]]*\]\] void (\w+)\(", re.M)
_PARAMETER = re.compile(
    r"(?P<type>.*?)\s*(?P<name>\w+)\s*(?:\[\[(?P<attribute>\w+)(?:\((?P<at>\w+)\))?\]\]"
    r"|UMFA_BUFFER_IF\((?P<optional>\w+), \w+\))\s*",
    re.S,
)
_INDEX = re.compile(r"^#define (UMFA_\w+) (\d+)\b", re.M)
_PARAMS = re.compile(r"\bconstant (\w+)&")
_JOINED_LOAD = re.compile(r"\*reinterpret_cast<device const (uint4|uint2|uint|ushort)\*>\(")
_LOADS = """// Neighbours that start at any element.
inline ushort umfa_load_ushort(device const uchar* at) { return ushort(at[0] | at[1] << 8); }
inline uint umfa_load_uint(device const uchar* at) {
    return uint(at[0]) | uint(at[1]) << 8 | uint(at[2]) << 16 | uint(at[3]) << 24;
}
inline uint2 umfa_load_uint2(device const uchar* at) {
    return uint2(umfa_load_uint(at), umfa_load_uint(at + 4));
}
inline uint4 umfa_load_uint4(device const uchar* at) {
    return uint4(umfa_load_uint(at), umfa_load_uint(at + 4), umfa_load_uint(at + 8),
                 umfa_load_uint(at + 12));
}
// The same of elements of two bytes and more.
inline uint umfa_load_uint(device const void* from) {
    device const ushort* at = reinterpret_cast<device const ushort*>(from);
    return uint(at[0]) | uint(at[1]) << 16;
}
inline uint2 umfa_load_uint2(device const void* from) {
    device const ushort* at = reinterpret_cast<device const ushort*>(from);
    return uint2(umfa_load_uint(at), umfa_load_uint(at + 2));
}
inline uint4 umfa_load_uint4(device const void* from) {
    device const ushort* at = reinterpret_cast<device const ushort*>(from);
    return uint4(umfa_load_uint(at), umfa_load_uint(at + 2), umfa_load_uint(at + 4),
                 umfa_load_uint(at + 6));
}
"""


class Buffer(NamedTuple):
    """A buffer of a kernel."""

    place: int
    """In umfa's own layout, by which a plan binds it."""
    name: str
    pointee: str
    """Its type without ``device`` and ``*``; of the parameters that of the struct."""
    written: bool
    is_params: bool


class Shader(NamedTuple):
    """A kernel's text, before its template has arguments."""

    before: str
    """All that comes before the kernel, without other kernels."""
    template: tuple[tuple[str, str], ...]
    """(kind, name) of its parameters: ``typename``, ``int`` or ``bool``."""
    buffers: tuple[Buffer, ...]
    attributes: tuple[tuple[str, str, str], ...]
    """(type, name, attribute) of the parameters that are Metal's."""
    body: str


def for_mlx(text: str) -> str:
    """The same text, whose functions take parameters in device memory and align no loads."""
    text = _PARAMS.sub(r"device const \1&", text)
    return _LOADS + _JOINED_LOAD.sub(r"umfa_load_\1(", text)


def kernel_of(launch: Mapping[str, object]) -> Shader:
    """The kernel of a plan's launch."""
    macros = launch["macros"]
    assert isinstance(macros, dict)
    return _kernel_of(str(launch["source"]), str(launch["kernel"]), str(macros.get("UMFA_OF", "")))


@lru_cache(maxsize=256)
def _kernel_of(source: str, name: str, function: str) -> Shader:
    found = shaders(source)
    if len(found) == 1:
        return next(iter(found.values()))
    if not function:  # umfa_decode and umfa_decode_merge: the longest that fits
        fitting = [x for x in found if f"{name}_".startswith(x.removeprefix("umfa_") + "_")]
        function = max(fitting, key=len)
    return found[function]


@lru_cache(maxsize=16)
def shaders(source: str) -> dict[str, Shader]:
    """The kernels of a file under shaders/, by the names of their functions."""
    text = for_mlx(_ext.shader_text(source))
    indices = {name: int(value) for name, value in _INDEX.findall(text)}
    found: dict[str, Shader] = {}
    before, at = "", 0
    for match in _KERNEL.finditer(text):
        before += text[at : match.start()]
        signature, body, at = _parts(text, match.end())
        parameters = [_PARAMETER.fullmatch(x) for x in _split(signature)]
        buffers, attributes = [], []
        for parameter in parameters:
            assert parameter is not None, f"{source}: {match[2]} has a parameter of another form"
            place = parameter["optional"] or parameter["at"]
            if place is None:
                attributes.append((parameter["type"], parameter["name"], parameter["attribute"]))
            else:
                buffers.append(_buffer(parameter["type"], parameter["name"], indices[place]))
        template = tuple((kind, name) for kind, name in map(str.split, match[1].split(",")))
        found[match[2]] = Shader(
            before,
            template,
            tuple(buffers),
            tuple(attributes),
            body,
        )
    return found


def _buffer(declared: str, name: str, index: int) -> Buffer:
    words = declared.rstrip("*& ").split()
    assert words[0] == "device", declared
    written = words[1] != "const"
    return Buffer(index, name, words[-1], written, declared.rstrip().endswith("&"))


def _parts(text: str, start: int) -> tuple[str, str, int]:
    """(parameters, body, end) of the function whose parameters start there."""
    end = _closing(text, start, "()")
    opening = text.index("{", end)
    last = _closing(text, opening + 1, "{}")
    return text[start:end], text[opening + 1 : last], last + 1


def _closing(text: str, start: int, pair: str) -> int:
    """Where the bracket closes that is open before `start`."""
    depth = 1
    for match in re.compile(rf"//[^\n]*|[{re.escape(pair)}]").finditer(text, start):
        depth += {pair[0]: 1, pair[1]: -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise ValueError(f"no {pair[1]}")


def _split(signature: str) -> list[str]:
    """A function's parameters."""
    pieces, depth = [""], 0
    for letter in signature:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces]


def declarations(shader: Shader, macros: Mapping[str, str], inputs: Mapping[int, str]) -> str:
    """The top of the body: what the template and the signature of umfa's own kernel declare.

    `inputs`: by umfa's buffer index what MLX's signature calls it. A buffer that is not there is
    null, and the constants say so.
    """
    values = iter(macros.get("UMFA_SHAPE", "").split(", "))
    lines = []
    for kind, name in shader.template:
        if kind == "typename":
            lines.append(f"using {name} = {macros[f'UMFA_{name}']};")
        else:
            lines.append(f"constexpr {kind} {name} = {next(values)};")
    for buffer in shader.buffers:
        pointer = f"device {'' if buffer.written else 'const '}{buffer.pointee}*"
        given = inputs.get(buffer.place)
        value = "nullptr" if given is None else f"reinterpret_cast<{pointer}>({given})"
        if buffer.is_params:
            lines.append(f"{pointer[:-1]}& {buffer.name} = *{value};")
        else:
            lines.append(f"{pointer} {buffer.name} = {value};")
    lines += [f"{kind} {name} = {attribute};" for kind, name, attribute in shader.attributes]
    return "\n".join(lines) + "\n"


def constants(defines: str) -> str:
    """The constants of a launch, without those that rely on where an array starts."""
    return defines.replace("UMFA_VALUE_wide_rotary true", "UMFA_VALUE_wide_rotary false")


def most_threads(threads: int) -> str:
    """The attribute that goes before a kernel, so that its pipeline takes so many: MLX has no way
    to ask a pipeline before it launches it."""
    return f"\n[[max_total_threads_per_threadgroup({threads})]]\n"
