"""The acceptance set, forward: shapes that real models have and shapes that break tilings.

Every case is compared with float64 attention of the same rounded inputs. Numbers A01, A02, … are
those of the project's acceptance set; strides, masks and bad input have files of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cases import Case
from tests.checks import Tolerance
from tests.tiers import crossed

if TYPE_CHECKING:
    from tests.attend import Attend

ODD_SIZES = [
    (10, 3), (10, 80), (8, 2), (9, 2), (23, 2), (24, 2), (25, 2), (192, 77), (192, 80), (93, 32),
    (99, 35), (64, 32), (64, 34), (64, 36), (64, 40), (32, 64), (4, 1), (4, 2), (384, 95),
    (777, 199),
]  # fmt: skip
CAUSAL = ("causal", True)


def all_dtypes(label: str, shape: tuple[int, int, int, int, int], **more: object) -> list[Case]:
    return [
        Case(shape, dtype, label=label, **more)  # type: ignore[arg-type]
        for dtype in ("float32", "float16", "bfloat16")
    ]


SMALL = [
    *(Case((1, 1, n, n, d), label="A01") for n, d in ODD_SIZES),
    *all_dtypes("A02", (2, 3, 64, 64, 32)),
    *all_dtypes("A11", (1, 12, 77, 77, 64), options=(CAUSAL,)),
    Case((1, 8, 1, 4096, 128), "float16", options=(CAUSAL,), label="A17"),
    *(Case((2, 8, 32, 32, 64), heads_k=heads_k, label="A18") for heads_k in (1, 2, 4)),
    *(
        Case((1, 4, 256, 256, 64), options=(("window_size", window),), label="A23")
        for window in ((64, 0), (32, 32), (0, 0))
    ),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case: Case, attend: Attend) -> None:
    attend.case(case)


NIGHTLY_EMULATED = pytest.mark.slow_emulated(tier="nightly")  # 40 to 150 s each

LARGE = [
    Case((2, 8, 1023, 1023, 64), "float16", label="A07"),
    pytest.param(
        Case((2, 8, 1025, 1025, 64), "float16", label="A07"), marks=pytest.mark.slow_emulated
    ),
    pytest.param(
        Case((1, 8, 4096, 77, 40), "float16", label="A08"), marks=pytest.mark.slow_emulated
    ),
    pytest.param(Case((1, 1, 4096, 4096, 512), "float16", label="A10"), marks=NIGHTLY_EMULATED),
    pytest.param(Case((1, 1, 4096, 4096, 512), "float32", label="A10"), marks=NIGHTLY_EMULATED),
    # One group of heads takes the emulator 15 s. The default run tests the same kernel with 1536
    # keys in tests/metal/test_forward_kernel.py, and groups and causal masks with fewer keys.
    pytest.param(
        Case((1, 32, 2048, 2048, 128), "bfloat16", heads_k=8, options=(CAUSAL,), label="A19"),
        marks=NIGHTLY_EMULATED,
    ),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case, attend: Attend) -> None:
    attend.case(case)


IMAGE_MODELS = [
    Case((1, 24, 768, 768, 128), "bfloat16", label="A03"),
    Case((1, 24, 1536, 1536, 128), "bfloat16", label="A04"),
    Case((1, 24, 1536, 1536, 128), "float16", label="A04"),
    Case((1, 24, 4608, 4608, 128), "bfloat16", label="A05"),
    Case((1, 30, 4128, 4128, 128), "bfloat16", label="A06"),
]


@pytest.mark.slow
@pytest.mark.cpu_only  # tests/metal/test_forward_kernel.py runs one head of each on the emulator
@pytest.mark.parametrize("case", IMAGE_MODELS, ids=str)
def test_image_models(case: Case, attend_numpy: Attend) -> None:
    """FLUX and Z-Image with all their heads."""
    attend_numpy.case(case)


@pytest.mark.parametrize("softcap", [10.0, 30.0, 50.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # The bound of A24 for what tanh may cost, and for bfloat16 the rounding of the output.
    [("float32", Tolerance(1e-4, 1e-5)), ("bfloat16", Tolerance(2e-2, 8e-3))],
    ids=["float32", "bfloat16"],
)
def test_a24_softcap(softcap: float, dtype: str, tolerance: Tolerance, attend: Attend) -> None:
    case = Case((1, 4, 128, 128, 64), dtype, options=(("softcap", softcap),))
    attend.case(case, tolerance, Tolerance(1e-4, 0.0))


def test_a26_large_logits_in_half_precision(attend: Attend) -> None:
    # Logits reach 12000: exp() of them is far outside float32, and their sum outside float16.
    case = Case((1, 2, 128, 128, 64), "float16", factor=50.0)
    # The log-sum-exp is as large as the logits, so float32 itself can only hold 1e-7 of that.
    attend.case(case, Tolerance(5e-3, 1e-3), Tolerance(2e-5, 1e-6))


HEAD_DIMS = [1, 7, 8, 15, 16, 17, 31, 33, 63, 65, 72, 96, 127, 129, 160, 255, 257, 384, 511, 512]


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    crossed(HEAD_DIMS, ["float32", "bfloat16"], mark=pytest.mark.slow_emulated),
)
def test_head_dims(head_dim: int, dtype: str, attend_numpy: Attend) -> None:
    attend_numpy.case(Case((1, 2, 35, 70, head_dim), dtype))


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "dtype"),
    crossed(
        [[64, 1], [1, 64], [192, 128], [40, 72], [512, 3], [16, 512]],
        ["float32", "float16"],
        mark=pytest.mark.slow_emulated,
    ),
)
def test_value_has_its_own_head_dim(
    head_dim: int, head_dim_v: int, dtype: str, attend: Attend
) -> None:
    attend.case(
        Case((2, 4, 33, 47, head_dim), dtype, heads_k=2, head_dim_v=head_dim_v, options=(CAUSAL,))
    )


@pytest.mark.parametrize("seqlen_q", [1, 2, 15, 16, 17, 63, 64, 65, 129])
@pytest.mark.parametrize("seqlen_k", [1, 2, 31, 32, 33, 127, 128, 129, 513])
def test_sequence_lengths(seqlen_q: int, seqlen_k: int, attend_numpy: Attend) -> None:
    attend_numpy.case(Case((1, 2, seqlen_q, seqlen_k, 16), heads_k=1))


# Not larger: exp() turns the rounding of a logit into a relative error, and at scale 3 the logits
# reach 100, which float32 holds to 4e-6 only. test_against_torch.py has such cases.
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5, 1e-3])
def test_softmax_scale(scale: float, attend_numpy: Attend) -> None:
    attend_numpy.case(Case((1, 2, 40, 50, 64), options=(("softmax_scale", scale),)))


def test_many_batches_and_heads(attend_numpy: Attend) -> None:
    attend_numpy.case(Case((37, 12, 5, 9, 8), heads_k=4))
