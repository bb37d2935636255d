"""An Ascend NPU made of the CPU: gives torch a device "npu", as unlike an ideal one as the real one is.

`install()` registers it as torch.npu and as the module torch_npu, `reset()` gives a new process's state back. It is an
Ascend910_9362 under torch_npu 2.9.0 (machine.version "7.3") or a later one ("26": 2.9.0.post2 and after). What it takes over,
from torch_npu's and op-plugin's sources, the wheels (tests/test_npu_contract.py compares) and CANN's documents:

- tensors live on a device of their own; a call that mixes them with the CPU's fails;
- GELU is the tanh approximation, whatever it is asked for; torch_npu.npu_gelu computes what it is asked for;
- float32 convolutions, and matrix products where allowed, are rounded to HF32; the flags are read at each call;
- out of memory is a plain RuntimeError under 7.3, and torch.OutOfMemoryError under 26;
- operators are queued: with queue.seconds_per_op set, only a synchronisation waits for them;
- a stream that reads what another one wrote, without having waited for it, reads zeros, and so does the host;
- a graph's capture refuses what the hardware refuses, and what fails inside comes out as another error of its end;
- with INF_NAN_MODE_FORCE_DISABLE=1 float16 saturates and NaN becomes 0;
- autocast casts what torch_npu's autocast casts in a ViT; torch_npu prints to stdout.

machine.faults holds what else is wrong with it, any of FAULTS. For a child process: NPU_SIMULATOR_DEVICES, _MEMORY (bytes),
_VERSION and _FAULTS (names with commas between). Its name says that it is simulated; its results are refused as evidence.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import random
import sys
import threading
import time
import types
import warnings
import weakref
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simulated NPU (CPU)"
NOISE = "Warning : ASCEND_HOME_PATH environment variable is not set."  # torch_npu 2.9.0 prints it to stdout when imported
FAULTS = {
    "compiler_broken": "CANN's compiler cannot start: 500001 from the HF32 setters (7.3) or the first acl_op operator (26)",
    "internal_formats": "internal formats are on by default, as on Atlas A2, and conv2d is an acl_op operator",
    "late_memory": "out of memory is told by the next synchronisation, not by the operator",
    "workspace_memory": "out of memory comes from the workspace allocator, with its text",
    "nondeterministic": "matrix products and layer norms vary by 1 ulp from call to call",
    "batch_variant": "matrix products vary by 1 ulp with the number of rows",
    "quiet": "torch_npu prints nothing to stdout",
}
HF32_DROPPED_BITS = 12  # float32 has 23 bits of mantissa, HF32 keeps 11
CONVOLUTIONS = {"aten::conv2d", "aten::convolution"}
ATTENTIONS = {"aten::scaled_dot_product_attention", "npu::npu_fusion_attention"}
LINEAR = {"aten::linear", "aten::addmm", "aten::mm", "aten::bmm", "aten::matmul"}
UNSTABLE = LINEAR | {"aten::layer_norm", "aten::native_layer_norm"}  # no promise of equal bits on A2 and A3
COPIES = {"aten::to", "aten::_to_copy", "aten::copy_"}
READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"}


# --- the machine: version, faults, options ---


class Machine:
    """What a test may change about the NPU; reset() takes it from the environment."""

    def __init__(self) -> None:
        environment = os.environ.get
        self.version = environment("NPU_SIMULATOR_VERSION", "7.3")
        self.faults = set(filter(None, environment("NPU_SIMULATOR_FAULTS", "").split(",")))
        if self.version not in ("7.3", "26") or self.faults - FAULTS.keys():
            raise ValueError(f"no such simulated NPU: {self.version}, {self.faults}; faults are {', '.join(FAULTS)}")
        self.saturates = environment("INF_NAN_MODE_FORCE_DISABLE") == "1"
        self.options = {"ALLOW_CONV_HF32": True, "ALLOW_MATMUL_HF32": False}  # torch_npu's defaults
        self.thread = threading.local()  # .stream: the current one; .deterministic: what the first operator found
        self.random = random.Random(0)

    def set_option(self, name: str, value: bool) -> None:
        if self.version == "7.3" and name.endswith("HF32"):
            self.start_compiler("AclSetCompileopt(aclCompileOpt::ACL_ALLOW_HF32, allow_hf32.c_str())")
        self.options[name] = value

    def start_compiler(self, call: str) -> None:
        if "compiler_broken" in self.faults:
            raise device_error(f"at_npu::native::{call}", 500001, "The internal ACL of the system is incorrect.")

    def runs_acl_op(self, name: str) -> bool:
        internal_formats = self.options.get("ALLOW_INTERNAL_FORMAT", "internal_formats" in self.faults)
        return name in CONVOLUTIONS and internal_formats


def device_error(call: str, code: int, text: str) -> RuntimeError:
    """An error as torch_npu words it: several lines, the code in the first."""
    return RuntimeError(f"call: NPU function error: {call}, error code is {code}\n[Error]: {text}\n        EE9999: (simulated)")


class Hf32Switch:
    """torch.npu.conv or torch.npu.matmul. As in torch_npu, any other name is ignored in silence, and reads as None."""

    def __init__(self, option: str) -> None:
        self.__dict__["_option"] = option

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "allow_hf32":
            if not isinstance(value, bool):  # torch_npu 2.13; the earlier ones take anything
                raise TypeError(f"allow_hf32 must be a bool, but got {type(value).__name__}")
            machine.set_option(self._option, value)

    def __getattr__(self, name: str) -> bool | None:
        return machine.options[self._option] if name == "allow_hf32" else None


class Config:
    """torch.npu.config, which can be set and not read."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "allow_internal_format":
            machine.set_option("ALLOW_INTERNAL_FORMAT", bool(value))


