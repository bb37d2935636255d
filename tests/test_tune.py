"""tune.py: what it tries, what counts, that nothing ends it; and --tuned, which uses what it found."""

from __future__ import annotations

import json
import os
import shutil

import inference
import numpy as np
import pytest
import torch

import tune
from conftest import SAMPLES, TESTS, run_script

PHOTO = next(SAMPLES.glob("*.jpg"))
EAGER = {"dtype": "float32", "allow_hf32": False, "execution": "eager", "without": [], "batch_size": 1}
# What the simulated NPU of the children does beside its usual: bfloat16 hangs, a graph's replay ends the process.
BROKEN = """
import time
replay, dispatch = npu_simulator.NPUGraph.replay, npu_simulator.dispatch
def look(operator, args, kwargs):
    if torch.bfloat16 in (kwargs.get("dtype"), *(getattr(arg, "dtype", arg) for arg in args)):
        time.sleep(600)
    return dispatch(operator, args, kwargs)
npu_simulator.dispatch = look
npu_simulator.NPUGraph.replay = lambda graph: os._exit(9)
"""


@pytest.fixture
def broken_children(monkeypatch, tmp_path):
    code = f"import os, sys\nos.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'\nsys.path.insert(0, {str(TESTS)!r})\n"
    (tmp_path / "sitecustomize.py").write_text(f"{code}import npu_simulator, torch\nnpu_simulator.install()\n{BROKEN}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def search_for(monkeypatch, run, tiny_folder):
    """Run tune.py with a search of these points alone."""

    def run_search(points, *flags, device="cpu", environment=None):
        monkeypatch.setattr(tune, "search", lambda kind, batch, levers, measure, rows: measure(points, environment or {}))
        common = ("--model_path", tiny_folder, "--device", device, "--seconds", 0.01)
        return run(*common, *flags, main=tune.main, name="tuned")

    return run_search


# --- errors and picks ---


def test_errors_are_over_all_tokens_and_of_the_worst_one():
    reference = np.array([[[3.0, 4.0], [0.0, 10.0]]])
    relative, worst = tune.errors(reference + np.array([[[0.0, 1.0], [0.0, 0.0]]]), reference)
    assert (relative, worst) == (pytest.approx(1 / 125**0.5), pytest.approx(0.2))


@pytest.mark.parametrize(
    ("relative", "worst", "fits"), [(0.01, 0.01, True), (0.001, 0.02, False), (0.02, 0.001, False), (None, 0.001, False)]
)
def test_both_errors_must_be_within_the_bar(relative, worst, fits):
    assert tune.within({"relative_l2_error": relative, "worst_token_relative_l2_error": worst}, 0.01) is fits


def row(batch_size, seconds, error, within_bar=True, **changes):
    rate = batch_size / seconds
    found = {"within_bar": within_bar, "status": "ok", "environment": {}, "median_time_s": seconds, "images_per_s": rate}
    return EAGER | found | {"relative_l2_error": error, "batch_size": batch_size} | changes


def test_the_fastest_within_the_bar_are_picked():
    exact, half = row(8, 0.5, 1e-6), row(8, 0.1, 1e-3, dtype="float16")
    one, slow = row(1, 0.05, 1e-3), row(1, 0.06, 1e-6)
    wrong, crashed = row(8, 0.001, 0.5, within_bar=False), EAGER | {"status": "crashed", "within_bar": False}
    rows = [crashed, wrong, slow, exact, one, half]
    assert tune.pick(rows) == {"throughput": half, "latency": one, "faithful": slow}
    assert tune.pick([crashed, wrong]) == {"throughput": None, "latency": None, "faithful": None}


def seconds_of(point, environment):
    """A machine whose best is known: float16 in graphs, without fused attention, queue 1, affinity 2, batch size 128."""
    seconds = {"float32": 4.0, "bfloat16": 2.5, "float16": 2.0}[point["dtype"]] * (0.9 if point["allow_hf32"] else 1)
    seconds *= 0.5 if point["execution"] == "graph" else 1.0
    seconds *= 0.8 if point["without"] == ["fused_attention"] else 1.0
    seconds *= {"1": 0.9}.get(environment.get("TASK_QUEUE_ENABLE"), 1.0) * {"2": 0.9}.get(
        environment.get("CPU_AFFINITY_CONF"), 1.0
    )
    return seconds * (point["batch_size"] + 10 + 0.001 * point["batch_size"] ** 2 / 2)


@pytest.mark.parametrize("batch", [64, 16])
def test_the_search_finds_the_best_without_trying_everything(batch):
    rows, asked = [], []

    def measure(points, environment):
        for point in points:
            asked.append(json.dumps([point, environment]))
            error = {"float32": 1e-4 if point["allow_hf32"] else 1e-6, "float16": 1e-3, "bfloat16": 0.05}[point["dtype"]]
            found = row(point["batch_size"], seconds_of(point, environment), error, error < 0.01)
            rows.append(found | point | {"environment": environment})

    tune.search("npu", batch, ("fused_attention", "folded_patches"), measure, rows)
    assert len(asked) == len(set(asked)) < 60
    picks = tune.pick(rows)
    around = {"TASK_QUEUE_ENABLE": "1", "CPU_AFFINITY_CONF": "2"}
    expected = {"execution": "graph", "without": ["fused_attention"], "environment": around, "allow_hf32": False}
    for name, dtype, size in (("throughput", "float16", 128), ("latency", "float16", 1), ("faithful", "float32", 128)):
        assert picks[name].items() >= (expected | {"dtype": dtype, "batch_size": size}).items(), name


# --- children ---


def test_what_breaks_the_bar_crashes_or_hangs_is_a_row_and_not_an_end(npu, broken_children, search_for):
    changes = [{}, {"dtype": "float16"}, {"execution": "graph"}, {"dtype": "bfloat16"}]
    flags = ("--threshold_percent", 0.01, "--point_limit", 10)
    done = search_for([EAGER | change for change in changes], *flags, device="npu")
    assert done.code == 0, done.terminal
    good, wrong, crashed, hung = done.result["rows"]
    assert (good["status"], good["within_bar"], good["device_name"]) == ("ok", True, npu.NAME)
    assert good["relative_l2_error"] < 2e-6
    assert (wrong["status"], wrong["within_bar"]) == ("ok", False)
    assert 1e-4 < wrong["relative_l2_error"] < 1e-2
    assert (crashed["status"], crashed["reason"].split(":")[0]) == ("crashed", "exit code 9")
    assert (hung["status"], hung["reason"]) == ("hung", "no answer within 10 s")
    assert done.result["picks"] == {"throughput": good, "latency": good, "faithful": good}
    assert [row["outcome"].split(",")[0] for row in tune.tuned_rows(done.result)] == [
        "within the bar",
        "misses the bar",
        "crashed",
        "hung",
    ]
    for line in ("crashed: {", "hung: {", "=== Tuning Summary ===", "--tuned latency: float32, eager, batch size 1"):
        assert line in done.log
    assert (done.folder / "tuned.json").exists()


def test_memory_that_runs_out_and_what_cannot_be_loaded_are_rows(monkeypatch, tmp_path, cpu, tiny, tiny_folder):
    args = tune.make_parser().parse_args(["--model_path", str(tiny_folder), "--device", "cpu", "--seconds", "0.01"])
    tune.Points(args, cpu, tmp_path)
    points = [EAGER, EAGER | {"batch_size": 2}, EAGER | {"execution": "graph"}]
    (tmp_path / "points.json").write_text(json.dumps({"args": vars(args) | {"device": "cpu"}, "points": points}))
    real = tune.measure_point

    def scarce(model, point, reference, seconds):
        if point["batch_size"] == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return real(model, point, reference, seconds)

    monkeypatch.setattr(tune, "measure_point", scarce)
    tune.run_points(str(tmp_path))
    ready, good, large, graph = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert (ready, good["status"]) == ({}, "ok")
    assert (large["status"], large["reason"].split(":")[0]) == ("out of memory", "RuntimeError")
    assert (graph["status"], "the CPU has no graphs" in graph["reason"]) == ("failed", True)


def test_an_interrupted_search_keeps_its_rows(monkeypatch, run, tiny_folder, tmp_path):
    def search(kind, batch, levers, measure, rows):
        measure([EAGER], {})
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "search", search)
    monkeypatch.setattr(
        tune.Points, "measure", lambda self, points, environment: iter([row(1, 0.5, 1e-6, worst_token_relative_l2_error=1e-6)])
    )
    done = run("--model_path", tiny_folder, "--device", "cpu", main=tune.main, name="tuned")
    assert done.code == 130
    assert (
        done.terminal.splitlines()[-1]
        == f"stopped; what was measured so far (1 rows) is in {done.folder}/tuned_partial_cpu.json"
    )
    assert (done.result["partial"], len(done.result["rows"])) == (True, 1)


