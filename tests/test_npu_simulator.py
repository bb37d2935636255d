"""The simulated NPU behaves as torch_npu on an Ascend910_9362 does, also where that is inconvenient."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention

from conftest import TESTS

VALUES = torch.linspace(-4, 4, 64)
BIG = 1 << 20  # float32 values that exceed the limits set below
NO_JOIN = r"error code is 107025\s.*a stream that was not joined to the original stream"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def captured(npu, function, **options):
    made = npu.NPUGraph()
    with torch.npu.graph(made, **options):
        return made, function()


def in_another_thread(function):
    """What it returns, or the RuntimeError that it raised."""
    result = []

    def body():
        try:
            result.append(function())
        except RuntimeError as error:
            result.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return result[0]


# --- devices and memory ---


def test_devices_do_not_mix(npu):
    there = torch.ones(2, device="npu")
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(2)
    assert (there + torch.tensor(1.0)).cpu().tolist() == [2.0, 2.0]


def test_memory_is_counted(npu):
    before = npu.memory.allocated
    tensor = torch.zeros(1024, device="npu")
    view = tensor[:512]
    assert npu.memory.allocated - before == 4096
    del tensor
    assert npu.memory.allocated - before == 4096  # the view holds it
    del view
    assert npu.memory.allocated == before


@pytest.mark.parametrize(("version", "kind"), [("7.3", RuntimeError), ("26", torch.OutOfMemoryError)])
@pytest.mark.parametrize(
    ("fault", "text"), [(None, "Tried to allocate"), ("workspace_memory", "NPUWorkspaceAllocator tried to allocate")]
)
def test_out_of_memory_is_of_the_version_s_kind(npu, version, kind, fault, text):
    npu.machine.version, npu.machine.faults = version, {fault}
    npu.memory.limit = npu.memory.allocated + 4095
    with pytest.raises(RuntimeError, match=f"^NPU out of memory. {text} 0.00 MiB") as raised:
        torch.zeros(1024, device="npu")
    assert raised.type is kind


@pytest.mark.parametrize("wait", [lambda event: event.synchronize(), lambda event: torch.npu.synchronize()])
def test_out_of_memory_can_be_told_late_and_once(npu, wait):
    npu.machine.faults.add("late_memory")
    npu.memory.limit = npu.memory.allocated
    torch.zeros(BIG, device="npu")
    event = torch.npu.Event()
    event.record()
    with pytest.raises(RuntimeError, match="NPU out of memory"):
        wait(event)
    wait(event)


# --- arithmetic ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gelu_is_tanh_whatever_it_is_asked_for_and_npu_gelu_is_not(npu, dtype):
    import torch_npu

    values = VALUES.to(dtype)
    exact, tanh = gelu(values), gelu(values, approximate="tanh")
    assert not torch.equal(exact, tanh)
    for asked in ("none", "tanh"):
        assert torch.equal(gelu(values.to("npu"), approximate=asked).cpu(), tanh)
        assert torch.equal(torch.nn.GELU(asked)(values.to("npu")).cpu(), tanh)
    assert torch.equal(torch_npu.npu_gelu(values.to("npu")).cpu(), exact)
    assert torch.equal(torch_npu.npu_gelu(values.to("npu"), approximate="tanh").cpu(), tanh)
    with pytest.raises(NotImplementedError, match="npu_gelu"):
        torch_npu.npu_gelu(values)


def test_convolutions_are_rounded_to_11_bits_of_mantissa_until_forbidden(npu):
    pixel, weight = torch.full((1, 1, 1, 1), 1 + 2**-12), torch.ones(1, 1, 1, 1)
    assert (npu.module.conv.allow_hf32, npu.module.matmul.allow_hf32) == (True, False)
    for allowed, expected in ((True, 1 + 2**-11), (False, 1 + 2**-12)):
        npu.module.conv.allow_hf32 = allowed
        assert conv2d(pixel.to("npu"), weight.to("npu")).item() == expected
        npu.module.matmul.allow_hf32 = allowed
        assert linear(pixel.to("npu"), weight[0, 0].to("npu")).item() == expected


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH"])
def test_fused_attention_is_attention_in_its_layout(npu, layout):
    import torch_npu

    q, k, v = random(3, 2, 4, 5, 8)
    to_layout = {
        "BNSD": lambda x: x,
        "BSND": lambda x: x.transpose(1, 2),
        "BSH": lambda x: x.transpose(1, 2).reshape(2, 5, 32),
    }[layout]
    inputs = [to_layout(x).to("npu") for x in (q, k, v)]
    output = torch_npu.npu_fusion_attention(*inputs, 4, layout, scale=8**-0.5, sync=True)
    assert len(output) == 7
    torch.testing.assert_close(output[0].cpu(), to_layout(scaled_dot_product_attention(q, k, v)))
    unscaled = torch_npu.npu_fusion_attention(*inputs, 4, layout)[0].cpu()  # the default is 1, not 1 / sqrt(8)
    torch.testing.assert_close(unscaled, to_layout(scaled_dot_product_attention(q, k, v, scale=1.0)))
    with pytest.raises(RuntimeError, match="input_layout should be BSH/SBH/BNSD/BSND/TND"):
        torch_npu.npu_fusion_attention(*inputs, 4, "NHWC")
    with pytest.raises(NotImplementedError, match="atten_mask"):
        torch_npu.npu_fusion_attention(*inputs, 4, layout, atten_mask=inputs[0])


@pytest.mark.parametrize("forced", [True, False])
def test_float16_saturates_where_infinity_is_switched_off(npu, monkeypatch, forced):
    monkeypatch.setenv("INF_NAN_MODE_FORCE_DISABLE", "1")
    if forced:
        npu.install()
    large = torch.tensor([300.0, -300.0, 0.0]).to("npu").half()
    products, undefined = (large * large.abs()).cpu().tolist(), (large / 0).cpu().tolist()
    assert products == ([65504, -65504, 0] if forced else [math.inf, -math.inf, 0])
    assert undefined[2] == 0 if forced else math.isnan(undefined[2])
    assert (large.float() * 1e38).isinf().cpu().tolist() == [True, True, False]


OPERATIONS = {
    "linear": lambda x: linear(x, x),
    "matmul": lambda x: x @ x.T,
    "layer_norm": lambda x: layer_norm(x, x.shape[-1:]),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_results_vary_by_one_ulp_unless_determinism_came_first(npu, operation):
    values = random(8, 8)
    npu.machine.faults.add("nondeterministic")

    def results(deterministic: bool) -> list[torch.Tensor]:
        torch.use_deterministic_algorithms(deterministic)
        try:
            return [operation(values.to("npu")).cpu() for _ in range(20)]
        finally:
            torch.use_deterministic_algorithms(False)

    first = in_another_thread(lambda: results(True))
    assert all(torch.equal(first[0], other) for other in first)
    other = next(other for other in results(False) if not torch.equal(other, first[0]))
    assert torch.equal(torch.nextafter(first[0], first[0] * math.inf), other)
    assert not all(torch.equal(first[0], other) for other in results(True))  # this thread's choice was made


def test_matrix_products_may_vary_with_the_batch(npu):
    values = random(8 * 197, 16).to("npu")
    assert torch.equal(linear(values, values[:4])[:197].cpu(), linear(values[:197], values[:4]).cpu())
    npu.machine.faults.add("batch_variant")
    assert not torch.equal(linear(values, values[:4])[:197].cpu(), linear(values[:197], values[:4]).cpu())


# --- options ---


@pytest.mark.parametrize("switch", ["conv", "matmul"])
def test_the_hf32_setters_start_a_compiler_that_may_be_broken(npu, switch):
    npu.machine.faults.add("compiler_broken")
    with pytest.raises(RuntimeError, match=r"AclSetCompileopt.*error code is 500001"):
        getattr(torch.npu, switch).allow_hf32 = False
    npu.machine.version = "26"  # puts it off to the first acl_op operator
    getattr(torch.npu, switch).allow_hf32 = False
    image = torch.ones(1, 1, 1, 1, device="npu")
    conv2d(image, image)
    torch.npu.config.allow_internal_format = True
    with pytest.raises(RuntimeError, match=r"AclSetCompileopt.*error code is 500001"):
        conv2d(image, image)


def test_options_want_what_torch_npu_wants(npu):
    with pytest.raises(TypeError, match="allow_hf32 must be a bool, but got int"):
        torch.npu.conv.allow_hf32 = 0
    torch.npu.conv.alow_hf32 = False
    assert torch.npu.conv.allow_hf32 is True
    assert torch.npu.conv.alow_hf32 is None
    with pytest.raises(AttributeError):
        _ = torch.npu.config.allow_internal_format  # can be set only


def test_the_level_of_determinism_came_with_version_26(npu):
    assert not hasattr(torch.npu, "set_deterministic_level")
    npu.machine.version = "26"
    try:
        with pytest.warns(UserWarning, match="set_deterministic_level"):
            torch.npu.set_deterministic_level(1)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# --- graphs ---


def test_a_graph_replays_on_what_its_input_holds_now(npu):
    static = torch.ones(3, device="npu")
    made, output = captured(npu, lambda: (static * 2).view(3, 1) + 1)
    static.copy_(torch.tensor([5.0, 6.0, 7.0]))
    made.replay()
    assert output.flatten().cpu().tolist() == [11, 13, 15]


def test_capture_refuses_the_second_level_of_the_task_queue(npu, monkeypatch):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    with pytest.raises(RuntimeError, match="Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture"):
        captured(npu, lambda: None)


@pytest.mark.parametrize(
    "forbidden",
    [lambda x: torch.npu.synchronize(), lambda x: x.cpu(), lambda x: x.sum().item(), lambda x: torch.ones(3).to("npu")],
    ids=["synchronize", "to the host", "item", "from the host"],
)
def test_what_waits_inside_a_capture_ends_it_with_another_error(npu, forbidden):
    values = torch.ones(3, device="npu")
    with pytest.raises(RuntimeError, match="AclmdlRICaptureEnd, error code is 507903") as raised:
        captured(npu, lambda: forbidden(values))
    assert "not permitted while a graph is captured" in str(raised.value.__context__)
    assert values.cpu().tolist() == [1, 1, 1]  # the capture is over


def test_out_of_memory_inside_a_capture_is_hidden_by_its_end(npu):
    npu.memory.limit = npu.memory.allocated
    with pytest.raises(RuntimeError, match="error code is 507903") as raised:
        captured(npu, lambda: torch.zeros(BIG, device="npu"))
    assert "NPU out of memory" not in str(raised.value)
    assert "NPU out of memory" in str(raised.value.__context__)


def test_an_error_of_python_s_own_inside_a_capture_stays_what_it_is(npu):
    with pytest.raises(ZeroDivisionError):
        captured(npu, lambda: 1 / 0)


def test_a_convolution_with_internal_formats_cannot_be_captured(npu):
    image = torch.ones(1, 1, 1, 1, device="npu")
    captured(npu, lambda: conv2d(image, image))
    npu.machine.faults.add("internal_formats")
    with pytest.raises(RuntimeError, match="507903") as raised:
        captured(npu, lambda: conv2d(image, image))
    assert "Cannot run aclop operators during NPU graph capture" in str(raised.value.__context__)
    torch.npu.config.allow_internal_format = False
    captured(npu, lambda: conv2d(image, image))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attention_forks_a_stream_that_never_joins_a_capture(npu, mode):
    import torch_npu

    with mode():
        x = random(2, 4, 5, 8).to("npu")
        fused = lambda **options: torch_npu.npu_fusion_attention(x, x, x, 4, "BNSD", scale=8**-0.5, **options)[0]
        for attention in (lambda: scaled_dot_product_attention(x, x, x), fused):
            npu.machine.version = "7.3"
            with pytest.raises(RuntimeError, match=NO_JOIN):
                captured(npu, attention)
            npu.machine.version = "26"
            captured(npu, attention)
        npu.machine.version = "7.3"
        made, output = captured(npu, lambda: fused(sync=True))
        made.replay()
        torch.testing.assert_close(output.cpu(), scaled_dot_product_attention(x, x, x).cpu())


@pytest.mark.parametrize(
    "unsafe", [lambda: torch.ones(3).pin_memory(), lambda: torch.empty(3, pin_memory=True), lambda: torch.ones(3).to("npu")]
)
def test_other_threads_may_do_what_is_unsafe_only_if_the_capture_is_thread_local(npu, unsafe):
    with pytest.raises(RuntimeError, match="507903"):
        captured(npu, lambda: in_another_thread(unsafe))
    _, error = captured(npu, lambda: in_another_thread(unsafe), capture_error_mode="thread_local")
    assert isinstance(error, torch.Tensor)
    with pytest.raises(RuntimeError, match="Unknown capture error mode"):
        captured(npu, lambda: None, capture_error_mode="local")


# --- streams ---


def test_a_stream_that_does_not_wait_for_another_reads_zeros(npu):
    host, side = torch.ones(3).pin_memory(), torch.npu.Stream()
    assert host.is_pinned()
    assert not torch.ones(3).is_pinned()

    def copied_on_the_side():
        with torch.npu.stream(side):
            return host.to("npu", non_blocking=True)

    assert copied_on_the_side().add(1).cpu().tolist() == [1, 1, 1]  # forgot to wait
    view = copied_on_the_side()[None].contiguous()
    torch.npu.current_stream().wait_stream(side)
    assert view.add(1).cpu().tolist() == [[2, 2, 2]]
    torch.npu.synchronize()
    with torch.inference_mode():  # here reshape() is one operator, which may copy or not
        reshaped = copied_on_the_side().expand(2, 3).reshape(6)
        assert reshaped.cpu().tolist() == [0] * 6
        torch.npu.synchronize()
        assert reshaped.cpu().tolist() == [1] * 6
    late = copied_on_the_side()
    event = side.record_event()
    later = copied_on_the_side()
    torch.npu.current_stream().wait_event(event)
    assert (late + later).cpu().tolist() == [1, 1, 1]
    torch.npu.synchronize()
    assert (late + later).cpu().tolist() == [2, 2, 2]
    with torch.npu.stream(side):
        pageable = torch.ones(3).to("npu", non_blocking=True)  # cannot be asynchronous
    assert pageable.add(1).cpu().tolist() == [2, 2, 2]


def test_a_copy_to_pinned_memory_is_there_once_its_event_was_waited_for(npu):
    values = torch.ones(3, device="npu")
    to_pinned = lambda: torch.empty(3, pin_memory=True).copy_(values, non_blocking=True)
    for copy in (to_pinned, lambda: values.to("cpu", non_blocking=True)):
        there = copy()
        event = torch.npu.Event()
        event.record()
        assert there.tolist() == [0, 0, 0]
        event.synchronize()
        assert there.tolist() == [1, 1, 1]
    assert torch.empty(3).copy_(values, non_blocking=True).tolist() == [1, 1, 1]


def test_events_measure_what_is_queued(npu):
    values = torch.zeros(1, device="npu")
    npu.queue.seconds_per_op = 0.02
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    start.record()
    values.add_(1).add_(1)
    end.record()
    assert npu.queue.pending() > 0.02
    end.synchronize()
    assert npu.queue.pending() == 0.0
    assert start.elapsed_time(end) == pytest.approx(40, abs=10)


# --- setting it up ---


def test_reset_gives_a_new_process_s_state_back(npu):
    hook = sys.excepthook
    npu.machine.version, npu.machine.faults = "26", {"late_memory"}
    npu.module.conv.allow_hf32, npu.module.devices, npu.memory.limit = False, 3, 0
    torch.zeros(3, device="npu")
    npu.reset()
    torch.npu.synchronize()  # would tell of memory that was short before
    assert sys.excepthook is not hook
    assert (npu.machine.version, npu.machine.faults, npu.memory.limit) == ("7.3", set(), None)
    assert (npu.module.conv.allow_hf32, npu.module.devices) == (True, 1)
    assert torch.empty.__module__ != npu.__name__


def child(program: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **variables}
    command = [sys.executable, "-c", f"import npu_simulator as npu; npu.install(); import torch, torch_npu; {program}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_child_process_is_set_up_by_its_environment_and_hears_torch_npu_s_noise(npu):
    program = "print(npu.machine.version, sorted(npu.machine.faults), npu.memory.limit, torch.npu.device_count())"
    setting = {"NPU_SIMULATOR_VERSION": "26", "NPU_SIMULATOR_MEMORY": "5", "NPU_SIMULATOR_DEVICES": "2"}
    done = child(program, **setting, NPU_SIMULATOR_FAULTS="late_memory,nondeterministic")
    assert done.stdout.splitlines() == [npu.NOISE, "26 ['late_memory', 'nondeterministic'] 5 2"]
    assert child("print(1)", NPU_SIMULATOR_FAULTS="quiet").stdout == "1\n"
    assert "no such simulated NPU" in child("", NPU_SIMULATOR_FAULTS="no_such_fault").stderr
