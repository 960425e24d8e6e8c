"""Calls in graphs: torch.compile, torch.export, make_fx and FakeTensors."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import umfa
from tests.cases import normal
from umfa import fa4

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
# PyTorch's own forward mode still compiles its formulas with torch.jit, which it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dropped at random outside training"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

SHAPE = (1, 5, 2, 8)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def leaves(*shape: int) -> list[Any]:
    return [torch.from_numpy(normal(shape or SHAPE, seed=i)).requires_grad_() for i in range(3)]


def same(function: Callable[..., Any], given: list[Any], **options: Any) -> None:
    """Results and gradients have the bits of the call that is not compiled."""
    compiled = torch.compile(function, fullgraph=True, **options)
    found = []
    for call in (function, compiled):
        results = call(*given)
        results = [
            x for x in (results if isinstance(results, tuple) else (results,)) if x is not None
        ]
        sum((x.float() * x.float()).sum() for x in results).backward()
        found.append([*results, *(x.grad for x in given if x.grad is not None)])
        for x in given:
            x.grad = None
    for one, other in zip(*found, strict=True):
        assert one.dtype is other.dtype
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


TABLE = torch.tensor([0, 2, 5], dtype=torch.int32)
MASK = normal((5, 5), seed=7)


def half(*x: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return umfa.flash_attn_func(*x)


CALLS: dict[str, Callable[..., Any]] = {
    "lse": lambda *x: umfa.flash_attn_func(*x, causal=True, return_lse=True),
    "one tensor": lambda q, k, v: umfa.flash_attn_func(q, q, q),
    "tables": lambda q, k, v: umfa.flash_attn_varlen_func(q[0], k[0], v[0], TABLE, TABLE, 3, 3),
    "lists": lambda q, k, v: umfa.flash_attn_varlen_func(
        q[0], k[0], v[0], [0, 2, 5], [0, 2, 5], 3, 3
    ),
    "packed": lambda *x: umfa.flash_attn_qkvpacked_func(torch.stack(x, 2)),
    "sdpa": lambda *x: umfa.scaled_dot_product_attention(*x, is_causal=True),
    "fa4": lambda *x: fa4.flash_attn_func(*x),
    "seed": lambda *x: umfa.flash_attn_func(*x, 0.5, dropout_seed=3),
    "out_dtype": lambda *x: umfa.flash_attn_func(*x, out_dtype=torch.bfloat16),
    "autocast": half,
}


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        *((name, "aot_eager") for name in CALLS),
        *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in CALLS),
    ],
)
def test_compile(name: str, compiler: str) -> None:
    same(CALLS[name], leaves(), backend=compiler)


def test_compiled_options_have_gradients() -> None:
    given = [*leaves(), torch.from_numpy(MASK).requires_grad_(), torch.ones(2).requires_grad_()]
    same(
        lambda q, k, v, mask, sinks: umfa.flash_attn_func(
            q, k, v, attn_mask=mask, learnable_sink=sinks
        ),
        given,
        backend="aot_eager",
    )


def test_compiled_without_gradients() -> None:
    given = [x.detach() for x in leaves()]
    compiled = torch.compile(umfa.flash_attn_func, fullgraph=True, backend="aot_eager")
    expected = umfa.flash_attn_func(*given)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            assert torch.equal(compiled(*given), expected)


def test_dynamic_shapes() -> None:
    """One graph for all lengths."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(umfa.flash_attn_func, fullgraph=True, dynamic=True, backend=count)
    for length in (5, 6, 9):
        x = torch.from_numpy(normal((2, length, 2, 8), seed=length))
        assert torch.equal(compiled(x, x, x), umfa.flash_attn_func(x, x, x))
    assert len(graphs) == 1


def test_compiled_dropout_draws_anew() -> None:
    """Each run drops other weights, and its backward pass the same ones as its forward pass."""
    x = torch.ones(1, 5, 2, 8).requires_grad_()

    def call(v: Any) -> Any:
        return umfa.flash_attn_func(torch.ones_like(v), torch.ones_like(v), v, 0.5)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    # out is linear in v, so that its sum is that of v times the gradient.
    for out in (first, second):
        (gradient,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close((gradient * x).sum(), out.sum())


def test_compiled_transforms() -> None:
    q, k, v = (x.detach() for x in leaves())

    def gradient(q: Any) -> Any:
        return torch.func.vmap(
            torch.func.grad(lambda q: umfa.flash_attn_func(q, k, v).square().sum())
        )(q)

    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    both = torch.stack([q, 2 * q])
    torch.testing.assert_close(compiled(both), gradient(both))


# torch looks into what runs after the break, too.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_what_is_written_in_place_leaves_the_graph() -> None:
    q, k, v = (x.detach() for x in leaves())

    def call(out: Any, key: Any, value: Any) -> Any:
        umfa.flash_attn_func(q, k, v, out=out)
        return umfa.flash_attn_with_kvcache(q, key, value, k, v, cache_seqlens=1) + 1

    found = []
    for function in (call, torch.compile(call, backend="aot_eager")):
        written = [torch.zeros(SHAPE), *(torch.zeros(1, 9, 2, 8) for _ in range(2))]
        found.append([function(*written), *written])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(Exception, match="out is written in place"):
        torch.compile(
            lambda out: umfa.flash_attn_func(q, k, v, out=out), fullgraph=True, backend="aot_eager"
        )(torch.zeros(SHAPE))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda q, k, v: umfa.flash_attn_func(q, k, v, softcap="x"), "softcap is not a number"),
        (
            lambda q, k, v: umfa.flash_attn_func(
                q, k, v, 0.5, dropout_seed=1, return_attn_probs=True
            ),
            "the matrix of weights cannot be recorded",
        ),
        (
            lambda q, k, v: torch.func.jvp(lambda q: umfa.flash_attn_func(q, k, v), (q,), (q,)),
            "forward-mode",
        ),
        (lambda q, k, v: umfa.flash_attn_func(q, k[0], v), "k has 3 dimensions"),
    ],
)
def test_errors_in_graphs(call: Callable[..., Any], text: str) -> None:
    """By name, also where the compiler wraps them or only running the graph finds them."""
    given = [x.detach() for x in leaves()]
    with pytest.raises(Exception, match=text):
        torch.compile(call, fullgraph=True, backend="aot_eager")(*given)


