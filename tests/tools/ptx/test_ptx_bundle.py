"""The bundle, and its runner on a stand-in for the GPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.tools.ptx import fake_cupy
from tools.metal.ptx import __main__ as command
from tools.metal.ptx import bundle
from tools.metal.ptx.cases import CHECKS, TIMINGS, Case
from tools.metal.ptx.planner import plan

if TYPE_CHECKING:
    from tests.conftest import RunPython


SMALL = Case(heads=4, heads_k=2, seqlen_q=40, seqlen_k=70, causal="lower_right")
PLAYED = [
    SMALL,
    replace(SMALL, dtype="bfloat16", layout="packed", head_dim=80, head_dim_v=48),
    replace(SMALL, dtype="float32", layout="odd", alibi=True, softcap=9.0, causal="upper_left"),
    replace(SMALL, layout="bhsd", batch=2, window=(16, 4), causal=""),
    replace(
        SMALL, layout="channels", head_dim=128, mask="bool", mask_varies=(True, False, True, True)
    ),
    replace(SMALL, mask="float16", seqlen_q=80, head_dim=256),
    replace(SMALL, dtype="bfloat16", family=7, lse=False, scale=-0.2),
    replace(SMALL, seqlen_q=1, seqlen_k=900, heads=8, cores=132),
    replace(SMALL, seqlen_q=3, seqlen_k=200, dtype="float32", head_dim=72),
    replace(SMALL, head_dim=512, dtype="bfloat16"),
    replace(SMALL, seqlens_q=(20, 0, 70), seqlens_k=(33, 5, 50), alibi=True),
    replace(SMALL, seqlens_q=(20, 3), seqlens_k=(33, 60), page_size=7, sinks=True, chunk=20),
    replace(SMALL, seqlens_q=(1, 2, 1), seqlens_k=(700, 0, 40), page_size=16, cores=132),
    replace(SMALL, seqlens_q=(2, 1), seqlens_k=(33, 60), dtype="float32", sinks=True, layout="odd"),
    replace(SMALL, rotary="halves", dtype="float32", layout="odd", head_dim=40),
    replace(SMALL, new_rows=9, rotary="pairs", page_size=7, batch=2),
    replace(SMALL, new_rows=9, rotary="halves", causal="", seqlen_q=3, head_dim=33, batch=2),
    replace(SMALL, dropout=0.4, batch=2),
    replace(SMALL, dropout=0.4, seqlen_q=2, seqlen_k=900, cores=132, window=(333, 0)),
    replace(SMALL, backward=True, dlse=True),
    replace(SMALL, backward=True, head_dim=256, float32_gradients=True, mask="float32"),
    replace(SMALL, backward=True, seqlens_q=(20, 0, 70), seqlens_k=(33, 5, 50), alibi=True),
    replace(SMALL, backward=True, dtype="float32", layout="odd", softcap=9.0, dropout=0.3),
    replace(
        SMALL,
        backward=True,
        dtype="float32",
        rotary="pairs",
        qv=True,
        sinks=True,
        alibi=True,
        mask="float32",
        mask_varies=(False, True, True, True),
        dlse=True,
    ),
    replace(SMALL, qv=True),
    replace(SMALL, qv=True, head_dim=576, head_dim_v=512, seqlen_q=20),
    replace(SMALL, key_codes="int8_row", value_codes="int4_32", batch=2),
    replace(SMALL, key_codes="int4_row", seqlen_q=1, seqlen_k=900, dtype="bfloat16", cores=132),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bundle")
    bundle.build(made, PLAYED, TIMINGS[:1])
    return made


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = {
        bundle._identity(launch): launch for case in PLAYED for launch in plan(case)["launches"]
    }
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.module(launches, bundle.SHADERS))
    for name in ("device", "check"):
        monkeypatch.delitem(sys.modules, f"tools.metal.ptx.{name}", raising=False)
    fake_cupy.Memory.made.clear()


@pytest.mark.slow  # the bundle of these cases takes most of a minute to compile
@pytest.mark.usefixtures("without_gpu")
def test_every_played_case_agrees_with_float64(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert command.main(["run", str(folder), "--check", "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["checks"]
    assert [row["name"] for row in rows] == [case.name for case in PLAYED]
    assert all(memory.guards_hold() for memory in fake_cupy.Memory.made)
    assert any(len(d["launches"]) == 2 for d in described(folder))  # a decode and its merge


@pytest.mark.slow
@pytest.mark.usefixtures("without_gpu")
def test_a_wrong_kernel_is_found(folder: Path, tmp_path: Path) -> None:
    """Parameters that say one key fewer: the check must not pass."""
    text = (folder / "cases.json").read_text()
    (tmp_path / "kernels").symlink_to(folder / "kernels")
    wrong = json.loads(text)
    launch = wrong["cases"][0]["launches"][0]
    params = np.frombuffer(bytes.fromhex(launch["params"]), np.int32).copy()
    at = np.flatnonzero(params == SMALL.seqlen_k)
    assert len(at) >= 1
    params[at[-1]] -= 1
    launch["params"] = params.tobytes().hex()
    (tmp_path / "cases.json").write_text(json.dumps(wrong))
    only = f"^{SMALL.name}$"
    assert command.main(["run", str(tmp_path), "--check", "--only", only]) == 1


def described(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "cases.json").read_text())["cases"]
    return found


def test_runner_needs_neither_umfa_nor_the_emulator(run_python: RunPython) -> None:
    """The machine with the GPU has NumPy and CuPy."""
    done = run_python(
        """
