"""Turns results/ and logs/ into the tables of README.md and README.zh.md and the pictures of assets/, or finds where they part.

    python eval/evidence.py
    python eval/evidence.py --check

Tables stand between the markers <!-- evidence:NAME --> and <!-- /evidence:NAME -->, the same in both files. A figure comes from
a JSON file or it is not there: a missing result says "not measured", or "BLOCKED: reason" where a log or env_info.json says so.
A picture carries the digest of its sources, and is drawn again only when they have changed. Results of the simulated NPU are
refused. --check writes nothing, and prints a line for each table or picture that does not follow from the files.

Exit codes: 0 done, or nothing has drifted; 1 --check found drift; 2 wrong usage, or a file that is not what it should be.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import math
import operator
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference  # first of all: it sets what must precede torch
import matplotlib
import numpy as np
from inference import UsageError
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

RUN = "python eval/evidence.py"
READMES = ("README.md", "README.zh.md")
KINDS = {"npu": "NPU", "cuda": "GPU", "cpu": "CPU"}
COMMANDS = {
    "inference": "python inference.py --image_path assets/samples/*.jpg --device {} --pca picture.png",
    "accuracy_eval": "python eval/eval_accuracy.py --device {} --sweep",
    "performance_eval": "python eval/eval_performance.py --device {} --end_to_end 500",
}
PUBLISHED = ("env_info", "inference", "accuracy_eval", "performance_eval")
FIXED_DELIVERABLES = (
    *("README.md", "README.zh.md", "requirements.txt", "locked_models.md", "inference.py"),
    *("eval/env_check.py", "eval/eval_accuracy.py", "eval/eval_performance.py", "eval/evidence.py", "weights/README.md"),
)
LABELS = dict(
    pooler_output="Pooler", last_hidden_state="Hidden", class_token="Class token", mean_patch_token="Mean patch token"
)
PASS_KEYS = ("mre_pass", "cosine_pass", "l2_pass", "worst_token_pass")
FAITHFUL = 1e-5  # eval_accuracy.py's bar for float32
MEMORY_KEYS = ("npu_memory_mb", "gpu_memory_mb", "peak_resident_memory_mb")
NOTHING = "-"

DRAWING = 2  # raise it when a picture is drawn in another way: then all are drawn anew
DIGEST_KEY = "Source-SHA256"
WIDTH = 1500
FOOTER_SIZE = 21
STAGE_LABELS = {"patch embedding": "patches", "final norm": "norm"}
FLOOR = 1e-9  # a log scale has no place for an error of 0
MAX_PHOTOS = 4
MAX_FILES = 120


# --- reading ---


@dataclass(frozen=True)
class Source:
    """A JSON file: its path from the root, the device it is of, and what it holds."""

    path: str
    kind: str
    data: dict[str, Any]
    sha256: str

    @property
    def simulated(self) -> bool:
        return is_simulated(self.data)

    @property
    def label(self) -> str:
        return KINDS[self.kind] + " SIMULATED" * self.simulated


@dataclass(frozen=True)
class Evidence:
    """All that tables and pictures are made from. `results` by name and kind of device; `blocked`: why the NPU gave no result,
    and the file that says so, by name of the result."""

    root: Path
    results: dict[str, dict[str, Source]]
    environment: list[Source]
    published: dict[str, Source]
    submission: Source | None
    blocked: dict[str, tuple[str, str]] = field(default_factory=dict)

    def measured(self, name: str) -> list[Source]:
        return list(self.results[name].values())

    def missing(self, name: str) -> dict[str, str]:
        """For each kind of device without this result, why: BLOCKED and the first sentence of the reason, or "not measured"."""
        why = {kind: "not measured" for kind in KINDS if kind not in self.results[name]}
        if "npu" in why and name in self.blocked:
            why["npu"] = f"BLOCKED: {self.blocked[name][0].split('. ')[0]}"
        return why


def is_simulated(value: Any) -> bool:
    """Whether a device that is named anywhere in a result is a simulated one."""
    if isinstance(value, dict):
        named = [value.get("device_name"), value.get("npu_model")]
        return any("simulated" in str(name).lower() for name in named) or any(map(is_simulated, value.values()))
    return False


def read_source(root: Path, path: str, kind: str) -> Source | None:
    """A JSON object, or None where there is no file. Raises UsageError where the file holds anything else."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        content = (root / path).read_bytes()
        data = json.loads(content, parse_constant=refuse)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({inference.first_line(error)}); write it again with its script") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: not a JSON object; write it again with its script")
    return Source(path, kind, data, hashlib.sha256(content).hexdigest())


def read_result(root: Path, name: str, kind: str) -> Source | None:
    """The result of a device, or what an interrupted run has left where there is no whole one."""
    source = None
    for stem in (name, f"{name}_partial"):
        source = source or read_source(root, f"results/{inference.result_name(stem, kind)}.json", kind)
    if source and source.data.get("device") != kind:
        raise UsageError(
            f"{source.path}: its device is {source.data.get('device')!r}, and a file of this name is of {kind!r}; "
            f"write it again with: {COMMANDS[name].format(kind)}"
        )
    return source


def read_evidence(root: Path, allow_simulated: bool = False) -> Evidence:
    """Read results/ and the ends of logs/. Raises UsageError naming the file that is malformed or simulated."""
    results: dict[str, dict[str, Source]] = {name: {} for name in COMMANDS}
    for name, by_kind in results.items():
        for kind in KINDS:
            source = read_result(root, name, kind)
            if source:
                by_kind[kind] = source
    environment = [read_source(root, f"results/{name}.json", "npu") for name in ("env_info", "env_info_cpu")]
    published = {name: read_source(root, f"results/published/{name}.json", "npu") for name in PUBLISHED}
    evidence = Evidence(
        root,
        results,
        [source for source in environment if source],
        {name: source for name, source in published.items() if source},
        read_source(root, "results/git_submit.json", "cpu"),
    )
    evidence.blocked.update(find_blocked(evidence))
    for source in [*evidence.environment, *(source for name in COMMANDS for source in evidence.measured(name))]:
        if source.simulated and not allow_simulated:
            raise UsageError(
                f"{source.path}: made on the simulated NPU, which is no evidence; remove it, or measure on a real one"
            )
    return evidence


def find_blocked(evidence: Evidence) -> dict[str, tuple[str, str]]:
    """Why the NPU gave no result, by name of the result: the last line of its log, else what env_info.json says."""
    found = {}
    for name in COMMANDS:
        for source in evidence.environment[:1]:
            if source.data.get("npu_status") == "blocked":
                found[name] = (str(source.data.get("npu_blocked_reason")), source.path)
        log = evidence.root / "logs" / f"{name}.log"
        if log.is_file():
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
            stopped = re.fullmatch(r"[\d-]{10} [\d:,]{12} \[ERROR\] BLOCKED: (.+)", last)
            if stopped:
                found[name] = (stopped[1], f"logs/{name}.log")
    return found


