"""What machine this is, on any machine; what goes together; and weights that are locked."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import inference
import pytest
import torch

import env_check
import resolve_stacks
import stacks
from conftest import ROOT, SAMPLES, TINY, run_script, save_checkpoint

PUBLISHED = json.loads((ROOT / "results" / "published" / "env_info.json").read_text())
PHOTO = SAMPLES / "chelsea.jpg"
DIGEST, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def no_torch_npu(monkeypatch):
    find_spec, version = importlib.util.find_spec, importlib.metadata.version

    def absent(name: str) -> str:
        if name == "torch_npu":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch_npu" else find_spec(name, *rest)
    )
    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)


@pytest.fixture
def check(tmp_path, capsys) -> Callable[..., SimpleNamespace]:
    """Run env_check in this process: exit code, stdout, stderr, the JSON files by name, the log."""
    results, log = tmp_path / "results", tmp_path / "logs" / "env_check.log"

    def run_check(*arguments: object) -> SimpleNamespace:
        code = env_check.main(["--results_dir", str(results), "--output_log", str(log), *map(str, arguments)])
        printed = capsys.readouterr()
        files = {path.name: json.loads(path.read_text()) for path in results.glob("*.json")}
        return SimpleNamespace(
            code=code, out=printed.out, err=printed.err, files=files, log=log.read_text() if log.exists() else ""
        )

    return run_check


@pytest.fixture
def program(tmp_path, monkeypatch) -> Callable[[str, str], Path]:
    """Put a shell script of a name on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def install(name: str, body: str) -> Path:
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return folder / name

    return install


@pytest.fixture
def locks(tmp_path, monkeypatch) -> Path:
    """A copy of locked_models.md that env_check writes and the loader reads."""
    path, read_locks = tmp_path / "locked_models.md", inference.read_locks
    shutil.copy(ROOT / "locked_models.md", path)
    monkeypatch.setattr(env_check, "LOCKS", path)
    monkeypatch.setattr(inference, "read_locks", lambda: read_locks(path))
    return path


def section(log: str, heading: str) -> str:
    return log.split(f"## {heading}\n")[1].split("\n## ")[0].rstrip("\n")


# --- the record ---


def test_the_published_keys_come_first_then_the_machine(check, no_torch_npu):
    info = check().files["env_info.json"]
    assert list(info)[:10] == list(PUBLISHED)
    more = "npu_status npu_blocked_reason cpu cpu_cores pairing advice install silent_variables time_utc command"
    more += " git_commit git_dirty"
    assert set(info) == {*PUBLISHED, *more.split()}
    assert info["python_version"] == ".".join(map(str, sys.version_info[:3]))
    assert info["torch_version"] == torch.__version__
    assert info["os"].endswith(info["architecture"])
    assert info["cpu"]


def test_without_torch_npu_the_npu_is_blocked_with_the_reason(check, no_torch_npu):
    done = check()
    info = done.files["env_info.json"]
    assert done.code == 0
    assert info["npu_status"] == "blocked"
    assert info["npu_blocked_reason"].startswith("torch_npu is not installed. Run ")
    assert (info["npu_model"], info["npu_count"], info["torch_npu_version"]) == (None, None, None)
    assert section(done.log, "torch_npu") == "not installed"
    assert f"NPU: BLOCKED: {info['npu_blocked_reason']}" in section(done.log, "What goes together")


def test_an_npu_that_works_is_named_and_counted(check, npu):
    npu.module.devices = 2
    done = check()
    info = done.files["env_info.json"]
    assert (info["npu_status"], info["npu_blocked_reason"]) == ("available", None)
    assert (info["npu_model"], info["npu_count"]) == (npu.NAME, 2)
    assert f"NPU: available, 2 x {npu.NAME}" in done.log


def test_an_npu_that_fails_in_an_unforeseen_way_is_blocked(check, monkeypatch):
    monkeypatch.setattr(inference, "open_device", lambda _spec: 1 / 0)
    done = check()
    assert done.code == 0
    assert done.files["env_info.json"]["npu_blocked_reason"] == "division by zero"


def test_the_log_has_the_published_sections_in_order_and_is_what_was_printed(check, no_torch_npu):
    done = check()
    published = (ROOT / "logs" / "published" / "env_check.log").read_text()
    headings = [line for line in published.splitlines() if line.startswith("## ")]
    ours = [line for line in done.log.splitlines() if line.startswith("## ")]
    assert ours == [*headings, "## Ascend environment variables", "## What goes together"]  # the published heading is redacted
    assert done.log.splitlines()[:3] == published.splitlines()[:3]
    assert done.log.splitlines()[3].startswith("# Date: 20")
    assert done.out.startswith(done.log)
    assert done.out.removeprefix(done.log).startswith("Saved to ")
    assert done.err == ""


def test_a_second_run_replaces_the_log(check, no_torch_npu):
    first, second = check(), check()
    assert first.log.count("\n") == second.log.count("\n")


def test_nothing_has_to_be_there(tmp_path, no_torch_npu):
    """No program on the PATH, so no git and no npu-smi."""
    log = tmp_path / "log"
    done = run_script(
        *("eval/env_check.py", "--results_dir", tmp_path, "--output_log", log),
        PATH="",
        ASCEND_TOOLKIT_HOME="/none/cann",
        TORCH_DEVICE_BACKEND_AUTOLOAD="1",
    )
    assert (done.returncode, done.stderr) == (0, "")
    info = json.loads((tmp_path / "env_info.json").read_text())
    assert (info["git_commit"], info["git_dirty"]) == (None, None)
    assert info["cann_version"] == "/none/cann"
    assert section(log.read_text(), "NPU Info") == "npu-smi: not found"
    assert section(log.read_text(), "Git Info") == "no git, or no git repository"
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=1" in section(log.read_text(), "Ascend environment variables").splitlines()


