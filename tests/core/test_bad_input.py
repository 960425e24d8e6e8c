"""Hundreds of calls that cannot be right, and what umfa says about each of them.

Every one must raise ValueError, TypeError or umfa.UnsupportedError, in the form
``[umfa.function] what; got …; expected …`` with the offending value in the text; `can_run` must
give the same reason without raising; and no input may have been touched. Nothing is refused by
accident: each case is wrong in one place only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import umfa
from tests import array_libraries
from tests.array_libraries import Framework
from tests.capsules import DlpackObject
from tests.cases import normal

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEADS_K, HEAD_DIM = 2, 6, 10, 4, 2, 8
SHAPES = {
    "q": (BATCH, SEQLEN_Q, HEADS, HEAD_DIM),
    "k": (BATCH, SEQLEN_K, HEADS_K, HEAD_DIM),
    "v": (BATCH, SEQLEN_K, HEADS_K, HEAD_DIM),
    "qkv": (BATCH, SEQLEN_K, 3, HEADS, HEAD_DIM),
    "kv": (BATCH, SEQLEN_K, 2, HEADS_K, HEAD_DIM),
    "query": (BATCH, HEADS, SEQLEN_Q, HEAD_DIM),
    "key": (BATCH, HEADS, SEQLEN_K, HEAD_DIM),
    "value": (BATCH, HEADS, SEQLEN_K, HEAD_DIM),
}
FLASH = {
    "flash_attn_func": ("q", "k", "v"),
    "flash_attn_qkvpacked_func": ("qkv",),
    "flash_attn_kvpacked_func": ("q", "kv"),
}
SDPA = "scaled_dot_product_attention"
ROLES = {**FLASH, SDPA: ("query", "key", "value")}
UNSUPPORTED = umfa.UnsupportedError
Errors = type[Exception] | tuple[type[Exception], ...]


@dataclass(frozen=True)
class Bad:
    """One bad call.

    Parameters
    ----------
    label
        Unique within function and framework.
    change
        Takes the framework; returns arguments by name that replace good ones.
    error
        What it must raise, exactly (a subclass would be a different promise).
    offending
        Text of the offending value; one of them must be in the message.
    needs
        Other frameworks that take part.
    """

    label: str
    change: Callable[[Framework], dict[str, Any]]
    error: Errors
    offending: tuple[str, ...]
    function: str = "flash_attn_func"
    framework: str = "numpy"
    needs: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Any]:
        framework = array_libraries.load(self.framework)
        for name in self.needs:
            array_libraries.load(name)
        good = {role: make(framework, SHAPES[role]) for role in ROLES[self.function]}
        return good | self.change(framework)


def make(framework: Framework, shape: tuple[int, ...], dtype: str = "float32") -> Any:
    return framework.tensor(normal(shape, dtype, seed=1))


def texts(*values: Any) -> tuple[str, ...]:
    return tuple(map(str, values))


# ---- options: independent of the framework -------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BY_VALUE: list[tuple[str, Any, Errors]] = [
    *(("softmax_scale", x, ValueError) for x in (NAN, INF, -INF, 1e300, -1e39, 10**400)),
    *(("dropout_p", x, ValueError) for x in (-0.1, 1, 1.0, 1.5, -1e-30, NAN, INF, -INF, 10**400)),
    *(("softcap", x, ValueError) for x in (-1.0, -30, -1e-30, NAN, INF, -INF, 1e300, 10**400)),
    *(
        ("window_size", x, ValueError)
        for x in (
            (-2, -1), (-1, -2), (-100, 0), (0, -(2**31)), (2**31, 0), (0, 2**31), (2**32, 2**32),
            (2**63, 0), (0, 2**64), (10**30, 0), (0, -(10**30)), [-1, 2**31], (-(2**63), 0),
            (-(2**32) - 1, 0), (2**32 - 1, -1),
        )
    ),
]  # fmt: skip
NOT_NUMBERS: list[Any] = ["0.5", "", [0.5], (0.5,), {}, 1j, b"1", object, np.ones(2), np.ones(1)]
BY_TYPE: list[tuple[str, Any]] = [
    *((name, x) for name in ("softmax_scale", "dropout_p", "softcap") for x in NOT_NUMBERS),
    ("dropout_p", None),
    ("softmax_scale", True),
    *(
        ("window_size", x)
        for x in (
            3, -1, 0.5, "ab", "abc", b"ab", (), (1,), (1, 2, 3), [1, 2, 3, 4], (1.5, 0),
            (0, 2.0), (NAN, 0), ("1", "2"), (True, False), {3, 5}, {3: 4, 5: 6},
            ((1, 2),), ([1], [2]), np.ones(2), object, np.float16,
        )
    ),
    *(
        (name, x)
        for name in ("causal", "deterministic", "return_attn_probs")
        for x in ("True", "", 2, -1, 0.0, [], [True], NAN, np.ones(2, bool))
    ),
    *((name, None) for name in ("deterministic", "return_attn_probs")),
]  # fmt: skip


def offending_number(value: Any) -> tuple[str, ...]:
    """Ways to write the number; for a pair, its wrong member will do."""
    if isinstance(value, (tuple, list)):
        return tuple(str(x) for x in value if x not in (-1, 0)) or texts(value)
    return texts(value) if isinstance(value, int) else texts(value, f"{value:.6g}")


def same(name: str, value: Any) -> Callable[[Framework], dict[str, Any]]:
    return lambda _: {name: value}


def option_cases(function: str, framework: str) -> Iterator[Bad]:
    for i, (name, value, error) in enumerate(BY_VALUE):
        label = f"{name}={value!r:.30}#{i}"
        yield Bad(label, same(name, value), error, offending_number(value), function, framework)
    for i, (name, value) in enumerate(BY_TYPE):
        label = f"{name}={value!r:.30}#{i}"
        # A long or unprintable value may be named by its type instead, a pair by its wrong member.
        text = (repr(value), type(value).__name__)
        errors: Errors = TypeError
        if name == "window_size":
            errors = (TypeError, ValueError)  # of the wrong type, or of the wrong length
            if isinstance(value, (tuple, list, str, np.ndarray)):
                members = value.tolist() if isinstance(value, np.ndarray) else value
                text += tuple(f"got {member!r};" for member in members)
        yield Bad(label, same(name, value), errors, text, function, framework)


def alibi_cases(function: str, framework: str) -> Iterator[Bad]:
    shapes = [
        (), (0,), (1,), (HEADS - 1,), (HEADS + 1,), (HEADS, BATCH), (1, HEADS), (BATCH, 1),
        (BATCH, HEADS + 1), (BATCH + 1, HEADS), (BATCH, HEADS, 1), (1, 1, BATCH, HEADS),
    ]  # fmt: skip
    for shape in shapes:
        yield Bad(
            f"alibi shape {shape}",
            lambda fw, shape=shape: {"alibi_slopes": make(fw, shape)},
            ValueError,
            texts(shape),
            function,
            framework,
        )
    for name in ("float16", "bfloat16"):
        yield Bad(
            f"alibi dtype {name}",
            lambda fw, name=name: {"alibi_slopes": make(fw, (HEADS,), name)},
            TypeError,
            (name,),
            function,
            framework,
        )
    for name in ("float64", "int32", "int64", "bool", "complex64"):
        if framework in ("jax", "mlx") and name in ("float64", "int64"):
            continue  # they turn these into 32-bit arrays
        yield Bad(
            f"alibi dtype {name}",
            lambda fw, name=name: {"alibi_slopes": fw.tensor(np.ones(HEADS, name))},
            (TypeError, UNSUPPORTED),
            (name,),
            function,
            framework,
        )
    for i, value in enumerate(([0.5] * HEADS, (0.5,) * HEADS, 0.5, "slopes", True, {}, object)):
        yield Bad(
            f"alibi no tensor #{i}",
            same("alibi_slopes", value),
            TypeError,
            (repr(value), type(value).__name__),
            function,
            framework,
        )


# ---- shapes --------------------------------------------------------------------------------------


def shaped(**shapes: tuple[int, ...]) -> Callable[[Framework], dict[str, Any]]:
    return lambda fw: {name: make(fw, shape) for name, shape in shapes.items()}


def with_axis(role: str, axis: int, size: int) -> tuple[int, ...]:
    shape = SHAPES[role]
    return (*shape[:axis], size, *shape[axis + 1 :])


def shape_cases(framework: str) -> Iterator[Bad]:
    def bad(label: str, error: Errors, offending: Any, **shapes: tuple[int, ...]) -> Bad:
        return Bad(label, shaped(**shapes), error, texts(offending), framework=framework)

    for role in "qkv":
        for shape in [(), (8,), (6, 8), (6, 4, 8), (2, 6, 4, 8, 1), (1, 2, 6, 4, 8), (1,) * 6]:
            yield bad(f"{role} of shape {shape}", ValueError, shape, **{role: shape})
    for role in "qkv":
        for size in (0, 1, 3, 1000):
            shape = with_axis(role, 0, size)
            yield bad(f"batch {size} in {role}", ValueError, shape, **{role: shape})
    for role in "kv":
        for size in (0, 1, 9, 11):
            shape = with_axis(role, 1, size)
            yield bad(f"seqlen {size} in {role}", ValueError, shape, **{role: shape})
        for size in (0, 1, 4):
            shape = with_axis(role, 2, size)
            yield bad(f"nheads {size} in {role}", ValueError, shape, **{role: shape})
    for role in "qk":
        for size in (1, 7, 9, 16, 80):
            shape = with_axis(role, 3, size)
            yield bad(f"head_dim {size} in {role}", ValueError, shape, **{role: shape})
    for heads, heads_k in [(3, 2), (2, 3), (4, 3), (8, 5), (2, 4), (1, 2), (7, 14), (5, 0)]:
        kv = (BATCH, SEQLEN_K, heads_k, HEAD_DIM)
        q = (BATCH, SEQLEN_Q, heads, HEAD_DIM)
        yield bad(
            f"{heads} heads over {heads_k}", ValueError, f"{heads} and {heads_k}", q=q, k=kv, v=kv
        )
    for size in (0, 577, 584, 4096):
        error = UNSUPPORTED if size else ValueError
        q, k, v = (with_axis(role, 3, size) for role in "qkv")
        yield bad(f"head_dim {size}", error, size, q=q, k=k, v=v)
        yield bad(f"head_dim {size} of q and k", error, size, q=q, k=k)
        yield bad(f"head_dim {size} of v", error, size, v=v)
    yield bad("head_dim 513 of v", UNSUPPORTED, 513, v=with_axis("v", 3, 513))
    # As seen in real code: BHSD tensors in a BSHD call.
    q, k, v = ((shape[0], shape[2], shape[1], shape[3]) for shape in map(SHAPES.get, "qkv"))
    yield bad("BHSD", ValueError, SEQLEN_Q, q=q, k=k, v=v)


def packed_cases(framework: str) -> Iterator[Bad]:
    def bad(function: str, role: str, shape: tuple[int, ...], error: Errors = ValueError) -> Bad:
        # What is wrong with a single head_dim is that number, not the shape.
        offending = texts(shape, shape[-1]) if len(shape) == 5 else texts(shape)
        return Bad(
            f"{role} of shape {shape}",
            shaped(**{role: shape}),
            error,
            offending,
            function,
            framework,
        )

    qkv, kv = "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func"
    ragged = [(), (3,), (10, 3), (10, 3, 4), (2, 10, 4, 8), (2, 10, 12, 8), (2, 10, 3, 4, 8, 1)]
    for shape in [*ragged, (2, 10, 1, 4, 8), (2, 10, 2, 4, 8), (2, 10, 4, 3, 8), (2, 3, 10, 4, 8)]:
        yield bad(qkv, "qkv", shape)
    for shape in [*ragged, (2, 10, 1, 2, 8), (2, 10, 3, 2, 8), (2, 10, 4, 2, 8), (2, 2, 10, 2, 8)]:
        yield bad(kv, "kv", shape)
    yield bad(qkv, "qkv", (2, 10, 3, 4, 0))
    yield bad(qkv, "qkv", (2, 10, 3, 4, 577), UNSUPPORTED)
    yield bad(qkv, "qkv", (2, 10, 3, 4, 513), UNSUPPORTED)
    yield bad(kv, "kv", (2, 10, 2, 2, 0))
    yield bad(kv, "kv", (2, 10, 2, 2, 9))
    for size in (0, 1, 3):
        yield Bad(
            f"batch {size} in kv", shaped(kv=with_axis("kv", 0, size)), ValueError, texts(size), kv,
            framework,
        )  # fmt: skip
    yield Bad(
        "heads 3 in kv", shaped(kv=with_axis("kv", 3, 3)), ValueError, texts(3), kv, framework
    )
    for shape in [(), (8,), (6, 8), (6, 4, 8), (1, 2, 6, 4, 8)]:
        yield Bad(f"q of shape {shape}", shaped(q=shape), ValueError, texts(shape), kv, framework)


# ---- dtypes --------------------------------------------------------------------------------------

NUMPY_FLOATS = ["float64", "longdouble", "float8_e4m3fn", "float8_e5m2"]
NUMPY_OTHERS = [
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool", "complex64",
    "complex128", "object", "U1", "S4", "M8[s]", "m8[s]", "int4", ">f4", ">f2", "V4", "f4,f4",
]  # fmt: skip
TORCH_FLOATS = ["float64", "float8_e4m3fn", "float8_e5m2"]
TORCH_OTHERS = [
    "int8", "int16", "int32", "int64", "uint8", "uint16", "bool", "complex64", "complex128",
]  # fmt: skip


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def numpy_zeros(name: str, role: str) -> Any:
    return np.zeros(SHAPES[role], numpy_dtype(name))


def torch_zeros(name: str, role: str) -> Any:
    torch = array_libraries.load("torch").module
    return torch.zeros(SHAPES[role], dtype=getattr(torch, name))


def dtype_cases() -> Iterator[Bad]:
    for framework, zeros, floats, others in [
        ("numpy", numpy_zeros, NUMPY_FLOATS, NUMPY_OTHERS),
        ("torch", torch_zeros, TORCH_FLOATS, TORCH_OTHERS),
    ]:
        for name in [*floats, *others]:
            error = UNSUPPORTED if name in floats else TypeError
            offending: tuple[str, ...] = (name,)
            if framework == "numpy":
                dtype = numpy_dtype(name)
                offending = (dtype.name, dtype.str, str(dtype))
            for function, roles in ROLES.items():
                yield Bad(
                    f"dtype {name}",
                    lambda _, n=name, z=zeros, r=roles: {role: z(n, role) for role in r},
                    error,
                    offending,
                    function,
                    framework,
                )
            for role in "qkv":
                # One of three: wrong in itself, and different from the others.
                yield Bad(
                    f"dtype {name} in {role}",
                    lambda _, n=name, z=zeros, r=role: {r: z(n, r)},
                    (TypeError, error),
                    offending,
                    framework=framework,
                )


# ---- things that are no tensors, or not only -----------------------------------------------------


def not_tensors() -> list[Any]:
    nested = np.ones((1, 2, 1, 2)).tolist()
    return [
        None, nested, tuple(nested), "tensor", "", b"tensor", 1, 1.5, True, {}, {1}, object, print,
        range(4), np.float32(1), memoryview(b"1234"), np, 1j, [], ...,
    ]  # fmt: skip


def no_tensor_cases() -> Iterator[Bad]:
    for function, roles in ROLES.items():
        for role in roles:
            for i, value in enumerate(not_tensors()):
                yield Bad(
                    f"{role} is {type(value).__name__}#{i}",
                    same(role, value),
                    TypeError,
                    (type(value).__name__, repr(value)) if value != "" else ("''", "str"),
                    function,
                )


def odd_numpy_cases() -> Iterator[Bad]:
    def unaligned(shape: tuple[int, ...]) -> Any:
        memory = np.zeros(4 * int(np.prod(shape)) + 1, np.uint8)
        return memory[1:].view(np.float32).reshape(shape)

    def field(shape: tuple[int, ...]) -> Any:
        """Every element is 6 bytes from the next: no whole number of floats."""
        return np.zeros(shape, np.dtype([("number", "f4"), ("more", "i2")]))["number"]

    for role in "qkv":
        shape = SHAPES[role]
        yield Bad(f"unaligned {role}", same(role, unaligned(shape)), ValueError, ("align",))
        yield Bad(f"{role} is a field", same(role, field(shape)), ValueError, ("6",))
        yield Bad(
            f"masked {role}", same(role, np.ma.masked_all(shape, "f4")), TypeError, ("MaskedArray",)
        )
        yield Bad(
            f"{role} of 33 dimensions", same(role, np.ones((1,) * 33, "f4")), ValueError, ("33",)
        )
    for name, slopes in [("unaligned", unaligned((HEADS,))), ("field", field((HEADS,)))]:
        yield Bad(f"{name} alibi", same("alibi_slopes", slopes), ValueError, ("align", "6"))
    slopes = np.ones(HEADS, ">f4")
    yield Bad("big-endian alibi", same("alibi_slopes", slopes), TypeError, (">f4",))


def capsule_cases() -> Iterator[Bad]:
    """DLPack objects of unknown origin, wrong in one field each."""
    wrong: list[tuple[dict[str, Any], Errors, str]] = [
        ({"device_type": 2}, ValueError, "cuda"),
        ({"device_type": 10}, ValueError, "rocm"),
        ({"device_type": 777}, ValueError, "777"),
        ({"device_type": -1}, ValueError, "-1"),
        ({"code": 99}, TypeError, "99"),
        ({"code": 2, "bits": 7}, TypeError, "7"),
        ({"code": 2, "bits": 0}, TypeError, "0"),
        ({"lanes": 4}, TypeError, "4"),
        ({"lanes": 0}, TypeError, "0"),
        ({"code": 0}, TypeError, "int32"),
        ({"code": 1, "bits": 8}, TypeError, "uint8"),
        ({"code": 2, "bits": 64}, (UNSUPPORTED, TypeError), "float64"),
        ({"code": 10, "bits": 8}, (UNSUPPORTED, TypeError), "float8_e4m3fn"),
        ({"code": 12, "bits": 8}, (UNSUPPORTED, TypeError), "float8_e5m2"),
        ({"code": 17, "bits": 4}, (UNSUPPORTED, TypeError), "4"),
        # These two nanobind refuses itself, without saying why. (A null shape, which it would
        # follow, is a matter for the C interface.)
        ({"ndim": -1}, TypeError, "a DLPack capsule"),
        ({"ndim": 10**6}, TypeError, "a DLPack capsule"),
        ({"ndim": 3}, ValueError, "3"),
        ({"size": -5}, ValueError, "-5"),
        ({"size": 2**62}, ValueError, str(2**62)),
        ({"stride": 2**62}, ValueError, str(2**62)),
        ({"stride": -(2**63)}, ValueError, str(-(2**63))),
        ({"data": None}, ValueError, "null"),
        ({"byte_offset": 2}, ValueError, "align"),
        ({"byte_offset": 3}, ValueError, "align"),
    ]
    for changes, error, text in wrong:
        for role in "qkv":
            yield Bad(
                f"DLPack {role}: {changes}",
                lambda _, role=role, changes=changes: {
                    r: DlpackObject(SHAPES[r], **(changes if r == role else {})) for r in "qkv"
                },
                error,
                (text,),
            )


# ---- torch, jax, mlx -----------------------------------------------------------------------------


def torch_cases() -> Iterator[Bad]:
    def fake(tensor: Any) -> Any:
        from torch._subclasses.fake_tensor import FakeTensorMode

        return FakeTensorMode().from_tensor(tensor)

    kinds: list[tuple[str, Callable[[Any], Any], Errors, tuple[str, ...]]] = [
        ("on meta", lambda t: t.to("meta"), (ValueError, UNSUPPORTED), ("meta",)),
        ("fake", fake, (UNSUPPORTED, TypeError, ValueError), ("Fake", "fake")),
        ("sparse COO", lambda t: t.to_sparse(), (UNSUPPORTED, TypeError), ("sparse",)),
        ("hybrid sparse", lambda t: t.to_sparse(1), (UNSUPPORTED, TypeError), ("sparse",)),
        ("mkldnn", lambda t: t.to_mkldnn(), (UNSUPPORTED, TypeError), ("mkldnn",)),
    ]
    for label, kind, error, text in kinds:
        for role in "qkv":
            yield Bad(
                f"{role} {label}",
                lambda fw, kind=kind, role=role: {role: kind(make(fw, SHAPES[role]))},
                error,
                text,
                framework="torch",
            )
        if "sparse" not in label and label != "mkldnn":
            yield Bad(
                f"alibi {label}",
                lambda fw, kind=kind: {"alibi_slopes": kind(make(fw, (HEADS,)))},
                error,
                text,
                framework="torch",
            )
            yield Bad(
                f"qkv {label}",
                lambda fw, kind=kind: {"qkv": kind(make(fw, SHAPES["qkv"]))},
                error,
                text,
                "flash_attn_qkvpacked_func",
                "torch",
            )


def mixed_framework_cases() -> Iterator[Bad]:
    for home in array_libraries.NAMES:
        for other in array_libraries.NAMES:
            if other == home:
                continue
            for role in ("q", "k", "v", "alibi_slopes"):
                yield Bad(
                    f"{role} of {other}",
                    lambda _, role=role, other=other: {
                        role: make(array_libraries.load(other), SHAPES.get(role, (HEADS,)))
                    },
                    TypeError,
                    (other,),
                    framework=home,
                    needs=(other,),
                )


def jax_and_mlx_cases() -> Iterator[Bad]:
    for framework in ("jax", "mlx"):
        for name in ("int32", "int8", "uint16", "bool", "complex64"):
            for role in "qkv":
                yield Bad(
                    f"dtype {name} in {role}",
                    lambda fw, name=name, role=role: {role: fw.tensor(np.ones(SHAPES[role], name))},
                    TypeError,
                    (name,),
                    framework=framework,
                )
        yield from alibi_cases("flash_attn_func", framework)
        yield from shape_cases(framework)


# ---- scaled_dot_product_attention ----------------------------------------------------------------


def sdpa_cases(framework: str) -> Iterator[Bad]:
    def bad(
        label: str,
        error: Errors,
        offending: Any,
        change: Callable[[Framework], dict[str, Any]],
    ) -> Bad:
        text = offending if isinstance(offending, tuple) else texts(offending)
        return Bad(label, change, error, text, SDPA, framework)

    def wrong_shapes(error: Errors, offending: Any, **shapes: tuple[int, ...]) -> Bad:
        parts = [f"{name} {shape}" for name, shape in shapes.items()]
        return bad(" ".join(parts), error, texts(offending), shaped(**shapes))

    for role in ("query", "key", "value"):
        for shape in [(), (8,)]:
            yield wrong_shapes(ValueError, shape, **{role: shape})
        yield wrong_shapes(ValueError, 9, **{role: (1,) * 9})
        for axis in (0, 1):  # what broadcasts takes 1, and nothing else that differs
            for size in (0, 3, 1000):
                yield wrong_shapes(ValueError, size, **{role: with_axis(role, axis, size)})
    for role in ("key", "value"):
        deeper = {role: (3, *SHAPES[role]), "query": (2, 1, HEADS, SEQLEN_Q, HEAD_DIM)}
        yield wrong_shapes(ValueError, 3, **deeper)
        for size in (0, 1, 9, 11):
            yield wrong_shapes(ValueError, size, **{role: with_axis(role, 2, size)})
    for role in ("query", "key"):
        for size in (1, 7, 9, 80):
            yield wrong_shapes(ValueError, size, **{role: with_axis(role, 3, size)})
    for size in (0, 577, 4096):
        error = UNSUPPORTED if size else ValueError
        yield wrong_shapes(error, size, value=with_axis("value", 3, size))
        both = {role: with_axis(role, 3, size) for role in ("query", "key")}
        yield wrong_shapes(error, size, **both)

    # Grouped heads: only when asked for, and only where they divide.
    grouped = {role: with_axis(role, 1, 2) for role in ("key", "value")}
    yield wrong_shapes(ValueError, "enable_gqa", **grouped)
    for heads in (3, 8, 0):
        shapes = {role: with_axis(role, 1, heads) for role in ("key", "value")}
        yield bad(
            f"{heads} shared heads",
            ValueError,
            f"{HEADS} and {heads}",
            lambda fw, shapes=shapes: {**shaped(**shapes)(fw), "enable_gqa": True},
        )
    yield bad(
        "grouped, key and value differ", ValueError, "key has 2, value has 4",
        lambda fw: {"key": make(fw, with_axis("key", 1, 2)), "enable_gqa": True},
    )  # fmt: skip

    # Masks.
    for shape in [
        (SEQLEN_Q,), (SEQLEN_Q, SEQLEN_K + 1), (SEQLEN_K, SEQLEN_Q), (SEQLEN_Q, 0), (0, SEQLEN_K),
        (3, SEQLEN_Q, SEQLEN_K), (BATCH, SEQLEN_Q, SEQLEN_K), (BATCH, 2, SEQLEN_Q, SEQLEN_K),
        (3, HEADS, SEQLEN_Q, SEQLEN_K), (HEADS, BATCH, SEQLEN_Q, SEQLEN_K), (BATCH, SEQLEN_K),
        (BATCH, HEADS, SEQLEN_Q, SEQLEN_K, 1), (1, BATCH, HEADS, SEQLEN_Q, SEQLEN_K), (1,) * 9,
    ]:  # fmt: skip
        for name in ("float32", "bool"):
            yield bad(
                f"{name} mask {shape}",
                ValueError,
                (str(shape), str(len(shape))) if len(shape) > 8 else str(shape),
                lambda fw, shape=shape, name=name: {"attn_mask": fw.tensor(np.zeros(shape, name))},
            )
    narrow = framework in ("jax", "mlx")  # they turn 64-bit arrays into 32-bit ones
    for name in ("int8", "int16", "int32", "uint8", "uint16", *(() if narrow else ("int64",))):
        yield bad(
            f"{name} mask", TypeError, name,
            lambda fw, name=name: {"attn_mask": fw.tensor(np.ones((6, 10), name))},
        )  # fmt: skip
    if not narrow:
        yield bad(
            "float64 mask", UNSUPPORTED, "float64",
            lambda fw: {"attn_mask": fw.tensor(np.ones((6, 10)))},
        )  # fmt: skip
    for i, value in enumerate(([[0.0] * 10] * 6, True, False, 0.5, "causal", {}, object, b"1")):
        text = (repr(value)[:60], type(value).__name__)
        yield bad(f"mask is no tensor #{i}", TypeError, text, same("attn_mask", value))
    yield bad(
        "mask and is_causal", ValueError, "both",
        lambda fw: {"attn_mask": fw.tensor(np.ones((6, 10), bool)), "is_causal": True},
    )  # fmt: skip

    for i, (name, value, error) in enumerate(BY_VALUE):
        name = {"softmax_scale": "scale"}.get(name, name)
        if name in ("scale", "dropout_p"):
            label, text = f"{name}={value!r:.30}#{i}", offending_number(value)
            yield bad(label, error, text, same(name, value))
    for i, (name, value) in enumerate(BY_TYPE):
        name = {"softmax_scale": "scale", "causal": "is_causal", "deterministic": "enable_gqa"}.get(
            name, name
        )
        if name in ("scale", "dropout_p", "is_causal", "enable_gqa"):
            label, text = f"{name}={value!r:.30}#{i}", (repr(value), type(value).__name__)
            yield bad(label, TypeError, text, same(name, value))
    for value, error in [(None, TypeError), (1, TypeError), ("gpu", ValueError), ("", ValueError)]:
        yield bad(f"backend={value!r}", error, repr(value), same("backend", value))


def sdpa_torch_cases() -> Iterator[Bad]:
    def bias(corner: str, *lengths: int, **more: Any) -> Callable[[Framework], dict[str, Any]]:
        def change(_: Framework) -> dict[str, Any]:
            from torch.nn.attention import bias as module

            return {"attn_mask": getattr(module, f"causal_{corner}")(*lengths), **more}

        return change

    for corner in ("upper_left", "lower_right"):
        for lengths in [(SEQLEN_Q, SEQLEN_K + 1), (SEQLEN_Q - 1, SEQLEN_K), (SEQLEN_K, SEQLEN_K)]:
            yield Bad(
                f"{corner} {lengths}", bias(corner, *lengths), ValueError, texts(lengths), SDPA,
                "torch",
            )  # fmt: skip
        yield Bad(
            f"{corner} and is_causal", bias(corner, SEQLEN_Q, SEQLEN_K, is_causal=True), ValueError,
            ("both",), SDPA, "torch",
        )  # fmt: skip
    yield Bad(
        "numpy tensors beside a causal bias of other lengths", bias("upper_left", 5, 5), ValueError,
        ("(5, 5)",), SDPA, "numpy", ("torch",),
    )  # fmt: skip
    for other in ("numpy", "jax", "mlx"):
        yield Bad(
            f"mask of {other}",
            lambda _, other=other: {"attn_mask": make(array_libraries.load(other), (6, 10))},
            TypeError,
            (other,),
            SDPA,
            "torch",
            (other,),
        )


def all_cases() -> Iterator[Bad]:
    for framework in array_libraries.NAMES:
        yield from sdpa_cases(framework)
    yield from sdpa_torch_cases()
    for function in FLASH:
        yield from option_cases(function, "numpy")
        yield from alibi_cases(function, "numpy")
    for framework in ("numpy", "torch"):
        yield from shape_cases(framework)
        yield from packed_cases(framework)
    yield from option_cases("flash_attn_func", "torch")
    yield from alibi_cases("flash_attn_func", "torch")
    yield from dtype_cases()
    yield from no_tensor_cases()
    yield from odd_numpy_cases()
    yield from capsule_cases()
    yield from torch_cases()
    yield from mixed_framework_cases()
    yield from jax_and_mlx_cases()


CASES = list(all_cases())


def identity(bad: Bad) -> str:
    return f"{bad.function}-{bad.framework}-{bad.label}".encode("ascii", "replace").decode()


def contents(arguments: dict[str, Any]) -> dict[str, bytes]:
    """The memory of the arguments that have some."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            found[name] = value.tobytes()
        elif isinstance(value, DlpackObject):
            found[name] = value.memory.tobytes()
        elif type(value).__module__ == "torch" and type(value).__name__ == "Tensor":
            torch = array_libraries.load("torch").module
            if value.device.type == "cpu" and value.layout is torch.strided:
                memory = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
                found[name] = memory.numpy().tobytes()
    return found


