"""What the façade does with tensors of torch and mlx that are on an Apple GPU.

Neither can have such tensors here: stand-ins say what theirs would, and record what they are asked.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import umfa
from tests.metal.metal_tensors import MetalTensor, to_numpy
from tools.metal.double import Double
from umfa._frameworks import _dlpack


class MpsTensor:
    """A torch tensor on MPS that starts `offset` elements into its buffer."""

    requires_grad = False
    is_cpu, is_mps = False, True
    device = SimpleNamespace(type="mps")

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset

    def storage_offset(self) -> int:
        return self.offset

    def detach(self) -> MpsTensor:
        return self

    resolve_conj = resolve_neg = detach


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that torch's queue was waited for."""
    torch = pytest.importorskip("torch")
    from umfa._frameworks import _torch

    found: list[int] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: found.append(1))
    monkeypatch.setattr(_torch, "_check_plain", lambda *_: None)
    return found


def test_torch_is_waited_for(waits: list[int]) -> None:
    """Before umfa's own queue reads what torch has queued."""
    import torch

    from umfa._frameworks import _torch

    tensor = MpsTensor()
    assert _torch.export(tensor, "f", "q") is tensor
    assert waits == [], "a verdict needs no values"
    assert _torch.in_stream(tensor)
    assert not _torch.in_stream(torch.zeros(2))
    before = umfa.stats().waits.get("a test", 0)
    assert _torch.stream("f", {"query": tensor}, (), "a test") is None
    assert waits == [1]
    assert umfa.stats().waits["a test"] == before + 1


@pytest.mark.parametrize("version", ["2.9.0", "2.9.1+cpu"])
def test_torch_before_2_10_cannot_export_slices_on_mps(
    version: str, waits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from umfa._frameworks import _torch

    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(umfa.UnsupportedError) as caught:
        _torch.export(MpsTensor(offset=64), "umfa.f", "kv[:, :, 1]")
    assert str(caught.value) == (
        "[umfa.f] kv[:, :, 1] is a slice on MPS, whose address torch before 2.10 exports wrongly; "
        f"got storage_offset 64 with torch {version}; "
        "expected a copy (kv[:, :, 1].clone()), or torch >= 2.10"
    )
    assert waits == []
    whole = MpsTensor()
    assert _torch.export(whole, "umfa.f", "q") is whole
    on_the_cpu = torch.zeros(3)[1:]
    assert _torch.export(on_the_cpu, "umfa.f", "q").storage_offset() == 1


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0"])
def test_later_torch_exports_slices_on_mps(
    version: str, waits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from umfa._frameworks import _torch

    monkeypatch.setattr(torch, "__version__", version)
    part = MpsTensor(offset=64)
    assert _torch.export(part, "umfa.f", "q") is part
    assert waits == []


class MlxArray(MetalTensor):
    """An mlx array on a Mac: Metal's, unless the CPU's view is asked for."""

    def __dlpack__(self, *, dl_device: Any = None, **_: Any) -> Any:
        return "the CPU's view" if dl_device == (1, 0) else super().__dlpack__()


@pytest.fixture
def mlx(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("mlx.core")
    from umfa._frameworks import _mlx

    stand_in = SimpleNamespace(eval=lambda *_: None, from_dlpack=lambda memory: memory)
    monkeypatch.setattr(_mlx, "mx", stand_in)
    return _mlx


@pytest.mark.parametrize("choice", ["auto", "metal", "cpu"])
def test_mlx_shows_the_memory_that_the_backend_reads(choice: str, double: Double, mlx: Any) -> None:
    array = MlxArray(double, np.zeros((1, 4, 2, 16), np.float32))
    exported = mlx.export(array, "f", "q", choice)
    memory, handle = mlx.allocate(array, (1, 4, 2, 16), "float32", choice)
    assert (exported == "the CPU's view") == (choice == "cpu")
    assert memory.__dlpack_device__()[0] == (1 if choice == "cpu" else _dlpack.METAL)
    assert mlx.finish(handle) is memory


def test_mlx_without_a_metal_backend_is_the_cpus(double: Double, mlx: Any) -> None:
    array = MlxArray(double, np.zeros((1, 4, 2, 16), np.float32))
    double.set_machine(present=False)
    assert mlx.export(array, "f", "q") == "the CPU's view"
    assert mlx.allocate(array, (1,), "float32")[0].__dlpack_device__()[0] == 1


def test_results_on_metal_outlive_their_inputs(double: Double) -> None:
    q = MetalTensor(double, np.zeros((1, 4, 2, 16), np.float32))
    out = umfa.flash_attn_func(q, q, q)
    del q
    assert to_numpy(double, out).shape == (1, 4, 2, 16)
    assert double.live(patience=0.05)[0] == 2, "the result's buffer, and its device"
    del out
    assert double.live()[0] == 0
