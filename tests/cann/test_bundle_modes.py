"""inference.py and embed.py on the real torch_npu, in every mode, against the CPU's features; what they wait for; devices."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from bulk.levers import DEFAULT_LEVERS, LEVERS
from cann import bundle, harness, stacks
from cann.bundle import NAMES, Scene
from conftest import ROOT

ALL = ("--save_patch_tokens", "--save_pooler")
PARTS = ("--part_size", 5, "--batch_size", 2)
PLAIN, WHOLE = ("--without", *DEFAULT_LEVERS), ("--with", *LEVERS[len(DEFAULT_LEVERS) :])
GRAPH = ("--execution", "graph")
EXACT, HALF, BRAIN, ROUNDED = (0, 1e-6), (1e-4, 1e-2), (1e-3, 5e-2), (1e-5, 1e-2)  # least and most error


def worst(scene: Scene, found: dict[str, np.ndarray], image_size: int | None = None) -> float:
    """The largest error of any feature of any photo, against the CPU's in float32."""
    expected = bundle.on_the_cpu(scene.weights, NAMES, image_size)
    return max(bundle.apart(found[name], expected[name]) for name in NAMES)


def saved(folder: Path) -> dict[str, np.ndarray]:
    """All parts of a folder as one."""
    made = list(bundle.parts(folder).values())
    return {name: np.concatenate([part[name] for part in made]) for name, values in made[0].items() if values.ndim}


# --- every mode ---


@pytest.mark.parametrize("stack", stacks.STACKS)
@pytest.mark.parametrize(
    ("flags", "variables", "bar"),
    [
        ([], {}, EXACT),
        (["--deterministic", "--batch_size", 3], {"TASK_QUEUE_ENABLE": "0"}, EXACT),
        (["--batch_size", 1], {"TASK_QUEUE_ENABLE": "2"}, EXACT),
        (["--allow_hf32"], {}, ROUNDED),
        (["--dtype", "float16"], {}, HALF),
        (["--dtype", "bfloat16"], {}, BRAIN),
    ],
    ids=["plain", "deterministic-queue 0", "queue 2", "hf32", "float16", "bfloat16"],
)
def test_inference_gives_the_cpus_features(stack, scene, flags, variables, bar):
    done = scene.inference(*ALL, *flags, **variables)
    assert done.code == 0, done.err
    least, most = bar
    assert least <= worst(scene, np.load(scene.folder / "features.npz")) < most
    assert json.loads((scene.folder / "results" / "inference.json").read_text())["versions"]["torch_npu"] == stack


WAYS = {
    "eager": ([], {}, EXACT),
    "eager-queue 0": ([], {"TASK_QUEUE_ENABLE": "0"}, EXACT),
    "eager-queue 2": ([], {"TASK_QUEUE_ENABLE": "2"}, EXACT),
    "eager-no levers": (PLAIN, {}, EXACT),
    "eager-all levers": (WHOLE, {}, EXACT),
    "eager-all levers-float16": ([*WHOLE, "--dtype", "float16"], {}, HALF),
    "eager-hf32": (["--allow_hf32"], {}, ROUNDED),
    "graph": (GRAPH, {}, EXACT),
    "graph-queue 0": (GRAPH, {"TASK_QUEUE_ENABLE": "0"}, EXACT),
    "graph-all levers": ([*GRAPH, *WHOLE], {}, EXACT),
    "graph-float16": ([*GRAPH, "--dtype", "float16"], {}, HALF),
    "graph-all levers-bfloat16": ([*GRAPH, *WHOLE, "--dtype", "bfloat16"], {}, BRAIN),
}


@pytest.mark.parametrize("stack", stacks.STACKS)
@pytest.mark.parametrize("way", WAYS)
def test_embed_gives_the_cpus_features(stack, scene, way):
    flags, variables, (least, most) = WAYS[way]
    done = scene.embed(*ALL, *PARTS, *flags, **variables)
    assert done.code == 0, done.err
    found = saved(scene.folder / "features")
    assert least <= worst(scene, found) < most
    assert [Path(path).stem for path in found["path"]] == list("01234567")
    replays = done.operators("replayed")
    assert bool(replays) == ("graph" in way)
    assert "cannot be captured" not in done.err


