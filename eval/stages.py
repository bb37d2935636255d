"""Running a model in some arithmetic, whole and block by block: what each block inherits, and what it adds by itself."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference  # first of all: it sets what must precede torch
import numpy as np
from inference import Column, Device, LoadedModel, log, torch

from measures import finite_or_null, is_at_fault, relative_l2, token_errors

STAGE_IMAGES = 2  # every state of every block is kept in memory
PROGRESS_SECONDS = 10.0
STAGE_COLUMNS = (
    Column("Stage", "阶段", "stage"),
    Column("Relative L2", "相对 L2 误差", "relative_l2_error", ".1e"),
    Column("Median token", "词元中位数", "median_token_relative_l2_error", ".1e"),
    Column("p99 token", "词元第 99 百分位", "p99_token_relative_l2_error", ".1e"),
    Column("Own error", "自身误差", "own_relative_l2_error", ".1e"),
    Column("Own, worst token", "自身误差，最差词元", "own_worst_token_relative_l2_error", ".1e"),
    Column("Plain float32's own", "普通 float32 的自身误差", "float32_own_relative_l2_error", ".1e"),
    Column("At fault", "有问题", "fault"),
)


# --- running models ---


@dataclass(frozen=True)
class Arithmetic:
    """A way to compute. `plain`: transformers' own forward pass without levers, `as_left` with the device's own GELU too."""

    name: str
    dtype: str = "float32"
    hf32: tuple[bool, bool] = (False, False)  # in convolutions, in matrix products
    autocast: str | None = None
    plain: bool = False
    as_left: bool = False

    @contextlib.contextmanager
    def active(self, device: Device) -> Iterator[None]:
        """The switches belong to the kind of device, not to the model: set for this one, and back to the run's afterwards."""
        inference.set_float32_precision(device.kind, *self.hf32)
        try:
            with torch.autocast(device.kind, getattr(torch, self.autocast or "bfloat16"), enabled=self.autocast is not None):
                yield
        finally:
            inference.set_float32_precision(device.kind, device.allow_hf32, device.allow_hf32)

    def load(self, args: argparse.Namespace, device: Device) -> LoadedModel:
        levers = {"levers": ()} if self.plain else {}
        return inference.load_as_asked(args, device, dtype=self.dtype, exact_gelu=not self.as_left, **levers)


PLAIN = Arithmetic("float32, plain", plain=True)
GOLDEN = Arithmetic("float64", "float64", plain=True)


def arithmetics(device: Device) -> list[Arithmetic]:
    """What --sweep goes through. Rounded float32 exists on accelerators only."""
    found = [Arithmetic("float32, strict")]
    if device.kind != "cpu":
        library, rounding = {"npu": ("torch_npu", "HF32")}.get(device.kind, ("torch", "TF32"))
        found.append(Arithmetic(f"float32, as {library} leaves it", hf32=(True, False), plain=True, as_left=True))
        found.append(Arithmetic(f"float32, {rounding} allowed", hf32=(True, True)))
    found += [Arithmetic("float16", "float16"), Arithmetic("bfloat16", "bfloat16")]
    return [*found, Arithmetic("bfloat16 autocast", autocast="bfloat16", plain=True)]


def with_progress(what: str, batches: Sequence[Any]) -> Iterator[Any]:
    """The batches, with a line each time ten seconds have passed without one."""
    said = time.perf_counter()
    for number, batch in enumerate(batches, 1):
        if time.perf_counter() - said >= PROGRESS_SECONDS:
            log.info(f"{what}: batch {number} of {len(batches)}")
            said = time.perf_counter()
        yield batch


def outputs_of(
    model: LoadedModel, arithmetic: Arithmetic, crops: torch.Tensor, batch_size: int, what: str
) -> dict[str, np.ndarray]:
    """The four outputs as [N, T, D] arrays in the precision they were computed in (half becomes float32)."""
    hidden, pooler = [], []
    with arithmetic.active(model.device):
        for batch in with_progress(what, crops.split(batch_size)):
            found = inference.forward(model, batch.to(model.device.torch_device))
            hidden.append(_to_numpy(found.hidden))
            pooler += [] if found.pooler is None else [_to_numpy(found.pooler)[:, None]]
    tokens = np.concatenate(hidden)
    mean = tokens[:, 1:].mean(1, keepdims=True, dtype=np.promote_types(tokens.dtype, np.float32))
    named = {"pooler_output": np.concatenate(pooler)} if pooler else {}
    return named | {"last_hidden_state": tokens, "class_token": tokens[:, :1], "mean_patch_token": mean}


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy()