# --- memory ---


class Storage:
    """Memory on the device: how many tensors hold it, and which work wrote it last."""

    def __init__(self) -> None:
        self.holders = 0
        self.writer: tuple[Stream, int] | None = None


class Memory:
    """Bytes of the storages that tensors on the device hold."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self.allocated = self.peak = 0
        self.late: RuntimeError | None = None
        self._storages: dict[int, Storage] = {}

    def hold(self, tensor: SimulatedTensor) -> Storage:
        data = tensor.inner.untyped_storage()
        address, size = data.data_ptr(), data.nbytes()
        if address not in self._storages:
            if self.limit is not None and self.allocated + size > self.limit:
                self._refuse(size)
            self._storages[address] = Storage()
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        self._storages[address].holders += 1
        weakref.finalize(tensor, self._release, address, size).atexit = False
        return self._storages[address]

    def _refuse(self, size: int) -> None:
        if capturing_here():
            capture._invalid = True
        allocator = "NPUWorkspaceAllocator tried" if "workspace_memory" in machine.faults else "Tried"
        kind = RuntimeError if machine.version == "7.3" else torch.OutOfMemoryError
        text = f"NPU out of memory. {allocator} to allocate {size / 2**20:.2f} MiB (simulated)"
        if "late_memory" not in machine.faults:
            raise kind(text)
        self.late = kind(text)

    def tell_late(self) -> None:
        if self.late is not None:
            try:
                raise self.late
            finally:
                self.late = None

    def _release(self, address: int, size: int) -> None:
        self._storages[address].holders -= 1
        if not self._storages[address].holders:
            del self._storages[address]
            self.allocated -= size


class SimulatedTensor(torch.Tensor):
    """A tensor on a simulated NPU; the numbers are in `inner`, on the CPU."""

    inner: torch.Tensor
    storage_on_device: Storage
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=torch.device("npu", index), **layout)
        tensor.inner = inner
        tensor.storage_on_device = memory.hold(tensor)
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return dispatch(operator, args, kwargs or {})


# --- the queue, streams and events ---


class Queue:
    """Work that was queued and not waited for, in seconds of a device that takes `seconds_per_op` for each operator."""

    def __init__(self) -> None:
        self.seconds_per_op = 0.0
        self.busy_until = 0.0
        self.count = 0
        self.host_waited_for: dict[Stream, int] = {}
        self._to_host: list[tuple[Stream, int, torch.Tensor, torch.Tensor]] = []

    def add(self, stream: Stream) -> None:
        self.count += 1
        stream._ticket = self.count
        if self.seconds_per_op:
            self.busy_until = max(self.busy_until, time.perf_counter()) + self.seconds_per_op

    def pending(self) -> float:
        return max(0.0, self.busy_until - time.perf_counter())

    def deliver_later(self, stream: Stream, destination: torch.Tensor, values: torch.Tensor) -> None:
        """A copy to pinned memory: the host finds the values there once it has waited for the stream."""
        with torch.inference_mode():
            destination.zero_()
        self._to_host.append((stream, self.count, destination, values))

    def wait(self, waited_for: dict[Stream, int], until: float | None = None) -> None:
        """The host waits until the device is done with work {stream: ticket}, at the time `until`."""
        check_capture("synchronisation", 107027, "the stream is captured")
        time.sleep(self.pending() if until is None else max(0.0, until - time.perf_counter()))
        _take_later(self.host_waited_for, waited_for)
        for copy in list(self._to_host):
            stream, ticket, destination, values = copy
            if ticket <= waited_for.get(stream, -1):
                with torch.inference_mode():
                    destination.copy_(values)
                self._to_host.remove(copy)
        memory.tell_late()


def _take_later(seen: dict[Stream, int], more: dict[Stream, int]) -> None:
    seen.update({stream: max(ticket, seen.get(stream, -1)) for stream, ticket in more.items()})


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._time, self._after = 0.0, {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        self._time = max(queue.busy_until, time.perf_counter())
        self._after = {**stream._waited_for, stream: stream._ticket}

    def wait(self, stream: Stream | None = None) -> None:
        _take_later((stream or current_stream())._waited_for, self._after)

    def query(self) -> bool:
        return self._time <= time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        return (end_event._time - self._time) * 1000

    def synchronize(self) -> None:
        queue.wait(self._after, self._time)


class Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self._ticket = 0  # of its last operator
        self._waited_for: dict[Stream, int] = {}
        streams.add(self)

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def _sees(self, storage: Storage) -> bool:
        writer, ticket = storage.writer or (self, 0)
        return writer is self or ticket <= max(self._waited_for.get(writer, -1), queue.host_waited_for.get(writer, -1))


streams: weakref.WeakSet[Stream] = weakref.WeakSet()
default_stream = Stream()


def current_stream(device: Any = None) -> Stream:
    return getattr(machine.thread, "stream", default_stream)


class StreamContext:
    """torch.npu.stream(...)"""

    def __init__(self, stream_ctx: Stream | None) -> None:
        self._stream = stream_ctx or current_stream()

    def __enter__(self) -> None:
        self._before, machine.thread.stream = current_stream(), self._stream

    def __exit__(self, *_error: object) -> None:
        machine.thread.stream = self._before


# --- graphs ---

capture: NPUGraph | None = None


def capturing_here() -> bool:
    return capture is not None and capture._thread == threading.get_ident()


def check_capture(what: str, code: int, text: str) -> None:
    """Refuse what must not happen while a graph is captured, by any thread with capture_error_mode "global"."""
    if capturing_here() or (capture is not None and capture._mode == "global"):
        capture._invalid = True
        raise device_error(f"{what} is not permitted while a graph is captured", code, text)


class NPUGraph:
    """Records the operators that run inside torch.npu.graph() and runs them again on the same tensors."""

    def __init__(self) -> None:
        self._operators: list = []

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        global capture
        if os.environ.get("TASK_QUEUE_ENABLE") == "2":
            raise RuntimeError(
                "Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture, please export TASK_QUEUE_ENABLE=1/0."
            )
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise RuntimeError(
                f"Unknown capture error mode. Expected `global`, `thread_local`, or `relaxed`, got {capture_error_mode}"
            )
        self._thread, self._mode, self._invalid, self._forked = threading.get_ident(), capture_error_mode, False, False
        capture = self

    def capture_end(self) -> None:
        global capture
        capture = None
        if self._invalid:
            raise device_error("AclmdlRICaptureEnd", 507903, "the capture status is invalidated")
        if self._forked:
            raise device_error("AclmdlRICaptureEnd", 107025, "a stream that was not joined to the original stream")

    def replay(self) -> None:
        for operator, args, kwargs, output in self._operators:
            with torch.inference_mode(False), torch.no_grad():
                result, writer = _run(operator, args, kwargs)
            for tensor, value in zip(tree_leaves(output), tree_leaves(result), strict=True):
                if not isinstance(tensor, SimulatedTensor):
                    continue
                moved = tensor.inner.data_ptr() != value.data_ptr()
                if moved:  # a graph writes where it wrote when it was captured
                    tensor.inner.copy_(value)
                if moved or operator._schema.is_mutable:
                    tensor.storage_on_device.writer = writer

    def _record(self, operator, args: tuple, kwargs: dict, output: Any) -> None:
        name = operator._schema.name
        if name in ATTENTIONS and machine.version == "7.3" and not _by_name(operator, args, kwargs).get("sync"):
            self._forked = True  # it makes a second stream wait for an event, which never comes back
        self._operators.append((operator, args, kwargs, output))


class graph:
    """Captures the work inside. As in torch_npu, an end that raises leaves the capture's stream current."""

    def __init__(
        self, npu_graph: NPUGraph, pool=None, stream=None, auto_dispatch_capture=False, capture_error_mode="global"
    ) -> None:
        self._graph, self._pool, self._mode = npu_graph, pool, capture_error_mode
        self._stream_context = StreamContext(stream or Stream())

    def __enter__(self) -> None:
        module.synchronize()
        self._stream_context.__enter__()
        self._graph.capture_begin(self._pool, self._mode)

    def __exit__(self, *error: object) -> None:
        self._graph.capture_end()
        self._stream_context.__exit__(*error)


