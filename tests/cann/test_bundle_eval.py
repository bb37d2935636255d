"""The evaluations whole, on the real torch_npu over the stand-in; and that nothing of it can pass for an NPU's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import inference
import pytest

import tables
from bulk.levers import DEFAULT_LEVERS
from cann import bundle, harness
from cann.bundle import Scene
from conftest import ROOT

PERFORMANCE = ("--num_runs", 2, "--warmup", 1, "--rounds", 1, "--turn_seconds", 0.05)


def result(scene: Scene, name: str) -> dict:
    return json.loads((scene.folder / "results" / f"{name}.json").read_text())


# --- each of them ---


def test_accuracy_passes_and_blames_what_torch_npu_leaves(scene):
    """HF32 and the tanh GELU, if nobody keeps them off: in the patch embedding and the first layer's MLP."""
    done = scene.run("eval/eval_accuracy.py", "--sweep", "--views", 0, "--probe", 0, "--image_path", bundle.photos())
    assert done.code == 0, done.err
    found = result(scene, "accuracy_eval")
    assert found["last_hidden_state"]["relative_l2_error"] < 2e-6
    assert inference.STAND_IN in found["device_name"]
    assert "patch embedding" in done.err and "layer 1 MLP" in done.err


@pytest.mark.parametrize("rows", ["", "@1-2"])
def test_accuracy_names_the_layer_of_a_planted_error(scene, rows):
    done = scene.run(
        *("eval/eval_accuracy.py", "--views", 0, "--probe", 0, "--image_path", bundle.photos()),
        STANDIN_WRONG=f"aclnnGeluV2:2%3{rows}=1e-3",
    )
    stages = {row["stage"]: row["own_relative_l2_error"] for row in result(scene, "accuracy_eval")["stages"]}
    assert max(stages, key=stages.get) == "layer 2 MLP", (done.err, stages)


def test_performance_measures_eager_and_a_graph(scene):
    for execution in ("eager", "graph"):
        done = scene.run("eval/eval_performance.py", "--batch_sizes", 1, 2, "--execution", execution, *PERFORMANCE)
        assert done.code == 0, done.err
        found = result(scene, "performance_eval")
        assert [row["batch_size"] for row in found["results"]] == [1, 2]
        assert all(row["throughput_img_s"] > 0 for row in found["results"])
        assert bool(done.operators("replayed")) == (execution == "graph")


def test_times_include_what_the_device_still_has_to_do(scene):
    """25 ms of the stream's time in each forward pass, of which the host needs none."""
    slow = {"STANDIN_DELAY": "aclnnMean=25000"}
    done = scene.run("eval/eval_performance.py", "--batch_sizes", 1, *PERFORMANCE, **slow)
    assert done.code == 0, done.err
    assert all(row["p50_s"] >= 0.025 for row in result(scene, "performance_eval")["results"])
    done = scene.inference(**slow)
    assert done.code == 0, done.err
    assert all(seconds >= 0.025 for seconds in result(scene, "inference")["inference_times_s"])


def test_a_batch_size_that_does_not_fit_is_a_row_and_the_rest_goes_on(scene):
    done = scene.run(
        *("eval/eval_performance.py", "--image_size", 256, "--batch_sizes", 1, 64, 2, *PERFORMANCE),
        STANDIN_DEVICE_BYTES="50000000",
    )
    assert done.code == 0, done.err
    one, many, two = result(scene, "performance_eval")["results"]
    assert many["out_of_memory"] is True and "out of memory" in many["reason"]
    assert one["throughput_img_s"] > 0 and two["throughput_img_s"] > 0


SEARCH = """
import tune
POINT = {{"dtype": "float32", "allow_hf32": False, "execution": "eager", "without": [], "with_levers": [],
          "batch_size": 1, "environment": {{}}}}
tune.search = lambda kind, batch, levers, measure, rows: measure([POINT | change for change in {changes}])
"""


def tune(scene: Scene, changes: list[dict], *flags: object, **options: object) -> harness.Outcome:
    before = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'eval')!r}]\n" + SEARCH.format(changes=changes)
    return scene.run("eval/tune.py", "--seconds", 0.01, *flags, before=before, **options)


def test_the_tuner_picks_among_points_of_every_kind(scene):
    changes = [{}, {"execution": "graph"}, {"without": list(DEFAULT_LEVERS)}, {"environment": {"TASK_QUEUE_ENABLE": "2"}}]
    changes += [{"dtype": "float16", "with_levers": ["fused_mlp"]}, {"allow_hf32": True}]
    done = tune(scene, changes, "--threshold_percent", 0.1)
    assert done.code == 0, done.err
    found = result(scene, "tuned")
    assert [row["status"] for row in found["rows"]] == ["ok"] * 6, done.err
    errors = {row["dtype"] + str(row["allow_hf32"]): row["relative_l2_error"] for row in found["rows"]}
    assert errors["float32False"] < 2e-6 < errors["float32True"] < 1e-2 > errors["float16False"] > 1e-4
    assert found["picks"]["faithful"]["relative_l2_error"] < 2e-6
    assert f"--device npu --dtype {found['picks']['throughput']['dtype']}" in found["commands"]["throughput"]


