"""Calls in MLX's own graph: nothing is evaluated when umfa is called.

A call is planned from the shapes of its arrays, and each launch of the plan becomes an operation of
`mx.fast.metal_kernel` (`_metal_body` has the text). What a launch writes, scratch memory too, is an
output of its operation and an input of those that read it.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .. import _ext
from .._stats import count_in_graph, count_wait
from . import _metal_body, _mlx_strides

LEAST_ELEMENTS = 8
"""MLX hands smaller inputs to kernels in constant memory, which umfa's do not read them from."""

_MOST_THREADS = 2**31 - 1  # of a grid, in each dimension: MLX counts in int

_state = threading.local()


class NotRecordedError(Exception):
    """The call cannot be put into the graph; its text says why. The arrays are as they were."""


def _dtype(name: str) -> Any:
    return mx.bool_ if name == "bool" else getattr(mx, name)


class Cell:
    """Where a result will be found."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, _dtype(dtype)
        self.array: Any = None

    def result(self) -> Any:
        """The array; one without elements, if nothing was to be computed."""
        if self.array is None:
            assert 0 in self.shape, "a plan that writes nothing has empty results"
            self.array = mx.zeros(self.shape, self.dtype)
        return self.array


def missing() -> str:
    """Why calls cannot go into MLX's graph in this process; empty if they can."""
    if os.environ.get("UMFA_MLX_GRAPH") == "0":  # another value than 1 is the core's to refuse
        return "UMFA_MLX_GRAPH=0"
    if not mx.metal.is_available():
        return "this MLX has no Metal"
    if mx.default_device().type != mx.DeviceType.gpu:
        return "MLX's default device is not the GPU"
    if not any(name == "metal" and available for name, available, *_ in _ext.backends()):
        return "umfa has no Metal backend here"
    return ""


def takes(backend: Any) -> bool:
    """Whether calls on this backend go into the graph, as far as that does not depend on them."""
    return _ext.backend_name(backend) != "cpu" and not missing()


def is_recording() -> bool:
    """Whether the call that this thread computes is being put into the graph."""
    return getattr(_state, "recording", False)


def reason() -> str:
    """Why the call that this thread computes is not in the graph; empty if nothing is known."""
    return getattr(_state, "reason", "")


@contextmanager
def _recording() -> Iterator[None]:
    """While it is open arrays are shown by their outlines, and nothing is evaluated."""
    _state.recording, _state.outlined = True, {}
    try:
        yield
    finally:
        _state.recording, _state.outlined = False, {}


@contextmanager
def _evaluating(reason: str) -> Iterator[None]:
    _state.reason = reason
    try:
        yield
    finally:
        _state.reason = ""


def computed(compute: Callable[[], Any], backend: str = "auto") -> Any:
    """`compute()`, as part of the graph if that can be.

    Else arrays are evaluated. A wait for the GPU is counted with its reason.
    """
    if not takes(backend):
        return compute()
    try:
        with _recording():
            return compute()
    except NotRecordedError as obstacle:
        why = f"the call cannot be part of MLX's graph, since {obstacle}"
    with _evaluating(why):
        results = compute()
    count_wait(why)
    return results


@contextmanager
def mapping() -> Iterator[None]:
    """While it is open MLX traces for mx.vmap: results stand for what each index will get.

    MLX asks the operations inside of a custom function for rules of their own, and kernels have
    none. So within a trace the results depend on nothing, and the function's rule computes.
    """
    before, _state.mapping = getattr(_state, "mapping", False), True
    try:
        yield
    finally:
        _state.mapping = before


def _stand_in(cell: Cell) -> Any:
    """A result within a trace for mx.vmap. Evaluated, it raises: no GPU has such threadgroups."""
    threads = (4096, 1, 1)
    kernel = _unmapped()
    [array] = kernel(
        inputs=[],
        grid=threads,
        threadgroup=threads,
        output_shapes=[cell.shape],
        output_dtypes=[cell.dtype],
    )
    return array


@lru_cache(maxsize=1)
def _unmapped() -> Any:
    name = "umfa_result_within_vmap_used_outside_of_it"
    return mx.fast.metal_kernel(
        name=name,
        input_names=[],
        output_names=["out"],
        source="out[0] = 0;",
        ensure_row_contiguous=False,
    )


def outline(array: Any) -> Any:
    """What planners see of an array, which may have no value yet, and so no strides.

    Those of an array with heads are marks: the numbers that a planner makes of them are found in
    the parameters of kernels, and a kernel of `_mlx_strides` puts the strides there.
    """
    name = str(array.dtype).rpartition(".")[2]
    outlined: dict[int, tuple[Any, tuple[int, ...]]] = _state.outlined
    if id(array) not in outlined:
        marks: tuple[int, ...] = ()
        if array.size >= LEAST_ELEMENTS:
            marks = _mlx_strides.marks(len(outlined), array.shape, array.dtype.size)
        outlined[id(array)] = array, marks
    return _ext.outline(array.shape, name, outlined[id(array)][1])


