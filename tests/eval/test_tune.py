"""tune.py: what it tries, what counts, that nothing ends it, and the commands to paste that it ends with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from argparse import Namespace

import inference
import pytest

import embed
import evidence
import tune
from conftest import SAMPLES

EAGER = {"dtype": "float32", "allow_hf32": False, "execution": "eager", "without": [], "with_levers": [], "batch_size": 1}
EAGER |= {"environment": {}}


@pytest.fixture(autouse=True)
def small_photos(monkeypatch):
    monkeypatch.setattr(tune.end_to_end, "DECODED", ((96, 64),))


@pytest.fixture
def broken_children(monkeypatch, tmp_path):
    """In child processes a batch of seven ends the process, as what is wrong with a device or a driver may."""
    code = """
import os
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch
real = torch.nn.functional.layer_norm
torch.nn.functional.layer_norm = lambda values, *rest: os._exit(9) if len(values) == 7 else real(values, *rest)
"""
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def search_for(monkeypatch, run, tiny_folder):
    """Run tune.py with a search of these points alone."""

    def run_search(points, *flags, device="cpu"):
        monkeypatch.setattr(tune, "search", lambda kind, batch, levers, measure, rows: measure(points))
        common = ("--model_path", tiny_folder, "--device", device, "--seconds", 0.01)
        return run(*common, *flags, main=tune.main, name="tuned")

    return run_search


def in_this_process(_code, given, _count, _limit_s, _environment):
    """ask_child where the process is not what is tested."""
    told = []
    tune.answer_points(json.loads(json.dumps(given, default=str)), told.append)
    yield from told


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
    done = run("--model_path", tiny_folder, "--device", "cpu", "--seconds", 0.01, *flags, main=tune.main, name="tuned")
    assert (done.code, asked) == (1, [batch])
    assert done.result["picks"] == done.result["commands"] == dict.fromkeys(tune.PICKS)
    assert "faithful: nothing was within its bar" in done.log


def test_the_search_may_leave_out_both_levers():
    rows = [row(size, 1.0, 1e-6) | EAGER | {"without": ["fused_attention"], "batch_size": size} for size in (1, 8)]
    points = tune.varied(rows, [{"without": ["folded_patches"]}])
    assert [point["without"] for point in points] == [["folded_patches", "fused_attention"]] * 2


# --- children ---


def test_what_breaks_the_bar_or_crashes_is_a_row_and_not_an_end(broken_children, search_for):
    points = [EAGER | change for change in ({"dtype": "float16"}, {"batch_size": 7}, {})]
    done = search_for(points, "--threshold_percent", 0.01)
    assert done.code == 0, done.terminal
    wrong, crashed, good = done.result["rows"]
    assert (good["status"], good["within_bar"]) == ("ok", True)
    assert good["device_name"].startswith(inference.cpu_name())
    assert good["relative_l2_error"] < 2e-6
    assert (wrong["status"], wrong["within_bar"]) == ("ok", False)
    assert 1e-4 < wrong["relative_l2_error"] < 1e-2
    assert (crashed["status"], crashed["reason"].split(":")[0]) == ("crashed", "exit code 9")
    assert done.result["picks"] == {"throughput": good, "latency": good, "faithful": good}
    outcomes = [row["outcome"].split(",")[0] for row in tune.tuned_rows(done.result)]
    assert outcomes == ["misses the bar", "crashed", "within the bar"]
    picked = "latency: Arithmetic: float32, Execution: eager, Levers: -, Environment: default, Batch: 1, "
    for line in ("Outcome: crashed (exit code 9: ", "=== Tuning Summary ===", picked):
        assert line in done.log
    assert [path.name for path in done.folder.iterdir()] == ["tuned_cpu.json"]


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


# --- the commands to paste ---


@pytest.fixture
def paste(monkeypatch, tmp_path):
    """Paste a command into a shell: embed.py's arguments and the variables that it would get."""
    script = tmp_path / "bin" / "python"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")

    def run_pasted(command: str) -> tuple[Namespace, dict[str, str]]:
        (first, *words), environment = json.loads(subprocess.run(["sh", "-c", command], capture_output=True, check=True).stdout)
        assert first == "embed.py"
        known = {name for variables in tune.ENVIRONMENTS.values() for name in variables}
        return embed.make_parser().parse_args(words), {name: environment[name] for name in known & environment.keys()}

    return run_pasted


