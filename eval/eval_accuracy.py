"""Is the device right, by how much, where does it go wrong, and what is the error worth?

    python eval/eval_accuracy.py --device npu
    python eval/eval_accuracy.py --device npu --sweep --recipe
    python eval/eval_accuracy.py --device cuda --model_path weights/my-copy --image_path photos/

The same weights and decoded crops go through the device, through transformers' plain float32 on a reference device, and through
a golden run in float64 on the CPU, which is the reference itself where device and reference are the same thing, or with
--reference golden. PASS needs every output, and the worst single token, within the bars; "faithful" is the bar for float32
itself, a relative L2 error of 1e-5 against float64. Every block is also fed the golden run's input, so that its own error
stands beside what it inherits. Writes results/accuracy_eval.json and logs/accuracy_eval.log (accuracy_eval_cuda.* and so on for
devices other than an NPU); until the end, what is measured is kept in results/trial/accuracy_eval_partial.json.

Exit codes: 0 PASS; 1 FAIL; 2 wrong usage or unusable input; 3 BLOCKED: the device cannot be used; 70 unforeseen; 130 stopped.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference  # first of all: it sets what must precede torch
import numpy as np
from inference import Column, Device, LoadedModel, UsageError, log, torch
from PIL import Image

from measures import (
    FAITHFUL,
    FORMULAS,
    LABELS,
    OUTPUTS,
    begins,
    dual_thousandth,
    finite_or_null,
    judge,
    passes,
    ratio,
    relative_l2,
    yardstick,
)
from stages import (
    GOLDEN,
    PLAIN,
    STAGE_COLUMNS,
    Arithmetic,
    Stages,
    arithmetics,
    check_invariance,
    measure_stages,
    outputs_of,
    prepare_stages,
    stage_rows,
    trace,
)
from worth import DIGITS, SECONDS, VIEWS, WORTH_COLUMNS, Task, measure_worth, prepare_task, worth_rows

MAX_IMAGES = 100  # every output of every image is kept in memory


# --- the run ---


class Record:
    """The result as it grows. After each step it is written beside the final one, so that whatever ends the run, it is kept."""

    def __init__(self, args: argparse.Namespace, model: LoadedModel) -> None:
        folder = args.results if args.results_dir else inference.ROOT / "results" / "trial"
        self.path = folder / f"{inference.result_name(args.script, model.device.kind)}_partial.json"
        self.data: dict[str, Any] = {}
        self.describe = lambda: inference.provenance(args, model)
        self.made: dict[str, Any] | None = None

    def add(self, **measured: Any) -> None:
        self.made = self.made or self.describe()
        data = self.data | finite_or_null(measured)
        inference.write_json(self.path, {"partial": True} | data | self.made)
        self.data = data
        inference.stopping.last_words = f"stopped; {self.where}"

    @property
    def where(self) -> str:
        return f"what was measured is in {inference.relative_to_root(self.path)}"


class Unfinished(Exception):
    """What ended the run, and where that which was measured before is kept."""


@dataclass
class Run:
    """What all parts of the evaluation share: the photos, and what they are compared with."""

    args: argparse.Namespace
    device: Device
    reference: LoadedModel  # plain float32
    names: list[str]
    crops: torch.Tensor
    truth: dict[str, np.ndarray]
    plain: dict[str, np.ndarray]
    seconds: float  # of an image in plain float32
    stages: Stages | None
    task: Task | None = None

    @property
    def expected(self) -> dict[str, np.ndarray]:
        return self.truth if self.args.reference == "golden" else self.plain

    def judge(self, found: dict[str, np.ndarray], is_float32: bool = False) -> dict[str, Any]:
        bars = self.args.threshold_percent, self.args.cosine_threshold
        judged = judge(found, self.expected, self.truth, bars, self.reference.pooler == "trained")
        return judged | {"faithful": judged["faithful"] if is_float32 else None}


def evaluate(args: argparse.Namespace, device: Device) -> int:
    """Run the whole evaluation, write log and result, and return the exit code."""
    paths, photos = read_photos(args.image_path)
    reference = inference.open_device("cpu" if args.reference == "golden" else args.reference)
    if reference.torch_device == device.torch_device and args.reference != "golden":
        log.info(f"{device.torch_device} is not compared with itself: the reference is float64 on the CPU")
        args.reference = "golden"
    model = inference.load_from_args(args, device)
    record = Record(args, model)
    try:
        log.info(f"Loading image: {paths[0]}" if len(paths) == 1 else f"Loading {len(paths)} images")
        run = prepare(args, model, paths, reference)
        compare_device(run, record, model)
        run.task = prepare_task(args, photos, run.reference, run.seconds)
        record.add(worth=measure_worth(run.task, model, asked(args)))
        log_rows(WORTH_COLUMNS, worth_rows(record.data))
        if args.sweep:
            sweep(run, record)
        if args.recipe:
            record.add(recipe=find_recipe(run))
            log_recipe(record.data["recipe"])
    except Exception as error:
        if not record.data:
            raise
        if isinstance(error, UsageError):
            raise UsageError(f"{error}; {record.where}") from error
        raise Unfinished(f"{type(error).__name__}, {inference.first_line(error)}; {record.where}") from error
    log_verdict(record.data)
    inference.write_result(args, record.data | inference.provenance(args, model))
    record.path.unlink(missing_ok=True)
    return 0 if record.data["overall"] == "PASS" else 1


def asked(args: argparse.Namespace) -> Arithmetic:
    return Arithmetic(args.dtype, args.dtype, (args.allow_hf32, args.allow_hf32))


def read_photos(arguments: Sequence[str]) -> tuple[list[str], list[Image.Image]]:
    """Paths of the images, and the first of them decoded. Raises UsageError naming one that is no image."""
    paths = inference.find_images(arguments)
    if len(paths) > MAX_IMAGES:
        log.warning(f"{len(paths):,} images: the first {MAX_IMAGES} are used")
    photos = []
    for path in paths[:MAX_IMAGES]:
        try:
            photo = inference.decode(inference.read_bytes(path))
        except (inference.BadImage, inference.Unreadable) as error:
            raise UsageError(f"{path}: {error}") from error
        if len(photos) < 16:
            photo.thumbnail((1024, 1024))  # views need no more
            photos.append(photo)
    return paths[:MAX_IMAGES], photos


def prepare(args: argparse.Namespace, model: LoadedModel, paths: Sequence[str], reference: Device) -> Run:
    """Send the photos through float64 and through plain float32."""
    crops = inference.crops_of(paths, model.preprocess)
    golden, plain = GOLDEN.load(args, inference.open_device("cpu")), PLAIN.load(args, reference)
    truth = run_aloud("float64", golden, GOLDEN, crops, 2)
    name = "plain float32" if args.reference == "golden" else reference.kind.upper()
    started = time.perf_counter()
    expected = run_aloud(name, plain, PLAIN, crops, 2 if reference.kind == "cpu" else args.batch_size)
    seconds = (time.perf_counter() - started) / len(paths)
    stages = prepare_stages(golden, plain, crops)
    names = [Path(path).name for path in paths]
    return Run(args, model.device, plain, names, crops, truth, expected, seconds, stages)


def run_aloud(name: str, model: LoadedModel, arithmetic: Arithmetic, crops: torch.Tensor, size: int) -> dict[str, np.ndarray]:
    """outputs_of, with the published run's lines."""
    log.info(f"Running {name} inference ...")
    found = outputs_of(model, arithmetic, crops, size, name)
    pooler = f"pooler: {found['pooler_output'][:, 0].shape}, " if "pooler_output" in found else ""
    log.info(f"{name} {pooler}hidden: {found['last_hidden_state'].shape}")
    return found


