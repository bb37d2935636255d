"""Results as the scripts write them, and a bundle to put them into, for the tests of pages and pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import inference
import numpy as np
from PIL import Image

import checked
import eval_accuracy
import evidence
import tables
from conftest import ROOT

HASH = "0123456789abcdef" * 4
BLOCKED = {"status": "BLOCKED", "device": "npu", "reason": "torch_npu is not installed", "what_to_do": "Run eval/env_check.py"}
RANDOM = {"source": "random", "note": "", "seed": 0}
COLOURS = ((201, 31, 41), (51, 61, 211))


def provenance(**changes: Any) -> dict[str, Any]:
    return {
        "device": "cpu",
        "device_name": "Some CPU, 2 threads",
        "dtype": "float32",
        "model": inference.MODEL_NAME,
        "time_utc": "2026-05-15T04:33:04+00:00",
        "git_commit": "a1b2c3d4" * 5,
        "git_dirty": False,
        "allow_hf32": False,
        "weights": {
            "source": "checkpoint",
            "path": "weights/w",
            "sha256": {"config.json": "f" * 64, "model.safetensors": HASH},
        },
        **changes,
    }


def inference_result(**changes: Any) -> dict[str, Any]:
    found = dict(
        image_size=64,
        image_path=["assets/samples/a.png", "assets/samples/b.png"],
        last_hidden_shape=[2, 17, 128],
        hidden_mean_norm=17.0625,
        inference_time_s=0.0125,
        throughput_img_s=160.0,
        batch_size=2,
    )
    return provenance(**found | changes)


def pca_result(**changes: Any) -> dict[str, Any]:
    found = dict(
        image_size=64,
        image_path=["assets/samples/a.png", "assets/samples/b.png"],
        preprocess={"resize": 64, "image_size": 64},
        explained_variance_percent=65.92,
        colours_hex=[np.full((4, 4, 3), colour, np.uint8).tobytes().hex() for colour in COLOURS],
    )
    return provenance(**found | changes)


def stage(name: str, error: float) -> dict[str, Any]:
    keys = ("relative_l2_error", "own_relative_l2_error", "float32_own_relative_l2_error")
    return {"stage": name, "at_fault": False} | dict.fromkeys(keys, error)


def sweep_row(arithmetic: str, error: float, rate: float) -> dict[str, Any]:
    stages = [stage("layer 1 attention", error / 2), stage("final norm", error)]
    row = {"arithmetic": arithmetic, "overall": "PASS", "begins_at": [], "stages": stages, "relative_l2_error": error}
    return row | {"worst_token_relative_l2_error": error, "throughput_img_s": rate}


def accuracy_result(**changes: Any) -> dict[str, Any]:
    output = {
        "relative_error": {
            "filtered_mean_relative_error": 0.0012345,
            "mean_relative_error": 0.0234,
            "max_absolute_error": 3.25e-4,
            "mean_absolute_error": 4.5e-5,
        },
        "cosine_similarity": 0.99999,
        **dict.fromkeys(("mre_pass", "cosine_pass", "l2_pass", "worst_token_pass"), True),
        "relative_l2_error": 1.234e-7,
        "worst_token_relative_l2_error": 5.678e-6,
        "float64_relative_l2_error": 2.5e-7,
        "counts": True,
    }
    found = {
        **{name: output for name in eval_accuracy.OUTPUTS},
        "overall": "PASS",
        "stages": [stage("layer 1 attention", 1e-7), stage("final norm", 2e-7)],
        "sweep": [sweep_row("float32, strict", 1.2e-7, 12.5), sweep_row("float16", 4.4e-4, 25.0)],
        "reference": {"device": "float64 on the CPU", "dtype": "float64"},
        "threshold_percent": 1.0,
    }
    return provenance(**found | changes)


def performance_row(batch_size: int, rate: float, **changes: Any) -> dict[str, Any]:
    time = batch_size / rate
    times = {
        "mean_time_s": time,
        "std_time_s": time / 10,
        "p50_s": time,
        "p95_s": 1.1 * time,
        "throughput_img_s": rate,
        "raw_times_s": [time] * 3,
    }
    row = {"batch_size": batch_size, "peak_resident_memory_mb": 900.4, "share_of_limit_percent": 62.5, **times}
    return row | changes


def performance_result(**changes: Any) -> dict[str, Any]:
    peer = {"peer": "transformers", "batch_size": 1, "throughput_img_s": 1.9, "bundle_throughput_img_s": 2.4}
    folder = {"what": "this bundle", "images_per_s": 10.0, "ratio_to_this_bundle": 1.0}
    found = {
        "num_runs": 3,
        "results": [performance_row(1, 2.125), performance_row(4, 4.25, unsteady=True)],
        "limit": {"limit_img_s": 6.8, "matmul_tflops": 0.835},
        "peers": [
            peer | {"speed_ratio": 1.0625, "rounds": 3},
            {"peer": "openvino", "unavailable": "No module named 'openvino'"},
        ],
        "end_to_end": {"cold_start": {"import_s": 1.5, "load_s": 0.5}, "folder": {"rows": [folder]}},
        "execution": "eager",
    }
    return provenance(**found | changes)


def tuned_row(rate: float, **changes: Any) -> dict[str, Any]:
    row = {"dtype": "float32", "allow_hf32": False, "execution": "eager", "without": [], "batch_size": 4, "environment": {}}
    row |= {"status": "ok", "images_per_s": rate, "within_bar": True} | changes
    return row | {"median_time_s": row["batch_size"] / rate}


def tuned_result(**changes: Any) -> dict[str, Any]:
    rows = [
        tuned_row(1000.0, batch_size=8, without=["stacked_qkv"], environment={"TASK_QUEUE_ENABLE": "1"}),
        tuned_row(2000.0, dtype="float16", execution="graph", batch_size=64),
        tuned_row(1500.0, dtype="float16", batch_size=64),
        tuned_row(250.0, dtype="float16", allow_hf32=True, batch_size=1),
        tuned_row(9999.0, dtype="float16", batch_size=32, within_bar=False),
    ]
    return provenance(**{"rows": rows, "picks": {"throughput": rows[1], "latency": None, "faithful": rows[0]}} | changes)


def checked_row(execution: str, dtype: str, levers: str, error: float, operators: dict[str, int]) -> dict[str, Any]:
    row = {"script": "embed", "execution": execution, "dtype": dtype, "levers": levers, "ran": True}
    row |= {"captured": True if execution == "graph" else None, "relative_l2_error": error}
    return row | {"launches": sum(operators.values()), "operators": operators}


def checked_result(**changes: Any) -> dict[str, Any]:
    """What tests/cann/check.py writes of two wheels."""
    rows = [
        checked_row("eager", "float32", "none", 2.5e-7, {"aclnnAddmm": 145, "aclnnAdd": 49}),
        checked_row("eager", "float32", "two", 2.5e-7, {"aclnnAddmm": 146, "aclnnAdd": 49}),
        checked_row("eager", "float32", "default", 2.75e-7, {"aclnnAddmm": 98, "aclnnAdd": 49}),
        checked_row("eager", "float32", "all", 2.5e-7, {"aclnnAddmm": 98, "aclnnAdd": 1}),
        checked_row("eager", "float16", "all", 1.5e-3, {"aclnnAddmm": 50, "aclnnAdd": 1}),
        checked_row("graph", "float32", "default", 2.5e-7, {"aclnnAddmm": 98, "aclnnAdd": 50}),
        checked_row("graph", "bfloat16", "none", 8.5e-3, {"aclnnAddmm": 145}) | {"captured": False},
    ]
    broken = {"script": "inference", "execution": "eager", "dtype": "float32", "levers": "none", "ran": False, "reason": "no"}
    versions = {"torch": "2.13.0+cpu", "transformers": "5.24.0", "numpy": "2.4.6"}
    stacks = [
        {"torch_npu": "2.13.0", "versions": versions, "rows": rows},
        {"torch_npu": "2.9.0", "versions": versions, "rows": [*rows, broken]},
    ]
    found = {"device": inference.STAND_IN, "model": "a narrow model", "command": "python tests/cann/check.py", "stacks": stacks}
    return provenance(**found | changes)


MAKERS = {
    **{"inference": inference_result, "pca": pca_result, "tuned": tuned_result},
    **{"accuracy_eval": accuracy_result, "performance_eval": performance_result},
}

ENVIRONMENT = {
    **{
        "os": "Linux 6.1.0-x x86_64",
        "cpu": "Some CPU",
        "cpu_cores": 2,
        "memory_gb": 23.5,
        "npu_model": None,
        "npu_count": None,
    },
    **{f"{name}_version": "1.2.3" for name in ("python", "torch", "transformers", "numpy")},
}


def make_bundle(root: Path) -> Path:
    """A bundle without results: README skeletons, two photos, the published run."""
    (root / "assets" / "samples").mkdir(parents=True)
    for place, name in enumerate("ab"):
        Image.new("RGB", (64, 64), (60 * place, 90, 120)).save(root / "assets" / "samples" / f"{name}.png")
    for folder in ("results", "logs"):
        shutil.copytree(ROOT / folder / "published", root / folder / "published")
    shutil.copy(ROOT / "locked_models.md", root)
    marked = "".join(f"\nText.\n\n<!-- evidence:{name} -->\n<!-- /evidence:{name} -->\n" for name in tables.TABLES)
    for name in evidence.READMES:
        (root / name).write_text(f"# A model\n{marked}", encoding="utf-8")
    return root


def write(root: Path, stem: str, data: Any) -> Path:
    path = root / "results" / f"{stem}.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def save(root: Path, name: str, kind: str = "cpu", **changes: Any) -> Path:
    """Write a result of a kind of device; returns its path."""
    return write(root, inference.result_name(name, kind), MAKERS[name](device=kind, **changes))


def save_all(root: Path, kind: str = "cpu", **changes: Any) -> None:
    for name in MAKERS:
        save(root, name, kind, **changes)
    write(root, "env_info", ENVIRONMENT)
    write(root, checked.NAME, checked_result())