def test_second_derivatives_in_graphs_are_refused() -> None:
    given = leaves()
    compiled = torch.compile(umfa.flash_attn_func, fullgraph=True, backend="aot_eager")
    (first,) = torch.autograd.grad(compiled(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


class Attention(torch.nn.Module):  # type: ignore[misc]
    def forward(self, q: Any, k: Any, v: Any) -> Any:
        return umfa.flash_attn_func(q, k, v, causal=True)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """The graph has the operation, survives a file, takes other lengths, and can be trained."""
    given = leaves()
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {name: {1: length} for name in "qkv"}
    program = torch.export.export(Attention(), tuple(given), dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "umfa.attention.default" in targets
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    longer = leaves(1, 9, 2, 8)
    for x in (given, longer):
        assert torch.equal(module(*x), Attention()(*x))
    module(*longer).sum().backward()
    again = leaves(1, 9, 2, 8)
    Attention()(*again).sum().backward()
    for x, y in zip(longer, again, strict=True):
        assert torch.equal(x.grad, y.grad)


@pytest.mark.slow
def test_a_file_is_loaded_by_another_process(tmp_path: Path, run_python: Any) -> None:
    given = [x.detach() for x in leaves()]
    file, tensors = tmp_path / "program.pt2", tmp_path / "tensors.pt"
    torch.export.save(torch.export.export(Attention(), tuple(given)), file)
    torch.save([*given, Attention()(*given)], tensors)
    process = run_python(f"""
import torch, umfa.torch_ops
q, k, v, expected = torch.load({str(tensors)!r})
assert torch.equal(torch.export.load({str(file)!r}).module()(q, k, v), expected)
""")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradient(q: Any, k: Any, v: Any) -> Any:
        out = umfa.flash_attn_func(q, k, v)
        return torch.autograd.grad(out.square().sum(), q)

    graph = make_fx(gradient, tracing_mode=tracing_mode)(*leaves())
    given = [2 * x for x in leaves()]
    assert "umfa.attention_backward" in graph.code
    torch.testing.assert_close(graph(*given), gradient(*given))


FAKE: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "dense": (umfa.flash_attn_func, ((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 16))),
    "packed": (
        lambda *x, **o: umfa.flash_attn_varlen_func(*x, [0, 2, 5], [0, 2, 5], 3, 3, **o),
        ((5, 4, 8), (5, 2, 8), (5, 2, 16)),
    ),
    "sdpa": (
        umfa.scaled_dot_product_attention,
        ((3, 1, 4, 5, 8), (2, 1, 7, 8), (4, 7, 16)),
    ),
    "sdpa grouped": (
        lambda *x: umfa.scaled_dot_product_attention(*x, enable_gqa=True),
        ((1, 4, 5, 8), (3, 2, 7, 8), (2, 7, 16)),
    ),
    "sdpa flat": (umfa.scaled_dot_product_attention, ((5, 8), (7, 8), (7, 16))),
}


@pytest.mark.parametrize("name", FAKE)
def test_fake_tensors(name: str) -> None:
    """They have the shapes and dtypes of what the call would return."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    function, shapes = FAKE[name]
    options = {} if name.startswith("sdpa") else {"return_lse": True}
    with FakeTensorMode():
        found = function(*(torch.zeros(shape) for shape in shapes), **options)
    real = function(*(torch.zeros(shape) for shape in shapes), **options)
    for one, other in zip(
        *((x,) if not isinstance(x, tuple) else x for x in (found, real)), strict=True
    ):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(requires_grad: bool) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    given = [*leaves(), torch.from_numpy(MASK)]

    def call(q: Any, k: Any, v: Any, mask: Any) -> Any:
        out = umfa.flash_attn_func(q, k, v, attn_mask=mask)
        return torch.autograd.grad(out.sum(), (q, v))

    graph = make_fx(call)(*given)
    text = {
        str(node.target): node.args[-1] for node in graph.graph.nodes if "umfa" in str(node.target)
    }
    given = [x.detach().requires_grad_(requires_grad) for x in given]
    forward, backward = (
        getattr(torch.ops.umfa, name).default for name in ("attention", "attention_backward")
    )
    found = torch.library.opcheck(forward, (given, None, text["umfa.attention.default"]))
    assert set(found.values()) == {"SUCCESS"}
    plain = [x.detach() for x in given]
    out, lse = forward(plain, None, text["umfa.attention.default"])
    found = torch.library.opcheck(
        backward,
        (
            plain, None, out, lse, torch.ones_like(out), None, [True, False, True, False],
            text["umfa.attention_backward.default"],
        ),
    )  # fmt: skip
    assert set(found.values()) == {"SUCCESS"}
