"""``python -m umfa bench --suite models``: a block of a model, and tiny calls; never how fast."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import umfa
from umfa.__main__ import main
from umfa.bench import cases, chart, measure, report, results
from umfa.bench.cases import DISABLED, IDENTITY, TORCH_ATTENTION, UMFA_ATTENTION, Case, Target

BLOCKS = ["flux-block-bf16", "flux-block-fp32"]
PEERS = {
    "call-torch": ["torch"],
    "call-torch-enabled": ["torch", DISABLED],
    "call-jax": [IDENTITY, "jax"],
    "call-mlx": ["mlx"],
}

Bench = Callable[..., tuple[int, results.Run]]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 2 heads, which take no time."""
    quick = Case.quick
    monkeypatch.setattr(Case, "quick", lambda case: replace(quick(case), heads=min(case.heads, 2)))
    yield
    torch = sys.modules.get("umfa.torch")
    if torch is not None:
        torch.disable()
        torch.uninstall()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Runs the suite: the exit status, and what was found."""
    file = tmp_path / "results.json"

    def run(*arguments: str, against: str = "torch") -> tuple[int, results.Run]:
        suite = ("--suite", "models", "--against", against, "--json", str(file))
        status = main(["bench", "--quick", "--threads", "1", "--repeats", "2", *suite, *arguments])
        return status, results.from_json(json.loads(file.read_text()))

    return run


def needs(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


def test_the_block_is_flux_at_1024() -> None:
    for case in cases.select("models", ["flux-*"]):
        # A token for each 16 × 16 pixels, and 512 of text.
        assert case.seqlen_q == case.seqlen_k == (1024 // 16) ** 2 + 512
        assert (case.heads, case.head_dim) == (24, 128)
        assert case.command == f"python -m umfa bench --suite models --case {case.name}"


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    needs("torch", "diffusers")
    before = umfa.stats()
    status, run = bench("--case", name)
    assert status == 0
    assert umfa.stats().left == before.left
    (case,) = run.cases
    assert case.correct
    assert case.met is None  # --quick measures nothing
    block, stock, ours = case.peers
    assert [x.name for x in case.peers] == ["torch", TORCH_ATTENTION, UMFA_ATTENTION]
    for entry in (case.umfa, *case.peers):
        assert entry.status == "measured"
        assert len(entry.samples_s) == 2
        assert entry.median_s
    assert case.umfa.median_s
    assert block.median_s
    assert stock.median_s
    assert ours.median_s
    assert block.difference
    assert block.agrees
    assert stock.agrees
    assert block.ratio == pytest.approx(block.median_s / case.umfa.median_s)
    assert stock.ratio == pytest.approx(stock.median_s / ours.median_s)
    # The block without its attention, and with umfa's in its place.
    attainable = block.median_s / (block.median_s - stock.median_s + ours.median_s)
    assert case.attainable == pytest.approx(attainable)
    assert case.attention_share == pytest.approx(stock.median_s / block.median_s)
    text = capsys.readouterr().out
    assert f"attention {case.attention_share:.0%}: {attainable:.2f}× attainable" in text


@pytest.mark.parametrize("name", PEERS)
def test_call(name: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    library = name.split("-")[1]
    needs(library)
    before = umfa.stats()
    status, run = bench("--case", name, against=library)
    assert status == 0
    assert umfa.stats().cpu_calls > before.cpu_calls
    (case,) = run.cases
    assert case.correct
    assert case.umfa.median_s
    assert [peer.name for peer in case.peers] == PEERS[name]
    for peer in case.peers:
        assert peer.median_s
        assert peer.ratio == pytest.approx(peer.median_s / case.umfa.median_s)
        assert peer.agrees is (None if peer.name == IDENTITY else True)
    text = capsys.readouterr().out
    if name == "call-jax":
        identity = case.peers[0].median_s
        assert identity
        assert case.overhead_us == pytest.approx(1e6 * (case.umfa.median_s - identity))
        assert f"{case.overhead_us:.2f} µs over identity" in text
        assert "≤ 10 µs over identity" in text
    else:
        assert case.overhead_us is None
        assert "µs a call" in text


def test_a_numpy_call_is_beside_its_kernel(bench: Bench) -> None:
    status, run = bench("--case", "call-numpy", against="none")
    assert status == 0
    (case,) = run.cases
    assert case.correct
    assert [peer.name for peer in case.peers] == ["kernel alone"]
    assert case.overhead_us is not None


@pytest.mark.parametrize("name", [*BLOCKS, *PEERS])
def test_an_absent_library_is_named(
    name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = "torch" if name in BLOCKS else name.split("-")[1]
    status, run = bench("--case", name, against="none")
    assert status == 0
    assert run.cases[0].umfa.status == "not supported"
    missing = f"{name}: not supported by umfa: needs {library}: "
    assert missing + f"--against {library}" in capsys.readouterr().out
    for module in (library, f"{library}.core"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    bench("--case", name, against=library)
    assert missing + "not installed" in capsys.readouterr().out


def test_a_block_without_diffusers_is_named(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("torch")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert bench("--case", "flux-block-fp32")[0] == 0
    assert "needs diffusers: not installed" in capsys.readouterr().out


def test_a_wrong_block_is_an_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("torch", "diffusers")
    adapter = importlib.import_module("umfa.diffusers")
    attention = adapter.flash_attn_func
    monkeypatch.setattr(adapter, "flash_attn_func", lambda *a, **o: attention(*a, **o) * 1.1)
    assert bench("--case", "flux-block-fp32")[0] == 1
    error = capsys.readouterr().err
    assert "flux-block-fp32: umfa differs from float64" in error
    assert "flux-block-fp32: umfa and torch differ" in error
    assert f"flux-block-fp32: umfa and {TORCH_ATTENTION} differ" in error


def test_a_wrong_call_is_an_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("torch")
    attention = umfa.scaled_dot_product_attention
    monkeypatch.setattr(umfa, "scaled_dot_product_attention", lambda *a: attention(*a) * 1.1)
    assert bench("--case", "call-torch")[0] == 1
    error = capsys.readouterr().err
    assert "call-torch: umfa differs from float64" in error
    assert "call-torch: umfa and torch differ" in error


@pytest.mark.parametrize(("name", "module"), [(BLOCKS[1], "diffusers"), (list(PEERS)[1], "torch")])
def test_a_switch_that_does_nothing_is_an_error(
    name: str, module: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch in umfa's turn gives right results, and must not be timed as umfa's."""
    needs("torch", module)
    switch = importlib.import_module(f"umfa.{module}")
    monkeypatch.setattr(switch, "enable", lambda *model: None)
    with pytest.raises(RuntimeError, match="umfa: calls by umfa; got 0; expected some"):
        bench("--case", name)


