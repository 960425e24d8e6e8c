"""The cache returns an earlier build, and only if nothing that it depends on has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tools.emulator.emulator_kernels import HEADER
from tools.metal.emulator import Library, Options, SourceError, build, toolchain

TEXT = """
constant int factor [[function_constant(0)]];
[[kernel]] void f(device int* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    x[i] = factor * MORE;
}
"""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Starts with an empty cache and collects the texts that are preprocessed."""
    # Do not rebuild the runtime.
    runtime = build.runtime()
    monkeypatch.setattr(build, "runtime", lambda: runtime)
    monkeypatch.setenv("UMFA_METAL_CACHE", str(tmp_path / "cache"))
    found: list[str] = []
    preprocess = toolchain.preprocess

    def noted(text: str, *more: Any) -> str:
        found.append(text)
        return preprocess(text, *more)

    monkeypatch.setattr(toolchain, "preprocess", noted)
    return found


def result(text: str = HEADER + TEXT, factor: int = 3, more: int = 1, **options: Any) -> int:
    x = np.zeros(4, np.int32)
    made = Library(text, constants={0: factor}, macros={"MORE": more}, **options)
    made.dispatch("f", 1, 4, {0: x})
    assert (x == x[0]).all()
    return int(x[0])


def test_a_text_is_read_once(reads: list[str]) -> None:
    assert result() == result() == 3
    build._noted.cache_clear()  # as in another process
    assert result() == 3
    assert len(reads) == 1


def test_what_is_read_decides(reads: list[str]) -> None:
    assert result() == 3
    assert result(factor=5) == 5
    assert result(more=7) == 21
    assert result(HEADER + TEXT.replace("factor *", "-factor *")) == -3
    assert result(options=Options(checks=False)) == 3
    assert len(reads) == 4  # a text is read once for all values of an int


CONSTANTS = """
constant bool negative [[function_constant(0)]];
namespace a { namespace b { constant int factor [[function_constant(1)]]; } }
constant float more [[function_constant(2)]];
constant float added = is_function_constant_defined(more) ? more : 0.25f;
[[kernel]] void f(device float* x [[buffer(0)]]) {
    x[0] = (negative ? -1.0f : 1.0f) * float(a::b::factor) + added;
}
"""


def test_values_of_bool_and_int_share_a_compilation(
    reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    compile_kernel = toolchain.compile_kernel
    monkeypatch.setattr(
        toolchain, "compile_kernel", lambda *given: compiled.append(1) or compile_kernel(*given)
    )

    def run(*values: Any) -> float:
        x = np.zeros(1, np.float32)
        library = Library(HEADER + CONSTANTS, constants=dict(enumerate(values)))
        library.dispatch("f", 1, 1, {0: x})
        return float(x[0])

    assert run(False, 7) == 7.25
    assert run(True, 7) == -6.75
    assert run(False, -(2**31)) == -(2.0**31)
    assert len(compiled) == 1
    assert run(True, 7, 0.5) == -6.5
    assert run(False, 7, 0.5) == 7.5
    assert len(compiled) == 2
    for wrong in (2**31, True, 1.0):
        with pytest.raises(SourceError, match=r"factor.* has type int"):
            run(False, wrong)


def test_a_refused_text_is_refused_again(reads: list[str]) -> None:
    wrong = HEADER + TEXT.replace(
        "x[i] =", "auto two = [&](int y) { return 2 * y; }; x[i] = two(1) *"
    )
    for _ in range(2):
        with pytest.raises(SourceError, match="lambda"):
            result(wrong)
    allowed = Options(allow=frozenset({"lambda-expression"}))
    assert result(wrong, options=allowed) == 6
    with pytest.raises(SourceError, match="lambda"):
        result(wrong)


@pytest.mark.parametrize("include", ['#include "more.h"', "#include <more.h>", '# include"more.h"'])
def test_a_changed_file_is_seen(reads: list[str], include: str, tmp_path: Path) -> None:
    text = HEADER + include + "\n" + TEXT.replace("MORE", "VALUE")
    for value in (2, 4):
        (tmp_path / "more.h").write_text(f"#define VALUE {value}\n")
        assert result(text, include_dirs=[tmp_path]) == 3 * value


def test_a_file_in_the_working_directory_is_seen(
    reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = HEADER + '#include "more.h"\n' + TEXT.replace("MORE", "VALUE")
    for value in (2, 4):
        (tmp_path / "more.h").write_text(f"#define VALUE {value}\n")
        assert result(text) == 3 * value