# --- running an operator ---


def dispatch(operator, args: tuple, kwargs: dict) -> Any:
    """Run an operator whose tensors are on the NPU, or that makes some there, on the CPU."""
    name = operator._schema.name
    leaves = tree_leaves((args, kwargs))
    wrapped = [leaf for leaf in leaves if isinstance(leaf, SimulatedTensor)]
    plain = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, SimulatedTensor) and leaf.dim()]
    _check_devices(name, wrapped, plain)
    targets = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    if name == "aten::copy_":
        targets = [args[0].device]
    target = (targets or [tensor.device for tensor in wrapped])[0]
    to_host = bool(wrapped) and (target.type == "cpu" or name in READS)
    if to_host or (plain and name in COPIES):
        check_capture("copying from or to the host", 107030, "stream is captured, not support current oper")
    with torch.inference_mode(False), torch.no_grad():
        result, writer = _run(operator, args, kwargs, to_host)
        deferred = name in COPIES and _by_name(operator, args, kwargs).get("non_blocking")
        if to_host:
            return _to_host(result, args[0] if name == "aten::copy_" else None, deferred)
        if name in COPIES and plain and not (deferred and all(is_pinned(tensor) for tensor in plain)):
            current_stream().synchronize()
        known = {id(tensor.inner): tensor for tensor in wrapped}

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            tensor = known[id(value)] if id(value) in known else SimulatedTensor(value, target.index or 0)
            if tensor.storage_on_device.writer is None or operator._schema.is_mutable:
                tensor.storage_on_device.writer = writer
            return tensor

        output = tree_map(wrap, result)
    if capturing_here():
        capture._record(operator, args, kwargs, output)
    return output


