"""Crops to features on a device: batches, copies, captured graphs, lack of memory.

In: crops, uint8 [N, H, W, 3], on the host. Out: their features as NumPy arrays by name, a row for each crop.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from typing import Any

import inference
import numpy as np
import torch
from inference import Device, DeviceLost, LoadedModel, UsageError, device_features, log


class Encoder:
    """Runs a model over batches of crops and brings the wanted features to the host without waiting for them.

    names: what feature_of takes. execution "graph" captures the forward pass once and replays it, which saves launching its
    operators one by one; every batch is then padded to `batch_size`, so that one capture serves all. What cannot be captured
    runs as "eager", which is said; UsageError where a failed capture leaves a torch_npu that is of no use. Out of memory
    halves `batch_size` and goes on. With each batch goes a number that the device must raise by one, on the way that the batch
    takes: DeviceLost where it did not, so that no garbage is returned.
    """

    def __init__(self, model: LoadedModel, names: Sequence[str], batch_size: int, execution: str = "eager") -> None:
        if execution == "graph" and model.device.kind == "cpu":
            raise UsageError("--execution graph: the CPU has no graphs to capture; use it with cuda or npu")
        inference.check_features(model, names)
        self.model = model
        self.names = tuple(names)
        self.batch_size = batch_size
        self.execution = execution
        self.fallback: str | None = None
        self._backend = torch.get_device_module(model.device.torch_device)
        self._graph: _Graph | None = None
        self._pins = can_pin_memory(model.device)
        self._copies = self._backend.Stream() if self._pins else None
        self._submitted = 0

    def run(self, crops: torch.Tensor) -> dict[str, torch.Tensor]:
        """Queue at most `batch_size` crops of the device; the results stay there, until the next call in graph mode."""
        if self.execution == "graph" and (self._graph is None or self._graph.batch_size != self.batch_size):
            self._graph = None  # the old capture holds memory that the new one may need
            if reason := why_no_graph(self.model):
                self._fall_back(reason)
            else:
                self._capture(crops)
        return self._graph.replay(crops) if self._graph else device_features(self.model, crops, self.names)

    def _capture(self, crops: torch.Tensor) -> None:
        graph = _Graph(self, crops)  # which runs it eagerly first: lack of memory is met here, and costs nothing
        try:
            graph.capture(self)
            self._graph = graph
        except Exception as error:
            inference.raise_if_lost(error)
            if leaves_no_allocator(self.model.device):
                told = f"the forward pass cannot be captured as a graph ({inference.first_line(error)})"
                raise UsageError(
                    f"{told}, and this torch_npu is of no use after it: run again with --execution eager"
                ) from error
            if inference.is_out_of_memory(error):
                raise
            self._fall_back(inference.first_line(error))

    def _fall_back(self, reason: str) -> None:
        self.execution, self.fallback = "eager", reason
        log.warning(f"The forward pass cannot be captured as a graph ({reason}): going on with eager execution")

    def submit(self, crops: torch.Tensor) -> Callable[[], dict[str, np.ndarray]]:
        """Queue any number of crops uint8 [N, H, W, 3] from the host. Returns a function that waits for their features."""
        pending = [self._retrying(lambda: self._queue(crops), len(crops))]

        def fetch() -> dict[str, np.ndarray]:
            # A device may report late that memory ran out: then all of it is queued again.
            chunks, proof, expected, event, _inputs = pending.pop() if pending else self._queue(crops)
            event.synchronize()
            if proof.item() != expected:
                inference.let_it_tell(self.model.device)
                raise DeviceLost(inference.what_lost_means())
            return {name: np.concatenate([inference.to_numpy(chunk[name]) for chunk in chunks]) for name in chunks[0]}

        return lambda: self._retrying(fetch, len(crops))

    def _queue(self, crops: torch.Tensor) -> tuple:
        """Features on their way to the host, a number that proves them and what it must be, the event that tells when they are
        there, and what must live until then."""
        inputs, chunks = [], []
        for chunk in crops.split(self.batch_size):
            inputs.append(self._to_device(chunk))
            chunks.append({name: self._to_host(value) for name, value in self.run(inputs[-1]).items()})
        self._submitted = (self._submitted + 1) % 1_000_000
        inputs.append(self._to_device(torch.tensor([float(self._submitted)])))
        proof = self._to_host(inputs[-1] + 1)
        event = self._backend.Event()
        event.record()
        return chunks, proof, self._submitted + 1, event, inputs

    def _to_device(self, crops: torch.Tensor) -> torch.Tensor:
        device = self.model.device.torch_device
        if self._copies is None:
            return crops.to(device)
        with self._backend.stream(self._copies):  # copies while the batch before it computes
            there = pinned(crops.shape, crops.dtype).copy_(crops).to(device, non_blocking=True)
        self._backend.current_stream().wait_stream(self._copies)
        return there

    def _to_host(self, value: torch.Tensor) -> torch.Tensor:
        if not self._pins:
            return value.cpu()
        return pinned(value.shape, value.dtype).copy_(value, non_blocking=True)

    def _retrying(self, attempt: Callable[[], Any], count: int) -> Any:
        while True:
            try:
                return attempt()
            except UsageError:
                raise  # as a capture that failed, be it for lack of memory
            except Exception as error:
                inference.raise_if_lost(error)
                if not inference.is_out_of_memory(error):
                    raise
            self._graph = None  # only here has the error let go of what the attempt allocated
            self.batch_size = inference.halved(min(self.batch_size, count), self.model.device)

    def release(self) -> None:
        """Give back the memory of a captured graph, and what the allocator holds in reserve."""
        self._graph = None
        if self.model.device.kind != "cpu":
            self._backend.empty_cache()


class _Graph:
    """A captured forward pass: torch.cuda.CUDAGraph or its twin torch.npu.NPUGraph."""

    def __init__(self, encoder: Encoder, crops: torch.Tensor) -> None:
        device = encoder.model.device.torch_device
        backend = torch.get_device_module(device)
        self.batch_size = encoder.batch_size
        self.crops = torch.zeros(self.batch_size, *crops.shape[1:], dtype=torch.uint8, device=device)
        stream = backend.Stream()
        stream.wait_stream(backend.current_stream())
        with backend.stream(stream):
            for _ in range(3):  # libraries choose kernels and allocate workspaces at first use, which cannot be captured
                device_features(encoder.model, self.crops, encoder.names)
        backend.current_stream().wait_stream(stream)

    def capture(self, encoder: Encoder) -> None:
        device = encoder.model.device.torch_device
        backend = torch.get_device_module(device)
        self.graph = backend.NPUGraph() if device.type == "npu" else backend.CUDAGraph()
        # "thread_local": other threads may go on meanwhile. A capture that fails leaves its own stream current: entering the
        # present one anew brings it back.
        with backend.stream(backend.current_stream()), backend.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = device_features(encoder.model, self.crops, encoder.names)

    def replay(self, crops: torch.Tensor) -> dict[str, torch.Tensor]:
        self.crops[: len(crops)].copy_(crops, non_blocking=True)
        self.graph.replay()
        return {name: value[: len(crops)] for name, value in self.outputs.items()}


def why_no_graph(model: LoadedModel) -> str | None:
    """Why a forward pass is known not to be capturable, so that it need not be tried."""
    if model.device.kind != "npu":
        return None
    if os.environ.get("TASK_QUEUE_ENABLE") == "2":
        return "TASK_QUEUE_ENABLE=2 excludes graph capture; unset it"
    if leaves_no_allocator(model.device) and not {"folded_patches", "fused_attention"} <= set(model.levers):
        return "before torch_npu 2.13 it is tried with folded_patches and fused_attention alone"
    return None


def leaves_no_allocator(device: Device) -> bool:
    """Whether a capture that fails cripples the allocator for good: seen with torch_npu 2.9.0 and 2.9.0.post2, not 2.13.0."""
    return device.kind == "npu" and tuple(map(int, importlib.metadata.version("torch_npu").split(".")[:2])) < (2, 13)


def can_pin_memory(device: Device) -> bool:
    """Whether the host can set memory aside that the device copies from and to by itself."""
    if device.kind == "cpu":
        return False
    try:
        pinned((1,), torch.uint8)
        return True
    except RuntimeError:
        return False


def pinned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory of the host that a device copies from and to by itself.

    Where there is none torch_npu gives memory at address 0, and whoever writes there ends the process.
    """
    there = torch.empty(shape, dtype=dtype, pin_memory=True)
    if there.numel() and not there.data_ptr():
        raise RuntimeError(f"out of memory: the host cannot set {there.nbytes} bytes aside for copies")
    return there
