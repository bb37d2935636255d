"""What torch_npu itself does, on each wheel: the facts that the bundle is built on. They fail when a torch_npu changes them.

Over the stand-in for CANN, so nothing here is about CANN, its kernels or an NPU.
"""

from __future__ import annotations

import pytest

from cann import harness, stacks

INNER_ERROR = "RuntimeError: The Inner error is reported as above. The process exits for this inner error, "
pytestmark = pytest.mark.parametrize("stack", stacks.STACKS)


def test_after_a_failed_launch_every_operator_is_dropped_in_silence(stack):
    """The error is raised once, if anybody asks in time; then results are whatever stood in that memory."""
    result = harness.run(
        stack,
        """
        x = torch.ones(1000, device="npu")
        old = torch.full((1000,), 7.0, device="npu")
        torch.npu.synchronize()
        del old
        host, event = torch.zeros(1000).pin_memory(), torch.npu.Event()
        y = x * 2  # fails, but not before the copy and the event stand behind it in the queue
        say(copy=error_of(lambda: host.copy_(y, non_blocking=True)), record=error_of(event.record))
        say(waited=error_of(event.synchronize), host=host[0].item())
        say(once=error_of(torch.npu.synchronize))
        del y
        z = x + 1
        say(then=error_of(torch.npu.synchronize), z=z[0].item())
        event.record()
        time.sleep(0.2)
        say(event_is_done=event.query())
        """,
        STANDIN_FAIL="aclnnMuls:1=507015",
        STANDIN_STALL="aclnnMuls:1=300000",
    )
    assert result.found == {
        "copy": None,
        "record": None,
        "waited": None,
        "host": 0,  # the host's old value, and no error
        "once": INNER_ERROR + "and the current working operator name is aclnnMuls.",
        "then": None,
        "z": 7,
        "event_is_done": False,  # never: synchronize() on such an event does not return
    }
    assert result.code == 0
    assert result.calls("aclnnAdds") == []


def test_host_memory_that_cannot_be_set_aside_is_address_0_and_no_error(stack):
    """Who writes there ends the process. A block like it that is asked for later is the same one again."""
    body = """
        torch.npu.synchronize()
        say(address=torch.empty(1000, pin_memory=True).data_ptr(), again=torch.empty(1000, pin_memory=True).data_ptr())
        torch.ones(100_000).pin_memory()
        say(here=True)
        """
    result = harness.run(stack, body, STANDIN_FAIL="aclrtMallocHost:1-2=207001")
    assert (result.found, result.code) == ({"address": 0, "again": 0}, -11)


@pytest.mark.parametrize("variable", ["TASK_QUEUE_ENABLE=0", "ASCEND_LAUNCH_BLOCKING=1"])
def test_without_the_queue_a_failed_launch_costs_that_operator_alone(stack, variable):
    result = harness.run(
        stack,
        """
        x = torch.ones(1000, device="npu")
        say(product=error_of(lambda: x * 2), sum=(x + 1)[0].item(), sync=error_of(torch.npu.synchronize))
        """,
        STANDIN_FAIL="aclnnMuls:1=507015",
        **dict([variable.split("=")]),
    )
    assert "call aclnnMuls failed, error code is 507015" in result.found["product"], result.err
    assert (result.found["sum"], result.found["sync"], result.code) == (2, None, 0)


def test_queue_2_hides_that_a_workspace_does_not_fit(stack):
    result = harness.run(
        stack,
        """
        x = torch.ones(1000, device="npu")
        old = torch.full((1000,), 7.0, device="npu")
        torch.npu.synchronize()
        del old
        def product():
            x * 2
            torch.npu.synchronize()
        say(first=error_of(product), again=error_of(product))
        z = x + 1
        say(then=error_of(torch.npu.synchronize), z=z[0].item())
        """,
        TASK_QUEUE_ENABLE="2",
        STANDIN_WORKSPACE="aclnnMuls:1=99000000",
        STANDIN_DEVICE_BYTES="60000000",
    )
    assert result.found["first"] == INNER_ERROR + "and the current working operator name is aclnnMuls."
    assert "out of memory" in result.err
    assert (result.found["again"], result.found["then"], result.found["z"]) == (None, None, 7)