def command_of(point, *flags, kind="npu"):
    args = tune.make_parser().parse_args(list(map(str, flags)))
    return tune.command_for(point, args, kind, args.model_path)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": "float16", "batch_size": 128, "execution": "graph"},
        {"allow_hf32": True, "without": ["fused_attention"]},
        {"dtype": "bfloat16", "without": ["folded_patches", "fused_attention"]},
        {"environment": {"TASK_QUEUE_ENABLE": "2", "CPU_AFFINITY_CONF": "1"}, "execution": "graph"},
        {"environment": {"CPU_AFFINITY_CONF": "1"}, "without": ["folded_patches"], "with_levers": ["fused_norms"]},
    ],
)
@pytest.mark.parametrize("own", [{}, {"TASK_QUEUE_ENABLE": "0", "OMP_NUM_THREADS": "3"}], ids=["bare", "variables set"])
def test_a_pasted_command_computes_as_its_point_did(paste, monkeypatch, change, own):
    """Also where the tuning's own shell had variables set, which the points were measured without."""
    for name in ("TASK_QUEUE_ENABLE", "CPU_AFFINITY_CONF", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    point = row(8, 0.5, 1e-6) | change
    args, environment = paste(command_of(point, "--device", "npu"))
    assert {name: getattr(args, name) for name in tune.POINT[:-1]} == {name: point[name] for name in tune.POINT[:-1]}
    kept = {name: value for name, value in own.items() if name not in tune.ENVIRONMENTS["npu"]}
    assert environment == point["environment"] | kept
    assert (args.device, args.model_path, args.random_weights) == ("npu", inference.DEFAULT_MODEL_PATH, False)


@pytest.mark.parametrize(
    "flags",
    [
        {"model_path": "weights/my 'own' model", "image_size": 448, "resize": "squash", "device": "npu:1"},
        {"random_weights": True, "device": "cuda"},
        {"trust_remote_code": True, "allow_unlocked": True, "resize": "256", "device": "cpu"},
    ],
)
def test_a_pasted_command_loads_the_model_that_was_tuned(paste, flags):
    words = [word for name, value in flags.items() for word in (f"--{name}", *([] if value is True else [value]))]
    args, _ = paste(command_of(row(8, 0.5, 1e-6), *words))
    assert {name: getattr(args, name) for name in flags} == flags


def test_the_device_that_auto_has_found_is_named(paste):
    assert paste(command_of(EAGER, kind="cuda"))[0].device == "cuda"


def test_each_pick_has_its_command_on_the_terminal_and_in_the_result(paste, search_for, tiny_folder, monkeypatch, tmp_path):
    """The recorded one shows no path of this machine, or the result would be no evidence."""
    one_thread = {"environment": {"OMP_NUM_THREADS": "1"}, "without": ["folded_patches"]}
    points = [EAGER | {"dtype": "bfloat16", "batch_size": 3}, EAGER | one_thread]
    monkeypatch.setattr(tune, "ask_child", in_this_process)
    done = search_for(points, "--threshold_percent", 50)
    assert done.code == 0, done.terminal
    printed = [line.split("] ")[1].strip() for line in done.log.splitlines() if " embed.py " in line]
    assert len(printed) == len(tune.PICKS) == len(done.result["commands"])
    for name, told in zip(tune.PICKS, printed, strict=True):
        pick = done.result["picks"][name]
        for command, path in ((told, str(tiny_folder)), (done.result["commands"][name], ".../tiny")):
            args, environment = paste(command)
            assert {what: getattr(args, what) for what in tune.POINT[:-1]} == {what: pick[what] for what in tune.POINT[:-1]}
            assert environment == pick["environment"] and args.model_path == path
    assert evidence.OWN_PATH.search(json.dumps(done.result["commands"])) is None

    (tmp_path / "photos").mkdir()
    shutil.copy(SAMPLES / "chelsea.jpg", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    words = printed[tune.PICKS.index("faithful")].partition(" embed.py ")[2].split()
    assert embed.main([*words, "--num_workers", "0", "--output_log", "log", "--results_dir", "results"]) == 0
    made_from = json.loads((tmp_path / "features" / "manifest.json").read_text())["made_from"]
    assert (made_from["dtype"], made_from["levers"]) == ("float32", ["stacked_qkv", "packed_weights"])
