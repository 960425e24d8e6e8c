"""Metal without umfa's host: compile a kernel, see its limits, run it.

It asks for what src/metal/library.mm and pipelines.mm ask for, and takes GPUs that umfa refuses.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.on_a_mac.objc import Id, Runtime, UInt

_LANGUAGE_3_1 = UInt((3 << 16) + 1)
_INT, _BOOL = UInt(29), UInt(53)  # of MTLDataType
_COMPLETED = 4  # of MTLCommandBufferStatus


class MetalError(Exception):
    """Metal refused; the text is the driver's, in full."""


class Size(ctypes.Structure):
    """MTLSize."""

    _fields_ = (("width", UInt), ("height", UInt), ("depth", UInt))


@dataclass
class Pipeline:
    """A kernel that the driver has built."""

    state: int
    max_threads: int
    threadgroup_bytes: int
    width: int


class Device:
    """The default GPU, whatever it is."""

    def __init__(self, runtime: Runtime | None = None) -> None:
        self.objc = runtime or Runtime()
        self._device = self._open()

    def _open(self) -> int:
        with self.objc.pool():
            if sys.platform == "darwin":  # the default device is not always there
                devices = self.objc.call("MTLCopyAllDevices")
                first = self.objc.send(devices, "firstObject")
                if first:
                    self.objc.send(first, "retain")
                    self.objc.release(devices)
                    return int(first)
            device = self.objc.call("MTLCreateSystemDefaultDevice")
        if not device:
            raise MetalError("no Metal device")
        return int(device)

    @property
    def name(self) -> str:
        with self.objc.pool():
            return self.objc.text(self.objc.send(self._device, "name"))

    def families(self) -> list[int]:
        """The N of MTLGPUFamilyAppleN that it supports."""
        return [
            n
            for n in range(1, 11)
            if self.objc.send(
                self._device, "supportsFamily:", ctypes.c_long(1000 + n), result=ctypes.c_bool
            )
        ]

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.objc.release(self._device)

    def _options(self) -> int:
        """Safe mathematics, precise functions: by the names that this macOS has."""
        send, options = self.objc.send, self.objc.new("MTLCompileOptions")
        send(options, "setLanguageVersion:", _LANGUAGE_3_1, result=None)

        def has(name: str) -> bool:
            selector = ctypes.c_void_p(self.objc.call("sel_registerName", name.encode()))
            return bool(send(options, "respondsToSelector:", selector, result=ctypes.c_bool))

        if has("setMathMode:"):
            send(options, "setMathMode:", ctypes.c_long(0), result=None)
        else:
            send(options, "setFastMathEnabled:", ctypes.c_bool(False), result=None)
        if has("setMathFloatingPointFunctions:"):
            send(options, "setMathFloatingPointFunctions:", ctypes.c_long(1), result=None)
        return options

    @contextmanager
    def library(self, text: str) -> Iterator[int]:
        """A library of a kernel's text; raises what the compiler says."""
        error = Id()
        options = self._options()
        library = None
        with self.objc.pool():
            try:
                library = self.objc.send(
                    self._device, "newLibraryWithSource:options:error:", self.objc.string(text),
                    options, ctypes.byref(error),
                )  # fmt: skip
                if not library:
                    raise MetalError(self.objc.error(error.value))
                yield library
            finally:
                self.objc.release(library)
                self.objc.release(options)

    @contextmanager
    def metallib(self, ahead: bytes) -> Iterator[int]:
        """A library that was compiled ahead."""
        error = Id()
        library = None
        create = self.objc.function("dispatch_data_create", Id, Id, ctypes.c_size_t, Id, Id)
        if create is None:
            raise LookupError("no function dispatch_data_create")
        data = create(ahead, len(ahead), None, None)  # copied
        with self.objc.pool():
            try:
                library = self.objc.send(
                    self._device, "newLibraryWithData:error:", data, ctypes.byref(error)
                )
                if not library:
                    raise MetalError(self.objc.error(error.value))
                yield library
            finally:
                self.objc.release(library)
                self.objc.release(data)

    @contextmanager
    def pipeline(
        self, library: int, kernel: str, constants: Mapping[int, bool | int]
    ) -> Iterator[Pipeline]:
        """The kernel with its constants, built for this GPU."""
        send, error = self.objc.send, Id()
        values = self.objc.new("MTLFunctionConstantValues")
        descriptor = self.objc.new("MTLComputePipelineDescriptor")
        function = state = None
        with self.objc.pool():
            try:
                for index, value in constants.items():
                    kind = _BOOL if isinstance(value, bool) else _INT
                    memory = (ctypes.c_bool if kind is _BOOL else ctypes.c_int32)(value)
                    send(values, "setConstantValue:type:atIndex:", ctypes.addressof(memory), kind,
                         UInt(index), result=None)  # fmt: skip
                name = self.objc.string(kernel)
                function = send(library, "newFunctionWithName:constantValues:error:", name, values,
                                ctypes.byref(error))  # fmt: skip
                if not function:
                    raise MetalError("no function: " + self.objc.error(error.value))
                send(descriptor, "setComputeFunction:", function, result=None)
                send(descriptor, "setThreadGroupSizeIsMultipleOfThreadExecutionWidth:",
                     ctypes.c_bool(True), result=None)  # fmt: skip
                state = send(
                    self._device,
                    "newComputePipelineStateWithDescriptor:options:reflection:error:",
                    descriptor, UInt(0), None, ctypes.byref(error),
                )  # fmt: skip
                if not state:
                    raise MetalError("no pipeline: " + self.objc.error(error.value))
                yield Pipeline(
                    state,
                    send(state, "maxTotalThreadsPerThreadgroup", result=UInt),
                    send(state, "staticThreadgroupMemoryLength", result=UInt),
                    send(state, "threadExecutionWidth", result=UInt),
                )
            finally:
                for object_ in (state, function, descriptor, values):
                    self.objc.release(object_)

    def run(
        self,
        pipeline: Pipeline,
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        buffers: Mapping[int, Any],
        offsets: Mapping[int, int] | None = None,
    ) -> None:
        """One dispatch, done when this returns. Arrays of uint8 are written back, bytes are not."""
        send, offsets = self.objc.send, offsets or {}
        queue = send(self._device, "newCommandQueue")
        if not queue:
            raise MetalError("no command queue")
        made: list[tuple[int, Any]] = []
        with self.objc.pool():
            try:
                command = send(queue, "commandBuffer")
                encoder = send(command, "computeCommandEncoderWithDispatchType:", UInt(0))
                if not encoder:
                    raise MetalError("no command encoder")
                send(encoder, "setComputePipelineState:", pipeline.state, result=None)
                for index, data in buffers.items():
                    buffer = self._buffer(data)
                    made.append((buffer, data))
                    send(encoder, "setBuffer:offset:atIndex:", buffer,
                         UInt(offsets.get(index, 0)), UInt(index), result=None)  # fmt: skip
                send(encoder, "dispatchThreadgroups:threadsPerThreadgroup:", Size(*grid),
                     Size(*threads), result=None)  # fmt: skip
                send(encoder, "endEncoding", result=None)
                send(command, "commit", result=None)
                send(command, "waitUntilCompleted", result=None)
                if send(command, "status", result=UInt) != _COMPLETED:
                    raise MetalError("the GPU failed: " + self.objc.error(send(command, "error")))
                for buffer, data in made:
                    if isinstance(data, np.ndarray) and data.flags.writeable:
                        contents = send(buffer, "contents")
                        ctypes.memmove(data.ctypes.data, contents, data.nbytes)
            finally:
                for buffer, _ in made:
                    self.objc.release(buffer)
                self.objc.release(queue)

    def _buffer(self, data: Any) -> int:
        size = data.nbytes if isinstance(data, np.ndarray) else len(data)
        buffer = self.objc.send(
            self._device, "newBufferWithLength:options:", UInt(max(size, 1)), UInt(0)
        )
        if not buffer:
            raise MetalError(f"no buffer of {size} bytes")
        where = data.ctypes.data if isinstance(data, np.ndarray) else data
        ctypes.memmove(self.objc.send(buffer, "contents"), where, size)
        return int(buffer)