def _check_devices(name: str, wrapped: list, plain: list) -> None:
    devices = {tensor.device for tensor in wrapped}
    if (len(devices) > 1 or (wrapped and plain)) and name not in COPIES:
        found = ", ".join(sorted({str(tensor.device) for tensor in [*wrapped, *plain]}))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {found} ({name})")


def _by_name(operator, args: tuple, kwargs: dict) -> dict[str, Any]:
    return dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False)) | kwargs


def _to_host(result: Any, destination: torch.Tensor | None, deferred: bool) -> Any:
    stream = current_stream()
    if not isinstance(result, torch.Tensor):
        stream.synchronize()
        return result
    values = result.clone()
    if not deferred or (destination is not None and not is_pinned(destination)):
        stream.synchronize()
        return values if destination is None else destination
    destination = torch.empty_like(values) if destination is None else destination
    queue.deliver_later(stream, destination, values)
    return destination


def _run(operator, args: tuple, kwargs: dict, to_host: bool = False) -> tuple[Any, tuple[Stream, int]]:
    """Queue an operator on the current stream. Returns its result, on the CPU, and whose work that is."""
    stream = current_stream()
    queue.add(stream)
    if not hasattr(machine.thread, "deterministic"):  # a thread's first operator decides
        machine.thread.deterministic = torch.are_deterministic_algorithms_enabled()
    if machine.runs_acl_op(operator._schema.name):
        if capturing_here():
            capture._invalid = True
            raise RuntimeError(f"Cannot run aclop operators during NPU graph capture. Current working aclop is {operator}.")
        machine.start_compiler("LazyAclopSet::LazyAclSetCompileopt")
    writer = stream, queue.count
    unseen = [
        t for t in tree_leaves((args, kwargs)) if isinstance(t, SimulatedTensor) and not stream._sees(t.storage_on_device)
    ]
    if unseen:  # read too early: zeros; an alias stays what it is, for whoever waits before reading
        names = [argument.name for argument in operator._schema.arguments]
        aliases = {argument.name for argument in operator._schema.arguments if argument.alias_info and not to_host}
        early = lambda value: torch.zeros_like(value.inner) if any(value is tensor for tensor in unseen) else value
        given = {name: value if name in aliases else tree_map(early, value) for name, value in zip(names, args, strict=False)}
        args, kwargs = tuple(given.values()), {key: tree_map(early, value) for key, value in kwargs.items()}
        kept = [given[name].storage_on_device for name in names if any(given.get(name) is tensor for tensor in unseen)]
        if kept and operator._schema.name != "aten::copy_":
            writer = kept[0].writer
    return _compute(operator, args, kwargs), writer