def compare_device(run: Run, record: Record, model: LoadedModel) -> None:
    """Record and log how the device's run compares: outputs, stages, invariance, yardsticks."""
    args, arithmetic = run.args, asked(run.args)
    found = run_aloud(model.device.kind.upper(), model, arithmetic, run.crops, args.batch_size)
    judged = run.judge(found, args.dtype == "float32")
    log_published(judged, run)
    errors = [
        {output: relative_l2(found[output][row], run.expected[output][row]) for output in found}
        for row in range(len(run.names))
    ]
    images = [{"image": image, **error} for image, error in zip(run.names, errors, strict=True)]
    record.add(**settings(run), **judged, golden=describe_golden(run, found), images=images)
    log_rows(OUTPUT_COLUMNS, output_rows(record.data))
    rows = measure_stages(run.stages, model, arithmetic)
    record.add(stages=rows, begins_at=begins(rows), starts_at=(begins(rows) or [None])[0])
    log_stages(record.data)
    record.add(invariance=check_invariance(model, arithmetic, run.crops[: args.batch_size]))
    log_invariance(record.data["invariance"])
    record.add(yardsticks=measure_yardsticks(run, found, model))
    log_rows(YARDSTICK_COLUMNS, yardstick_rows(record.data))


def settings(run: Run) -> dict[str, Any]:
    """What the result says of how it was made."""
    args, golden = run.args, run.args.reference == "golden"
    device = {"device": "float64 on the CPU", "device_name": inference.cpu_name(), "dtype": "float64"}
    if not golden:
        device = {"device": run.reference.device.kind, "device_name": run.reference.device.name, "dtype": "float32"}
    return {
        "device": run.device.kind,
        "dtype": args.dtype,
        "reference": device,
        "image_size": run.reference.preprocess.image_size,
        "threshold_percent": args.threshold_percent,
        "cosine_threshold": args.cosine_threshold,
        "formulas": FORMULAS,
    }