def test_out_of_memory_says_so_and_the_next_operator_works(stack):
    """A tensor, and with the queue at 1 a workspace too."""
    result = harness.run(
        stack,
        """
        x = torch.ones(1000, device="npu")
        say(tensor=error_of(lambda: torch.empty(99_000_000, dtype=torch.uint8, device="npu")))
        say(workspace=error_of(lambda: (x * 2, torch.npu.synchronize())))
        say(z=(x + 1)[0].item())
        """,
        STANDIN_WORKSPACE="aclnnMuls:1=99000000",
        STANDIN_DEVICE_BYTES="60000000",
    )
    kind = "RuntimeError" if stack == "2.9.0" else "OutOfMemoryError"
    for what in ("tensor", "workspace"):
        assert result.found[what].startswith(f"{kind}: NPU out of memory. Tried to allocate "), what
    assert result.found["z"] == 2


def test_a_capture_whose_end_fails_cripples_the_allocator_of_2_9(stack):
    """scaled_dot_product_attention is such a capture on 2.9.0: it forks a stream that does not join."""
    result = harness.run(
        stack,
        """
        q = torch.randn(1, 2, 17, 64, device="npu")
        attention = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)
        x = torch.ones(1000, device="npu")
        attention()
        graphs = []
        def capture(function):
            graphs.append(torch.npu.NPUGraph())
            with torch.npu.graph(graphs[-1], capture_error_mode="thread_local"):
                function()
        say(attention=error_of(lambda: capture(attention)))
        say(failed=error_of(lambda: capture(lambda: x * 2)))
        say(later=error_of(lambda: capture(lambda: x * 3)))
        say(empty_cache=error_of(torch.npu.empty_cache))
        say(eager=(x + 1)[0].item())
        """,
        STANDIN_FAIL="aclmdlRICaptureEnd:2=107025",
    )
    found = result.found
    if stack == "2.9.0":
        assert "error code is 107025" in found["attention"]
    else:
        assert found["attention"] is None
        assert "error code is 107025" in found["failed"]
    if stack == "2.13.0":
        assert (found["later"], found["empty_cache"]) == (None, None)
    else:
        for what in ("later", "empty_cache"):
            assert "captures_underway.empty() INTERNAL ASSERT FAILED" in found[what], what
    assert found["eager"] == 2


def test_a_capture_is_refused_with_queue_2_and_one_that_fails_leaves_its_stream_current(stack):
    body = """
        x, before = torch.ones(1000, device="npu"), torch.npu.current_stream()
        x * 2
        def capture():
            with torch.npu.graph(torch.npu.NPUGraph(), capture_error_mode="thread_local"):
                x * 2
        say(refused=error_of(capture), stays=torch.npu.current_stream() == before)
        """
    refused = "Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture"
    assert refused in harness.run(stack, body, TASK_QUEUE_ENABLE="2").found["refused"]
    found = harness.run(stack, body, STANDIN_FAIL="aclmdlRICaptureEnd:1=107025").found
    assert "error code is 107025" in found["refused"] and found["stays"] is False


def test_attention_with_sync_is_captured_everywhere(stack):
    result = harness.run(
        stack,
        """
        q = torch.randn(1, 17, 2, 64, device="npu")
        weight = torch.randn(64, 64, device="npu")
        def forward():
            y = torch_npu.npu_fusion_attention(q, q, q, 2, "BSND", scale=0.125, sync=True)[0]
            return torch.nn.functional.linear(y, weight) + y
        eager = forward()
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph, capture_error_mode="thread_local"):
            y = forward()
        q.mul_(0).add_(1)
        graph.replay()
        torch.npu.synchronize()
        say(apart=(y - forward()).abs().max().item())
        """,
    )
    assert result.found["apart"] == 0
    assert result.operators("replayed") == result.operators("captured") == ["FlashAttentionScore", "Matmul", "Add"]
    replay = next(at for at, line in enumerate(result.trace) if line.startswith("aclmdlRIExecuteAsync"))
    before = [line.split()[0] for line in result.trace[:replay] if "eager" in line]
    filled = before[-2:] == ["aclnnInplaceFillScalar"] * 2  # state of the random generator
    assert filled == (stack != "2.13.0")


VIT = """
from transformers import ViTConfig, ViTModel
config = ViTConfig(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256, image_size=64)
model = ViTModel(config).eval().to("npu")
pixels = torch.zeros(2, 3, 64, 64, device="npu")
with torch.inference_mode():
    model(pixels)
    torch.npu.synchronize()
    say(before=len(open(os.environ["STANDIN_TRACE"]).readlines()))
    model(pixels)
    torch.npu.synchronize()
    say(after=len(open(os.environ["STANDIN_TRACE"]).readlines()))
"""


