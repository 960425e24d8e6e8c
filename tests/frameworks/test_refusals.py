"""What umfa will not do silently: lose a gradient, a trace, or the reason why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries
from tests.array_libraries import Framework
from tests.capsules import DlpackObject
from tests.cases import normal
from tests.checks import BASE, assert_close

SHAPE = (1, 12, 2, 8)
PREFIX = r"^\[umfa\.flash_attn_func\] "
FUNCTIONS = pytest.mark.parametrize(
    "function", [umfa.flash_attn_func, umfa.scaled_dot_product_attention]
)


def prefix(function: Callable[..., Any]) -> str:
    return rf"^\[umfa\.{function.__name__}\] "


def arrays() -> list[Any]:
    return [normal(SHAPE, seed=i) for i in range(3)]


# ---- can_run -------------------------------------------------------------------------------------

GOOD: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "causal": True, "window_size": (3, 5), "softcap": 2.0, "softmax_scale": 0.5,
        "deterministic": True, "return_attn_probs": True,
    },
    "largest window": {"window_size": (2**31 - 1, 2**31 - 1)},
    "list for a window": {"window_size": [0, 0]},
    "integers": {"softcap": 3, "softmax_scale": 1, "dropout_p": 0},
    "numpy scalars": {
        "softcap": np.float32(3), "softmax_scale": np.float64(1), "causal": np.bool_(True),
        "window_size": (np.int32(3), np.int64(4)),
    },
    "0 and 1 for flags": {"causal": 1, "deterministic": 0},
}  # fmt: skip


@pytest.mark.parametrize("options", GOOD.values(), ids=GOOD.keys())
def test_what_can_run_does_run(options: dict[str, Any], framework: Framework) -> None:
    tensors = [framework.tensor(array) for array in arrays()]
    assert umfa.can_run(*tensors, **options) == (True, "")
    umfa.flash_attn_func(*tensors, **options)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(1, 1), (576, 512)])
@pytest.mark.parametrize("seqlen_k", [0, 1])
def test_extreme_sizes_can_run(head_dim: int, head_dim_v: int, seqlen_k: int) -> None:
    query, key = np.ones((1, 3, 4, head_dim), "f4"), np.ones((1, seqlen_k, 1, head_dim), "f4")
    value = np.ones((1, seqlen_k, 1, head_dim_v), "f4")
    assert umfa.can_run(query, key, value) == (True, "")
    out = umfa.flash_attn_func(query, key, value)
    assert out.shape == (1, 3, 4, head_dim_v)
    assert (out == seqlen_k).all()


def test_can_run_has_the_options_of_the_function() -> None:
    function = inspect.signature(umfa.flash_attn_func).parameters
    for name, parameter in inspect.signature(umfa.can_run).parameters.items():
        assert parameter.default == function[name].default, name
    assert set(inspect.signature(umfa.can_run).parameters) == set(function)


def test_any_dlpack_object_is_a_tensor() -> None:
    objects = [DlpackObject(SHAPE) for _ in range(3)]
    assert umfa.can_run(*objects) == (True, "")
    out = np.from_dlpack(umfa.flash_attn_func(*objects, causal=True))
    assert_close(out, np.ones(SHAPE, np.float32), BASE["float32"])


def test_backends_say_why_not() -> None:
    found = {info.name: info for info in umfa.backends()}
    assert list(found)[-1] == "cpu"
    assert set(found) == {"cpu", "metal"}
    assert found["cpu"].available
    for info in found.values():
        assert bool(info.reason) == (not info.available), "a reason is for what is missing"


def test_unsupported_is_an_error_of_its_own() -> None:
    assert issubclass(umfa.UnsupportedError, NotImplementedError)
    assert not issubclass(umfa.UnsupportedError, (ValueError, TypeError))
    assert umfa.UnsupportedError.__module__ == "umfa"


# ---- gradients and traces ------------------------------------------------------------------------


def torch_tensors() -> tuple[Any, list[Any]]:
    framework = array_libraries.load("torch")
    return framework.module, [framework.tensor(array) for array in arrays()]


def test_torch_without_grad_mode_computes() -> None:
    torch, tensors = torch_tensors()
    expected = umfa.flash_attn_func(*tensors)
    for tensor in tensors:
        tensor.requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = umfa.flash_attn_func(*tensors)
            assert umfa.can_run(*tensors) == (True, "")
        assert torch.equal(out, expected)
        assert not out.requires_grad
    parameters = [torch.nn.Parameter(tensor.detach()) for tensor in tensors]
    with torch.no_grad():
        assert torch.equal(umfa.flash_attn_func(*parameters), expected)


def test_torch_inference_tensors_compute() -> None:
    torch, tensors = torch_tensors()
    with torch.inference_mode():
        inner = [tensor.clone() for tensor in tensors]
    assert torch.equal(umfa.flash_attn_func(*inner), umfa.flash_attn_func(*tensors))


def torch_transforms(torch: Any) -> dict[str, Callable[[Any, list[Any]], Any]]:
    def dual(f: Any, tensors: list[Any]) -> Any:
        with torch.autograd.forward_ad.dual_level():
            q = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
            return f(q, *tensors[1:])

    return {
        "jvp": lambda f, x: torch.func.jvp(f, tuple(x), tuple(x)),
        "forward_ad": dual,
    }


# PyTorch's own forward mode still compiles its formulas with torch.jit, which it deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("transform", ["jvp", "forward_ad"])
@FUNCTIONS
def test_torch_forward_mode_is_refused(function: Callable[..., Any], transform: str) -> None:
    torch, tensors = torch_tensors()
    with pytest.raises(umfa.UnsupportedError, match=prefix(function)):
        torch_transforms(torch)[transform](function, tensors)


@FUNCTIONS
def test_jax_forward_mode_is_refused(function: Callable[..., Any]) -> None:
    framework = array_libraries.load("jax")
    import jax

    tensors = [framework.tensor(array) for array in arrays()]
    with pytest.raises(umfa.UnsupportedError, match=prefix(function)):
        jax.jvp(function, tensors, tensors)


@pytest.mark.parametrize("argument", [0, 1, 2])
@FUNCTIONS
def test_mlx_forward_mode_is_refused(function: Callable[..., Any], argument: int) -> None:
    """mlx would take a result from outside for a constant, and its tangent for zero."""
    framework = array_libraries.load("mlx")
    mx = framework.module
    tensors = [framework.tensor(array) for array in arrays()]

    def f(x: Any) -> Any:
        changed = [*tensors[:argument], x, *tensors[argument + 1 :]]
        return function(*changed).sum()

    x = tensors[argument]
    with pytest.raises(umfa.UnsupportedError, match=prefix(function)):
        mx.eval(mx.jvp(f, [x], [x]))


@pytest.mark.parametrize("transform", ["compile", "vmap"])
@FUNCTIONS
def test_mlx_traces_are_refused(function: Callable[..., Any], transform: str) -> None:
    framework = array_libraries.load("mlx")
    mx = framework.module
    tensors = [framework.tensor(array) for array in arrays()]
    transforms: dict[str, Callable[[], Any]] = {
        "compile": lambda: mx.eval(mx.compile(function)(*tensors)),
        "vmap": lambda: mx.eval(mx.vmap(function)(*(x[None] for x in tensors))),
    }
    with pytest.raises(umfa.UnsupportedError, match=prefix(function)):
        transforms[transform]()


def test_mlx_lazy_arrays_are_evaluated() -> None:
    framework = array_libraries.load("mlx")
    tensors = [framework.tensor(array) for array in arrays()]
    out = umfa.flash_attn_func(*(x * 2 - x for x in tensors))
    assert_close(framework.numpy(out), umfa.flash_attn_func(*arrays()), BASE["float32"])


# ---- who owns what -------------------------------------------------------------------------------


def test_output_is_the_callers_own(framework: Framework) -> None:
    """It outlives the inputs, and a second call does not write to it."""
    tensors = [framework.tensor(array) for array in arrays()]
    first = umfa.flash_attn_func(*tensors)
    before = framework.numpy(first).copy()
    umfa.flash_attn_func(*(framework.tensor(2 * array) for array in arrays()))
    del tensors
    np.testing.assert_array_equal(framework.numpy(first), before)


def test_the_library_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    umfa.flash_attn_func(*arrays(), causal=True)
    umfa.can_run(None, None, None)
    assert capfd.readouterr() == ("", "")


# ---- recorders, and what producers do ------------------------------------------------------------


def test_torch_jit_is_refused() -> None:
    """It would record an empty tensor and nothing that fills it."""
    torch = array_libraries.load("torch").module
    x = torch.randn(SHAPE)

    def attend(x: Any) -> Any:
        return umfa.flash_attn_func(x, x, x)

    with (
        pytest.warns(DeprecationWarning, match="jit.trace"),
        pytest.raises(
            umfa.UnsupportedError, match=PREFIX + "q is being recorded; got torch.jit.trace"
        ),
    ):
        torch.jit.trace(attend, x, check_trace=False)


def test_a_capsule_is_used_once() -> None:
    """A producer that hands out the same capsule twice must not have its memory freed twice."""

    class Keeps:
        def __init__(self) -> None:
            self.capsule = normal(SHAPE, seed=0).__dlpack__()

        def __dlpack__(self, **_: Any) -> Any:
            return self.capsule

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    tensors = [Keeps() for _ in range(3)]
    umfa.flash_attn_func(*tensors)
    with pytest.raises(TypeError, match=PREFIX + "q is not a readable DLPack tensor"):
        umfa.flash_attn_func(*tensors)


@pytest.mark.parametrize("error", [BufferError, RuntimeError, KeyboardInterrupt])
def test_what_a_producer_raises_is_not_lost(error: type[BaseException]) -> None:
    class Refuses:
        def __dlpack__(self, **_: Any) -> Any:
            raise error("the dog ate it")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    expected = KeyboardInterrupt if error is KeyboardInterrupt else TypeError
    with pytest.raises(expected, match="the dog ate it"):
        umfa.flash_attn_func(Refuses(), Refuses(), Refuses())


def test_a_deleted_jax_array_is_refused() -> None:
    jax = array_libraries.load("jax")
    tensors = [jax.tensor(array) for array in arrays()]
    tensors[1].delete()
    with pytest.raises(ValueError, match=PREFIX + "k has been deleted"):
        umfa.flash_attn_func(*tensors)
    assert not umfa.can_run(*tensors)[0]


def test_jax_results_stay_on_the_device_of_the_query(run_python: Any) -> None:
    array_libraries.load("jax")
    process = run_python(
        """
import jax, numpy as np, umfa
first, second = jax.devices()
x = jax.device_put(np.ones((1, 8, 2, 4), np.float32), second)
out, lse, _ = umfa.flash_attn_func(x, x, x, return_attn_probs=True)
assert out.devices() == lse.devices() == {second}, out.devices()
np.testing.assert_array_equal(np.asarray(out), np.ones((1, 8, 2, 4), np.float32))
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert process.returncode == 0, process.stderr


def test_a_packed_tensor_must_be_sliceable() -> None:
    packed = DlpackObject((1, 12, 3, 16))
    with pytest.raises(TypeError, match=r"^\[umfa\.flash_attn_qkvpacked_func\] qkv cannot be"):
        umfa.flash_attn_qkvpacked_func(packed)


@pytest.mark.parametrize("variable", ["UMFA_NUM_THREADS", "UMFA_CPU_ISA"])
def test_can_run_knows_a_senseless_environment(variable: str, run_python: Any) -> None:
    process = run_python(
        "import numpy as np, umfa\n"
        "x = np.ones((1, 8, 2, 4), np.float32)\n"
        "print(umfa.can_run(x, x, x), umfa.backends())",
        **{variable: "banana"},
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("(False, ")
    assert process.stdout.count("banana") == 2
