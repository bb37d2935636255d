"""The whole evaluation in one go: on the simulated NPU, end to end included, and with steps that fail."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import inference
import pytest
import torch

import end_to_end
import env_check
import eval_performance
import evidence
import stacks
import submit
import tables
from conftest import ROOT

FEW = {
    "accuracy": ("--sweep", "--views", "0", "--probe", "0", "--image_path", "assets/samples/chelsea.jpg"),
    "inference": ("--image_path", "assets/samples/chelsea.jpg", "assets/samples/rocket.jpg", "--pca", "picture.png"),
    "performance": (
        *("--end_to_end", "2", "--num_runs", "2", "--warmup", "1", "--rounds", "1", "--batch_sizes", "1"),
        *("--turn_seconds", "0.1", "--megapixels", "0.1", "0.2"),
    ),
}
# Sentences that are true only until an NPU has run, in both languages.
BEFORE = r"not measured|BLOCKED|no NPU figure|so far|missing|未测量|缺少|尚未|尚无"


def copy_bundle(folder: Path) -> Path:
    """The bundle without results of its own, with a tiny model's place for weights, under git."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", ".ci", "__pycache__", "*_cache", "trial", "features*", "tests", "*.png", "weights"
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    for path in [*folder.glob("results/*.json"), *folder.glob("logs/*.log")]:
        if path.name != "install_resolution.json":
            path.unlink()
    (folder / "weights").mkdir()
    shutil.copy(ROOT / "weights" / "README.md", folder / "weights")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True)
    return folder


def outcomes(root: Path) -> dict[str, str]:
    steps = json.loads((root / "results" / "trial" / "submit.json").read_text())
    return {name: row["outcome"] for name, row in steps.items()}


def generated(root: Path, name: str) -> dict[str, str]:
    text = (root / name).read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- evidence:(\w+) -->\n(.*?)<!-- /evidence:\1 -->", text, re.DOTALL))


def in_process(step: submit.Step, arguments: Sequence[str]) -> int:
    sys.argv[:] = [str(inference.ROOT / step.script), *arguments]
    return importlib.import_module(Path(step.script).stem).main(arguments)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory, tiny_folder) -> SimpleNamespace:
    """A bundle in which the one-go command has run on the simulated NPU with a tiny checkpoint, in this process.

    Played are what takes processes of its own or looks at a real card: the cold start, power, the cost of determinism, tuning.
    """
    why = "this torch cannot register a device from Python"
    simulator = pytest.importorskip("npu_simulator", reason=why, exc_type=ImportError)
    root = copy_bundle(tmp_path_factory.mktemp("one_go") / "bundle")
    shutil.copytree(tiny_folder, root / "weights" / "tiny")
    cold = {column.key: 1.5 for column in end_to_end.COLD_COLUMNS}
    simulator.install()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as shown:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["submit.py"])
        for module in (inference, env_check):
            patch.setattr(module, "ROOT", root)
        patch.setattr(submit, "run", in_process)
        steps = [step._replace(arguments=FEW.get(step.name, step.arguments)) for step in submit.STEPS if step.name != "tuning"]
        patch.setattr(submit, "STEPS", steps)
        patch.setattr(evidence, "refuse", lambda *_: None)  # a simulated NPU is no evidence
        patch.setattr(eval_performance, "MAX_WARMUP_S", 0.1)
        patch.setattr(eval_performance, "measure_power", lambda *_, **__: None)
        patch.setattr(eval_performance, "measure_deterministic_cost", lambda *_, **__: None, raising=False)
        patch.setattr(end_to_end, "measure_cold_start", lambda *_, **__: cold)
        code = submit.main(["--device", "npu", "--model_path", "weights/tiny", "--publish"])
    simulator.reset()
    sys.modules.pop("torch_npu", None)
    torch.use_deterministic_algorithms(False)
    shown.flush()
    return SimpleNamespace(root=root, code=code, shown=shown.buffer.getvalue().decode())


def test_all_steps_run_on_the_simulated_npu_and_the_audit_stands_on_the_terminal(simulated):
    assert simulated.code == 0
    assert outcomes(simulated.root) == dict.fromkeys(("environment", "inference", "accuracy", "performance", "page"), "done")
    end = simulated.shown.partition("performance  done")[2]
    for words in ("| Inference | **runs**", "| Accuracy | **PASS**", "| Performance | best"):
        assert words in end
    assert json.loads((simulated.root / "results" / "performance_eval.json").read_text())["end_to_end"]["folder"]["rows"]


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_nothing_on_the_page_contradicts_the_new_figures(simulated, name):
    """Sentences that depend on a result stand between markers only, and after the run each of them tells of it."""
    root = simulated.root
    blocks = generated(root, name)
    assert set(blocks) == set(tables.TABLES)
    for block in ("audit", "accuracy", "performance", "rates"):
        found = [line for line in blocks[block].splitlines() if re.search(BEFORE, line)]
        assert found == [], block
    results = {stem: json.loads((root / "results" / f"{stem}.json").read_text()) for stem in tables.CHECKS}
    best = max(row["throughput_img_s"] for row in results["performance_eval"]["results"])
    for block in ("audit", "performance", "rates"):
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


# --- steps that fail ---


