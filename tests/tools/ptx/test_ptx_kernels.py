"""Every kernel of every plan compiles to PTX, and to what a GPU runs well."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from tests.tiers import crossed
from tests.tools.ptx.ptx_kernels import compile_all, launches_of
from tools.metal.ptx.cases import Case
from tools.metal.ptx.ptxas import Resources, find_ptxas, ptxas_report

HEAD_DIMS = (32, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512)
DTYPES = ("float16", "bfloat16", "float32")

FORWARD = [
    Case(seqlen_q=100, head_dim=d, dtype=t, family=f, lse=False)
    for d in HEAD_DIMS
    for t in DTYPES
    for f in (7, 9)
]
DECODE = [
    Case(seqlen_q=1, seqlen_k=20000, heads=8, heads_k=2, head_dim=d, dtype=t, family=f, lse=False)
    for d in HEAD_DIMS
    for t in DTYPES
    for f in (7, 9)
]
# What few problems ask for: each alone, in the kernels that know it.
RARE = [
    Case(seqlen_q=100, dtype=t, family=7, lse=False, rotary=rotary, dropout=dropout)
    for rotary, dropout in (("pairs", 0.0), ("halves", 0.0), ("", 0.5))
    for t in ("float16", "bfloat16")
]
RARE += [
    Case(seqlen_q=1, seqlen_k=20000, heads=8, heads_k=2, lse=False, dropout=0.5),
    Case(seqlen_q=1, seqlen_k=20000, heads=8, heads_k=2, lse=False, new_rows=1, rotary="halves"),
    *(
        Case(seqlen_q=100, head_dim=d, head_dim_v=512, dtype=t, qv=True, lse=False)
        for d in (64, 576)
        for t in DTYPES
    ),
    *(
        Case(
            seqlen_q=n, seqlen_k=20000, heads=4, heads_k=heads_k, head_dim=128, dtype=t, lse=False,
            key_codes=codes, value_codes=codes,
        )
        for n, heads_k in ((100, 4), (1, 4), (1, 1))
        for codes in ("int8_row", "int4_32")
        for t in DTYPES
    ),
]  # fmt: skip

BACKWARD = [
    Case(seqlen_q=100, head_dim=d, dtype=t, family=f, backward=True)
    for d in (32, 64, 80, 96, 128, 160, 192, 256)
    for t in DTYPES
    for f in (7, 9)
]
BACKWARD += [
    Case(seqlen_q=100, head_dim=d, head_dim_v=512, dtype=t, family=f, backward=True, qv=d == 64)
    for d in (64, 512, 576)
    for t in DTYPES
    for f in (7, 9)
]

needs_ptxas = pytest.mark.skipif(find_ptxas() is None, reason="ptxas is not installed")


def test_every_kind_of_kernel_is_among_them() -> None:
    names = [launch["kernel"] for launch in launches_of(FORWARD + DECODE + RARE + BACKWARD)]
    assert {n.split("_")[0] for n in names} == {"forward", "decode", "append", "delta", "dq", "dkv"}


@pytest.mark.slow  # compiles every kernel that the planner can name; most of them every night
@pytest.mark.parametrize(
    ("head_dim", "dtype"), crossed([*HEAD_DIMS, "rare"], DTYPES, mark=pytest.mark.nightly)
)
def test_every_kernel_compiles(head_dim: int | str, dtype: str) -> None:
    """With the entry, bounds and threadgroup memory of its plan, and without local memory."""
    usual = [x for x in FORWARD + DECODE + BACKWARD if x.head_dim == head_dim]
    cases = RARE if head_dim == "rare" else usual
    launches = launches_of(x for x in cases if x.dtype == dtype)
    for launch, ptx in zip(launches, compile_all(launches), strict=True):
        name = launch["kernel"]
        assert list(ptx.kernels) == [name]
        entry = ptx.kernels[name]
        assert f".entry {entry.symbol}(" in ptx.text
        assert f".maxntid {launch['threadgroup'][0]}" in ptx.text
        bound = {index for index, *_ in launch["buffers"]} | {launch["params_index"]}
        assert bound <= set(entry.buffers)
        # But for variables of one element, which stand where a shape needs none, and fall away.
        assert launch["threadgroup_bytes"] - ptx.shared[name] in (0, 8, 16, 24), name
        # Arrays of fragments became registers: none is indexed at run time.
        assert ".local" not in ptx.text, name


# One launch of each kind of kernel.
KINDS = [
    Case(seqlen_q=100),
    Case(seqlen_q=100, dtype="float32"),
    Case(seqlen_q=1, seqlen_k=100),
    Case(seqlen_q=1, seqlen_k=20000, heads=8, heads_k=2, new_rows=1, rotary="halves"),
    Case(seqlens_q=(1, 0), seqlens_k=(300, 9)),
    Case(seqlen_q=100, key_codes="int8_row", value_codes="int4_32"),
]


def opcodes(text: str) -> Counter[str]:
    """How often each instruction stands in PTX."""
    return Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.]*)\s", text, re.MULTILINE))


@pytest.mark.slow
def test_constants_may_be_text() -> None:
    """The same instructions, and every buffer of the layout."""
    launches = launches_of(KINDS)
    kinds = {launch["kernel"].split("_d")[0].split("_f")[0] for launch in launches}
    assert kinds == {"append", "clear", "decode", "decode_merge", "decode_vector", "forward"}
    inline = [launch | {"defines": launch["constant_defines"] + launch["defines"], "constants": {}}
              for launch in launches]  # fmt: skip
    both = zip(launches, compile_all(launches), compile_all(inline), strict=True)
    for launch, usual, text in both:
        name = launch["kernel"]
        assert text.kernels[name].buffers == tuple(range(launch["buffer_count"]))
        assert text.shared == usual.shared
        assert opcodes(text.text) == opcodes(usual.text)


def text_of(case: Case) -> str:
    """PTX of the first launch of a case."""
    (ptx,) = compile_all(launches_of([case])[:1])
    return ptx.text


PLAIN = Case(seqlen_q=4096, head_dim=128, lse=False)


def count(text: str, instruction: str) -> int:
    return len(re.findall(rf"^\s*(?:\{{ \.reg \.f32 z; )?{instruction}", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("case", "fragments"),
    [
        # A simdgroup takes 8 queries and 32 keys: 4 x 16 fragments of K and as many of V.
        (PLAIN, 4 * 16),
        # 16 queries: two rows of fragments in one instruction.
        (replace(PLAIN, head_dim=64, head_dim_v=64), 4 * 8),
        (replace(PLAIN, dtype="bfloat16"), 4 * 16),
    ],
    ids=["d128", "d64", "bfloat"],
)
def test_matrix_instructions(case: Case, fragments: int) -> None:
    """Products in steps of 16 channels or keys, fragments loaded by fours, and no movmatrix: K is
    wanted as it lies, and V is transposed by its load."""
    text = text_of(case)
    assert count(text, r"mma\.sync\.aligned\.m16n8k16") == 2 * fragments // 2
    assert count(text, r"mma\.sync\.aligned\.m16n8k8\.") == 0
    assert count(text, r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared") == fragments // 4
    assert count(text, r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared") == fragments // 4
    assert count(text, r"ldmatrix\.sync\.aligned\.m8n8\.x1") == 0
    assert count(text, r"movmatrix") == 0


def test_products_of_floats_are_three_of_tf32() -> None:
    text = text_of(replace(PLAIN, dtype="float32"))  # 16 keys a tile
    assert count(text, r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32") == 3 * 2 * (2 * 16)
    assert count(text, r"movmatrix") == 2 * (2 * 16)  # of V, in two halves


def test_tiles_are_staged_sixteen_bytes_at_a_time() -> None:
    text = text_of(PLAIN)
    assert count(text, r"(?:@%p\d+ )?ld\.global\.(?:nc\.)?v4\.b32") >= 8
    assert count(text, r"st\.shared\.v4\.b32") >= 8
    assert count(text, r"st\.shared\.b16") == 1  # of values.h, where NaN was met


def test_function_constants_fold() -> None:
    """What a problem does not use is not in the code."""
    plain, capped = text_of(PLAIN), text_of(replace(PLAIN, softcap=5.0))
    masked = text_of(replace(PLAIN, mask="float32"))
    name = re.compile(r"has_(?:mask|alibi|softcap|lse)")
    assert not any(name.search(re.sub(r"\.entry.*", "", t)) for t in (plain, capped, masked))
    assert ".extern .global" not in plain
    mask_parameter = re.compile(r"ld\.param\.b64\s+%rd\d+, \[\w+_param_5\]")
    assert mask_parameter.search(masked)
    assert not mask_parameter.search(plain)
    assert count(capped, r"div\.rn\.f32") > count(plain, r"div\.rn\.f32")  # tanh's


# Registers and spilled bytes, for sm_90 and threadgroups of 128, with room for other versions: what
# ptxas 13.0 uses is in the package's README.
COMMON = {
    # Windows beside the diagonal (visible.h) spill 12 bytes: 154.1, not 155.8 TFLOP/s (H200).
    (64, "float16"): (160, 12),
    (64, "bfloat16"): (160, 12),
    (64, "float32"): (168, 32),
    (128, "float16"): (192, 0),
    (128, "bfloat16"): (192, 0),
    # Pointers that walk from row to row spill 8 bytes, in 168 registers.
    (128, "float32"): (168, 16),
}
# Passes 1 to 3 of shared/values.h have a body of their own in decode, with more registers than pass
# 0. Four threadgroups a multiprocessor leave 128 registers, three 168.
DECODES = {
    (64, "float16"): (128, 0),
    # Unguarded loads spill 8 bytes, guarded ones 4; batches of 8 take 6 % less time (H200).
    (128, "float16"): (168, 16),
    (128, "bfloat16"): (168, 16),
}


def resources(case: Case) -> Resources:
    (ptx,) = compile_all(launches_of([case])[:1])
    return next(iter(ptxas_report(ptx).values()))


@needs_ptxas
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [pytest.param(*x, marks=pytest.mark.slow if x[1] == "float32" else ()) for x in COMMON],
    ids=str,
)
def test_forward_registers(head_dim: int, dtype: str) -> None:
    found = resources(replace(PLAIN, head_dim=head_dim, head_dim_v=head_dim, dtype=dtype))
    registers, spilled = COMMON[head_dim, dtype]
    assert found.registers <= registers
    assert found.spilled <= spilled


@needs_ptxas
@pytest.mark.parametrize(("head_dim", "dtype"), DECODES, ids=str)
def test_decode_registers(head_dim: int, dtype: str) -> None:
    case = Case(
        seqlen_q=1, seqlen_k=300, heads=8, heads_k=2, head_dim=head_dim, dtype=dtype, lse=False
    )
    found = resources(case)
    registers, spilled = DECODES[head_dim, dtype]
    assert found.registers <= registers
    assert found.spilled <= spilled


@needs_ptxas
@pytest.mark.parametrize(("head_dim", "spilled"), [(64, 32), (128, 8)])
def test_single_rows_have_registers_for_keys_on_their_way(head_dim: int, spilled: int) -> None:
    """Two runs of keys and values are 64; four threadgroups a multiprocessor leave 128."""
    case = Case(seqlen_q=1, seqlen_k=300, heads=8, head_dim=head_dim, lse=False)
    (launch,) = (x for x in launches_of([case]) if "vector" in x["kernel"])
    (ptx,) = compile_all([launch])
    found = next(iter(ptxas_report(ptx).values()))
    assert found.registers <= 128
    assert found.spilled <= spilled
    # Each lane has 16 loads of 16 bytes before the loop, and as many in it.
    assert count(ptx.text, r"ld\.global\.(?:nc\.)?v4\.b32") >= 32


@needs_ptxas
def test_ptxas_counts_the_threadgroup_memory_alike() -> None:
    for launch in launches_of([PLAIN, replace(PLAIN, dtype="float32")]):
        (ptx,) = compile_all([launch])
        assert ptxas_report(ptx)[launch["kernel"]].shared == ptx.shared[launch["kernel"]]
