"""A call as an operation with a backward pass, for every framework's automatic differentiation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

from .. import _ext
from .._errors import UnsupportedError, message
from .._frameworks import Autodiff, Framework
from .prepared import Prepared, execute, exported, prepared, stream_of

# By field of the record: what `_ext.attention_backward` calls the gradient.
_NAMES = {
    "query": "dq",
    "key": "dk",
    "value": "dv",
    "qv": "dqv",
    "attn_mask": "dmask",
    "learnable_sink": "dsinks",
    "alibi_slopes": "dalibi_slopes",
}


class Differentiable:
    """One call, without its tensors: they are arguments of `forward` and `backward`.

    A backward pass needs the call's tensors, `out` and the log-sum-exp. The options hold the seed
    of dropout, so that it drops the same weights. Without automatic differentiation (NumPy), only
    `judge` is of use.

    Attributes
    ----------
    function
        Name of the public function, for messages.
    names
        Those of the tensors, as the caller calls them.
    backend
        As the caller chose it.
    tables
        Those of them that the host reads.
    lacks_seed
        Whether weights are to be dropped, and it is not known which: `seeded` says so.
    judged
        What the framework has found to have a backward pass.
    returns_weights
        Whether `forward` returns the matrix of weights too.
    gradients
        What `_ext` calls the gradient of each tensor; None where it computes none.
    asked
        The call as its caller made it.
    options
        The same ones, with the log-sum-exp.
    """

    def __init__(self, framework: Framework, autodiff: Autodiff | None, call: Prepared) -> None:
        options = call.options
        if not options.return_attn_probs:  # which returns the log-sum-exp too
            options = options.replace(return_lse=True)
        self._framework, self._autodiff = framework, autodiff
        self.asked = call
        self._call = call._replace(options=options)
        self.options = options
        self.function, self.names, self.tables = call.function, call.names, call.tables
        self.backend = call.backend
        self.lacks_seed = options.lacks_seed
        self.judged: set[Any] = set()
        self.returns_weights = options.return_attn_probs and options.dropout_p != 0
        fields = dict(zip(call.names, options.fields, strict=True))
        self._gradients = {name: _NAMES.get(field) for name, field in fields.items()}
        self.gradients = tuple(self._gradients.values())

    @classmethod
    def of_text(cls, framework: Framework, autodiff: Autodiff | None, text: str) -> Differentiable:
        """The call that `text` describes."""
        described = json.loads(text)
        function = _ext.Function(
            described["function"],
            layout=described["layout"],
            broadcasts=described["broadcasts"],
            **described["names"],
        )
        tensors: dict[str, Any] = dict.fromkeys(described["tensors"], text)  # stand-ins
        record = _ext.Attention(
            function, backend=described["backend"], **tensors, **described["values"]
        )
        return cls(framework, autodiff, prepared(record.options))

    @property
    def decoder(self) -> Callable[[str], Differentiable]:
        """`of_text` for this framework."""
        return partial(Differentiable.of_text, self._framework, self._autodiff)

    @property
    def text(self) -> str:
        """The call in JSON: for recorders, whose operations take no objects of umfa's."""
        return json.dumps(self._call.options.description, sort_keys=True)

    def seeded(self, seed: int) -> Differentiable:
        """The same call, which drops the weights of this seed."""
        options = self._call.options.replace(dropout_seed=seed)
        return Differentiable(self._framework, self._autodiff, self._call._replace(options=options))

    def on_host(self, tensors: Sequence[Any]) -> list[Any]:
        """The tensors as `forward` and `backward` take them: tables where the host reads them."""
        return [
            self._framework.to_host(tensor, self.function, name) if name in self.tables else tensor
            for name, tensor in zip(self.names, tensors, strict=True)
        ]

    def results(self, tensors: Sequence[Any]) -> list[tuple[tuple[Any, ...], str]]:
        """(shape, dtype) of out and of the log-sum-exp, for tensors that the call accepts."""
        query, key, value = (tensor.shape for tensor in tensors[:3])
        dtype = self._call.options.out_dtype or str(tensors[0].dtype).rpartition(".")[2]
        described = self._call.options.description
        if described["layout"] == "bshd":
            out = (*query[:-1], value[-1])
            *batch, rows, heads = query[:-1]
            lse = (*batch, heads, rows)
        else:
            outer = _broadcast(query[:-2], key[:-2], value[:-2])
            if outer and described["values"].get("grouped", True):
                outer = (*outer[:-1], query[-3] if len(query) > 2 else 1)
            out = (*outer, query[-2], value[-1])
            lse = out[:-1]
        return [(out, dtype), (lse, "float32")]

    def check(self, wanted: Sequence[bool]) -> None:
        """Raises if the call writes tensors that it was given, or if a tensor has no gradient that
        is wanted."""
        for name in self._call.written:
            raise UnsupportedError(
                message(
                    self.function,
                    f"{name} is written in place, which is no operation that could be "
                    "differentiated or recorded",
                    f"{name} in a differentiated or recorded call",
                    f"a call without {name}, or tensors that do not require grad",
                )
            )
        for (name, gradient), wants in zip(self._gradients.items(), wanted, strict=True):
            if wants and gradient is None:
                known = [x for x, has_gradient in self._gradients.items() if has_gradient]
                raise UnsupportedError(
                    message(
                        self.function,
                        f"{name} requires grad, but umfa does not compute its gradient",
                        f"gradient of {name}",
                        f"gradients of {', '.join(known)}",
                    )
                )

    def forward(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """(out, lse) or, with the weights of return_attn_probs, (out, lse, weights)."""
        return execute(self._framework, self._call, self._named(tensors))

    def backward(
        self,
        tensors: Sequence[Any],
        out: Any,
        lse: Any,
        dout: Any,
        dlse: Any,
        wanted: Sequence[bool],
    ) -> tuple[Any, ...]:
        """A gradient for each tensor, None where it is not wanted.

        `dout` may be None if `dlse` is not, and the other way round.
        """
        names = self._wanted(wanted)
        framework, function, backend = self._framework, self.function, self._call.backend
        if dout is None:
            assert self._autodiff is not None
            dout = self._autodiff.zeros_like(out)
        saved = {"out": out, "softmax_lse": lse, "the gradient of out": dout}
        shown = [framework.export(x, function, name, backend) for name, x in saved.items()]
        shown.append(
            None
            if dlse is None
            else framework.export(dlse, function, "the gradient of softmax_lse", backend)
        )

        inputs = exported(framework, self._call, self._named(tensors))
        allocate_like, play = framework.allocate, None
        given = {"out": out, "lse": lse, "dout": dout}
        if dlse is not None:
            given["dlse"] = dlse
        stream = stream_of(framework, self._call, self._named(tensors), names, **given)
        if stream is not None:
            allocate_like, play = stream.allocate, stream.play

        def allocate(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
            return allocate_like(tensors[0], shape, dtype, backend)

        found = iter(
            _ext.attention_backward(
                self._call.options,
                inputs,
                tuple(shown),
                names,
                allocate,
                play=play,
            )
        )
        return tuple(framework.finish(next(found)) if wants else None for wants in wanted)

    def judge(
        self,
        tensors: Sequence[Any],
        wanted: Sequence[bool],
        out: Any = None,
        lse: Any = None,
    ) -> tuple[bool, str]:
        """The routing's verdict on `backward`, and its reason.

        Of `out` and `lse` only shapes, dtypes and strides count. Without them, empty tensors are
        allocated.
        """
        framework, function, backend = self._framework, self.function, self._call.backend
        exports = exported(framework, self._call, self._named(tensors))
        shown = []
        if out is None:
            for shape, dtype in self.results(tensors):
                shown.append(framework.allocate(tensors[0], shape, dtype, backend)[0])
        else:
            shown.append(framework.export(out, function, "out", backend))
            shown.append(framework.export(lse, function, "softmax_lse", backend))
        return _ext.attention_backward_can_run(
            self._call.options, exports, (*shown, shown[0], None), self._wanted(wanted)
        )

    def refusal(self, reason: str) -> UnsupportedError:
        """The error for `judge`'s reason."""
        if reason.startswith("["):  # the core's own error
            return UnsupportedError(reason)
        return UnsupportedError(
            message(
                self.function,
                f"the gradients cannot be computed ({reason})",
                f"backend '{self._call.backend}'",
                "a call that umfa.can_run accepts, or one without gradients",
            )
        )

    def _named(self, tensors: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.names, tensors, strict=True))

    def _wanted(self, wanted: Sequence[bool]) -> list[str]:
        names = zip(self._gradients.values(), wanted, strict=True)
        return [name for name, wants in names if wants and name is not None]


@lru_cache(maxsize=64)
def differentiable(framework: Framework, autodiff: Autodiff, call: Prepared) -> Differentiable:
    """The same one for calls that share their options."""
    return Differentiable(framework, autodiff, call)


def _broadcast(*shapes: Sequence[Any]) -> tuple[Any, ...]:
    """What dimensions aligned at the end broadcast to; sizes may be symbols."""
    result: list[Any] = []
    for i in range(1, max(map(len, shapes)) + 1):
        sizes = [shape[-i] for shape in shapes if len(shape) >= i]
        result.insert(0, next((size for size in sizes if size != 1), 1))
    return tuple(result)
