"""What stops a dispatch, with an error that says where, and how each check is turned off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tools.emulator.emulator_kernels import HEADER, floats, library, run
from tools.metal.emulator import CHECKS, Counters, KernelError, Options

Ints = np.ndarray[Any, np.dtype[np.int32]]

KERNEL = """
int deep(int n, device int* p) {
    if (p[n & 7] == 5) return 1;
    return deep(n + 1, p) * 3 + deep(n + 2, p);
}
constant int unset [[function_constant(7)]];
kernel void f(device int* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
%s
}"""
START, END = KERNEL.split("%s")
HEAD, SIGNATURE = START.rsplit("\n", 2)[0], START.rsplit("\n", 2)[1]


def zeros(n: int = 64) -> Ints:
    return np.zeros(n, np.int32)


class Bodies:
    """Kernels compiled together, which takes hardly longer than one of them."""

    def __init__(self, *bodies: str) -> None:
        self.bodies = list(dict.fromkeys(bodies))
        kernels = [
            f"{SIGNATURE.replace(' f(', f' f{i}(')}\n{body}{END}"
            for i, body in enumerate(self.bodies)
        ]
        self.text = "\n".join([HEAD, *kernels])

    def line(self, body: str) -> int:
        return (HEADER + self.text).split("\n").index(body) + 1

    def run(
        self, body: str, out: Ints | None = None, seed: int = 0, threads: int = 32, **options: Any
    ) -> Counters:
        made = library(self.text, options=Options(**options))
        name = f"f{self.bodies.index(body)}"
        return made.dispatch(name, 1, threads, {0: zeros() if out is None else out}, None, seed)

    def stop(
        self, check: str, body: str, match: str = ".", above: int = 0, seed: int = 0, **options: Any
    ) -> None:
        """It stops with this error, in the line of the body or so many above."""
        with pytest.raises(KernelError, match=match) as caught:
            self.run(body, seed=seed, **options)
        assert caught.value.check == check
        assert caught.value.location == f"<source>:{self.line(body) - above}"


# --------------------------------------------------------------------- errors, not a dead process


DIVISIONS = [
    ("out[t] = 5 / out[t + 32];", "out[t] = 5 / (out[t + 32] + 1);"),
    ("out[t] = 5 % out[t + 32];", "out[t] = 5 % (out[t + 32] - 1);"),
    ("out[t] = int(5u / uint(out[t + 32]));", "out[t] = int(5u / uint(out[t + 32] | 2));"),
    ("out[t] = int(5ul % ulong(out[t + 32]));", "out[t] = int(5ul % ulong(out[t + 32] | 2));"),
    ("out[t] = (int4(7) / int4(1, 1, out[t + 32], 1)).x;",
     "out[t] = (int4(7) / int4(1, 1, out[t + 32] + 1, 1)).x;"),
    ("out[t] = (-2147483647 - 1 + out[t]) / (out[t + 32] - 1);",
     "out[t] = (-2147483647 + out[t]) / (out[t + 32] - 1);"),
]  # fmt: skip
DIVIDE = Bodies(*(body for pair in DIVISIONS for body in pair))


@pytest.mark.parametrize(("wrong", "right"), DIVISIONS)
def test_division_by_zero(wrong: str, right: str) -> None:
    DIVIDE.stop("division by zero", wrong, "thread .0,0,0.")
    DIVIDE.run(right)


def test_division_by_a_function_constant() -> None:
    text = """constant int n [[function_constant(0)]];
        kernel void f(device int* out [[buffer(0)]]) { out[0] = out[1] / n; }"""
    with pytest.raises(KernelError, match="<source>:4: division by zero"):
        run(text, {0: zeros()}, constants={0: 0}, threads=1)
    run(text, {0: zeros()}, constants={0: 3}, threads=1)


def test_division_by_zero_without_the_check() -> None:
    """The processor stops at it, if it does at all; the process goes on."""
    for checks in (False, {"division": False}):
        try:
            DIVIDE.run(DIVISIONS[0][0], checks=checks)
        except KernelError as error:
            assert error.check == "division by zero"  # noqa: PT017


LOOPS = [
    "while (atomic_load_explicit((device atomic_int*)out, memory_order_relaxed) == 0) {}",
    "uint s = t; while (s != 77u || t < 40u) { s = s * 5u + 3u; if (s == 11u) out[0] = 1; }",
    "for (uint i = 0; i < 10 || out[1] == 0; i++) simd_sum(i);",
    "threadgroup int flag[1]; if (t == 0) flag[0] = 0;"
    " threadgroup_barrier(mem_flags::mem_threadgroup);"
    " while (flag[0] == 0) { threadgroup_barrier(mem_flags::mem_none); }",
    # Without side effects.
    "uint i = t; while (out[t] == 0) { i ^= 1; } out[t] = i;",
    "uint i = t; for (uint n = 10; n >= 0; --n) { i += n * t; } out[t] = i;",
]
ENDS = (
    "for (int i = 0; i < 300; i++)"
    " atomic_fetch_add_explicit((device atomic_int*)out, 1, memory_order_relaxed);"
)
LOOP = Bodies(*LOOPS, ENDS)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_without_end(loop: str) -> None:
    LOOP.stop("spinning thread", loop, "has made 10000 accesses", step_limit=10_000)


def test_a_loop_with_an_end() -> None:
    LOOP.run(ENDS, step_limit=10_000)
    LOOP.stop("spinning thread", ENDS, "has made 100 accesses", step_limit=100)
    LOOP.run(ENDS, step_limit=100, checks={"steps": False})
    LOOP.run(ENDS, step_limit=0)  # no limit


def test_the_usual_limit_ends_a_spinning_thread() -> None:
    """Within seconds; a thread of a real kernel makes far fewer accesses."""
    LOOP.stop("spinning thread", LOOPS[0])


PRIVATE = [
    ("int a[200000]; for (uint i = 0; i < 200000; i++) a[(i * 7 + t) % 200000] = int(i);"
     " out[t] = a[out[t]];",
     "int a[20000]; for (uint i = 0; i < 20000; i++) a[(i * 7 + t) % 20000] = int(i);"
     " out[t] = a[out[t]];"),
    ("out[t] = deep(int(t), out);", "out[t + 32] = 5; out[t] = deep(0, out + 32);"),
]  # fmt: skip
WILD = "int a[4] = {1, 2, 3, 4}; int k = out[0] + 1000000000; out[t] = (&a[0])[k] + 1;"
OWN = Bodies(*(body for pair in PRIVATE for body in pair), WILD, WILD.replace("1000000000", "3"))


@pytest.mark.parametrize(("wrong", "right"), PRIVATE)
@pytest.mark.parametrize("checks", [{"race": False}, False], ids=["checked", "unchecked"])
def test_more_private_memory_than_there_is(wrong: str, right: str, checks: Any) -> None:
    OWN.stop("private memory", wrong, "245760 bytes", above=1, checks=checks)
    OWN.run(right, checks=checks)


def test_a_wild_index_into_an_own_array() -> None:
    OWN.stop("memory fault", WILD, above=1, checks={"race": False})
    OWN.run(WILD.replace("1000000000", "3"), checks={"race": False})


def test_after_a_stop_the_next_dispatch_runs() -> None:
    out = zeros()
    for _ in range(3):
        with pytest.raises(KernelError, match="private memory"):
            OWN.run(PRIVATE[1][0])
        with pytest.raises(KernelError, match="memory fault"):
            OWN.run(WILD, checks={"race": False})
        with pytest.raises(KernelError, match="division by zero"):
            DIVIDE.run(DIVISIONS[0][0])
        DIVIDE.run(DIVISIONS[0][1], out)
    assert (out[:32] == 5).all()


# -------------------------------------------------------------------------------------- places


def test_every_error_has_a_place() -> None:
    """Where no closer one is known, it is the kernel's."""
    with pytest.raises(KernelError) as caught:
        run(KERNEL % "out[t] = 1;", {0: zeros(2048)}, threads=1056)
    assert (caught.value.check, caught.value.location) == ("too many threads", "<source>:9")
    with pytest.raises(KernelError) as caught:
        run(KERNEL % "threadgroup int a[9000]; a[t] = 1; out[t] = a[t];", {0: zeros()})
    assert (caught.value.check, caught.value.location) == ("threadgroup memory", "<source>:9")