def test_operators_of_a_forward_pass(stack):
    """13 for each layer and 6 beside: patches, class token, positions, final norm, pooler. An event in each layer."""
    result = harness.run(stack, VIT)
    result.trace = result.trace[result.found["before"] : result.found["after"]]
    names = result.operators()
    layers = 3
    each = {"Addmm": 6, "LayerNorm": 2, "Add": 2, "FlashAttentionScore": 1, "Gelu": 1, "InplaceCopy": 1}
    assert {name: names.count(name) // layers for name in each} == each
    assert len(names) == sum(each.values()) * layers + 6, names
    assert len(result.calls("aclrtRecordEvent")) == len(result.calls("aclrtStreamWaitEvent")) == layers
    weights = [line for line in result.calls("aclnnAddmm") if "float32[128,256]'" in line]
    assert len(weights) == layers  # the MLP's first: a transposed view, which nobody copied


def test_numerics_and_dtypes_that_torch_npu_chooses(stack):
    result = harness.run(
        stack,
        """
        x = torch.linspace(-3, 3, 1000)
        on_npu = torch.nn.functional.gelu(x.npu()).cpu()
        gelu = {kind: torch.nn.functional.gelu(x.double(), approximate=kind) for kind in ("none", "tanh")}
        say(gelu={kind: (on_npu - exact).abs().max().item() < 1e-6 for kind, exact in gelu.items()})
        erf = torch_npu.npu_gelu(x.npu(), approximate="none").cpu()
        say(npu_gelu_is_erf=(erf - gelu["none"]).abs().max().item() < 1e-6)

        say(hf32=[torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32])
        image, kernel = torch.randn(1, 3, 32, 32), torch.randn(8, 3, 16, 16)
        exact = torch.nn.functional.conv2d(image.double(), kernel.double(), stride=16)
        def error():
            seen = torch.nn.functional.conv2d(image.npu(), kernel.npu(), stride=16).cpu()
            return ((seen - exact).norm() / exact.norm()).item()
        rounded = error()
        torch.npu.conv.allow_hf32 = False
        say(convolution=[rounded > 1e-5, error() < 1e-6])

        say(double=str(x.npu().double().dtype))
        there = torch.full((3,), 1 / 3, dtype=torch.float64).npu()
        say(sent=str(there.dtype), bits=there.cpu()[0].item() == 1 / 3)

        def set_to_one():
            torch.npu.matmul.allow_hf32 = 1
        say(hf32_as_number=error_of(set_to_one))
        torch.npu.config.allow_internal_format = False
        say(internal_format=error_of(lambda: torch.npu.config.allow_internal_format) is not None)
        """,
    )
    assert result.found == {
        "gelu": {"none": False, "tanh": True},
        "npu_gelu_is_erf": True,
        "hf32": [True, False],
        "convolution": [True, True],
        "double": "torch.float32",
        "sent": "torch.float64",
        "bits": True,
        "hf32_as_number": result.found["hf32_as_number"],
        "internal_format": True,
    }
    assert "Device do not support double dtype now, dtype cast replace with float" in result.err
    said = result.found["hf32_as_number"]
    assert said.startswith("TypeError") if stack == "2.13.0" else said is None


def test_operators_for_later_are_offered_and_right(stack):
    """Addition and norm in one, and the MLP in one."""
    result = harness.run(
        stack,
        """
        F = torch.nn.functional
        a, b, gamma, beta = torch.randn(2, 17, 64), torch.randn(2, 17, 64), torch.randn(64), torch.randn(64)
        y, mean, spread, total = torch_npu.npu_add_layer_norm(a.npu(), b.npu(), gamma.npu(), beta.npu(), 1e-6, True)
        say(norm=(y.cpu() - F.layer_norm(a + b, (64,), gamma, beta, 1e-6)).abs().max().item() < 1e-5)
        say(sum=torch.equal(total.cpu(), a + b))

        x, first, second = torch.randn(34, 64), torch.randn(64, 256) / 8, torch.randn(256, 64) / 16
        bias1, bias2 = torch.randn(256), torch.randn(64)
        half = [t.half() for t in (x, first, second, bias1, bias2)]
        x_n, first_n, second_n, bias1_n, bias2_n = (t.npu() for t in half)
        y = torch_npu.npu_ffn(x_n, first_n, second_n, "gelu", bias1=bias1_n, bias2=bias2_n, inner_precise=1).cpu()
        x, first, second, bias1, bias2 = (t.float() for t in half)
        exact = F.gelu(x @ first + bias1, approximate="tanh") @ second + bias2
        say(ffn=((y - exact).norm() / exact.norm()).item() < 1e-3)
        """,
    )
    assert result.found == {"norm": True, "sum": True, "ffn": True}, result.err[-2000:]
    assert "aclnnAddLayerNorm" in " ".join(result.trace)


def test_the_hf32_setter_starts_the_compiler_at_once_on_2_9_0_alone(stack):
    result = harness.run(
        stack,
        """
        x = torch.ones(4, 4, device="npu")
        def allow():
            torch.npu.matmul.allow_hf32 = False
        say(setter=error_of(allow), product=error_of(lambda: (x @ x, torch.npu.synchronize())))
        """,
        STANDIN_FAIL="aclSetCompileopt=500001",
    )
    at_once = result.found["setter"] is not None and "500001" in result.found["setter"]
    assert at_once == (stack == "2.9.0")
    assert result.found["product"] is None


def test_before_the_device_is_open_the_setter_does_not_fail_but_the_first_use_does_on_2_9_0(stack):
    result = harness.run(
        stack,
        """
        def allow():
            torch.npu.matmul.allow_hf32 = False
        say(setter=error_of(allow), first=error_of(lambda: torch.ones(4, device="npu")))
        """,
        STANDIN_FAIL="aclSetCompileopt=500001",
    )
    assert result.found["setter"] is None
    assert ("500001" in (result.found["first"] or "")) == (stack == "2.9.0")


def test_on_atlas_a2_convolution_is_an_acl_op_on_2_9_0_alone(stack):
    """On 9362, the default here, it is aclnnConvolution everywhere."""
    result = harness.run(
        stack,
        """
        image, kernel = torch.rand(1, 3, 32, 32, device="npu"), torch.rand(8, 3, 16, 16, device="npu")
        say(convolution=error_of(lambda: torch.nn.functional.conv2d(image, kernel, stride=16).cpu()))
        """,
        STANDIN_SOC="Ascend910B2",
    )
    used = [name for name in ("aclnnConvolution", "aclopCompileAndExecute") if result.calls(name)]
    assert used == ["aclopCompileAndExecute" if stack == "2.9.0" else "aclnnConvolution"]


def test_the_compatible_implementation(stack):
    result = harness.run(
        stack,
        """
        x = torch.linspace(-3, 3, 1000)
        apart = torch.nn.functional.gelu(x.npu()).cpu() - torch.nn.functional.gelu(x.double())
        say(gelu_is_erf=apart.abs().max().item() < 1e-6)
        torch.nn.functional.layer_norm(x.npu(), (1000,))
        q = torch.randn(1, 2, 17, 64, device="npu")
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        image, kernel = torch.randn(1, 3, 32, 32), torch.randn(8, 3, 16, 16)
        exact = torch.nn.functional.conv2d(image.double(), kernel.double(), stride=16)
        seen = torch.nn.functional.conv2d(image.npu(), kernel.npu(), stride=16).cpu()
        say(convolution_is_rounded=((seen - exact).norm() / exact.norm()).item() > 1e-5)
        """,
        fresh=True,  # the variable is read when torch_npu is imported
        TORCH_NPU_USE_COMPATIBLE_IMPL="1",
    )
    assert result.found == {"gelu_is_erf": stack != "2.9.0", "convolution_is_rounded": True}, result.err[-2000:]
    names = result.operators()
    assert "FlashAttentionScore" in names
    assert ("FastLayerNorm" in names) == (stack != "2.9.0")


FORK = """
import multiprocessing, signal
x = torch.ones(4, device="npu")
torch.npu.synchronize()
def child(name, function):
    def target():
        signal.alarm(5)  # an operator in a queue that nobody empties is waited for in vain
        say(**{name: error_of(function)})
        os._exit(0)
    return target
process = multiprocessing.get_context("fork").Process(target=child("multiprocessing", lambda: (x + 1).cpu()))
process.start()
process.join()
if not (pid := os.fork()):
    child("launched", lambda: x + 1)()
os.waitpid(pid, 0)
if not (pid := os.fork()):
    child("computed", lambda: say(value=(x + 1).cpu()[0].item()))()
os.waitpid(pid, 0)
"""


@pytest.mark.parametrize("queue", ["0", "1"])
def test_a_child_of_os_fork_is_not_stopped(stack, queue):
    """One of multiprocessing is. Without the queue of tasks the forked child computes; with it, it waits for ever."""
    found = harness.run(stack, FORK, TASK_QUEUE_ENABLE=queue).found
    assert "Cannot re-initialize NPU in forked subprocess" in found.pop("multiprocessing")
    assert found == {"launched": None} | ({"value": 2, "computed": None} if queue == "0" else {})
