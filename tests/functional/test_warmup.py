"""`umfa.warmup` where nothing is to be compiled, and what it refuses."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest

import umfa


def test_the_cpu_compiles_nothing() -> None:
    x = np.zeros((1, 4, 2, 16), np.float32)
    before = umfa.stats()
    done = umfa.warmup(x, x, x, backend="cpu")
    assert done[:3] == ("cpu", 0, 0)
    assert umfa.warmup(umfa.flash_attn_combine, x[None], x[None, ..., 0], backend="cpu")[:3] == (
        "cpu", 0, 0,
    )  # fmt: skip
    assert umfa.stats() == before, "nothing is computed"
    assert 0 < done.seconds < 1


def test_it_raises_what_the_call_would() -> None:
    x = np.zeros((1, 4, 2, 16), np.float32)
    with pytest.raises(ValueError, match=re.escape("[umfa.flash_attn_func]")):
        umfa.warmup(x, x, x, softmax_scale=float("nan"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        umfa.warmup(x, x, x, scale=1)
    with pytest.raises(TypeError, match=re.escape("[umfa.warmup] the function is not known; got")):
        umfa.warmup(print, x)
    assert set(inspect.signature(umfa.warmup).parameters) == set(
        inspect.signature(umfa.flash_attn_func).parameters
    )