@pytest.mark.parametrize("stack", stacks.STACKS)
@pytest.mark.parametrize(("flags", "variables"), [(PLAIN, {}), ([], {"TASK_QUEUE_ENABLE": "2"})], ids=["no levers", "queue 2"])
def test_what_is_known_not_to_be_captured_runs_eagerly_and_says_why(stack, scene, flags, variables):
    """Without levers 2.13.0 alone is tried, which a capture that fails would not cripple."""
    done = scene.embed(*ALL, *PARTS, *GRAPH, *flags, **variables)
    assert done.code == 0, done.err
    assert worst(scene, saved(scene.folder / "features")) < 1e-6
    tried = not variables and stack == "2.13.0"
    assert bool(done.calls("aclmdlRICaptureBegin")) == bool(done.operators("replayed")) == tried
    reason = "TASK_QUEUE_ENABLE=2 excludes graph capture" if variables else "before torch_npu 2.13 it is tried with"
    assert (f"cannot be captured as a graph ({reason}" in done.err) != tried


@pytest.mark.parametrize("stack", stacks.STACKS)
def test_another_size_and_more_layers(stack, scene):
    done = scene.embed(*ALL, *PARTS, *GRAPH, "--image_size", 96, "--layers", -1, 2)
    assert done.code == 0, done.err
    found = saved(scene.folder / "features")
    assert worst(scene, found, 96) < 1e-6
    expected = bundle.on_the_cpu(scene.weights, ("class_token_layer_2",), 96)
    assert bundle.apart(found["class_token_layer_2"], expected["class_token_layer_2"]) < 1e-6


# --- what was not waited for is stale ---

BATCHES = ("--part_size", 8, "--batch_size", 2)
SLOW = {
    "copies to the device": {"STANDIN_DELAY": "aclrtMemcpyAsync=20000"},
    "operators": {"STANDIN_DELAY": "aclnnAddmm=4000"},
    "the first operator": {"STANDIN_DELAY": "aclnnCast=20000,aclnnInplaceCopy=20000"},
    "the last operator": {"STANDIN_DELAY": "aclnnMean=30000"},
    "the host": {"STANDIN_STALL": "aclnnAddmm=2000"},
}


@pytest.mark.parametrize("execution", ["eager", "graph"])
@pytest.mark.parametrize("what", SLOW)
def test_whatever_is_slow_is_waited_for(scene, execution, what):
    done = scene.embed(*ALL, *BATCHES, "--execution", execution, **SLOW[what])
    assert done.code == 0, done.err
    assert worst(scene, saved(scene.folder / "features")) < 1e-6
    delayed = SLOW[what].get("STANDIN_DELAY") or SLOW[what]["STANDIN_STALL"]
    assert any(done.calls(name) for name in re.findall(r"acl\w+", delayed))


def test_a_stream_begins_once_what_it_takes_over_is_done(scene):
    """The passes before a capture run on a stream of their own; only copies to the device need not wait for anybody."""
    done = scene.embed(*BATCHES, *GRAPH)
    assert done.code == 0, done.err
    lines = [line.split()[:3] for line in done.trace if " stream=" in line]
    work = {"aclrtMemcpyAsync", "aclmdlRIExecuteAsync"}
    computing = {stream for name, stream, *state in lines if name.startswith("aclnn") and state == ["eager"]}
    last, waiting, moves = None, set(), 0
    for name, stream, *_state in lines:
        if name == "aclrtStreamWaitEvent":
            waiting.add(stream)
        elif stream in computing and (name in work or name.startswith("aclnn")):
            if last not in (None, stream):
                moves += 1
                assert stream in waiting, (name, stream)
            last = stream
            waiting.clear()
    assert moves == 2


TIMES = """
device = inference.open_device("npu")
x = torch.ones(4, device="npu")
inference.synchronize(device)
x + 1  # takes 0.4 s of the device's time, and is not part of what is timed
say(before=inference.time_once(device, lambda: None), inside=inference.time_once(device, lambda: x + 1))
"""


def test_a_time_is_that_of_what_is_timed_and_of_all_of_it(scene):
    prelude = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nimport inference\n" + harness.PRELUDE
    found = harness.run(scene.stack, TIMES, prelude=prelude, STANDIN_DELAY="aclnnAdds=400000").found
    assert found["before"] < 0.3 and found["inside"] >= 0.4
