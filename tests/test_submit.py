"""The whole evaluation in one go: on the simulated NPU, end to end included, and with steps that fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import inference
import pytest

import submit
import tables
from conftest import ROOT, TESTS, script_environment

# A real NPU's torch_npu is found by its name; this one is the simulator, in each child and its children.
TORCH_NPU = "import npu_simulator\nnpu_simulator.install()\n"
FEW = {
    "accuracy": ["--sweep", "--views", "0", "--probe", "0", "--image_path", "assets/samples/chelsea.jpg"],
    "performance": [
        "--end_to_end",
        "2",
        "--num_runs",
        "2",
        "--warmup",
        "1",
        "--rounds",
        "1",
        "--batch_sizes",
        "1",
        "--turn_seconds",
        "0.1",
        "--megapixels",
        "0.1",
        "0.2",
    ],
}
QUICK = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/eval"]
import submit
few = json.loads(sys.argv[2])
submit.STEPS = tuple(step._replace(arguments=tuple(few.get(step.name, step.arguments))) for step in submit.STEPS)
sys.exit(submit.main(sys.argv[3:]))
"""
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


def submit_all(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", QUICK, str(root), json.dumps(FEW), *arguments]
    environment = script_environment(OMP_NUM_THREADS="1", **variables)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def outcomes(root: Path) -> dict[str, str]:
    steps = json.loads((root / "results" / "trial" / "submit.json").read_text())["steps"]
    return {row["step"]: row["outcome"] for row in steps}


def generated(root: Path, name: str) -> dict[str, str]:
    text = (root / name).read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- evidence:(\w+) -->\n(.*?)<!-- /evidence:\1 -->", text, re.DOTALL))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory, tiny_folder) -> tuple[Path, subprocess.CompletedProcess, dict[str, str]]:
    """A bundle in which the one-go command has run on the simulated NPU with a tiny checkpoint."""
    root = copy_bundle(tmp_path_factory.mktemp("one_go") / "bundle")
    shutil.copytree(tiny_folder, root / "weights" / "tiny")
    fake = tmp_path_factory.mktemp("fake") / "torch_npu"
    fake.mkdir()
    (fake / "__init__.py").write_text(TORCH_NPU)
    variables = {"PYTHONPATH": os.pathsep.join([str(fake.parent), str(TESTS)])}
    done = submit_all(root, "--device", "npu", "--model_path", "weights/tiny", "--publish", "--allow_simulated", **variables)
    return root, done, variables


@pytest.mark.timeout(240)
def test_all_steps_run_on_the_simulated_npu_and_the_audit_stands_on_the_terminal(simulated):
    root, done, _ = simulated
    assert done.returncode == 0, done.stderr[-2000:]
    assert outcomes(root) == dict.fromkeys(("environment", "inference", "accuracy", "performance", "page"), "done")
    end = done.stdout.partition("performance  done")[2]
    for words in ("| Inference | **runs**", "| Accuracy | **PASS**", "| Performance | best"):
        assert words in end
    folder = json.loads((root / "results" / "performance_eval.json").read_text())["end_to_end"]["folder"]
    assert folder["rows"]


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_nothing_on_the_page_contradicts_the_new_figures(simulated, name):
    """Sentences that depend on a result stand between markers only, and after the run each of them tells of it."""
    root, _, _ = simulated
    blocks = generated(root, name)
    assert set(blocks) == set(tables.TABLES)
    for block in ("audit", "accuracy", "performance", "deliverables", "open"):
        found = [line for line in blocks[block].splitlines() if re.search(BEFORE, line)]
        assert found == [], block
    results = {stem: json.loads((root / "results" / f"{stem}.json").read_text()) for stem in tables.CHECKS}
    best = max(row["throughput_img_s"] for row in results["performance_eval"]["results"])
    for block in ("audit", "performance", "sizes"):
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


@pytest.fixture
def on_record(simulated, monkeypatch) -> Callable[..., int | None]:
    """What submit.py finds on record in that bundle for the step with some arguments."""
    root, _, _ = simulated
    monkeypatch.setattr(inference, "ROOT", root)
    monkeypatch.setattr(submit, "_sha256", submit._sha256.__wrapped__)
    flags = ["--device", "npu", "--model_path", "weights/tiny", "--publish"]
    few = {"inference": submit.STEPS[1].arguments} | FEW

    def find(name: str, *more: str, kind: str = "npu") -> int | None:
        [step] = [step for step in submit.STEPS if step.name == name]
        return submit.on_record(step, [*few[name], *flags, *more], kind)

    return find


@contextmanager
def changed(path: Path, change: Callable[[str], str]) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(change(before.decode("latin-1")).encode("latin-1"))
    yield
    path.write_bytes(before)


def test_what_is_measured_need_not_be_measured_again(on_record):
    assert [on_record(name) for name in ("inference", "accuracy", "performance")] == [0, 0, 0]
    with changed(inference.ROOT / "results" / "accuracy_eval.json", lambda text: text.replace('"PASS"', '"FAIL"')):
        assert on_record("accuracy") == 1


def test_with_other_flags_code_weights_versions_or_machine_it_is(on_record):
    results = inference.ROOT / "results"
    assert on_record("accuracy", "--dtype", "float16") is None
    assert on_record("accuracy", kind="cuda") is None
    for path, change in (
        (inference.ROOT / "eval" / "eval_accuracy.py", lambda text: f"{text}\n"),
        (inference.ROOT / "weights" / "tiny" / "model.safetensors", lambda text: f"{text[:-1]}!"),
        (results / "env_info.json", lambda text: text.replace("simulated NPU", "Ascend")),
        (results / "accuracy_eval.json", lambda text: text.replace('"transformers": "', '"transformers": "0')),
        (results / "accuracy_eval.json", lambda _text: '{"status": "BLOCKED"}'),
    ):
        with changed(path, change):
            assert on_record("accuracy") is None, path
    assert on_record("accuracy") == 0


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
    for script in [*(step.script for step in submit.STEPS), "eval/evidence.py"]:
        (tmp_path / script).write_text(code)
    (tmp_path / "ends").write_text("")
    monkeypatch.setattr(inference, "ROOT", tmp_path)
    return tmp_path


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
    assert ran(stand_ins) == ["env_check", "inference", "eval_accuracy", "eval_performance", "evidence"]
    assert outcomes(stand_ins) == dict.fromkeys(("environment", "inference", "accuracy", "performance", "page"), "done") | words
    shown = capfd.readouterr().out
    assert all(re.search(rf"^{step} +{outcome}$", shown, re.MULTILINE) for step, outcome in words.items())
    assert "| Inference | not measured | not recorded |\n" in shown


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