def assert_refused(bad: Bad) -> None:
    arguments = bad.arguments()
    before = contents(arguments)
    expected = bad.error if isinstance(bad.error, tuple) else (bad.error,)
    with pytest.raises(Exception) as caught:  # noqa: PT011  which ones is asserted below
        getattr(umfa, bad.function)(**arguments)
    message = str(caught.value)
    assert type(caught.value) in expected, f"{type(caught.value).__name__}: {message}"
    assert_well_formed(message, bad.function, bad.offending)
    assert contents(arguments) == before, "an input was changed"

    possible, reason = umfa.can_run(getattr(umfa, bad.function), **arguments)
    assert possible is False
    assert any(text in reason for text in bad.offending), reason
    if bad.function == "flash_attn_func":
        assert umfa.can_run(**arguments) == (possible, reason)


def assert_well_formed(message: str, function: str, offending: tuple[str, ...]) -> None:
    assert message.startswith(f"[umfa.{function}] ")
    assert "; got " in message
    assert "; expected " in message
    assert any(text in message for text in offending), f"{message!r} says none of {offending}"
    assert len(message) < 1000, "a message is no place for data"


def test_there_are_enough_cases() -> None:
    labels = [identity(bad) for bad in CASES]
    assert len(set(labels)) == len(labels), "two cases have the same name"
    assert sum(bad.framework in ("numpy", "torch") for bad in CASES) >= 500


def parameter(bad: Bad) -> Any:
    """The part that needs nothing but NumPy is what sanitizers also run."""
    alone = bad.framework == "numpy" and not bad.needs
    return pytest.param(bad, id=identity(bad), marks=[pytest.mark.sanitize] if alone else [])


@pytest.mark.parametrize("bad", [parameter(bad) for bad in CASES])
def test_bad_call(bad: Bad) -> None:
    assert_refused(bad)
