"""What an error is worth: do features still find the same neighbours, and does a linear probe still tell digits apart?

And what --decode fast costs, by the same means.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference  # first of all: it sets what must precede torch
import numpy as np
import torch
from inference import LoadedModel, log
from PIL import Image, ImageOps

from common import FEATURES, Column
from measures import LABELS, relative_l2, token_errors
from stages import PLAIN, Arithmetic, outputs_of

TASK_KEPT = 0.999  # MLPerf's rule: 99.9% of float32's accuracy
VIEWS, DIGITS = 120, 1797
FEWEST = 1100  # digits: with fewer, one that is told otherwise would be more than a thousandth
SECONDS = 120.0  # of float32; what would take longer runs only when asked for
RIDGE = 0.01
WORTH_COLUMNS = (
    Column("Feature", "特征", "label"),
    Column("Views", "视图数", "views"),
    Column("Same nearest (%)", "最近邻一致（%）", "same_nearest_percent", ".1f"),
    Column("Of five nearest (%)", "前五近邻一致（%）", "same_five_nearest_percent", ".1f"),
    Column("Relative L2, centred", "去均值后的相对 L2 误差", "centred_relative_l2_error", ".2e"),
    Column("Digits", "数字图片数", "digits"),
    Column("Digits probe (%)", "数字线性探针（%）", "probe_percent", ".1f"),
    Column("float32's probe (%)", "float32 的探针（%）", "float32_probe_percent", ".1f"),
    Column("Task", "任务精度", "task"),
)

FAST_COLUMNS = (
    Column("Feature", "特征", "label"),
    Column("Photos", "照片数", "photos"),
    Column("Relative L2", "相对 L2 误差", "relative_l2_error", ".2e"),
    Column("Worst photo", "最差照片", "worst_photo_relative_l2_error", ".2e"),
    Column("Views", "视图数", "views"),
    Column("Relative L2, views", "相对 L2 误差，视图", "views_relative_l2_error", ".2e"),
    Column("Same nearest (%)", "最近邻一致（%）", "same_nearest_percent", ".1f"),
)


def neighbour_agreement(value: np.ndarray, reference: np.ndarray, count: int = 5) -> tuple[float, float]:
    """How often the nearest, and the `count` nearest, rows of [N, D] are the same rows for both, in percent.

    Nearest by cosine after the mean over all rows is taken away: the rows of one model have much in common.
    """

    def nearest(features: np.ndarray) -> np.ndarray:
        values = centred(features)
        unit = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-300)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -np.inf)
        return np.argsort(-similarity, axis=1, kind="stable")[:, :count]

    ours, theirs = nearest(value), nearest(reference)
    shared = [len(set(a) & set(b)) / count for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    return 100 * float((ours[:, 0] == theirs[:, 0]).mean()), 100 * float(np.mean(shared))


def centred(features: np.ndarray) -> np.ndarray:
    return features.astype(np.float64) - features.mean(0, dtype=np.float64)


def linear_probe(features: np.ndarray, labels: np.ndarray, folds: int = 5) -> np.ndarray:
    """What a ridge regression to the classes takes each row of [N, D] for, fitted on the other folds: [N]."""
    classes, fold, found = np.unique(labels), np.arange(len(labels)) % folds, np.empty_like(labels)
    for number in range(folds):
        fit, test = features[fold != number].astype(np.float64), features[fold == number].astype(np.float64)
        mean, spread = fit.mean(0), fit.std(0) + 1e-12
        fit, test = (fit - mean) / spread, (test - mean) / spread
        wanted = np.equal.outer(labels[fold != number], classes) - 1 / len(classes)
        weights = np.linalg.solve(fit @ fit.T / fit.shape[1] + RIDGE * np.eye(len(fit)), wanted)
        found[fold == number] = classes[(test @ fit.T / fit.shape[1] @ weights).argmax(1)]
    return found


@dataclass
class Task:
    """Images to use features on, uint8 [N, H, W, 3], the digits' labels, and plain float32's features of both."""

    views: torch.Tensor
    digits: torch.Tensor
    labels: np.ndarray
    note: str  # why there is no probe
    baseline: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def features(self, model: LoadedModel, arithmetic: Arithmetic) -> dict[str, dict[str, np.ndarray]]:
        """Class and mean patch token [N, D] of the views and of the digits."""
        size, found = inference.default_batch_size(model.device.kind), {}
        for what, crops in (("views", self.views), ("digits", self.digits)):
            if len(crops):
                named = outputs_of(model, arithmetic, crops, size, f"{arithmetic.name}, {what}")
                found[what] = {name: named[name][:, 0] for name in FEATURES}
        return found


def make_views(photos: Sequence[Image.Image], count: int, preprocess: inference.Preprocess) -> torch.Tensor:
    """`count` views, uint8 [count, H, W, 3]: each photo at random scales, places and angles, half of them mirrored; seeded."""
    numbers, views = np.random.default_rng(inference.SEED), []
    for number in range(count):
        photo = photos[number % len(photos)]
        share = numbers.uniform(0.3, 0.9)
        width, height = (max(1, round(edge * share)) for edge in photo.size)
        left, top = (int(numbers.integers(edge - part + 1)) for edge, part in zip(photo.size, (width, height), strict=True))
        view = photo.rotate(numbers.uniform(-15, 15), Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
        views.append(inference.crop_uint8(ImageOps.mirror(view) if numbers.random() < 0.5 else view, preprocess))
    return torch.from_numpy(np.stack(views))


def read_digits(count: int, preprocess: inference.Preprocess) -> tuple[torch.Tensor, np.ndarray]:
    """The first `count` of scikit-learn's handwritten digits as crops, and their labels. Raises ImportError without it."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    grey = (images[:count].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    crops = [inference.crop_uint8(Image.fromarray(image), preprocess) for image in grey]
    return torch.from_numpy(np.stack(crops)), labels[:count]


