"""Running a model in some arithmetic, whole and block by block: what each block inherits, and what it adds by itself."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference  # first of all: it sets what must precede torch
import numpy as np
import torch
from inference import Device, LoadedModel, log

from bulk import levers
from common import Column
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
    Column("At fault", "有问题", "at_fault"),
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
    extra: tuple[str, ...] = ()  # levers beside those that are on

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
        changes = {"dtype": self.dtype, "exact_gelu": not self.as_left}
        if self.plain:
            return inference.load_as_asked(args, device, **changes)
        more = argparse.Namespace(**vars(args) | {"with_levers": [*args.with_levers, *self.extra]})
        return levers.load_as_asked(more, device, **changes)


PLAIN = Arithmetic("float32, plain", plain=True)
GOLDEN = Arithmetic("float64", "float64", plain=True)


def arithmetics(device: Device) -> list[Arithmetic]:
    """What --sweep goes through. Rounded float32 exists on accelerators only."""
    found = [Arithmetic("float32, strict")]
    if device.kind != "cpu":
        library, rounding = ("torch_npu", "HF32") if device.kind == "npu" else ("torch", "TF32")
        found.append(Arithmetic(f"float32, as {library} leaves it", hf32=(True, False), plain=True, as_left=True))
        found.append(Arithmetic(f"float32, {rounding} allowed", hf32=(True, True)))
    found += [Arithmetic("float16", "float16"), Arithmetic("bfloat16", "bfloat16")]
    found.append(Arithmetic("bfloat16 autocast", autocast="bfloat16", plain=True))
    if device.kind != "cpu":
        found.append(Arithmetic("float32, fused norms", extra=("fused_norms",)))
        found.append(Arithmetic("float16, fused norms", "float16", extra=("fused_norms",)))
    if device.kind == "npu":
        found.append(Arithmetic("float16, fused MLP", "float16", extra=("fused_mlp",)))
    return found


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
            hidden.append(inference.to_numpy(found.hidden))
            pooler += [] if found.pooler is None else [inference.to_numpy(found.pooler)[:, None]]
    tokens = np.concatenate(hidden)
    mean = tokens[:, 1:].mean(1, keepdims=True, dtype=np.promote_types(tokens.dtype, np.float32))
    named = {"pooler_output": np.concatenate(pooler)} if pooler else {}
    return named | {"last_hidden_state": tokens, "class_token": tokens[:, :1], "mean_patch_token": mean}


def check_invariance(model: LoadedModel, arithmetic: Arithmetic, crops: torch.Tensor) -> dict[str, Any]:
    """Whether an image's features change when it is alone, and whether a second run gives the same bits."""
    together, again, alone = (
        outputs_of(model, arithmetic, crops, size, "Invariance")["last_hidden_state"] for size in (len(crops), len(crops), 1)
    )
    return {
        "batch_size": len(crops),
        "batch_invariance_relative_l2_error": float(np.max([relative_l2(a, b) for a, b in zip(alone, together, strict=True)])),
        "repeatable_bit_for_bit": bool(np.array_equal(together, again, equal_nan=True)),
    }


# --- stages: what each block inherits, and what it adds ---


def trace(
    model: LoadedModel, arithmetic: Arithmetic, crops: torch.Tensor, feed: dict[str, np.ndarray] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The state [N, T, D] that each stage leaves, and what the next part is given: the same, or that of `feed`."""
    states, given = {}, {}

    def watch(stage: str, found: torch.Tensor) -> torch.Tensor:
        fed = found if feed is None else torch.from_numpy(feed[stage]).to(found)
        states[stage], given[stage] = inference.to_numpy(found), inference.to_numpy(fed)
        return fed

    crops = crops.to(model.device.torch_device)
    with arithmetic.active(model.device):
        outputs = (model.lean or levers.Lean(model, ())).forward(model, crops, (), watch)
    if outputs.pooler is not None:
        states["pooler"] = inference.to_numpy(outputs.pooler)[:, None]
    if "folded_patches" not in model.levers:  # there the patch embedding takes raw pixels
        wide = torch.promote_types(model.dtype, torch.float32)
        pixels = inference.to_numpy(inference.normalize(crops, model.preprocess, wide))
        states["pixels"] = pixels.reshape(*pixels.shape[:2], -1)
    return states, given


def added(states: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each half of a layer adds to what it was given; of other stages, what they leave."""
    gains, start = dict(states), given["position embedding"]
    for stage, state in states.items():
        if stage.startswith("layer"):
            gains[stage] = state.astype(np.float64) - start
            start = given[stage]
    return gains


@dataclass
class Stages:
    """On a few crops, the golden run's states, what each stage adds to them, and plain float32's own error per token."""

    crops: torch.Tensor
    golden: dict[str, np.ndarray]
    feed: dict[str, np.ndarray]
    gains: dict[str, np.ndarray]
    plain: dict[str, np.ndarray]

    def own_errors(self, model: LoadedModel, arithmetic: Arithmetic) -> dict[str, np.ndarray]:
        """A model's own error of each stage, [N, T]."""
        gains = added(*trace(model, arithmetic, self.crops, self.feed))
        return {name: token_errors(values, self.gains[name]) for name, values in gains.items()}


def prepare_stages(golden: LoadedModel, plain: LoadedModel, crops: torch.Tensor) -> Stages | None:
    """None for a model whose parts are not known (code that came with a checkpoint)."""
    if not inference.layers_of(golden.module):
        return None
    log.info("Running every block of float64 on its own input ...")
    crops = crops[:STAGE_IMAGES]
    states, _ = trace(golden, GOLDEN, crops)
    feed = {name: values.astype(np.float32) for name, values in states.items()}
    stages = Stages(crops, states, feed, added(*trace(golden, GOLDEN, crops, feed)), {})
    stages.plain = stages.own_errors(plain, PLAIN)
    return stages


def measure_stages(stages: Stages | None, model: LoadedModel, arithmetic: Arithmetic) -> list[dict[str, Any]]:
    """Inherited and own error of each stage, in the order of the forward pass."""
    if stages is None:
        return []
    found, own = trace(model, arithmetic, stages.crops)[0], stages.own_errors(model, arithmetic)
    rows = []
    for name in (name for name in dict.fromkeys(("pixels", *stages.golden)) if name in found):
        truth, value = stages.golden[name], found[name]
        tokens, plain = token_errors(value, truth), stages.plain[name]
        row = {
            "stage": name,
            "relative_l2_error": relative_l2(value, truth),
            "median_token_relative_l2_error": float(np.median(tokens)),
            "p99_token_relative_l2_error": float(np.percentile(tokens, 99)) if np.isfinite(tokens).all() else math.inf,
            "own_relative_l2_error": float(np.median(own[name])),
            "own_worst_token_relative_l2_error": float(np.max(own[name])),
            "float32_own_relative_l2_error": float(np.median(plain)),
            "at_fault": is_at_fault(own[name], plain),
        }
        rows.append(finite_or_null(row))
    return rows