@contextmanager
def blaming(source: Source) -> Iterator[None]:
    """Whatever is missing or of a wrong type in a result becomes one line that names its file."""
    try:
        yield
    except KeyError as error:
        raise UsageError(f"{source.path}: {error} is missing; write it again with its script") from error
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise UsageError(
            f"{source.path}: a value is not what it should be ({inference.first_line(error)}); write it again with its script"
        ) from error


# --- Markdown ---


def plain(value: Any) -> str:
    """Text of a file as Markdown that shows just this text, on one line."""
    return re.sub(r"([\\|*`<\[\]])", r"\\\1", " ".join(str(value).split()))


def number(value: Any, form: str = "", none: str = NOTHING) -> str:
    """A number of a file, or `none` where it holds null. Raises TypeError for anything else."""
    return none if value is None else format(checked(value), form)


def checked(value: Any) -> float:
    """A number of a file. Raises TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is not a number")
    return value


def link(path: str, short: bool = False) -> str:
    return f"[{Path(path).name if short else path}]({path})"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, with an empty line before it."""
    lines = [list(columns), ["---"] * len(columns), *rows]
    return ["", *("| " + " | ".join(line) + " |" for line in lines)]


def weights_label(data: dict[str, Any]) -> str:
    """Checkpoint and hash, or "random weights"."""
    weights = data.get("weights")
    if weights is None:
        return "weights not recorded"
    if weights["source"] == "random":
        return "random weights"
    hashes = ", ".join(f"{name} {digest[:12]}" for name, digest in weights["sha256"].items())
    return f"checkpoint {weights['path']}, sha256 {hashes or 'not recorded'}"


def date_and_commit(data: dict[str, Any]) -> str:
    date = f"{data['time_utc'][:16].replace('T', ' ')} UTC" if data.get("time_utc") else "date not recorded"
    if not data.get("git_commit"):
        return f"{date}, commit not recorded"
    return f"{date}, commit {data['git_commit'][:7]}" + " (dirty)" * bool(data.get("git_dirty"))


def source_line(source: Source) -> str:
    """Where the figures of a table come from: file, device, arithmetic, weights, date and commit."""
    data = source.data
    with blaming(source):
        parts = [link(source.path)]
        if "device" in data:
            parts[0] += f": {source.label}, {plain(data.get('device_name') or 'device name not recorded')}"
            hf32 = " (rounding allowed)" if data.get("allow_hf32") else ""
            weights = plain(weights_label(data))
            parts += [plain(data["dtype"]) + hf32, f"**{weights}**" if weights == "random weights" else weights]
        elif source.simulated:
            parts.append("SIMULATED")
        if data.get("partial"):
            parts.append("**partial: the run was interrupted**")
        return "- " + ", ".join([*parts, date_and_commit(data)])


def source_lines(sources: Sequence[Source]) -> list[str]:
    return [source_line(source) for source in sources] or ["- no result file"]


def missing_cells(evidence: Evidence, name: str, kind: str, width: int) -> list[str]:
    """The row of a device that has no result."""
    why = plain(evidence.missing(name)[kind])
    if why.startswith("BLOCKED"):
        why += f" ({link(evidence.blocked[name][1], short=True)})"
    return [KINDS[kind], why, *[NOTHING] * (width - 2)]


def device_table(
    evidence: Evidence,
    name: str,
    columns: Sequence[str],
    rows_of: Callable[[dict[str, Any]], list[list[str]]],
    only_measured: bool = False,
) -> list[str]:
    """A table with a device column: rows_of(result) for each device that has this result, one row that says why for the others.

    only_measured leaves the others out: the second table of a block need not say it again.
    """
    rows = []
    for kind in KINDS:
        source = evidence.results[name].get(kind)
        if source is None:
            rows += [] if only_measured else [missing_cells(evidence, name, kind, len(columns) + 1)]
            continue
        with blaming(source):
            found = rows_of(source.data) or [["not measured", *[NOTHING] * (len(columns) - 1)]]
        rows += [[source.label, *row] for row in found]
    return table(["Device", *columns], rows) if rows else []


# --- the tables ---


def environment_rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    """What env_info.json says, as label and plain text."""
    if info.get("npu_model"):
        npu = f"{info['npu_model']}, {info.get('npu_count')} of them"
    else:
        npu = f"BLOCKED: {info['npu_blocked_reason']}" if info.get("npu_status") == "blocked" else "none found"
    labels = {"python": "Python", "torch": "torch", "torch_npu": "torch_npu", "transformers": "transformers", "numpy": "NumPy"}
    advice = info.get("advice")
    return [
        ("Operating system", str(info["os"])),
        ("CPU", f"{info.get('cpu') or info['architecture']}, {number(info.get('cpu_cores'))} cores"),
        ("Memory", f"{number(info.get('memory_gb'), '.1f', 'not known')} GiB"),
        ("NPU", npu),
        ("GPU", str(info.get("gpu") or "none")),
        ("CANN", str(info.get("cann_version") or "not found")),
        *((label, str(info.get(f"{key}_version") or "not installed")) for key, label in labels.items()),
        ("Versions", "not checked" if advice is None else "; ".join(advice) or "nothing to change"),
    ]


def environment_table(evidence: Evidence) -> list[str]:
    sources = evidence.environment
    if not sources:
        return [*source_lines([]), *table(["", "Value"], [["Machine", "not measured"]])]
    columns = []
    for source in sources:
        with blaming(source):
            columns.append(environment_rows(source.data))
    rows = [[cells[0][0], *(plain(text) for _, text in cells)] for cells in zip(*columns, strict=True)]
    heads = [Path(source.path).stem + " SIMULATED" * source.simulated for source in sources]
    return [*source_lines(sources), *table(["", *heads], rows)]


def inference_rows(data: dict[str, Any]) -> list[list[str]]:
    images, tokens, size = data["last_hidden_shape"]
    pooler = number(data.get("pooler_norm"), ".4f", "none")
    state = data.get("pooler", "trained")
    if data.get("pooler_norm") is not None and state != "trained":
        pooler += f" ({plain(state)}: means nothing)"
    cells = [number(data["hidden_mean_norm"], ".4f"), pooler, number(1e3 * data["inference_time_s"], ".2f")]
    explained = (data.get("pca") or {}).get("explained_variance_percent")
    cells += [number(data["throughput_img_s"], ".2f"), number(explained, ".1f")]
    return [[number(images), f"{images} x {tokens} x {size}", number(data.get("batch_size")), *cells]]


def inference_table(evidence: Evidence) -> list[str]:
    columns = ["Images", "Last hidden state", "Batch", "Mean token norm", "Pooler norm", "Time of a batch (ms)", "Images/s"]
    columns.append("Variance in the picture (%)")
    sources = source_lines(evidence.measured("inference"))
    return [*sources, *device_table(evidence, "inference", columns, inference_rows)]


