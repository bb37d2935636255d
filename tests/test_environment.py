"""What machine this is, on any machine; what goes together; and weights that are locked."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import env_check
import inference
import pytest
import torch
from conftest import ROOT, SAMPLES, run_script

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
    more = "npu_status npu_blocked_reason cpu cpu_cores memory_gb gpu advice time_utc command git_commit git_dirty"
    assert set(info) == {*PUBLISHED, *more.split()}
    assert info["python_version"] == ".".join(map(str, sys.version_info[:3]))
    assert info["torch_version"] == torch.__version__
    assert info["os"].endswith(info["architecture"])
    assert info["memory_gb"] > 0.1
    assert info["cpu"]


def test_without_torch_npu_the_npu_is_blocked_with_the_reason(check, no_torch_npu):
    done = check()
    info = done.files["env_info.json"]
    assert done.code == 0
    assert info["npu_status"] == "blocked"
    assert info["npu_blocked_reason"].startswith("torch_npu is not installed. Install ")
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
    monkeypatch.setattr(
        inference, "open_device", lambda spec: 1 / 0 if spec == "npu" else SimpleNamespace(name="a CPU, 1 threads")
    )
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
        **{"PATH": "", "ASCEND_TOOLKIT_HOME": "/none/cann", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"},
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
    kept = [line for line in done.log.splitlines() if "is kept: it records a machine whose NPU works" in line]
    assert len(kept) == 1
    assert kept[0].endswith("This machine is in env_info_cpu.json")


def test_a_blocked_run_keeps_the_log_of_a_machine_with_an_npu(monkeypatch, no_torch_npu, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "results" / "env_info.json").write_text('{"npu_status": "available"}')
    (tmp_path / "logs" / "env_check.log").write_text("an NPU's log")
    monkeypatch.setattr(inference, "ROOT", tmp_path)
    assert env_check.main(["--results_dir", str(tmp_path / "results")]) == 0
    assert (tmp_path / "logs" / "env_check.log").read_text() == "an NPU's log"
    assert "npu-smi" in (tmp_path / "logs" / "env_check_cpu.log").read_text()


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


def test_a_hanging_npu_smi_is_given_up_with_all_that_it_started(check, no_torch_npu, program, monkeypatch, tmp_path):
    program("npu-smi", f"(sleep 1; touch {tmp_path}/still_there) & sleep 60")
    monkeypatch.setattr(env_check, "TOOL_TIMEOUT_S", 0.3)
    started = time.perf_counter()
    done = check()
    assert time.perf_counter() - started < 30
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
        ("TASK_QUEUE_ENABLE", "2", "2"),
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
    ("torch_version", "torch_npu", "cann"),
    [
        ("2.9.0", "2.9.0", "8.5.0"),
        ("2.9.0+cpu", "2.9.0.post1+gitee7ba04", "8.5.1"),
        ("2.9.0+cpu", "2.9.0.post2", "9.0.0"),
        ("2.9.0", "2.9.0.post6", "9.1.0"),
        ("2.10.0", "2.10.0.post4", "9.1.0"),
        ("2.11.0", "2.11.0", "9.1.0"),
        ("2.12.0", "2.12.0", "9.1.0"),
        ("2.13.0", None, None),
        ("2.13.0", None, "9.1.0"),
    ],
)
def test_versions_that_go_together_need_no_advice(torch_version, torch_npu, cann):
    assert env_check.versions_fit(torch_version, torch_npu, cann) == []


@pytest.mark.parametrize(
    ("torch_version", "torch_npu", "cann", "starts", "ends"),
    [
        (
            "2.13.0+cpu",
            "2.12.0",
            "9.1.0",
            "torch_npu 2.12.0 needs torch 2.12.0, and this is torch 2.13.0+cpu: install torch 2.12.0 (",
            "or the torch_npu of torch's version",
        ),
        ("2.9.1", "2.9.0", "8.5.0", "torch_npu 2.9.0 needs torch 2.9.0, and this is torch 2.9.1: install", "version"),
        ("2.1.0", "2.10.0.post4", "9.1.0", "torch_npu 2.10.0.post4 needs torch 2.10.0, and this is torch 2.1.0: ", "version"),
        (
            "2.9.0",
            "2.9.0",
            "9.0.0",
            "torch_npu 2.9.0 goes with CANN 8.5.0, and this is CANN 9.0.0: install CANN 8.5.0",
            ", or a torch_npu recorded with CANN 9.0.0: 2.9.0.post2",
        ),
        ("2.9.0", "2.9.0", "8.0.RC1", "torch_npu 2.9.0 goes with CANN 8.5.0, and this is CANN 8.0.RC1: ", "install CANN 8.5.0"),
        (
            "2.9.0",
            "2.9.0",
            "8.5.1",
            "torch_npu 2.9.0 with CANN 8.5.1 was not recorded, which does not make it wrong",
            "(torch_npu 2.9.0 is recorded with CANN 8.5.0; torch_npu recorded with CANN 8.5.1: 2.9.0.post1)",
        ),
        ("2.13.0", "2.13.0", "9.2.0", "torch_npu 2.13.0 with CANN 9.2.0 was not recorded, which ", "does not make it wrong"),
        (
            "2.12.0",
            "2.12.0",
            None,
            "CANN's version cannot be told: install CANN 9.1.0, which torch_npu 2.12.0 goes with",
            "set_env.sh",
        ),
        ("2.13.0", "2.13.0", None, "CANN's version cannot be told: install CANN, then run: source ", "set_env.sh"),
    ],
)
def test_versions_that_do_not_go_together_name_what_to_change(torch_version, torch_npu, cann, starts, ends):
    [line] = env_check.versions_fit(torch_version, torch_npu, cann)
    assert line.startswith(starts)
    assert line.endswith(ends)


def test_every_pair_that_does_not_fit_has_its_own_line():
    assert len(env_check.versions_fit("2.13.0", "2.9.0", "9.1.0")) == 2


def test_the_table_is_the_one_in_the_readme():
    rows = dict(re.findall(r"^\| ([\d.post]+) \| [\d.]+ \| ([\d.]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {version: cann for version, cann in rows.items() if version.startswith("2.")} == env_check.RECORDED_CANN


def test_requirements_that_are_not_met_name_the_command():
    ours = importlib.metadata.version("transformers")
    lines = [
        "# a comment",
        "torch>=2.9",
        "transformers>=99,<100",
        "torch_npu>=99",
        "not-there-at-all>=1",
        'numpy>=99; sys_platform == "os2"',
    ]
    assert env_check.requirements_fit(lines) == [
        f"transformers {ours} is not what requirements.txt asks for: pip install 'transformers<100,>=99'",
        "not-there-at-all is not installed: pip install -r requirements.txt",
    ]


def test_advice_is_in_the_log_and_in_the_json(check, npu, monkeypatch):
    monkeypatch.setattr(inference, "versions", lambda: {"torch_npu": "2.9.0", "transformers": "5.0", "numpy": "2.0"})
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", "/usr/local/Ascend/cann-9.1.0")
    done = check()
    advice = done.files["env_info.json"]["advice"]
    assert advice[0].startswith(
        "torch_npu 2.9.0 goes with CANN 8.5.0, and this is CANN 9.1.0: install CANN 8.5.0, or a torch_npu"
    )
    assert "Versions: look at\n" + "\n".join(f"- {line}" for line in advice) in section(done.log, "What goes together")


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
    assert env_check.find_cann({"ASCEND_TOOLKIT_HOME": str(tmp_path)}) == (version, version)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, (None, None)),
        ({"ASCEND_TOOLKIT_HOME": PUBLISHED["cann_version"]}, (PUBLISHED["cann_version"], "8.5.1")),
        ({"ASCEND_HOME_PATH": "/opt/python3.11.14/ascend/8.0.RC1"}, ("/opt/python3.11.14/ascend/8.0.RC1", "8.0.RC1")),
        ({"ASCEND_TOOLKIT_HOME": "/opt/ascend/latest"}, ("/opt/ascend/latest", None)),
    ],
)
def test_canns_folder_is_reported_where_no_file_tells_a_version(environment, found):
    assert env_check.find_cann(environment) == found


def test_canns_folder_may_be_a_link_to_a_version(tmp_path):
    (tmp_path / "cann-9.0.0").mkdir()
    (tmp_path / "latest").symlink_to("cann-9.0.0")
    assert env_check.find_cann({"ASCEND_TOOLKIT_HOME": f"{tmp_path}/latest"}) == (f"{tmp_path}/latest", "9.0.0")


# --- the lock ---

TABLE = (
    "Prose with `model.safetensors`.\r\n\r\n| a | `model.safetensors` | x |\r\n\r\n| file | bytes | sha256 |\r\n|---|---|---|\r\n"
    "| `model.safetensors` | not recorded | not recorded |\r\n| `other.pth` | not recorded | not recorded |\r\n\r\nThe end.\u2028"
)


def test_locking_changes_the_rows_of_its_files_and_nothing_else():
    updated = env_check.update_locks(TABLE, {"model.safetensors": (5, DIGEST)})
    assert updated == TABLE.replace(
        "| `model.safetensors` | not recorded | not recorded |", f"| `model.safetensors` | 5 | `{DIGEST}` |"
    )


def test_a_file_that_is_not_in_the_table_is_added_at_its_end():
    updated = env_check.update_locks(TABLE, {"new.safetensors": (7, DIGEST)})
    assert updated == TABLE.replace("\r\n\r\nThe end", f"\r\n| `new.safetensors` | 7 | `{DIGEST}` |\r\n\r\nThe end")
    assert env_check.update_locks("| file | bytes | sha256 |\n|---|---|---|", {"a": (1, DIGEST)}) == (
        f"| file | bytes | sha256 |\n|---|---|---|\n| `a` | 1 | `{DIGEST}` |\n"
    )


def test_locking_twice_is_locking_once():
    files = {"model.safetensors": (5, DIGEST), "new.safetensors": (7, OTHER)}
    once = env_check.update_locks(TABLE, files)
    assert env_check.update_locks(once, files) == once


def test_a_recorded_hash_is_not_replaced():
    locked = env_check.update_locks(TABLE, {"model.safetensors": (5, DIGEST)})
    with pytest.raises(
        inference.UsageError, match=r"^model\.safetensors: locked_models\.md records another sha256 \(aaaaaaaaaaaa"
    ):
        env_check.update_locks(locked, {"model.safetensors": (5, OTHER)})


def test_a_table_that_is_gone_is_told():
    with pytest.raises(inference.UsageError, match="has no table"):
        env_check.update_locks("nothing", {"a": (1, DIGEST)})


def test_the_table_of_the_bundle_locks_only_what_is_recorded():
    text = (ROOT / "locked_models.md").read_text(encoding="utf-8")
    recorded = inference.read_locks(ROOT / "locked_models.md")
    names = ["config.json", "preprocessor_config.json", "model.safetensors", "webssl_mae300m_full2b_224.pth"]
    open_rows = [name for name in names if f"| `{name}` | not recorded | not recorded |" in text]
    assert set(recorded) | set(open_rows) == set(names)
    assert set(recorded) & set(open_rows) == set()
    for fact in (
        inference.HUB_ID,
        inference.HUB_COMMIT,
        "CC BY-NC 4.0",
        "304,351,232",
        "303,301,632",
        "ViTModel",
        "--allow_unlocked",
    ):
        assert fact in text


def test_locked_weights_are_taken_and_changed_ones_refused(check, run, no_torch_npu, locks, tiny_folder, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(tiny_folder, folder)
    done = check("--lock_weights", folder)
    assert (done.code, done.err) == (0, "")
    recorded = inference.read_locks()
    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    assert recorded == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    size = (folder / "model.safetensors").stat().st_size
    assert f"| `model.safetensors` | {size} | `{recorded['model.safetensors']}` |\n" in locks.read_text()
    assert f"Locked: model.safetensors, {size} bytes, sha256 {recorded['model.safetensors']}" in done.log

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
    assert again.err.startswith("error: model.safetensors: locked_models.md records another sha256 (")
    assert len(again.err.splitlines()) == 1
    assert locks.read_bytes() == before


def change_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_metas_native_file_is_locked_alone(check, no_torch_npu, locks, tiny_native):
    before = locks.read_text()
    assert check("--lock_weights", tiny_native).code == 0
    digest = hashlib.sha256(tiny_native.read_bytes()).hexdigest()
    assert inference.read_locks() == {"tiny.pth": digest}
    row = f"| `tiny.pth` | {tiny_native.stat().st_size} | `{digest}` |\n"
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
