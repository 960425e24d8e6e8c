"""Small models of transformers with random weights, run on eager attention and on umfa."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import umfa

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

USUAL = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "head_dim": 16},
    "gemma3_text": {"sliding_window": 8, "head_dim": 16},
    "gpt_oss": {"sliding_window": 8, "head_dim": 16, **EXPERTS},
    "qwen3": {"head_dim": 16},
    "llama4_text": {
        "attention_chunk_size": 8, "intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 0],
        **EXPERTS,
    },
    "deepseek_v3": {
        "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
        "num_key_value_heads": 4,
    },
    "modernbert-decoder": {"local_attention": 8, "global_attn_every_n_layers": 2},
}  # fmt: skip


def model_of(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**USUAL, **FAMILIES[family], **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()


def taken_by(before: umfa.Stats) -> dict[str, int]:
    return dict(Counter(umfa.stats().taken) - Counter(before.taken))


def both(model: Any, run: Any, name: str = "umfa") -> tuple[Any, Any, dict[str, int]]:
    """What `run` gives on eager attention and on umfa, and what umfa computed."""
    model.set_attn_implementation("eager")
    expected = run(model)
    model.set_attn_implementation(name)
    before = umfa.stats()
    return expected, run(model), taken_by(before)


def tokens(batch: int = 2, seqlen: int = 21) -> tuple[Any, Any]:
    """Ids and a mask whose first row is padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(3, 200, (batch, seqlen))
    there = torch.ones_like(ids)
    there[0, :5] = ids[0, :5] = 0
    return ids, there


def packed_positions() -> tuple[Any, Any]:
    torch.manual_seed(2)
    ids = torch.randint(3, 200, (2, 21))
    lengths = ((5, 9, 7), (12, 1, 8))
    return ids, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