class Graph:
    """One call's launches in MLX's graph.

    Parameters
    ----------
    tensors
        The call's arrays, by the names in a plan.
    results
        The names of what `allocate` is asked for, in this order.

    Attributes
    ----------
    used, built
        Kernels that `warm_up` has found, and those of them that this process had not used.
    """

    def __init__(self, tensors: Mapping[str, Any], results: Sequence[str]) -> None:
        self._tensors = tensors
        outlined = getattr(_state, "outlined", {})
        self._marks = {name: outlined[id(x)][1] for name, x in tensors.items() if id(x) in outlined}
        self._results = iter(results)
        self._cells: dict[str, Cell] = {}
        self._played = False
        self.used = self.built = 0

    def allocate(
        self, like: Any, shape: tuple[int, ...], dtype: str, backend: str = "auto"
    ) -> tuple[Any, Any]:
        """As the framework's `allocate`."""
        cell = self._cells[next(self._results)] = Cell(shape, dtype)
        return _ext.outline(shape, dtype), cell

    def warm_up(self, plan: dict[str, Any]) -> None:
        """Lets MLX compile the kernels of a plan, and counts them in `used` and `built`.

        MLX does so when it runs them: on zeros, for the call's arrays may have no value yet.
        """
        before = _kernel.cache_info().misses
        described = {name: (shape, dtype) for name, shape, dtype in plan["described"]}
        written = {name for name, is_written in plan["tensors"] if is_written}
        self._cells = {name: Cell(*described[name]) for name in written}
        self._tensors = {name: mx.zeros(x.shape, x.dtype) for name, x in self._tensors.items()}
        self._played = False
        kernels = self._add(plan)
        mx.eval([cell.array for cell in self._cells.values()])
        self.used = max(self.used, len(kernels))
        self.built += _kernel.cache_info().misses - before

    def play(self, plan: dict[str, Any]) -> None:
        """Adds the operations of `_ext`'s plan to the graph."""
        self._add(plan)
        count_in_graph()

    def _add(self, plan: dict[str, Any]) -> set[Any]:
        """The same; returns the kernels."""
        if self._played:
            raise NotRecordedError("its batch dimensions are not one, and take a plan each")
        self._played = True
        launches = plan["launches"]
        if any(launch["further_slice"] for launch in launches):
            # macOS ends command buffers that take seconds, and MLX decides where its own end.
            raise NotRecordedError(
                "it is long, and umfa divides it into command buffers of its own"
            )
        if getattr(_state, "mapping", False):
            for result in self._cells.values():
                result.array = _stand_in(result)
            return set()
        names = [name for name, _ in plan["tensors"]]
        pieces = Pieces(
            {
                "tensor": [self._tensors.get(name) for name in names],
                "scratch": [None for _ in plan["scratch_bytes"]],
                "data": [_in_memory(data) for data in plan["data"]],
            },
            [self._cells.get(name) for name in names],
            [self._marks.get(name, ()) for name in names],
            plan,
            set(),
        )
        for launch in launches:
            if launch["source"] != "clear.metal":
                _add(launch, pieces)
        for launch in launches:  # what the others leave out
            if launch["source"] == "clear.metal":
                _clear(launch, pieces)
        for cell, array in zip(pieces.cells, pieces.arrays["tensor"], strict=True):
            if cell is not None:
                cell.array = array
        return pieces.kernels


class Pieces(NamedTuple):
    """What the launches of a plan work on."""

    arrays: dict[str, list[Any]]
    """By kind and number; None: nothing has been written there."""
    cells: list[Cell | None]
    """Of the tensors that are results."""
    marks: list[tuple[int, ...]]
    """Of the tensors: their strides as planned, or none where they are contiguous."""
    plan: dict[str, Any]
    kernels: set[Any]
    """Those of MLX's that the launches use."""


