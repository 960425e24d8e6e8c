"""The emulator's tests of the language, on what the PTX back end makes of the same kernels."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

from tests.tools.emulator import emulator_kernels
from tests.tools.ptx.warp_machine import WarpLibrary
from tools.metal.emulator import DispatchError, SourceError
from tools.metal.ptx.translate import compile


def _load(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "emulator" / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"emulator_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


language, published, pointers = (_load(name) for name in ("language", "published", "pointers"))

SAME = [
    "parameter_may_be_named_as_its_attribute",
    "vectors_construct_swizzle_and_convert",
    "three_component_vectors_and_packed_ones",
    "half_rounds_every_operation_and_bfloat_converts",
    "as_type_and_bit_functions",
    "math_functions",
    "simd_reductions_and_scans",
    "simd_shuffles_and_votes",
    "lane_map",
    "atomics",
    "function_constants_and_optional_buffers",
    "project_header_shared_with_the_host",
    "program_scope_constants_and_constexpr",
    "threadgroup_memory_from_the_host",
    "text_as_others_write_it",
    "quantised_blocks_as_ggml_lays_them_out",
]


@pytest.fixture(autouse=True)
def _another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator_kernels, "Library", WarpLibrary)
    for module in (language, published):
        monkeypatch.setattr(module, "Library", WarpLibrary)


@pytest.mark.parametrize("name", SAME)
def test_same_answers(name: str) -> None:
    getattr(language, f"test_{name}")()


PUBLISHED = [
    "constant_expressions_in_attributes",
    "variables_named_like_other_templates_types",
    "own_functions_beside_those_of_metal",
    "metals_own_utilities_stay",
    "comparisons_of_bfloat",
    "alias_templates_construct",
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_forms(name: str) -> None:
    getattr(published, f"test_{name}")()


def test_macros_in_pragmas(tmp_path: Path) -> None:
    published.test_macros_in_pragmas(tmp_path)


def test_one_array_at_two_indices() -> None:
    """The pointers are the host's own here."""
    pointers.test_one_array_at_two_indices(True)


