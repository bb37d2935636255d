"""The whole evaluation in one go, with steps that fail, that are on record, and that are stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import inference
import pytest

import stacks
import submit
from conftest import ROOT


@pytest.fixture
def stand_ins(tmp_path, monkeypatch) -> Path:
    """A bundle of scripts that say that they ran, and end as the file `ends` tells: an exit code, or killed."""
    for folder in ("eval", "bulk"):
        (tmp_path / folder).mkdir()
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


ALL = ["env_check", "inference", "pca", "eval_accuracy", "eval_performance", "tune", "evidence"]


def ran(root: Path) -> list[str]:
    return [line.split()[0] for line in (root / "ran").read_text().splitlines()]


def outcomes(root: Path) -> dict[str, str]:
    steps = json.loads((root / "results" / "trial" / "submit.json").read_text())
    return {name: row["outcome"] for name, row in steps.items()}


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
    assert "| NPU inference output | not measured | not measured | not recorded |\n" in shown


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


@pytest.mark.parametrize("what", ["flags", "code", "code of bulk", "weights", "versions", "engines", "machine", "result"])
def test_with_other_flags_code_weights_versions_or_machine_it_is(stand_ins, monkeypatch, what):
    (stand_ins / "results").mkdir()
    assert submit.main(FLAGS) == 0
    (stand_ins / "ran").unlink()
    if what == "code":
        (stand_ins / "embed.py").write_text("changed")
    elif what == "code of bulk":
        (stand_ins / "bulk" / "encoder.py").write_text("changed")
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
    assert given["pca"] == given["inference"] == "['--image_path', 'assets/samples', '--dtype', 'float16', '--device', 'npu']"


@pytest.mark.parametrize("flags", [["--device", "auto"], ["--devise", "npu"], ["--device", "tpu"], ["--results_dir", "x"]])
def test_a_wrong_flag_is_one_line_and_runs_nothing(stand_ins, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        submit.main(flags)
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (stand_ins / "ran").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_stops_it_lets_the_step_save_what_it_has_and_runs_no_other(stand_ins, number):
    (stand_ins / "inference.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    pathlib.Path('saved').touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('running').touch()\n"
        "time.sleep(60)\n"
    )
    code = "import sys, pathlib; sys.path[:0] = sys.argv[1:3]; import inference, submit\n"
    code += "inference.ROOT = pathlib.Path(sys.argv[3]); sys.exit(submit.main(['--device', 'npu']))"
    command = [sys.executable, "-c", code, str(ROOT), str(ROOT / "eval"), str(stand_ins)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(600):
        if (stand_ins / "running").exists():
            break
        time.sleep(0.05)
    os.killpg(child.pid, number)  # as a terminal does
    _, told = child.communicate(timeout=30)
    assert child.returncode == 130
    assert told.strip() == "stopped; what is measured is kept: run the same command to go on"
    assert (stand_ins / "saved").exists() and ran(stand_ins) == ["env_check"]