def test_a_blocked_run_keeps_the_record_of_a_machine_with_an_npu(check, no_torch_npu, tmp_path):
    record = tmp_path / "results" / "env_info.json"
    record.parent.mkdir()
    record.write_text('{"npu_status": "available"}')
    done = check()
    assert record.read_text() == '{"npu_status": "available"}'
    assert done.files["env_info_cpu.json"]["npu_status"] == "blocked"
    assert "Saved to " in done.out and "results/env_info_cpu.json and " in done.out


@pytest.fixture
def bundle(tmp_path, monkeypatch, no_torch_npu) -> Path:
    """A bundle without results; env_check writes there what it writes by default."""
    root = tmp_path / "bundle"
    (root / "results").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", root)
    monkeypatch.setattr(env_check, "ROOT", root)
    return root


def written(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.suffix in (".json", ".log")}


RECORD = {"results/env_info.json", "logs/env_check.log"}
TRIAL = {"results/trial/env_info.json", "logs/trial/env_check.log"}
BESIDE_AN_NPU = {"results/trial/env_info_cpu.json", "logs/trial/env_check_cpu.log"}


def test_a_repeat_of_a_blocked_machine_is_a_trial_and_publish_replaces_the_record(bundle, monkeypatch):
    assert env_check.main([]) == 0
    assert written(bundle) == RECORD
    before = {name: (bundle / name).read_bytes() for name in RECORD}
    assert env_check.main([]) == 0
    assert written(bundle) == RECORD | TRIAL
    assert {name: (bundle / name).read_bytes() for name in RECORD} == before
    monkeypatch.setattr(inference, "utc_now", lambda: "2031-01-01T00:00:00+00:00")
    assert env_check.main(["--publish"]) == 0
    for name in RECORD:
        assert "2031-01-01" in (bundle / name).read_text()


def test_another_version_of_torch_is_the_same_reason_and_another_reason_is_not(bundle, monkeypatch):
    reason = "torch_npu is not installed. Install the torch_npu that goes with torch 2.11.0 (README: versions)"
    record = bundle / "results" / "env_info.json"
    record.write_text(json.dumps({"npu_status": "blocked", "npu_blocked_reason": reason}))
    assert env_check.main([]) == 0
    assert written(bundle) == {"results/env_info.json", *TRIAL}
    record.write_text(json.dumps({"npu_status": "blocked", "npu_blocked_reason": "torch_npu sees no NPU. Check the driver"}))
    assert env_check.main([]) == 0
    assert json.loads(record.read_text())["npu_blocked_reason"].startswith("torch_npu is not installed")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], BESIDE_AN_NPU), (["--publish"], {"results/env_info_cpu.json", "logs/env_check_cpu.log"})],
)
def test_the_record_and_the_log_of_an_npu_are_never_replaced_by_a_blocked_machine(bundle, arguments, expected):
    (bundle / "logs").mkdir()
    (bundle / "results" / "env_info.json").write_text('{"npu_status": "available"}')
    (bundle / "logs" / "env_check.log").write_text("an NPU's log")
    assert env_check.main(arguments) == 0
    assert written(bundle) == RECORD | expected
    assert (bundle / "results" / "env_info.json").read_text() == '{"npu_status": "available"}'
    assert (bundle / "logs" / "env_check.log").read_text() == "an NPU's log"


def test_folders_that_are_given_are_obeyed_to_the_letter(check, bundle, tmp_path):
    for _ in range(2):
        assert list(check().files) == ["env_info.json"]
    assert written(tmp_path) == {"results/env_info.json", "logs/env_check.log"}


@pytest.mark.parametrize("record", ['{"npu_status": "blocked"}', "{half a fi", "[]"])
def test_any_other_record_is_replaced(check, no_torch_npu, tmp_path, record):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "env_info.json").write_text(record)
    done = check()
    assert list(done.files) == ["env_info.json"]
    assert done.files["env_info.json"]["npu_blocked_reason"].startswith("torch_npu is not installed")


def test_a_machine_whose_npu_works_replaces_every_record(check, npu, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "env_info.json").write_text('{"npu_status": "available"}')
    done = check()
    assert done.files["env_info.json"]["npu_model"] == npu.NAME
    assert list(done.files) == ["env_info.json"]


@pytest.mark.parametrize("flag", ["--output_log", "--results_dir"])
def test_what_cannot_be_written_is_one_line_and_exit_code_2(check, no_torch_npu, tmp_path, flag):
    (tmp_path / "file").write_text("")
    done = check(flag, tmp_path / "file" / "below")
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith(f"error: {tmp_path}/file/below")
    assert len(done.err.splitlines()) == 1
    assert "--results_dir and --output_log" in done.err


def test_wrong_usage_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        env_check.main(["--lock"])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_error_that_nobody_foresaw_is_one_line_and_exit_code_70(check, no_torch_npu, monkeypatch, tmp_path):
    monkeypatch.setattr(inference, "cpu_name", lambda: 1 / 0)
    monkeypatch.setattr(inference, "ROOT", tmp_path)
    done = check()
    assert (done.code, done.out, done.files) == (70, "", {})
    assert "ZeroDivisionError" in (tmp_path / "logs" / "trial" / "env_check.log").read_text()
    assert done.err == "error: ZeroDivisionError: division by zero (unforeseen; the traceback is in the log)\n"