def check_invariance(model: LoadedModel, arithmetic: Arithmetic, crops: torch.Tensor) -> dict[str, Any]:
    """Whether an image's features change when it is alone, and whether a second run gives the same bits."""
    together, again, alone = (
        outputs_of(model, arithmetic, crops, size, "Invariance")["last_hidden_state"] for size in (len(crops), len(crops), 1)
    )
    return {
        "batch_size": len(crops),
        "batch_invariance_relative_l2_error": float(np.max([relative_l2(a, b) for a, b in zip(alone, together, strict=True)])),
        "repeatable_bit_for_bit": bool(np.array_equal(together, again, equal_nan=True)),
        "repeatability_relative_l2_error": float(np.max([relative_l2(a, b) for a, b in zip(again, together, strict=True)])),
    }


# --- stages: what each block inherits, and what it adds ---


@dataclass
class Trace:
    """Per stage: the state [N, T, D] that it leaves, what it adds by itself, and how far the layer's sum is off, [N, T]."""

    states: dict[str, np.ndarray] = field(default_factory=dict)
    own: dict[str, np.ndarray] = field(default_factory=dict)
    sums: dict[str, np.ndarray] = field(default_factory=dict)


class Tracer:
    """Hooks on the parts of transformers' ViT. With `feed`, states by stage, each part gets those in place of its input."""

    def __init__(self, module: torch.nn.Module, feed: dict[str, np.ndarray] | None = None) -> None:
        self.trace, self.feed, self.hooks = Trace(), feed, []
        embeddings, before = module.embeddings, "position embedding"
        self._after(embeddings.patch_embeddings, state="patch embedding", own="patch embedding", replace=True)
        self._after(embeddings, state=before, own=before)
        for number, layer in enumerate(inference.layers_of(module), 1):
            attention, mlp = f"layer {number} attention", f"layer {number} MLP"
            self._before(layer, before)
            self._after(layer.attention, own=attention)
            self._before(layer.layernorm_after, attention, state=attention)
            # transformers 5 has a module for the MLP; in 4 the last linear layer leaves what it adds.
            self._after(layer.mlp if hasattr(layer, "mlp") else layer.output.dense, own=mlp)
            self._after(layer, state=mlp, sums=(before, attention))
            before = mlp
        self._before(module.layernorm, before)
        self._after(module.layernorm, state="final norm", own="final norm")
        if getattr(module, "pooler", None) is not None:
            self._before(module.pooler, "final norm")
            self._after(module.pooler, state="pooler", own="pooler")

    def _fed(self, stage: str, like: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.feed[stage]).to(like.dtype).to(like.device)

    def _before(self, part: torch.nn.Module, stage: str, state: str | None = None) -> None:
        """Feed `part` what `stage` leaves; its own input is the state that `state` leaves."""

        def hook(_part: Any, inputs: tuple) -> tuple | None:
            if state is not None:
                self.trace.states[state] = _to_numpy(inputs[0])
            return None if self.feed is None else (self._fed(stage, inputs[0]), *inputs[1:])

        self.hooks.append(part.register_forward_pre_hook(hook))

    def _after(
        self,
        part: torch.nn.Module,
        state: str | None = None,
        own: str | None = None,
        replace: bool = False,
        sums: tuple[str, str] | None = None,
    ) -> None:
        """Keep the output as a state or as a stage's own work; `sums`: stages whose parts it should add up to."""

        def hook(_part: Any, _inputs: tuple, output: Any) -> torch.Tensor | None:
            tensor = output[0] if isinstance(output, tuple) else output
            found = _to_numpy(tensor).reshape(len(tensor), *(tensor.shape[1:-1] or (1,)), -1)
            if own is not None:
                self.trace.own[own] = found
            if state is not None:
                self.trace.states[state] = found
            if sums is not None and self.feed is not None:
                start, attention = sums
                parts = _to_numpy(self._fed(start, tensor)), self.trace.own[attention], self.trace.own[state]
                self.trace.sums[state] = token_errors(found, sum(map(np.float64, parts)))
            return self._fed(state, tensor) if replace and self.feed is not None else None

        self.hooks.append(part.register_forward_hook(hook))