def test_after_a_lost_device_the_next_point_has_a_process_of_its_own(scene):
    """The fault strikes each process's 40th product: in the second of two points that share one."""
    changes = [{"execution": "graph"}, {}, {"batch_size": 2}]
    done = tune(scene, changes, STANDIN_FAIL="aclmdlRIExecuteAsync:3=507015")
    assert done.code == 0, done.err
    lost, *others = result(scene, "tuned")["rows"]
    assert lost["status"] != "ok" and [row["status"] for row in others] == ["ok", "ok"]
    assert all(row["relative_l2_error"] < 2e-6 for row in others)


# --- it never passes for an NPU's ---

COPY = """
import sys
from pathlib import Path
root = Path.cwd()
sys.path[:0] = [str(root), str(root / "eval")]
for name in [name for name in sys.modules if name.partition(".")[0] in ("inference", "embed", "bulk")]:
    del sys.modules[name]  # the copy's own
import inference
assert inference.ROOT == root
inference.LoadedModel.is_evidence = True  # as if these were the card's weights
"""
PUBLISH = """
script, *words = sys.argv[1:]
module = inference if script == "inference.py" else __import__(Path(script).stem)
sys.argv = [script, *words]
inference.leave(module.main())
"""


@pytest.mark.parametrize("script", ["inference.py", "eval/eval_performance.py"])
def test_what_ran_on_the_stand_in_is_a_trial_whatever_the_flags(scene, script):
    photo = "assets/samples/chelsea.jpg"
    flags = {"inference.py": ("--image_path", photo), "eval/eval_performance.py": ("--batch_sizes", 1, *PERFORMANCE)}
    root = copy_bundle(scene.folder / "bundle")
    shutil.copytree(scene.weights, root / "weights" / "tiny")
    words = [script, "--model_path", "weights/tiny", "--device", "npu", "--publish", *flags[script]]
    done = harness.python(scene.stack, root, "-c", COPY + PUBLISH, *map(str, words))
    assert done.code == 0, done.err
    name = "inference.json" if script == "inference.py" else "performance_eval.json"
    path = root / "results" / "trial" / name
    assert json.loads(path.read_text())["device_name"] == "Ascend910_9362, stand-in for CANN"
    assert not (root / "results" / name).exists()
    assert {path.parent.name for path in (root / "logs").rglob("*.log")} == {"trial", "published"}
    assert done.err.count("This is a stand-in for CANN: no NPU, and no evidence for one") == 1

    shutil.copy(path, root / "results" / name)  # somebody puts it into place by hand
    command = [sys.executable, str(root / "eval" / "evidence.py"), "--check"]
    checked = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    told = f"error: results/{name}: made on the stand-in for CANN, which is no evidence; remove it"
    assert checked.returncode == 2 and checked.stderr.startswith(told), checked.stderr


def copy_bundle(folder: Path) -> Path:
    """The bundle without results of its own, with a place for weights, under git."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", ".ci", "__pycache__", "*_cache", "trial", "features*", "tests", "*.png", "weights"
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    for path in [*folder.glob("results/*.json"), *folder.glob("logs/*.log")]:
        if path.name not in ("install_resolution.json", "torch_npu_check.json"):
            path.unlink()
    (folder / "weights").mkdir()
    shutil.copy(ROOT / "weights" / "README.md", folder / "weights")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True)
    return folder


# --- all in one go ---

FEW = {
    "accuracy": ("--sweep", "--views", "0", "--probe", "0", "--image_path", "assets/samples/chelsea.jpg"),
    "inference": ("--image_path", "assets/samples/chelsea.jpg", "assets/samples/rocket.jpg"),
    "colours": ("--image_path", "assets/samples/chelsea.jpg", "assets/samples/rocket.jpg"),
    "performance": (
        *("--end_to_end", "2", "--num_runs", "2", "--warmup", "1", "--rounds", "1", "--batch_sizes", "1"),
        *("--turn_seconds", "0.1", "--megapixels", "0.1", "0.2"),
    ),
}

# Sentences that are true only until an NPU has run, in both languages.
BEFORE = r"not measured|BLOCKED|no NPU figure|so far|missing|未测量|缺少|尚未|尚无"

# Runs submit.py with short steps in one process, where nothing tells the stand-in from an NPU: the page then speaks of one.
ONE_GO = """
import importlib
inference.is_stand_in = lambda: False
import end_to_end, eval_performance, evidence, submit
evidence.refuse = lambda *_: None  # what it ran is a tiny model
few = {few}
submit.STEPS = [step._replace(arguments=few.get(step.name, step.arguments)) for step in submit.STEPS if step.name != "tuning"]
def run(step, arguments):
    sys.argv[:] = [str(root / step.script), *arguments]
    return importlib.import_module(Path(step.script).stem).main(arguments)
