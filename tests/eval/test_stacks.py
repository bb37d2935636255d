"""Which versions go together, where CANN is, what to install, and the record of what pip resolves."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import resolve_stacks
import stacks
from conftest import ROOT

PUBLISHED = json.loads((ROOT / "results" / "published" / "env_info.json").read_text())


# --- what goes together ---

NEWER = "is a recommended pair; the newest for it is"


@pytest.mark.parametrize(
    ("torch_version", "torch_npu", "cann", "said"),
    [
        ("2.9.0", "2.9.0", "8.5.0", f"torch_npu 2.9.0 with CANN 8.5.0 {NEWER} 2.9.0.post1"),
        ("2.9.0+cpu", "2.9.0.post1+gitee7ba04", "8.5.1", "torch_npu 2.9.0.post1 with CANN 8.5.1 is a recommended pair"),
        ("2.9.0+cpu", "2.9.0.post2", "9.0.0", "torch_npu 2.9.0.post2 with CANN 9.0.0 is a recommended pair"),
        (
            "2.9.0",
            "2.9.0.post6",
            "9.1.0",
            "torch_npu 2.9.0.post6 with CANN 9.1.0 is a recommended pair; the newest for it is 2.9.0.post8",
        ),
        ("2.10.0", "2.10.0", "9.0.RC1", "torch_npu 2.10.0 with CANN 9.0.RC1 is a recommended pair"),
        ("2.12.0", "2.12.0.post2", "9.1.2", "torch_npu 2.12.0.post2 with CANN 9.1.2 is a recommended pair"),
        ("2.9.0", "2.9.0", "9.1.0", "torch_npu 2.9.0 with CANN 9.1.0 is allowed; the recommended pair is CANN 8.5"),
        ("2.12.0", "2.12.0", "8.5.0", "torch_npu 2.12.0 with CANN 8.5.0 is allowed; the recommended pair is CANN 9.1"),
    ],
)
def test_what_the_official_matrix_allows_fits(torch_version, torch_npu, cann, said):
    assert stacks.pairing(torch_version, torch_npu, cann) == (True, said)


def test_each_paired_torch_npu_is_allowed_with_each_cann_of_the_table():
    versions = [version for stack in stacks.STACKS for version in stack.paired]
    assert len(set(versions)) == len(versions) == 12
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


@pytest.mark.parametrize(("machine", "fits"), [("x86_64", False), ("aarch64", True)])
def test_a_torch_npu_that_ends_the_process_at_import_is_told(monkeypatch, machine, fits):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    said = stacks.pairing("2.14.0", "2.14.0", "9.1.0")[1]
    assert ("ends the process when it is imported" in said) is not fits


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


# --- what to install ---

CANN_PACKAGES = [
    *("decorator", "sympy", "cffi", "protobuf", "attrs", "cython", "pyyaml", "pathlib2", "scipy", "requests", "psutil"),
    "absl-py",
]

CPU_BUILD = "--index-url https://download.pytorch.org/whl/cpu"


def cann(number: str) -> stacks.Cann:
    return stacks.Cann(number, number)


@pytest.mark.parametrize(
    ("found", "torch_npu"), [("8.5.1", "2.9.0"), ("9.0.0", "2.9.0.post2"), ("9.1.0", "2.10.0.post6"), ("9.2.0", "2.10.0.post6")]
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
