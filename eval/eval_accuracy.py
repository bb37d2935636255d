"""Is the device right, by how much, and where does it go wrong?

    python eval/eval_accuracy.py --device npu
    python eval/eval_accuracy.py --device npu --sweep
    python eval/eval_accuracy.py --device cuda --model_path weights/my-copy --image_path photos/

The same weights and the same decoded crops go through a reference (float32), through the device, and through a golden run
(float64 on the CPU). All errors are computed in float64. PASS needs every output, and the worst single token, within the
bars; "faithful" is the bar for float32 itself, a relative L2 error of 1e-5. Writes results/accuracy_eval.json and
logs/accuracy_eval.log (accuracy_eval_cuda.* and so on for devices other than an NPU).

Exit codes: 0 PASS; 1 FAIL; 2 wrong usage or unusable input; 3 BLOCKED: the device cannot be used.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference  # first of all: it sets what must precede torch
import numpy as np
import torch
from inference import Device, LoadedModel, UsageError, log
from PIL import Image, ImageOps

OUTPUTS = ("pooler_output", "last_hidden_state", "class_token", "mean_patch_token")
LABELS = dict(zip(OUTPUTS, ("Pooler", "Hidden", "Class token", "Mean patch token"), strict=True))
BARS = {"mre_pass": "filtered MRE", "cosine_pass": "cosine", "l2_pass": "relative L2", "worst_token_pass": "worst token"}
FAITHFUL = 1e-5  # float32 rounds at 6e-8; through 24 layers true float32 stays under 1e-5, HF32 and TF32 do not
FILTER = 0.1
NOISE_FLOOR = 2e-6  # relative L2 error that float32 itself leaves behind
JUMP = 3.0
FORMULAS = {
    "a, b": "device and reference, elementwise, in float64",
    "relative_error": "|a - b| / |b|; elements with b = 0 are left out",
    "filtered_mean_relative_error": f"mean of relative_error over elements with |b| >= {FILTER} * RMS of that output of that image",
    "relative_l2_error": "||a - b|| / ||b|| over all elements",
    "cosine_similarity": "<a, b> / (||a|| ||b||) over all elements",
    "worst_token": "largest relative_l2_error of a single token of any image",
    "worst_image": "largest relative_l2_error of an image",
    "p99_token": "99th percentile of relative_l2_error over the tokens of all images",
    "starts_at": f"first stage whose error is above {NOISE_FLOOR} and {JUMP} times that of the stage before it",
}


# --- errors: pure functions of arrays ---


@dataclass(frozen=True)
class Errors:
    """Sums from which every metric follows, so that images are compared one at a time and added up."""

    squared_difference: float = 0.0
    squared_reference: float = 0.0
    squared_value: float = 0.0
    product: float = 0.0
    absolute: float = 0.0
    max_absolute: float = 0.0
    count: int = 0
    relative: float = 0.0
    max_relative: float = 0.0
    relative_count: int = 0
    filtered: float = 0.0
    filtered_count: int = 0
    nan_count: int = 0
    inf_count: int = 0
    tokens: tuple[float, ...] = ()
    images: tuple[float, ...] = ()

    def __add__(self, other: Errors) -> Errors:
        maxima = {
            name: float(np.maximum(getattr(self, name), getattr(other, name))) for name in ("max_absolute", "max_relative")
        }
        sums = {item.name: getattr(self, item.name) + getattr(other, item.name) for item in dataclasses.fields(self)}
        return Errors(**(sums | maxima))

    @property
    def relative_l2(self) -> float:
        return _ratio(math.sqrt(self.squared_difference), math.sqrt(self.squared_reference))

    @property
    def cosine(self) -> float:
        cosine = _ratio(self.product, math.sqrt(self.squared_value * self.squared_reference))
        return min(max(cosine, -1.0), 1.0) if math.isfinite(cosine) else cosine


def _ratio(numerator: float, denominator: float) -> float:
    """0/0 is 0: nothing differs from nothing. x/0 is infinite."""
    if denominator == 0.0:
        return 0.0 if numerator == 0.0 else math.inf
    return numerator / denominator


def compare(value: np.ndarray, reference: np.ndarray) -> Errors:
    """Errors of one image's output [T, D] (or [D]) against the reference's, in float64."""
    value = np.atleast_2d(np.asarray(value, np.float64))
    reference = np.atleast_2d(np.asarray(reference, np.float64))
    difference, size = np.abs(value - reference), np.abs(reference)
    defined = size > 0
    relative = difference[defined] / size[defined]
    significant = relative[size[defined] >= FILTER * math.sqrt((size**2).mean())]
    whole = _ratio(float(np.linalg.norm(difference)), float(np.linalg.norm(reference)))
    tokens = zip(np.linalg.norm(difference, axis=-1), np.linalg.norm(reference, axis=-1), strict=True)
    return Errors(
        squared_difference=float((difference**2).sum()),
        squared_reference=float((reference**2).sum()),
        squared_value=float((value**2).sum()),
        product=float((value * reference).sum()),
        absolute=float(difference.sum()),
        max_absolute=float(difference.max()),
        count=difference.size,
        relative=float(relative.sum()),
        max_relative=float(relative.max(initial=0.0)),
        relative_count=relative.size,
        filtered=float(significant.sum()),
        filtered_count=significant.size,
        nan_count=int(np.isnan(value).sum()),
        inf_count=int(np.isinf(value).sum()),
        tokens=tuple(_ratio(float(error), float(norm)) for error, norm in tokens),
        images=(whole,),
    )


def metrics(errors: Errors, threshold_percent: float, cosine_threshold: float) -> dict[str, Any]:
    """The published keys, then the ones that cannot be chosen to look well. NaN and infinity become null."""
    filtered = _ratio(errors.filtered, errors.filtered_count)
    worst_token, worst_image = float(np.max(errors.tokens)), float(np.max(errors.images))
    bar = threshold_percent / 100
    result = {
        "relative_error": {
            "max_relative_error": errors.max_relative,
            "mean_relative_error": _ratio(errors.relative, errors.relative_count),
            "filtered_mean_relative_error": filtered,
            "max_absolute_error": errors.max_absolute,
            "mean_absolute_error": _ratio(errors.absolute, errors.count),
        },
        "cosine_similarity": errors.cosine,
        "mre_pass": filtered < bar,
        "cosine_pass": errors.cosine > cosine_threshold,
        "relative_l2_error": errors.relative_l2,
        "relative_l2_error_percent": 100 * errors.relative_l2,
        "l2_pass": errors.relative_l2 < bar,
        "worst_token_relative_l2_error": worst_token,
        "worst_token_pass": worst_token < bar,
        "worst_image_relative_l2_error": worst_image,
        "p99_token_relative_l2_error": float(np.percentile(errors.tokens, 99)) if math.isfinite(worst_token) else math.inf,
        "nan_count": errors.nan_count,
        "inf_count": errors.inf_count,
    }
    return _finite_or_null(result)


def passes(result: dict[str, Any]) -> bool:
    return all(result[key] for key in BARS)


def missed_bars(judged: dict[str, Any]) -> list[str]:
    """The bars that are missed, as "output: bar"."""
    names = [name for name in OUTPUTS if name in judged and judged[name]["counts"]]
    return [f"{LABELS[name]}: {bar}" for name in names for key, bar in BARS.items() if not judged[name][key]]


def first_jump(stages: Sequence[tuple[str, float]]) -> str | None:
    """Name of the first stage whose error is not numbers, or is above the noise and a multiple of the stage before it."""
    before = 0.0
    for name, error in stages:
        if not math.isfinite(error) or (error > NOISE_FLOOR and error > JUMP * before):
            return name
        before = error
    return None


def neighbour_agreement(value: np.ndarray, reference: np.ndarray, count: int = 3) -> tuple[float, float]:
    """How often the nearest, and the `count` nearest, rows of [N, D] are the same rows for both, in percent.

    Nearest by cosine after the mean over all rows is taken away: the rows of one model have much in common.
    """

    def nearest(features: np.ndarray) -> np.ndarray:
        centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
        unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-300)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -np.inf)
        return np.argsort(-similarity, axis=1, kind="stable")[:, :count]

    ours, theirs = nearest(value), nearest(reference)
    shared = [len(set(a) & set(b)) / count for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    return 100 * float((ours[:, 0] == theirs[:, 0]).mean()), 100 * float(np.mean(shared))


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- running models ---


@dataclass(frozen=True)
class Arithmetic:
    """A way to compute: dtype of the model, whether float32 may be rounded, and the dtype of autocast, if any."""

    name: str
    dtype: str
    allow_hf32: bool = False
    autocast: torch.dtype | None = None

    @contextlib.contextmanager
    def active(self, device: Device) -> Iterator[None]:
        """The switches belong to the kind of device, not to the model: set for this one, and back to strict afterwards."""
        inference.set_float32_precision(device.kind, self.allow_hf32)
        try:
            with torch.autocast(device.kind, self.autocast, enabled=self.autocast is not None):
                yield
        finally:
            inference.set_float32_precision(device.kind, False)


STRICT = Arithmetic("float32", "float32")


@torch.inference_mode()
def outputs(model: LoadedModel, arithmetic: Arithmetic, crops: torch.Tensor) -> dict[str, np.ndarray]:
    """The four outputs as [N, T, D] arrays in the precision they were computed in (half becomes float32)."""
    with arithmetic.active(model.device):
        hidden, pooler = inference.forward(model, crops.to(model.device.torch_device))
    hidden = _to_numpy(hidden)
    found = {
        "last_hidden_state": hidden,
        "class_token": hidden[:, :1],
        "mean_patch_token": hidden[:, 1:].mean(1, keepdims=True, dtype=np.promote_types(hidden.dtype, np.float32)),
    }
    return ({"pooler_output": _to_numpy(pooler)[:, None]} if pooler is not None else {}) | found


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy()


@torch.inference_mode()
def stage_outputs(model: LoadedModel, arithmetic: Arithmetic, crops: torch.Tensor) -> dict[str, np.ndarray]:
    """What the model has computed after each stage, [N, ...]: normalised pixels, patch embedding, every layer, final norm."""
    crops = crops.to(model.device.torch_device)
    found = {"pixels": _to_numpy(inference.normalize(crops, model.preprocess))}
    layers = [part for part in model.module.modules() if type(part).__name__ == "ViTLayer"]
    watched = {"patch embedding": model.module.embeddings.patch_embeddings}
    watched |= {f"layer {number}": layer for number, layer in enumerate(layers)}
    watched["final norm"] = model.module.layernorm

    def keep(name: str):
        return lambda _module, _inputs, output: found.__setitem__(
            name, _to_numpy(output[0] if isinstance(output, tuple) else output)
        )

    hooks = [part.register_forward_hook(keep(name)) for name, part in watched.items()]
    try:
        with arithmetic.active(model.device):
            inference.forward(model, crops)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def golden_model(args: argparse.Namespace, device: Device) -> LoadedModel:
    """The model in float64 on the CPU: the truth that both reference and device are measured against."""
    model = inference.load_model(
        device, args.model_path, "float32", args.image_size, args.random_weights, args.trust_remote_code
    )
    return dataclasses.replace(model, module=model.module.double(), dtype=torch.float64)


@dataclass
class Comparison:
    """Errors of one arithmetic on the device against the reference, and of both against the golden run."""

    outputs: dict[str, Errors] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    golden: dict[str, dict[str, Errors]] = field(default_factory=lambda: {"reference": {}, "device": {}})
    stages: dict[str, Errors] = field(default_factory=dict)


def run_comparison(
    batches: Sequence[tuple[list[str], torch.Tensor]],
    reference: LoadedModel,
    device_model: LoadedModel,
    arithmetic: Arithmetic,
    golden: LoadedModel | None,
) -> Comparison:
    """Send every batch (names and uint8 crops) through the models and gather the errors."""
    result = Comparison()
    for names, crops in batches:
        expected, found = outputs(reference, STRICT, crops), outputs(device_model, arithmetic, crops)
        truth = outputs(golden, STRICT, crops) if golden is not None else None
        for row, name in enumerate(names):
            one_image = {output: compare(found[output][row], expected[output][row]) for output in found}
            _add(result.outputs, one_image)
            result.images.append({"image": name, **{output: errors.relative_l2 for output, errors in one_image.items()}})
            if truth is not None:
                for who, values in (("reference", expected), ("device", found)):
                    _add(result.golden[who], {output: compare(values[output][row], truth[output][row]) for output in found})
        theirs, ours = stage_outputs(reference, STRICT, crops), stage_outputs(device_model, arithmetic, crops)
        flat = {name: (ours[name].reshape(len(names), -1), theirs[name].reshape(len(names), -1)) for name in theirs}
        for row in range(len(names)):
            _add(result.stages, {name: compare(a[row], b[row]) for name, (a, b) in flat.items()})
    return result


def _add(totals: dict[str, Errors], errors: dict[str, Errors]) -> None:
    for name, value in errors.items():
        totals[name] = totals[name] + value if name in totals else value


def check_invariance(model: LoadedModel, arithmetic: Arithmetic, crops: torch.Tensor) -> dict[str, Any]:
    """Whether an image's features change when it is alone, and whether a second run gives the same bits."""
    together = outputs(model, arithmetic, crops)["last_hidden_state"]
    again = outputs(model, arithmetic, crops)["last_hidden_state"]
    alone = np.concatenate([outputs(model, arithmetic, crop[None])["last_hidden_state"] for crop in crops])
    errors = [compare(a, b).relative_l2 for a, b in zip(alone, together, strict=True)]
    return {
        "batch_size": len(crops),
        "batch_invariance_relative_l2_error": max(errors),
        "repeatable_bit_for_bit": bool(np.array_equal(together, again, equal_nan=True)),
        "repeatability_relative_l2_error": max(compare(a, b).relative_l2 for a, b in zip(again, together, strict=True)),
    }


