"""An Ascend NPU made of the CPU: gives torch a device "npu", so that what runs on hardware runs in the tests.

`install()` registers it as torch.npu and as the module torch_npu. What it takes over from the hardware:

- tensors live on a device of their own, and a call that mixes them with the CPU's fails;
- float32 convolutions and matrix products are rounded to HF32 while torch_npu's flags allow it, with torch_npu's defaults;
- memory is counted, and a limit raises torch.OutOfMemoryError;
- operators are queued: with `seconds_per_op` set, only a synchronisation waits for them;
- NPUGraph records operators and replays them, and refuses to synchronise while it records;
- autocast casts what torch_npu's autocast casts in a ViT.

Its name says that it is simulated, and results made on it are refused as evidence.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import sys
import time
import types
import weakref
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simulated NPU (CPU)"
HF32_DROPPED_BITS = 12  # float32 has 23 bits of mantissa, HF32 keeps 11
CONVOLUTIONS = {"aten::conv2d", "aten::convolution"}
MATRIX_PRODUCTS = {"aten::linear", "aten::addmm", "aten::mm", "aten::bmm", "aten::matmul", "aten::scaled_dot_product_attention"}
COPIES = {"aten::to", "aten::_to_copy", "aten::copy_"}
READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"}


class SimulatedTensor(torch.Tensor):
    """A tensor on a simulated NPU; the numbers are in `inner`, on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int) -> SimulatedTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("npu", index),
        )
        tensor.inner = inner
        memory.hold(tensor)
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return dispatch(operator, args, kwargs or {})


class Memory:
    """Bytes of the storages that tensors on the device hold."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self.allocated = self.peak = 0
        self._holders: dict[int, int] = {}

    def hold(self, tensor: SimulatedTensor) -> None:
        storage = tensor.inner.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._holders:
            if self.limit is not None and self.allocated + size > self.limit:
                raise torch.OutOfMemoryError(f"NPU out of memory. Tried to allocate {size / 2**20:.2f} MiB (simulated)")
            self._holders[address] = 0
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        self._holders[address] += 1
        weakref.finalize(tensor, self._release, address, size).atexit = False

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self.allocated -= size


class Queue:
    """Work that was queued and not waited for, in seconds of a device that takes `seconds_per_op` for each operator."""

    def __init__(self) -> None:
        self.seconds_per_op = 0.0
        self.busy_until = 0.0
        self.count = 0

    def add(self) -> None:
        self.count += 1
        if self.seconds_per_op:
            self.busy_until = max(self.busy_until, time.perf_counter()) + self.seconds_per_op

    def pending(self) -> float:
        return max(0.0, self.busy_until - time.perf_counter())

    def wait(self) -> None:
        if recording is not None:
            raise RuntimeError("NPU graph capture: synchronisation is not permitted while capturing")
        time.sleep(self.pending())


memory = Memory()
queue = Queue()
recording: list | None = None


def dispatch(operator, args: tuple, kwargs: dict) -> Any:
    """Run an operator whose tensors are on the NPU, or that makes some there, on the CPU."""
    name = operator._schema.name
    leaves = tree_leaves((args, kwargs))
    wrapped = [leaf for leaf in leaves if isinstance(leaf, SimulatedTensor)]
    plain = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, SimulatedTensor)]
    _check_devices(name, wrapped, [tensor for tensor in plain if tensor.dim()])
    targets = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    if name == "aten::copy_":
        targets = [args[0].device]
    target = (targets or [tensor.device for tensor in wrapped])[0]
    if recording is not None and name in COPIES and any(tensor.dim() for tensor in plain):
        raise RuntimeError("NPU graph capture: copying from or to the host is not permitted while capturing")
    if wrapped and (target.type == "cpu" or name in READS):
        queue.wait()
    else:
        queue.add()
    with torch.inference_mode(False), torch.no_grad():
        result = _compute(operator, args, kwargs)
        known = {id(tensor.inner): tensor for tensor in wrapped}

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if target.type == "cpu":
                return value.clone() if id(value) in known else value
            return known[id(value)] if id(value) in known else SimulatedTensor(value, target.index or 0)

        output = tree_map(wrap, result)
    if recording is not None:
        recording.append((operator, args, kwargs, output))
    return output


def _check_devices(name: str, wrapped: list, plain: list) -> None:
    devices = {tensor.device for tensor in wrapped}
    if (len(devices) > 1 or (wrapped and plain)) and name not in COPIES:
        found = ", ".join(sorted({str(tensor.device) for tensor in [*wrapped, *plain]}))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {found} ({name})")


def _compute(operator, args: tuple, kwargs: dict) -> Any:
    name = operator._schema.name
    rounds = (name in CONVOLUTIONS and module.conv.allow_hf32) or (name in MATRIX_PRODUCTS and module.matmul.allow_hf32)

    def unwrap(value: Any) -> Any:
        if isinstance(value, SimulatedTensor):
            return round_to_hf32(value.inner) if rounds and value.dtype == torch.float32 else value.inner
        return torch.device("cpu") if isinstance(value, torch.device) else value

    args, kwargs = tree_map(unwrap, (args, {key: value for key, value in kwargs.items() if key != "pin_memory"}))
    return operator(*args, **kwargs)


def round_to_hf32(values: torch.Tensor) -> torch.Tensor:
    """float32 with the mantissa rounded to HF32's 11 bits."""
    bits = values.contiguous().view(torch.int32)
    half = 1 << (HF32_DROPPED_BITS - 1)
    return ((bits + half) >> HF32_DROPPED_BITS << HF32_DROPPED_BITS).view(torch.float32)


