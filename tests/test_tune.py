"""tune.py: what it tries, what counts, that nothing ends it; and --tuned, which uses what it found."""

from __future__ import annotations

import json
import os
import shutil

import inference
import pytest
import torch

import tune
from conftest import SAMPLES, TESTS, run_script

PHOTO = next(SAMPLES.glob("*.jpg"))
EAGER = {"dtype": "float32", "allow_hf32": False, "execution": "eager", "without": [], "batch_size": 1, "environment": {}}
# What the simulated NPU of the children does beside its usual: a graph's replay ends the process.
BROKEN = "npu_simulator.NPUGraph.replay = lambda graph: os._exit(9)"


@pytest.fixture
def broken_children(monkeypatch, tmp_path):
    code = f"import os, sys\nos.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'\nsys.path.insert(0, {str(TESTS)!r})\n"
    (tmp_path / "sitecustomize.py").write_text(f"{code}import npu_simulator\nnpu_simulator.install()\n{BROKEN}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def search_for(monkeypatch, run, tiny_folder):
    """Run tune.py with a search of these points alone."""

    def run_search(points, *flags, device="cpu"):
        monkeypatch.setattr(tune, "search", lambda kind, batch, levers, measure, rows: measure(points))
        common = ("--model_path", tiny_folder, "--device", device, "--seconds", 0.01)
        return run(*common, *flags, main=tune.main, name="tuned")

    return run_search


# --- errors and picks ---


@pytest.mark.parametrize(
    ("relative", "worst", "fits"), [(0.01, 0.01, True), (0.001, 0.02, False), (0.02, 0.001, False), (None, 0.001, False)]
)
def test_both_errors_must_be_within_the_bar(relative, worst, fits):
    assert tune.within({"relative_l2_error": relative, "worst_token_relative_l2_error": worst}, 0.01) is fits


def row(batch_size, seconds, error, within_bar=True, **changes):
    rate = batch_size / seconds
    found = {"within_bar": within_bar, "status": "ok", "median_time_s": seconds, "images_per_s": rate}
    return EAGER | found | {"relative_l2_error": error, "batch_size": batch_size} | changes


def test_the_fastest_within_the_bar_are_picked():
    exact, half = row(8, 0.5, 1e-6), row(8, 0.1, 1e-3, dtype="float16")
    one, slow = row(1, 0.05, 1e-3), row(1, 0.06, 1e-6)
    wrong, crashed = row(8, 0.001, 0.5, within_bar=False), EAGER | {"status": "crashed", "within_bar": False}
    rows = [crashed, wrong, slow, exact, one, half]
    assert tune.pick(rows) == {"throughput": half, "latency": one, "faithful": slow}
    assert tune.pick([crashed, wrong]) == {"throughput": None, "latency": None, "faithful": None}


def seconds_of(point):
    """A machine whose best is known: float16 in graphs, without fused attention, queue 1, affinity 2, batch size 128."""
    seconds = {"float32": 4.0, "bfloat16": 2.5, "float16": 2.0}[point["dtype"]] * (0.9 if point["allow_hf32"] else 1)
    seconds *= 0.5 if point["execution"] == "graph" else 1.0
    seconds *= 0.8 if point["without"] == ["fused_attention"] else 1.0
    for variable, best in (("TASK_QUEUE_ENABLE", "1"), ("CPU_AFFINITY_CONF", "2")):
        seconds *= 0.9 if point["environment"].get(variable) == best else 1.0
    return seconds * (point["batch_size"] + 10 + 0.001 * point["batch_size"] ** 2 / 2)


@pytest.mark.parametrize("batch", [64, 16])
def test_the_search_finds_the_best_without_trying_everything(batch):
    rows, asked = [], []

    def measure(points):
        for point in points:
            asked.append(json.dumps(point))
            error = {"float32": 1e-4 if point["allow_hf32"] else 1e-6, "float16": 1e-3, "bfloat16": 0.05}[point["dtype"]]
            rows.append(row(point["batch_size"], seconds_of(point), error, error < 0.01) | point)

    tune.search("npu", batch, ("fused_attention", "folded_patches"), measure, rows)
    assert len(asked) == len(set(asked)) < 60
    picks = tune.pick(rows)
    around = {"TASK_QUEUE_ENABLE": "1", "CPU_AFFINITY_CONF": "2"}
    expected = {"execution": "graph", "without": ["fused_attention"], "environment": around, "allow_hf32": False}
    for name, dtype, size in (("throughput", "float16", 128), ("latency", "float16", 1), ("faithful", "float32", 128)):
        assert picks[name].items() >= (expected | {"dtype": dtype, "batch_size": size}).items(), name


@pytest.mark.parametrize(("flags", "batch"), [((), 8), (("--batch_size", 3), 3)])
def test_the_coarse_search_has_the_devices_batch_or_the_flags(monkeypatch, run, tiny_folder, flags, batch):
    asked = []
    monkeypatch.setattr(tune, "search", lambda kind, batch, levers, measure, rows: asked.append(batch))
    done = run("--model_path", tiny_folder, "--device", "cpu", *flags, main=tune.main, name="tuned")
    assert (done.code, asked) == (1, [batch])


def test_the_search_may_leave_out_both_levers():
    rows = [row(size, 1.0, 1e-6) | EAGER | {"without": ["fused_attention"], "batch_size": size} for size in (1, 8)]
    points = tune.varied(rows, [{"without": ["folded_patches"]}])
    assert [point["without"] for point in points] == [["folded_patches", "fused_attention"]] * 2


# --- children ---


def test_what_breaks_the_bar_or_crashes_is_a_row_and_not_an_end(npu, broken_children, search_for):
    points = [EAGER | change for change in ({"dtype": "float16"}, {"execution": "graph"}, {})]
    done = search_for(points, "--threshold_percent", 0.01, device="npu")
    assert done.code == 0, done.terminal
    wrong, crashed, good = done.result["rows"]
    assert (good["status"], good["within_bar"], good["device_name"]) == ("ok", True, npu.NAME)
    assert good["relative_l2_error"] < 2e-6
    assert (wrong["status"], wrong["within_bar"]) == ("ok", False)
    assert 1e-4 < wrong["relative_l2_error"] < 1e-2
    assert (crashed["status"], crashed["reason"].split(":")[0]) == ("crashed", "exit code 9")
    assert done.result["picks"] == {"throughput": good, "latency": good, "faithful": good}
    outcomes = [row["outcome"].split(",")[0] for row in tune.tuned_rows(done.result)]
    assert outcomes == ["misses the bar", "crashed", "within the bar"]
    picked = "--tuned latency: Arithmetic: float32, Execution: eager, Without: -, Environment: default, Batch: 1, "
    for line in ("Outcome: crashed (exit code 9: ", "=== Tuning Summary ===", picked):
        assert line in done.log
    assert (done.folder / "tuned.json").exists()


def test_each_environment_has_a_child_of_its_own_and_what_hangs_is_a_row(monkeypatch):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "7")
    asked = []

    def ask_child(code, given, count, limit_s, environment):
        asked.append(([point["batch_size"] for point in given["points"]], environment.get("TASK_QUEUE_ENABLE"), limit_s))
        assert count == 1 + len(given["points"])
        yield "ready"
        for point in given["points"]:
            if point["batch_size"] == 2:
                raise tune.ChildError("no answer in time", "no answer within 5 s")
            yield {"status": "ok"}

    monkeypatch.setattr(tune, "ask_child", ask_child)
    queue = {"environment": {"TASK_QUEUE_ENABLE": "2"}}
    points = [EAGER, EAGER | queue, *(EAGER | {"batch_size": size} for size in (2, 3)), EAGER | queue | {"batch_size": 4}]
    rows = list(tune.measure_points({"args": {"point_limit": 5.0}, "variables": ["TASK_QUEUE_ENABLE"]}, points))
    assert asked == [([1, 2, 3], None, 5.0), ([3], None, 5.0), ([1, 4], "2", 5.0)]
    assert [(row["batch_size"], row["status"]) for row in rows] == [
        (1, "ok"),
        (2, "no answer in time"),
        (3, "ok"),
        (1, "ok"),
        (4, "ok"),
    ]
    assert (rows[1]["reason"], rows[3]["environment"]) == ("no answer within 5 s", {"TASK_QUEUE_ENABLE": "2"})