# --- --tuned ---


@pytest.fixture(scope="module")
def tuning(tmp_path_factory, tiny_folder):
    """A tuning of the tiny model on one thread of the CPU, as tune.py writes it."""
    folder = tmp_path_factory.mktemp("tuning")
    with pytest.MonkeyPatch.context() as patch:
        points = [EAGER | {"batch_size": 3}, EAGER]
        patch.setattr(tune, "search", lambda kind, batch, levers, measure, rows: measure(points, {"OMP_NUM_THREADS": "1"}))
        flags = ["--model_path", tiny_folder, "--device", "cpu", "--seconds", 0.01, "--results_dir", folder]
        assert tune.main([*map(str, flags), "--output_log", str(folder / "log")]) == 0
    return folder / "tuned_cpu.json"


@pytest.fixture
def tuned(tuning, tmp_path, monkeypatch):
    """A copy of it where run() looks, and a process that has one thread too."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    copy = tmp_path / "results" / tuning.name
    copy.parent.mkdir()
    shutil.copy(tuning, copy)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield copy
    torch.set_num_threads(threads)


def change(path, edit):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_a_pick_is_used_and_said(tuned, run, tiny_folder, monkeypatch):
    change(tuned, lambda data: data["picks"]["latency"].update(dtype="bfloat16", without=["folded_patches"]))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu", "--tuned", "latency")
    assert done.code == 0, done.terminal
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert (done.result["dtype"], done.result["levers"]) == ("bfloat16", [])
    assert (done.result["tuned"]["for"], done.result["tuned"]["environment"]) == ("latency", {"OMP_NUM_THREADS": "1"})
    assert f"Tuned for latency by {tuned}" in done.log


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda data: data["picks"]["throughput"].update(device_name="Ascend910_9362"), "device: Ascend910_9362, not"),
        (lambda data: data["tuned_on"]["versions"].update(torch="2.9.0"), "versions: {'torch': '2.9.0'"),
        (lambda data: data["tuned_on"]["weights"]["sha256"].update({"model.safetensors": "0"}), "weights: "),
        (lambda data: data["tuned_on"].update({"image size": 448}), "image size: 448, not 64"),
    ],
    ids=["device", "versions", "weights", "image size"],
)
def test_a_tuning_of_something_else_is_refused_in_one_line(tuned, run, tiny_folder, edit, what):
    change(tuned, edit)
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu", "--tuned", "throughput")
    assert done.code == 2
    last = done.terminal.splitlines()[-1]
    assert last.startswith(f"error: --tuned: {tuned} is of another {what}")
    assert last.endswith("run again: python eval/tune.py --device cpu")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--device", "cpu"), "nothing was found for it yet; run first: python eval/tune.py --device cpu"),
        (("--device", "auto"), "name the device that was tuned"),
        (("--device", "cpu", "--random_weights"), "nothing was found for it yet"),
    ],
)
def test_without_a_tuning_the_way_to_one_is_said(run, tiny_folder, flags, message):
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--tuned", "faithful", *flags)
    assert done.code == 2
    assert message in done.terminal.splitlines()[-1]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="torch would use one thread in any case")
def test_the_picks_environment_is_there_before_torch(tuned, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    flags = ("--model_path", tiny_folder, "--device", "cpu", "--tuned", "throughput", "--results_dir", tuned.parent)
    done = run_script("inference.py", "--image_path", PHOTO, *flags, "--output_log", tmp_path / "log")
    assert done.returncode == 0, done.stderr
    assert json.loads((tuned.parent / "inference_cpu.json").read_text())["device_name"].endswith(", 1 threads")


def test_the_manual_names_what_can_be_picked():
    for module in (inference, tune):
        (action,) = (action for action in module.make_parser()._actions if action.dest == "tuned")
        assert tuple(action.choices) == tune.PICKS