def test_ctrl_c_is_one_line_and_exit_code_130(check, no_torch_npu, monkeypatch):
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "cpu_name", stopped)
    done = check()
    assert (done.code, done.out, done.err) == (130, "", "stopped; run it again\n")


def test_a_host_without_torch_is_told_the_whole_line(tmp_path):
    """Also where a library of torch's is missing, and Ctrl-C while it is imported: what torch is here raises it."""
    (tmp_path / "cann-8.5.1").mkdir()
    for raised, code, line in (
        ("ImportError(\"No module named 'torch'\")", 2, "error: No module named 'torch'. To install: "),
        ("OSError('libgomp.so: not there')", 2, "error: libgomp.so: not there. To install: "),
        ("KeyboardInterrupt", 130, "stopped; run it again"),
    ):
        (tmp_path / "torch.py").write_text(f"raise {raised}\n")
        done = run_script("eval/env_check.py", PYTHONPATH=str(tmp_path), ASCEND_TOOLKIT_HOME=f"{tmp_path}/cann-8.5.1")
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.startswith(line)
        assert "Traceback" not in done.stderr
        assert code == 130 or "torch_npu" in done.stderr


# --- programs ---


def test_what_npu_smi_prints_is_in_the_log(check, no_torch_npu, program):
    program("npu-smi", 'echo "| npu-smi 25.5.2 $1 |"; echo "| 0 Ascend910 | OK |"')
    assert section(check().log, "NPU Info") == "| npu-smi 25.5.2 info |\n| 0 Ascend910 | OK |"


def test_a_failing_npu_smi_is_told_with_its_words(check, no_torch_npu, program):
    program("npu-smi", "echo 'dcmi module initialize failed. ret is -8005' >&2; exit 255")
    done = check()
    assert done.code == 0
    expected = "npu-smi info: failed with exit code 255\ndcmi module initialize failed. ret is -8005"
    assert section(done.log, "NPU Info") == expected


def test_an_npu_smi_that_cannot_be_run_is_told(check, no_torch_npu, program):
    program("npu-smi", "").write_bytes(b"\x7fELF for another machine")
    assert section(check().log, "NPU Info").startswith("npu-smi: cannot be run (")


def test_a_hanging_npu_smi_is_given_up(check, no_torch_npu, program, monkeypatch, tmp_path):
    program("npu-smi", f"sleep 1; touch {tmp_path}/still_there")
    monkeypatch.setattr(env_check, "TOOL_TIMEOUT_S", 0.3)
    started = time.perf_counter()
    done = check()
    assert time.perf_counter() - started < 10
    assert done.code == 0
    assert section(done.log, "NPU Info") == "npu-smi info: no answer within 0.3 s"
    time.sleep(1.2)
    assert not (tmp_path / "still_there").exists()


# --- what must not be published ---


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("ASCEND_TOOLKIT_HOME", "/usr/local/Ascend/cann-8.5.1", "/usr/local/Ascend/cann-8.5.1"),
        ("PYTHONPATH", "/usr/local/a:/home/alice/b:", "/usr/local/a:~/b:"),
        ("LD_LIBRARY_PATH", "/Users/alice/lib", "~/lib"),
        ("TORCH_HOME", "/my/house/x:/my/houses:/opt/my/house", "~/x:/my/houses:/opt/my/house"),
        ("HF_ENDPOINT", "https://alice:pass@mirror.example/x", "https://***@mirror.example/x"),
        ("HF_ENDPOINT", "https://mirror.example?token=abc&x=1", "https://mirror.example?token=***&x=1"),
        ("ASCEND_AICPU_KEY", "short", "***"),
        ("HCCL_Secret_File", "/tmp/x", "***"),
        ("NPU_API_TOKEN", "x", "***"),
        ("TORCH_PASSWD", "x", "***"),
        ("CANN_CREDENTIALS", "x", "***"),
        ("ASCEND_NOTE", "a hf_abcdefghijklmnopqrstuvwxyzABCDEFGH b", "a *** b"),
        ("ASCEND_NOTE", "ghp_abcdefghijklmnopqrstuvwxyz0123456789", "***"),
        ("ASCEND_NOTE", "AKIAIOSFODNN7EXAMPLE", "***"),
        ("ASCEND_NOTE", "0123456789abcdef0123456789abcdef0123456789abcdef", "***"),
        ("ASCEND_NOTE", "two\nlines", "two lines"),
        ("HCCL_TIMEOUT", "2", "2"),
    ],
)
def test_secrets_and_names_of_people_are_masked(monkeypatch, name, value, shown):
    monkeypatch.setenv("HOME", "/my/house")
    assert env_check.shown_variables({name: value}) == [f"{name}={shown}"]


def test_only_variables_that_matter_are_shown():
    assert env_check.shown_variables({"AWS_REGION": "x", "MY_PYTHONPATH": "x", "PYTHONPATHS": "x", "SSH_CLIENT": "x"}) == []


