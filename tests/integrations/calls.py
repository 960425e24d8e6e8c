"""What tests of torch's functions share."""

from __future__ import annotations

from collections import Counter
from typing import Any

import umfa

SDPA = "torch.scaled_dot_product_attention"
INNER = "torch._scaled_dot_product_flash_attention_for_cpu"
FUSED = "torch.nn.MultiheadAttention"


class Counted:
    """What a block of calls adds to the counters."""

    def __init__(self) -> None:
        self.before = umfa.stats()

    @property
    def taken(self) -> dict[str, int]:
        return dict(Counter(umfa.stats().taken) - Counter(self.before.taken))

    @property
    def left(self) -> dict[tuple[str, str], int]:
        def of(stats: umfa.Stats) -> Counter[tuple[str, str]]:
            return Counter({(x.where, x.reason): x.calls for x in stats.left})

        return dict(of(umfa.stats()) - of(self.before))

    @property
    def calls(self) -> int:
        return umfa.stats().cpu_calls - self.before.cpu_calls


def tensors(*shape: int, dtype: Any = None, grad: bool = False) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator, dtype=torch.float32) for _ in range(3)]
    return [x.to(dtype or x.dtype).requires_grad_(grad) for x in made]
