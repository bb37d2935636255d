"""Choosing a device, saying why one cannot be used, and float32 that is float32."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

import inference
import pytest
import torch
from conftest import SAMPLES, TESTS, run_script
from inference import Blocked, UsageError, open_device

PHOTO = SAMPLES / "chelsea.jpg"


@pytest.fixture
def no_torch_npu(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch_npu" else find_spec(name, *rest))
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
    assert (str(device.torch_device), device.name) == ("npu:0", npu.NAME)
    assert device.reason == "chosen by --device auto"


def test_a_blocked_device_ends_with_3_and_one_line_on_terminal_and_in_the_log(run, no_torch_npu):
    done = run("--image_path", PHOTO, "--device", "npu")
    assert done.code == 3
    assert done.terminal.startswith("BLOCKED: torch_npu is not installed. ")
    assert len(done.terminal.splitlines()) == 1
    assert "[ERROR] BLOCKED: torch_npu is not installed. " in done.log
    assert done.result is None


def test_blocked_when_torch_and_torch_npu_do_not_match(npu, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.0" if name == "torch_npu" else version(name))
    with pytest.raises(Blocked, match=r"torch .* and torch_npu 2\.1\.0 do not go together\. Install the same version"):
        open_device("npu")


@pytest.mark.parametrize(
    ("statement", "answer"),
    [
        ("raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')", r"CANN .*set_env\.sh"),
        ("raise RuntimeError('Two accelerators cannot be used at the same time in PyTorch: npu and cuda')", "CPU build of torch"),
        ("raise ImportError('torch_npu/lib.so: undefined symbol: _ZN2at')", "versions that go together"),
        ("raise OSError('something new')", r"cannot be imported \(something new\).*env_check\.py"),
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


def test_a_cpu_run_ignores_a_torch_npu_that_cannot_load(tmp_path, tiny_folder):
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    flags = ["--output_log", tmp_path / "log", "--results_dir", tmp_path]
    done = run_script(
        "inference.py", "--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu", *flags, PYTHONPATH=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr


def test_blocked_when_no_npu_is_visible(npu, monkeypatch):
    npu.module.devices = 0
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "7")
    with pytest.raises(Blocked, match=r"sees no NPU \(ASCEND_RT_VISIBLE_DEVICES=7\)\. .*npu-smi info"):
        open_device("npu")


def test_blocked_when_the_index_is_past_the_last_npu(npu):
    with pytest.raises(Blocked, match=r"there is no npu:3: torch_npu sees 1 NPU"):
        open_device("npu:3")


def test_blocked_when_the_npu_fails_at_first_use(npu):
    npu.memory.limit = 0
    with pytest.raises(Blocked, match=r"npu:0 is listed but fails at first use \(NPU out of memory"):
        open_device("npu")


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


def test_each_process_of_torchrun_takes_its_own_device(npu, monkeypatch):
    npu.module.devices = 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert str(open_device("npu").torch_device) == "npu:1"
    with pytest.raises(UsageError, match="leave out ':0'"):
        open_device("npu:0")


def test_hf32_is_off_unless_asked_for(npu):
    assert (npu.module.conv.allow_hf32, npu.module.matmul.allow_hf32) == (True, False)  # torch_npu's own defaults
    assert open_device("npu").allow_hf32 is False
    assert (npu.module.conv.allow_hf32, npu.module.matmul.allow_hf32) == (False, False)
    assert open_device("npu", allow_hf32=True).allow_hf32 is True
    assert (npu.module.conv.allow_hf32, npu.module.matmul.allow_hf32) == (True, True)


def test_tf32_is_off_unless_asked_for():
    flags = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [flag.fp32_precision for flag in flags]
    try:
        for allow, precision in ((False, "ieee"), (True, "tf32")):
            inference.set_float32_precision("cuda", allow)
            assert [flag.fp32_precision for flag in flags] == [precision, precision]
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


def test_the_result_and_the_log_say_whether_float32_is_rounded(npu, run, tiny_folder):
    for flags, allowed, text in (([], False, "true float32"), (["--allow_hf32"], True, "rounded where the device can")):
        done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "npu", *flags)
        assert (done.code, done.result["allow_hf32"]) == (0, allowed)
        assert text in done.log


def test_synchronize_waits_for_what_is_queued(npu):
    device = open_device("npu")
    values = torch.zeros(1, device="npu")
    npu.queue.seconds_per_op = 0.05
    values.add_(1)
    assert npu.queue.pending() > 0.03
    inference.synchronize(device)
    assert npu.queue.pending() == 0.0


def test_a_script_runs_end_to_end_on_the_simulated_npu(tmp_path, tiny_folder):
    pytest.importorskip("npu_simulator", exc_type=ImportError)
    (tmp_path / "torch_npu.py").write_text("import npu_simulator\n\nnpu_simulator.install()\n")
    flags = ["--output_log", tmp_path / "log", "--results_dir", tmp_path, "--output", tmp_path / "features.npz"]
    path = f"{tmp_path}:{TESTS}"
    done = run_script("inference.py", "--image_path", PHOTO, "--model_path", tiny_folder, "--device", "npu", *flags, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "Device: npu:0, simulated NPU (CPU) (asked for with --device npu)" in done.stderr
    assert (tmp_path / "inference.json").is_file()