def test_neither_log_nor_json_tells_whose_machine_it_is(check, no_torch_npu, program, monkeypatch):
    monkeypatch.setenv("HOME", "/my/house")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", "/my/house/cann-8.5.1")
    monkeypatch.setenv("HCCL_TOKEN", "very-private")
    monkeypatch.setenv("ASCEND_NOTE", "not utf-8: \udcff")
    monkeypatch.setattr(env_check, "ENVIRONMENT", os.environ)
    monkeypatch.setattr("platform.node", lambda: "pod-8e032c81")
    program("npu-smi", "echo /my/house/process")
    done = check()
    assert section(done.log, "NPU Info") == "~/process"
    assert done.files["env_info.json"]["cann_version"] == "~/cann-8.5.1"
    assert "HCCL_TOKEN=***\n" in done.log
    for private in ("/my/house", "very-private", "pod-8e032c81"):
        assert private not in done.log + done.out + json.dumps(done.files)


def test_the_kernel_is_told_without_the_host_name(check, no_torch_npu):
    line = section(check().log, "System Info")
    assert line == f"{platform.system()} {platform.release()} {platform.version()} {platform.machine()}"


# --- what goes together ---


@pytest.mark.parametrize(
    ("torch_version", "torch_npu", "cann", "said"),
    [
        ("2.9.0", "2.9.0", "8.5.0", "torch_npu 2.9.0 with CANN 8.5.0 is a recommended pair"),
        ("2.9.0+cpu", "2.9.0.post1+gitee7ba04", "8.5.1", "torch_npu 2.9.0.post1 with CANN 8.5.1 is a recommended pair"),
        ("2.9.0+cpu", "2.9.0.post2", "9.0.0", "torch_npu 2.9.0.post2 with CANN 9.0.0 is a recommended pair"),
        ("2.9.0", "2.9.0.post6", "9.1.0", "torch_npu 2.9.0.post6 with CANN 9.1.0 is a recommended pair"),
        ("2.10.0", "2.10.0", "9.0.RC1", "torch_npu 2.10.0 with CANN 9.0.RC1 is a recommended pair"),
        ("2.12.0", "2.12.0", "9.1.2", "torch_npu 2.12.0 with CANN 9.1.2 is a recommended pair"),
        ("2.9.0", "2.9.0", "9.1.0", "torch_npu 2.9.0 with CANN 9.1.0 is allowed; the recommended pair is CANN 8.5"),
        ("2.12.0", "2.12.0", "8.5.0", "torch_npu 2.12.0 with CANN 8.5.0 is allowed; the recommended pair is CANN 9.1"),
    ],
)
def test_what_the_official_matrix_allows_fits(torch_version, torch_npu, cann, said):
    assert stacks.pairing(torch_version, torch_npu, cann) == (True, said)


def test_each_paired_torch_npu_is_allowed_with_each_cann_of_the_table():
    versions = [version for stack in stacks.STACKS for version in stack.paired]
    assert len(set(versions)) == len(versions) == 8
    for version in versions:
        torch_version = ".".join(version.split(".")[:3])
        for stack in stacks.STACKS:
            assert stacks.pairing(torch_version, version, f"{stack.cann}.0")[0]


@pytest.mark.parametrize(
    ("torch_version", "torch_npu", "cann", "starts", "ends"),
    [
        (
            "2.13.0+cpu",
            "2.12.0",
            "9.1.0",
            "torch_npu 2.12.0 needs torch 2.12.0, and this is torch 2.13.0+cpu: pip install torch==2.12.0 --index-url ",
            "whl/cpu, or install the whole line",
        ),
        ("2.9.1", "2.9.0", "8.5.0", "torch_npu 2.9.0 needs torch 2.9.0, and this is torch 2.9.1: ", "line"),
        ("2.1.0", "2.10.0.post4", "9.1.0", "torch_npu 2.10.0.post4 needs torch 2.10.0, and this is torch 2.1.0: ", "line"),
        (
            "2.12.0",
            "2.13.0",
            "9.1.0",
            "torch_npu 2.13.0 needs torch 2.13.*, and this is torch 2.12.0: pip install 'torch==2.13.*' --",
            "line",
        ),
        ("2.9.0", "2.9.0", "8.0.RC1", "torch_npu 2.9.0 with CANN 8.0.RC1 is not in the official matrix; ", "pair is CANN 8.5"),
        (
            "2.13.1",
            "2.13.0",
            "9.1.0",
            "torch_npu 2.13.0 with CANN 9.1.0 is not paired in the documents read; an older CANN may lack its symbols",
            "(undefined symbol at import)",
        ),
        ("2.9.0", "2.9.0.post4", "9.1.0", "torch_npu 2.9.0.post4 with CANN 9.1.0 is not paired in", "the documents read"),
        ("2.12.0", "2.12.0", None, "CANN's version cannot be told: install CANN, then run: source ", "toolkit/set_env.sh)"),
    ],
)
def test_versions_that_do_not_go_together_name_what_to_change(torch_version, torch_npu, cann, starts, ends):
    fits, words = stacks.pairing(torch_version, torch_npu, cann)
    assert not fits and words.startswith(starts) and words.endswith(ends)


def test_requirements_that_are_not_met_name_the_command():
    ours = importlib.metadata.version("transformers")
    lines = ["# a comment", "", "torch>=2.9", "transformers>=99,<100", "not-there-at-all>=1"]
    assert stacks.unmet(lines, "why") == [
        f"transformers is {ours}: pip install 'transformers>=99,<100' (why)",
        "not-there-at-all is not installed: pip install 'not-there-at-all>=1' (why)",
    ]


def test_a_build_from_source_meets_what_it_follows(monkeypatch):
    monkeypatch.setattr(stacks, "installed", lambda name: "2.10.0a0+gitee7ba04")
    assert stacks.unmet(["torch>=2.9,<2.14"], "why") == []


