"""Draws results/ into assets/*.png; evidence.py runs it.

Each arithmetic has one colour on every panel, and the bar one that no series has. Words in a picture are the files' names, keys
and units, so that it serves a page in any language. It carries the digest of its sources, and is drawn anew when they change.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference
import numpy as np
from PIL import Image, PngImagePlugin

import eval_accuracy
import stacks
from tables import CHECKS, KINDS, PUBLISHED, blaming

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from evidence import Evidence

DRAWING = 3  # raise it when a picture is drawn in another way: then all are drawn anew
DIGEST_KEY = "Source-SHA256"
WIDTH = 1500
FLOOR = 1e-9  # a log scale has no place for an error of 0
BAR = BAD = "#C00000"
GOOD, WAITING, OTHER, QUIET = "#2E7D32", "#B26A00", "#0072B2", "#777777"
# Okabe and Ito's colours, which the colour-blind tell apart; by what the name of an arithmetic contains, the first that fits.
COLOURS = {
    **{"autocast": "#7B4B94", "bfloat16": "#CC79A7", "float16": "#009E73"},
    **{"leaves it": "#56B4E9", "allowed": "#E69F00", "float32": "#0072B2"},
}


def colour_of(arithmetic: str) -> str:
    return next(colour for part, colour in COLOURS.items() if part in arithmetic)


def arithmetic_of(data: dict[str, Any]) -> str:
    """The name of a result's own arithmetic."""
    return f"{data['dtype']}, allowed" if data.get("allow_hf32") else data["dtype"]


def describe_run(data: dict[str, Any], stem: str) -> str:
    """A title: file, device, arithmetic and weights, by the words of the files."""
    weights = data["weights"]["source"].replace("random", "random weights")
    parts = [f"results/{stem}.json", data["device_name"], data["dtype"], weights, "partial" if data.get("partial") else ""]
    return "  |  ".join(filter(None, parts))


def measured(evidence: Evidence, name: str) -> list[tuple[dict[str, Any], str]]:
    """The results of all devices, and the names of their files."""
    stems = {kind: inference.result_name(name, kind) for kind in KINDS}
    return [(data, stem) for kind, stem in stems.items() if (data := evidence.measured(name, kind))]


# --- figures ---


@contextmanager
def new_figure(height: float) -> Iterator[Figure]:
    """The same on every machine, whatever its matplotlibrc says; 16 points are 12 pixels where a page shows 800 of 1500."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 16, "figure.titlesize": 15, "legend.fontsize": 14, "text.parse_math": False})
        matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.4, "lines.linewidth": 2.5, "lines.markersize": 7})
        figure = Figure(figsize=(WIDTH / 100, height), dpi=100, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        yield figure


def to_image(figure: Figure) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def below_each_other(pictures: Sequence[Image.Image]) -> Image.Image:
    return Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures]))


def draw_nothing(evidence: Evidence, name: str) -> Image.Image:
    """Where no device has a result: what the NPU's record says."""
    record = evidence.blocked(name)
    with new_figure(1.6) as figure:
        said = f"BLOCKED: {record['reason']}" if record else "0 results"
        figure.text(0.01, 0.5, f"results/{name}.json  |  {said}", color=BAD if record else QUIET, va="center")
        return to_image(figure)


# --- inference ---


