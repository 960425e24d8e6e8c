"""``python -m umfa bench``: what it selects, how it judges, what it writes; never how fast."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from umfa import _ext
from umfa.__main__ import main
from umfa.bench import cases, measure, peers, report, results
from umfa.bench.cases import Case, Target

ROOT = Path(__file__).parents[2]

Spoil = Callable[[Any], Any]


class NumPy:
    """A peer that is always there: attention by the book, spoilt on request."""

    name = "numpy"
    version = "1"
    threads = "1"

    def __init__(self, spoil: Spoil = lambda out: out, refuse: Exception | None = None) -> None:
        self.spoil = spoil
        self.refuse = refuse

    def prepare(self, case: Case, inputs: peers.Inputs) -> peers.Call:
        if self.refuse is not None:
            raise self.refuse

        def call() -> Any:
            tensors = (inputs.query, inputs.key, inputs.value)
            out, _ = reference.attention(*tensors, causal=case.causal)
            return self.spoil(out.transpose(0, 2, 1, 3))

        return call

    def array(self, out: Any) -> peers.Float64:
        return np.asarray(out).transpose(0, 2, 1, 3)


@pytest.fixture
def numpy_peer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., NumPy]:
    """Lets ``--against numpy`` mean the peer that it is called with."""

    def install(*arguments: Any) -> NumPy:
        peer = NumPy(*arguments)
        monkeypatch.setitem(peers.PEERS, "numpy", lambda threads: peer)
        return peer

    monkeypatch.setattr(measure, "QUICK_BANDWIDTH_BYTES", 1 << 16)
    monkeypatch.setattr(_ext, "cpu_peak", lambda dtype, isa: 1e11)
    return install


def bench(*arguments: str) -> int:
    return main(["bench", "--quick", "--repeats", "3", *arguments])


# ---- cases -----------------------------------------------------------------------------------


EVERY = [case for suite in cases.SUITES.values() for case in suite]


def names(*patterns: str, long: bool = False) -> list[str]:
    return [case.name for case in cases.select("cpu", list(patterns), long=long)]


def test_patterns_select_cases() -> None:
    assert names("bf16-*", "decode-fp32") == ["bf16-full-1536", "bf16-causal-512", "decode-fp32"]
    assert "fp32-full-4608" not in names()
    assert "fp32-full-4608" not in names("fp32-*")
    assert "fp32-full-4608" in names(long=True)
    assert names("fp32-full-4608") == ["fp32-full-4608"]


@pytest.mark.parametrize("pattern", ["fp64", "*-4609", "*-4608"])
def test_a_pattern_without_cases_is_refused(
    pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--case", pattern]) == 2
    error = capsys.readouterr().err
    assert error.startswith("[umfa.bench] ")
    assert pattern in error


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--against", "torch,tensorflow"]) == 2
    assert "'tensorflow'" in capsys.readouterr().err


def test_names_are_unique() -> None:
    assert len({case.name for case in EVERY}) == len(EVERY)


def test_cases_know_their_suite() -> None:
    for suite, members in cases.SUITES.items():
        assert {case.suite for case in members} == {suite}


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    text = capsys.readouterr().out
    for case in EVERY:
        assert re.search(rf"^{case.name} ", text, re.MULTILINE)
    assert "≥ 20×, ≥ 80% of bandwidth" in text


@pytest.mark.parametrize("window", [(-1, -1), (3, 2), (3, -1), (-1, 2), (3, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlens", [(9, 9), (5, 11), (11, 5)])
def test_visible_pairs(window: tuple[int, int], causal: bool, seqlens: tuple[int, int]) -> None:
    case = Case("x", 1, 1, *seqlens, 8, causal=causal, window=window)
    left, right = window
    count = 0
    for query in range(seqlens[0]):
        for key in range(seqlens[1]):
            ahead = key - (query + seqlens[1] - seqlens[0])
            seen = (left < 0 or ahead >= -left) and (right < 0 or ahead <= right)
            count += seen and not (causal and ahead > 0)
    if window == (-1, -1):  # by convention, half of all
        count = seqlens[0] * seqlens[1] // (2 if causal else 1)
    assert case.visible_pairs == count
    assert case.operations == 4 * count * 8
    assert replace(case, backward=True).operations == 14 * count * 8
    assert replace(case, head_dim_v=3).operations == 2 * count * (8 + 3)
    assert replace(case, backward=True, head_dim_v=3).operations == 2 * count * (4 * 8 + 3 * 3)


def test_decode_counts_key_and_value() -> None:
    (case,) = cases.select("cpu", ["decode-bf16"])
    assert case.bytes_read == 2 * 8 * 16384 * 128 * 2


def test_inputs_are_values_of_the_dtype() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    random = np.random.default_rng(0).standard_normal(10000, dtype=np.float32)
    expected = random.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(peers.rounded(random, "bfloat16"), expected)


# ---- a run -----------------------------------------------------------------------------------


def test_run_writes_json_that_reads_back(
    numpy_peer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numpy_peer()
    file = tmp_path / "results.json"
    before = umfa.get_num_threads()
    assert bench("--against", "numpy", "--case", "*", "--threads", "1", "--json", str(file)) == 0
    assert umfa.get_num_threads() == before
    captured = capsys.readouterr()
    assert captured.err == ""
    stored = json.loads(file.read_text())
    run = results.from_json(stored)
    assert results.to_json(run) == stored
    assert run.threads == 1
    assert [case.name for case in run.cases] == names()
    for case in run.cases:
        assert case.correct
        assert case.umfa.status == "measured"
        assert len(case.umfa.samples_s) == 3
        assert case.met is None  # --quick measures nothing
        (peer,) = case.peers
        assert peer.agrees
        if case.kind == "overhead":
            assert case.overhead_us is not None
            continue
        assert case.umfa.rate is not None
        assert case.limit_rate is not None
        assert case.share == pytest.approx(case.umfa.rate / case.limit_rate)
        assert case.umfa.median_s is not None
        assert peer.median_s is not None
        assert peer.ratio == pytest.approx(peer.median_s / case.umfa.median_s)
    assert {peer.name for case in run.cases for peer in case.peers} == {
        "numpy",
        "umfa-full",
        "kernel alone",
    }

    # What was stored is shown as it was measured.
    assert main(["bench", "--from", str(file)]) == 0
    assert capsys.readouterr().out == captured.out


def test_quick_results_say_so(numpy_peer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    numpy_peer()
    assert bench("--against", "numpy", "--case", "decode-fp32") == 0
    assert "these numbers say nothing about speed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (lambda out: out * 1.0001, False),
        (lambda out: out * 1.01, True),
        (lambda out: np.where(np.arange(out.size).reshape(out.shape) == 77, np.nan, out), True),
    ],
)
def test_disagreement_is_an_error(
    spoil: Spoil, wrong: bool, numpy_peer: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    numpy_peer(spoil)
    file = tmp_path / "results.json"
    arguments = ("--against", "numpy", "--case", "fp32-causal-512", "--json", str(file))
    assert bench(*arguments) == int(wrong)
    error = capsys.readouterr().err
    assert ("WRONG RESULT: fp32-causal-512: umfa and numpy differ" in error) == wrong
    assert main(["bench", "--from", str(file)]) == int(wrong)
    assert capsys.readouterr().err == error


def test_umfa_itself_is_checked(
    monkeypatch: pytest.MonkeyPatch, numpy_peer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    numpy_peer()
    attention = umfa.flash_attn_func

    def acausal(*tensors: Any, **options: Any) -> Any:
        return attention(*tensors, **{**options, "causal": False, "window_size": (-1, -1)})

    monkeypatch.setattr(umfa, "flash_attn_func", acausal)
    assert bench("--against", "none", "--case", "fp32-full-d64") == 0
    assert bench("--against", "none", "--case", "fp32-causal-512") == 1
    assert bench("--against", "none", "--case", "window-512") == 1
    assert "umfa differs from float64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (peers.NotSupportedError("no heads"), "not supported by numpy: no heads"),
        (NotImplementedError("later"), "not supported by numpy: NotImplementedError: later"),
        (MemoryError(), "numpy failed: MemoryError"),
    ],
)
def test_what_a_peer_cannot_do_is_said(
    error: Exception, text: str, numpy_peer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    numpy_peer(lambda out: out, error)
    assert bench("--against", "numpy", "--case", "fp16-full-1536") == 0
    assert f"fp16-full-1536: {text}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["torch", "jax", "mlx"])
def test_an_absent_peer_is_named(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    numpy_peer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in (name, f"{name}.core"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    numpy_peer()
    assert bench("--against", f"{name},numpy", "--case", "fp32-cross-77") == 0
    text = capsys.readouterr().out
    assert re.search(rf"^{name} +skipped: not installed", text, re.MULTILINE)
    assert re.search(r"^fp32-cross-77 .* numpy ", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["torch", "jax", "mlx"])
def test_peers_agree(
    name: str, numpy_peer: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every case that a peer supports: the same attention is asked of both."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    numpy_peer()  # for what it puts in place of measurements
    file = tmp_path / "results.json"
    assert bench("--against", name, "--repeats", "1", "--json", str(file)) == 0
    run = results.from_json(json.loads(file.read_text()))
    status = {case.name: case.peers[0].status for case in run.cases}
    refused = {case for case, text in status.items() if text != "measured"}
    assert refused <= ({"fp16-full-1536"} if name == "jax" else set())


# ---- gradients -------------------------------------------------------------------------------


@pytest.fixture
def backward(numpy_peer: Any, tmp_path: Path) -> Callable[..., tuple[int, results.Run]]:
    """Runs the suite of gradients: the exit status, and what was found."""
    pytest.importorskip("torch")
    numpy_peer()  # for what it puts in place of measurements
    file = tmp_path / "results.json"

    def run(*arguments: str, against: str = "torch") -> tuple[int, results.Run]:
        suite = ("--suite", "backward", "--against", against, "--json", str(file))
        status = bench(*suite, "--repeats", "1", *arguments)
        return status, results.from_json(json.loads(file.read_text()))

    return run


def test_gradients_agree(backward: Any) -> None:
    status, run = backward()
    assert status == 0
    assert [case.name for case in run.cases] == [case.name for case in cases.BACKWARD]
    for case in run.cases:
        assert case.correct
        assert case.error is not None
        assert case.error > 0
        (peer,) = case.peers
        assert peer.status == "measured"
        # Each library drops other weights.
        assert peer.agrees is (None if "dropout" in case.name else True)


@pytest.mark.parametrize("which", ["q", "k", "v", "attn_mask"])
@pytest.mark.parametrize("factor", [0.9, float("nan")])
def test_a_wrong_gradient_is_an_error(
    which: str,
    factor: float,
    backward: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    attention = umfa.flash_attn_func

    def spoilt(q: Any, k: Any, v: Any, **options: Any) -> Any:
        tensors = {"q": q, "k": k, "v": v, "attn_mask": options.pop("attn_mask")}
        tensors[which].register_hook(lambda gradient: gradient * factor)
        return attention(**tensors, **options)

    monkeypatch.setattr(umfa, "flash_attn_func", spoilt)
    status, _ = backward("--case", "backward-fp32-mask-gradient")
    assert status == 1
    error = capsys.readouterr().err
    assert "umfa differs from float64" in error
    assert "umfa and torch differ" in error


def test_other_dropped_weights_are_an_error(
    backward: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attention = umfa.flash_attn_func

    def other(*tensors: Any, **options: Any) -> Any:
        if "return_attn_probs" not in options:
            options["dropout_seed"] += 1
        return attention(*tensors, **options)

    monkeypatch.setattr(umfa, "flash_attn_func", other)
    status, _ = backward("--case", "backward-fp32-dropout")
    assert status == 1
    assert "umfa differs from float64" in capsys.readouterr().err


def test_who_gives_no_gradients_is_named(backward: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jax")
    status, run = backward("--case", "backward-fp32", against="jax")
    assert status == 0
    assert run.cases[0].umfa.status == "not supported"
    text = capsys.readouterr().out
    assert "not supported by umfa: gradients are taken by torch's autograd: --against torch" in text
    _, run = backward("--case", "backward-fp32", against="torch,jax")
    assert [peer.status for peer in run.cases[0].peers] == ["measured", "not supported"]
    assert "gradients are compared with torch's only" in capsys.readouterr().out


# ---- verdicts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (None, None),
        (Target(2.0), True),
        (Target(2.1), False),
        (Target(2.0, 0.5), True),
        (Target(2.0, 0.6), False),
        (Target(2.0, against="mlx"), None),
        (Target(2.0, 0.6, against="mlx"), False),
    ],
)
def test_verdict(target: Target | None, met: bool | None) -> None:
    case = replace(cases.CPU[0], target=target)
    result = measure.blank(case)
    result.share = 0.5
    result.peers = [results.Entry("torch", "measured", ratio=2.0)]
    measure.judge(case, result, measure.Settings())
    assert result.met is met


def test_json_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.json"
    for text in ("{}", "[]", '{"schema": 1}', '{"schema": 99, "cases": []}', "not JSON"):
        file.write_text(text)
        assert main(["bench", "--from", str(file)]) == 2, text
    assert main(["bench", "--from", str(tmp_path / "absent.json")]) == 2
    assert main(["bench", "--json", str(tmp_path / "absent" / "x.json")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_restless_machine_is_named() -> None:
    machine = results.Machine("CPU", 2, "Linux", "avx2", [], "gcc")
    run = results.Run("cpu", 2, 7, False, 0, machine, cases=[measure.blank(cases.CPU[0])])
    run.cases[0].limit = "peak"
    run.cases[0].limit_samples = [230e9, 231e9, 225e9]
    assert report.notes(run) == []
    run.cases[0].limit_samples.append(120e9)
    expected = "fp32-full-1536: the machine was not quiet: peak was 120 to 231"
    assert report.notes(run) == [expected]


# ---- chart and documentation -----------------------------------------------------------------


def test_chart(numpy_peer: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    numpy_peer()
    file = tmp_path / "chart.png"
    selected = ["--case", "fp32-causal-512", "--case", "window-512", "--case", "call-overhead"]
    assert bench("--against", "numpy", *selected, "--chart", str(file)) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_chart_without_matplotlib_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--chart", str(tmp_path / "chart.png")]) == 2
    assert "umfa[bench]" in capsys.readouterr().err


def table_keys(text: str) -> list[tuple[str, ...]]:
    """Case, target and command of each row of a Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("| **")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(row[0], row[6], row[8]) for row in cells]


