"""Choosing a device, saying why one cannot be used, and float32 that is float32."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import inference
import pytest
import torch
from inference import Blocked, UsageError, open_device

from conftest import ROOT, SAMPLES, script_environment

PHOTO = SAMPLES / "chelsea.jpg"


@pytest.fixture
def no_torch_npu(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch_npu" else find_spec(name, *rest)
    )
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)


@pytest.fixture
def broken_torch_npu(monkeypatch, tmp_path):
    """A torch_npu on the path whose import raises what the test says."""

    def install(statement: str) -> None:
        (tmp_path / "torch_npu.py").write_text(statement)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torch_npu", raising=False)

    return install


@pytest.mark.parametrize("spec", ["gpu", "npu:", "npu:x", "cpu:0", "auto:1", "npu:-1", ""])
def test_a_device_that_makes_no_sense_is_a_usage_error(spec):
    with pytest.raises(UsageError, match="use auto, cpu, cuda"):
        open_device(spec)


def test_the_first_log_line_names_the_device_and_why(run, tiny_folder, no_torch_npu):
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu")
    assert done.code == 0
    assert "[INFO] Device: cpu, " in done.log.splitlines()[0]
    assert "asked for with --device cpu" in done.log.splitlines()[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there to be chosen")
def test_auto_without_accelerators_takes_the_cpu_and_says_what_is_missing(no_torch_npu):
    device = open_device("auto")
    assert device.kind == "cpu"
    assert "no NPU: torch_npu is not installed" in device.reason
    assert "no GPU: " in device.reason


def test_auto_takes_an_npu_where_there_is_one(npu):
    device = open_device("auto")
    assert (str(device.torch_device), device.name) == ("npu:0", npu.name)
    assert device.reason == "chosen by --device auto"


def test_a_blocked_device_ends_with_3_and_one_line_on_terminal_and_in_the_log(run, no_torch_npu):
    done = run("--image_path", PHOTO, "--device", "npu")
    assert done.code == 3
    assert done.terminal.splitlines()[-1].startswith("BLOCKED: torch_npu is not installed. ")
    assert done.terminal.count("BLOCKED") == 1
    assert "[ERROR] BLOCKED: torch_npu is not installed. " in done.log
    assert (done.result["status"], done.result["reason"]) == ("BLOCKED", "torch_npu is not installed")


def test_blocked_when_torch_and_torch_npu_do_not_match(npu, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.0" if name == "torch_npu" else version(name))
    with pytest.raises(Blocked, match=r"torch .* and torch_npu 2\.1\.0 do not go together\. Install the same version"):
        open_device("npu")


def test_a_post_release_of_torch_npu_goes_with_torch(npu, monkeypatch):
    version, fitting = importlib.metadata.version, ".".join(torch.__version__.split(".")[:2])
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: f"{fitting}.7.post1" if name == "torch_npu" else version(name)
    )
    assert open_device("npu").kind == "npu"


@pytest.mark.parametrize(
    ("statement", "answer"),
    [
        ("raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')", r"CANN .*set_env\.sh"),
        ("raise RuntimeError('Two accelerators cannot be used at the same time: npu and cuda')", "CPU build of torch"),
        ("raise ImportError('torch_npu/lib.so: undefined symbol: _ZN2at')", r"does not fit .*recommended pair: eval/env_check"),
        (
            "raise OSError('something new')",
            r"cannot be used \(something new\)\. What that means is not known here; CANN's own log",
        ),
        # CANN is half there: the library loads, and what torch_npu does on import fails
        (
            "raise RuntimeError('Initialize: error code is 507899\\n[Error]: internal')",
            r"driver reports an error of its own \(Initialize: .*507899\)\. Check npu-smi",
        ),
    ],
)
def test_blocked_when_torch_npu_fails_to_import(broken_torch_npu, statement, answer):
    broken_torch_npu(statement)
    with pytest.raises(Blocked, match=answer):
        open_device("npu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there to be chosen")
def test_a_torch_npu_without_cann_never_breaks_a_cpu_run(broken_torch_npu, run, tiny_folder):
    broken_torch_npu("raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')")
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "auto")
    assert done.code == 0
    assert "no NPU: CANN is not installed or not set up" in done.log.splitlines()[0]


def install_torch_npu(folder, statement: str) -> str:
    """A torch_npu that transformers takes for installed, and imports where it finds it; gives the PYTHONPATH."""
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(statement)
    information = folder / f"torch_npu-{torch.__version__.split('+')[0]}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch-npu\nVersion: {torch.__version__}\n")
    return str(folder)


CANNOT_LOAD = "raise ImportError('libhccl.so: cannot open shared object file')"
LOAD_ON_THE_CPU = """
import importlib.util, sys
before = importlib.util.find_spec("torch_npu").origin
import inference
model = inference.load_model(inference.open_device("cpu"), sys.argv[1])
features = inference.features(model, sys.argv[2])
print("imported", "torch_npu" in sys.modules, "same", importlib.util.find_spec("torch_npu").origin == before)
try:
    import torch_npu
    print("then imported", torch_npu.version)
except ImportError as error:
    print("then failed with", error)