def draw_inference(evidence: Evidence) -> Image.Image:
    """The photos' crops in a row, and below each the colours of its patch tokens."""
    data, stem, paths = pca_source(evidence)
    if data is None:
        return draw_nothing(evidence, "inference")
    with blaming(stem), new_figure(0.6 + 2 * 15 / max(len(paths), 3)) as figure:
        preprocess, pca = inference.Preprocess(**data["preprocess"]), data["pca"]
        figure.suptitle(f"{describe_run(data, stem)}  |  PCA {pca['explained_variance_percent']:.1f}%", x=0.01, ha="left")
        axes = figure.subplots(2, len(paths), squeeze=False)
        for photo, colours, (above, below) in zip(paths, pca["colours_hex"], axes.T, strict=False):
            patches = np.frombuffer(bytes.fromhex(colours), np.uint8)
            side = math.isqrt(patches.size // 3)
            above.imshow(inference.read_crop(str(photo), preprocess))
            above.set_title(photo.name, fontsize=14)
            below.imshow(patches.reshape(side, side, 3), interpolation="nearest")
        for one in axes.flat:
            one.set_axis_off()
        return to_image(figure)


def pca_source(evidence: Evidence) -> tuple[dict[str, Any] | None, str, list[Path]]:
    """The inference result that was made with --pca, the NPU's first, the name of its file, and its first six photos."""
    for data, stem in measured(evidence, "inference"):
        names = [data["image_path"]] if isinstance(data["image_path"], str) else data["image_path"][:6]
        paths = [evidence.root / name for name in names]
        if data.get("pca") and all(path.is_file() for path in paths):  # a user's own photos are not in this folder
            return data, stem, paths
    return None, "", []


# --- accuracy ---


def lines_of(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Stages by arithmetic: those of the sweep, else the run's own."""
    lines = {row["arithmetic"]: row["stages"] for row in data.get("sweep") or [] if row.get("stages")}
    return lines or {arithmetic_of(data): data["stages"]}


def draw_accuracy(evidence: Evidence) -> Image.Image:
    """For each device: the error after each stage, and error against speed, a colour for each arithmetic."""
    charts = []
    for data, stem in measured(evidence, "accuracy_eval"):
        with blaming(stem), new_figure(7) as figure:
            figure.suptitle(describe_run(data, stem), x=0.01, ha="left")
            left, right = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
            bar = data["threshold_percent"] / 100
            for axes in (left, right):
                axes.axhline(bar, color=BAR, linestyle="--", label=f"bar {bar:.0%}")
                axes.axhline(eval_accuracy.FAITHFUL, color=QUIET, linestyle=":", label=f"faithful {eval_accuracy.FAITHFUL:.0e}")
            draw_stages(left, lines_of(data))
            draw_trade(right, data.get("sweep") or [])
            figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
            charts.append(to_image(figure))
    return below_each_other(charts) if charts else draw_nothing(evidence, "accuracy_eval")


def draw_stages(axes: Axes, lines: dict[str, list[dict[str, Any]]]) -> None:
    """Error after each stage, a line for each arithmetic, and the bar."""
    order = ("pixels", "patch embedding", "position embedding")
    names = list(dict.fromkeys([*order, *(row["stage"] for stages in lines.values() for row in stages)]))
    for name, stages in lines.items():
        errors = [math.nan if row["relative_l2_error"] is None else max(row["relative_l2_error"], FLOOR) for row in stages]
        axes.plot([names.index(row["stage"]) for row in stages], errors, "o-", color=colour_of(name), label=name)
    short = {"patch embedding": "patch", "position embedding": "pos", "final norm": "norm"}
    ticks = {at: short.get(name, name) for at, name in enumerate(names) if not name.startswith("layer")}
    ticks |= {at: name.split()[1] for at, name in enumerate(names) if name.startswith("layer") and not name.endswith("MLP")}
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=90, fontsize=12)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _place: f"{value:.0e}")
    axes.set_ylim(bottom=FLOOR / 2, top=1)
    axes.set_ylabel("‖a − b‖ / ‖b‖")


def draw_trade(axes: Axes, sweep: Sequence[dict[str, Any]]) -> None:
    """Error of the output against images a second."""
    rows = [row for row in sweep if row.get("relative_l2_error") is not None]
    for row in rows:
        where = row["throughput_img_s"], max(row["relative_l2_error"], FLOOR)
        axes.plot(*where, "o", color=colour_of(row["arithmetic"]), markersize=16)
    if rows:
        axes.set_xlim(0, 1.15 * max(row["throughput_img_s"] for row in rows))
    axes.set_xlabel("img/s")


# --- performance ---


def draw_performance(evidence: Evidence) -> Image.Image:
    """For each device: throughput and latency by batch size, beside limit, peers and, on an NPU, the published run."""
    charts = []
    for data, stem in measured(evidence, "performance_eval"):
        published = evidence.records.get(f"{PUBLISHED}performance_eval") if data["device"] == "npu" else None
        with blaming(stem), new_figure(5.8) as figure:
            figure.suptitle(describe_run(data, stem), x=0.01, ha="left")
            axes = figure.subplots(1, 2)
            series = performance_series(data, published)
            for one, unit in zip(axes, ("img/s", "ms"), strict=True):
                for label, style, colour, points in series:
                    sizes, rates = zip(*points, strict=True)
                    values = rates if unit == "img/s" else [1e3 * size / rate for size, rate in points]
                    one.plot(sizes, values, style, color=colour, label=label)
                one.set_xscale("log", base=2)
                ticks = sorted({size for *_, points in series for size, _ in points})
                one.set_xticks(ticks, [str(size) for size in ticks])
                one.minorticks_off()
                one.set_ylim(0, 1.05 * one.get_ylim()[1])
                one.set_xlabel("batch_size")
                one.set_ylabel(unit)
            axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
            charts.append(to_image(figure))
    return below_each_other(charts) if charts else draw_nothing(evidence, "performance_eval")