# ------------------------------------------------------------------------------ missing barriers


@pytest.mark.parametrize("seed", range(4))
def test_a_missing_barrier_is_a_race_before_anything_was_written(seed: int) -> None:
    body = "threadgroup int a[64]; a[t] = int(t);%s out[t] = a[63 - t];"
    barrier = " threadgroup_barrier(mem_flags::mem_threadgroup);"
    with pytest.raises(KernelError, match="no barrier between") as caught:
        run(KERNEL % body % "", {0: zeros()}, threads=64, seed=seed)
    assert caught.value.check == "data race"
    run(KERNEL % body % barrier, {0: zeros()}, threads=64, seed=seed)


UNWRITTEN = [
    "threadgroup int a[32]; out[t] = a[31 - t];",  # nobody ever writes
    # Writes follow a barrier.
    "threadgroup int a[32]; out[t] = a[31 - t];"
    " threadgroup_barrier(mem_flags::mem_threadgroup); a[t] = 1;",
    "threadgroup int a[32]; out[t] = a[31 - t];"
    " simdgroup_barrier(mem_flags::mem_threadgroup); a[t] = 1;",
    # What it was read for goes wrong first.
    "threadgroup int a[32]; out[a[t] + 5000] = 1; a[t] = 1;",
    "threadgroup int a[32]; out[t] = 1 / (a[t] + 1); a[t] = 1;",
]
READ = Bodies(*UNWRITTEN)


