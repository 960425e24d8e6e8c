"""The convention of the field: at most twice PyTorch's own error in the same dtype.

The acceptance tolerances are absolute; this one follows the data. Both errors are against float64
attention of the same rounded inputs. PyTorch computes with its plain ("math") path on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests import array_libraries, cases
from tests.cases import Case

if TYPE_CHECKING:
    from tests.attend import Attend

CASES = [
    Case((2, 4, 128, 128, 64), dtype, options=options, seed=seed)
    for dtype in ("float32", "float16", "bfloat16")
    for seed, options in enumerate([(), (("causal", True),)])
] + [
    Case((1, 2, 512, 512, 128), "bfloat16"),
    Case((1, 2, 333, 777, 80), "float16"),
    Case((1, 8, 200, 200, 40), "float32", heads_k=2),
    Case((1, 2, 256, 256, 64), "float32", factor=3.0),
    Case((1, 2, 256, 256, 64), "bfloat16", factor=3.0),
]


@pytest.mark.parametrize("framework", ["torch"], indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(case: Case, attend: Attend) -> None:
    torch = array_libraries.load("torch").module
    attention = torch.nn.attention
    arrays, options = cases.inputs(case), cases.options(case)
    exact, _ = cases.expected(case)
    tensors = [attend.framework.tensor(array) for array in arrays]
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.transpose(1, 2) for tensor in tensors),
            is_causal=options.get("causal", False),
            enable_gqa=case.heads_k is not None,
        ).transpose(1, 2)
    ours = attend(*tensors, **options).out
    error, allowed = (np.abs(attend.framework.float64(out) - exact).max() for out in (ours, theirs))
    assert error <= 2 * allowed, f"{error:.3g} is more than twice PyTorch's {allowed:.3g}"