def performance_series(data: dict[str, Any], published: dict[str, Any] | None) -> list[tuple[str, str, str, list]]:
    """Label, style, colour, and images a second by batch size. Limit and peers: this bundle's rate by their ratio to it.

    Their own rates were measured at another time, when a shared machine may have been faster or slower.
    """
    rows = [row for row in data["results"] if "throughput_img_s" in row]
    own, colour = {row["batch_size"]: row["throughput_img_s"] for row in rows}, colour_of(arithmetic_of(data))
    shares = [(row["batch_size"], row["share_of_limit_percent"] / 100) for row in rows if row.get("share_of_limit_percent")]
    series = [("limit", ".:", QUIET, [(size, own[size] / share) for size, share in shares])]
    peers: dict[str, list[tuple[int, float]]] = {}
    for row in data.get("peers") or []:
        if "speed_ratio" in row:
            peers.setdefault(row["peer"], []).append((row["batch_size"], own[row["batch_size"]] / row["speed_ratio"]))
    for (name, points), marker in zip(peers.items(), "s^vDP*X", strict=False):
        series.append((name, f"{marker}--", colour_of(name) if "leaves it" in name else colour, points))
    if published:
        points = [(row["batch_size"], row["throughput_img_s"]) for row in published["results"]]
        series.append(("results/published/", "X", colour_of("leaves it"), points))
    series.append(("inference.py", "o-", colour, list(own.items())))
    return [one for one in series if one[3]]


# --- the machine ---

# From the ground up: what a layer is called, where its version is in env_info.json.
LAYERS = (
    *(("OS", "os"), ("CPU", "cpu"), ("NPU", "npu_model"), ("CANN", "cann_version"), ("torch_npu", "torch_npu_version")),
    *(("torch", "torch_version"), ("transformers", "transformers_version"), ("numpy", "numpy_version")),
    ("Python", "python_version"),
)


def draw_environment(evidence: Evidence) -> Image.Image:
    """The stack of this machine, what is missing in red, beside the published run's and what is recommended for each CANN."""
    towers: list[tuple[str, dict[str, str | None]]] = []
    for stem in ("env_info", "env_info_cpu", f"{PUBLISHED}env_info"):
        if data := evidence.records.get(stem):
            found = {layer: data.get(key) for layer, key in LAYERS}
            found |= {"OS": re.sub(r"-\S+", "", data["os"]), "CPU": found["CPU"] or data.get("architecture")}
            found["NPU"] = f"{data['npu_count']} x {found['NPU']}" if found["NPU"] else None
            towers.append((f"{stem}.json", {layer: str(value) if value else None for layer, value in found.items()}))
    for stack in stacks.STACKS:
        wanted = {"CANN": stack.cann, "torch_npu": stack.torch_npu, "torch": stack.torch}
        wanted |= {"numpy": stack.numpy.removeprefix("numpy"), "Python": f"{stack.python[0]} - {stack.python[-1]}"}
        towers.append((f"CANN {stack.cann}", wanted))
    with new_figure(7) as figure:
        axes = figure.subplots()
        axes.set_axis_off()
        for column, (title, layers) in enumerate(towers):
            recorded = title.endswith(".json")
            axes.text(column + 0.5, len(LAYERS) + 0.15, title, ha="center", fontsize=13, weight="bold")
            for height, (layer, _) in enumerate(LAYERS):
                if recorded or layer in layers:
                    draw_layer(axes, column, height, layer, layers.get(layer), GOOD if recorded else QUIET)
        axes.set_xlim(0, len(towers))
        axes.set_ylim(-0.1, len(LAYERS) + 0.5)
        return to_image(figure)


def draw_layer(axes: Axes, column: int, height: int, layer: str, version: str | None, colour: str) -> None:
    """A box with a layer's name and version; a hollow red one where it is missing."""
    colour = colour if version else BAD
    text = version.removeprefix("/usr/local/Ascend/")[:28] if version else "✗"
    draw_box(axes, column + 0.04, height + 0.06, 0.92, 0.88, colour, hollow=not version)
    axes.text(column + 0.5, height + 0.68, layer, ha="center", va="center", fontsize=13, color=colour, weight="bold")
    axes.text(column + 0.5, height + 0.32, text, ha="center", va="center", fontsize=11)


def draw_box(axes: Axes, left: float, low: float, width: float, height: float, colour: str, hollow: bool) -> None:
    from matplotlib.patches import Rectangle

    fill, line = ("none", "--") if hollow else (colour + "30", "-")
    axes.add_patch(Rectangle((left, low), width, height, edgecolor=colour, facecolor=fill, linestyle=line, linewidth=1.5))


# --- what is submitted ---