import sys, types
sys.path.insert(0, sys.argv[1])
for absent in ("umfa", "ml_dtypes", "tools.metal.emulator", "ziglang"):
    sys.modules[absent] = None  # importing it raises
cupy = types.ModuleType("cupy")
cupy.cuda = types.SimpleNamespace(set_allocator=lambda allocator: None)
sys.modules["cupy"] = cupy
import tools.metal.ptx
from tools.metal.ptx import __main__, check, device, sanitize, timing
""",
        str(Path(command.__file__).parents[3]),
    )
    assert done.returncode == 0, done.stderr


def test_names_are_unique() -> None:
    names = [case.name for case in CHECKS + TIMINGS]
    assert len(set(names)) == len(names)


def test_cases_survive_json() -> None:
    for case in CHECKS + TIMINGS:
        assert Case.read(json.loads(json.dumps(case.plain()))) == case


def test_timed_ratios_have_their_base() -> None:
    labels = [case.label for case in TIMINGS]
    for case in TIMINGS:
        assert not case.compared_with or case.compared_with in labels[: labels.index(case.label)]


def test_reference_agrees_with_the_suite() -> None:
    """The runner's reference is the one that all backends are compared with."""
    from tests import reference as suite
    from tools.metal.ptx import inputs, placement
    from tools.metal.ptx import reference as runner

    for case in PLAYED:
        if case.mask or case.seqlens_q or case.new_rows or case.rotary or case.dropout or case.qv:
            continue
        if case.key_codes or case.value_codes:
            continue  # the next test
        buffers = inputs.random_buffers(case, np.random.default_rng(1))
        places = placement.placements(case)
        tensors = {n: inputs.widen(places[n].view(b), places[n].dtype) for n, b in buffers.items()}
        out, lse = runner.attention(case, tensors)
        expected_out, expected_lse = suite.attention(
            tensors["query"], tensors["key"], tensors["value"],
            softmax_scale=case.scale or None, causal=bool(case.causal),
            alignment="upper_left" if case.causal == "upper_left" else "lower_right",
            window_size=case.window, softcap=case.softcap,
            alibi_slopes=tensors.get("alibi_slopes"),
        )  # fmt: skip
        if case.causal == "upper_left" and case.alibi:
            continue  # the suite counts ALiBi's distance from the alignment
        np.testing.assert_allclose(out, expected_out, atol=1e-12)
        np.testing.assert_allclose(lse, expected_lse, atol=1e-12)


@pytest.mark.parametrize("codes", ["int8_row", "int8_32", "int4_row", "int4_32"])
def test_numbers_of_codes_agree_with_the_suite(codes: str) -> None:
    """The runner's own definition of the formats."""
    import umfa
    from tools.metal.ptx import codes as runner
    from tools.metal.ptx import inputs, placement

    case = replace(SMALL, key_codes=codes, batch=2)
    buffers = inputs.random_buffers(case, np.random.default_rng(1))
    places = placement.placements(case)
    data, scales = (places[name].view(buffers[name]) for name in ("key", "key_scales"))
    form = runner.format_of(case, "key")
    assert form is not None
    dtype, granularity, _, scale_dtype, *block, head_dim = form.text.split()
    own = umfa.QuantizedTensor(
        data, scales, dtype=dtype, granularity=granularity, scale_dtype=scale_dtype,
        block=None if granularity == "row" else (int(block[0]), int(block[1])),
        head_dim=int(head_dim),
    )  # fmt: skip
    np.testing.assert_array_equal(own.dequantize(), form.numbers(data, scales))
