"""Compiling a call's kernels before the first call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, overload

from ._public import BODIES, called
from .combine import Combination, warm_up_combination
from .run import warm_up


class Warmup(NamedTuple):
    """What `warmup` did."""

    backend: str
    """The backend that will run the call."""
    kernels: int
    """Different kernels that the call needs compiled; 0 on the CPU, which compiles none."""
    built: int
    """Of them, those that were not ready yet in this process."""
    seconds: float
    """Time that it took."""


@overload
def warmup(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
    **more: Any,
) -> Warmup: ...


@overload
def warmup(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Warmup: ...


def warmup(*args: Any, **kwargs: Any) -> Warmup:
    """Compile the kernels that a call needs, so that the first call does not wait for them.

    ``warmup(q, k, v, ...)`` prepares `flash_attn_func`. To prepare another function of umfa, pass
    it first: ``warmup(umfa.flash_attn_with_kvcache, q, k_cache, v_cache, cache_seqlens=4096)``. The
    arguments are those of the call. Nothing is computed: tensors are neither read nor written, so
    ``torch.empty`` or ``numpy.empty`` will do. Tables of integers (lengths, pages) are read,
    because they decide which kernels the call needs.

    One call prepares all calls with the same options, dtypes, head dims and layouts of the tensors,
    with these exceptions:

    - up to 8 queries run another kernel than more queries. Which one depends on the queries of all
      query heads that share a key head: 1, up to 8, or more;
    - few queries whose keys are split run another kernel than those whose keys are not. Prepare the
      shortest and the longest cache;
    - a call of so much work that it is cut into slices runs another kernel. Prepare the longest.

    If the call would be the first with its dtype on this GPU, the self-test runs too (`self_test`).

    On the CPU backend there is nothing to compile: the result says ``backend="cpu", kernels=0``.

    Returns
    -------
    Warmup
        The backend that will run the call, the number of kernels, and what was built now.

    Raises
    ------
    ValueError, TypeError, umfa.UnsupportedError
        What the call would raise.
    RuntimeError
        Metal did not compile a kernel.

    Examples
    --------
    >>> q, cache = np.empty((1, 1, 32, 128), "f2"), np.empty((1, 8192, 8, 128), "f2")
    >>> for length in (1, 8192):
    ...     umfa.warmup(umfa.flash_attn_with_kvcache, q, cache, cache, cache_seqlens=length)
    """
    start = time.perf_counter()
    function, rest = called("umfa.warmup", args)
    record = BODIES[function](*rest, **kwargs)
    done = warm_up_combination(record) if isinstance(record, Combination) else warm_up(record)
    return Warmup(*done, time.perf_counter() - start)