def views(image: Image.Image, preprocess: inference.Preprocess) -> list[np.ndarray]:
    """Four views of a photo as uint8 crops: as it is, mirrored, and its upper left and lower right three quarters."""
    width, height = image.size
    upper_left = image.crop((0, 0, max(1, width * 3 // 4), max(1, height * 3 // 4)))
    lower_right = image.crop((width // 4, height // 4, width, height))
    return [inference.crop_uint8(view, preprocess) for view in (image, ImageOps.mirror(image), upper_left, lower_right)]


def check_neighbours(
    images: Sequence[Image.Image], reference: LoadedModel, device_model: LoadedModel, arithmetic: Arithmetic, batch_size: int
) -> dict[str, Any]:
    """Whether each view of the photos finds the same neighbours among all views on the device as on the reference."""
    crops = torch.from_numpy(np.stack([view for image in images for view in views(image, reference.preprocess)]))
    result: dict[str, Any] = {"views": len(crops)}
    ours, theirs = (
        [outputs(model, way, chunk) for chunk in crops.split(batch_size)]
        for model, way in ((device_model, arithmetic), (reference, STRICT))
    )
    for name in ("class_token", "mean_patch_token"):
        pair = [np.concatenate([chunk[name][:, 0] for chunk in chunks]) for chunks in (ours, theirs)]
        nearest, nearest_three = neighbour_agreement(*pair)
        result[name] = {"same_nearest_percent": nearest, "same_three_nearest_percent": nearest_three}
    return result


# --- the evaluation ---


def judge(comparison: Comparison, args: argparse.Namespace, pooler: str) -> dict[str, Any]:
    """Metrics of every output and the verdicts. An untrained pooler is reported, but decides nothing."""
    result: dict[str, Any] = {}
    for name in OUTPUTS:
        if name in comparison.outputs:
            result[name] = metrics(comparison.outputs[name], args.threshold_percent, args.cosine_threshold)
            result[name]["counts"] = name != "pooler_output" or pooler == "trained"
    counted = [values for values in result.values() if values["counts"]]
    errors = [values["relative_l2_error"] for values in counted]
    faithful = all(error is not None and error <= FAITHFUL for error in errors)
    clean = not any(values["nan_count"] or values["inf_count"] for values in result.values())
    return result | {
        "overall": "PASS" if clean and all(passes(values) for values in counted) else "FAIL",
        "misses": missed_bars(result),
        "faithful": clean and faithful,
    }


def arithmetics(device: Device) -> list[Arithmetic]:
    """What --sweep goes through. Rounded float32 exists on accelerators only."""
    found = [STRICT]
    if device.kind != "cpu":
        found.append(
            Arithmetic("float32, HF32 allowed" if device.kind == "npu" else "float32, TF32 allowed", "float32", allow_hf32=True)
        )
    found += [Arithmetic("float16", "float16"), Arithmetic("bfloat16", "bfloat16")]
    return [*found, Arithmetic("bfloat16 autocast", "float32", autocast=torch.bfloat16)]


def sweep(
    args: argparse.Namespace, device: Device, batches: Sequence[tuple[list[str], torch.Tensor]], reference: LoadedModel
) -> list[dict[str, Any]]:
    """Error, verdict and throughput of each arithmetic that the device has."""
    rows = []
    for arithmetic in arithmetics(device):
        log.info("Sweep: %s ...", arithmetic.name)
        row: dict[str, Any] = {"arithmetic": arithmetic.name, "dtype": arithmetic.dtype, "allow_hf32": arithmetic.allow_hf32}
        try:
            model = load(args, device, arithmetic.dtype)
            comparison = run_comparison(batches, reference, model, arithmetic, None)
            judged = judge(comparison, args, model.pooler)
            hidden = judged["last_hidden_state"]
            row |= {
                "relative_l2_error": hidden["relative_l2_error"],
                "worst_token_relative_l2_error": hidden["worst_token_relative_l2_error"],
                "class_token_relative_l2_error": judged["class_token"]["relative_l2_error"],
                "overall": judged["overall"],
                "misses": judged["misses"],
                "faithful": judged["faithful"],
                "stages": describe_stages(comparison),
                "throughput_img_s": throughput(model, arithmetic, batches[0][1]),
                "batch_size": len(batches[0][1]),
            }
        except RuntimeError as error:  # an operator that the device lacks in this dtype
            row |= {"overall": "not available", "reason": inference.first_line(error)}
        rows.append(_finite_or_null(row))
    return rows


def throughput(model: LoadedModel, arithmetic: Arithmetic, crops: torch.Tensor, runs: int = 3) -> float:
    """Images a second of the median of `runs` synchronised forward passes after one to warm up."""
    crops = crops.to(model.device.torch_device)
    times = []
    with arithmetic.active(model.device):
        for _ in range(runs + 1):
            inference.synchronize(model.device)
            started = time.perf_counter()
            inference.forward(model, crops)
            inference.synchronize(model.device)
            times.append(time.perf_counter() - started)
    return len(crops) / statistics.median(times[1:])


def load(args: argparse.Namespace, device: Device, dtype: str) -> LoadedModel:
    return inference.load_model(device, args.model_path, dtype, args.image_size, args.random_weights, args.trust_remote_code)


def recommend(rows: Sequence[dict[str, Any]]) -> str | None:
    """The fastest arithmetic that keeps the bar."""
    kept = [row for row in rows if row["overall"] == "PASS"]
    return max(kept, key=lambda row: row["throughput_img_s"])["arithmetic"] if kept else None


def evaluate(args: argparse.Namespace, device: Device) -> int:
    """Run the whole evaluation, write log and result, and return the exit code."""
    reference_device = inference.open_device(args.reference)
    images = inference.list_images(args.image_path)
    inference.log_images(images)
    device_model = inference.load_from_args(args, device)
    reference, golden = load(args, reference_device, "float32"), golden_model(args, inference.open_device("cpu"))
    crops, photos = read_images(images, reference.preprocess, args.neighbour_photos)
    names = [Path(key.name).name for key in images]
    batches = [
        (names[first : first + args.batch_size], crops[first : first + args.batch_size])
        for first in range(0, len(names), args.batch_size)
    ]
    arithmetic = Arithmetic(args.dtype, args.dtype, args.allow_hf32)
    log.info("Running %s (reference), %s and golden float64 inference ...", reference_device.kind.upper(), device.kind.upper())
    comparison = run_comparison(batches, reference, device_model, arithmetic, golden)
    del golden
    result: dict[str, Any] = judge(comparison, args, device_model.pooler)
    if args.dtype != "float32":
        result["faithful"] = None
    result |= {
        "golden": describe_golden(comparison),
        "stages": describe_stages(comparison),
        "starts_at": first_jump([(name, errors.relative_l2) for name, errors in comparison.stages.items()]),
        "invariance": check_invariance(device_model, arithmetic, batches[0][1]),
        "neighbours": check_neighbours(photos, reference, device_model, arithmetic, args.batch_size),
        "images": comparison.images,
        "sweep": sweep(args, device, batches, reference) if args.sweep else None,
    }
    result["recommended"] = recommend(result["sweep"]) if args.sweep else None
    log_report(result, args, device, reference_device)
    inference.check_lock(device_model.weights, args.allow_unlocked)
    settings = {
        "device": device.kind,
        "dtype": args.dtype,
        "reference": {"device": reference_device.kind, "device_name": reference_device.name, "dtype": "float32"},
        "image_size": reference.preprocess.image_size,
        "threshold_percent": args.threshold_percent,
        "cosine_threshold": args.cosine_threshold,
        "formulas": FORMULAS,
    }
    inference.write_result("accuracy_eval", args, _finite_or_null(result | settings) | inference.provenance(args, device_model))
    return 0 if result["overall"] == "PASS" else 1


def read_images(
    images: inference.ImageList, preprocess: inference.Preprocess, keep: int
) -> tuple[torch.Tensor, list[Image.Image]]:
    """Crops uint8 [N, H, W, 3] of all images, and the first `keep` photos themselves. Raises UsageError naming a bad one."""
    crops, photos = [], []
    for key in images:
        try:
            photo = inference.decode(inference.read_bytes(key))
        except (inference.BadImage, inference.Unreadable) as error:
            raise UsageError(f"{key.name}: {error}") from error
        crops.append(inference.crop_uint8(photo, preprocess))
        photos += [photo] * (len(photos) < keep)
    return torch.from_numpy(np.stack(crops)), photos


def describe_golden(comparison: Comparison) -> dict[str, Any]:
    """How far reference and device are from the float64 run, and how many times as far the device is."""
    result: dict[str, Any] = {"arithmetic": "float64 on the CPU"}
    for output, reference in comparison.golden["reference"].items():
        device = comparison.golden["device"][output].relative_l2
        ratio = device / reference.relative_l2 if reference.relative_l2 else None
        result[output] = {
            "reference_relative_l2_error": reference.relative_l2,
            "device_relative_l2_error": device,
            "device_to_reference_ratio": ratio,
        }
    return result


def describe_stages(comparison: Comparison) -> list[dict[str, Any]]:
    return [{"stage": name, "relative_l2_error": errors.relative_l2} for name, errors in comparison.stages.items()]


def log_report(result: dict[str, Any], args: argparse.Namespace, device: Device, reference: Device) -> None:
    """The published lines first, then the rest as tables."""
    log.info(
        "=== Accuracy Comparison (%s vs %s)%s ===",
        device.kind.upper(),
        reference.kind.upper(),
        " (random weights)" * args.random_weights,
    )
    log_outputs({name: result[name] for name in OUTPUTS if name in result}, args)
    golden = result["golden"]["last_hidden_state"]
    log.info(
        "Against float64: %s is off by %s, %s by %s (%s times as far)",
        *(reference.kind.upper(), _number(golden["reference_relative_l2_error"], ".2e")),
        *(device.kind.upper(), _number(golden["device_relative_l2_error"], ".2e")),
        _number(golden["device_to_reference_ratio"], ".2f"),
    )
    log.info("%-18s %12s", "After", "rel. L2")
    for row in result["stages"]:
        log.info("%-18s %12s", row["stage"], _number(row["relative_l2_error"], ".2e"))
    log.info("The error starts at: %s", result["starts_at"] or "no stage; it stays in float32's own rounding")
    log_checks(result["invariance"], result["neighbours"])
    if result["sweep"]:
        log_sweep(result)
    if result["faithful"] is not None:
        log.info("Faithful float32 (relative L2 <= %g): %s", FAITHFUL, "yes" if result["faithful"] else "NO")
    if result["misses"]:
        log.info("Over their bars: %s", ", ".join(result["misses"]))
    log.info("Overall: %s", result["overall"])


def log_outputs(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    for name, values in found.items():
        mre = values["relative_error"]["filtered_mean_relative_error"]
        log.info("%s Filtered MRE: %s", LABELS[name], _percent(mre))
        log.info("%s Cosine Similarity: %s", LABELS[name], _number(values["cosine_similarity"], ".9f"))
    for name, values in found.items():
        note = "" if values["counts"] else " (the pooler is not trained: reported, but it does not count)"
        log.info("%s MRE < %g%%: %s%s", LABELS[name], args.threshold_percent, _verdict(values["mre_pass"]), note)
        log.info("%s Cosine > %g: %s%s", LABELS[name], args.cosine_threshold, _verdict(values["cosine_pass"]), note)
    log.info("%-18s %12s %12s %12s %12s %6s", "Output", "rel. L2", "worst token", "p99 token", "max abs", "NaN")
    for name, values in found.items():
        cells = [values[f"{key}relative_l2_error"] for key in ("", "worst_token_", "p99_token_")]
        cells.append(values["relative_error"]["max_absolute_error"])
        log.info("%-18s %12s %12s %12s %12s %6d", LABELS[name], *(_number(cell, ".2e") for cell in cells), values["nan_count"])


def log_checks(invariance: dict[str, Any], neighbours: dict[str, Any]) -> None:
    log.info(
        "Alone against in a batch of %d: %.1e; the same bits twice: %s",
        *(invariance["batch_size"], invariance["batch_invariance_relative_l2_error"]),
        "yes" if invariance["repeatable_bit_for_bit"] else "no",
    )
    for name in ("class_token", "mean_patch_token"):
        agreement = neighbours[name]
        log.info(
            "Nearest neighbours by %s over %d views: %.1f%% the same, of three %.1f%%",
            *(LABELS[name].lower(), neighbours["views"]),
            *(agreement["same_nearest_percent"], agreement["same_three_nearest_percent"]),
        )


def log_sweep(result: dict[str, Any]) -> None:
    log.info("%-24s %12s %12s %10s %8s  %s", "Arithmetic", "rel. L2", "worst token", "img/s", "verdict", "misses")
    for row in result["sweep"]:
        cells = (_number(row.get("relative_l2_error"), ".2e"), _number(row.get("worst_token_relative_l2_error"), ".2e"))
        cells += (_number(row.get("throughput_img_s"), ".2f"), row["overall"], ", ".join(row.get("misses", [])))
        log.info("%-24s %12s %12s %10s %8s  %s", row["arithmetic"], *cells)
    log.info("Fastest within the bar: %s", result["recommended"] or "none")


def _verdict(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.4f}%"


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    group = parser.add_argument_group("comparison")
    samples = str(inference.ROOT / "assets" / "samples")
    group.add_argument(
        "--image_path", nargs="+", default=[samples], metavar="PATH", help="images or folders (default: assets/samples)"
    )
    group.add_argument("--reference", default="cpu", help="device of the float32 reference: cpu, cuda or cuda:N (default: cpu)")
    group.add_argument(
        "--threshold_percent", type=float, default=1.0, metavar="P", help="bar for relative errors in percent (default: 1.0)"
    )
    group.add_argument(
        "--cosine_threshold", type=float, default=0.9999, metavar="C", help="bar for the cosine similarity (default: 0.9999)"
    )
    group.add_argument(
        "--sweep", action="store_true", help="compare all dtypes of the device: which is the fastest within the bar"
    )
    group.add_argument("--batch_size", type=inference.positive_int, default=8, metavar="N", help="images at once (default: 8)")
    group.add_argument(
        "--neighbour_photos",
        type=inference.positive_int,
        default=16,
        metavar="N",
        help="photos in the neighbour check (default: 16)",
    )
    inference.add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return inference.run_script("accuracy_eval", make_parser().parse_args(argv), evaluate)


if __name__ == "__main__":
    sys.exit(main())
