"""A cache of quantised keys and values, which umfa's attention reads as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch.utils import _pytree
from transformers import cache_utils
from transformers.generation import utils

from .. import _ext
from .._errors import UnsupportedError, message
from .._stats import count_left
from ..quant import QuantizedTensor, quantize
from ..quant._run import offset_of

_Cache: Any = cache_utils.Cache
_CacheLayer: Any = cache_utils.CacheLayerMixin
_generation: Any = utils

_NAME = "umfa.transformers.QuantizedCache"
BACKEND = "umfa"
ROOM = 256
"""Tokens for which memory is added at a time."""


class Stored(torch.Tensor):
    """Keys or values of shape (batch, heads, seqlen, head dim) as their codes. umfa's attention
    reads them; for any other operation the numbers are written out."""

    codes: QuantizedTensor
    mean: Any
    """(batch, heads, 1, head dim) What was taken away from each row; None: nothing. Attention does
    not notice: all scores of a query lose the same number."""

    @staticmethod
    def __new__(cls, codes: QuantizedTensor, mean: Any, dtype: Any) -> Stored:
        make: Any = torch.Tensor._make_wrapper_subclass
        stored: Stored = make(cls, codes.shape, dtype=dtype, device=codes.data.device)
        stored.codes, stored.mean = codes, mean
        return stored

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"umfa's quantised states: {self.codes}"

    def written(self) -> Any:
        if self.mean is None:
            return self.codes.dequantize(self.dtype)
        return (self.codes.dequantize() + self.mean).to(self.dtype)

    @property
    def rows(self) -> QuantizedTensor:
        """The codes in the order (batch, seqlen, heads, head dim)."""
        return _mapped(self.codes, lambda part: part.transpose(1, 2), layout="bshd")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        count_left(
            "transformers.QuantizedCache",
            "something other than umfa's attention read the states: the numbers are written out",
        )
        args, kwargs = _pytree.tree_map_only(Stored, Stored.written, (args, kwargs or {}))
        return function(*args, **kwargs)


class QuantizedCache(_Cache):  # type: ignore[misc]
    """A transformers cache whose keys and values are quantised: the ``past_key_values`` of a model
    with ``attn_implementation="umfa"``.

    Attention reads the codes, in the prompt as in each later step. A model with another attention
    gets numbers in the place of codes, and `umfa.stats` counts that.

    Parameters
    ----------
    dtype, granularity, symmetric, block, scale_dtype
        The format, as `umfa.quantize` takes it; each token has scales of its own. granularity is
        "row", or "block" with blocks of one token.
    smooth_keys : bool
        Quantise keys less their mean in the first call, as SageAttention does (Zhang et al. 2025):
        attention is the same, and codes of keys that have much in common are more exact. Softcap
        and sinks would notice, so that the numbers are written out for them, and `umfa.stats`
        counts that: choose False for such a model (Gemma 2, GPT-OSS).
    """

    def __init__(
        self,
        dtype: Any = "int8",
        granularity: str | None = None,
        symmetric: bool = True,
        block: tuple[int, int | None] | None = None,
        scale_dtype: Any = None,
        smooth_keys: bool = True,
    ) -> None:
        made = _ext.QuantFormat(
            _NAME, dtype, granularity, offset_of(_NAME, symmetric), scale_dtype, block, "bhsd"
        )
        if not isinstance(smooth_keys, bool):
            what = "smooth_keys is not a bool"
            raise TypeError(message(_NAME, what, repr(smooth_keys), "True or False"))
        if made.granularity not in ("row", "block") or (made.block or (1,))[0] != 1:
            what = "tokens share a scale, which more tokens would change"
            got = f"granularity='{made.granularity}', block={made.block}"
            raise UnsupportedError(message(_NAME, what, got, "'row', or blocks of 1 token"))
        form = {
            "dtype": dtype,
            "granularity": granularity,
            "symmetric": symmetric,
            "block": block,
            "scale_dtype": scale_dtype,
        }
        quantize(torch.zeros(1, 1, 0, 64), **form, layout="bhsd")  # refuses what none can have
        super().__init__(layer_class_to_replicate=partial(_Layer, form, smooth_keys))

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales, with the room for tokens to come."""
        return sum(x.nbytes for layer in self.layers for x in layer.states)