def _compute(operator, args: tuple, kwargs: dict) -> Any:
    name = operator._schema.name
    rounds = (name in CONVOLUTIONS and module.conv.allow_hf32) or (name in LINEAR and module.matmul.allow_hf32)

    def unwrap(value: Any) -> Any:
        if isinstance(value, SimulatedTensor):
            return round_to_hf32(value.inner) if rounds and value.dtype == torch.float32 else value.inner
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def saturate(value: Any) -> Any:
        half = isinstance(value, torch.Tensor) and value.dtype == torch.float16
        return value.nan_to_num_(0.0, 65504, -65504) if half else value

    args, kwargs = tree_map(unwrap, (args, {key: value for key, value in kwargs.items() if key != "pin_memory"}))
    if name in ("aten::gelu", "aten::gelu_"):
        kwargs["approximate"] = "tanh"
    result = KERNELS[name](**_by_name(operator, args, kwargs)) if name in KERNELS else operator(*args, **kwargs)
    if machine.saturates and name != "aten::copy_":
        result = tree_map(saturate, result)
    return tree_map(one_ulp_up, result) if name in UNSTABLE and _varies(name, result) else result


def _varies(name: str, result: Any) -> bool:
    if name in LINEAR and "batch_variant" in machine.faults and (result.numel() // result.shape[-1]).bit_length() % 2:
        return True
    return "nondeterministic" in machine.faults and not machine.thread.deterministic and machine.random.random() < 0.5


def one_ulp_up(values: torch.Tensor) -> torch.Tensor:
    """The next number away from zero; what is not finite stays."""
    bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    return torch.where(values.isfinite(), (bits + 1).view(values.dtype), values)


def round_to_hf32(values: torch.Tensor) -> torch.Tensor:
    """float32 with the mantissa rounded to HF32's 11 bits."""
    bits = values.contiguous().view(torch.int32)
    half = 1 << (HF32_DROPPED_BITS - 1)
    return ((bits + half) >> HF32_DROPPED_BITS << HF32_DROPPED_BITS).view(torch.float32)


# --- torch_npu's own operators ---

OPERATORS = (  # as torch_npu 2.9.0 declares them
    "npu_gelu(Tensor input, *, str approximate='none') -> Tensor",
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
    "Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., int pre_tockens=2147483647, "
    "int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, int[]? actual_seq_qlen=None, "
    "int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False, "
    'str softmax_layout="", Tensor? sink=None) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)',
)
TO_BNSD = {  # of a tensor and the number of heads
    "BNSD": lambda value, heads: value,
    "BSND": lambda value, heads: value.transpose(1, 2),
    "BSH": lambda value, heads: value.unflatten(-1, (heads, -1)).transpose(1, 2),
}
FROM_BNSD = {"BNSD": lambda value: value, "BSND": lambda value: value.transpose(1, 2)}
FROM_BNSD["BSH"] = lambda value: value.transpose(1, 2).flatten(-2)


def _fusion_attention(query, key, value, head_num: int, input_layout: str, scale: float = 1.0, sync: bool = False, **rest: Any):
    declared = {
        argument.name: argument.default_value for argument in torch.ops.npu.npu_fusion_attention.default._schema.arguments
    }
    if any(isinstance(given, torch.Tensor) or given != declared[name] for name, given in rest.items()):
        raise NotImplementedError(f"the simulated NPU's fused attention takes no {', '.join(rest)}")
    layout = input_layout.upper()
    if layout not in TO_BNSD:
        raise RuntimeError(f"The input_layout should be BSH/SBH/BNSD/BSND/TND(case-insensitive), but got {input_layout}")
    heads = [TO_BNSD[layout](part.float(), head_num) for part in (query, key, value)]
    if heads[0].shape[1] != head_num:
        raise RuntimeError(f"head_num is {head_num}, and the query has {heads[0].shape[1]} heads (simulated)")
    output = FROM_BNSD[layout](torch.nn.functional.scaled_dot_product_attention(*heads, scale=scale))
    return output.to(query.dtype).contiguous(), *(query.new_empty(0) for _ in range(3)), 0, 0, 0


KERNELS = {"npu::npu_gelu": torch.nn.functional.gelu, "npu::npu_fusion_attention": _fusion_attention}


# --- torch.npu and torch_npu ---


class _Module(types.ModuleType):
    """torch.npu: the functions that mirror torch.cuda's, as far as they are used."""

    Event, Stream, NPUGraph, graph = Event, Stream, NPUGraph, graph

    def __init__(self) -> None:
        super().__init__("torch.npu")
        self.conv, self.matmul, self.config = Hf32Switch("ALLOW_CONV_HF32"), Hf32Switch("ALLOW_MATMUL_HF32"), Config()
        self.devices, self._selected = 1, 0  # devices is the tests', and not torch_npu's

    def __getattr__(self, name: str) -> Any:
        if name == "set_deterministic_level" and machine.version == "26":
            return set_deterministic_level
        raise AttributeError(f"module 'torch_npu.npu' has no attribute {name!r}")

    def is_available(self) -> bool:
        return self.devices > 0

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return self.devices

    def current_device(self) -> int:
        return self._selected

    def set_device(self, device: Any) -> None:
        self._selected = torch.device("npu", device).index if isinstance(device, int) else torch.device(device).index or 0

    def get_device_name(self, device_name: Any = None) -> str:
        return NAME

    def synchronize(self, device: Any = None) -> None:
        queue.wait({stream: stream._ticket for stream in streams})

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
        return current_stream()

    def stream(self, stream: Stream | None) -> StreamContext:
        return StreamContext(stream)

    def is_current_stream_capturing(self) -> bool:
        return capturing_here()

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False


def set_deterministic_level(level: int) -> None:
    warnings.warn(
        "After using 'torch_npu.npu.set_deterministic_level', do not use 'torch.use_deterministic_algorithms'", stacklevel=2
    )
    torch.use_deterministic_algorithms(level >= 1)


machine, memory, queue, module = Machine(), Memory(), Queue(), _Module()
_libraries: list[torch.library.Library] = []
_patches = contextlib.ExitStack()


def install() -> None:
    """Register the device, once per process, in a new process's state, and let torch_npu be imported."""
    if not _libraries:
        _setup_privateuseone_for_python_backend("npu", backend_module=module)
        _libraries.extend(_register())
    reset()
    fake = types.ModuleType("torch_npu")
    fake.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    fake.npu, fake.npu_gelu, fake.npu_fusion_attention = module, torch.ops.npu.npu_gelu, torch.ops.npu.npu_fusion_attention
    sys.modules["torch_npu"] = fake
    excepthook, empty = sys.excepthook, torch.empty

    def empty_or_pinned(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return _pin(empty(*size, **options)) if pin_memory else empty(*size, **options)

    _patch(torch, "empty", empty_or_pinned)
    _patch(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor if is_pinned(tensor) else _pin(tensor.clone()))
    _patch(torch.Tensor, "is_pinned", lambda tensor, device=None: is_pinned(tensor))
    _patch(sys, "excepthook", lambda *error: excepthook(*error))
    if "quiet" not in machine.faults and "pytest" not in sys.modules:
        print(NOISE)


def reset() -> None:
    """Back to the state of a process that has not used the NPU: options, memory, queue, streams, patches of torch."""
    global machine, capture
    _patches.close()
    machine, capture = Machine(), None
    module.devices, module._selected = int(os.environ.get("NPU_SIMULATOR_DEVICES", "1")), 0
    memory.limit = int(os.environ["NPU_SIMULATOR_MEMORY"]) if "NPU_SIMULATOR_MEMORY" in os.environ else None
    memory.peak, memory.late = memory.allocated, None
    queue.seconds_per_op = 0.0
    queue.busy_until = 0.0
    module.synchronize()


def _patch(owner: Any, name: str, value: Any) -> None:
    _patches.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    check_capture("allocating pinned memory", 107030, "stream is captured, not support current oper")
    tensor.untyped_storage().pinned_by_simulator = True
    return tensor


def is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "pinned_by_simulator", False)


def _register() -> list[torch.library.Library]:
    everything, below_autocast = torch.library.Library("_", "IMPL"), torch.library.Library("_", "IMPL")
    everything.fallback(lambda operator, *args, **kwargs: dispatch(operator, args, kwargs), dispatch_key="PrivateUse1")
    below_autocast.fallback(torch.library.fallthrough_kernel, dispatch_key="AutocastPrivateUse1")
    aten, npu = torch.library.Library("aten", "IMPL"), torch.library.Library("npu", "DEF")
    attention = torch.ops.aten.scaled_dot_product_attention.default
    aten.impl(attention, _whole(attention), dispatch_key="AutogradPrivateUse1")
    for operator in (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default, attention):
        aten.impl(operator, _casting(operator), dispatch_key="AutocastPrivateUse1")
    for schema in OPERATORS:
        npu.define(schema)
    return [everything, below_autocast, aten, npu]


def _whole(operator):
    """Keep an operator from being taken apart before the NPU sees it."""

    def kernel(*args, **kwargs):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args, **kwargs)

    return kernel


def _casting(operator):
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args, **kwargs):
        dtype = torch.get_autocast_dtype("npu")
        with torch._C._ExcludeDispatchKeyGuard(key):
            cast = lambda value: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            return operator(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel
