"""What the bundle uses of torch_npu exists in torch_npu's own sources, and the real package without CANN is explained.

TORCH_NPU_WHEELS names a folder with the torch_npu wheels (pip download --no-deps torch_npu==2.9.0, and 2.13.0): .ci/run
fetches them. They are read as text; nothing of them is installed.
"""

from __future__ import annotations

import ast
import os
import re
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLES, run_script

WHEELS = Path(os.environ.get("TORCH_NPU_WHEELS", "/nonexistent"))
VERSIONS = ("2.9.0", "2.13.0")
SCRIPTS = [ROOT / "inference.py", *sorted((ROOT / "eval").glob("*.py"))]


def wheel(version: str) -> zipfile.ZipFile:
    found = sorted(WHEELS.glob(f"torch_npu-{version}-*.whl"))
    if not found:
        pytest.skip("TORCH_NPU_WHEELS names no folder with this wheel")
    return zipfile.ZipFile(found[0])


def used(pattern: str) -> set[str]:
    return {name for script in SCRIPTS for name in re.findall(pattern, script.read_text(encoding="utf-8"))}


def used_of_the_device_module() -> set[str]:
    return used(r"\btorch\.npu\.(\w+)") | used(r"\b_?backend\.(\w+)") | used(r"\bget_device_module\([^)]*\)\.(\w+)")


def exported(source: str) -> set[str]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError("no __all__")


def test_the_names_that_are_used_are_found():
    assert {
        "is_available",
        "device_count",
        "set_device",
        "conv",
        "matmul",
        "NPUGraph",
        "graph",
        "Event",
        "synchronize",
    } <= used_of_the_device_module()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_used_of_torch_npu_exists_in_its_sources(version):
    with wheel(version) as archive:
        names = exported(archive.read("torch_npu/npu/__init__.py").decode())
        switches = archive.read("torch_npu/npu/npu_config.py").decode()
    assert used_of_the_device_module() - {"CUDAGraph"} <= names
    for switch in ("_allowHF32Conv", "_allowHF32Matmul"):
        body = switches.split(f"class {switch}:")[1].split("\nclass ")[0]
        assert 'if name == "allow_hf32":' in body.split("def __setattr__")[1]


def test_every_name_used_of_the_device_module_exists_for_gpus_too():
    only_npu = {"conv", "matmul", "NPUGraph"}
    assert all(hasattr(torch.cuda, name) for name in used_of_the_device_module() - only_npu)


@pytest.mark.skipif(torch.__version__.split("+")[0] != "2.13.0", reason="the wheel goes with torch 2.13.0")
@pytest.mark.skipif(Path("/usr/local/Ascend").exists(), reason="CANN may be installed here")
@pytest.mark.parametrize("device", ["npu", "auto", "cpu"])
def test_the_real_torch_npu_without_cann(tmp_path, tiny_folder, device):
    with wheel("2.13.0") as archive:
        archive.extractall(tmp_path)
    photo = SAMPLES / "chelsea.jpg"
    flags = ["--output_log", tmp_path / "log", "--results_dir", tmp_path / "results", "--model_path", tiny_folder]
    done = run_script("inference.py", "--image_path", photo, "--device", device, *flags, PYTHONPATH=str(tmp_path))
    if device == "npu":
        assert done.returncode == 3
        assert done.stderr.startswith(
            "BLOCKED: CANN is not installed or not set up (libhccl.so: cannot open shared object file"
        )
        assert "source /usr/local/Ascend/ascend-toolkit/set_env.sh" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert ("no NPU: CANN is not installed or not set up" in done.stderr) == (device == "auto")