@pytest.mark.parametrize("body", UNWRITTEN)
def test_what_nobody_wrote_is_uninitialised(body: str) -> None:
    READ.stop("uninitialised threadgroup memory", body, "'a' at byte")


# --------------------------------------------------------------------------------- shuffle edges


EDGES = [
    ("simd_shuffle_down(x, 2)", 32, "simd_shuffle_rotate_down(x, 2)"),
    ("simd_shuffle_up(x, 2)", -2, "simd_shuffle_and_fill_up(x, 0, 2)"),
    ("quad_shuffle_down(x, 1)", 4, "quad_shuffle_xor(x, 1)"),
    ("quad_shuffle_up(x, 1)", -1, "quad_shuffle_rotate_up(x, 1)"),
]
SHUFFLED = "int x = int(t); out[t] = %s;"
EDGE = Bodies(*(SHUFFLED % x for call, _, mended in EDGES for x in (call, mended)))


@pytest.mark.parametrize(("call", "lane", "mended"), EDGES)
def test_shuffles_past_the_edge(call: str, lane: int, mended: str) -> None:
    EDGE.stop("shuffle past the edge", SHUFFLED % call, f"of lane {lane},")
    EDGE.run(SHUFFLED % mended)
    out = zeros()
    EDGE.run(SHUFFLED % call, out, checks={"edge": False})  # such a lane keeps its own value
    edge = 31 if "down" in call else 0
    assert out[edge] == edge


# ------------------------------------------------------------------- lanes that meet in parts


BRANCHES = [
    "int x = int(t); if (t < 16) x = simd_shuffle_xor(x, 1); out[t] = x;",
    "int x = int(t); if (t < 16) x = simd_shuffle_xor(x, 1); else x += 0; out[t] = x;",
    "int x = int(t); if (t >= 16) { out[t] = x; return; } out[t] = simd_shuffle_xor(x, 1);",
]
BRANCH = Bodies(*BRANCHES)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_shuffle_of_some_lanes(branch: str, seed: int) -> None:
    """Also where the others return before or after those that shuffle arrive."""
    out = zeros()
    BRANCH.run(branch, out, seed)
    expected = np.arange(32)
    expected[:16] ^= 1
    assert (out[:32] == expected).all()


