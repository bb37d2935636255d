"""How a script starts, where its log and result go, and how it ends: exit codes, signals, BLOCKED records, provenance."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import inference
import numpy as np
import pytest
import torch

from conftest import ROOT, SAMPLES, TINY, forget_modules, forked, forked_script

PHOTO = SAMPLES / "chelsea.jpg"
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.py", "eval/*.py", "weights/*.py")
    for path in ROOT.glob(pattern)
    if "ArgumentParser(" in path.read_text(encoding="utf-8")
)
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


# --- its first answers ---


def script_of(path: str) -> ModuleType:
    """A script of the bundle, imported; inference.py, embed.py and eval/ lie on sys.path."""
    return importlib.import_module(path.removesuffix(".py").removeprefix("eval/").replace("/", "."))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_each_script(script, capsys):
    module = script_of(script)
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert (ended.value.code, shown.startswith("usage: ")) == (0, True)
    assert module.__doc__.strip() in shown
    assert re.search(r"^Exit codes: .*\b(0|highest)\b", shown, re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_flag_is_one_line_and_2(script, capsys):
    with pytest.raises(SystemExit) as ended:
        script_of(script).main(["--no_such_flag"])
    assert ended.value.code == 2
    assert re.fullmatch(r".*: error: .*\(--help lists the flags\)\n", capsys.readouterr().err)


def test_a_wrong_device_leaves_no_file(tmp_path):
    shutil.copy(ROOT / "inference.py", tmp_path)
    done = forked_script("inference.py", "--image_path", PHOTO, "--device", "tpu", root=tmp_path)
    assert done.returncode == 2
    assert "'tpu' is not a device; use auto, cpu, cuda" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["inference.py"]


def without(folder: Path, package: str) -> str:
    """A PYTHONPATH with which this package cannot be imported."""
    (folder / f"{package}.py").write_text(f'raise ModuleNotFoundError("No module named {package!r}", name={package!r})\n')
    return str(folder)


# env_check.py is for hosts where they are missing.
MISSING = [(script, "torch") for script in SCRIPTS if script != "eval/env_check.py"]
MISSING += [("inference.py", "numpy"), ("inference.py", "PIL"), ("eval/pca.py", "numpy"), ("embed.py", "numpy")]


@pytest.mark.parametrize(("script", "missing"), MISSING)
def test_a_missing_package_is_one_line_that_says_what_to_run(tmp_path, script, missing):
    done = forked_script(script, "--help", anew=[missing], PYTHONPATH=without(tmp_path, missing))
    assert done.returncode == 2
    assert done.stderr == f"error: No module named '{missing}'. Run: pip install -r requirements.txt\n"
    assert done.stdout == ""


def test_without_transformers_a_run_ends_with_the_same_line(run, tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu")
    assert done.code == 2
    last = done.terminal.splitlines()[-1]
    assert re.fullmatch(r"error: .*transformers.*\. Run: pip install -r requirements\.txt", last)
    assert "Traceback" not in done.terminal


@pytest.mark.parametrize("missing", ["numpy", "torch", "PIL"])
def test_somebodys_own_program_gets_the_import_error(tmp_path, missing):
    program = tmp_path / "mine" / "own.py"
    program.parent.mkdir()
    program.write_text(
        "try:\n    import inference\nexcept ImportError as error:\n    print('caught', type(error).__name__, error.name)\n"
    )
    path = os.pathsep.join([without(tmp_path, missing), str(ROOT)])
    done = forked_script("own.py", root=program.parent, anew=[missing], PYTHONPATH=path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"caught ModuleNotFoundError {missing}\n", "")


def test_inference_alone_in_an_empty_folder_does_its_main_job(tmp_path, tiny_folder, tiny):
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(ROOT / "inference.py", folder)
    flags = ["--model_path", tiny_folder, "--device", "cpu", "--output", folder / "f.npz"]
    done = forked_script("inference.py", "--image_path", PHOTO, *flags, root=folder)
    assert done.returncode == 0, done.stderr
    expected = inference.features(tiny, PHOTO)["class_token"]
    assert np.load(folder / "f.npz")["class_token"] == pytest.approx(expected, abs=1e-4)
    result = json.loads((folder / "results" / "trial" / "inference_cpu.json").read_text())
    assert (result["git_commit"], result["git_dirty"], list(result["scripts_sha256"])) == (None, None, ["inference.py"])
    assert "Inference Results" in (folder / "logs" / "trial" / "inference_cpu.log").read_text()
    assert str(tmp_path) not in json.dumps(result)


# --- being stopped ---


def handlers() -> list:
    return [signal.getsignal(getattr(signal, name)) for name in SIGNALS]


def stop_by(name: str):
    """Something that is called, and during which this signal comes."""

    def stopped(*_given, **_options):
        number = getattr(signal, name)
        assert signal.getsignal(number) is not signal.SIG_DFL, "it would kill the test run"
        os.kill(os.getpid(), number)
        time.sleep(5)

    return stopped


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_ends_the_run_with_one_line_in_the_log_too(run, tiny_folder, monkeypatch, name):
    before = handlers()
    monkeypatch.setattr(inference, "crops_of", stop_by(name))
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu")
    assert (done.code, done.result) == (130, None)
    assert done.terminal.splitlines()[-1] == "stopped; nothing was saved"
    assert done.log.splitlines()[-1].endswith("[ERROR] stopped; nothing was saved")
    assert "Traceback" not in done.terminal + done.log
    assert handlers() == before


@pytest.mark.parametrize("name", SIGNALS)
def test_a_script_that_is_stopped_ends_with_130_and_its_last_words(name, capsys):
    before = handlers()
    assert inference.guarded("x", stop_by(name), last_words="stopped; to go on: type this") == 130
    assert capsys.readouterr().err == "stopped; to go on: type this\n"
    assert handlers() == before


def test_last_words_of_a_body_are_the_last_line(run, monkeypatch, tiny_folder):
    def stopped(*_given):
        raise KeyboardInterrupt("stopped; to go on: type that")

    monkeypatch.setattr(inference, "crops_of", stopped)
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu")
    assert (done.code, done.terminal.splitlines()[-1]) == (130, "stopped; to go on: type that")


def test_signals_are_as_they_were_after_a_run_that_ends_well_or_badly(run, tiny_folder, monkeypatch):
    mine = {name: lambda *_given: None for name in SIGNALS}
    before = handlers()
    try:
        for name, handler in mine.items():
            signal.signal(getattr(signal, name), handler)
        for path, code in ((tiny_folder, 0), ("/nowhere", 2)):
            assert run("--image_path", PHOTO, "--model_path", path, "--device", "cpu").code == code
            assert handlers() == list(mine.values())
        monkeypatch.setattr(inference, "find_images", None)
        assert run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu").code == 70
        assert handlers() == list(mine.values())
    finally:
        for name, handler in zip(SIGNALS, before, strict=True):
            signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_that_is_ignored_stays_ignored(name):
    """nohup ignores SIGHUP, and a shell's & SIGINT: a run over ssh must live through the end of the session."""
    number = getattr(signal, name)
    before, others = signal.signal(number, signal.SIG_IGN), [each for each in SIGNALS if each != name]
    try:
        for other in others:
            with inference.stoppable():
                assert signal.getsignal(number) is signal.SIG_IGN
                os.kill(os.getpid(), number)
                with pytest.raises(KeyboardInterrupt):
                    stop_by(other)()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_signal_that_follows_within_seconds_does_not_disturb_what_the_first_has_begun(monkeypatch):
    """torchrun sends SIGTERM upon a Ctrl-C that its ranks have had too; whoever waits in vain may ask again."""
    now = 100.0
    with inference.stoppable(), monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        with pytest.raises(KeyboardInterrupt):
            stop_by("SIGINT")()
        now = 104.9
        os.kill(os.getpid(), signal.SIGTERM)
        now = 105.1
        with pytest.raises(KeyboardInterrupt):
            stop_by("SIGTERM")()


