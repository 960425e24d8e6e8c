"""QuantizedTensor: codes and scales of a tensor, and what their bits mean."""

from __future__ import annotations

from typing import Any

from .. import _ext
from .._errors import UnsupportedError, message
from .._frameworks import framework_of, shape_of
from ._foreign import gguf_channels, mlx_bytes
from ._run import Parts, exported_parts, offset_of, run_dequantize, run_quantize

_NAME = "umfa.QuantizedTensor"


class QuantizedTensor:
    """A quantised tensor: codes, scales, and their format, which docs/quantization.md describes.

    `umfa.quantize` makes one, and `from_mlx` and `from_gguf` take those of other libraries as they
    are. The constructor takes tensors that hold the bits of a format already.

    Parameters
    ----------
    data : tensor, shape (batch, seqlen, nheads, bytes)
        Codes: int8 for symmetric int8, else uint8 (or the float8 that they are). Two 4-bit codes
        share a byte, the lower channel in the low half. A row's bytes are contiguous.
    scales : tensor or None, shape (batch, seqlen blocks, nheads, channel blocks)
        Of `scale_dtype`, uint8 for float8_e8m0fnu. Sizes of 1 for granularity "tensor".
    zero_points : tensor or None
        uint8, of the shape of the scales. None if `symmetric`.
    dtype, granularity, symmetric, block, scale_dtype, layout
        As `quantize` takes them.
    head_dim : int, optional
        Number of channels: the bytes of an odd number of 4-bit codes do not tell. As many as fit
        if None.

    Attributes
    ----------
    data, scales, zero_points : tensor or None
        Parts in the caller's framework; each has that framework's DLPack.
    biases : tensor or None
        Of MLX's affine groups, in the place of zero points.
    shape : tuple of int
        Of the tensor that was quantised.
    """

    data: Any
    scales: Any
    zero_points: Any
    biases: Any

    def __init__(
        self,
        data: Any,
        scales: Any,
        zero_points: Any = None,
        *,
        dtype: Any,
        granularity: str | None = None,
        symmetric: bool = True,
        block: tuple[int, int | None] | None = None,
        scale_dtype: Any = None,
        layout: str = "bshd",
        head_dim: int | None = None,
    ) -> None:
        offset = offset_of(_NAME, symmetric)
        form = _ext.QuantFormat(_NAME, dtype, granularity, offset, scale_dtype, block, layout)
        self._set((data, scales, zero_points), form, head_dim)

    def _set(self, parts: Parts, form: _ext.QuantFormat, head_dim: int | None) -> None:
        """Checks the tensors and keeps them."""
        sizes = shape_of(parts[0]) or ()
        if head_dim is None:
            last = sizes[-1] if sizes else 0
            if form.scale_dtype == "inside":
                head_dim = gguf_channels(_NAME, form.dtype, last)
            else:
                head_dim = last * (2 if form.dtype in ("int4", "nf4", "mxfp4") else 1)
        _, exported = exported_parts(_NAME, parts, "cpu")
        _ext.check_quantized(_NAME, *exported, form, head_dim)
        self._keep(parts, form, (*(int(n) for n in sizes[:-1]), head_dim))

    def _keep(self, parts: Parts, form: _ext.QuantFormat, shape: tuple[int, ...]) -> None:
        self.data, self.scales, offsets = parts
        self.zero_points = offsets if form.offset == "zero_point" else None
        self.biases = offsets if form.offset == "bias" else None
        self._format = form
        self._shape = shape  # what umfa has allocated for a library without arrays has none

    @classmethod
    def _made(cls, parts: Parts, form: _ext.QuantFormat, shape: tuple[int, ...]) -> QuantizedTensor:
        """A tensor of parts that the core has made, which need no check."""
        made = cls.__new__(cls)
        made._keep(parts, form, shape)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        form = self._format
        choice = (form.dtype, form.granularity, form.offset, form.scale_dtype, form.block)
        return _restored, (type(self), self._parts, (*choice, form.layout), self._shape)

    @classmethod
    def from_mlx(
        cls,
        data: Any,
        scales: Any,
        biases: Any,
        *,
        group_size: int = 64,
        bits: int = 4,
        layout: str = "bhsd",
    ) -> QuantizedTensor:
        """What ``mx.quantize(w, group_size, bits)`` returns, without a copy.

        Parameters
        ----------
        data : tensor of uint32, shape (..., head_dim * bits / 32)
            Of mlx, or the same bits in another framework. Also uint8.
        scales, biases : tensor, shape (..., head_dim / group_size)
            float32, float16 or bfloat16.
        group_size : {32, 64, 128}
        bits : {4, 8}
        layout : {"bshd", "bhsd"}
            Order of the dimensions; mlx's caches are (batch, nheads, seqlen, head_dim).
        """
        name = f"{_NAME}.from_mlx"
        if bits not in (4, 8):
            raise UnsupportedError(message(name, "bits do not fit", bits, "4 or 8"))
        scale_dtype = str(getattr(scales, "dtype", None)).rpartition(".")[2]
        form = _ext.QuantFormat(
            name, f"int{bits}", "block", "bias", scale_dtype, (1, group_size), layout
        )
        made = cls.__new__(cls)
        made._set((mlx_bytes(name, data), scales, biases), form, None)
        return made

    @classmethod
    def from_gguf(cls, data: Any, dtype: str, *, layout: str = "bhsd") -> QuantizedTensor:
        """Blocks of a GGUF file or of llama.cpp's cache, without a copy.

        Parameters
        ----------
        data : tensor of uint8, shape (..., bytes)
            Each block of 32 channels is a float16 scale followed by the codes: 34 bytes in Q8_0,
            18 in Q4_0.
        dtype : {"q8_0", "q4_0"}
        layout : {"bshd", "bhsd"}
        """
        form = _ext.QuantFormat(f"{_NAME}.from_gguf", dtype, None, "none", None, None, layout)
        if form.scale_dtype != "inside":
            raise ValueError(
                message(f"{_NAME}.from_gguf", "dtype is not of GGUF", dtype, "'q8_0' or 'q4_0'")
            )
        made = cls.__new__(cls)
        made._set((data, None, None), form, None)
        return made

    @property
    def dtype(self) -> str:
        return self._format.dtype

    @property
    def granularity(self) -> str:
        return self._format.granularity

    @property
    def symmetric(self) -> bool:
        return self._format.offset == "none"

    @property
    def block(self) -> tuple[int, int | None] | None:
        return self._format.block

    @property
    def scale_dtype(self) -> str:
        """ "inside" for GGUF, whose scales lie in the data."""
        return self._format.scale_dtype

    @property
    def layout(self) -> str:
        return self._format.layout

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(int(part.nbytes) for part in self._parts if part is not None)

    @property
    def _parts(self) -> Parts:
        offsets = self.zero_points if self.biases is None else self.biases
        return self.data, self.scales, offsets

    def dequantize(self, dtype: Any = None, *, backend: str = "auto") -> Any:
        """The numbers, as a tensor of `dtype`: float32 (if None), float16 or bfloat16."""
        name = f"{_NAME}.dequantize"
        return run_dequantize(name, self._parts, self._format, self._shape[-1], dtype, backend)

    def append(self, x: Any, at: int, *, nonfinite: str = "raise", backend: str = "auto") -> None:
        """Quantises tokens into this tensor's memory, for a cache that has room for them.

        Parameters
        ----------
        x : tensor
            Tokens of the same layout, batch, heads and head_dim.
        at : int
            The first token's place. A block of several tokens is written as a whole: `at` is a
            multiple of its tokens, and after a block that `x` does not fill no token may follow.
        nonfinite, backend
            As in `quantize`. What is written if it raises is undefined in the places of `x`.

        Raises
        ------
        ValueError, TypeError
            The tokens do not fit.
        umfa.UnsupportedError
            All tokens share a scale; the framework's arrays cannot be written.
        """
        name = f"{_NAME}.append"
        place = self._place(name, x, at)
        tokens = int(x.shape[place])
        rows = 1 if self.block is None else self.block[0]
        parts = [
            None if part is None else _narrowed(part, place, at // size, -(-tokens // size))
            for part, size in zip(self._parts, (1, rows, rows), strict=True)
        ]
        data, scales, zero_points = parts
        run_quantize(name, x, self._format, nonfinite, backend, (data, scales, zero_points))

    def _place(self, name: str, x: Any, at: int) -> int:
        """The dimension of tokens, once the arguments fit."""
        if self.granularity in ("tensor", "channel"):
            raise UnsupportedError(
                message(
                    name,
                    "all tokens share a scale, which more tokens would change",
                    f"granularity='{self.granularity}'",
                    "'row' or 'block'",
                )
            )
        framework_of(name, {"data": self.data, "x": x})
        shape, own = tuple(int(n) for n in x.shape), self.shape
        place = len(own) - (3 if self.layout == "bshd" else 2)
        if len(shape) != len(own) or any(
            n != m for i, (n, m) in enumerate(zip(shape, own, strict=True)) if i != place
        ):
            expected = f"{own} with any number of tokens in dimension {place}"
            raise ValueError(message(name, "x has the wrong shape", shape, expected))
        at = _ext.integer(name, "at", at, "the place of a token")
        rows = 1 if self.block is None else self.block[0]
        if at < 0 or at + shape[place] > own[place] or at % rows:
            expected = f"a multiple of {rows}, and at most {own[place] - shape[place]}"
            raise ValueError(message(name, "at is out of place", at, expected))
        return place

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor(shape={self.shape}, dtype={self.dtype!r}, "
            f"granularity={self.granularity!r}, symmetric={self.symmetric}, block={self.block}, "
            f"scale_dtype={self.scale_dtype!r}, layout={self.layout!r}, nbytes={self.nbytes})"
        )


def _restored(
    cls: type[QuantizedTensor], parts: Parts, choice: tuple[Any, ...], shape: tuple[int, ...]
) -> QuantizedTensor:
    """Rebuilds a tensor for copies and pickles."""
    return cls._made(parts, _ext.QuantFormat(_NAME, *choice), shape)


def _narrowed(part: Any, dimension: int, first: int, count: int) -> Any:
    """A view of some tokens."""
    index = [slice(None)] * dimension + [slice(first, first + count)]
    return part[tuple(index)]