PARTS = [
    ("if (t < 16) x = simd_shuffle_xor(x, 1); x = simd_sum(x);", [496] * 32),
    ("if (t % 2 == 0) x = simd_sum(x); else x = simd_sum(x + 1);", [240, 272] * 16),
    ("if (t < 16) x = simd_max(x); threadgroup_barrier(mem_flags::mem_threadgroup);",
     [15] * 16 + list(range(16, 32))),
    ("for (uint i = 0; i <= t % 3; i++) x = simd_max(x); x = simd_min(x);", None),
    ("if (t < 8) return; threadgroup_barrier(mem_flags::mem_none); x = simd_min(x);",
     [0] * 8 + [8] * 24),
]  # fmt: skip


PART = Bodies(*(f"int x = int(t); {body} out[t] = x;" for body, _ in PARTS))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("body", "expected"), PARTS)
def test_divergence_that_metal_allows(body: str, expected: list[int] | None, seed: int) -> None:
    """Refused, since it mostly is a mistake; without the check the lanes at one place are the
    active ones."""
    text = f"int x = int(t); {body} out[t] = x;"
    with pytest.raises(KernelError) as caught:
        PART.run(text, seed=seed)
    assert caught.value.check.startswith("divergent")
    out = zeros()
    PART.run(text, out, seed, checks={"divergence": False})
    if expected is not None:
        assert out[:32].tolist() == expected


# ------------------------------------------------------------------------------------- switches

# Of each check: what it stops, which runs to its end without it.
SWITCHES = {
    "alignment": "*(device int2*)(out + 1) = int2(3);",
    "bounds": "if (t == 0) out[64] = 1;",
    "constants": "out[t] = unset;",
    "division": "out[t] = 5 / out[t + 32];",
    "divergence": "if (t < 16) simd_sum(t); threadgroup_barrier(mem_flags::mem_none);",
    "edge": "out[t] = simd_shuffle_down(int(t), 1);",
    "lanes": "if (t < 16) out[t] = simd_shuffle_xor(int(t), 16);",
    "limits": "threadgroup int a[9000]; a[t] = 1; out[t] = a[t];",
    "race": "threadgroup int a[1]; a[0] = int(t);",
    "steps": ENDS.replace("300", "2000"),
    "uniform": "out[t] = simd_shuffle_xor(int(t), ushort(t % 2));",
    "uninitialised": "threadgroup int a[32]; out[t] = a[t];",
}


def test_every_check_has_its_switch() -> None:
    assert set(SWITCHES) == set(CHECKS)


SWITCH = Bodies(*SWITCHES.values())


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_turns_off_one_check(name: str) -> None:
    body = SWITCHES[name]
    more: dict[str, Any] = {"step_limit": 1000, "threads": 1 if name == "alignment" else 32}
    with pytest.raises(KernelError):
        SWITCH.run(body, **more)
    with pytest.raises(KernelError):
        SWITCH.run(body, checks={other: other == name for other in CHECKS}, **more)
    if name != "division":  # the processor has a word in that, too
        SWITCH.run(body, checks={name: False}, **more)


def test_lockstep_code_of_others() -> None:
    """Lanes that talk through threadgroup memory around simdgroup operations, without barriers."""
    text = """kernel void f(device const float* x [[buffer(0)]], device float* out [[buffer(1)]],
                     uint t [[thread_index_in_threadgroup]]) {
        threadgroup float a[32];
        a[t] = x[t];
        simd_sum(x[t]);
        out[t] = a[31 - t];
    }"""
    x, out = floats(32), np.zeros(32, np.float32)
    with pytest.raises(KernelError, match="data race"):
        run(text, {0: x, 1: out})
    run(text, {0: x, 1: out}, options=Options(checks={"race": False}))
    assert (out == x[::-1]).all()


@pytest.mark.parametrize("wrong", [{"races": False}, {"race": 0}, {"": True}])
def test_unknown_switches_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no check is named|True or False"):
        Options(checks=wrong)
    for limit in (-1, 1.5):
        with pytest.raises(Exception, match="step_limit"):
            Options(step_limit=limit)  # type: ignore[arg-type]
