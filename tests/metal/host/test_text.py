"""The text that Metal compiles: its macros are lines of it, and no option of the compiler."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

import umfa
from tests.metal import emulated
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder
from tools.metal.emulator import Library, SourceError


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_macros_stand_in_front_of_the_shader(
    seqlen_q: int, dtype: type, double: Double, recorder: Recorder
) -> None:
    q, k = np.zeros((1, seqlen_q, 2, 64), dtype), np.zeros((1, 20, 2, 64), dtype)
    umfa.flash_attn_func(q, k, k, backend="metal")
    kernel = recorder.dispatches[-1]
    name, *others = kernel.source[: kernel.source.index("#line")].splitlines()
    assert name == f'#define UMFA_KERNEL "{kernel.name}"'
    macros = ["UMFA_T", "UMFA_M", "UMFA_SHAPE"]
    assert [line.split()[:2] for line in others] == [["#define", macro] for macro in macros]
    file = "decode_vector.metal" if seqlen_q == 1 else kernel.name.split("_")[0] + ".metal"
    assert kernel.source.partition("#line")[2].startswith(f' 1 "{file}"\n')


def test_the_emulated_plans_give_the_same_text(double: Double, recorder: Recorder) -> None:
    """So that what the emulator and the PTX backend run is what Metal is given."""
    x = np.zeros((1, 20, 2, 64), np.float32)
    umfa.flash_attn_func(x, x, x, backend="metal")
    emulated.attention(x, x, x)
    (launch,) = emulated.last_plan["launches"]
    (kernel,) = recorder.dispatches
    assert kernel.source[: kernel.source.index("#line")] == launch["defines"]


@pytest.mark.parametrize("place", ["the first line", "the line after the headers"])
def test_messages_name_the_shaders_own_lines(place: str) -> None:
    """As many lines as the macros take are not added to where an error is."""
    lines = emulated.embed.flatten("clear.metal").splitlines()
    marks = [i for i, line in enumerate(lines) if re.fullmatch(r'#line \d+ "clear.metal"', line)]
    at = 0 if place == "the first line" else marks[-1]
    assert at in marks
    number = lines[at].split()[1]
    defines = ['#define UMFA_KERNEL "clear_f32"', "#define UMFA_T float"]
    text = "\n".join([*defines, *lines[: at + 1], "nonsense;", *lines[at + 1 :], ""])
    with pytest.raises(SourceError, match=rf"clear\.metal:{number}:"):
        Library(text)


@pytest.mark.parametrize("value", ["1", "half", "", "(1+2)"])
def test_the_double_takes_plain_macros(value: str, double: Double) -> None:
    assert double.compile_with_macro("NAME", value) == ""


@pytest.mark.parametrize(
    "value", ['"forward_f32"', "64, 64, 2", "64,64", "a b", "a\tb", "'c'", "a\\b"]
)
def test_the_double_refuses_macros_that_apples_compiler_service_splits(
    value: str, double: Double
) -> None:
    assert double.compile_with_macro("NAME", value) == (
        f"the compiler service takes no such macro: NAME={value}"
    )
