"""What the functions of flash-attn's kind do alike: from their arguments to the call."""

from __future__ import annotations

from typing import Any

from . import _ext
from ._attention import Act, judge, run, table
from ._errors import message
from ._frameworks import Framework, framework_of
from ._options import flag, make_options, number, unsigned
from ._weights import check_possible, weights_of

# Tensors that a call may have besides query, key and value, by the core's names.
_OPTIONAL = (
    "alibi_slopes", "attn_mask", "learnable_sink", "qv", "new_key", "new_value", "rotary_cos",
    "rotary_sin",
)  # fmt: skip


def attend_sequences(
    act: Act,
    function: str,
    tensors: dict[str, Any],
    arguments: dict[str, Any],
    tables: dict[str, Any] | None = None,
    lengths_name: str = "seqused_k",
) -> Any:
    """`tensors`: query, key and value by the caller's names; `arguments`: the function's, by name.

    Returns out alone, or with what was asked for besides.
    """
    get = arguments.get
    probs, lse = get("return_attn_probs", False), get("return_lse", False)
    if probs is not False or lse is not False:
        probs = flag(function, "return_attn_probs", probs)
        lse = flag(function, "return_lse", lse)
        _check_one(function, "return_lse", lse or None, "return_attn_probs", probs or None)
    if get("s_aux") is not None:
        _check_one(function, "learnable_sink", arguments["learnable_sink"], "s_aux", get("s_aux"))
        arguments["learnable_sink"] = arguments["s_aux"]
    names = tuple(tensors)
    written: tuple[str, ...] = ()
    given = {name: tensor for name in _OPTIONAL if (tensor := get(name)) is not None}
    if given:
        tensors.update(given)
        if "new_key" in given or "new_value" in given:
            written = names[1:]  # the caches
    framework = framework_of(function, tensors, written)
    for name in written:
        framework.check_writable(tensors[name], function, name)
    if framework.autocast is not None:
        framework.autocast(function, tensors, written)
    seed = seed_of(framework, function, arguments)
    dropout_p = get("dropout_p", 0.0)

    def options(probability: Any, with_lse: bool, seed: tuple[int | None, int]) -> _ext.Options:
        return make_options(
            function,
            names,
            probability,
            arguments["softmax_scale"],
            arguments["causal"],
            arguments["window_size"],
            arguments["softcap"],
            get("deterministic", False),
            with_lse,
            arguments["backend"],
            attention_chunk=get("attention_chunk", 0),
            max_seqlen_q=get("max_seqlen_q"),
            max_seqlen_k=get("max_seqlen_k"),
            lengths_name=lengths_name,
            rotary_interleaved=get("rotary_interleaved", True),
            num_splits=get("num_splits", 0),
            dropout_seed=seed[0] or 0,
            dropout_offset=seed[1],
        )

    call = options(dropout_p, lse or probs, seed)
    if tables is not None:
        for name, values in tables.items():
            if values is not None:
                shown_as = lengths_name if name == "seqused_k" else name
                tensors[name] = table(function, shown_as, values)
    if probs and dropout_p:
        check_possible(function, tensors)
    if seed[0] is None and act is run:
        seed = drawn_seed(framework, function, call, tensors, arguments["backend"]), seed[1]
        call = options(dropout_p, lse or probs, seed)
    results = act(framework, function, call, tensors, arguments["backend"])
    if act is run:
        for name in written:
            framework.mark_written(tensors[name])
    if len(results) == 1:
        return results[0]
    if not probs:
        return results
    weights = None
    if dropout_p:
        both = options(0.0, False, seed), options(dropout_p, False, seed)
        weights = weights_of(act, framework, function, *both, tensors, arguments["backend"])
    return (*results, weights)


def attend_plain(
    act: Act,
    function: str,
    tensors: dict[str, Any],
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    deterministic: Any,
    backend: Any,
) -> Any:
    """`attend_sequences` without whatever is optional."""
    framework = framework_of(function, tensors)
    if framework.autocast is not None:
        framework.autocast(function, tensors, ())
    options = make_options(
        function,
        tuple(tensors),
        0.0,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        False,
        backend,
    )
    return act(framework, function, options, tensors, backend)[0]


def _check_one(function: str, name: str, value: Any, other_name: str, other: Any) -> None:
    """That not both arguments are given, since they say the same."""
    if value is not None and other is not None:
        raise ValueError(
            message(function, f"{name} and {other_name} exclude each other", "both", "one of them")
        )


_NO_SEED = 0, 0


def seed_of(
    framework: Framework, function: str, arguments: dict[str, Any]
) -> tuple[int | None, int]:
    """Seed and offset of a call's dropout; None for a seed that is still to be drawn."""
    seed, offset = arguments.get("dropout_seed"), arguments.get("dropout_offset", 0)
    p = arguments.get("dropout_p", 0.0)
    if seed is None and type(p) is float and p == 0 and type(offset) is int and offset == 0:
        return _NO_SEED
    offset = unsigned(function, "dropout_offset", offset)
    if seed is not None:
        return unsigned(function, "dropout_seed", seed), offset
    if not 0 < number(function, "dropout_p", p) < 1:  # the core judges it
        return 0, offset
    if framework.draw_seed is None:
        raise ValueError(
            message(
                function,
                "dropout_seed is missing, and this framework has no generator to ask",
                None,
                "0 to 2**64 - 1",
            )
        )
    return None, offset


def drawn_seed(
    framework: Framework,
    function: str,
    options: _ext.Options,
    tensors: dict[str, Any],
    backend: Any,
) -> int:
    """A seed of the framework's generator, which a call that is refused must not move."""
    possible, _ = judge(framework, function, options, tensors, backend)[0]
    if not possible or framework.draw_seed is None:
        return 0  # run will say why
    return framework.draw_seed()