def _add(launch: dict[str, Any], pieces: Pieces) -> None:
    """Adds a launch's operation to the graph."""
    shader = _metal_body.kernel_of(launch)
    places = {index: (kind, piece) for index, kind, piece, _ in launch["buffers"]}
    assert not any(offset for *_, offset in launch["buffers"]), "all pieces are arrays of their own"
    params, code_params = _params(launch, places, pieces)
    inputs: list[Any] = []
    written: list[tuple[str, int]] = []
    shapes: list[tuple[int, ...]] = []
    dtypes: list[Any] = []
    for buffer in shader.buffers:
        if buffer.is_params:
            inputs.append(params)
        elif buffer.name == _CODE_PARAMS and code_params is not None:
            inputs.append(code_params)
        elif buffer.place not in places:
            continue
        elif buffer.written:
            kind, piece = places[buffer.place]
            written.append((kind, piece))
            shape, dtype = _described(kind, piece, pieces)
            shapes.append(shape)
            dtypes.append(dtype)
        else:
            kind, piece = places[buffer.place]
            inputs.append(_as_input(kind, piece, pieces))
    threads = tuple(n * size for n, size in zip(launch["grid"], launch["threadgroup"], strict=True))
    if max(threads) > _MOST_THREADS:
        raise NotRecordedError("it takes more threads than MLX launches")
    kernel = _kernel(
        launch["kernel"],
        launch["source"],
        _metal_body.constants(launch["constant_defines"]) + launch["defines"],
        tuple(launch["macros"].items()),
        frozenset(places),
        int(np.prod(launch["threadgroup"])),
    )
    pieces.kernels.add(kernel)
    found = kernel(
        inputs=inputs,
        grid=threads,
        threadgroup=tuple(launch["threadgroup"]),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )
    rows = _rows_of(launch, shader, pieces.plan) if len(pieces.plan["launches"]) > 1 else None
    for (kind, piece), array in zip(written, found, strict=True):
        before = pieces.arrays[kind][piece]
        if kind == "scratch" or before is None or rows is None:
            pieces.arrays[kind][piece] = array  # all of it, or all that has been written so far
        else:
            name = pieces.plan["tensors"][piece][0]
            assert name in ("out", "lse"), f"two kernels write {name}"
            pieces.arrays[kind][piece] = mx.where(_marked(rows, name, array), array, before)


_CODE_PARAMS = "code_params"
"""The buffer of the forward kernel that says where scales and offsets lie."""


def _params(
    launch: dict[str, Any], places: dict[int, tuple[str, int]], pieces: Pieces
) -> tuple[Any, Any]:
    """A launch's parameters and, where it has them, those of its codes, with the strides of its
    arrays."""
    tensors = {
        pieces.plan["tensors"][piece][0]: (pieces.arrays[kind][piece], pieces.marks[piece])
        for kind, piece in places.values()
        if kind == "tensor" and pieces.arrays[kind][piece] is not None
    }
    blocks, code_params = [], None
    for buffer in _metal_body.kernel_of(launch).buffers:
        if buffer.name == _CODE_PARAMS and buffer.place in places:
            parts = [f"{x}_{part}" for x in ("key", "value") for part in ("scales", "offsets")]
            blocks = [tensors.pop(name) for name in parts if name in tensors]
            data = pieces.plan["data"][places[buffer.place][1]]
            code_params = _mlx_strides.resolved(_in_memory(data, mx.int64), data, blocks)
    text = launch["params"]
    params = _mlx_strides.resolved(_in_memory(text, mx.int64), text, list(tensors.values()))
    return params, code_params


def _as_input(kind: str, piece: int, pieces: Pieces) -> Any:
    """What a launch reads, in a form whose layout its parameters have."""
    array = pieces.arrays[kind][piece]
    if kind == "tensor" and pieces.marks[piece]:
        return _mlx_strides.shown(array)
    if array.size >= LEAST_ELEMENTS:
        return mx.contiguous(array)
    return mx.concatenate([array.reshape(-1), mx.zeros(LEAST_ELEMENTS, array.dtype)])


class Rows(NamedTuple):
    """Rows of results: so many from `first` on, of an index of the batch."""

    batch: np.ndarray[Any, Any]
    first: np.ndarray[Any, Any]
    number: np.ndarray[Any, Any]


def _structs(data: bytes, size: int, **offsets: tuple[str, int]) -> np.ndarray[Any, Any]:
    """Fields (dtype, offset) of each of the structs of `size` bytes."""
    described: Any = {
        "names": list(offsets),
        "formats": [kind for kind, _ in offsets.values()],
        "offsets": [offset for _, offset in offsets.values()],
        "itemsize": size,
    }
    return np.frombuffer(data, np.dtype(described))


def _data_of(launch: dict[str, Any], shader: _metal_body.Shader, plan: Any, name: str) -> Any:
    """The plan's data that a buffer of the kernel is bound to; None if it is not."""
    places = {index: piece for index, kind, piece, _ in launch["buffers"] if kind == "data"}
    for buffer in shader.buffers:
        if buffer.name == name and buffer.place in places:
            return plan["data"][places[buffer.place]]
    return None