def test_a_process_that_is_stopped_writes_nothing_and_shows_no_traceback(tmp_path, tiny_folder, monkeypatch):
    flags = ["--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "f.npz"]
    flags += ["--output_log", tmp_path / "log", "--results_dir", tmp_path / "results"]
    monkeypatch.setattr(inference, "crops_of", stop_by("SIGTERM"))
    done = forked(lambda: inference.leave(inference.main(list(map(str, flags)))))
    shown = done.stderr.splitlines()
    assert (done.returncode, shown[-1]) == (130, "stopped; nothing was saved")
    assert not [line for line in shown if "Traceback" in line]
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


# --- errors ---


def test_an_unforeseen_error_is_70_one_line_and_a_traceback_in_the_log(run, tiny_folder, monkeypatch):
    def broken(*_given):
        raise ZeroDivisionError("division by zero\nmore of it")

    monkeypatch.setattr(inference, "crops_of", broken)
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu")
    assert (done.code, done.result) == (70, None)
    expected = "error: ZeroDivisionError: division by zero (unforeseen; the traceback is in the log)"
    assert done.terminal.splitlines()[-1] == expected
    assert "Traceback" not in done.terminal
    assert "Traceback (most recent call last)" in done.log
    assert "in broken" in done.log


def test_what_was_timed_on_a_device_that_does_not_compute_any_more_is_no_result(run, tiny_folder, monkeypatch):
    def lost(_device):
        raise inference.DeviceLost("the device has stopped")

    monkeypatch.setattr(inference, "_lost", [])  # it is so for good in a process, but not for the tests behind
    monkeypatch.setattr(inference, "require_computing", lost)
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu")
    assert (done.code, done.result, done.terminal.splitlines()[-1]) == (70, None, "error: the device has stopped")
    assert len(inference._lost) == 1


@pytest.mark.parametrize(("said", "is_lost"), [("Inner error happened", True), ("no such device", False)])
def test_a_device_that_is_lost_while_it_is_opened_is_lost_too(run, tiny_folder, monkeypatch, said, is_lost):
    """Then the process leaves without torch_npu's exit handler, which may wait for ever."""

    def blocked(*_given):
        raise inference.Blocked("npu:0 fails at first use", "Check npu-smi info") from RuntimeError(said)

    monkeypatch.setattr(inference, "_lost", [])
    monkeypatch.setattr(inference, "open_device", blocked)
    assert run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "npu").code == 3
    assert bool(inference._lost) == is_lost


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("text", ["x", "-1", "1.5", "../../x"])
def test_a_rank_that_is_no_number_is_named(run, tiny_folder, monkeypatch, variable, text):
    monkeypatch.setenv(variable, text)
    device = "cuda:0" if variable == "LOCAL_WORLD_SIZE" else "cpu"  # who names one is asked how many share the machine
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", device)
    assert done.code == 2
    assert done.terminal == (
        f"error: the environment variable {variable} is {text!r}, not a number; unset it, or start with torchrun\n"
    )