def draw_submission(evidence: Evidence) -> Image.Image:
    """All files by folder with their sizes, coloured by what they are evidence of; what the NPU still lacks, hollow."""
    record = evidence.records.get("git_submit")
    if record is None:
        return draw_nothing(evidence, "git_submit")
    files: dict[str, int | None] = dict(record["files"])
    wanted = [path for name in CHECKS for path in (f"results/{name}.json", f"logs/{name}.log", f"assets/{name}_result.png")]
    files |= {path: None for path in wanted if path not in files}
    folders: dict[str, list[str]] = {}
    for name in sorted(files):
        folders.setdefault(str(Path(name).parent) + "/", []).append(name)
    lines = [line for folder, names in sorted(folders.items()) for line in (folder, *names)]
    rows = -(-len(lines) // 3)
    with new_figure(0.27 * rows + 0.5) as figure:
        axes = figure.subplots()
        axes.set_axis_off()
        for place, line in enumerate(lines):
            draw_file(axes, place // rows, -(place % rows), line, files.get(line), state_of(evidence, line, files))
        legend = ((0.02, "NPU", GOOD), (0.25, "BLOCKED", WAITING), (0.6, "✗", BAD), (0.75, "CPU, GPU, published", OTHER))
        for left, state, colour in legend:
            axes.text(left, 1.2, f"■ {state}", color=colour, fontsize=14)
        total = sum(size or 0 for size in files.values())
        axes.text(2.97, 1.2, f"{len(record['files'])} files, {total / 1e6:.1f} MB", ha="right", fontsize=14)
        axes.set_xlim(0, 3)
        axes.set_ylim(-rows, 2)
        return to_image(figure)


def state_of(evidence: Evidence, path: str, files: dict[str, int | None]) -> str:
    """The colour of a file."""
    folder, stem = path.split("/")[0], Path(path).stem.removesuffix("_result")
    if path.endswith("/") or folder not in ("results", "logs", "assets") or "samples" in path:
        return QUIET
    if files[path] is None:
        return BAD
    if stem in CHECKS and "published" not in path:
        return GOOD if evidence.measured(stem) else WAITING if folder != "assets" else OTHER
    return OTHER


def draw_file(axes: Axes, column: int, row: float, line: str, size: int | None, colour: str) -> None:
    """A folder in bold, or a file with its size and a bar as long as its logarithm; a hollow one where it is missing."""
    if line.endswith("/"):
        axes.text(column + 0.02, row, line, fontsize=12, weight="bold", va="center")
        return
    axes.text(column + 0.06, row, Path(line).name, fontsize=12, va="center", color=colour)
    width = 0.1 if size is None else 0.035 * math.log10(max(size, 1))
    draw_box(axes, column + 0.6, row - 0.25, width, 0.5, colour, hollow=size is None)
    if size:
        unit = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB" if size >= 1e3 else f"{size} B"
        axes.text(column + 0.97, row, unit, fontsize=11, va="center", ha="right", color=QUIET)


# --- files ---

PICTURES: dict[str, Callable[[Evidence], Image.Image]] = {
    "inference_result.png": draw_inference,
    "accuracy_eval_result.png": draw_accuracy,
    "performance_eval_result.png": draw_performance,
    "env_check.png": draw_environment,
    "git_submit_result.png": draw_submission,
}


def digest(picture: str, evidence: Evidence) -> str:
    """SHA-256 of all that a picture is drawn from: results, photos, and the way of drawing."""
    name = picture.removesuffix("_result.png")
    begins = {"env_check.png": ("env_info", "published/env_info"), "git_submit_result.png": ("git_submit",)}
    begins |= {"performance_eval_result.png": (name, f"{PUBLISHED}{name}")}
    used = {stem: data for stem, data in evidence.records.items() if stem.startswith(begins.get(picture, (name,)))}
    parts: list[Any] = [DRAWING, picture, used, stacks.STACKS]
    if picture == "git_submit_result.png":
        parts.append([bool(evidence.measured(name)) for name in CHECKS])
    if picture == "inference_result.png":
        parts += [inference.sha256(photo) for photo in pca_source(evidence)[2]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest_in(path: Path) -> str | None:
    """The digest that a picture carries; None where there is no picture or no digest."""
    try:
        with Image.open(path) as picture:
            return picture.info.get(DIGEST_KEY)
    except (OSError, ValueError, SyntaxError):  # Pillow raises SyntaxError for a broken PNG
        return None


def draw(name: str, evidence: Evidence, digest: str) -> bytes:
    """A picture as PNG."""
    chunks, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    chunks.add_text(DIGEST_KEY, digest)
    PICTURES[name](evidence).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()