def test_documentation_has_the_cases_as_they_are() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    found = table_keys(text)
    expected = [
        (
            f"**{case.name}**: {case.title}",
            case.target.text(case.kind) if case.target else report.NONE,
            f"`{case.command}`",
        )
        for case in EVERY
        if not case.long
    ]
    assert [row for row in expected if row not in found] == []


# ---- the machine's limits --------------------------------------------------------------------


@pytest.mark.sanitize
def test_peaks_of_this_cpu() -> None:
    loops = _ext.cpu_peaks()
    assert ("float32", "portable") in loops
    for dtype, isa in loops:
        assert _ext.cpu_peak(dtype, isa) > 0
    assert _ext.read_bandwidth(1) > 0
    assert _ext.read_bandwidth(1 << 20) > 0


def test_impossible_peaks_are_refused() -> None:
    with pytest.raises(umfa.UnsupportedError, match=r"\[umfa.cpu_peak\] .*; got int4 auto; expect"):
        _ext.cpu_peak("int4")
    with pytest.raises(umfa.UnsupportedError, match="got float32 sse9; expected one of"):
        _ext.cpu_peak("float32", "sse9")
    for size in (0, -1, 1 << 60):
        with pytest.raises(ValueError, match=rf"\[umfa.read_bandwidth\] .*; got {size};"):
            _ext.read_bandwidth(size)


def test_every_set_of_kernels_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "cpu_peak", lambda dtype, isa: 1.0)
    for name, usable in _ext.cpu_isas():
        if not usable:
            continue
        monkeypatch.setattr(_ext, "cpu_isa", lambda name=name: name)
        for case in cases.CPU:
            text, limit = measure.limit_of(case, measure.Settings(quick=True))
            assert text
            assert limit() > 0


def test_time_of_the_kernel_alone() -> None:
    q = np.random.default_rng(0).standard_normal((1, 5, 2, 8), dtype=np.float32)
    function = _ext.Function("umfa.bench")
    options = _ext.Attention(function, query=q, key=q, value=q, backend="cpu").options
    out = np.zeros_like(q)
    assert _ext.time_forward(options, (q, q, q), out, 3) > 0
    assert np.array_equal(out, umfa.flash_attn_func(q, q, q))
    with pytest.raises(ValueError, match=r"\[umfa.bench\] calls is out of range; got 0; expected"):
        _ext.time_forward(options, (q, q, q), out, 0)
