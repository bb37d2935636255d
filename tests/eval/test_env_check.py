"""env_check.py: what machine this is, on any machine, and what must not be published of it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import inference
import pytest
import torch

import env_check
import stacks
from conftest import ROOT, run_script

PUBLISHED = json.loads((ROOT / "results" / "published" / "env_info.json").read_text())


@pytest.fixture(autouse=True)
def no_import_check(monkeypatch):
    """It is a process that imports transformers; tests/test_surroundings.py has it."""
    monkeypatch.setattr(env_check, "imports_fit", list)


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


def test_an_npu_that_works_is_named_and_counted(check, as_an_npu, monkeypatch):
    monkeypatch.setattr(torch.npu, "device_count", lambda: 2)
    done = check()
    info = done.files["env_info.json"]
    assert (info["npu_status"], info["npu_blocked_reason"]) == ("available", None)
    assert (info["npu_model"], info["npu_count"]) == (torch.npu.get_device_name(0), 2)
    assert f"NPU: available, 2 x {torch.npu.get_device_name(0)}" in done.log


def test_an_npu_that_fails_in_an_unforeseen_way_is_blocked(check, monkeypatch):
    monkeypatch.setattr(inference, "open_device", lambda _spec: 1 / 0)
    done = check()
    assert done.code == 0
    told = "the NPU cannot be used (division by zero). What that means is not known here"
    assert done.files["env_info.json"]["npu_blocked_reason"].startswith(told)


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


def test_a_torch_npu_without_cann_is_blocked_with_the_reason(tmp_path):
    """torch would import it by itself, and fail."""
    there = tmp_path / "site" / f"torch_npu-{torch.__version__}.dist-info"
    there.mkdir(parents=True)
    (there / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {torch.__version__}\n")
    (there / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    error = "libhccl.so: cannot open shared object file: No such file or directory"
    (tmp_path / "site" / "torch_npu.py").write_text(f"raise ImportError({error!r})\n")
    where = ("--results_dir", tmp_path, "--output_log", tmp_path / "log")
    done = run_script("eval/env_check.py", *where, PYTHONPATH=str(tmp_path / "site"), TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert (done.returncode, done.stderr) == (0, "")
    info = json.loads((tmp_path / "env_info.json").read_text())
    assert info["npu_blocked_reason"].startswith(f"CANN is not installed or not set up ({error}). Install CANN, then run: ")
    assert info["torch_npu_version"] == torch.__version__


# --- where it goes ---


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


def test_a_machine_whose_npu_works_replaces_every_record(check, as_an_npu, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "env_info.json").write_text('{"npu_status": "available"}')
    done = check()
    assert done.files["env_info.json"]["npu_model"] == torch.npu.get_device_name(0)
    assert list(done.files) == ["env_info.json"]


# --- how it ends ---


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


@pytest.mark.parametrize(
    ("name", "raised", "said"),
    [
        ("torch", "ModuleNotFoundError(\"No module named 'torch'\")", "No module named 'torch'"),
        ("torch", "OSError('libgomp.so: not there')", "libgomp.so: not there"),  # a library that torch needs
        ("numpy", "ModuleNotFoundError(\"No module named 'numpy'\")", "No module named 'numpy'"),
        ("PIL", "ModuleNotFoundError(\"No module named 'PIL'\")", "No module named 'PIL'"),
    ],
)
def test_a_host_that_lacks_a_package_is_told_the_whole_line(tmp_path, name, raised, said):
    (tmp_path / "cann-8.5.1").mkdir()
    (tmp_path / f"{name}.py").write_text(f"raise {raised}\n")
    done = run_script("eval/env_check.py", PYTHONPATH=str(tmp_path), ASCEND_TOOLKIT_HOME=f"{tmp_path}/cann-8.5.1")
    assert (done.returncode, done.stdout) == (2, "")
    line = done.stderr.splitlines()[0]
    assert line.startswith(f"error: {said}. To install: ") and "pip install torch" in line
    assert "Traceback" not in done.stderr


def test_a_bare_host_is_told_what_to_install(tmp_path):
    """With Python's own library alone, as no site has been set up."""
    command = [sys.executable, "-S", str(ROOT / "eval" / "env_check.py")]
    environment = {"ASCEND_TOOLKIT_HOME": f"{tmp_path}/cann-8.5.1", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    line = done.stderr.splitlines()[0]
    assert re.match(
        r"error: No module named '\w+'\. To install: recommended pair for CANN 8\.5: pip install torch==2\.9\.0 ", line
    )
    assert line.endswith("-r requirements.txt")
    assert "Traceback" not in done.stderr


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


# --- what to look at ---


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
