"""DLPack's C exchange API: torch's tensors without capsules, and what must not go that way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import umfa

torch = pytest.importorskip("torch")


class OnlyDlpack:
    """A tensor of a library without the API."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


class OddApi(OnlyDlpack):
    __dlpack_c_exchange_api__ = "no capsule"


VIEWS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda x: x,
    "an offset": lambda x: x[:, 3:],
    "steps": lambda x: x[:, ::2, :, ::2],
    "another order": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "empty": lambda x: x[:0],
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "a parameter that trains": torch.nn.Parameter,
    "a subclass": lambda x: x.as_subclass(Subclass),
}


class Subclass(torch.Tensor):  # type: ignore[misc]
    """Inherits the API, which does not count."""


@pytest.mark.parametrize("kind", [OnlyDlpack, OddApi])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_the_same_bits_as_by_capsules(view: Callable[[Any], Any], kind: type) -> None:
    x = view(torch.randn(2, 9, 3, 16, generator=torch.Generator().manual_seed(0)))
    found = umfa.flash_attn_func(x, x, x, causal=True)
    one = kind(x.detach())
    other = umfa.flash_attn_func(one, one, one, causal=True)
    assert np.array_equal(found.detach().numpy(), np.from_dlpack(other))


def test_no_capsule_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no C exchange API")

    def refused(self: Any, **options: Any) -> Any:
        raise AssertionError("a capsule")

    monkeypatch.setattr(torch.Tensor, "__dlpack__", refused)
    x = torch.randn(1, 5, 2, 8)
    assert umfa.flash_attn_func(x, x, x).shape == x.shape


def test_a_negated_view_keeps_its_sign() -> None:
    """torch.imag of a conjugate is the memory of another tensor, with the other sign."""
    x = torch.randn(1, 5, 2, 8, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    y = x.clone()
    assert torch.equal(umfa.flash_attn_func(x, x, x), umfa.flash_attn_func(y, y, y))


@pytest.mark.parametrize(
    "made",
    [
        lambda x: x.to_sparse(),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: torch.nested.nested_tensor([x[0]], layout=torch.strided),
    ],
    ids=["sparse", "quantized", "nested"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_without_plain_memory_are_refused(made: Callable[[Any], Any]) -> None:
    x = torch.randn(1, 5, 2, 8)
    with pytest.raises((umfa.UnsupportedError, ValueError), match=r"^\[umfa\.flash_attn_func\]"):
        umfa.flash_attn_func(made(x), x, x)