def test_torch_is_as_it_was_afterwards(bench: Bench) -> None:
    needs("torch", "diffusers")
    bench("--case", "call-torch-enabled", "--case", "flux-block-fp32")
    torch = importlib.import_module("torch")
    before = umfa.stats().cpu_calls
    torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 1, 4, 8))
    assert umfa.stats().cpu_calls == before
    assert not umfa.torch.is_enabled()


@pytest.mark.parametrize(
    ("ratio", "attainable", "block", "met"),
    [
        (1.9, 1.2, 1.2, True),
        (1.9, 1.2, 1.17, True),  # as fast as attainable, within noise
        (1.7, 1.2, 1.2, False),
        (1.9, 1.2, 1.1, False),
        (1.9, None, 1.2, None),
    ],
)
def test_verdict_of_a_block(
    ratio: float, attainable: float | None, block: float, met: bool | None
) -> None:
    case, _ = cases.select("models", ["flux-*"])
    result = measure.blank(case)
    result.attainable = attainable
    result.peers = [
        results.Entry("torch", "measured", ratio=block),
        results.Entry(TORCH_ATTENTION, "measured", ratio=ratio),
    ]
    measure.judge(case, result, measure.Settings())
    assert result.met is met


@pytest.mark.parametrize(("median", "met"), [(None, None), (3e-6, True), (5e-6, False)])
def test_verdict_of_a_call(median: float | None, met: bool | None) -> None:
    case = replace(cases.CPU[0], target=Target(total_us=4, against=""))
    result = measure.blank(case)
    result.umfa.median_s = median
    measure.judge(case, result, measure.Settings())
    assert result.met is met


def test_targets_in_words() -> None:
    texts = {case.name: case.target.text(case.kind) for case in cases.MODELS if case.target}
    assert texts == {
        "flux-block-bf16": "≥ 1.8×, block: Amdahl's share",
        "call-torch": "≥ 0.5×, ≤ 8 µs a call",
        "call-torch-enabled": "≥ 0.5×, ≤ 8 µs a call",
        "call-numpy": "≤ 4 µs a call",
        "call-jax": "≤ 10 µs over identity",
        "call-mlx": "≤ 10 µs a call",
    }


def test_a_chart_of_the_suite_is_refused(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench("--case", "call-numpy", against="none")
    for which in (("--suite", "models"), ("--from", str(tmp_path / "results.json"))):
        assert main(["bench", *which, "--chart", str(tmp_path / "chart.png")]) == 2
        assert "got suite models; expected another suite" in capsys.readouterr().err
    with pytest.raises(ValueError, match="suite models"):
        chart.check("models")


def test_markdown_has_a_row_for_each_comparison(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("torch", "diffusers")
    _, run = bench("--case", "flux-block-bf16", "--case", "call-torch")
    lines = [line for line in report.markdown(run).splitlines() if line.startswith("| **")]
    assert len(lines) == 3 + 1
    assert re.search(r"\| torch's attention \|.*\| ≥ 1\.8×, block: Amdahl's share \|", lines[1])
    assert lines[0].endswith("| `python -m umfa bench --suite models --case flux-block-bf16` |")


def test_older_results_are_still_read() -> None:
    """JSON of this schema, written before there were blocks."""
    run = results.Run("cpu", 1, 1, True, 0, results.Machine("", 1, "", "", [], ""))
    run.cases = [measure.blank(cases.CPU[0])]
    stored = results.to_json(run)
    for name in ("attention_share", "attainable"):
        del stored["cases"][0][name]
    assert results.from_json(stored) == run
