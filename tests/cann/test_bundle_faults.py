"""What ends or shrinks a run on the real torch_npu: each way of being BLOCKED, lack of memory, captures that fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cann import bundle, harness, stacks
from cann.bundle import Scene
from conftest import ROOT

FEW = ("--part_size", 8, "--batch_size", 8)


def last_line(done: harness.Outcome) -> str:
    """Of what the bundle says: torch_npu and the stand-in print beside it, which starts otherwise."""
    return [line for line in done.err.splitlines() if line.startswith(("error: ", "BLOCKED: ", "20"))][-1]


# --- BLOCKED ---


def blocked(scene: Scene, *flags: object, **variables: str) -> str:
    """The reason why inference.py is BLOCKED: one line on the terminal, in the log and in the result."""
    done = scene.inference(*flags, **variables)
    assert done.code == 3, (done.code, done.err)
    line = last_line(done)
    assert line.startswith("BLOCKED: ") and done.err.count("BLOCKED") == 1
    assert f"[ERROR] {line}" in (scene.folder / "log").read_text()
    result = json.loads((scene.folder / "results" / "inference.json").read_text())
    assert result["status"] == "BLOCKED" and line.startswith(f"BLOCKED: {result['reason'].partition(' (')[0]}")
    assert not (scene.folder / "features.npz").exists()
    return line


@pytest.mark.parametrize("stack", stacks.STACKS)
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ASCEND_RT_VISIBLE_DEVICES": "1,0"}, ("ASCEND_RT_VISIBLE_DEVICES=1,0 is not in ascending order", "Set it to 0,1")),
        ({"ASCEND_RT_VISIBLE_DEVICES": "7"}, ("torch sees no NPU (ASCEND_RT_VISIBLE_DEVICES=7)", "npu-smi info")),
        ({"STANDIN_FAIL": "aclrtSetDevice=507033"}, ("CANN cannot start the device", "in alarm or in use")),
        ({"STANDIN_FAIL": "aclrtSetDevice=507899"}, ("the driver reports an error of its own", "davinci_manager")),
        ({"STANDIN_FAIL": "aclInit=500001"}, ("CANN's compiler cannot start", "numpy<2", "~/ascend/log")),
        ({"STANDIN_FAIL": "aclrtSetDevice=500001"}, ("CANN's compiler cannot start", "decorator")),
        (
            {"STANDIN_FAIL": "aclnnInplaceAdds=500001", "TASK_QUEUE_ENABLE": "0"},
            ("CANN's compiler cannot start", "protobuf"),
        ),
        ({"STANDIN_FAIL": "aclnnInplaceAdds=507015"}, ("npu:0 is listed but fails at first use (The Inner error",)),
        ({"STANDIN_DEVICE_BYTES": "1000"}, ("npu:0 is listed but fails at first use (NPU out of memory",)),
    ],
    ids=["order", "none visible", "in use", "driver", "500001-init", "500001-device", "500001-first", "first use", "memory"],
)
def test_a_device_that_cannot_be_used_is_blocked(stack, scene, variables, words):
    line = blocked(scene, **variables)
    assert [word for word in words if word not in line] == []


def test_a_device_past_the_last_is_blocked(scene):
    assert "there is no npu:2: torch sees 2 NPU(s). Use a number below 2" in blocked(scene, "--device", "npu:2")
    line = blocked(scene, "--device", "npu:1", ASCEND_RT_VISIBLE_DEVICES="1")
    assert "numbers count from 0 within ASCEND_RT_VISIBLE_DEVICES=1" in line


def test_without_cann_the_npu_is_blocked_and_the_cpu_is_not(scene, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    without = {"fresh": True, "seconds": 300, "LD_LIBRARY_PATH": str(empty)}
    line = blocked(scene, **without)
    assert "CANN is not installed or not set up (" in line and "set_env.sh" in line
    done = scene.inference("--device", "cpu", **without)
    assert done.code == 0, done.err


@pytest.mark.parametrize("stack", stacks.STACKS)
def test_a_compiler_that_cannot_start_blocks_2_9_0_alone(stack, scene):
    """The others start it at the first acl_op, and this bundle launches none."""
    rule = {"STANDIN_FAIL": "aclSetCompileopt=500001"}
    if stack == "2.9.0":
        assert "CANN's compiler cannot start" in blocked(scene, **rule)
    else:
        done = scene.inference(**rule)
        assert done.code == 0, done.err
        assert not done.calls("aclSetCompileopt")


# --- lack of memory ---


def features_of(scene: Scene, done: harness.Outcome) -> float:
    """The error of what embed.py wrote, against the CPU."""
    assert done.code == 0, done.err
    [part] = bundle.parts(scene.folder / "features").values()
    return max(bundle.apart(part[name], bundle.on_the_cpu(scene.weights)[name]) for name in bundle.NAMES[:2])


@pytest.mark.parametrize("stack", stacks.STACKS)
def test_a_model_that_does_not_fit_is_one_line(stack, scene):
    for run, flags in ((scene.inference, ["--image_size", 512]), (scene.embed, [])):  # alone, and with its levers
        done = run(*flags, STANDIN_DEVICE_BYTES="4000000")
        assert done.code == 2, done.err
        assert last_line(done) == "error: npu:0 has too little memory for the model; try --dtype float16"


SMALL = {"STANDIN_DEVICE_BYTES": "90000000"}
HUGE = "=99000000"  # bytes of workspace, which do not fit then
HALVED = "Out of memory on npu:0 with batch size 8: going on with 4"


@pytest.mark.parametrize("stack", stacks.STACKS)
@pytest.mark.parametrize("script", ["inference", "embed"])
def test_a_workspace_that_does_not_fit_halves_the_batch_and_changes_nothing_else(stack, scene, script):
    rule = SMALL | {"STANDIN_WORKSPACE": f"aclnnAddmm:9{HUGE}"}
    if script == "embed":
        done = scene.embed(*FEW, **rule)
        assert features_of(scene, done) < 1e-6
    else:
        done = scene.inference(**rule)
        assert done.code == 0, done.err
        found, exact = np.load(scene.folder / "features.npz"), bundle.on_the_cpu(scene.weights)
        assert all(bundle.apart(found[name], exact[name]) < 1e-6 for name in bundle.NAMES[:2])
    assert done.err.count("Out of memory") == 1 and HALVED in done.err


@pytest.mark.parametrize("stack", stacks.STACKS)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(stack, scene):
    """By its own tensors: 260 KB for each photo in the widest, and from 1 MiB on torch_npu asks for 20."""
    done = scene.inference("--image_size", 256, STANDIN_DEVICE_BYTES="16000000")
    assert done.code == 0, done.err
    assert HALVED in done.err
    found, exact = np.load(scene.folder / "features.npz"), bundle.on_the_cpu(scene.weights, bundle.NAMES[:2], 256)
    assert all(bundle.apart(found[name], exact[name]) < 1e-6 for name in bundle.NAMES[:2])


@pytest.mark.parametrize("stack", stacks.STACKS)
def test_one_image_that_does_not_fit_ends_the_run(stack, scene):
    done = scene.embed(*FEW, **SMALL, STANDIN_WORKSPACE=f"aclnnAddmm{HUGE}")
    assert done.code == 2
    line = last_line(done)
    assert line.startswith("error: out of memory on npu:0 with a single image: use --dtype float16, or free the device")
    assert bundle.parts(scene.folder / "features") == {}
    assert [f"size {size}: going on" in done.err for size in (8, 4, 2)] == [True] * 3


@pytest.mark.parametrize("stack", stacks.STACKS)
@pytest.mark.parametrize("where", ["before", "inside"])
def test_memory_that_runs_out_around_a_capture(stack, scene, where):
    """What runs out of memory inside a capture cripples torch_npu 2.9, as any that fails; eager passes come before it."""
    flags = ("--execution", "graph", *FEW)
    trace = scene.embed(*flags, "--output", "healthy").trace
    begin = next(place for place, line in enumerate(trace) if line.startswith("aclmdlRICaptureBegin"))
    before = sum(line.startswith("aclnnAddmm ") for line in trace[:begin])
    call = 2 if where == "before" else before + 3
    done = scene.embed(*flags, **SMALL, STANDIN_WORKSPACE=f"aclnnAddmm:{call}{HUGE}")
    assert len(done.calls("aclmdlRICaptureBegin")) == (2 if (where, stack) == ("inside", "2.13.0") else 1)
    if where == "before" or stack == "2.13.0":
        assert features_of(scene, done) < 1e-6
        assert HALVED in done.err and done.operators("replayed")
    else:
        assert done.code == 2, done.err
        assert last_line(done).startswith("error: the forward pass cannot be captured as a graph (NPU out of memory")
        assert "run again with --execution eager" in last_line(done)


@pytest.mark.parametrize("stack", stacks.STACKS)
@pytest.mark.parametrize("rule", [{"STANDIN_HOST_BYTES": "0"}, {"STANDIN_FAIL": "aclrtMallocHost:2=207001"}])
def test_host_memory_that_cannot_be_set_aside(stack, scene, rule):
    """None at all: copies wait for each other. Less than a batch takes: a smaller batch."""
    done = scene.embed(*FEW, **rule)
    assert features_of(scene, done) < 1e-6
    assert (HALVED in done.err) == ("STANDIN_FAIL" in rule)


@pytest.mark.parametrize("stack", stacks.STACKS)
def test_queue_2_and_a_workspace_that_does_not_fit_is_named_as_lack_of_memory(stack, scene):
    done = scene.embed(*FEW, **SMALL, TASK_QUEUE_ENABLE="2", STANDIN_WORKSPACE=f"aclnnAddmm:9{HUGE}")
    assert done.code == 70, done.err
    line = last_line(done)
    assert "failed on the device, after which torch_npu computes nothing more" in line
    assert "may be for lack of memory: use a smaller --batch_size, or TASK_QUEUE_ENABLE=1" in line
    assert bundle.parts(scene.folder / "features") == {}


# --- captures ---


@pytest.mark.parametrize("stack", stacks.STACKS)
@pytest.mark.parametrize("call", ["aclmdlRICaptureBegin", "aclmdlRICaptureEnd"])
def test_a_capture_that_fails_ends_a_run_on_2_9_and_costs_2_13_the_graph_alone(stack, scene, call):
    done = scene.embed(*FEW, "--execution", "graph", STANDIN_FAIL=f"{call}:1=107025")
    told = "the forward pass cannot be captured as a graph ("
    if stack == "2.13.0":
        assert features_of(scene, done) < 1e-6
        assert done.err.count(told) + done.err.count(told.capitalize()) == 1 and "going on with eager execution" in done.err
        assert not done.operators("replayed")
    else:
        assert done.code == 2, done.err
        line = last_line(done)
        assert line.startswith(f"error: {told}") and "run again with --execution eager" in line
        assert bundle.parts(scene.folder / "features") == {}
        again = scene.embed(*FEW)
        assert features_of(scene, again) < 1e-6


# --- devices ---


def test_the_device_that_was_asked_for_computes(scene):
    for device, variables, place in (
        ("npu:1", {}, 1),
        ("npu", {"ASCEND_RT_VISIBLE_DEVICES": "0,1", "LOCAL_RANK": "1"}, 1),
        ("npu", {"ASCEND_RT_VISIBLE_DEVICES": "1"}, 0),
        ("auto", {}, 0),
    ):
        done = scene.inference("--device", device, **variables)
        assert done.code == 0, done.err
        assert f"Device: npu:{place}, Ascend910_9362, stand-in for CANN" in done.err
        used = {line.split()[1] for line in done.calls("aclrtSetDevice")}
        assert f"device={place}" in used and (place == 0 or used == {f"device={place}"}), used


def test_two_processes_of_torchrun_share_the_parts_and_the_devices(scene):
    words = ["--model_path", scene.weights, "--device", "npu", "--results_dir", "results", "--output_log", "log"]
    words += ["--image_path", bundle.photos(), "--output", "features", "--num_workers", 0, "--part_size", 3]
    start = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", "0"]
    done = harness.python(scene.stack, scene.folder, *map(str, [*start, ROOT / "embed.py", *words]))
    assert done.code == 0, done.err
    made = bundle.parts(scene.folder / "features")
    assert len(made) == 3
    exact = bundle.on_the_cpu(scene.weights)
    for name in bundle.NAMES[:2]:
        assert bundle.apart(np.concatenate([part[name] for part in made.values()]), exact[name]) < 1e-6
    log = (scene.folder / "log").read_text()
    assert "Rank 0 of 2" in log and "Rank 1 of 2" in log
    assert "Device: npu:0, " in log and "Device: npu:1, " in log


def test_half_precision_that_saturates_unseen_is_refused(scene):
    done = scene.inference("--dtype", "float16", INF_NAN_MODE_FORCE_DISABLE="1")
    assert done.code == 2
    assert last_line(done).startswith("error: INF_NAN_MODE_FORCE_DISABLE=1 lets float16 saturate unseen")
    assert Path(scene.folder / "features.npz").exists() is False