def trace(model: LoadedModel, arithmetic: Arithmetic, crops: torch.Tensor, feed: dict[str, np.ndarray] | None = None) -> Trace:
    """Run crops through the model and keep what every stage leaves and adds."""
    tracer = Tracer(model.module, feed)
    crops = crops.to(model.device.torch_device)
    try:
        with arithmetic.active(model.device):
            inference.forward(model, crops)
    finally:
        for hook in tracer.hooks:
            hook.remove()
    if "folded_patches" not in model.levers:  # there the patch embedding takes raw pixels
        wide = torch.promote_types(model.dtype, torch.float32)
        pixels = _to_numpy(inference.normalize(crops, model.preprocess, wide))
        tracer.trace.states["pixels"] = tracer.trace.own["pixels"] = pixels.reshape(*pixels.shape[:2], -1)
    return tracer.trace


@dataclass
class Stages:
    """The golden run's states and own work on a few crops, and the own error per token of plain float32 beside them."""

    crops: torch.Tensor
    golden: Trace
    feed: dict[str, np.ndarray]
    fed: Trace
    plain: dict[str, np.ndarray] = field(default_factory=dict)

    def own_errors(self, model: LoadedModel, arithmetic: Arithmetic) -> tuple[dict[str, np.ndarray], Trace]:
        """A model's own error of each stage, [N, T], and its trace."""
        found = trace(model, arithmetic, self.crops, self.feed)
        errors = {name: token_errors(values, self.fed.own[name]) for name, values in found.own.items()}
        return {name: np.maximum(error, found.sums.get(name, 0.0)) for name, error in errors.items()}, found


def prepare_stages(golden: LoadedModel, plain: LoadedModel, crops: torch.Tensor) -> Stages | None:
    """None for a model whose parts are not known (code that came with a checkpoint)."""
    module = golden.module
    if not (inference.layers_of(module) and hasattr(module, "embeddings") and hasattr(module, "layernorm")):
        return None
    log.info("Running every block of float64 on its own input ...")
    crops = crops[:STAGE_IMAGES]
    whole = trace(golden, GOLDEN, crops)
    feed = {name: values.astype(np.float32) for name, values in whole.states.items()}
    stages = Stages(crops, whole, feed, trace(golden, GOLDEN, crops, feed))
    stages.plain = stages.own_errors(plain, PLAIN)[0]
    return stages


def measure_stages(stages: Stages | None, model: LoadedModel, arithmetic: Arithmetic) -> list[dict[str, Any]]:
    """Inherited and own error of each stage, in the order of the forward pass."""
    if stages is None:
        return []
    found, (own, _) = trace(model, arithmetic, stages.crops), stages.own_errors(model, arithmetic)
    rows = []
    for name in dict.fromkeys(("pixels", *stages.golden.states)):
        if name not in found.states:
            continue
        truth, value = stages.golden.states[name], found.states[name]
        tokens, plain = token_errors(value, truth), stages.plain[name]
        finite = bool(np.isfinite(tokens).all())
        row = {
            "stage": name,
            "relative_l2_error": relative_l2(value, truth),
            "median_token_relative_l2_error": float(np.median(tokens)),
            "p99_token_relative_l2_error": float(np.percentile(tokens, 99)) if finite else math.inf,
            "own_relative_l2_error": float(np.median(own[name])),
            "own_worst_token_relative_l2_error": float(np.max(own[name])),
            "float32_own_relative_l2_error": float(np.median(plain)),
            "at_fault": is_at_fault(own[name], plain),
        }
        rows.append(finite_or_null(row))
    return rows


def stage_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row | {"fault": "yes" if row["at_fault"] else "no"} for row in result.get("stages") or []]