def test_structs_includes_and_macros(tmp_path: Path) -> None:
    language.test_structs_includes_and_macros(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("space", ["device", "threadgroup"])
def test_simdgroup_matrix(dtype: type, space: str) -> None:
    language.test_simdgroup_matrix(dtype, space)


def test_positions_in_three_dimensions() -> None:
    out = np.zeros((2, 64, 4), np.uint32)
    emulator_kernels.run(
        """
        kernel void f(device uint4* out [[buffer(0)]],
                      uint3 grid [[thread_position_in_grid]],
                      uint3 group [[threadgroup_position_in_grid]],
                      uint3 local [[thread_position_in_threadgroup]],
                      uint3 size [[threads_per_threadgroup]],
                      uint3 total [[threads_per_grid]],
                      uint index [[thread_index_in_threadgroup]],
                      ushort lane [[thread_index_in_simdgroup]],
                      ushort simdgroup [[simdgroup_index_in_threadgroup]]) {
            uint at = (grid.z * total.y + grid.y) * total.x + grid.x;
            out[at] = uint4(local.x + 10 * local.y + 100 * local.z + 1000 * group.z,
                            index, 32 * simdgroup + lane, size.x + 10 * size.y + 100 * size.z);
        }""",
        {0: out},
        threads=(8, 4, 2),  # type: ignore[arg-type]
        threadgroups=(1, 1, 2),
    )
    local = np.arange(64)
    for group in (0, 1):
        positions = local % 8 + 10 * (local // 8 % 4) + 100 * (local // 32) + 1000 * group
        assert (out[group, :, 0] == positions).all()
        assert (out[group, :, 1] == local).all()
        assert (out[group, :, 2] == local).all()
        assert (out[group, :, 3] == 8 + 40 + 200).all()


@pytest.mark.parametrize(
    ("a", "b", "accumulator"),
    [
        ("half", "float", "float"),
        ("float", "half", "float"),
        ("bfloat", "float", "float"),
        ("float", "bfloat", "float"),
        ("half", "bfloat", "float"),
        ("half", "half", "half"),
        ("bfloat", "bfloat", "bfloat"),
    ],
)
def test_mixed_products(a: str, b: str, accumulator: str) -> None:
    """Each operand is exact; products of float are as precise as float."""
    dtypes = {"half": np.float16, "float": np.float32, "bfloat": ml_dtypes.bfloat16}
    x, y = (
        emulator_kernels.floats(64, seed).astype(dtypes[t]).reshape(8, 8)
        for seed, t in ((1, a), (2, b))
    )
    out = np.zeros((8, 8), dtypes[accumulator])
    emulator_kernels.run(
        f"""
        kernel void f(device const {a}* x [[buffer(0)]], device const {b}* y [[buffer(1)]],
                      device {accumulator}* out [[buffer(2)]]) {{
            simdgroup_matrix<{a}, 8, 8> u;
            simdgroup_matrix<{b}, 8, 8> v;
            simdgroup_matrix<{accumulator}, 8, 8> w(({accumulator})0);
            simdgroup_load(u, x);
            simdgroup_load(v, y);
            simdgroup_multiply_accumulate(w, u, v, w);
            simdgroup_store(w, out);
        }}""",
        {0: x, 1: y, 2: out},
    )
    expected = x.astype(np.float64) @ y.astype(np.float64)
    epsilon = {"half": 2**-11, "float": 2**-21, "bfloat": 2**-8}[accumulator]
    bound = epsilon * (np.abs(x.astype(np.float64)) @ np.abs(y.astype(np.float64)))
    assert (np.abs(out.astype(np.float64) - expected) <= 1.01 * bound).all()


def test_unaligned_matrices() -> None:
    """Pairs that do not lie as words are not read as words: rows of odd length, odd starts."""
    table = emulator_kernels.floats(200).astype(np.float16)
    out = np.zeros((4, 64), np.float16)
    emulator_kernels.run(
        """
        kernel void f(device const half* in [[buffer(0)]], device half* out [[buffer(1)]]) {
            simdgroup_half8x8 a;
            simdgroup_load(a, in + 1, 9);
            simdgroup_store(a, out, 8);
            simdgroup_load(a, in + 3, 16, ulong2(2, 1), true);
            simdgroup_store(a, out + 64, 8);
            simdgroup_load(a, in, 8);
            simdgroup_store(a, out + 128, 8, ulong2(0), true);
            simdgroup_load(a, in + 2, 11, ulong2(0), true);
            simdgroup_store(a, out + 192, 8);
        }""",
        {0: table, 1: out},
    )

    def view(start: int, row: int) -> np.ndarray:
        return np.lib.stride_tricks.as_strided(table[start:], (8, 8), (2 * row, 2))

    assert (out[0].reshape(8, 8) == view(1, 9)).all()
    assert (out[1].reshape(8, 8) == view(3 + 16 + 2, 16).T).all()
    assert (out[2].reshape(8, 8) == view(0, 8).T).all()
    assert (out[3].reshape(8, 8) == view(2, 11).T).all()


def test_other_atomics() -> None:
    out = np.array([5, 0, 0xFF, 7], np.int32)
    emulator_kernels.run(
        """
        kernel void f(device atomic_int* out [[buffer(0)]],
                      uint t [[thread_index_in_simdgroup]]) {
            atomic_fetch_max_explicit(out, int(t), memory_order_relaxed);
            atomic_fetch_sub_explicit(out + 1, int(t), memory_order_relaxed);
            atomic_fetch_xor_explicit(out + 2, 1 << t, memory_order_relaxed);
            int expected = 7;
            atomic_compare_exchange_weak_explicit(out + 3, &expected, 100 + int(t),
                                                  memory_order_relaxed, memory_order_relaxed);
        }""",
        {0: out},
    )
    assert out[:3].tolist() == [31, -496, ~0xFF]
    assert 100 <= out[3] < 132


def test_function_constant_without_value_is_named() -> None:
    text = """#include <metal_stdlib>
        constant int factor [[function_constant(7)]];
        kernel void f(device int* out [[buffer(0)]]) { out[0] = factor; }"""
    with pytest.raises(SourceError, match="factor"):
        compile(text)
    assert "mul" not in compile(text, constants={7: 3}).text  # and with one it is folded


def test_incomplete_simdgroups_are_refused() -> None:
    library = WarpLibrary("kernel void f(device int* out [[buffer(0)]]) { out[0] = 1; }\n")
    with pytest.raises(DispatchError, match="incomplete"):
        library.dispatch("f", 1, 31, {0: np.zeros(1, np.int32)})