@pytest.fixture
def stand_ins(tmp_path, monkeypatch) -> Path:
    """A bundle of scripts that say that they ran, and end as the file `ends` tells: an exit code, or killed."""
    (tmp_path / "eval").mkdir()
    code = (
        "import os, pathlib, sys\n"
        "name = pathlib.Path(__file__).stem\n"
        "open('ran', 'a').write(f'{name} {sys.argv[1:]}\\n')\n"
        "end = dict(line.split() for line in open('ends')).get(name, '0')\n"
        "os.kill(os.getpid(), 9) if end == 'killed' else sys.exit(int(end))\n"
    )
    for step in submit.STEPS:
        (tmp_path / step.script).write_text(code)
    (tmp_path / "ends").write_text("")
    (tmp_path / "weights" / "w").mkdir(parents=True)
    (tmp_path / "weights" / "w" / "model.safetensors").write_text("weights")
    monkeypatch.setattr(inference, "ROOT", tmp_path)
    return tmp_path


ALL = ["env_check", "inference", "eval_accuracy", "eval_performance", "tune", "evidence"]


def ran(root: Path) -> list[str]:
    return [line.split()[0] for line in (root / "ran").read_text().splitlines()]


@pytest.mark.parametrize(
    ("ends", "code", "words"),
    [
        ("inference 3", 3, {"inference": "BLOCKED"}),
        ("eval_accuracy 1", 1, {"accuracy": "FAIL"}),
        (
            "inference 3\neval_accuracy 1\neval_performance killed",
            70,
            {"inference": "BLOCKED", "performance": "crashed", "accuracy": "FAIL"},
        ),
        ("env_check 70", 70, {"environment": "crashed"}),
        ("evidence 2", 2, {"page": "wrong usage or unusable input"}),
    ],
)
def test_whatever_becomes_of_a_step_the_later_ones_run_and_the_page_is_written(stand_ins, capfd, ends, code, words):
    (stand_ins / "ends").write_text(ends)
    assert submit.main(["--device", "npu"]) == code
    assert ran(stand_ins) == ALL
    assert outcomes(stand_ins) == dict.fromkeys([step.name for step in submit.STEPS], "done") | words
    shown = capfd.readouterr().out
    assert all(re.search(rf"^{step} +{outcome}$", shown, re.MULTILINE) for step, outcome in words.items())
    assert "| Inference | not measured | not recorded |\n" in shown


FLAGS = ["--device", "npu", "--model_path", "weights/w"]


def test_what_is_measured_is_not_measured_again_unless_asked(stand_ins):
    (stand_ins / "ends").write_text("eval_accuracy 1\ninference 3\ntune 2")
    assert submit.main(FLAGS) == 3
    (stand_ins / "ran").unlink()
    assert submit.main(FLAGS) == 3
    assert ran(stand_ins) == ["env_check", "inference", "tune", "evidence"]  # what was BLOCKED or failed is tried again
    assert outcomes(stand_ins)["accuracy"] == "FAIL"
    (stand_ins / "ran").unlink()
    submit.main([*FLAGS, "--again"])
    assert ran(stand_ins) == ALL


@pytest.mark.parametrize("what", ["flags", "code", "weights", "versions", "engines", "machine", "result"])
def test_with_other_flags_code_weights_versions_or_machine_it_is(stand_ins, monkeypatch, what):
    (stand_ins / "results").mkdir()
    assert submit.main(FLAGS) == 0
    (stand_ins / "ran").unlink()
    if what == "code":
        (stand_ins / "embed.py").write_text("changed")
    elif what == "weights":
        (stand_ins / "weights" / "w" / "model.safetensors").write_text("changed")
    elif what == "versions":
        monkeypatch.setattr(inference, "versions", lambda: {"torch": "0"})
    elif what == "engines":
        monkeypatch.setattr(stacks, "installed", lambda name: "1.0" if name == "onnxruntime" else None)
    elif what == "machine":
        (stand_ins / "results" / "env_info.json").write_text('{"npu_model": "another"}')
    elif what == "result":
        (stand_ins / "results" / "accuracy_eval.json").write_text('{"status": "BLOCKED"}')
    submit.main([*FLAGS, *(["--dtype", "float16"] if what == "flags" else [])])
    assert ran(stand_ins) == (["env_check", "eval_accuracy", "evidence"] if what == "result" else ALL)


def test_flags_go_to_the_steps_that_run_the_model(stand_ins):
    assert submit.main(["--dtype", "float16", "--again"]) == 0
    given = dict(line.split(" ", 1) for line in (stand_ins / "ran").read_text().splitlines())
    assert given["env_check"] == given["evidence"] == "[]"
    assert given["eval_accuracy"] == "['--sweep', '--dtype', 'float16', '--device', 'npu']"
    assert given["inference"].endswith("'picture.png', '--dtype', 'float16', '--device', 'npu']")


@pytest.mark.parametrize("flags", [["--device", "auto"], ["--devise", "npu"], ["--device", "tpu"]])
def test_a_wrong_flag_is_one_line_and_runs_nothing(stand_ins, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        submit.main(flags)
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (stand_ins / "ran").exists()


def test_ctrl_c_lets_the_step_save_what_it_has_and_runs_no_other(stand_ins):
    (stand_ins / "inference.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    pathlib.Path('saved').touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('running').touch()\n"
        "time.sleep(60)\n"
    )
    code = "import sys, pathlib; sys.path[:0] = sys.argv[1:3]; import inference, submit; inference.stopping.listen()\n"
    code += "inference.ROOT = pathlib.Path(sys.argv[3]); sys.exit(submit.main(['--device', 'npu']))"
    command = [sys.executable, "-c", code, str(ROOT), str(ROOT / "eval"), str(stand_ins)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(600):
        if (stand_ins / "running").exists():
            break
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    _, told = child.communicate(timeout=30)
    assert child.returncode == 130
    assert told.strip() == "stopped; what is measured is kept: run the same command to go on"
    assert (stand_ins / "saved").exists() and ran(stand_ins) == ["env_check"]