def describe_golden(run: Run, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """How far plain float32 and the device are from float64, and how many times as far the device is."""
    result: dict[str, Any] = {"arithmetic": "float64 on the CPU"}
    for name in found:
        plain, device = relative_l2(run.plain[name], run.truth[name]), relative_l2(found[name], run.truth[name])
        errors = {"reference_relative_l2_error": plain, "device_relative_l2_error": device}
        result[name] = errors | {"device_to_reference_ratio": ratio(device, plain)}
    return result


def measure_yardsticks(run: Run, found: dict[str, np.ndarray], model: LoadedModel) -> dict[str, Any]:
    """The field's yardsticks beside plain arithmetic of the same dtype, and the patch embedding by the dual-thousandth rule."""
    peer, half = run.plain, run.args.dtype != "float32"
    if half:
        plain = Arithmetic(run.args.dtype, run.args.dtype, plain=True)
        peer = outputs_of(plain.load(run.args, run.reference.device), plain, run.crops, 2, "The yardsticks' reference")
    result = {name: yardstick(found[name], peer[name], run.truth[name], half) for name in found}
    if run.stages is not None:
        own = trace(model, asked(run.args), run.stages.crops, run.stages.feed).own["patch embedding"]
        percent = dual_thousandth(own, run.stages.fed.own["patch embedding"])
        result["patch_embedding"] = {"off_by_a_thousandth_percent": percent, "dual_thousandth": percent < 0.1}
    return result


# --- other arithmetics ---


def sweep(run: Run, record: Record) -> None:
    """Record error, verdict, where it begins, worth and throughput of each arithmetic that the device has."""
    rows: list[dict[str, Any]] = []
    for arithmetic in arithmetics(run.device):
        log.info(f"Sweep: {arithmetic.name} ...")
        row: dict[str, Any] = {"arithmetic": arithmetic.name, "dtype": arithmetic.dtype, "allow_hf32": any(arithmetic.hf32)}
        try:
            row |= sweep_row(run, arithmetic)
        except (RuntimeError, UsageError) as error:  # an operator that the device lacks in this dtype, or too little memory
            row |= {"overall": "not available", "reason": inference.first_line(error)}
        rows.append(row)
        record.add(sweep=rows, recommended=recommend(rows))
    log_rows(SWEEP_COLUMNS, sweep_rows(record.data))
    log.info(f"Fastest within the bar: {record.data['recommended'] or 'none'}")


def sweep_row(run: Run, arithmetic: Arithmetic) -> dict[str, Any]:
    """One arithmetic of the sweep: its errors, verdict, stages, smallest bar and throughput."""
    model, size = arithmetic.load(run.args, run.device), run.args.batch_size
    found = outputs_of(model, arithmetic, run.crops, size, arithmetic.name)
    judged = run.judge(found, arithmetic.dtype == "float32" and arithmetic.autocast is None)
    stages = measure_stages(run.stages, model, arithmetic)
    row = {
        "relative_l2_error": judged["last_hidden_state"]["relative_l2_error"],
        "worst_token_relative_l2_error": judged["last_hidden_state"]["worst_token_relative_l2_error"],
        "class_token_relative_l2_error": judged["class_token"]["relative_l2_error"],
        **{key: judged[key] for key in ("overall", "misses", "smallest_bar_percent", "faithful")},
        "begins_at": begins(stages),
        "stages": stages,
        "throughput_img_s": throughput(model, arithmetic, run.crops[:size]),
        "batch_size": len(run.crops[:size]),
    }
    images = len(run.task.views) + len(run.task.digits)
    seconds = images / row["throughput_img_s"]
    if run.args.views is None and run.args.probe is None and seconds > SECONDS:
        return row | {"worth": {"task": f"not run: about {seconds:.0f} s here; --views {VIEWS} --probe {DIGITS} runs it"}}
    return row | {"worth": measure_worth(run.task, model, arithmetic)}


def throughput(model: LoadedModel, arithmetic: Arithmetic, crops: torch.Tensor, runs: int = 3) -> float:
    """Images a second of the median of `runs` synchronised forward passes after one to warm up."""
    crops = crops.to(model.device.torch_device)
    with arithmetic.active(model.device):
        times = [inference.time_once(model.device, lambda: inference.forward(model, crops)) for _ in range(runs + 1)]
    return len(crops) / statistics.median(times[1:])


def recommend(rows: Sequence[dict[str, Any]]) -> str | None:
    """The fastest arithmetic that keeps the bar."""
    kept = [row for row in rows if row["overall"] == "PASS"]
    return max(kept, key=lambda row: row["throughput_img_s"])["arithmetic"] if kept else None


def mixed_model(args: argparse.Namespace, device: Device, first: int, last: int) -> LoadedModel:
    """bfloat16 with the `first` and the `last` layers, the embeddings and the final norm in float32."""
    levers = [lever for lever in ("fused_attention",) if lever not in args.without]
    model = inference.load_as_asked(args, device, dtype="float32", levers=levers)
    layers = inference.layers_of(model.module)
    for layer in layers[first : len(layers) - last]:
        layer.to(torch.bfloat16)

    def cast(dtype: torch.dtype) -> Callable[..., tuple]:
        return lambda _part, inputs: (inputs[0].to(dtype), *inputs[1:])

    for part in (*layers, model.module.layernorm):
        part.register_forward_pre_hook(cast(next(part.parameters()).dtype))
    return model


def least(keeps: Callable[[int], bool], count: int) -> int:
    """The smallest number from 0 to `count` that keeps, where all above it do too: `count` does without being asked."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle + 1, high)
    return low


def find_recipe(run: Run) -> dict[str, Any]:
    """With how many of the first, or of the last, layers in float32 bfloat16 keeps the bar, and at what throughput."""
    arithmetic, size = Arithmetic("bfloat16, some layers in float32"), run.args.batch_size
    tried: dict[tuple[int, int], dict[str, Any]] = {}
    count = len(inference.layers_of(run.reference.module))

    def attempt(first: int, last: int) -> bool:
        if (first, last) not in tried:
            log.info(f"Recipe: the first {first} and the last {last} of {count} layers in float32 ...")
            model = mixed_model(run.args, run.device, first, last)
            judged = run.judge(outputs_of(model, arithmetic, run.crops, size, "Recipe"))
            tried[first, last] = {
                "first": first,
                "last": last,
                "relative_l2_error": judged["last_hidden_state"]["relative_l2_error"],
                "smallest_bar_percent": judged["smallest_bar_percent"],
                "overall": judged["overall"],
                "throughput_img_s": throughput(model, arithmetic, run.crops[:size]),
            }
        return tried[first, last]["overall"] == "PASS"

    options = [(least(lambda first: attempt(first, 0), count), 0), (0, least(lambda last: attempt(0, last), count))]
    for option in options:
        attempt(*option)
    kept = [tried[option] for option in options if tried[option]["overall"] == "PASS"]
    best = min(kept, key=lambda row: row["first"] + row["last"], default=None)
    return {"layers": count, "tried": sorted(tried.values(), key=lambda row: (row["first"], row["last"])), "best": best}


# --- tables: what stands in the log, the README and results/README.md ---

OUTPUT_COLUMNS = (
    Column("Output", "输出", "label"),
    Column("Filtered MRE (%)", "过滤后平均相对误差（%）", "relative_error.filtered_mean_relative_error", ".4f", 100),
    Column("Cosine", "余弦相似度", "cosine_similarity", ".9f"),
    Column("Relative L2", "相对 L2 误差", "relative_l2_error", ".2e"),
    Column("Median token", "词元中位数", "median_token_relative_l2_error", ".2e"),
    Column("p99 token", "词元第 99 百分位", "p99_token_relative_l2_error", ".2e"),
    Column("Worst token", "最差词元", "worst_token_relative_l2_error", ".2e"),
    Column("Against float64", "相对 float64", "float64_relative_l2_error", ".2e"),
    Column("Verdict", "结论", "verdict"),
)
SWEEP_COLUMNS = (
    Column("Arithmetic", "计算方式", "arithmetic"),
    Column("Relative L2", "相对 L2 误差", "relative_l2_error", ".2e"),
    Column("Worst token", "最差词元", "worst_token_relative_l2_error", ".2e"),
    Column("Smallest bar (%)", "可达到的最小门限（%）", "smallest_bar_percent", ".4f"),
    Column("Verdict", "结论", "overall"),
    Column("Begins at", "误差起点", "begins"),
    Column("Same nearest (%)", "最近邻一致（%）", "worth.class_token.same_nearest_percent", ".1f"),
    Column("Probe (%)", "线性探针（%）", "worth.class_token.probe_percent", ".1f"),
    Column("Task", "任务精度", "worth.task"),
    Column("Images/s", "图片/秒", "throughput_img_s", ".2f"),
)
YARDSTICK_COLUMNS = (
    Column("Output", "输出", "label"),
    Column("Max error, ratio", "最大误差比", "max_ratio", ".2f"),
    Column("Mean error, ratio", "平均误差比", "mean_ratio", ".2f"),
    Column("RMSE, ratio", "均方根误差比", "rmse_ratio", ".2f"),
    Column("Ascend class", "昇腾算子等级", "class"),
    Column("MERE", "平均相对误差", "mean_relative_error", ".1e"),
    Column("< 2^-13", "< 2^-13", "within_2e-13"),
    Column("< 2^-11", "< 2^-11", "within_2e-11"),
    Column("PyTorch same()", "PyTorch same()", "same"),
)
RECIPE_COLUMNS = (
    Column("First layers in float32", "前若干层用 float32", "first"),
    Column("Last layers in float32", "后若干层用 float32", "last"),
    Column("Relative L2", "相对 L2 误差", "relative_l2_error", ".2e"),
    Column("Smallest bar (%)", "可达到的最小门限（%）", "smallest_bar_percent", ".4f"),
    Column("Verdict", "结论", "overall"),
    Column("Images/s", "图片/秒", "throughput_img_s", ".2f"),
)
# Words that stand in the cells, for a table in Chinese.
CHINESE = {
    **dict(zip(LABELS.values(), ("池化输出", "隐藏状态", "类别词元", "图块词元均值"), strict=True)),
    **{"Patch embedding": "图块嵌入", "patch embedding": "图块嵌入", "position embedding": "位置嵌入", "pixels": "像素"},
    **{"attention": "注意力", "MLP": "MLP", "final norm": "末层归一化", "pooler": "池化层", "nowhere": "无"},
    **{"yes": "是", "no": "否", "kept": "保持", "lost": "下降", "none": "无", "not available": "不可用"},
}


def output_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for OUTPUT_COLUMNS; of the published run's result too."""
    rows = []
    for name in (name for name in OUTPUTS if name in result):
        values = result[name]
        verdict = "PASS" if passes(values) else "FAIL"
        rows.append(
            values | {"label": LABELS[name], "verdict": verdict if values.get("counts", True) else f"{verdict}, does not count"}
        )
    return rows


def sweep_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row | {"begins": ", ".join(row.get("begins_at", [])) or "nowhere"} for row in result.get("sweep") or []]


def yardstick_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    found = result.get("yardsticks") or {}
    named = [(LABELS[name], found[name]) for name in OUTPUTS if name in found]
    words = {True: "yes", False: "no"}
    return [
        {"label": label} | {key: words.get(value, value) if isinstance(value, bool) else value for key, value in row.items()}
        for label, row in named
    ]


def recipe_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return (result.get("recipe") or {}).get("tried", [])


# --- the log ---


def log_rows(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        inference.log_table(columns, rows)


def log_published(judged: dict[str, Any], run: Run) -> None:
    """The published run's lines, in their order."""
    reference = "float64" if run.args.reference == "golden" else run.reference.device.kind.upper()
    note = " (random weights)" if run.args.random_weights else ""
    log.info(f"=== Accuracy Comparison ({run.device.kind.upper()} vs {reference}){note} ===")
    found = {name: judged[name] for name in OUTPUTS if name in judged}
    for name, values in found.items():
        label = LABELS[name].replace("Hidden", "Hidden States")
        mre = values["relative_error"]["filtered_mean_relative_error"]
        log.info(f"{label} Filtered MRE: {'-' if mre is None else f'{100 * mre:.4f}%'}")
        log.info(f"{label} Cosine Similarity: {_number(values['cosine_similarity'], '.9f')}")
    for name, values in found.items():
        note = "" if values["counts"] else " (the pooler is not trained: reported, but it does not count)"
        bars = (
            (f"MRE < {run.args.threshold_percent:g}%", "mre_pass"),
            (f"Cosine > {run.args.cosine_threshold:g}", "cosine_pass"),
        )
        for bar, key in bars:
            log.info(f"{LABELS[name]} {bar}: {'PASS' if values[key] else 'FAIL'}{note}")
    log.info(f"Overall: {judged['overall']}")


def log_stages(result: dict[str, Any]) -> None:
    golden = result["golden"]["last_hidden_state"]
    plain, device = golden["reference_relative_l2_error"], golden["device_relative_l2_error"]
    log.info(f"Against float64: plain float32 is off by {_number(plain, '.2e')}, the device by {_number(device, '.2e')}")
    log_rows(STAGE_COLUMNS, stage_rows(result))
    log.info(f"The error starts at: {', '.join(result['begins_at']) or 'no stage; every block is as exact as plain float32'}")


def log_invariance(found: dict[str, Any]) -> None:
    alone, repeats = found["batch_invariance_relative_l2_error"], "yes" if found["repeatable_bit_for_bit"] else "no"
    log.info(f"Alone against in a batch of {found['batch_size']}: {_number(alone, '.1e')}; the same bits twice: {repeats}")


def log_recipe(recipe: dict[str, Any]) -> None:
    log_rows(RECIPE_COLUMNS, recipe["tried"])
    best = recipe["best"]
    if best is None:
        log.info("Recipe: no number of first or last layers in float32 lets bfloat16 keep the bar")
        return
    layers = f"the first {best['first']} and the last {best['last']} of {recipe['layers']} layers, embeddings and final norm"
    log.info(f"Recipe: bfloat16 keeps the bar with {layers} in float32, at {best['throughput_img_s']:.2f} img/s")


def log_verdict(result: dict[str, Any]) -> None:
    """The whole in a line or two, last, where a reader looks first."""
    if result["misses"]:
        log.info(f"Over their bars: {', '.join(result['misses'])}")
    bar = _number(result["smallest_bar_percent"], ".4f")
    log.info(f"Smallest bar that {result['dtype']} meets: {bar}%; task: {result['worth']['task']}")
    if result["faithful"] is not None:
        log.info(f"Faithful float32 (relative L2 against float64 <= {FAITHFUL:g}): {'yes' if result['faithful'] else 'NO'}")
    log.info(f"Overall: {result['overall']}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


# --- command line ---


def _bar(limit: float) -> Callable[[str], float]:
    """An argparse type: a number above zero and at most `limit`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (0 < value <= limit and math.isfinite(value)):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number above 0{'' if limit == math.inf else f' and at most {limit:g}'}"
            )
        return value

    return convert


def _count(least_count: int) -> Callable[[str], int]:
    """An argparse type: 0, or a whole number from `least_count`."""

    def convert(text: str) -> int:
        value = 0 if text == "0" else inference.positive_int(text)
        if 0 < value < least_count:
            raise argparse.ArgumentTypeError(f"{text!r} says too little; use 0 (off) or {least_count} and more")
        return value

    return convert


def _reference(text: str) -> str:
    return text if text == "golden" else inference.device_spec(text)


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    group = parser.add_argument_group("comparison")
    add, samples = group.add_argument, str(inference.ROOT / "assets" / "samples")
    add("--image_path", nargs="+", default=[samples], metavar="PATH", help="images or folders (default: assets/samples)")
    help_reference = (
        "device of the float32 reference, or golden: float64 on the CPU (default: cpu; golden for a device against itself)"
    )
    add("--reference", type=_reference, default="cpu", help=help_reference)
    add(
        "--threshold_percent",
        type=_bar(math.inf),
        default=1.0,
        metavar="P",
        help="bar for relative errors in percent (default: 1.0)",
    )
    add(
        "--cosine_threshold",
        type=_bar(1.0),
        default=0.9999,
        metavar="C",
        help="bar for the cosine similarity (default: 0.9999)",
    )
    add("--batch_size", type=inference.positive_int, default=8, metavar="N", help="images at once (default: 8)")
    add("--sweep", action="store_true", help="compare all arithmetics of the device: which is the fastest within the bar")
    add("--recipe", action="store_true", help="find how many layers must stay in float32 for bfloat16 to keep the bar")
    views = f"views of the photos for the neighbour check, 0 for none (default: {VIEWS} where they take less than two minutes)"
    add("--views", type=_count(100), metavar="N", help=views)
    digits = f"scikit-learn's digits for the linear probe, 0 for none (default: {DIGITS} where they take less than two minutes)"
    add("--probe", type=_count(100), metavar="N", help=digits)
    inference.add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return inference.run_script("accuracy_eval", make_parser().parse_args(argv), evaluate)


if __name__ == "__main__":
    sys.exit(main())
