"""src/python/xla_abi.h has the layout that XLA's own header gives the same structs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import array_libraries

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "src/python/xla_abi.h"
STRUCTS = {
    "Extension": ("XLA_FFI_Extension_Base", "struct_size type next"),
    "ApiVersion": (
        "XLA_FFI_Api_Version",
        "struct_size extension_start major_version minor_version",
    ),
    "Metadata": ("XLA_FFI_Metadata", "struct_size api_version traits"),
    "MetadataExtension": ("XLA_FFI_Metadata_Extension", "base=extension_base metadata"),
    "ErrorCreateArguments": (
        "XLA_FFI_Error_Create_Args",
        "struct_size extension_start message code=errc",
    ),
    "Api": (
        "XLA_FFI_Api",
        "struct_size extension_start api_version internal=internal_api "
        "create_error=XLA_FFI_Error_Create",
    ),
    "Buffer": ("XLA_FFI_Buffer", "struct_size extension_start dtype data rank dims"),
    "Buffers": ("XLA_FFI_Args", "struct_size extension_start size types buffers=args"),
    "Text": ("XLA_FFI_ByteSpan", "data=ptr size=len"),
    "Scalar": ("XLA_FFI_Scalar", "dtype value"),
    "Array": ("XLA_FFI_Array", "dtype size data"),
    "Attributes": ("XLA_FFI_Attrs", "struct_size extension_start size types names values=attrs"),
    "CallFrame": (
        "XLA_FFI_CallFrame",
        "struct_size extension_start api context=ctx stage arguments=args results=rets "
        "attributes=attrs",
    ),
}
"""By umfa's name: XLA's, and the fields, where XLA's name of one differs after '='."""
WHOLE = ("ErrorCreateArguments", "Extension", "ApiVersion", "Buffer", "Scalar", "Array", "Text")
"""Those that are made here, or lie in arrays: no field may be missing."""
ENUMS = {
    "ExtensionType": ("XLA_FFI_Extension_", {"metadata": "Metadata"}),
    "ErrorCode": ("XLA_FFI_Error_Code_", {}),
    "DataType": ("XLA_FFI_DataType_", {}),
    "AttributeType": ("XLA_FFI_AttrType_", {}),
}


def fields_of(name: str, text: str) -> list[str]:
    found = re.search(rf"^struct {name} \{{\n(.*?)^\}};", text, re.MULTILINE | re.DOTALL)
    assert found, name
    fields = []
    for line in found[1].splitlines():
        pointer = re.search(r"\(\*(\w+)\)", line)
        fields += [pointer[1]] if pointer else re.findall(r"[ *](\w+)(?=[,;])", line)
    return fields


def checks() -> list[str]:
    text = HEADER.read_text(encoding="utf-8")
    lines = []
    for own, (theirs, fields) in STRUCTS.items():
        pairs = [(x.split("=") * 2)[:2] for x in fields.split()]
        assert [ours for ours, _ in pairs] == fields_of(own, text)
        for ours, other in pairs:
            a, b = f"umfa::xla::{own}", theirs
            lines.append(f"static_assert(offsetof({a}, {ours}) == offsetof({b}, {other}));")
            lines.append(f"static_assert(sizeof({a}::{ours}) == sizeof({b}::{other}));")
        if own in WHOLE:
            lines.append(f"static_assert(sizeof(umfa::xla::{own}) == sizeof({theirs}));")
    for own, (prefix, renamed) in ENUMS.items():
        body = re.search(rf"enum class {own} : int \{{(.*?)\}};", text, re.DOTALL)
        assert body, own
        for value in re.findall(r"(\w+) = \d+", body[1]):
            other = prefix + renamed.get(value, value.upper())
            lines.append(f"static_assert(int(umfa::xla::{own}::{value}) == int({other}));")
    lines.append("static_assert(umfa::xla::type_buffer == XLA_FFI_ArgType_BUFFER);")
    lines.append("static_assert(umfa::xla::type_buffer == XLA_FFI_RetType_BUFFER);")
    lines.append("static_assert(sizeof(XLA_FFI_Args) == sizeof(XLA_FFI_Rets));")
    lines.append("static_assert(umfa::xla::api_major == XLA_FFI_API_MAJOR);")
    lines.append("static_assert(umfa::xla::first_api_minor <= XLA_FFI_API_MINOR);")
    return lines


def test_layout(tmp_path: Path) -> None:
    array_libraries.load("jax")
    import jax

    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("c++ is not installed")
    source = tmp_path / "layout.cpp"
    lines = ['#include "xla/ffi/api/c_api.h"', f'#include "{HEADER}"', *checks()]
    source.write_text("\n".join(lines), encoding="utf-8")
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof"]
    result = subprocess.run(
        [*command, f"-I{jax.ffi.include_dir()}", str(source)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[:3000]