def test_packages_that_canns_compiler_lacks_are_told(check, no_torch_npu, monkeypatch):
    versions = {"numpy": "2.4.6", "decorator": "4.3", "psutil": None}
    monkeypatch.setattr(stacks, "installed", lambda name: versions.get(name, "99"))
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", "/none/cann-8.5.1")
    told = [line for line in check().files["env_info.json"]["advice"] if "error code 500001" in line]
    assert [line.split(" (")[0] for line in told if "protobuf" not in line] == [
        "decorator is 4.3: pip install 'decorator>=4.4'",
        "psutil is not installed: pip install psutil",
        "numpy is 2.4.6: pip install 'numpy>=1.26,<2'",
    ]
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", "/none/cann-9.0.0")
    assert not any(line.startswith("numpy") for line in check().files["env_info.json"]["advice"])


def test_advice_is_in_the_log_and_in_the_json(check, npu, monkeypatch):
    monkeypatch.setattr(inference, "versions", lambda: {"torch_npu": "2.9.0", "transformers": "5.0", "numpy": "2.0"})
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    installed = stacks.installed
    monkeypatch.setattr(stacks, "installed", lambda name: None if name == "decorator" else installed(name))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", "/usr/local/Ascend/cann-9.1.0")
    monkeypatch.setattr(env_check, "ENVIRONMENT", {"INF_NAN_MODE_FORCE_DISABLE": "1"})
    done = check()
    info = done.files["env_info.json"]
    for beginning in ("CANN was set up as", "INF_NAN_MODE_FORCE_DISABLE=1:", "decorator is not installed: "):
        assert [line for line in info["advice"] if line.startswith(beginning)]
    assert info["pairing"].startswith("torch_npu 2.9.0 needs torch 2.9.0, and this is torch 2.8.0")
    assert info["silent_variables"] == {"INF_NAN_MODE_FORCE_DISABLE": "1"}
    told = section(done.log, "What goes together")
    assert f"Versions: {info['pairing']}\nLook at\n" + "\n".join(f"- {line}" for line in info["advice"]) in told
    assert f"Install: {info['install']}" in told


# --- what decides silently ---


@pytest.mark.parametrize(
    "name",
    [
        *("INF_NAN_MODE_ENABLE", "INF_NAN_MODE_FORCE_DISABLE", "ACL_OP_INIT_MODE", "TASK_QUEUE_ENABLE", "CPU_AFFINITY_CONF"),
        *("OMP_NUM_THREADS", "PYTORCH_NPU_ALLOC_CONF", "ASCEND_LAUNCH_BLOCKING", "TORCH_NPU_USE_COMPATIBLE_IMPL"),
        "ASCEND_RT_VISIBLE_DEVICES",
    ],
)
def test_what_decides_silently_is_shown_with_its_meaning(name):
    assert re.fullmatch(rf"{name}=2 \(.{{20,}}\)", env_check.shown_variables({name: "2"})[0])
    assert env_check.meaning_of(name) and not env_check.meaning_of("HOME")


@pytest.mark.parametrize(
    ("name", "value", "warned"),
    [
        ("INF_NAN_MODE_FORCE_DISABLE", "1", "an overflow saturates .* inference.py refuses float16: unset it"),
        ("INF_NAN_MODE_FORCE_DISABLE", "0", None),
        ("ASCEND_RT_VISIBLE_DEVICES", "0,1,10", None),
        ("ASCEND_RT_VISIBLE_DEVICES", "", None),
        ("ASCEND_RT_VISIBLE_DEVICES", "1,0", "ASCEND_RT_VISIBLE_DEVICES=1,0: it must be ascending"),
        ("ASCEND_RT_VISIBLE_DEVICES", "0,0", "must be ascending"),
        ("ASCEND_RT_VISIBLE_DEVICES", "npu0", "must be ascending"),
    ],
)
def test_variables_that_spoil_a_result_are_warned_of(name, value, warned):
    lines = env_check.variables_fit({name: value})
    assert len(lines) == (warned is not None)
    assert warned is None or re.search(warned, lines[0])


# --- what to install ---

CANN_PACKAGES = [
    *("decorator", "sympy", "cffi", "protobuf", "attrs", "cython", "pyyaml", "pathlib2", "scipy", "requests", "psutil"),
    "absl-py",
]
CPU_BUILD = "--index-url https://download.pytorch.org/whl/cpu"


def cann(number: str) -> stacks.Cann:
    return stacks.Cann(number, number)


@pytest.mark.parametrize(
    ("found", "torch_npu"), [("8.5.1", "2.9.0"), ("9.0.0", "2.9.0.post2"), ("9.1.0", "2.10.0.post4"), ("9.2.0", "2.10.0.post4")]
)
def test_a_bare_host_is_told_the_whole_line_for_its_cann(found, torch_npu):
    line = stacks.install_advice(None, None, cann(found)).splitlines()[0].split(": ", 1)[1]
    first, second = line.split(" && ")
    assert first == f"pip install torch=={'.'.join(torch_npu.split('.')[:3])} {CPU_BUILD}"
    words = shlex.split(second)
    assert words[:3] == ["pip", "install", f"torch_npu=={torch_npu}"]
    assert words[3] == ("numpy>=1.26,<2" if found == "8.5.1" else "numpy>=1.26,<3")
    assert [re.split("[=>]", word)[0] for word in words[4:-2]] == CANN_PACKAGES
    assert words[-2:] == ["-r", "requirements.txt"]
    assert "PyPI's is a CUDA build" in stacks.install_advice(None, None, cann(found))


