"""A trained model from a PyPI package, with umfa in place of its own attention.

rxnmapper (MIT) contains the ALBERT model of Schwaller et al. (2021), trained on chemical reactions:
12 layers of 8 heads of 32 channels. Only its files are read, so its dependencies are not needed::

    pip install --no-deps rxnmapper==0.4.3
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import umfa

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.models,
    # The warnings of the model libraries depend on their versions.
    pytest.mark.filterwarnings("default"),
]

REACTIONS = [
    "CC(=O)O.OCC>>CC(=O)OCC.O",
    "Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1",
    "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
    "C1=CC=CC=C1.ClCl>>ClC1=CC=CC=C1.Cl",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    package = importlib.util.find_spec("rxnmapper")
    if package is None or package.origin is None:
        pytest.skip("rxnmapper is not installed")
    models = Path(package.origin).parent / "models" / "transformers"
    return models / "albert_heads_8_uspto_all_1310k"


def tokens_of(folder: Path, reactions: list[str]) -> tuple[Any, Any]:
    """Token indices and attention mask, (batch, longest). Each token is the longest match in the
    vocabulary."""
    import torch

    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    numbers = {word: i for i, word in enumerate(words)}
    rows = []
    for text in reactions:
        row = [numbers["[CLS]"]]
        while text:
            length = next((n for n in range(12, 0, -1) if text[:n] in numbers), 1)
            row.append(numbers.get(text[:length], numbers["[UNK]"]))
            text = text[length:]
        rows.append([*row, numbers["[SEP]"]])
    longest = max(map(len, rows))
    indices = torch.zeros(len(rows), longest, dtype=torch.long)
    counts = torch.zeros(len(rows), longest, dtype=torch.long)
    for b, row in enumerate(rows):
        indices[b, : len(row)] = torch.tensor(row)
        counts[b, : len(row)] = 1
    assert (indices != numbers["[UNK]"]).all()
    return indices, counts


def model_of(folder: Path, attention: str) -> Any:
    import torch
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig.from_pretrained(folder)
    config._attn_implementation = attention
    model = AlbertForMaskedLM(config).eval()
    weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    missing, _ = model.load_state_dict(weights, strict=False)
    assert all("decoder" in name or "position_ids" in name for name in missing), missing
    model.tie_weights()
    return model


def test_the_logits_agree(folder: Path) -> None:
    import torch
    from transformers import AttentionInterface

    indices, counts = tokens_of(folder, REACTIONS)
    calls = []

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
    ) -> tuple[Any, None]:
        assert not options.get("dropout")
        calls.append(tuple(query.shape))
        # Padding mask made here, because transformers makes none for an unknown attention.
        out = umfa.scaled_dot_product_attention(
            query, key, value, counts.bool()[:, None, None, :], scale=options.get("scaling")
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("umfa-nightly", attention)
    with torch.no_grad():
        stock = model_of(folder, "eager")(indices, attention_mask=counts).logits
        ours = model_of(folder, "umfa-nightly")(indices, attention_mask=counts).logits
    assert calls == [(len(REACTIONS), 8, indices.shape[1], 32)] * 12
    real = counts.bool()
    assert (ours - stock)[real].abs().max().item() <= 2e-4
    # The weights are trained ones: the model predicts most of its input tokens.
    right = stock.argmax(-1)[real] == indices[real]
    assert right.float().mean() > 0.8
