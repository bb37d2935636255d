"""What eval_accuracy.py computes from arrays: errors, verdicts of a stage, the field's yardsticks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

OUTPUTS = ("pooler_output", "last_hidden_state", "class_token", "mean_patch_token")
LABELS = dict(zip(OUTPUTS, ("Pooler", "Hidden", "Class token", "Mean patch token"), strict=True))
BARS = {"mre_pass": "filtered MRE", "cosine_pass": "cosine", "l2_pass": "relative L2", "worst_token_pass": "worst token"}
FAITHFUL = 1e-5  # float32 rounds at 6e-8; through 24 layers true float32 stays under 1e-5, HF32 and TF32 do not
FILTER = 0.1
NOISE, JUMP = 2e-6, 3.0  # what a block in float32 may add by itself to the median token, and as a multiple of plain float32's
WORST_NOISE, WORST_JUMP = 1e-5, 10.0  # the same for the worst token, which varies more
CLASSES = {"L2": (2, 1.2, 1.2), "L1": (5, 1.5, 1.5), "L0": (10, 2, 2)}  # the strictest first; max, mean, RMSE
FORMULAS = {
    "a, b": "device and reference, elementwise, in float64",
    "filtered_mean_relative_error": f"mean of |a - b| / |b| where |b| >= {FILTER} * RMS of that output of that image",
    "relative_l2_error": "||a - b|| / ||b||; worst, median and p99 token: of each token of all images by itself",
    "smallest_bar_percent": "largest of filtered MRE, relative L2, worst token over the outputs that count",
    "own_relative_l2_error": "of what a block adds to the golden run's input, against float64's; median over tokens",
    "at_fault": f"own error not finite, or over {NOISE} and over {JUMP} times plain float32's; for the worst token over "
    f"{WORST_NOISE} and {WORST_JUMP} times",
    "same_nearest, same_five_nearest": "share of views with the same nearest view, of the same five; cosine, mean taken away",
    "probe": "ridge regression on standardised features of scikit-learn's digits, each digit by a fit without its fifth",
    "max, mean, rmse ratio": "device over plain arithmetic, both against float64: largest and mean of |a - b| / (|b| + 1e-7), "
    "and RMSE; L0, L1, L2 are the Ascend operator standard's classes, whose official reference is a GPU",
    "same": "PyTorch's rule: RMSE against float64 at most 2 times the reference's (3 times in half precision)",
}


def ratio(numerator: float, denominator: float) -> float:
    """0/0 is 0: nothing differs from nothing. x/0 is infinite."""
    if denominator == 0.0:
        return 0.0 if numerator == 0.0 else math.inf
    return float(numerator / denominator)


def relative_l2(value: np.ndarray, reference: np.ndarray) -> float:
    reference = np.asarray(reference, np.float64)
    return ratio(np.linalg.norm(np.ravel(value - reference)), np.linalg.norm(np.ravel(reference)))


def token_errors(value: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Relative L2 error of each token: [N, T]."""
    reference = np.asarray(reference, np.float64)
    difference, size = np.linalg.norm(value - reference, axis=-1), np.linalg.norm(reference, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((difference == 0) & (size == 0), 0.0, difference / size)


def metrics(value: np.ndarray, reference: np.ndarray, threshold_percent: float, cosine_threshold: float) -> dict[str, Any]:
    """The published keys, then the ones that cannot be chosen to look well. NaN and infinity become null."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    difference, size = np.abs(value - reference), np.abs(reference)
    defined = size > 0
    relative = difference[defined] / size[defined]
    significant = relative[(size >= FILTER * np.sqrt((size**2).mean((1, 2), keepdims=True)))[defined]]
    filtered, whole = ratio(significant.sum(), significant.size), relative_l2(value, reference)
    cosine = ratio((value * reference).sum(), math.sqrt((value**2).sum() * (reference**2).sum()))
    cosine = min(max(cosine, -1.0), 1.0) if math.isfinite(cosine) else cosine
    tokens, bar = token_errors(value, reference), threshold_percent / 100
    worst = float(tokens.max())
    return finite_or_null(
        {
            "relative_error": {
                "max_relative_error": float(relative.max(initial=0.0)),
                "mean_relative_error": ratio(relative.sum(), relative.size),
                "filtered_mean_relative_error": filtered,
                "max_absolute_error": float(difference.max()),
                "mean_absolute_error": float(difference.mean()),
            },
            "cosine_similarity": cosine,
            "mre_pass": filtered < bar,
            "cosine_pass": cosine > cosine_threshold,
            "relative_l2_error": whole,
            "l2_pass": whole < bar,
            "worst_token_relative_l2_error": worst,
            "worst_token_pass": worst < bar,
            "median_token_relative_l2_error": float(np.median(tokens)),
            "p99_token_relative_l2_error": float(np.percentile(tokens, 99)) if math.isfinite(worst) else math.inf,
            "nan_count": int(np.isnan(value).sum()),
            "inf_count": int(np.isinf(value).sum()),
        }
    )


def passes(result: dict[str, Any]) -> bool:
    return all(result.get(key, True) for key in BARS)


def judge(
    found: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    truth: dict[str, np.ndarray],
    bars: tuple[float, float],
    pooler_counts: bool,
) -> dict[str, Any]:
    """Metrics and verdicts of outputs against `expected`, their distance from float64, and the verdict on all that count.

    bars: in percent for relative errors, and for the cosine. A pooler that is not trained is reported, but decides nothing.
    """
    result: dict[str, Any] = {}
    for name in (name for name in OUTPUTS if name in found):
        result[name] = metrics(found[name], expected[name], *bars)
        result[name]["float64_relative_l2_error"] = finite_or_null(relative_l2(found[name], truth[name]))
        result[name]["counts"] = name != "pooler_output" or pooler_counts
    counted = {name: values for name, values in result.items() if values["counts"]}
    misses = [f"{LABELS[name]}: {bar}" for name, values in counted.items() for key, bar in BARS.items() if not values[key]]
    clean = not any(values["nan_count"] or values["inf_count"] for values in result.values())
    errors = [values[key] for values in counted.values() for key in ("relative_l2_error", "worst_token_relative_l2_error")]
    errors += [values["relative_error"]["filtered_mean_relative_error"] for values in counted.values()]
    exact = [values["float64_relative_l2_error"] for values in counted.values()]
    return result | {
        "overall": "PASS" if clean and not misses else "FAIL",
        "misses": misses,
        "smallest_bar_percent": None if None in errors else 100 * max(errors),
        "faithful": clean and all(error is not None and error <= FAITHFUL for error in exact),
    }


def is_at_fault(own: np.ndarray, plain: np.ndarray) -> bool:
    """Whether a block's own error per token is more than float32's rounding, for which plain float32's own error stands."""
    median, worst = float(np.median(own)), float(np.max(own))
    limit = max(NOISE, JUMP * float(np.median(plain))), max(WORST_NOISE, WORST_JUMP * float(np.max(plain)))
    return not (median <= limit[0] and worst <= limit[1])


def begins(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The first stage at fault of each kind: what is wrong with every MLP is named once."""
    first: dict[str, str] = {}
    for row in rows:
        if row["at_fault"]:
            first.setdefault(re.sub(r"^layer \d+ ", "", row["stage"]), row["stage"])
    return list(first.values())


def yardstick(value: np.ndarray, peer: np.ndarray, truth: np.ndarray, half: bool = False) -> dict[str, Any]:
    """The field's yardsticks for a device's output beside a peer's in the same dtype, both against float64."""

    def three(found: np.ndarray) -> tuple[float, float, float]:
        difference = np.abs(found - truth)
        relative = difference / (np.abs(truth) + 1e-7)
        return float(relative.max()), float(relative.mean()), float(np.sqrt((difference**2).mean()))

    ours, theirs = three(value), three(peer)
    ratios = [ratio(a, b) for a, b in zip(ours, theirs, strict=True)]
    kept = (name for name, bars in CLASSES.items() if all(ratio <= bar for ratio, bar in zip(ratios, bars, strict=True)))
    return finite_or_null(
        {
            **dict(zip(("max_ratio", "mean_ratio", "rmse_ratio"), ratios, strict=True)),
            "class": next(kept, "none"),
            "mean_relative_error": ours[1],
            "within_2e-13": ours[1] < 2**-13,
            "within_2e-11": ours[1] < 2**-11,
            "same": ratios[2] <= (3 if half else 2),
        }
    )


def dual_thousandth(value: np.ndarray, truth: np.ndarray) -> float:
    """Percent of elements that are off by more than a thousandth; the rule allows 0.1."""
    return 100 * float((~(np.abs(value - truth) <= 1e-3 * np.abs(truth))).mean())


def finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