def test_the_python_that_a_torch_npu_has_no_wheel_for_is_told(monkeypatch):
    monkeypatch.setattr(platform, "python_version", lambda: "3.13.1")
    assert "this is Python 3.13; torch_npu 2.9.0 wants Python 3.10 or 3.11 or 3.12" in stacks.install_advice(
        None, None, cann("8.5.0")
    )
    assert "this is Python" not in stacks.install_advice(None, None, cann("9.0.0"))


@pytest.mark.parametrize(
    ("torch_npu", "found", "works"), [("2.9.0.post1+gitee7ba04", "8.5.1", False), ("2.9.0.post4", None, True)]
)
def test_an_ascend_image_keeps_what_it_has(torch_npu, found, works):
    told = stacks.install_advice("2.9.0+cpu", torch_npu, stacks.Cann(found, found), works)
    packages = "pip install -r requirements.txt" + (" 'numpy>=1.26,<2'" if found else "")
    assert told.startswith(f"keep torch 2.9.0+cpu and torch_npu {torch_npu}: {packages}, with this machine's own Python")
    assert told.endswith(f"python -m venv --system-site-packages .venv && .venv/bin/{packages}")


def test_a_torch_npu_that_goes_with_nothing_here_is_replaced_by_the_recommended_pair():
    assert "torch_npu==2.9.0 " in stacks.install_advice("2.13.0", "2.13.0", cann("8.5.0"))
    assert "torch_npu==2.9.0 " in stacks.install_advice("2.13.0", "2.9.0", cann("8.5.0"))


def test_without_a_usable_cann_it_is_told_what_to_do_first():
    assert stacks.install_advice("2.13.0", None, stacks.Cann(None, None)).startswith(
        "without an NPU: pip install -r requirements.txt; with one: install its driver and CANN, run: source /usr/local/Ascend/"
    )
    assert stacks.install_advice(None, None, cann("8.0.RC1")) == (
        "CANN 8.0.RC1 is older than torch_npu 2.9 allows: install CANN 8.5 or 9.0 or 9.1"
    )
    unknown = stacks.install_advice(None, None, stacks.Cann("/opt/cann", None))
    assert re.findall(r"for CANN ([\d.]+): pip install", unknown) == ["8.5", "9.0", "9.1"]


def test_requirements_leave_alone_what_an_ascend_image_has():
    from packaging.requirements import Requirement

    image = {"torch": "2.9.0+cpu", "transformers": "4.57.6", "numpy": "1.26.4", "pillow": "10.4.0"}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {Requirement(line).name: Requirement(line) for line in lines if not line.startswith("#")}
    assert "torch_npu" not in wanted
    assert "torch-npu" not in wanted
    for name, version in image.items():
        assert wanted[name].specifier.contains(version)


# --- the record of what pip resolves ---


def test_the_recorded_resolution_is_of_these_stacks_and_requirements():
    recorded = json.loads(resolve_stacks.RESOLUTION.read_text())
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert recorded["requirements"] == lines, "run: python tests/resolve_stacks.py"
    expected = json.loads(json.dumps([stack._asdict() | {"install": stacks.install_line(stack)} for stack in stacks.STACKS]))
    assert recorded["stacks"] == expected, "run: python tests/resolve_stacks.py"
    assert [(found["cann"], found["python"]) for found in recorded["resolved"]] == [
        (stack.cann, python) for stack in stacks.STACKS for python in stack.python
    ]


def test_each_recorded_resolution_is_what_the_stack_says_and_pulls_no_cuda():
    by_cann = {stack.cann: stack for stack in stacks.STACKS}
    for found in json.loads(resolve_stacks.RESOLUTION.read_text())["resolved"]:
        stack, versions = by_cann[found["cann"]], found["versions"]
        assert found["resolves"] is True
        assert (versions["torch"], versions["torch-npu"]) == (stack.torch, stack.torch_npu)
        assert (versions["numpy"] < "2") == stack.numpy.endswith("<2")
        assert [name for name in versions if name.startswith(("nvidia", "triton", "cuda"))] == []
        assert set(CANN_PACKAGES) <= set(versions)


@pytest.mark.parametrize("resolves", [True, False])
def test_resolving_asks_pip_for_the_target_and_keeps_its_report(monkeypatch, resolves):
    """pip is played: the markers' environment is the target's, and what the report says becomes versions."""

    def pip(command: list[str], **_: object) -> SimpleNamespace:
        target = command[command.index("--python-version") + 1]
        assert (command[3], target) == ("3.10", "3.10")
        assert {"torch==2.9.0", "torch_npu==2.9.0", "numpy>=1.26,<2", "manylinux_2_28_aarch64"} <= set(command)
        names = [{"metadata": {"name": name, "version": "1"}} for name in ("Torch_NPU", "triton")]
        if resolves:
            Path(command[command.index("--report") + 1]).write_text(json.dumps({"install": names}))
        return SimpleNamespace(returncode=1 - resolves, stderr="noise\nERROR: first\nERROR: no such version\n")

    monkeypatch.setattr(subprocess, "run", pip)
    outcome = resolve_stacks.resolve(stacks.STACKS[0], "3.10")
    more = {"versions": {"torch-npu": "1", "triton": "1"}} if resolves else {"error": "ERROR: no such version"}
    assert outcome == {"cann": "8.5", "python": "3.10", "resolves": resolves} | more


# --- where CANN is ---


