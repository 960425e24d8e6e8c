"""The reference itself: against its formula written as plain loops, and against PyTorch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests import array_libraries, cases, reference
from tests.cases import Case
from tests.checks import Tolerance, assert_close
from tests.reference import Alignment

EXACT = Tolerance(1e-12, 1e-12)

LOOP_CASES = [
    Case((2, 4, 5, 7, 3), heads_k=2, head_dim_v=2),
    Case((1, 2, 7, 5, 3), options=(("causal", True),)),
    Case((1, 2, 5, 7, 3), options=(("window_size", (2, 1)), ("softcap", 1.5))),
    Case((1, 2, 6, 6, 3), options=(("window_size", (0, -1)), ("softmax_scale", -0.3))),
    Case((2, 3, 5, 6, 3), options=(("causal", True),), alibi="batch_heads"),
    Case((2, 3, 5, 6, 3), alibi="heads"),
    Case((1, 2, 6, 9, 3), options=(("attention_chunk", 4),)),
    Case((1, 2, 9, 6, 3), options=(("attention_chunk", 2), ("causal", True))),
    Case((1, 2, 8, 8, 3), options=(("attention_chunk", 3), ("window_size", (1, 2)))),
    Case((2, 2, 5, 7, 3), options=(("learnable_sink", (0.5, -2.0)),)),
    Case((1, 2, 7, 5, 3), options=(("learnable_sink", (3.0, 0.0)), ("causal", True))),
    Case(
        (1, 2, 5, 5, 3),
        options=(("learnable_sink", (1.0, -1.0)), ("softcap", 2.0), ("softmax_scale", 0.7)),
    ),
]


@pytest.mark.parametrize("alignment", ["lower_right", "upper_left"])
@pytest.mark.parametrize("case", LOOP_CASES, ids=str)
def test_equals_plain_loops(
    case: Case, alignment: Alignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "ROWS_AT_A_TIME", 3)  # several chunks, the last one ragged
    options = cases.options(case)
    out, lse = reference.attention(*cases.inputs(case), alignment=alignment, **options)
    query, key, value = (array.astype(float) for array in cases.inputs(case))

    scale = options.get("softmax_scale", 1 / math.sqrt(query.shape[3]))
    left, right = options.get("window_size", (-1, -1))
    softcap = options.get("softcap", 0.0)
    chunk = options.get("attention_chunk", 0)
    slopes = np.asarray(options.get("alibi_slopes", np.zeros(query.shape[2])), dtype=float)
    for b, i, h in np.ndindex(query.shape[:3]):
        p = i + (key.shape[1] - query.shape[1] if alignment == "lower_right" else 0)
        h_k = h * key.shape[2] // query.shape[2]
        weights, weighted = 0.0, np.zeros(value.shape[3])
        for j in range(key.shape[1]):
            if (options.get("causal") and j > p) or (left >= 0 and j < p - left):
                continue
            if right >= 0 and j > p + right:
                continue
            if chunk and math.floor(j / chunk) != math.floor(p / chunk):
                continue
            score = scale * sum(query[b, i, h, d] * key[b, j, h_k, d] for d in range(key.shape[3]))
            if softcap:
                score = softcap * math.tanh(score / softcap)
            score -= (slopes[h] if slopes.ndim == 1 else slopes[b, h]) * abs(p - j)
            weights += math.exp(score)
            weighted += math.exp(score) * value[b, j, h_k]
        if "learnable_sink" in options:
            weights += math.exp(options["learnable_sink"][h])
        where = f"row {b, i, h}"
        if weights == 0.0:
            assert lse[b, h, i] == -np.inf, where
            assert not out[b, i, h].any(), where
        else:
            assert_close(lse[b, h, i], np.asarray(math.log(weights)), EXACT, where)
            assert_close(out[b, i, h], weighted / weights, EXACT, where)


def test_sink_is_one_more_key_without_a_value() -> None:
    case = Case((2, 3, 4, 6, 5))
    query, key, value = (array.astype(float) for array in cases.inputs(case))
    sink = np.array([0.7, -1.0, 2.0])
    # A key whose score is the sink, whatever the query: a channel of its own, unscaled.
    wide = np.concatenate([query, np.ones((2, 4, 3, 1))], axis=3)
    keys = np.concatenate([key, np.zeros((2, 6, 3, 1))], axis=3)
    extra = np.zeros((2, 1, 3, 6))
    scale = 5**-0.5
    extra[:, 0, :, 5] = sink / scale
    expected = reference.attention(
        wide,
        np.concatenate([keys, extra], axis=1),
        np.concatenate([value, np.zeros((2, 1, 3, 5))], axis=1),
        softmax_scale=scale,
    )
    found = reference.attention(query, key, value, learnable_sink=sink)
    assert_close(found[0], expected[0], EXACT, "out")
    assert_close(found[1], expected[1], EXACT, "lse")


def test_sinks_beyond_the_range_of_exp() -> None:
    case = Case((1, 2, 3, 4, 5))
    out, lse = reference.attention(*cases.inputs(case), learnable_sink=[2000.0, -2000.0])
    without, lse_without = reference.attention(*cases.inputs(case))
    assert not out[:, :, 0].any()
    assert (lse[:, 0] == 2000.0).all()
    assert_close(out[:, :, 1], without[:, :, 1], EXACT, "out")
    assert_close(lse[:, 1], lse_without[:, 1], EXACT, "lse")


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_equals_pytorch_in_float64(causal: bool) -> None:
    torch = array_libraries.load("torch").module
    case = Case((2, 6, 33, 33, 16), heads_k=2, head_dim_v=24)
    tensors = [torch.from_numpy(x.astype(float)).transpose(1, 2) for x in cases.inputs(case)]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *tensors, is_causal=causal, enable_gqa=True
    )
    ours, _ = reference.attention(*cases.inputs(case), causal=causal)
    assert_close(ours, theirs.transpose(1, 2).numpy(), EXACT)


DIFFERENTIATED: dict[str, dict[str, Any]] = {
    "plain": {},
    "masks": {"causal": True, "window_size": (3, -1), "prefix_len": 1, "softcap": 1.5},
    "biases": {"alibi_slopes": [0.3, 0.1, 0.7], "mask": "float"},
    "sinks and dropout": {"learnable_sink": [0.5, -1.0, 2.0], "dropout_p": 0.4, "dropout_seed": 3},
    "qv": {"qv": "float", "learnable_sink": [0.5, -1.0, 2.0], "softcap": 2.0},
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_are_finite_differences(name: str) -> None:
    rng = np.random.default_rng(0)
    options = dict(DIFFERENTIATED[name])
    variables = {
        "query": rng.standard_normal((2, 4, 3, 3)),
        "key": rng.standard_normal((2, 5, 1, 3)),
        "value": rng.standard_normal((2, 5, 1, 2)),
    }
    if options.pop("mask", None):
        variables["mask"] = rng.standard_normal((3, 4, 5))
        variables["mask"][0, 1, 2] = -np.inf
    if options.pop("qv", None):
        variables["qv"] = rng.standard_normal((2, 4, 3, 2))
    for kind in ("alibi_slopes", "learnable_sink"):
        if kind in options:
            variables[kind] = np.array(options.pop(kind))
    dout, dlse = rng.standard_normal((2, 4, 3, 2)), rng.standard_normal((2, 3, 4))

    def loss(**changed: np.ndarray) -> float:
        out, lse = reference.attention(**(variables | changed), **options)
        return float((out * dout).sum() + (lse * dlse).sum())

    found = reference.gradients(**variables, dout=dout, dlse=dlse, **options)
    names = {
        "query": "dq", "key": "dk", "value": "dv", "mask": "dmask", "qv": "dqv",
        "learnable_sink": "dsinks", "alibi_slopes": "dalibi_slopes",
    }  # fmt: skip
    step = 1e-5
    for variable, array in variables.items():
        expected = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            if np.isneginf(array[index]):
                continue
            up, down = array.copy(), array.copy()
            up[index] += step
            down[index] -= step
            expected[index] = (loss(**{variable: up}) - loss(**{variable: down})) / (2 * step)
        own = getattr(found, names[variable])
        assert_close(own, expected, Tolerance(1e-7, 1e-6), names[variable])