class _Layer(_CacheLayer):  # type: ignore[misc]
    """Of one layer of the model. transformers' words: `states` are keys and values."""

    is_croppable = True
    is_sliding = False

    def __init__(self, form: dict[str, Any], smooth_keys: bool) -> None:
        super().__init__()
        self._form, self._smooth = form, smooth_keys
        self._length = 0
        self._mean: Any = None
        self.states: list[QuantizedTensor] = []

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.states = [self._quantized(x[..., :0, :]) for x in (key_states, value_states)]
        if self._smooth:
            mean = key_states.float().mean(-2, keepdim=True)
            self._mean = torch.nan_to_num(mean, nan=0, posinf=0, neginf=0)
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._mean is not None:
            key_states = key_states.float() - self._mean
        first, end = self._length, self._length + key_states.shape[-2]
        for i, x in enumerate((key_states, value_states)):
            room = self.states[i].shape[-2]
            if end > room:
                more = max(end, room + room // 2)
                self.states[i] = _with_room(self.states[i], -(-more // ROOM) * ROOM)
            self.states[i].append(x, first, nonfinite="nan")
        self._length = end
        means = self._mean, None
        return tuple(
            Stored(first_tokens(x, end), mean, self.dtype)
            for x, mean in zip(self.states, means, strict=True)
        )

    def _check(self, key_states: Any, value_states: Any) -> None:
        function = f"{_NAME}.update"
        for name, x in (("key_states", key_states), ("value_states", value_states)):
            if not isinstance(x, torch.Tensor) or x.dim() != 4:
                got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x)
                expected = "(batch, heads, seqlen, head_dim)"
                raise ValueError(message(function, f"{name} has the wrong shape", got, expected))
        if key_states.shape[:3] != value_states.shape[:3]:
            what, got = "value_states do not fit key_states", tuple(value_states.shape)
            expected = f"{(*key_states.shape[:3], 'any')}"
            raise ValueError(message(function, what, got, expected))
        for x, stored in zip((key_states, value_states), self.states, strict=False):
            batch, heads, _, head_dim = stored.shape
            if (*x.shape[:2], x.shape[3]) != (batch, heads, head_dim):
                what, got = "the states do not fit those in the cache", tuple(x.shape)
                expected = f"({batch}, {heads}, any, {head_dim})"
                raise ValueError(message(function, what, got, expected))

    def _quantized(self, x: Any) -> QuantizedTensor:
        return quantize(x, **self._form, layout="bhsd", nonfinite="nan")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._length, self._mean, self.states, self.is_initialized = 0, None, [], False

    def crop(self, tokens_to_remove: int) -> None:
        function = f"{_NAME}.crop"
        tokens_to_remove = _ext.integer(function, "tokens_to_remove", tokens_to_remove, "0 or less")
        if tokens_to_remove > 0:
            what = "crop removes tokens, and takes their number as a negative one"
            raise ValueError(message(function, what, tokens_to_remove, "0 or less"))
        self._length = max(0, self._length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Any) -> None:
        self._map(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Any) -> None:
        self._map(lambda part: part[indices, ...])

    def offload(self) -> NoReturn:
        what = "the cache stays where its model is"
        raise UnsupportedError(message(_NAME, what, "offloading", "a cache that is not offloaded"))

    prefetch = offload

    def _map(self, change: Callable[[Any], Any]) -> None:
        self.states = [_mapped(x, change) for x in self.states]
        self._mean = None if self._mean is None else change(self._mean)


def first_tokens(x: Any, count: int) -> Any:
    """Of a tensor (batch, seqlen, heads, head dim), or of codes in either order."""
    if not isinstance(x, QuantizedTensor):
        return x[:, :count]
    tokens = 1 if x.layout == "bshd" else 2
    return _mapped(x, lambda part: part.narrow(tokens, 0, count))


def _mapped(
    x: QuantizedTensor, change: Callable[[Any], Any], layout: str | None = None
) -> QuantizedTensor:
    """The same format of parts that `change` has made."""
    scales, offsets = (None if part is None else change(part) for part in x._parts[1:])
    data = change(x.data)
    form = x._format
    if layout is not None:
        choice = (form.dtype, form.granularity, form.offset, form.scale_dtype, form.block)
        form = _ext.QuantFormat(_NAME, *choice, layout)
    return QuantizedTensor._made((data, scales, offsets), form, (*data.shape[:-1], x.shape[-1]))


def _with_room(x: QuantizedTensor, tokens: int) -> QuantizedTensor:
    """A copy with room for so many tokens."""

    def longer(part: Any) -> Any:
        made = part.new_zeros((*part.shape[:2], tokens, part.shape[3]))
        made[:, :, : part.shape[2]] = part
        return made

    return _mapped(x, longer)


# ---- cache_implementation="quantized", cache_config={"backend": "umfa"} ----

_stock = _generation.QuantizedCache


def _by_backend(backend: str, config: Any, **options: Any) -> Any:
    if backend != BACKEND:
        return _stock(backend=backend, config=config, **options)
    return QuantizedCache(**options)


def install() -> None:
    _generation.QuantizedCache = _by_backend


def remove() -> None:
    if _generation.QuantizedCache is _by_backend:
        _generation.QuantizedCache = _stock