@pytest.mark.parametrize(
    ("name", "content", "version"),
    [
        (
            "aarch64-linux/ascend_toolkit_install.info",
            "package_name=Ascend-cann-toolkit\nversion=8.5.1\ninnerversion=V100\n",
            "8.5.1",
        ),
        ("ascend_toolkit_install.info", "package_name=x\r\nversion=8.5.0\r\n", "8.5.0"),
        ("version.cfg", "# version: 1.0\nruntime_running_version=[7.6.T1.0.B051:8.1.RC1]\n", "8.1.RC1"),
        ("version.info", "Version=7.6.0.1\nversion_dir=cann-9.1.0\n", "9.1.0"),
        ("version.info", "Version=9.0.0\n", "9.0.0"),
    ],
)
def test_canns_version_is_read_from_its_files(tmp_path, name, content, version):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content, newline="")
    assert stacks.find_cann({"ASCEND_TOOLKIT_HOME": str(tmp_path)}) == (version, version, None)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, (None, None)),
        ({"ASCEND_TOOLKIT_HOME": PUBLISHED["cann_version"]}, (PUBLISHED["cann_version"], "8.5.1")),
        ({"ASCEND_HOME_PATH": "/opt/python3.11.14/ascend/8.0.RC1"}, ("/opt/python3.11.14/ascend/8.0.RC1", "8.0.RC1")),
        ({"ASCEND_HOME_PATH": "/opt/ascend-25.5.2/cann-8.5.1"}, ("/opt/ascend-25.5.2/cann-8.5.1", "8.5.1")),
        ({"ASCEND_TOOLKIT_HOME": "/opt/ascend/latest"}, ("/opt/ascend/latest", None)),
    ],
)
def test_canns_folder_is_reported_where_no_file_tells_a_version(environment, found, monkeypatch, tmp_path):
    monkeypatch.setattr(stacks, "ASCEND", tmp_path)
    assert stacks.find_cann(environment)[:2] == found


def test_a_cann_that_was_set_up_and_is_gone_is_told():
    assert stacks.find_cann({"ASCEND_HOME_PATH": "/none/cann-8.5.1"}) == (
        "/none/cann-8.5.1",
        "8.5.1",
        "CANN was set up as /none/cann-8.5.1, which is no folder: install it",
    )


@pytest.mark.parametrize("folder", ["cann", "ascend-toolkit", "cann-9.0.0"])
def test_a_cann_that_is_installed_and_not_set_up_is_told_with_its_script(monkeypatch, tmp_path, folder):
    monkeypatch.setattr(stacks, "ASCEND", tmp_path)
    home = tmp_path / folder / ("latest" if folder == "ascend-toolkit" else "")
    home.mkdir(parents=True)
    (tmp_path / folder / "set_env.sh").write_text("")
    (home / "version.cfg").write_text("runtime_running_version=[8.0.0.1:9.0.0]\n")
    note = f"CANN is installed and not set up: run: source {tmp_path}/{folder}/set_env.sh"
    assert stacks.find_cann({}) == ("9.0.0", "9.0.0", note)


def test_canns_folder_may_be_a_link_to_a_version(tmp_path):
    (tmp_path / "cann-9.0.0").mkdir()
    (tmp_path / "latest").symlink_to("cann-9.0.0")
    assert stacks.find_cann({"ASCEND_TOOLKIT_HOME": f"{tmp_path}/latest"}) == (f"{tmp_path}/latest", "9.0.0", None)


# --- the lock ---

MODEL = inference.HUB_ID
NOT_RECORDED = "| not recorded | not recorded |"
TABLE = (
    "Prose with `model.safetensors`.\n\n| a | `model.safetensors` | x |\n\n"
    f"{env_check.LOCK_HEADING}\n|---|---|---|---|\n| `{MODEL}` | `model.safetensors` {NOT_RECORDED}\n"
    f"| `facebook/other` | `model.safetensors` {NOT_RECORDED}\n\nThe end.\u2028"
)


def test_locking_changes_the_rows_of_its_files_and_nothing_else():
    updated = env_check.update_locks(TABLE, MODEL, {"model.safetensors": (5, DIGEST)})
    row = f"| `{MODEL}` | `model.safetensors` "
    assert updated == TABLE.replace(f"{row}{NOT_RECORDED}", f"{row}| 5 | `{DIGEST}` |")


def test_a_file_that_is_not_in_the_table_is_added_at_its_end():
    updated = env_check.update_locks(TABLE, MODEL, {"new.safetensors": (7, DIGEST)})
    assert updated == TABLE.replace("\n\nThe end", f"\n| `{MODEL}` | `new.safetensors` | 7 | `{DIGEST}` |\n\nThe end")
    bare = f"{env_check.LOCK_HEADING}\n|---|---|---|---|"
    assert env_check.update_locks(bare, MODEL, {"a": (1, DIGEST)}) == f"{bare}\n| `{MODEL}` | `a` | 1 | `{DIGEST}` |"


def test_locking_twice_is_locking_once():
    files = {"model.safetensors": (5, DIGEST), "new.safetensors": (7, OTHER)}
    once = env_check.update_locks(TABLE, MODEL, files)
    assert env_check.update_locks(once, MODEL, files) == once


def test_a_recorded_hash_is_not_replaced_and_another_models_does_not_matter():
    locked = env_check.update_locks(TABLE, MODEL, {"model.safetensors": (5, DIGEST)})
    message = rf"^model\.safetensors: locked_models\.md records another sha256 for {MODEL} \(aaaaaaaaaaaa"
    with pytest.raises(inference.UsageError, match=message):
        env_check.update_locks(locked, MODEL, {"model.safetensors": (5, OTHER)})
    both = env_check.update_locks(locked, "facebook/other", {"model.safetensors": (5, OTHER)})
    assert (both.count(DIGEST), both.count(OTHER)) == (1, 1)