submit.run = run
eval_performance.MAX_WARMUP_S = 0.1
eval_performance.measure_power = lambda *_, **__: None
eval_performance.measure_deterministic_cost = lambda *_, **__: None
eval_performance.measure_peers = lambda *_, **__: iter(())
cold = {{column.key: 1.5 for column in end_to_end.COLD_COLUMNS}}
end_to_end.measure_cold_start = lambda *_, **__: cold
sys.argv = ["submit.py"]
code = submit.main(["--device", "npu", "--model_path", "weights/tiny", "--publish"])
inference.leave(code)
"""


def generated(root: Path, name: str) -> dict[str, str]:
    text = (root / name).read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- evidence:(\w+) -->\n(.*?)<!-- /evidence:\1 -->", text, re.DOTALL))


def test_all_in_one_go_and_nothing_on_the_page_contradicts_its_figures(scene):
    """Sentences that depend on a result stand between markers only, and after the run each of them tells of it."""
    root = copy_bundle(scene.folder / "bundle")
    shutil.copytree(scene.weights, root / "weights" / "tiny")
    done = harness.python(scene.stack, root, "-c", COPY + ONE_GO.format(few=FEW), seconds=300)
    assert done.code == 0, (done.out[-3000:], done.err[-3000:])
    steps = json.loads((root / "results" / "trial" / "submit.json").read_text())
    assert {name: row["outcome"] for name, row in steps.items()} == dict.fromkeys(
        ("environment", "inference", "colours", "accuracy", "performance", "page"), "done"
    )
    end = done.out.partition("performance  done")[2]
    for words in ("| NPU inference output | **runs**", "error below 1% | **PASS**", "| Performance evidence | best"):
        assert words in end
    assert len(json.loads((root / "results" / "pca.json").read_text())["colours_hex"]) == 2
    assert (root / "assets" / "inference_result.png").is_file()
    results = {stem: json.loads((root / "results" / f"{stem}.json").read_text()) for stem in tables.CHECKS}
    assert results["performance_eval"]["end_to_end"]["folder"]["rows"]
    for name in ("README.md", "README.zh.md"):
        check_page(root, name, results)


def check_page(root: Path, name: str, results: dict[str, dict]) -> None:
    blocks = generated(root, name)
    assert set(blocks) == set(tables.TABLES)
    for block in ("audit", "accuracy", "performance"):
        found = [line for line in blocks[block].splitlines() if re.search(BEFORE, line)]
        assert found == [], block
    best = max(row["throughput_img_s"] for row in results["performance_eval"]["results"])
    for block in ("audit", "performance"):
        assert f"{best:.2f}" in blocks[block]
    assert f"{results['inference']['throughput_img_s']:.2f}" in blocks["audit"]
    assert f"{results['accuracy_eval']['last_hidden_state']['relative_l2_error']:.2e}" in blocks["accuracy"]
    assert "logs/performance_eval.log" in blocks["log"] and "_cpu" not in blocks["log"]
    prose = re.sub(r"(<!-- evidence:(\w+) -->).*?<!-- /evidence:\2 -->", "", (root / name).read_text("utf-8"), flags=re.DOTALL)
    prose = re.sub(r"```.*?```|`[^`]*`", "", prose, flags=re.DOTALL)  # a message that is explained is no claim
    says = re.compile(
        r"not measured|no NPU figure|exists so far|has not run|未测量|尚无|尚未测|\d (img|images)/s|\d (图片|张)/秒"
    )
    assert [line for line in prose.splitlines() if says.search(line)] == []


def test_submit_runs_each_step_as_a_process_of_its_own_and_publishes_nothing(scene):
    root = copy_bundle(scene.folder / "bundle")
    shutil.copytree(scene.weights, root / "weights" / "tiny")
    code = f"""
few = {{"inference": {FEW["inference"]}}}
import submit
submit.STEPS = [step._replace(arguments=few[step.name]) for step in submit.STEPS if step.name in few]
inference.leave(submit.main(["--model_path", "weights/tiny", "--publish"]))
"""
    done = harness.python(scene.stack, root, "-c", COPY + code, fresh=True, seconds=300)
    assert done.code == 0, (done.out[-3000:], done.err[-3000:])
    assert "\ninference    done" in done.out
    made = {str(path.relative_to(root)) for path in root.glob("results/**/*.json")}
    assert "results/trial/inference.json" in made and "results/inference.json" not in made