def test_memory_that_runs_out_and_what_cannot_be_loaded_are_rows(monkeypatch, tmp_path, tiny_folder):
    args = tune.make_parser().parse_args(["--model_path", str(tiny_folder), "--device", "cpu", "--seconds", "0.01"])
    tune.save_reference(args, tmp_path / "reference.npy")
    points = [EAGER, EAGER | {"batch_size": 2}, EAGER | {"execution": "graph"}]
    real, told = tune.measure_point, []

    def scarce(model, point, reference, seconds):
        if point["batch_size"] == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return real(model, point, reference, seconds)

    monkeypatch.setattr(tune, "measure_point", scarce)
    tune.answer_points({"args": vars(args), "reference": tmp_path / "reference.npy", "points": points}, told.append)
    ready, good, large, graph = told
    assert (ready, good["status"]) == ("ready", "ok")
    assert (large["status"], large["reason"].split(":")[0]) == ("out of memory", "RuntimeError")
    assert (graph["status"], "the CPU has no graphs" in graph["reason"]) == ("failed", True)


def test_an_interrupted_search_keeps_its_rows(monkeypatch, run, tiny_folder, tmp_path):
    def search(kind, batch, levers, measure, rows):
        measure([EAGER])
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "search", search)
    found = row(1, 0.5, 1e-6, worst_token_relative_l2_error=1e-6)
    monkeypatch.setattr(tune, "measure_points", lambda given, points: iter([found]))
    done = run("--model_path", tiny_folder, "--device", "cpu", main=tune.main, name="tuned")
    assert done.code == 130
    last = done.terminal.splitlines()[-1]
    assert last == f"stopped; what was measured so far is in {done.folder}/tuned_partial_cpu.json"
    assert (done.result["partial"], len(done.result["rows"])) == (True, 1)


# --- --tuned ---


@pytest.fixture(scope="module")
def tuning(tmp_path_factory, tiny_folder):
    """A tuning of the tiny model on one thread of the CPU, as tune.py writes it."""
    folder = tmp_path_factory.mktemp("tuning")
    with pytest.MonkeyPatch.context() as patch:
        points = [EAGER | {"batch_size": size, "environment": {"OMP_NUM_THREADS": "1"}} for size in (3, 1)]
        patch.setattr(tune, "search", lambda kind, batch, levers, measure, rows: measure(points))
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
        (lambda data: data["tuned_on"]["versions"].update(torch="2.8.0"), "versions: {'torch': '2.8.0'"),
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
