"""Choosing a device, saying why one cannot be used, and float32 that is float32."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

import inference
import numpy as np
import pytest
import torch
from inference import Blocked, UsageError, open_device

from conftest import SAMPLES, TESTS, run_script

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
    assert (str(device.torch_device), device.name) == ("npu:0", npu.NAME)
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
        ("raise OSError('something new')", r"cannot be used \(something new\).*env_check\.py"),
        # CANN is half there: the library loads, and what torch_npu does on import fails
        ("raise RuntimeError('Initialize: error code is 507899\\n[Error]: internal')", r"cannot be used .*507899\).*env_check"),
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


@pytest.mark.parametrize("version", ["7.3", "26"])
def test_blocked_when_canns_compiler_cannot_start(npu, version):
    npu.machine.version = version
    npu.machine.faults |= {"compiler_broken", "internal_formats"}
    if version == "26":  # it starts the compiler late, for operators that this bundle keeps off
        assert open_device("npu").kind == "npu"
        return
    with pytest.raises(Blocked) as blocked:
        open_device("npu")
    assert blocked.value.reason.startswith("CANN's compiler cannot start (call: NPU function error: ")
    assert "error code is 500001" in blocked.value.reason
    for package in ("numpy<2", "decorator", "attrs", "psutil", "scipy", "protobuf", "sympy", "cffi", "~/ascend/log"):
        assert package in blocked.value.remedy


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

    monkeypatch.setattr(type(npu.module), call, fail)
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


def test_blocked_when_no_npu_is_visible(npu, monkeypatch):
    npu.module.devices = 0
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "7")
    with pytest.raises(Blocked, match=r"sees no NPU \(ASCEND_RT_VISIBLE_DEVICES=7\)\. .*npu-smi info"):
        open_device("npu")


def test_blocked_when_the_index_is_past_the_last_npu(npu):
    with pytest.raises(Blocked, match=r"there is no npu:3: torch sees 1 NPU"):
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


def features_of(tiny_folder, run, tmp_path, *flags):
    done = run(
        *("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "npu"),
        *("--output", tmp_path / "f.npz", "--save_patch_tokens", *flags),
    )
    assert (done.code, done.result["deterministic"]) == (0, "--deterministic" in flags), done.terminal
    return np.load(tmp_path / "f.npz")["patch_tokens"]


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_deterministic_gives_the_same_bits_on_a_device_that_does_not(npu, run, tiny_folder, tmp_path, execution):
    flags = ("--execution", execution)
    npu.machine.faults.add("nondeterministic")
    asked = [features_of(tiny_folder, run, tmp_path, "--deterministic", *flags) for _ in range(3)]
    torch.use_deterministic_algorithms(False)
    npu.install()  # as in a new process
    npu.machine.faults.add("nondeterministic")
    plain = [features_of(tiny_folder, run, tmp_path, *flags) for _ in range(3)]
    assert np.array_equal(asked[0], asked[1]) and np.array_equal(asked[0], asked[2])
    assert not (np.array_equal(plain[0], plain[1]) and np.array_equal(plain[0], plain[2]))


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


# --- the device in use ---


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
    flags += ["--image_path", PHOTO, "--model_path", tiny_folder, "--device", "npu"]
    done = run_script("inference.py", *flags, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "Device: npu:0, simulated NPU (CPU) (asked for with --device npu)" in done.stderr
    assert (tmp_path / "inference.json").is_file()
