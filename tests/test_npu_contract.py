"""What the bundle and its simulated NPU take from torch_npu is in torch_npu's own wheels: names, signatures, behaviour.

TORCH_NPU_WHEELS names a folder with the torch_npu wheels (pip download --no-deps torch_npu==2.9.0, 2.9.0.post2 and 2.13.0).
They are read as text, and libtorch_npu.so for the texts and symbols in it; nothing of them is installed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import ROOT, SAMPLES, run_script

WHEELS = Path(os.environ.get("TORCH_NPU_WHEELS", "/nonexistent"))
VERSIONS = ("2.9.0", "2.9.0.post2", "2.13.0")  # lines 7.3, 26.0 and after
SCRIPTS = [ROOT / "inference.py", *ROOT.glob("embed.py"), *sorted((ROOT / "eval").glob("*.py"))]
SWITCHES = ("_allowHF32Conv", "_allowHF32Matmul")
ERROR_CODES = "torch_npu/include/third_party/acl/inc/acl/error_codes/rt_error_codes.h"
ONLY_IN_THE_SIMULATOR = {"devices"}  # how many there are: tests set it


def wheel(version: str) -> zipfile.ZipFile:
    found = sorted(WHEELS.glob(f"torch_npu-{version}-*.whl"))
    if not found:
        pytest.skip(f"TORCH_NPU_WHEELS names no folder with torch_npu {version}")
    return zipfile.ZipFile(found[0])


@functools.cache
def source(version: str, name: str) -> str:
    with wheel(version) as archive:
        return archive.read(name if "/include/" in name else f"torch_npu/{name}").decode()


@functools.cache
def texts(version: str) -> dict[str, list[str]]:
    """The strings of libtorch_npu.so, 60 to 100 MB, in which a needle occurs; read once."""
    needles = (
        *("OutOfMemoryError", "NPU out of memory", "TASK_QUEUE_ENABLE = 2", "NPU graph capture", "npu_gelu(Tensor"),
        *("npu_fusion_attention(Tensor", "AclSetCompileopt(", "set_deterministic_level", "TORCH_NPU_USE_COMPATIBLE_IMPL"),
        *("aclnnGelu", "INF_NAN_MODE_FORCE_DISABLE", "input_layout should be"),
    )
    with wheel(version) as archive:
        binary = archive.read("torch_npu/lib/libtorch_npu.so")
    return {needle: _strings_with(needle.encode(), binary) for needle in needles}


def _strings_with(needle: bytes, binary: bytes) -> list[str]:
    found, position = set(), binary.find(needle)
    while position >= 0:
        start, end = binary.rfind(b"\0", 0, position) + 1, binary.find(b"\0", position)
        found.add(binary[start:end].decode(errors="replace"))
        position = binary.find(needle, end)
    return sorted(found)


def used(pattern: str) -> set[str]:
    return {name for script in SCRIPTS for name in re.findall(pattern, script.read_text(encoding="utf-8"))}


def used_of_the_device_module() -> set[str]:
    return used(r"\btorch\.npu\.(\w+)") | used(r"\b_?backend\.(\w+)") | used(r"\bget_device_module\([^)]*\)\.(\w+)")


def exported(text: str) -> set[str]:
    for node in ast.parse(text).body:
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
    names = exported(source(version, "npu/__init__.py"))
    assert used_of_the_device_module() - {"CUDAGraph"} <= names


def test_every_name_used_of_the_device_module_exists_for_gpus_too():
    only_npu = {"conv", "matmul", "NPUGraph", "config"}
    assert all(hasattr(torch.cuda, name) for name in used_of_the_device_module() - only_npu)


# --- options and what they start ---


def setter(version: str, switch: str) -> str:
    body = source(version, "npu/npu_config.py").split(f"class {switch}:")[1].split("\nclass ")[0]
    return body.split("def __setattr__")[1].split("def ")[0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_hf32_is_switched_by_an_attribute_that_must_be_a_bool_since_213(version, switch):
    assert 'if name == "allow_hf32":' in setter(version, switch)
    assert ("allow_hf32 must be a bool" in setter(version, switch)) == (version == "2.13.0")


@pytest.mark.parametrize("version", VERSIONS)
def test_hf32_is_on_for_convolutions_and_off_for_matrix_products_by_default(version):
    config = source(version, "npu/npu_config.py")
    assert (
        '(hf32_value is None) or (hf32_value.decode() == "")' in config.split("class _allowHF32Conv:")[1].split("\nclass ")[0]
    )
    assert "return hf32_value is not None and" in config.split("class _allowHF32Matmul:")[1].split("\nclass ")[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_internal_formats_can_be_set_and_not_read(version):
    config = source(version, "npu/npu_config.py").split("class _npuConfig:")[1].split("\nclass ")[0]
    assert 'if name == "allow_internal_format":' in config
    assert "__getattr__" not in config


@pytest.mark.parametrize("version", VERSIONS)
def test_the_hf32_option_starts_the_compiler_at_once_in_290_and_later_ones_put_it_off(version):
    [call] = [text for text in texts(version)["AclSetCompileopt("] if "ACL_ALLOW_HF32" in text]
    assert ("LazyAclSetCompileopt" in call) == (version != "2.9.0")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_level_of_determinism_and_compatible_operators_came_after_290(version):
    later = version != "2.9.0"
    assert ("set_deterministic_level" in exported(source(version, "npu/__init__.py"))) == later
    assert bool(texts(version)["set_deterministic_level"]) == bool(texts(version)["TORCH_NPU_USE_COMPATIBLE_IMPL"]) == later


@pytest.mark.parametrize("version", VERSIONS)
def test_saturation_can_be_forced_by_the_environment(version):
    assert "INF_NAN_MODE_FORCE_DISABLE" in texts(version)["INF_NAN_MODE_FORCE_DISABLE"]


# --- memory, operators, graphs ---


@pytest.mark.parametrize("version", VERSIONS)
def test_out_of_memory_has_a_type_of_its_own_since_post2(version):
    assert bool(texts(version)["OutOfMemoryError"]) == (version != "2.9.0")
    for start in ("NPU out of memory. Tried to allocate ", "NPU out of memory. NPUWorkspaceAllocator tried to allocate "):
        assert start in texts(version)["NPU out of memory"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_simulator_declares_torch_npu_s_operators_as_it_does(npu, version):
    gelu, attention = npu.OPERATORS
    assert gelu in texts(version)["npu_gelu(Tensor"]
    [real] = [text for text in texts(version)["npu_fusion_attention(Tensor"] if text.startswith("npu_fusion_attention(")]
    arguments, results = attention.split(") -> ")
    assert real.startswith(arguments) and real.endswith(f") -> {results}")
    assert (real == attention) == (version == "2.9.0")  # later ones append arguments
    assert {"aclnnGelu", "aclnnGeluV2"} <= set(texts(version)["aclnnGelu"])
    assert (
        "The input_layout should be BSH/SBH/BNSD/BSND/TND(case-insensitive), but got "
        in texts(version)["input_layout should be"]
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_capture_refuses(version):
    assert texts(version)["TASK_QUEUE_ENABLE = 2"] == [
        "Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture, please export TASK_QUEUE_ENABLE=1/0."
    ]
    refused = " ".join(texts(version)["NPU graph capture"])
    assert "Cannot run aclop operators during NPU graph capture. Current working aclop is " in refused
    graphs = source(version, "npu/graphs.py")
    end = graphs.split("class graph:")[1].split("def __exit__")[1].split("\ndef ")[0]
    assert end.index("capture_end()") < end.index("stream_ctx.__exit__")  # an end that raises leaves the stream current


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("name", "code"),
    [("STREAM_UNJOINED", 107025), ("CAPTURE_MODE_NOT_SUPPORT", 107030), ("STREAM_CAPTURE_INVALIDATED", 507903)],
)
def test_the_codes_of_a_failed_capture(version, name, code):
    assert re.search(rf"ACL_ERROR_RT_{name} +{code} ", source(version, ERROR_CODES))


@pytest.mark.parametrize("version", VERSIONS)
def test_what_torch_npu_prints_to_stdout_when_imported(npu, version):
    name = "_init/registry/registry_manager.py" if version == "2.13.0" else "utils/npu_intercept.py"
    assert re.search(r"print\(f?\"Warning ?: ASCEND_HOME_PATH environment variable is not set\.\"\)", source(version, name))
    if version == "2.9.0":
        assert npu.NOISE in source(version, name)


# --- the simulator offers nothing that torch_npu lacks ---


Parameters = list[tuple[str, str | None]]  # name, and default as it is written


def parameters_in_the_sources(version: str) -> dict[str, Parameters]:
    """The parameters, without self or cls, of torch_npu.npu's functions, classes and methods, as NAME or CLASS.NAME."""
    found = {}

    def read(node: ast.AST, owner: str = "") -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found[child.name] = []
                read(child, f"{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                names = [argument.arg for argument in child.args.args]
                defaults = [ast.unparse(default) for default in child.args.defaults]
                parameters = list(zip(names, [None] * (len(names) - len(defaults)) + defaults, strict=True))
                name = owner[:-1] if child.name in ("__init__", "__new__") and len(names) > 1 else f"{owner}{child.name}"
                found[name] = parameters[1:] if owner else parameters

    for module in ("utils", "streams", "graphs", "memory", "random", "autocast_utils", "__init__"):
        read(ast.parse(source(version, f"npu/{module}.py")))
    return found


def parameters_in_the_simulator(npu) -> dict[str, Parameters]:
    def of(function) -> Parameters:
        values = inspect.signature(function).parameters.values()
        return [(value.name, None if value.default is value.empty else repr(value.default)) for value in values]

    public = lambda owner: {name: value for name, value in vars(owner).items() if not name.startswith("_") and callable(value)}
    found = {}
    for name, value in public(type(npu.module)).items():
        found[name] = of(value) if inspect.isclass(value) else of(value)[1:]
        if inspect.isclass(value):
            found |= {f"{name}.{method}": of(body)[1:] for method, body in public(value).items()}
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_the_simulator_has_no_name_and_no_parameter_that_torch_npu_lacks(npu, version):
    names = exported(source(version, "npu/__init__.py"))
    real, made = parameters_in_the_sources(version), parameters_in_the_simulator(npu)
    attributes = {name for name in vars(npu.module) if not name.startswith("_")} - ONLY_IN_THE_SIMULATOR
    assert {"conv", "matmul", "config"} <= attributes <= names
    assert {name.split(".")[0] for name in made} <= names
    assert dict(made["graph"])["capture_error_mode"] == "'global'"
    for name in made:
        assert made[name] == real[name][: len(made[name])], name


# --- the real package, without CANN ---


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("torch_npu")
    with wheel("2.13.0") as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.skipif(torch.__version__.split("+")[0] != "2.13.0", reason="the wheel goes with torch 2.13.0")
@pytest.mark.skipif(Path("/usr/local/Ascend").exists(), reason="CANN may be installed here")
@pytest.mark.parametrize("device", ["npu", "auto", "cpu"])
def test_the_real_torch_npu_without_cann(unpacked, tmp_path, tiny_folder, device):
    photo = SAMPLES / "chelsea.jpg"
    flags = ["--output_log", tmp_path / "log", "--results_dir", tmp_path / "results", "--model_path", tiny_folder]
    done = run_script("inference.py", "--image_path", photo, "--device", device, *flags, PYTHONPATH=str(unpacked))
    if device == "npu":
        assert done.returncode == 3
        assert done.stderr.splitlines()[-1].startswith(
            "BLOCKED: CANN is not installed or not set up (libhccl.so: cannot open shared object file"
        )
        assert "source /usr/local/Ascend/cann/set_env.sh" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert ("no NPU: CANN is not installed or not set up" in done.stderr) == (device == "auto")