"""


@pytest.mark.parametrize(
    ("statement", "then"),
    [("version = 7", "then imported 7"), (CANNOT_LOAD, "then failed with libhccl.so: cannot open shared object file")],
    ids=["works", "cannot load"],
)
def test_a_model_on_the_cpu_leaves_torch_npu_as_it_was(tmp_path, tiny_folder, statement, then):
    path = os.pathsep.join([install_torch_npu(tmp_path, statement), str(ROOT)])
    command = [sys.executable, "-c", LOAD_ON_THE_CPU, str(tiny_folder), str(PHOTO)]
    environment = script_environment(PYTHONPATH=path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["imported False same True", then]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("is_available", RuntimeError("aclInit failed")),
        ("device_count", OSError("libruntime is cut")),
        ("set_device", RuntimeError("error code is 507033")),
        ("synchronize", RuntimeError("error code is 507018")),
        ("get_device_name", AttributeError("no such thing")),
    ],
)
def test_whatever_fails_while_the_npu_is_opened_is_blocked_with_its_reason(npu, monkeypatch, call, error):
    def fail(*_arguments):
        raise error

    open_device("npu")
    monkeypatch.setattr(torch.npu, call, fail)
    with pytest.raises(Blocked, match=rf"\({error}\)\. \w+ .*") as blocked:
        open_device("npu")
    assert blocked.value.remedy


@pytest.mark.parametrize(("visible", "order"), [("1,0", "0,1"), ("3,3,2", "2,3"), ("7, 5", "5,7")])
def test_blocked_when_the_visible_devices_do_not_ascend(npu, monkeypatch, visible, order):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    with pytest.raises(Blocked, match=rf"ASCEND_RT_VISIBLE_DEVICES={visible} is not in ascending order.*Set it to {order}$"):
        open_device("npu")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", order)
    assert open_device("npu").kind == "npu"


def test_blocked_when_the_index_is_past_the_last_npu(npu):
    open_device("npu")
    count = torch.npu.device_count()
    with pytest.raises(Blocked, match=rf"there is no npu:{count}: torch sees {count} NPU"):
        open_device(f"npu:{count}")


@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="this torch has GPU support")
def test_blocked_when_torch_is_built_without_gpu_support():
    with pytest.raises(Blocked, match="built without GPU support"):
        open_device("cuda")


def test_blocked_when_no_gpu_is_visible(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(Blocked, match=r"sees no GPU \(CUDA_VISIBLE_DEVICES=\)\. .*nvidia-smi"):
        open_device("cuda")


def test_blocked_when_the_index_is_past_the_last_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Blocked, match=r"there is no cuda:2: torch sees 2 GPU"):
        open_device("cuda:2")


def test_hf32_is_off_unless_asked_for(npu):
    open_device("npu")
    torch.npu.conv.allow_hf32 = torch.npu.matmul.allow_hf32 = True
    assert open_device("npu").allow_hf32 is False
    assert (torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32) == (False, False)
    assert open_device("npu", allow_hf32=True).allow_hf32 is True
    assert (torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32) == (True, True)


def test_tf32_is_off_unless_asked_for():
    flags = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [flag.fp32_precision for flag in flags]
    try:
        for allow, precision in ((False, "ieee"), (True, "tf32")):
            inference.set_float32_precision("cuda", allow, allow)
            assert [flag.fp32_precision for flag in flags] == [precision, precision]
        inference.set_float32_precision("cuda", True, False)
        assert [flag.fp32_precision for flag in flags] == ["tf32", "ieee"]
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


def test_the_result_and_the_log_say_whether_float32_is_rounded(npu, run, tiny_folder):
    for flags, allowed, text in (([], False, "true float32"), (["--allow_hf32"], True, "rounded where the device can")):
        done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "npu", *flags)
        assert (done.code, done.result["allow_hf32"], done.result["strict_float32"]) == (0, allowed, not allowed)
        assert text in done.log


def test_float16_that_saturates_is_refused(npu, run, tiny_folder, monkeypatch):
    monkeypatch.setenv("INF_NAN_MODE_FORCE_DISABLE", "1")
    common = ("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "npu", "--dtype")
    done = run(*common, "float16")
    assert done.code == 2
    assert done.terminal.startswith("error: INF_NAN_MODE_FORCE_DISABLE=1 lets float16 saturate")
    done = run(*common, "float32")
    assert (done.code, done.result["environment"]["INF_NAN_MODE_FORCE_DISABLE"]) == (0, "1")
    monkeypatch.setenv("INF_NAN_MODE_FORCE_DISABLE", "0")
    assert run(*common, "float16").code == 0


def test_determinism_does_not_fill_every_new_tensor(npu):
    torch.utils.deterministic.fill_uninitialized_memory = True
    open_device("npu", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is False


# --- out of memory ---


def raised_within(inner: Exception, outer: Exception) -> Exception:
    """`outer`, raised while `inner` was on its way, as the end of a capture does."""
    try:
        try:
            raise inner
        finally:
            raise outer
    except type(outer) as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("NPU out of memory. Tried to allocate 2.00 MiB (NPU 0; 61.28 GiB total capacity)"),
        RuntimeError("NPU out of memory. NPUWorkspaceAllocator tried to allocate 32.00 MiB"),
        torch.OutOfMemoryError("anything"),
        MemoryError(),
        RuntimeError("could not create a memory object"),  # oneDNN's
        raised_within(torch.OutOfMemoryError("x"), RuntimeError("AclmdlRICaptureEnd, error code is 507903")),
        raised_within(raised_within(MemoryError(), OSError()), RuntimeError("error code is 507903")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_known_by_any_of_its_names(error):
    assert inference.is_out_of_memory(error)


def test_the_cpus_own_words_for_out_of_memory_are_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert inference.is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes do not fit"), ValueError("out of memory"), raised_within(OSError("x"), RuntimeError("y")), None],
)
def test_other_errors_are_no_lack_of_memory(error):
    assert not inference.is_out_of_memory(error)