def test_the_table_of_the_bundle_locks_only_what_is_recorded():
    text = (ROOT / "locked_models.md").read_text(encoding="utf-8")
    recorded = inference.read_locks(ROOT / "locked_models.md")
    names = ["config.json", "preprocessor_config.json", "model.safetensors", "webssl_mae300m_full2b_224.pth"]
    for name in names:
        is_open = f"| `{MODEL}` | `{name}` {NOT_RECORDED}" in text
        assert is_open != ((MODEL, name) in recorded), name
    assert {model for model, _ in recorded} <= {card.hub_id for card in inference.CARDS}
    for card in inference.CARDS[:3]:
        assert f"| `{card.hub_id}` | `model.safetensors` |" in text
    facts = ("CC BY-NC 4.0", "304,351,232", "303,301,632", "ViTModel", "--allow_unlocked")
    for fact in (*inference.HUB_COMMITS.items(), *facts):
        assert all(part in text for part in ([fact] if isinstance(fact, str) else fact))


@pytest.fixture
def as_the_cards(monkeypatch) -> None:
    """Tiny checkpoints count as the model of the card."""
    monkeypatch.setattr(inference, "identify", lambda _config: MODEL)


def test_locked_weights_are_taken_and_changed_ones_refused(
    check, run, no_torch_npu, locks, as_the_cards, tiny_folder, tmp_path
):
    folder = tmp_path / "weights"
    shutil.copytree(tiny_folder, folder)
    done = check("--lock_weights", folder)
    assert (done.code, done.err) == (0, "")
    recorded = inference.read_locks()
    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    assert recorded == {(MODEL, name): hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    size, digest = (folder / "model.safetensors").stat().st_size, recorded[MODEL, "model.safetensors"]
    assert f"| `{MODEL}` | `model.safetensors` | {size} | `{digest}` |\n" in locks.read_text()
    assert f"Locked: {MODEL}, model.safetensors, {size} bytes, sha256 {digest}" in done.log

    common = ("--image_path", PHOTO, "--model_path", folder, "--device", "cpu")
    assert run(*common).code == 0
    change_last_byte(folder / "model.safetensors")
    refused = run(*common)
    assert refused.code == 2
    assert "model.safetensors: its sha256 is not the one recorded in locked_models.md" in refused.terminal
    assert run(*common, "--allow_unlocked").code == 0

    before = locks.read_bytes()
    again = check("--lock_weights", folder)
    assert again.code == 2
    assert again.err.startswith("error: model.safetensors: locked_models.md records another sha256 for ")
    assert len(again.err.splitlines()) == 1
    assert locks.read_bytes() == before


def test_another_model_is_not_locked(check, no_torch_npu, locks, tiny_folder):
    before = locks.read_bytes()
    done = check("--lock_weights", tiny_folder)
    assert (done.code, done.files, locks.read_bytes()) == (2, {}, before)
    assert "this is another model (128 wide, 3 layers, 2 heads, patches of 16), no Web-SSL MAE encoder" in done.err


def test_weights_that_look_untrained_are_not_locked(check, no_torch_npu, locks, as_the_cards, tmp_path):
    import transformers

    save_checkpoint(tmp_path / "fresh", transformers.ViTModel(transformers.ViTConfig(**TINY)))
    before = locks.read_bytes()
    done = check("--lock_weights", tmp_path / "fresh")
    assert (done.code, done.files, locks.read_bytes()) == (2, {}, before)
    assert "the checkpoint looks untrained; nothing was recorded" in done.err


def change_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_metas_native_file_is_locked_alone(check, no_torch_npu, locks, as_the_cards, tiny_native):
    before = locks.read_text()
    assert check("--lock_weights", tiny_native).code == 0
    digest = hashlib.sha256(tiny_native.read_bytes()).hexdigest()
    assert inference.read_locks() == {(MODEL, tiny_native.name): digest}
    row = f"| `{MODEL}` | `{tiny_native.name}` | {tiny_native.stat().st_size} | `{digest}` |\n"
    assert locks.read_text().replace(row, "") == before


@pytest.mark.parametrize("kind", ["empty folder", "nothing", "a picture", "truncated", "a Git LFS pointer"])
def test_what_is_not_the_weights_is_refused_with_one_line(check, no_torch_npu, locks, tiny_folder, tmp_path, kind):
    path, before = tmp_path / "weights", locks.read_bytes()
    if kind == "a picture":
        path = PHOTO
    elif kind != "nothing":
        path.mkdir()
    if kind in ("truncated", "a Git LFS pointer"):
        shutil.copytree(tiny_folder, path, dirs_exist_ok=True)
        data = (path / "model.safetensors").read_bytes()[:-1000]
        (path / "model.safetensors").write_bytes(
            data if kind == "truncated" else b"version https://git-lfs.github.com/spec/v1\n"
        )
    done = check("--lock_weights", path)
    assert done.code == 2
    expected = kind if "truncated" in kind or "LFS" in kind else f"--lock_weights {path}: no weights there; name a folder"
    assert done.err.startswith("error: ")
    assert expected in done.err
    assert len(done.err.splitlines()) == 1
    assert locks.read_bytes() == before
    assert done.files == {}