class NPUGraph:
    """Records the operators that run inside torch.npu.graph() and runs them again on the same tensors."""

    def __init__(self) -> None:
        self.operators: list = []

    def replay(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for operator, args, kwargs, output in self.operators:
                queue.add()
                result = _compute(operator, args, kwargs)
                for tensor, value in zip(tree_leaves(output), tree_leaves(result), strict=True):
                    if isinstance(tensor, SimulatedTensor) and tensor.inner is not value:
                        tensor.inner = value


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = queue.busy_until

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.time - time.perf_counter()))


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class _Hf32Flag:
    def __init__(self, default: bool) -> None:
        self.allow_hf32 = default


class _Module(types.ModuleType):
    """torch.npu: the functions that mirror torch.cuda's, as far as they are used."""

    Event, Stream, NPUGraph = Event, Stream, NPUGraph

    def __init__(self) -> None:
        super().__init__("torch.npu")
        self.conv, self.matmul = _Hf32Flag(True), _Hf32Flag(False)  # torch_npu's defaults
        self.devices, self.selected = 1, 0

    def is_available(self) -> bool:
        return self.devices > 0

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return self.devices

    def current_device(self) -> int:
        return self.selected

    def set_device(self, device: Any) -> None:
        self.selected = torch.device("npu", device).index if isinstance(device, int) else torch.device(device).index or 0

    def get_device_name(self, device: Any = None) -> str:
        return NAME

    def synchronize(self, device: Any = None) -> None:
        queue.wait()

    def empty_cache(self) -> None:
        pass

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        total = memory.limit or 64 << 30
        return total - memory.allocated, total

    def memory_allocated(self, device: Any = None) -> int:
        return memory.allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return memory.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        memory.peak = memory.allocated

    def current_stream(self, device: Any = None) -> Stream:
        return Stream()

    def stream(self, stream: Stream) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph: NPUGraph, **_options: Any):
        global recording
        recording = graph.operators
        try:
            yield
        finally:
            recording = None

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False


module = _Module()
_libraries: list[torch.library.Library] = []


def install() -> None:
    """Register the device, once. NPU_SIMULATOR_DEVICES and NPU_SIMULATOR_MEMORY (bytes) set it up for another process."""
    if not _libraries:
        _setup_privateuseone_for_python_backend("npu", backend_module=module)
        fallback = torch.library.Library("_", "IMPL")
        fallback.fallback(lambda operator, *args, **kwargs: dispatch(operator, args, kwargs), dispatch_key="PrivateUse1")
        _libraries.extend([fallback, *_autocast_libraries()])
    reset()
    fake = types.ModuleType("torch_npu")
    fake.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    fake.npu_fusion_attention = _not_simulated  # transformers imports it; scaled_dot_product_attention does the work
    sys.modules["torch_npu"] = fake


def _not_simulated(*_args: Any, **_kwargs: Any) -> None:
    raise NotImplementedError("the simulated NPU has no fused operators of its own")


def reset() -> None:
    """Back to the state of a new process: torch_npu's defaults, no limit, an empty queue."""
    module.conv.allow_hf32, module.matmul.allow_hf32 = True, False
    module.devices, module.selected = int(os.environ.get("NPU_SIMULATOR_DEVICES", "1")), 0
    memory.limit = int(os.environ["NPU_SIMULATOR_MEMORY"]) if "NPU_SIMULATOR_MEMORY" in os.environ else None
    memory.peak = memory.allocated
    queue.seconds_per_op = queue.busy_until = 0.0


def _autocast_libraries() -> list[torch.library.Library]:
    fallthrough = torch.library.Library("_", "IMPL")
    fallthrough.fallback(torch.library.fallthrough_kernel, dispatch_key="AutocastPrivateUse1")
    casting = torch.library.Library("aten", "IMPL")
    for operator in (torch.ops.aten.linear, torch.ops.aten.conv2d, torch.ops.aten.scaled_dot_product_attention):
        casting.impl(operator.default, _casting(operator.default), dispatch_key="AutocastPrivateUse1")
    return [fallthrough, casting]


def _casting(operator):
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args, **kwargs):
        dtype = torch.get_autocast_dtype("npu")
        with torch._C._ExcludeDispatchKeyGuard(key):
            cast = lambda value: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            return operator(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel
