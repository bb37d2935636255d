"""Draws results/ into assets/*.png; evidence.py runs it.

Each arithmetic has one colour on every panel, and the bar one that no series has. Words in a picture are the files' names, keys
and units, so that it serves a page in any language. It carries the digest of its sources, and is drawn anew when they change.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference
import numpy as np
from PIL import Image, PngImagePlugin

import eval_accuracy
import pca
import stacks
from tables import CHECKS, KINDS, PUBLISHED, blaming, stem_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from evidence import Evidence

DRAWING = 6  # raise it when a picture is drawn in another way: then all are drawn anew
DIGEST_KEY = "Source-SHA256"
FLOOR = 1e-9  # a log scale has no place for an error of 0
BAR = BAD = "#C00000"
GOOD, WAITING, OTHER, QUIET = "#2E7D32", "#B26A00", "#0072B2", "#777777"
# Okabe and Ito's colours, which the colour-blind tell apart; by what the name of an arithmetic contains, the first that fits.
COLOURS = {
    **{"autocast": "#7B4B94", "bfloat16": "#CC79A7", "float16": "#009E73"},
    **{"leaves it": "#56B4E9", "allowed": "#E69F00", "float32": "#0072B2"},
}
NAMES_APART = 1.5  # on a logarithmic axis, so that two names never lie on each other
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7B4B94", "#B26A00")


def colour_of(arithmetic: str) -> str:
    return next(colour for part, colour in COLOURS.items() if part in arithmetic)


def arithmetic_of(data: dict[str, Any]) -> str:
    """The name of a result's own arithmetic."""
    return f"{data['dtype']}, allowed" if data.get("allow_hf32") else data["dtype"]


# --- figures ---


def picture(height: float, title: str, draw: Callable[..., None], *drawn: Any) -> Image.Image:
    """What draw(figure, *drawn) draws: 1500 pixels wide, and the same on every machine, whatever its matplotlibrc says."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 16, "figure.titlesize": 15, "legend.fontsize": 14, "text.parse_math": False})
        matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.4, "lines.linewidth": 2.5, "lines.markersize": 7})
        canvas = FigureCanvasAgg(Figure(figsize=(15, height), dpi=100, layout="constrained"))
        canvas.figure.suptitle(title, x=0.01, ha="left")
        draw(canvas.figure, *drawn)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def draw_words(columns: Sequence[Sequence[tuple[str, str]]]) -> Image.Image:
    """Columns of words, each in its colour, the first of a column in bold."""
    rows = max(map(len, columns))

    def draw(figure: Figure) -> None:
        for place, column in enumerate(columns):
            for row, (words, colour) in enumerate(column):
                where = 0.01 + place / len(columns), 1 - (row + 1) / (rows + 1)
                figure.text(*where, words, color=colour, fontsize=11, va="center", weight="normal" if row else "bold")

    return picture(0.27 * rows + 0.3, "", draw)


def draw_devices(
    evidence: Evidence, name: str, draw: Callable[[Figure, dict[str, Any]], None], kinds: Sequence[str] = tuple(KINDS)
) -> Image.Image:
    """draw(figure, result) for each device that has one, below each other; where none has, what the NPU's record says."""
    charts = []
    for kind in kinds:
        data, stem = evidence.measured(name, kind), inference.result_name(name, kind)
        if data:
            with blaming(stem):
                weights = data["weights"]["source"].replace("random", "random weights")
                title = [f"results/{stem}.json", data["device_name"], data["dtype"], weights]
                title += ["partial"] if data.get("partial") else []
                charts.append(np.asarray(picture(6.5, "  |  ".join(title), draw, data)))
    if charts:
        return Image.fromarray(np.concatenate(charts))
    record = evidence.blocked(name)
    said = f"BLOCKED: {record['reason']}" if record else "0 results"
    return draw_words([[(f"results/{name}.json  |  {said}", BAD if record else QUIET)]])


Series = tuple[str, str, str, list[tuple[float, float]]]  # label, style, colour, points


def draw_series(figure: Figure, series: Sequence[Series], ticks: dict[float, str], words: tuple[str, str]) -> Axes:
    """Lines through points, with what stands at the ticks of the x axis, and the words beside both axes."""
    axes = figure.subplots()
    for label, style, colour, points in series:
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel(words[0])
    axes.set_ylabel(words[1])
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return axes


# --- what was measured ---


def photos_of(evidence: Evidence) -> tuple[list[str], list[Path]]:
    """The kind of device that has colours of photos in this folder, and the first six of them."""
    for kind in KINDS:
        if data := evidence.measured("pca", kind):
            with blaming(inference.result_name("pca", kind)):
                paths = [evidence.root / name for name in data["image_path"][:6]]
            if all(path.is_file() for path in paths):  # a user's own photos are not in this folder
                return [kind], paths
    return [], []


def draw_inference(evidence: Evidence) -> Image.Image:
    """The photos' crops in a row, and below each the colours of its patch tokens."""
    kinds, photos = photos_of(evidence)

    def draw(figure: Figure, data: dict[str, Any]) -> None:
        preprocess = inference.Preprocess(**data["preprocess"])
        axes = figure.subplots(2, len(photos), squeeze=False)
        for photo, patches, (above, below) in zip(photos, pca.colours_of(data), axes.T, strict=False):
            above.imshow(inference.crops_of([photo], preprocess)[0].numpy())
            above.set_title(photo.name, fontsize=14)
            below.imshow(patches, interpolation="nearest")
        axes[1][0].set_title(f"PCA {data['explained_variance_percent']:.1f}%", fontsize=14)
        for one in axes.flat:
            one.set_axis_off()

    return draw_devices(evidence, "pca", draw, kinds)


def draw_accuracy(evidence: Evidence) -> Image.Image:
    """The error after each stage, a line for each arithmetic of the sweep, else the run's own."""

    def draw(figure: Figure, data: dict[str, Any]) -> None:
        lines = {row["arithmetic"]: row["stages"] for row in data.get("sweep") or [] if row.get("stages")}
        lines = lines or {arithmetic_of(data): data["stages"]}
        lines = {name: [row for row in stages if row["stage"] != "pixels"] for name, stages in lines.items()}
        names = list(dict.fromkeys(row["stage"] for stages in lines.values() for row in stages))
        bars, series = {"bar": (data["threshold_percent"] / 100, BAR), "faithful": (eval_accuracy.FAITHFUL, QUIET)}, []
        for name, (height, colour) in bars.items():
            series.append((f"{name} {height:.0e}", "--", colour, [(0, height), (len(names) - 1, height)]))
        for name, stages in lines.items():
            errors = {row["stage"]: row["relative_l2_error"] for row in stages if row["relative_l2_error"] is not None}
            points = [(names.index(stage), max(error, FLOOR)) for stage, error in errors.items()]
            series.append((name, "o-", colour_of(name), points))
        ticks = {place: name.removesuffix(" attention") for place, name in enumerate(names) if not name.endswith("MLP")}
        axes = draw_series(figure, series, ticks, ("", "‖a − b‖ / ‖b‖"))
        axes.tick_params("x", rotation=90, labelsize=12)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _place: f"{value:.0e}")
        axes.set_ylim(bottom=FLOOR / 2, top=1)

    return draw_devices(evidence, "accuracy_eval", draw)


def draw_performance(evidence: Evidence) -> Image.Image:
    """Throughput by batch size of every device and of the published run, on one logarithmic axis, each line with its name."""
    lines = performance_lines(evidence)
    if not lines:
        return draw_devices(evidence, "performance_eval", draw_words)

    def draw(figure: Figure) -> None:
        axes, colours = figure.subplots(), dict(zip(lines, LINE_COLOURS, strict=False))
        sizes = sorted({size for points in lines.values() for size, _ in points})
        edge, place = 2 * sizes[-1], 0.0
        for name, points in sorted(lines.items(), key=lambda line: line[1][-1][1]):
            axes.plot(*zip(*points, strict=True), "o-", color=colours[name])
            place = max(points[-1][1], NAMES_APART * place)
            axes.plot((points[-1][0], edge), (points[-1][1], place), ":", color=colours[name], linewidth=1)
            where = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 13}
            axes.annotate(name, (edge, place), color=colours[name], **where)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, map(str, sizes))
        axes.set_xlim(sizes[0] / 1.2, edge)
        axes.yaxis.set_major_formatter(lambda value, _place: f"{value:g}")
        axes.set_xlabel("batch_size")
        axes.set_ylabel("img/s")

    return picture(6.5, "results/performance_eval*.json, results/tuned*.json, results/published/", draw)


def drawn_at_random(data: dict[str, Any]) -> str:
    return ", random weights" if data["weights"]["source"] == "random" else ""


