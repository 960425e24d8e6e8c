"""Which GPU umfa takes, of those that a process is shown, and what it says where it takes none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import umfa
from tests.metal.host.test_encode import VALUE_ERROR, c_library, encode
from tests.metal.metal_tensors import MetalTensor
from tests.metal.test_plan_forward import plan
from tools.metal.double import PARAVIRTUAL, Device, Double, machine
from tools.metal.double.gpus import Recorder

M1, M4 = Device(), Device("Apple M4", "applegpu_g16g", 9)
DISCRETE = Device("AMD Radeon Pro 5500M", "", 0)
NOT_UNIFIED = Device("Apple of another kind", "", 9, unified=False)
TOO_OLD = (
    "{} is older than GPU family Apple7 (M1), whose matrix operations umfa uses, or a virtual "
    "machine's"
)


def chosen() -> str:
    """The device that umfa takes, or why it takes none."""
    metal = umfa.backends()[0]
    return metal.device.split(" (")[0] if metal.available else metal.reason


@pytest.mark.parametrize(
    ("devices", "listed", "usual", "expected"),
    [
        ([M1], 1, 0, "Apple M1"),
        ([M1], 1, None, "Apple M1"),
        ([M1], 0, 0, "Apple M1"),
        ([M1, M4], 2, 1, "Apple M1"),
        ([PARAVIRTUAL, M4], 2, 0, "Apple M4"),
        ([DISCRETE, NOT_UNIFIED, M4], 3, 0, "Apple M4"),
        ([PARAVIRTUAL, M4], 1, 1, "Apple M4"),
        ([], 0, None, "no Metal device"),
        ([M1], 0, None, "no Metal device"),
        ([PARAVIRTUAL], 1, 0, TOO_OLD.format(PARAVIRTUAL.name)),
        ([PARAVIRTUAL], 0, 0, TOO_OLD.format(PARAVIRTUAL.name)),
        (
            [DISCRETE, NOT_UNIFIED],
            1,
            1,
            f"{TOO_OLD.format(DISCRETE.name)}; {NOT_UNIFIED.name} does not share the CPU's memory",
        ),
    ],
    ids=[
        "one",
        "no default device: no CoreGraphics",
        "an empty list: a sandbox",
        "the first of two",
        "the first is unusable",
        "only the last is usable",
        "the list has only an unusable one",
        "none",
        "one that is not shown",
        "a virtual Mac",
        "a virtual Mac with an empty list",
        "none is usable",
    ],
)
def test_the_device_that_is_taken(
    devices: list[Device], listed: int, usual: int | None, expected: str, double: Double
) -> None:
    double.set_machine(devices=devices, listed=listed, usual=usual)
    assert chosen() == expected


@pytest.mark.parametrize("family", [1, 5, 6])
def test_a_gpu_that_is_too_old(family: int, double: Double, recorder: Recorder) -> None:
    """On a hosted Mac everything still works, on the CPU, and no kernel reaches the GPU."""
    double.set_machine(devices=[PARAVIRTUAL._replace(family=family)])
    x = np.zeros((1, 512, 4, 64), np.float32)
    reason = TOO_OLD.format(PARAVIRTUAL.name)
    assert umfa.can_run(x, x, x, backend="metal") == (False, f"metal: {reason}")
    with pytest.raises(umfa.UnsupportedError, match="Apple Paravirtual device is older than GPU"):
        umfa.flash_attn_func(x, x, x, backend="metal")
    before = umfa.stats()
    umfa.flash_attn_func(x, x, x)
    assert umfa.stats().cpu_calls - before.cpu_calls == 1
    assert not recorder.prepared


def cores(double: Double, *devices: Device) -> str:
    """What umfa says of the cores of the device that it takes."""
    double.set_machine(devices=devices)
    device = umfa.backends()[0].device
    return device[device.index("Apple9, ") + len("Apple9, ") : device.index(", 6.0 GiB")]


M4_MAX = Device("Apple M4 Max", "applegpu_g16s", 9)
ASSUMED = "40 cores assumed"


@pytest.mark.parametrize("count", [1, 10, 32, 1024])
def test_the_registry_says_how_many_cores_there_are(count: int, double: Double) -> None:
    assert cores(double, M4_MAX._replace(cores=count)) == f"{count} cores"


@pytest.mark.parametrize(
    "device",
    [
        M4_MAX._replace(driver=""),
        M4_MAX._replace(driver="AppleParavirtGPU", cores=32),
        M4_MAX._replace(cores=None),
        M4_MAX._replace(cores="32"),
        M4_MAX._replace(cores=0),
        M4_MAX._replace(cores=-1),
        M4_MAX._replace(cores=1025),
        M4_MAX._replace(cores=2**32 + 32),
    ],
    ids=[
        *("no driver", "another class", "no property", "text", "none", "negative", "too many"),
        "too many for an int",
    ],
)
def test_where_it_does_not_say_they_are_assumed(device: Device, double: Double) -> None:
    assert cores(double, device) == ASSUMED


def test_a_registry_that_fails(double: Double) -> None:
    double.fault("registry")
    assert cores(double, M4_MAX._replace(cores=32)) == ASSUMED
    assert cores(double, M4_MAX._replace(cores=32)) == "32 cores"


def test_the_driver_is_that_of_the_device(double: Double) -> None:
    """By its ID; where no driver has it, the only driver."""
    older = Device("Apple of another kind", "", 6, cores=4)
    mine = M4_MAX._replace(cores=32)
    assert cores(double, older, mine) == "32 cores"
    assert cores(double, older, mine._replace(cores=None)) == ASSUMED
    assert cores(double, mine._replace(same_id=False)) == "32 cores"
    assert cores(double, older, mine._replace(same_id=False)) == ASSUMED


def test_the_planner_is_told(double: Double, recorder: Recorder) -> None:
    q, k = np.zeros((1, 1, 1, 64), np.float32), np.zeros((1, 16384, 1, 64), np.float32)
    parts = []
    for count in (1, 4):
        double.set_machine(devices=[M4_MAX._replace(cores=count)])
        umfa.flash_attn_func(q, k, k, backend="metal")
        made = plan(np.float32, q.shape, seqlen_kv=k.shape[1], family=9, cores=count)
        split = recorder.dispatches[-2]
        assert split.threadgroups == made["launches"][0]["grid"]
        parts.append(split.threadgroups[0])
    assert parts[1] == 4 * parts[0], "more cores, more parts"


def test_work_goes_to_the_device_that_was_taken(double: Double, recorder: Recorder) -> None:
    double.set_machine(devices=[PARAVIRTUAL, M4])
    x = np.zeros((1, 4, 1, 8), np.float32)
    umfa.flash_attn_func(x, x, x, backend="metal")
    assert len(recorder.dispatches) == 1


def test_a_tensor_on_another_device_is_refused(double: Double) -> None:
    double.set_machine(devices=[PARAVIRTUAL, M4])
    x = MetalTensor(double, np.zeros((1, 4, 2, 16), np.float32), device=0)
    with pytest.raises(
        ValueError, match=r"an input is in a buffer of another Metal device; got .*; expected Apple"
    ):
        umfa.flash_attn_func(x, x, x)
    y = MetalTensor(double, np.zeros((1, 4, 2, 16), np.float32), device=1)
    umfa.flash_attn_func(y, y, y)


def test_a_command_buffer_of_another_device_is_refused(double: Double) -> None:
    double.set_machine(devices=[PARAVIRTUAL, M4])
    x = MetalTensor(double, np.zeros((1, 4, 2, 16), np.float32), device=1)
    queue = double.library.umfa_double_new_queue_on(0)
    commands = double.library.umfa_double_new_command_buffer(queue)
    library = c_library()
    assert encode(library, commands, x, x, x, x) == VALUE_ERROR
    assert b"the command buffer is of another Metal device; got Apple Paravirtual" in (
        library.umfa_last_error()
    )
    double.library.umfa_double_object_release(commands)
    double.library.umfa_double_object_release(queue)


def test_what_a_stand_in_proves_is_not_kept_for_a_real_gpu() -> None:
    """A record of a self-test names the GPU, and the stand-in's may have the name of a real one."""
    folders = []
    for _ in range(2):
        with machine(Recorder(), self_test="1"):
            tests = umfa.self_test()
            assert tests
            assert not any(test.passed for test in tests)
            folders += {Path(test.kept).parent for test in tests}
    assert len(folders) == 2
    assert folders[0] != folders[1]
    assert not any(folder.exists() for folder in folders)
