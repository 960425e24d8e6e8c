"""``python -m umfa bench --suite quant``: what it compares and says; never how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from umfa.__main__ import main
from umfa.bench import cases, quantised, report, results
from umfa.bench.cases import UNQUANTISED


def run(tmp_path: Path, *arguments: str) -> tuple[int, results.Run]:
    """The exit status, and what was found."""
    file = tmp_path / "results.json"
    suite = ("--suite", "quant", "--against", "none", "--json", str(file))
    status = main(["bench", "--quick", *suite, *arguments])
    return status, results.from_json(json.loads(file.read_text(encoding="utf-8")))


def test_every_case_runs(tmp_path: Path) -> None:
    status, found = run(tmp_path)
    assert status == 0
    assert [case.name for case in found.cases] == [case.name for case in cases.QUANT]
    for case in found.cases:
        assert case.correct
        assert [peer.name for peer in case.peers] == [UNQUANTISED]
        assert case.peers[0].ratio is not None
    table = {row[0]: row for row in report.rows(found)}
    assert bytes_in(table["decode-int4"][2]) == "0.28× the bytes"
    assert bytes_in(table["prefill-int8"][2]) == "0.51× the bytes"
    assert table["decode-int8"][6] == "≥ 1.6×"
    assert table["prefill-int8"][6] == report.NONE
    assert table["flux-sage"][2].startswith("cosine 0.99")
    assert table["flux-sage"][6] == "≥ 1.15×"
    assert table["flux-int8"][6] == "≥ 1.35×"
    assert " --against torch " in next(c.command for c in cases.QUANT if c.mode)


def bytes_in(text: str) -> str:
    return text.split(", ")[1].split(";")[0]


def test_what_is_lost_is_measured_against_exact_attention(tmp_path: Path) -> None:
    _, found = run(tmp_path, "--case", "outliers-int4*")
    for case in found.cases:
        own = next(c for c in cases.QUANT if c.name == case.name).quick()
        assert own.quantised is not None
        inputs = quantised.inputs_of(own, found.seed)
        form: dict[str, Any] = vars(own.quantised)
        key, value = (umfa.quantize(x, **form).dequantize() for x in (inputs.key, inputs.value))
        exact, _ = reference.attention(inputs.query, inputs.key, inputs.value)
        lossy, _ = reference.attention(inputs.query, key, value)
        loss = np.abs(lossy - exact).sum() / np.abs(exact).sum()
        assert case.relative_l1 == pytest.approx(loss, rel=0.05)
        assert case.cosine == pytest.approx(quantised.cosine(lossy, exact), abs=2e-3)
        assert (inputs.key[..., ::16].mean((0, 1, 2)) > 4).all()
    by_row = {case.name: case.relative_l1 for case in found.cases}
    assert by_row["outliers-int4-row"] > by_row["outliers-int4"]  # type: ignore[operator]


def test_a_wrong_result_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attention = umfa.quantized_attention
    monkeypatch.setattr(umfa, "quantized_attention", lambda *a, **k: 1.2 * attention(*a, **k))
    status, found = run(tmp_path, "--case", "decode-int8")
    assert status == 1
    assert found.cases[0].correct is False
    assert "WRONG RESULT: decode-int8: umfa differs from float64" in capsys.readouterr().err


def test_a_mode_is_measured_beside_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    status, found = run(tmp_path, "--case", "flux-sage", "--against", "torch")
    assert status == 0
    assert [peer.name for peer in found.cases[0].peers] == [UNQUANTISED, "torch"]
    assert all(peer.ratio for peer in found.cases[0].peers)
    assert 0 < found.cases[0].relative_l1 < 0.05  # type: ignore[operator]


def test_a_chart_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = str(tmp_path / "x.png")
    assert main(["bench", "--quick", "--suite", "quant", "--chart", chart]) == 2
    assert "got suite quant; expected another suite" in capsys.readouterr().err