def performance_lines(evidence: Evidence) -> dict[str, list[tuple[int, float]]]:
    """Images a second by batch size, by a line's name. A device without its own evaluation has what tune.py measured."""
    found = {}
    for kind, label in {**KINDS, "published": ""}.items():
        stem = stem_of("performance_eval", kind)
        if data := evidence.measured("performance_eval", kind):
            with blaming(stem):
                name = f"{label} {arithmetic_of(data)}{drawn_at_random(data)}" if label else f"{PUBLISHED} NPU {data['dtype']}"
                found[name] = [
                    (row["batch_size"], row["throughput_img_s"]) for row in data["results"] if "throughput_img_s" in row
                ]
        elif data := evidence.measured("tuned", kind):
            with blaming(stem_of("tuned", kind)):
                for dtype in dict.fromkeys(row["dtype"] for row in data["picks"].values() if row):
                    rates: dict[int, float] = {}
                    for row in data["rows"]:
                        if row.get("within_bar") and row["dtype"] == dtype and not row["allow_hf32"]:
                            rates[row["batch_size"]] = max(rates.get(row["batch_size"], 0), row["images_per_s"])
                    found[f"{label} {dtype}{drawn_at_random(data)} (tuned)"] = sorted(rates.items())
    return {name: points for name, points in found.items() if points}


# --- the machine, and what is submitted ---

LAYERS = ("python", "numpy", "transformers", "torch", "torch_npu", "cann")


def draw_environment(evidence: Evidence) -> Image.Image:
    """The stack of this machine, what is missing in red, beside the published run's and what is recommended for each CANN."""
    towers = []
    for stem in ("env_info", "env_info_cpu", f"{PUBLISHED}env_info"):
        if data := evidence.records.get(stem):
            found = {layer: (data.get(f"{layer}_version") or "✗").rpartition("/")[2] for layer in LAYERS}
            found["NPU"] = data.get("npu_model") or "✗"
            lines = [(f"{layer}  {version}", BAD if version == "✗" else GOOD) for layer, version in found.items()]
            towers.append([(f"{stem}.json", QUIET), *lines])
    for stack in stacks.STACKS:
        wanted = (f"{stack.python[0]} - {stack.python[-1]}", stack.numpy, "", stack.torch, stack.torch_npu, stack.cann)
        towers.append([(f"CANN {stack.cann}", QUIET), *((version, OTHER) for version in wanted)])
    return draw_words(towers)


def draw_submission(evidence: Evidence) -> Image.Image:
    """All files that are submitted, coloured by what they are: measured or drawn, BLOCKED, lacking, code."""
    listed = evidence.records.get("git_submit", {}).get("files", [])
    wanted = {path: name for name in CHECKS for path in (f"results/{name}.json", f"logs/{name}.log")}
    words = []
    for path in sorted({*listed, *wanted}):
        if path not in listed:
            words.append((f"{path}  ✗", BAD))
        elif path in wanted and evidence.blocked(wanted[path]):
            words.append((f"{path}  BLOCKED", WAITING))
        else:
            words.append((path, OTHER if path.startswith(("results/", "logs/", "assets/")) else QUIET))
    rows = -(-len(words) // 3)
    titles = ((f"{len(listed)} files", QUIET), ("", QUIET), ("", QUIET))
    return draw_words([[title, *words[rows * place : rows * (place + 1)]] for place, title in enumerate(titles)])


# --- files ---

# What draws a picture, and the beginnings of the names of the results that it shows.
PICTURES: dict[str, tuple[Callable[[Evidence], Image.Image], tuple[str, ...]]] = {
    "inference_result.png": (draw_inference, ("pca",)),
    "accuracy_eval_result.png": (draw_accuracy, ("accuracy_eval",)),
    "performance_eval_result.png": (draw_performance, ("performance_eval", "tuned", f"{PUBLISHED}performance_eval")),
    "env_check.png": (draw_environment, ("env_info", f"{PUBLISHED}env_info")),
    "git_submit_result.png": (draw_submission, ("git_submit",)),
}


def digest(name: str, evidence: Evidence) -> str:
    """SHA-256 of all that a picture is drawn from: results, photos, and the way of drawing."""
    used = {stem: data for stem, data in evidence.records.items() if stem.startswith(PICTURES[name][1])}
    parts: list[Any] = [DRAWING, name, used, stacks.STACKS, [bool(evidence.blocked(check)) for check in CHECKS]]
    if name == "inference_result.png":
        parts += [inference.sha256(photo) for photo in photos_of(evidence)[1]]
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
    PICTURES[name][0](evidence).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()