@pytest.mark.parametrize("text", ["", "0"])
def test_an_empty_rank_is_the_first(run, tiny_folder, monkeypatch, text):
    monkeypatch.setenv("RANK", text)
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu")
    assert done.code == 0
    assert "[INFO] Throughput" in done.terminal


def test_other_ranks_are_quiet_and_log_to_files_of_their_own(bundle, tiny_folder, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    done = bundle("--model_path", tiny_folder)
    assert done.code == 0
    assert "[INFO]" not in done.terminal
    assert bundle.files() == ["logs/trial/inference_cpu_rank3.log", "results/trial/inference_cpu.json"]


def test_a_log_or_a_result_that_cannot_be_written_is_named(run, tiny_folder, tmp_path, bundle):
    (tmp_path / "file").touch()
    for flag in ("--output_log", "--results_dir"):
        done = bundle("--model_path", tiny_folder, flag, tmp_path / "file" / "x")
        assert done.code == 2
        assert re.match(rf"error: {tmp_path}/file/x.* cannot be written \((File exists|Not a directory)\)", done.last)


def test_blocked_stays_blocked_where_nothing_can_be_written(bundle, tmp_path, no_npu):
    (tmp_path / "file").touch()
    for flag in ("--output_log", "--results_dir"):
        done = bundle("--device", "npu", flag, tmp_path / "file" / "x")
        assert done.code == 3
        assert done.last.startswith("BLOCKED: torch_npu is not installed")
        assert "cannot be written" in done.terminal


# --- where log and result go ---


@pytest.fixture
def bundle(tmp_path, monkeypatch, capsys):
    """Run inference.py in this process as if the bundle lay in an empty folder; .files() lists what is there."""
    root = tmp_path / "bundle"
    root.mkdir()
    monkeypatch.setattr(inference, "ROOT", root)

    def run_there(*flags: object) -> SimpleNamespace:
        given = ["--image_path", str(PHOTO), *map(str, flags)]
        given += [] if "--device" in given else ["--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [str(root / "inference.py"), *given])
        code = inference.main(given)
        terminal = capsys.readouterr().err
        return SimpleNamespace(code=code, terminal=terminal, last=terminal.splitlines()[-1])

    run_there.files = lambda: sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    run_there.root = root
    run_there.read = lambda name: json.loads((root / "results" / name).read_text())
    return run_there


@pytest.fixture
def card(monkeypatch):
    """The tiny checkpoint passes as the card's, and random weights are as small."""
    monkeypatch.setattr(inference, "identify", lambda config: inference.HUB_ID)
    small = (TINY["hidden_size"], TINY["num_hidden_layers"], TINY["num_attention_heads"], 16)
    monkeypatch.setattr(inference, "CARDS", (inference.Card(inference.HUB_ID, *small),))


@pytest.fixture
def no_npu(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch_npu" else find_spec(name, *rest)
    )


PUBLISHED = ["logs/inference_cpu.log", "results/inference_cpu.json"]
TRIAL = ["logs/trial/inference_cpu.log", "results/trial/inference_cpu.json"]


def test_the_cards_checkpoint_writes_results_and_logs(bundle, card, tiny_folder):
    assert bundle("--model_path", tiny_folder).code == 0
    assert bundle.files() == PUBLISHED
    assert bundle.read("inference_cpu.json")["weights"]["source"] == "checkpoint"


def test_random_weights_and_other_models_are_a_trial(bundle, card, tiny_folder, monkeypatch):
    assert bundle("--random_weights").code == 0
    assert bundle.files() == TRIAL
    shutil.rmtree(bundle.root / "results")
    shutil.rmtree(bundle.root / "logs")
    monkeypatch.setattr(inference, "identify", lambda config: "another model")
    assert bundle("--model_path", tiny_folder).code == 0
    assert bundle.files() == TRIAL


def test_a_trial_can_be_published_until_a_checkpoint_has_run(bundle, card, tiny_folder):
    assert bundle("--random_weights", "--publish").code == 0
    assert bundle.files() == PUBLISHED
    assert bundle.read("inference_cpu.json")["weights"]["source"] == "random"
    assert bundle("--model_path", tiny_folder).code == 0
    measured = bundle.read("inference_cpu.json")
    assert measured["weights"]["source"] == "checkpoint"
    done = bundle("--random_weights", "--publish")
    assert "--publish: a checkpoint's result is on record and stays" in done.terminal
    assert bundle.read("inference_cpu.json") == measured
    assert bundle.read("trial/inference_cpu.json")["weights"]["source"] == "random"


def test_a_mistake_leaves_a_log_among_the_trials_alone(bundle, tiny_folder):
    assert bundle("--model_path", "/nowhere/at/all").code == 2
    assert bundle.files() == ["logs/trial/inference_cpu.log"]
    assert "no such folder or file" in (bundle.root / "logs/trial/inference_cpu.log").read_text()


def test_folders_that_are_named_are_obeyed_to_the_letter(bundle, card, tiny_folder, tmp_path):
    for weights in (["--random_weights"], ["--model_path", tiny_folder]):
        flags = ["--results_dir", tmp_path / "here", "--output_log", tmp_path / "deep" / "own.log"]
        assert bundle(*weights, *flags).code == 0
        assert [path.name for path in (tmp_path / "here").iterdir()] == ["inference_cpu.json"]
        assert (tmp_path / "deep" / "own.log").is_file()
        assert bundle.files() == []


def test_the_blocking_reason_is_recorded_once(bundle, no_npu, monkeypatch):
    assert bundle("--device", "npu", "--dtype", "float16", "--random_weights").code == 3
    assert bundle.files() == ["logs/inference.log", "results/inference.json"]
    record = bundle.read("inference.json")
    assert (record["status"], record["device"], record["dtype"]) == ("BLOCKED", "npu", "float16")
    assert record["reason"] == "torch_npu is not installed"
    assert "eval/env_check.py" in record["what_to_do"]
    assert {"time_utc", "command", "git_commit", "versions", "environment"} <= set(record)
    assert bundle("--device", "npu:1").code == 3
    assert bundle.read("inference.json") == record  # the same reason: a trial
    assert bundle.read("trial/inference.json")["reason"] == record["reason"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_name: True)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1,0")
    assert bundle("--device", "npu").code == 3
    assert "ascending" in bundle.read("inference.json")["reason"]


def test_a_measured_result_is_never_replaced_by_blocked(bundle, no_npu, tmp_path):
    measured = {"status": "PASSED", "device": "npu", "inference_time_s": 1.0}
    for folder, flags in ((bundle.root / "results", []), (tmp_path / "own", ["--results_dir", tmp_path / "own"])):
        folder.mkdir(exist_ok=True)
        (folder / "inference.json").write_text(json.dumps(measured))
        assert bundle("--device", "npu", *flags).code == 3
        assert json.loads((folder / "inference.json").read_text()) == measured
    assert bundle.read("trial/inference.json")["status"] == "BLOCKED"
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["inference.json"]


def test_a_blocked_record_is_replaced_by_the_next_run(as_an_npu, bundle, card, tiny_folder):
    (bundle.root / "results").mkdir()
    (bundle.root / "results" / "inference.json").write_text('{"status": "BLOCKED", "reason": "x"}')
    assert bundle("--device", "npu", "--model_path", tiny_folder).code == 0
    assert bundle.read("inference.json")["device_name"] == torch.npu.get_device_name(0)


def test_a_record_that_cannot_be_read_is_none(bundle, no_npu):
    (bundle.root / "results").mkdir()
    for text in ("not json", "[]", '"x"'):
        (bundle.root / "results" / "inference.json").write_text(text)
        assert bundle("--device", "npu").code == 3
        assert bundle.read("inference.json")["status"] == "BLOCKED"


# --- what a result says of its making ---


def test_no_path_of_somebodys_machine_stands_in_a_result(bundle, tiny_folder, tmp_path):
    photo = shutil.copy(PHOTO, tmp_path / "mine.jpg")
    given = [f"--model_path={tiny_folder}", f"--output={tmp_path}/f.npz", "--image-path", photo]
    assert bundle(*given).code == 0
    result = bundle.read("trial/inference_cpu.json")
    del result["scripts_sha256"]  # this bundle's scripts lie elsewhere
    assert (result["image_path"], result["weights"]["path"]) == (".../mine.jpg", ".../tiny")
    command = "--model_path=.../tiny --output=.../f.npz --image-path .../mine.jpg --device cpu"
    assert result["command"] == f"python inference.py --image_path .../chelsea.jpg {command}"
    assert re.findall(r'["= ]/.*', json.dumps(result, indent=1)) == []


def test_no_path_stands_in_a_blocked_record(bundle, monkeypatch, tmp_path):
    (tmp_path / "torch_npu.py").write_text(f"raise ImportError('{tmp_path}/lib/libtorch_npu.so: undefined symbol: aclnnX')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    assert bundle("--device", "npu").code == 3
    record = bundle.read("inference.json")
    assert record["reason"] == (
        "torch_npu does not fit this torch or this CANN (.../libtorch_npu.so: undefined symbol: aclnnX)"
    )
    assert f"{tmp_path}/lib/libtorch_npu.so" in (bundle.root / "logs/inference.log").read_text()
    assert bundle("--device", "npu").code == 3
    assert bundle.files()[-1] == "results/trial/inference.json"  # the reason is known


def test_what_decides_silently_is_recorded(bundle, tiny_folder, monkeypatch):
    names = ["INF_NAN_MODE_ENABLE", "INF_NAN_MODE_FORCE_DISABLE", "TASK_QUEUE_ENABLE", "CPU_AFFINITY_CONF", "OMP_NUM_THREADS"]
    names += ["PYTORCH_NPU_ALLOC_CONF", "ASCEND_LAUNCH_BLOCKING", "TORCH_NPU_USE_COMPATIBLE_IMPL", "ASCEND_RT_VISIBLE_DEVICES"]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert bundle("--model_path", tiny_folder).code == 0
    assert bundle.read("trial/inference_cpu.json")["environment"] == {}
    values = {name: "1" for name in [*names, "ACL_OP_INIT_MODE", "ACL_ANYTHING"]}
    for name, value in (values | {"SECRET_TOKEN": "x"}).items():
        monkeypatch.setenv(name, value)
    assert bundle("--model_path", tiny_folder).code == 0
    assert bundle.read("trial/inference_cpu.json")["environment"] == values


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_the_bundles_own_and_says_whether_it_is_what_ran(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "script.py").write_text("1\n")
    (tmp_path / "notes.md").write_text("1\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setattr(inference, "ROOT", tmp_path)
    assert inference.git_state() == {"git_commit": commit, "git_dirty": False}
    (tmp_path / "notes.md").write_text("2\n")
    (tmp_path / "new.py").write_text("1\n")
    assert inference.git_state() == {"git_commit": commit, "git_dirty": False}
    (tmp_path / "script.py").write_text("2\n")
    assert inference.git_state() == {"git_commit": commit, "git_dirty": True}
    (tmp_path / "bundle").mkdir()
    monkeypatch.setattr(inference, "ROOT", tmp_path / "bundle")  # a parent's repository says nothing about it
    assert inference.git_state() == {"git_commit": None, "git_dirty": None}


@pytest.mark.parametrize("script", ["exec sleep 60", "exit 128", None], ids=["hangs", "fails", "is absent"])
def test_a_git_that_does_not_answer_is_no_git(tmp_path, monkeypatch, script):
    run = subprocess.run
    if script:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script else str(tmp_path))

    def impatient(*args, **options):
        return run(*args, **options | {"timeout": min(0.3, options["timeout"])})

    monkeypatch.setattr(subprocess, "run", impatient)
    assert inference.git_state() == {"git_commit": None, "git_dirty": None}


def test_the_versions_are_those_in_use(monkeypatch):
    import transformers

    found = inference.versions()
    torch_version = torch.__version__.split("+")[0]  # PyPI's wheel does not record what it was built for
    assert found["torch"].split("+")[0] == torch_version
    assert (found["transformers"], found["numpy"]) == (transformers.__version__, np.__version__)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_importing_takes_over_no_signals_and_prints_nothing():
    def program() -> None:
        forget_modules()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        importlib.import_module("inference")
        print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    done = forked(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