def _rows_of(launch: dict[str, Any], shader: _metal_body.Shader, plan: Any) -> Rows | None:
    """The rows of queries that a launch's sequences have; None: all that there are.

    The structs are SequenceTask and SequenceParams of shaders/shared/params.h.
    """
    tasks = _data_of(launch, shader, plan, "tasks")
    if tasks is None:
        return None
    sequences = _structs(
        _data_of(launch, shader, plan, "sequences"),
        plan["sequence_bytes"],
        batch=("<i8", 0),
        first=("<i8", 8),
        count=("<i4", 48),
    )
    own = sequences[np.unique(_structs(tasks, 16, sequence=("<i4", 0))["sequence"])]
    return Rows(own["batch"], own["first"], own["count"])


def _marked(rows: Rows, name: str, array: Any) -> Any:
    """True where an element of a result belongs to one of the rows."""
    batches, axis = (array.shape[0], 1) if array.ndim == 4 - (name == "lse") else (1, 0)
    shape = [1] * array.ndim
    if axis == 1:
        shape[0] = batches
    axis += name == "lse"  # heads come before its rows
    shape[axis] = array.shape[axis]
    marks = np.zeros((batches, array.shape[axis]), np.bool_)
    for batch, first, count in zip(*rows, strict=True):
        marks[batch, first : first + count] = True
    return mx.array(marks.reshape(shape))


def _clear(launch: dict[str, Any], pieces: Pieces) -> None:
    """What umfa_clear does to rows that belong to no sequence: 0, and -inf in the log-sum-exp."""
    shader = _metal_body.kernel_of(launch)
    unused = _structs(
        _data_of(launch, shader, pieces.plan, "unused"),
        24,  # UnusedRows of shaders/shared/params.h
        batch=("<i8", 0),
        first=("<i8", 8),
        count=("<i4", 16),
    )
    rows = Rows(unused["batch"], unused["first"], unused["count"])
    for _, kind, piece, _ in launch["buffers"]:
        if kind != "tensor":
            continue
        cell = pieces.cells[piece]
        assert cell is not None, "only results are cleared"
        name = pieces.plan["tensors"][piece][0]
        value = mx.array(float("-inf") if name == "lse" else 0.0, cell.dtype)
        before = pieces.arrays[kind][piece]
        if before is None:  # nothing else writes there: no row is in use
            pieces.arrays[kind][piece] = mx.full(cell.shape, value)
        else:
            pieces.arrays[kind][piece] = mx.where(_marked(rows, name, before), value, before)


def _described(kind: str, piece: int, pieces: Pieces) -> tuple[tuple[int, ...], Any]:
    """(shape, dtype) of something that a launch writes."""
    if kind == "scratch":
        size = -(-pieces.plan["scratch_bytes"][piece] // 4)
        if size > _MOST_THREADS:
            raise NotRecordedError("its scratch memory has more elements than an array of MLX's")
        return (size,), mx.float32
    cell = pieces.cells[piece]
    if cell is None:
        raise NotRecordedError("it writes an array of the caller's")
    return cell.shape, cell.dtype


def _in_memory(data: bytes, dtype: Any = mx.uint8) -> Any:
    """What kernels only read, as an array."""
    return _small(data, dtype) if len(data) <= 4096 else _copied(data, dtype)


def _copied(data: bytes, dtype: Any) -> Any:
    most = LEAST_ELEMENTS * dtype.size
    whole = data + bytes(max(-len(data) % dtype.size, most - len(data)))
    return mx.array(np.frombuffer(whole, np.int64 if dtype == mx.int64 else np.uint8))


_small: Callable[[bytes, Any], Any] = lru_cache(maxsize=256)(_copied)


@lru_cache(maxsize=256)
def _kernel(
    name: str,
    source: str,
    defines: str,
    macros: tuple[tuple[str, str], ...],
    bound: frozenset[int],
    threads: int,
) -> Any:
    """A kernel of MLX's: each set of constants and buffers is a text of its own."""
    values = dict(macros)
    shader = _metal_body.kernel_of({"source": source, "kernel": name, "macros": values})
    inputs: dict[int, str] = {}
    outputs: dict[int, str] = {}
    for buffer in shader.buffers:
        if buffer.is_params or buffer.place in bound:
            (outputs if buffer.written else inputs)[buffer.place] = f"umfa_{buffer.name}"
    header = defines + shader.before + _metal_body.most_threads(threads)
    body = _metal_body.declarations(shader, values, {**inputs, **outputs}) + shader.body
    # MLX compiles a name anew whenever it comes with another text.
    digest = hashlib.sha256((header + body).encode()).hexdigest()[:16]
    return mx.fast.metal_kernel(
        name=f"{name}_{digest}",
        input_names=list(inputs.values()),
        output_names=list(outputs.values()),
        source=body,
        header=header,
        ensure_row_contiguous=False,  # so are those inputs whose layout nothing says
    )