def how_many(args: argparse.Namespace, seconds: float) -> tuple[int, int]:
    """How many views and digits to run: by the flags, or as many as fit the time where an image takes `seconds`."""
    fit = int(SECONDS / max(seconds, 1e-9))
    views = (VIEWS if fit >= VIEWS else 0) if args.views is None else args.views
    digits = (min(fit, DIGITS) if fit >= FEWEST else 0) if args.probe is None else args.probe
    return views, digits


def prepare_task(args: argparse.Namespace, photos: Sequence[Image.Image], plain: LoadedModel, seconds: float) -> Task:
    """The images to use features on, and plain float32's features of them; `seconds` is what it takes for an image."""
    task = Task(torch.empty(0), torch.empty(0), np.empty(0), f"not run; --views {VIEWS} --probe {FEWEST} runs it")
    views, digits = how_many(args, seconds)
    if views:
        task.views = make_views(photos, views, plain.preprocess)
    if digits:
        try:
            task.digits, task.labels = read_digits(digits, plain.preprocess)
        except ImportError:
            task.note = "not run: pip install scikit-learn"
    log.info(f"Running plain float32 on {len(task.views)} views and {len(task.digits)} digits, {seconds:.2g} s each ...")
    task.baseline = task.features(plain, PLAIN)
    return task


def measure_worth(task: Task, model: LoadedModel, arithmetic: Arithmetic) -> dict[str, Any]:
    """What a model's features are worth beside plain float32's. With random weights it is run, and means nothing."""
    found = task.features(model, arithmetic)
    result: dict[str, Any] = {"views": len(task.views), "digits": len(task.digits)}
    for name in FEATURES:
        result[name] = {}
        if "views" in found:
            pair = found["views"][name], task.baseline["views"][name]
            nearest, five = neighbour_agreement(*pair)
            result[name] |= {"same_nearest_percent": nearest, "same_five_nearest_percent": five}
            result[name]["centred_relative_l2_error"] = relative_l2(*map(centred, pair))
        if "digits" in found:
            ours, theirs = (linear_probe(who["digits"][name], task.labels) for who in (found, task.baseline))
            result[name]["probe_percent"] = 100 * float((ours == task.labels).mean())
            result[name]["float32_probe_percent"] = 100 * float((theirs == task.labels).mean())
    if not len(task.digits):
        verdict = task.note
    elif len(task.digits) < FEWEST:
        verdict = "too few digits to say"
    else:
        verdict = verdict_of(result["class_token"], model.weights.source == "random")
    return result | {"task": verdict}


def verdict_of(found: dict[str, Any], is_random: bool) -> str:
    """Whether the probe on the class token, as most users use it, keeps 99.9% of float32's accuracy."""
    verdict = "kept" if found["probe_percent"] >= TASK_KEPT * found["float32_probe_percent"] else "lost"
    return f"{verdict} (random weights: means nothing)" if is_random else verdict


def worth_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each feature."""
    worth = result.get("worth") or {}
    shared = {key: worth.get(key) for key in ("views", "digits")}
    rows = [{"label": LABELS[name], **shared, **worth[name]} for name in FEATURES if worth.get(name)]
    return [rows[0] | {"task": worth["task"]}, *rows[1:]] if rows else []


# --- what --decode fast costs ---


def measure_fast(
    paths: Sequence[str], photos: Sequence[Image.Image], plain: LoadedModel, task: Task, asked: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Plain float32's features of the photos and the task's views, decoded fast, beside those decoded exactly.

    `asked`: its features of the photos, decoded as the flags ask; those of the other way are computed here.
    """
    preprocess = plain.preprocess
    if preprocess.resample not in inference.FAST_FILTERS:
        return {"unavailable": "not for this checkpoint's filter"}
    other = dataclasses.replace(preprocess, decode="exact" if preprocess.decode == "fast" else "fast")
    views = make_views(photos, len(task.views), other) if len(task.views) else task.views
    computed = Task(views, torch.empty(0), np.empty(0), "").features(plain, PLAIN)
    found = outputs_of(plain, PLAIN, inference.crops_of(paths, other), 8, f"--decode {other.decode}")
    result: dict[str, Any] = {"photos": len(paths), "views": len(views)}
    for name in FEATURES:
        fast, exact = in_order(other, found[name], asked[name])
        result[name] = {"relative_l2_error": relative_l2(fast, exact)}
        result[name]["worst_photo_relative_l2_error"] = float(token_errors(fast, exact).max())
        if len(views):
            fast, exact = in_order(other, computed["views"][name], task.baseline["views"][name])
            result[name]["views_relative_l2_error"] = relative_l2(fast, exact)
            result[name]["same_nearest_percent"] = neighbour_agreement(fast, exact)[0]
    return result


def in_order(other: inference.Preprocess, computed: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fast ones first."""
    return (computed, asked) if other.decode == "fast" else (asked, computed)


def fast_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each feature."""
    found = result.get("decode_fast") or {}
    shared = {key: found.get(key) for key in ("photos", "views")}
    return [{"label": LABELS[name], **shared, **found[name]} for name in FEATURES if name in found]