def accuracy_rows(data: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, label in LABELS.items():
        if name not in data:
            continue
        values = data[name]
        verdict = "PASS" if all(values[key] for key in PASS_KEYS) else "FAIL"
        if not values["counts"]:
            verdict += f", does not count: the pooler is {plain(data['pooler'])}"
        lost = "not finite"
        errors = [number(values[f"{key}relative_l2_error"], ".2e", lost) for key in ("", "worst_token_")]
        filtered = values["relative_error"]["filtered_mean_relative_error"]
        errors.append(lost if filtered is None else f"{number(100 * filtered, '.6f')}%")
        rows.append([label, *errors, number(values["cosine_similarity"], ".9f", lost), verdict])
    return rows


def judgement_rows(data: dict[str, Any]) -> list[list[str]]:
    faithful = data.get("faithful")
    golden = data["golden"]["last_hidden_state"]
    lost = "not finite"
    errors = [number(golden[f"{who}_relative_l2_error"], ".2e", lost) for who in ("device", "reference")]
    twice = (data.get("invariance") or {}).get("repeatable_bit_for_bit")
    nearest = ((data.get("neighbours") or {}).get("class_token") or {}).get("same_nearest_percent")
    reference = data["reference"]
    return [
        [
            data["overall"],
            f"{KINDS[reference['device']]}, {plain(reference['dtype'])}",
            f"does not apply to {plain(data['dtype'])}" if faithful is None else "yes" if faithful else "**no**",
            *errors,
            number(golden["device_to_reference_ratio"], ".2f", "not defined"),
            plain(data["starts_at"] or "nowhere above rounding"),
            NOTHING if twice is None else "yes" if twice else "no",
            number(nearest, ".1f"),
        ]
    ]


def accuracy_table(evidence: Evidence) -> list[str]:
    columns = ["Output", "Relative L2", "Worst token", "Filtered MRE", "Cosine", "Verdict"]
    whole = ["Overall", "Reference", f"Faithful float32 ({FAITHFUL:.0e})", "Off float64: device", "Off float64: reference"]
    whole += ["Ratio", "Error starts at", "Same bits twice", "Same nearest neighbour (%)"]
    return [
        *source_lines(evidence.measured("accuracy_eval")),
        *device_table(evidence, "accuracy_eval", columns, accuracy_rows),
        *device_table(evidence, "accuracy_eval", whole, judgement_rows, only_measured=True),
    ]


def sweep_rows(data: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in data.get("sweep") or []:
        name, verdict = plain(row["arithmetic"]), plain(row["overall"])
        if "reason" in row:
            rows.append([name, f"{verdict}: {plain(row['reason'])}", *[NOTHING] * 5])
            continue
        keys = ("relative_l2_error", "worst_token_relative_l2_error", "class_token_relative_l2_error")
        errors = [number(row[key], ".2e", "not finite") for key in keys]
        speed = f"{number(row['throughput_img_s'], '.2f')} (batch {number(row['batch_size'])})"
        bars = dict.fromkeys(miss.split(": ")[-1] for miss in row.get("misses") or [])  # of whichever outputs
        verdict += f" ({plain(', '.join(bars))})" if bars else ""
        best = "**fastest within the bar**" if row["arithmetic"] == data.get("recommended") else "no"
        rows.append([name, *errors, speed, verdict, best])
    return rows


def sweep_table(evidence: Evidence) -> list[str]:
    columns = ["Arithmetic", "Relative L2", "Worst token", "Class token", "Images/s", "Verdict", "Recommended"]
    sources = source_lines(evidence.measured("accuracy_eval"))
    return [*sources, *device_table(evidence, "accuracy_eval", columns, sweep_rows)]


def performance_rows(data: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in data["results"]:
        if row.get("out_of_memory"):
            rows.append([number(row["batch_size"]), f"out of memory: {plain(row['reason'])}", *[NOTHING] * 7])
            continue
        times = [number(1e3 * row[key], ".2f") for key in ("p50_s", "p95_s")]
        speeds = [number(row["throughput_img_s"], ".2f"), number(row.get("pipelined_throughput_img_s"), ".2f")]
        memory = number(next((row[key] for key in MEMORY_KEYS if key in row), None), ".0f")
        reached = [number(row.get("tflops"), ".2f"), number(row.get("share_of_limit_percent"), ".1f")]
        steady = {None: NOTHING, True: "**no**", False: "yes"}[row.get("unsteady")]
        rows.append([number(row["batch_size"]), *times, *speeds, memory, *reached, steady])
    return rows


def limit_rows(data: dict[str, Any]) -> list[list[str]]:
    limit = data.get("limit") or dict.fromkeys(("limit_img_s", "matmul_tflops", "copy_gb_s"))
    figures = [number(limit["limit_img_s"], ".2f", "not measured")]
    figures += [number(limit[key], ".2f") for key in ("matmul_tflops", "copy_gb_s")]
    runs = f"{number(data['num_runs'])} after {number(data['warmup'])} or more"
    return [[*figures, number(data.get("gflop_per_image"), ".2f"), plain(data.get("execution", "eager")), runs]]


def comparison_lines(source: Source) -> list[str]:
    """An earlier run beside this one, and what differs between the two."""
    comparison = source.data.get("comparison")
    if not comparison:
        return []
    with blaming(source):
        keys = (("throughput_img_s", ".2f"), ("other_throughput_img_s", ".2f"), ("ratio", ".3f"))
        rows = [[number(row["batch_size"]), *(number(row[key], form) for key, form in keys)] for row in comparison["rows"]]
        differences = "; ".join(
            f"{plain(key)}: {_known(here)}, there {_known(there)}" for key, (here, there) in comparison["differences"].items()
        )
        heads = [f"{source.label}: batch", "Images/s", f"In {plain(comparison['file'])}", "Ratio"]
        return [*table(heads, rows), "", f"What differs between the two: {differences or 'nothing that is recorded'}."]


def _known(value: Any) -> str:
    return "not recorded" if value is None else plain(value)


def performance_table(evidence: Evidence) -> list[str]:
    columns = ["Batch", "Median (ms)", "95% (ms)", "Images/s", "Pipelined", "Memory (MiB)", "TFLOP/s", "Of limit (%)", "Steady"]
    limits = ["Limit (images/s)", "Matrix products (TFLOP/s)", "Copy (GB/s)", "GFLOP an image", "Execution", "Timed runs"]
    sources = evidence.measured("performance_eval")
    return [
        *source_lines(sources),
        *device_table(evidence, "performance_eval", columns, performance_rows),
        *device_table(evidence, "performance_eval", limits, limit_rows, only_measured=True),
        *(line for source in sources for line in comparison_lines(source)),
    ]


def peer_rows(data: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in data.get("peers") or []:
        if "unavailable" in row:
            rows.append([plain(row["peer"]), f"not measured: {plain(row['unavailable'])}", *[NOTHING] * 4])
            continue
        figures = [number(row[key], ".2f") for key in ("throughput_img_s", "bundle_throughput_img_s")]
        figures.append(number(row["speed_ratio"], ".3f"))
        rows.append([plain(row["peer"]), number(row["batch_size"]), *figures, number(row["rounds"])])
    return rows


def peers_table(evidence: Evidence) -> list[str]:
    columns = ["Instead", "Batch", "Its images/s", "This bundle's", "This bundle is ... times as fast", "Turns"]
    sources = source_lines(evidence.measured("performance_eval"))
    return [*sources, *device_table(evidence, "performance_eval", columns, peer_rows)]


def cold_start_rows(data: dict[str, Any]) -> list[list[str]]:
    cold = (data.get("end_to_end") or {}).get("cold_start")
    if not cold:
        return []
    keys = ("import_s", "load_s", "first_image_s", "total_s", "bare_minimum_s", "ratio_to_bare")
    memory = [number(cold[key], ".0f") for key in ("peak_memory_mb", "bare_peak_memory_mb")]
    return [[*(number(cold[key], ".2f") for key in keys), *memory]]


def folder_rows(data: dict[str, Any]) -> list[list[str]]:
    found = (data.get("end_to_end") or {}).get("folder")
    rows = []
    if found:
        photos = f"{number(found['images'])} of {number(found['megapixels_mean'], '.1f')} megapixels"
        how = f"batch {number(found['batch_size'])}, {number(found['num_workers'])} workers"
        for row in found["rows"]:
            speeds = [number(row["images_per_s"], ".2f"), number(row["ratio_to_this_bundle"], ".3f")]
            rows.append([plain(row["what"]), *speeds, photos, how])
    return rows


def end_to_end_table(evidence: Evidence) -> list[str]:
    cold = [
        "Import (s)",
        "Load (s)",
        "First image (s)",
        "Total (s)",
        "Bare minimum (s)",
        "Ratio",
        "Peak (MiB)",
        "Bare peak (MiB)",
    ]
    folder = ["Folder of photos", "Images/s", "To this bundle", "Photos", "How"]
    notes = []
    for source in evidence.measured("performance_eval"):
        with blaming(source):
            prepared = (source.data.get("end_to_end") or {}).get("preprocessing")
            if prepared:
                ratio = number(prepared["ratio_to_library"], ".2f")
                notes += ["", f"{source.label}: pre-processing on one core is {ratio} times as fast as the library's."]
    return [
        *source_lines(evidence.measured("performance_eval")),
        *device_table(evidence, "performance_eval", cold, cold_start_rows),
        *device_table(evidence, "performance_eval", folder, folder_rows, only_measured=True),
        *notes,
    ]


def scale_rows(data: dict[str, Any]) -> list[list[str]]:
    rates = {}
    whole = [row for row in data["results"] if "throughput_img_s" in row]
    if whole:
        best = max(whole, key=lambda row: row["throughput_img_s"])
        rates[f"forward pass, batch {number(best['batch_size'])}"] = best["throughput_img_s"]
    for row in ((data.get("end_to_end") or {}).get("folder") or {}).get("rows", []):
        if row["what"] == "this bundle":
            rates["folder of photos to features"] = row["images_per_s"]
    rows = []
    for what, rate in rates.items():
        hours = [images / rate / 3600 for images in (1e6, 1e9 / 8, 1e9 / 64)]
        rows.append([what, number(rate, ".2f"), *(number(value, ",.1f" if value < 100 else ",.0f") for value in hours)])
    return rows


def scale_table(evidence: Evidence) -> list[str]:
    columns = ["Rate of", "Images/s", "1 million on one (h)", "1 billion on 8 (h)", "1 billion on 64 (h)"]
    sources = source_lines(evidence.measured("performance_eval"))
    lines = device_table(evidence, "performance_eval", columns, scale_rows)
    return [*sources, *lines, "", "Several devices are reckoned as so many times the rate of one; that was not measured."]


def published_source(evidence: Evidence, name: str) -> str:
    """The line of a published file: its device stands in env_info.json, its date in its log."""
    source = evidence.published.get(name)
    if source is None:
        return f"- results/published/{name}.json: not recorded"
    log = evidence.root / "logs" / "published" / f"{'env_check' if name == 'env_info' else name}.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    dated = re.search(r"^(?:# Date: )?(\d{4}-\d\d-\d\d)", text, re.MULTILINE)
    machine = evidence.published.get("env_info")
    device = plain((machine.data if machine else {}).get("npu_model") or "name not recorded")
    dtype = f", {plain(source.data['dtype'])}" if "dtype" in source.data else ""
    rest = "" if name == "env_info" else ", weights not recorded"
    return f"- {link(source.path)}: NPU, {device}{dtype}{rest}, {dated[1] if dated else 'date not recorded'}"


def published_rows(source: Source) -> list[list[str]]:
    """Label and figure of one published file."""
    data, rows = source.data, []
    if "npu_model" in data:
        versions = [f"{name} {data[f'{name}_version']}" for name in ("torch", "torch_npu", "transformers", "python")]
        rows.append(
            ["Machine", plain(f"{data['npu_count']} x {data['npu_model']}, {data['cann_version']}, {', '.join(versions)}")]
        )
    elif "inference_time_s" in data:
        rows.append(["Inference, one image", f"{number(1e3 * data['inference_time_s'], '.2f')} ms"])
        rows.append(["Pooler norm", number(data["pooler_norm"], ".4f")])
        rows.append(["Mean token norm", number(data["hidden_mean_norm"], ".4f")])
    elif "overall" in data:
        for name in ("last_hidden_state", "pooler_output"):
            errors = data[name]["relative_error"]
            for key, label in (("filtered_mean_relative_error", "filtered MRE"), ("mean_relative_error", "unfiltered mean")):
                rows.append([f"{LABELS[name]}, {label}", f"{number(100 * errors[key], '.3f')}%"])
            rows.append([f"{LABELS[name]}, cosine", number(data[name]["cosine_similarity"], ".9f")])
        rows.append(["Its own verdict", plain(data["overall"])])
    else:
        for row in data["results"]:
            speed = f"{number(row['throughput_img_s'], '.2f')} images/s, median {number(1e3 * row['p50_s'], '.2f')} ms"
            memory = f"{number(row['npu_memory_mb'], '.0f')} MB"
            rows.append([f"Batch {number(row['batch_size'])}", f"{speed}, {memory}"])
    return [[*row, link(source.path)] for row in rows]


def published_table(evidence: Evidence) -> list[str]:
    rows = []
    for source in evidence.published.values():
        with blaming(source):
            rows += published_rows(source)
    head = "**Not produced by this code:** the original submission's own run. Relative L2, weights and "
    head += "commits are not in these files; [PROVENANCE.md](results/published/PROVENANCE.md) lists their known faults."
    sources = [published_source(evidence, name) for name in PUBLISHED]
    return [head, "", *sources, *table(["Published Ascend run", "Figure", "File"], rows or [["Run", "not recorded", NOTHING]])]


def deliverable_state(evidence: Evidence, name: str, kind_of_file: str) -> str:
    """State of the NPU's result or log `name`, and which other devices have theirs."""
    suffix = "json" if kind_of_file == "results" else "log"
    exists = (evidence.root / kind_of_file / f"{name}.{suffix}").is_file()
    source = evidence.results[name].get("npu")
    if source is not None:
        state = "present" if exists else "not measured"
        state += ", partial" * bool(source.data.get("partial")) + ", SIMULATED" * source.simulated
    else:
        state = plain(evidence.missing(name)["npu"])
    files = [f"{kind_of_file}/{inference.result_name(name, kind)}.{suffix}" for kind in ("cuda", "cpu")]
    others = [link(path) for path in files if (evidence.root / path).is_file()]
    return state + (f"; other devices: {', '.join(others)}" if others else "")


def deliverables_table(evidence: Evidence) -> list[str]:
    rows = []
    for path in FIXED_DELIVERABLES:
        rows.append([path, "present" if (evidence.root / path).is_file() else "missing"])
    rows[-1][1] += "; the checkpoint itself is never committed"
    for path, found in (("results/env_info.json", evidence.environment[:1]), ("logs/env_check.log", [])):
        state = "present" if (evidence.root / path).is_file() else "not measured"
        rows.append([path, state + ", SIMULATED" * any(source.simulated for source in found)])
    for folder, suffix in (("results", "json"), ("logs", "log")):
        rows += [[f"{folder}/{name}.{suffix}", deliverable_state(evidence, name, folder)] for name in COMMANDS]
    for picture, name in PICTURE_OF.items():
        shown = [pca_source(evidence)] if name == "inference" else evidence.measured(name)
        labels = ", ".join(source.label for source in shown if source)
        rows.append([f"assets/{picture}", f"present, shows {labels}" if labels else "present, says: not measured"])
    for picture, found in (("env_check.png", evidence.environment), ("git_submit_result.png", evidence.submission)):
        rows.append([f"assets/{picture}", "present" if found else "present, says: not measured"])
    sources = [*evidence.environment[:1], *(source for name in COMMANDS for source in evidence.measured(name))]
    return [*source_lines(sources), *table(["Deliverable", "State"], rows)]


PICTURE_OF = {
    "inference_result.png": "inference",
    "accuracy_eval_result.png": "accuracy_eval",
    "performance_eval_result.png": "performance_eval",
}
TABLES: dict[str, Callable[[Evidence], list[str]]] = {
    "environment": environment_table,
    "inference": inference_table,
    "accuracy": accuracy_table,
    "sweep": sweep_table,
    "performance": performance_table,
    "peers": peers_table,
    "end_to_end": end_to_end_table,
    "scale": scale_table,
    "published": published_table,
    "deliverables": deliverables_table,
}


# --- between the markers ---


def find_blocks(text: str, name_of_file: str) -> dict[str, tuple[int, int]]:
    """Lines of the opening and the closing marker of each table. Raises UsageError for a marker that is out of place."""
    blocks: dict[str, tuple[int, int]] = {}
    open_name, opened = "", 0
    for place, line in enumerate(text.split("\n")):
        marker = re.fullmatch(r"\s*<!--\s*(/?)evidence:(.*?)\s*-->\s*", line)
        if not marker:
            continue
        closes, name = marker[1] == "/", marker[2]
        where = f"{name_of_file}:{place + 1}: the marker {line.strip()}"
        if name not in TABLES:
            raise UsageError(f"{where} is not known; use one of {', '.join(TABLES)}")
        if not closes and name in blocks:
            raise UsageError(f"{where} stands there twice; remove one")
        if closes != bool(open_name) or (closes and name != open_name):
            raise UsageError(f"{where} does not pair with the one before it; each opens and closes once, none within another")
        if closes:
            blocks[name] = (opened, place)
        open_name, opened = ("", 0) if closes else (name, place)
    if open_name:
        raise UsageError(
            f"{name_of_file}:{opened + 1}: the marker of {open_name} is never closed; add <!-- /evidence:{open_name} -->"
        )
    return blocks


def splice(text: str, name_of_file: str, tables: dict[str, list[str]]) -> str:
    """The text with each table between its markers."""
    lines, result, end = text.split("\n"), [], 0
    for name, (opened, closed) in find_blocks(text, name_of_file).items():
        result += [*lines[end : opened + 1], "", *tables[name], ""]
        end = closed
    return "\n".join(result + lines[end:])


def read_text(root: Path, name: str) -> str:
    try:
        return (root / name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: cannot be read ({inference.first_line(error)})") from error


def readme_drift(text: str, name_of_file: str, tables: dict[str, list[str]]) -> list[str]:
    """A line for each table that is missing or is not what the files give, with the first line that differs."""
    lines, drift = text.split("\n"), []
    blocks = find_blocks(text, name_of_file)
    for name, table_lines in tables.items():
        if name not in blocks:
            drift.append(
                f"{name_of_file}:{len(lines)}: no marker <!-- evidence:{name} -->; add it and its end, then run: {RUN}"
            )
            continue
        opened, closed = blocks[name]
        found, wanted = lines[opened + 1 : closed], ["", *table_lines, ""]
        if found != wanted:
            pairs = enumerate(itertools.zip_longest(found, wanted, fillvalue="nothing"))
            first, (here, there) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
            drift.append(f"{name_of_file}:{opened + first + 2}: table {name} {_difference(here, there)}; run: {RUN}")
    return drift


def _difference(found: str, wanted: str, around: int = 30) -> str:
    """What stands in a line and what should, from a little before the first character that differs."""
    start = max(0, len(os.path.commonprefix([found, wanted])) - around)
    shown = [repr(text[start : start + 2 * around]) for text in (found, wanted)]
    return f"has {shown[0]}, and the files give {shown[1]}"


# --- pictures ---


@contextmanager
def chart_style() -> Iterator[None]:
    """The same on every machine, whatever its matplotlibrc says; 16 points are 12 pixels where a README shows 800 of 1500."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 16, "figure.titlesize": 17, "legend.fontsize": 15, "text.parse_math": False})
        matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.4, "lines.linewidth": 2.5, "lines.markersize": 8})
        yield


def new_figure(title: str, inches_high: float) -> Figure:
    figure = Figure(figsize=(WIDTH / 100, inches_high), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    figure.suptitle(title, x=0.012, ha="left")
    return figure


def to_image(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def monospaced(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """matplotlib's own font, so that the picture does not depend on what a machine has installed."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / ("DejaVuSansMono-Bold.ttf" if bold else "DejaVuSansMono.ttf"), size)


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent) or [""]


def draw_text(lines: Sequence[str], size: int = 24) -> Image.Image:
    """Lines of text in a fixed-width font; those that begin with "# " are bold. Long ones are wrapped."""
    margin, height = 40, round(size * 1.45)
    fonts = {False: monospaced(size), True: monospaced(size, bold=True)}
    columns = int((WIDTH - 2 * margin) / fonts[False].getlength("M"))
    rows: list[tuple[bool, str]] = []
    for line in lines:
        bold = line.startswith("# ")
        indent = re.match(r"(?:\S.{0,18}\S)? {2,}", line)
        rows += [(bold, row) for row in wrap(line.removeprefix("# "), columns, " " * indent.end() if indent else "")]
    picture = Image.new("RGB", (WIDTH, 2 * margin + height * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for place, (bold, row) in enumerate(rows):
        draw.text((margin, margin + place * height), row, "black", fonts[bold])
    return picture


def describe_run(source: Source) -> str:
    """Title of a chart: device, arithmetic and weights."""
    data = source.data
    hf32 = " (rounding allowed)" if data.get("allow_hf32") else ""
    partial_run = ", partial" if data.get("partial") else ""
    parts = [f"{source.label}: {data.get('device_name') or 'name not recorded'}", f"{data['dtype']}{hf32}", weights_label(data)]
    return "\n".join(wrap(", ".join(parts) + partial_run, 105))


def missing_lines(evidence: Evidence, name: str) -> list[str]:
    """What a picture says of the devices that it does not show."""
    lines = []
    for kind, why in evidence.missing(name).items():
        lines += [f"{KINDS[kind]}: {why}", f"    {COMMANDS[name].format(kind)}"]
    return lines


def draw_nothing(evidence: Evidence, name: str, what: str, present: str = "") -> Image.Image:
    """A picture that says how to get what it would show. `present`: what the results that there are lack."""
    lines = [
        line
        for source in evidence.measured(name)
        for line in (f"{source.label}: {present}", f"    {COMMANDS[name].format(source.kind)}")
    ]
    return draw_text([f"# {what}: not measured", "", *missing_lines(evidence, name), *lines])


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of the same width, one below the other."""
    whole = Image.new("RGB", (WIDTH, sum(picture.height for picture in pictures)), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def pca_source(evidence: Evidence) -> Source | None:
    """The inference result whose picture is shown: the NPU's, else the newest that was made with --pca."""
    found = [source for source in evidence.measured("inference") if source.data.get("pca")]
    return max(found, key=lambda source: (source.kind == "npu", str(source.data.get("time_utc"))), default=None)


def photo_paths(evidence: Evidence, source: Source) -> list[Path]:
    """The photos of a result that are shown. Raises UsageError where one is not there."""
    with blaming(source):
        named = source.data["image_path"]
        names = [named] if isinstance(named, str) else named[:MAX_PHOTOS]
        paths = [evidence.root / Path(name) for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.is_file():
            again = COMMANDS["inference"].format(source.kind)
            raise UsageError(f"{source.path}: {name}, which its picture shows, is not there; bring it back, or run: {again}")
    return paths


def draw_inference(evidence: Evidence) -> Image.Image:
    """Each photo's crop beside the colours of its patch tokens, two photos in a row."""
    source = pca_source(evidence)
    if source is None:
        what = "Photos and the colours of their patch tokens"
        return draw_nothing(evidence, "inference", what, present="not measured, run without --pca")
    paths = photo_paths(evidence, source)
    with blaming(source):
        patches = [np.frombuffer(bytes.fromhex(digits), np.uint8) for digits in source.data["pca"]["colours_hex"][: len(paths)]]
        grids = [math.isqrt(patch.size // 3) for patch in patches]
        colours = [patch.reshape(grid, grid, 3) for patch, grid in zip(patches, grids, strict=True)]
        preprocess = inference.Preprocess().for_image_size(source.data["image_size"])
        heading = [*inference.pca_heading(source.data), f"{source.path}: {source.label}, {date_and_commit(source.data)}"]
    try:
        crops = [inference.read_crop(inference.list_images([str(path)])[0], preprocess) for path in paths]
    except (inference.BadImage, inference.Unreadable) as error:
        raise UsageError(f"{source.path}: a photo that its picture shows cannot be read ({error})") from error
    tiles = [inference.draw_pca(crop[None], colour[None], [""], []) for crop, colour in zip(crops, colours, strict=True)]
    return lay_out(tiles, [path.name for path in paths], heading)


def lay_out(tiles: Sequence[Image.Image], names: Sequence[str], heading: Sequence[str]) -> Image.Image:
    """Tiles under a heading, two in a row, each over the name of its photo."""
    margin, height, columns = 20, 36, min(2, len(tiles))
    font = monospaced(24)
    wrapped = [row for line in heading for row in wrap(line, int((WIDTH - 2 * margin) / font.getlength("M")), "  ")]
    side = (WIDTH - margin) // columns
    scaled = [tile.resize((side, round(tile.height * side / tile.width)), Image.Resampling.LANCZOS) for tile in tiles]
    top, step = margin + height * len(wrapped), scaled[0].height + margin
    picture = Image.new("RGB", (WIDTH, top + step * -(-len(tiles) // columns) + margin), "white")
    draw = ImageDraw.Draw(picture)
    for place, line in enumerate(wrapped):
        draw.text((margin, margin + place * height), line, "black", font)
    for place, (tile, name) in enumerate(zip(scaled, names, strict=True)):
        left, upper = margin // 2 + side * (place % columns), top + step * (place // columns)
        picture.paste(tile, (left, upper))
        draw.text((left + margin, upper + tile.height - margin), name, "black", font)
    return picture


def arithmetic_lines(data: dict[str, Any]) -> dict[str, list[tuple[str, float | None]]]:
    """Error after each stage, by arithmetic: the run itself, and what the sweep adds to it."""

    def stages(rows: list[dict[str, Any]]) -> list[tuple[str, float | None]]:
        return [(row["stage"], row["relative_l2_error"]) for row in rows]

    own = f"{data['dtype']}, rounding allowed" if data.get("allow_hf32") else data["dtype"]
    lines = {own: stages(data["stages"])}
    for row in data.get("sweep") or []:
        if row.get("stages") and row["arithmetic"] not in lines:
            lines[row["arithmetic"]] = stages(row["stages"])
    return lines


def on_log_scale(error: float | None) -> float:
    """Where an error is drawn: not at all if it is not finite, and at FLOOR if it is too small for a log scale."""
    return math.nan if error is None else max(checked(error), FLOOR)


def draw_stages(source: Source) -> Image.Image:
    """Relative L2 error after each stage, a line for each arithmetic, and the two bars."""
    figure = new_figure(describe_run(source), 7)
    axes = figure.subplots()
    names: list[str] = []
    for (label, stages), marker in zip(arithmetic_lines(source.data).items(), itertools.cycle("osD^vP*X")):
        names = [name for name, _ in stages]
        errors = [on_log_scale(error) for _, error in stages]
        lost = "\n(not finite where the line ends)" if any(map(math.isnan, errors)) else ""
        axes.plot(range(len(errors)), errors, marker=marker, label=label + lost, alpha=0.85)
    bar = checked(source.data["threshold_percent"])
    axes.axhline(bar / 100, color="crimson", linestyle="--", label=f"bar: {bar:g}%")
    axes.axhline(FAITHFUL, color="dimgrey", linestyle=":", label=f"faithful float32: {FAITHFUL:.0e}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _place: f"{value:.0e}")
    axes.yaxis.set_minor_formatter(lambda _value, _place: "")
    axes.set_ylim(bottom=FLOOR / 2)
    axes.set_xticks(range(len(names)), [STAGE_LABELS.get(name, name.removeprefix("layer ")) for name in names], rotation=90)
    axes.set_xlabel("after stage (numbers: encoder layers)")
    axes.set_ylabel("relative L2 error")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return to_image(figure)


def draw_accuracy(evidence: Evidence) -> Image.Image:
    """Where the error begins, on each device."""
    charts = []
    for source in evidence.measured("accuracy_eval"):
        with blaming(source), chart_style():
            charts.append(draw_stages(source))
    if not charts:
        return draw_nothing(evidence, "accuracy_eval", "Error by stage")
    note = f"Errors below {FLOOR:.0e}, 0 too, are drawn at {FLOOR:.0e}."
    return stack([*charts, draw_text([note, *missing_lines(evidence, "accuracy_eval")], FOOTER_SIZE)])


def draw_throughput(axes: Axes, source: Source, published: dict[str, Any] | None) -> None:
    """Images a second by batch size, beside the limit, the peers and, on an NPU, the published run."""
    data = source.data
    rows = [row for row in data["results"] if "throughput_img_s" in row]
    own = columns_of(rows, "throughput_img_s")
    axes.plot(*own, "o-", color="C0", label="this bundle", zorder=3)
    for peer, marker, colour, peers in peer_styles(data):
        compared = by_ratio(own, columns_of(peers, "speed_ratio"), operator.truediv)
        axes.plot(*compared, f"{marker}--", color=colour, label=peer, alpha=0.8)
    if data.get("limit"):
        compared = by_ratio(own, columns_of(rows, "share_of_limit_percent", 0.01), operator.truediv)
        axes.plot(*compared, ".:", color="dimgrey", label="limit: matrix\nproducts alone")
    if published:
        label = f"published Ascend run,\nnot this code ({published['dtype']})"
        axes.plot(
            *columns_of(published["results"], "throughput_img_s"),
            "x",
            color="crimson",
            markersize=11,
            markeredgewidth=3,
            label=label,
        )
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set_ylabel("images a second")


def draw_latency(axes: Axes, source: Source, published: dict[str, Any] | None) -> None:
    """Milliseconds of a batch by batch size: the median, and up to the 95th percentile."""
    data = source.data
    rows = [row for row in data["results"] if "throughput_img_s" in row]
    sizes, medians = columns_of(rows, "p50_s", 1e3)
    slowest = [max(0.0, high - middle) for high, middle in zip(columns_of(rows, "p95_s", 1e3)[1], medians, strict=True)]
    axes.errorbar(sizes, medians, [[0.0] * len(rows), slowest], fmt="o-", color="C0", capsize=6, zorder=3)
    for _, marker, colour, peers in peer_styles(data):
        compared = by_ratio((sizes, medians), columns_of(peers, "speed_ratio"), operator.mul)
        axes.plot(*compared, f"{marker}--", color=colour, alpha=0.8)
    if published:
        axes.plot(*columns_of(published["results"], "p50_s", 1e3), "x", color="crimson", markersize=11, markeredgewidth=3)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set_ylabel("ms a batch (median; bar: to 95%)")


def peer_styles(data: dict[str, Any]) -> list[tuple[str, str, str, list[dict[str, Any]]]]:
    """Name, marker, colour and rows of each peer that was measured."""
    rows = [row for row in data.get("peers") or [] if "unavailable" not in row]
    names = dict.fromkeys(row["peer"] for row in rows)
    return [
        (name, "s^vDP"[place % 5], f"C{place + 1}", [row for row in rows if row["peer"] == name])
        for place, name in enumerate(names)
    ]


Columns = tuple[list[float], list[float]]


def by_ratio(own: Columns, ratios: Columns, combine: Callable[[float, float], float]) -> Columns:
    """Batch sizes, and what this bundle's own value there and the ratio to it make of each other."""
    values = dict(zip(*own, strict=True))
    return ratios[0], [combine(values[size], ratio) for size, ratio in zip(*ratios, strict=True)]


def columns_of(rows: Sequence[dict[str, Any]], key: str, scale: float = 1.0) -> Columns:
    """Batch sizes and values."""
    return [checked(row["batch_size"]) for row in rows], [scale * checked(row[key]) for row in rows]


def draw_speed(source: Source, published: dict[str, Any] | None) -> Image.Image:
    """Throughput and latency of one device by batch size."""
    figure = new_figure(describe_run(source), 5.6)
    left, right = figure.subplots(1, 2)
    draw_throughput(left, source, published)
    draw_latency(right, source, published)
    sizes = sorted({row["batch_size"] for row in source.data["results"] if "throughput_img_s" in row})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("batch size")
    right.legend(*left.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.0, 0.5))
    return to_image(figure)


def draw_performance(evidence: Evidence) -> Image.Image:
    """Throughput and latency by batch size, on each device."""
    charts, notes = [], ["Limit and peers: this bundle's figure and their ratio to it, measured in turns."]
    for source in evidence.measured("performance_eval"):
        published = evidence.published.get("performance_eval") if source.kind == "npu" else None
        with blaming(source), chart_style():
            charts.append(draw_speed(source, published.data if published else None))
            failed = [str(row["batch_size"]) for row in source.data["results"] if row.get("out_of_memory")]
            notes += [f"{source.label}: out of memory at batch size {', '.join(failed)}"] if failed else []
    if not charts:
        return draw_nothing(evidence, "performance_eval", "Throughput and latency by batch size")
    return stack([*charts, draw_text([*notes, *missing_lines(evidence, "performance_eval")], FOOTER_SIZE)])


def draw_environment(evidence: Evidence) -> Image.Image:
    """What env_info.json says, as text."""
    lines = []
    for source in evidence.environment:
        with blaming(source):
            simulated = " SIMULATED" * source.simulated
            lines += [f"# Environment{simulated}: {source.path}, {date_and_commit(source.data)}", ""]
            lines += [f"{label:<16}  {text}" for label, text in environment_rows(source.data)]
            lines.append("")
    return draw_text(lines[:-1] or ["# Environment: not measured", "", "python eval/env_check.py"])


def draw_submission(evidence: Evidence) -> Image.Image:
    """Commit, branch and tracked files, as text."""
    source = evidence.submission
    if source is None:
        return draw_text(["# Commit and files: not measured", "", f"{RUN}    (in a git clone)"])
    with blaming(source):
        data, files = source.data, source.data["files"]
        shown = sorted(files[:MAX_FILES])
        half = -(-len(shown) // 2)
        width = max(map(len, shown), default=0) + 3
        pairs = zip(shown[:half], [*shown[half:], ""] if len(shown) % 2 else shown[half:], strict=True)
        listed = (
            [f"    {left:<{width}}{right}".rstrip() for left, right in pairs]
            if width < 48
            else [f"    {name}" for name in shown]
        )
        branch = data["branch"] or "none (a commit is checked out)"
        lines = [
            f"# {inference.MODEL_NAME} on Ascend NPU: what is submitted",
            "",
            f"Commit:  {data['commit']}",
            f"Branch:  {branch}",
        ]
        lines.append(f"State:   {'Python files changed since this commit' if data['dirty'] else 'Python files as committed'}")
        lines += [f"Date:    {data['time_utc'][:16].replace('T', ' ')} UTC", "", f"{len(files)} tracked files:", *listed]
    return draw_text(lines + [f"    and {len(files) - len(shown)} more"] * (len(files) > len(shown)))


def chart_sources(name: str, evidence: Evidence) -> list[Source]:
    """What the picture of a result is drawn from."""
    sources = evidence.measured(name)
    if name == "performance_eval" and "npu" in evidence.results[name]:
        sources += [source for key, source in evidence.published.items() if key == name]
    return sources


def picture_digest(picture: str, evidence: Evidence) -> str:
    """SHA-256 of all that a picture is drawn from: results, photos, why the NPU gave no result, and the way of drawing."""
    parts: list[Any] = [DRAWING, picture]
    name = PICTURE_OF.get(picture)
    if name == "inference":
        source = pca_source(evidence)
        parts += [[source.path, source.sha256]] if source else list(evidence.missing(name).items())
        for path in photo_paths(evidence, source) if source else []:
            parts.append(hashlib.sha256(path.read_bytes()).hexdigest())
    elif name:
        parts += [[source.path, source.sha256] for source in chart_sources(name, evidence)]
        parts += list(evidence.missing(name).items())
    else:
        used = evidence.environment if picture == "env_check.png" else [evidence.submission]
        parts += [[source.path, source.sha256] for source in used if source]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


PICTURES: dict[str, Callable[[Evidence], Image.Image]] = {
    "inference_result.png": draw_inference,
    "accuracy_eval_result.png": draw_accuracy,
    "performance_eval_result.png": draw_performance,
    "env_check.png": draw_environment,
    "git_submit_result.png": draw_submission,
}


def digest_in(path: Path) -> str | None:
    """The digest that a picture carries; None where there is no picture or no digest."""
    try:
        with Image.open(path) as picture:
            return picture.info.get(DIGEST_KEY)
    except (OSError, ValueError, SyntaxError):  # Pillow raises SyntaxError for a broken PNG
        return None


def to_png(picture: Image.Image, digest: str) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(DIGEST_KEY, digest)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


# --- what is submitted ---


def git(root: Path, *arguments: str) -> str | None:
    """What git prints, or None where there is no git, no repository, or it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def current_submission(evidence: Evidence) -> tuple[Source | None, dict[str, bytes]]:
    """results/git_submit.json as it should be, and the file itself where commit, branch or files are not those that it records.

    It is a file, because HEAD is another commit as soon as the picture of it is committed. Without git it is left alone.
    """
    path, state = "results/git_submit.json", inference.git_state()
    files = git(evidence.root, "ls-files", "-z")
    if state["git_commit"] is None or files is None:
        return evidence.submission, {}
    now = {
        "commit": state["git_commit"],
        "branch": git(evidence.root, "branch", "--show-current") or None,
        "dirty": state["git_dirty"],
        "files": sorted(filter(None, files.split("\0"))),
    }
    recorded = evidence.submission.data if evidence.submission else {}
    if all(recorded.get(key, "") == value for key, value in now.items()):
        return evidence.submission, {}
    now["time_utc"] = inference.utc_now()
    content = (json.dumps(now, indent=2) + "\n").encode()
    return Source(path, "cpu", now, hashlib.sha256(content).hexdigest()), {path: content}


# --- the two ways to run it ---


def write(root: Path, allow_simulated: bool) -> int:
    """Write what has changed of README.md, README.zh.md and assets/. Nothing is written before all of it is known."""
    evidence = read_evidence(root, allow_simulated)
    submission, files = current_submission(evidence)
    evidence = dataclasses.replace(evidence, submission=submission)
    tables = {name: make(evidence) for name, make in TABLES.items()}
    for name, draw in PICTURES.items():
        digest = picture_digest(name, evidence)
        if digest_in(root / "assets" / name) != digest:
            files[f"assets/{name}"] = to_png(draw(evidence), digest)
    for name in READMES:
        text = read_text(root, name)
        spliced = splice(text, name, tables)
        if spliced != text:
            files[name] = spliced.encode("utf-8")
        lacking = [table_name for table_name in TABLES if table_name not in find_blocks(text, name)]
        if lacking:
            print(f"{name} has no marker for: {', '.join(lacking)}")
    for name, content in files.items():
        with inference.replacing(root / name) as file:
            file.write(content)
        print(f"Written: {name}")
    if not files:
        print("Nothing has changed")
    return 0


def check(root: Path, allow_simulated: bool) -> int:
    """Print a line for each table or picture that does not follow from the files; 1 where there is one."""
    evidence = read_evidence(root, allow_simulated)
    tables = {name: make(evidence) for name, make in TABLES.items()}
    drift = [line for name in READMES for line in readme_drift(read_text(root, name), name, tables)]
    for name in PICTURES:
        found = digest_in(root / "assets" / name)
        if found != picture_digest(name, evidence):
            state = "was not drawn from these files" if found else "is missing, or carries no digest of its sources"
            drift.append(f"assets/{name}:1: the picture {state}; run: {RUN}")
    for line in drift:
        print(line)
    if not drift:
        print("README.md, README.zh.md and assets/ follow from the files")
    return 1 if drift else 0


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where README or pictures do not follow from the files"
    )
    parser.add_argument(
        "--allow_simulated", action="store_true", help="for the tests only: take results of the simulated NPU, marked"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        return (check if args.check else write)(inference.ROOT, args.allow_simulated)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
