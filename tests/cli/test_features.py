"""The table of features: what `can_run` says, and what the README shows of it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umfa
from umfa.cli import features

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ROWS = features.rows()


def test_the_readme_has_this_table() -> None:
    text = README.read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- features -->\n(.*?)\n<!-- end of features -->", text, re.DOTALL)
    assert table == features.markdown()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.text)
def test_what_the_table_says_of_the_cpu_is_done(row: features.Row) -> None:
    """Every call behind a line gives a result, and one of its kind."""
    assert row.calls
    for function, tensors, options in row.calls:
        possible, _ = umfa.can_run(function, *tensors, **options, backend="cpu")
        if not possible:
            with pytest.raises(umfa.UnsupportedError):
                function(*tensors, **options, backend="cpu")
            continue
        before = umfa.stats().cpu_calls
        assert function(*tensors, **options, backend="cpu") is not None
        assert umfa.stats().cpu_calls > before


@pytest.mark.parametrize("row", [row for row in ROWS if row.gradients], ids=lambda row: row.text)
def test_gradients_that_the_table_names_exist(row: features.Row) -> None:
    torch = pytest.importorskip("torch")

    def leaf(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        tensor = torch.from_numpy(x.copy())
        return tensor.requires_grad_() if tensor.is_floating_point() else tensor

    for function, tensors, options in row.calls:
        given = [leaf(x) for x in tensors]
        named = {name: leaf(x) for name, x in options.items()}
        function(*given, **named, backend="cpu").sum().backward()
        leaves = [x for x in (*given, *named.values()) if getattr(x, "requires_grad", False)]
        assert len(leaves) >= 3
        assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)


def test_a_line_about_gradients_asks_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention to pages has a result and no gradients."""
    query, pages = features.zeros(1, 2, 1, 16), features.zeros(3, 16, 1, 16)
    options = {"block_table": np.zeros((1, 3), np.int32), "cache_seqlens": np.full(1, 20, np.int32)}
    paged = (umfa.flash_attn_with_kvcache, (query, pages, pages), options)
    rows = [features.Row("result", [paged]), features.Row("gradients", [paged], gradients=True)]
    monkeypatch.setattr(features, "rows", lambda: rows)
    lines = features.markdown().splitlines()
    assert lines[2:] == [f"| result | yes | {features.WRITTEN} |", "| gradients | no | no |"]


def test_a_line_with_an_impossible_call_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    query = features.zeros(1, 2, 1, 8)
    wrong = features.Row("wrong", [(umfa.flash_attn_func, (query, query, query[..., :4]), {})])
    too_long = features.Row("too long", [(umfa.flash_attn_func, (query, query), {"v": None})])
    monkeypatch.setattr(features, "rows", lambda: [ROWS[0], wrong, too_long])
    lines = features.markdown().splitlines()
    assert lines[3] == f"| wrong | yes | {features.WRITTEN} |"  # head dims of values may differ
    assert lines[4] == "| too long | no | no |"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert features.run(as_markdown=True) == 0
    assert capsys.readouterr().out == features.markdown() + "\n"
    assert features.run(as_markdown=False) == 0
    shown = capsys.readouterr().out
    assert "cpu" in shown
    assert "metal" in shown
    for text in features.absent().values():
        assert f"not here: {text}" in shown


# Other names of options in some functions, and the names in options.def.
SPELLINGS = {
    "is_causal": "causal", "cache_seqlens": "seqused_k", "page_table": "block_table",
    "cos": "rotary_cos", "sin": "rotary_sin", "k": "new_key", "v": "new_value",
    "s_aux": "learnable_sink", "mode": "quant_mode",
}  # fmt: skip
# Every function has these options, so the table does not name them.
WITHOUT_A_LINE = {"softmax_scale", "dropout_offset", "grouped"}
# Covered by the table's `fa4` line: flash-attention 4 has no name for it.
IN_ALL_CALLS_OF_FA4 = {"window_offsets"}
# What a QuantizedTensor brings along.
OF_QUANTIZED_TENSORS = {
    f"{operand}_{part}" for operand in ("key", "value") for part in ("format", "scales", "offsets")
}
HINTS = {"deterministic"}  # no effect: every result is deterministic


def test_every_option_stands_in_a_line() -> None:
    definitions = (ROOT / "src/core/options.def").read_text(encoding="utf-8")
    options = set(re.findall(r"^UMFA_(?!OPERAND|ALIAS)[A-Z_]+\((\w+)", definitions, re.MULTILINE))
    assert len(options) > 35
    shown = set()
    for row in ROWS:
        for function, tensors, keywords in row.calls:
            given = inspect.signature(function).bind(*tensors, **keywords).arguments
            shown |= {SPELLINGS.get(name, name) for name in given if given[name] is not None}
    others = WITHOUT_A_LINE | IN_ALL_CALLS_OF_FA4 | OF_QUANTIZED_TENSORS | HINTS
    assert options - shown == others
