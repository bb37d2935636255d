"""Is the device right, by how much, where does it go wrong, and what is the error worth?

    python eval/eval_accuracy.py --device npu
    python eval/eval_accuracy.py --device npu --sweep --recipe
    python eval/eval_accuracy.py --device cuda --model_path weights/my-copy --image_path photos/

The same weights and decoded crops go through the device, through transformers' plain float32 on a reference device, and through
a golden run in float64 on the CPU, which is the reference itself where device and reference are the same thing, or with
--reference golden. PASS needs every output, and the worst single token, within the bars; "faithful" is the bar for float32
itself, a relative L2 error of 1e-5 against float64. Every block is also fed the golden run's input, so that its own error
stands beside what it inherits. Writes results/accuracy_eval.json and logs/accuracy_eval.log (accuracy_eval_cuda.* and so on for
devices other than an NPU); whatever ends it early, what was measured until then is kept in accuracy_eval_partial*.json.

Exit codes: 0 PASS; 1 FAIL; 2 wrong usage or unusable input; 3 BLOCKED: the device cannot be used; 70 unforeseen; 130 stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference  # first of all: it sets what must precede torch
import numpy as np
import torch
from inference import Device, LoadedModel, UsageError, log
from PIL import Image

import stages
import worth
from bulk import levers
from common import SAMPLES, Column, keeping, log_table, positive_float
from measures import FAITHFUL, FORMULAS, LABELS, OUTPUTS, begins, dual_thousandth, judge, passes, yardstick
from stages import GOLDEN, PLAIN, Arithmetic, outputs_of

MAX_IMAGES = 100  # every output of every image is kept in memory


# --- the run ---


@dataclass
class Run:
    """What all parts of the evaluation share: the photos, and what they are compared with."""

    args: argparse.Namespace
    device: Device
    reference: LoadedModel  # plain float32
    crops: torch.Tensor
    truth: dict[str, np.ndarray]
    plain: dict[str, np.ndarray]
    seconds: float  # of an image in plain float32
    traced: stages.Stages | None
    task: worth.Task | None = None

    @property
    def expected(self) -> dict[str, np.ndarray]:
        return self.truth if self.args.reference == "golden" else self.plain

    def judge(self, found: dict[str, np.ndarray]) -> dict[str, Any]:
        bars = self.args.threshold_percent, self.args.cosine_threshold
        return judge(found, self.expected, self.truth, bars, self.reference.pooler == "trained")


def evaluate(args: argparse.Namespace) -> int:
    """Run the whole evaluation, write log and result, and return the exit code. Whatever ends it early, its steps are kept."""
    device = inference.open_as_asked(args)
    paths, photos = read_photos(args.image_path)
    reference = inference.open_device("cpu" if args.reference == "golden" else args.reference)
    if reference.torch_device == device.torch_device and args.reference != "golden":
        log.info(f"{device.torch_device} is not compared with itself: the reference is float64 on the CPU")
        args.reference = "golden"
    model = levers.load_from_args(args, device)
    log.info(f"Loading image: {paths[0]}" if len(paths) == 1 else f"Loading {len(paths)} images")
    against = {"device": reference.kind, "device_name": reference.name, "dtype": "float32"}
    if args.reference == "golden":
        against |= {"device": "float64 on the CPU", "dtype": "float64"}
    result: dict[str, Any] = {
        "device": device.kind,
        "dtype": args.dtype,
        "reference": against,
        "image_size": model.preprocess.image_size,
        "threshold_percent": args.threshold_percent,
        "cosine_threshold": args.cosine_threshold,
        "formulas": FORMULAS,
        "stages": [],
        **inference.provenance(model),
    }
    with keeping(args, result, device) as keep:
        run = prepare(args, model, paths, reference)
        compare_device(run, model, result, keep)
        run.task = worth.prepare_task(args, photos, run.reference, run.seconds)
        keep(worth=worth.measure_worth(run.task, model, asked(args)))
        log_table(worth.WORTH_COLUMNS, worth.worth_rows(result))
        keep(decode_fast=worth.measure_fast(paths, photos, run.reference, run.task, run.plain))
        log.info("What --decode fast costs:")
        log_table(worth.FAST_COLUMNS, worth.fast_rows(result))
        if args.sweep:
            sweep(run, result, keep)
        if args.recipe:
            find_recipe(run, keep)
            log_recipe(result["recipe"])
    log_verdict(result)
    inference.write_result(args, result)
    return 0 if result["overall"] == "PASS" else 1


def asked(args: argparse.Namespace) -> Arithmetic:
    return Arithmetic(args.dtype, args.dtype, (args.allow_hf32, args.allow_hf32))


def read_photos(arguments: Sequence[str]) -> tuple[list[str], list[Image.Image]]:
    """Paths of the images, and the first of them decoded. Raises UsageError naming one that is no image."""
    paths = inference.find_images(arguments)
    if len(paths) > MAX_IMAGES:
        log.warning(f"{len(paths):,} images: the first {MAX_IMAGES} are used")
    photos: list[Image.Image] = []
    for path in paths[:MAX_IMAGES]:
        photo = inference.read_photo(path)
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
    traced = stages.prepare_stages(golden, plain, crops)
    return Run(args, model.device, plain, crops, truth, expected, seconds, traced)


def run_aloud(name: str, model: LoadedModel, arithmetic: Arithmetic, crops: torch.Tensor, size: int) -> dict[str, np.ndarray]:
    """outputs_of, with the published run's lines."""
    log.info(f"Running {name} inference ...")
    found = outputs_of(model, arithmetic, crops, size, name)
    pooler = f"pooler: {found['pooler_output'][:, 0].shape}, " if "pooler_output" in found else ""
    log.info(f"{name} {pooler}hidden: {found['last_hidden_state'].shape}")
    return found


def compare_device(run: Run, model: LoadedModel, result: dict[str, Any], keep: Callable[..., None]) -> None:
    """Keep and log how the device's run compares: outputs, stages, invariance, yardsticks."""
    args, arithmetic = run.args, asked(run.args)
    found = run_aloud(model.device.kind.upper(), model, arithmetic, run.crops, args.batch_size)
    judged = run.judge(found)
    log_published(judged, run)
    keep(**judged)
    log_table(OUTPUT_COLUMNS, output_rows(result))
    rows = stages.measure_stages(run.traced, model, arithmetic)
    keep(stages=rows, begins_at=begins(rows), starts_at=(begins(rows) or [None])[0])
    log_table(stages.STAGE_COLUMNS, result["stages"])
    log.info(f"The error starts at: {', '.join(result['begins_at']) or 'no stage; every block is as exact as plain float32'}")
    keep(invariance=stages.check_invariance(model, arithmetic, run.crops[: args.batch_size]))
    same, alone = result["invariance"], number(result["invariance"]["batch_invariance_relative_l2_error"], ".1e")
    repeats = "yes" if same["repeatable_bit_for_bit"] else "no"
    log.info(f"Alone against in a batch of {same['batch_size']}: {alone}; the same bits twice: {repeats}")
    keep(yardsticks=measure_yardsticks(run, found, model))
    log_table(YARDSTICK_COLUMNS, yardstick_rows(result))


def measure_yardsticks(run: Run, found: dict[str, np.ndarray], model: LoadedModel) -> dict[str, Any]:
    """The field's yardsticks beside plain arithmetic of the same dtype, and the patch embedding by the dual-thousandth rule."""
    peer, half = run.plain, run.args.dtype != "float32"
    if half:
        plain = Arithmetic(run.args.dtype, run.args.dtype, plain=True)
        peer = outputs_of(plain.load(run.args, run.reference.device), plain, run.crops, 2, "The yardsticks' reference")
    result = {name: yardstick(found[name], peer[name], run.truth[name], half) for name in found}
    if run.traced is not None:
        found, _ = stages.trace(model, asked(run.args), run.traced.crops)
        percent = dual_thousandth(found["patch embedding"], run.traced.golden["patch embedding"])
        result["patch_embedding"] = {"off_by_a_thousandth_percent": percent, "dual_thousandth": percent < 0.1}
    return result


# --- other arithmetics ---


def sweep(run: Run, result: dict[str, Any], keep: Callable[..., None]) -> None:
    """Keep error, verdict, where it begins, worth and throughput of each arithmetic that the device has."""
    rows: list[dict[str, Any]] = []
    for arithmetic in stages.arithmetics(run.device):
        log.info(f"Sweep: {arithmetic.name} ...")
        row: dict[str, Any] = {"arithmetic": arithmetic.name}
        try:
            row |= sweep_row(run, arithmetic)
        except (RuntimeError, UsageError) as error:  # an operator that the device lacks in this dtype, or too little memory
            inference.raise_if_lost(error)
            row |= {"overall": "not available", "reason": inference.first_line(error)}
        rows.append(row)
        keep(sweep=rows, recommended=recommend(rows))
    log_table(SWEEP_COLUMNS, sweep_rows(result))
    log.info(f"Fastest within the bar: {result['recommended'] or 'none'}")


def sweep_row(run: Run, arithmetic: Arithmetic) -> dict[str, Any]:
    """One arithmetic of the sweep: its errors, verdict, stages, smallest bar and throughput."""
    model = arithmetic.load(run.args, run.device)
    row, judged = speed_and_error(run, model, arithmetic)
    rows = stages.measure_stages(run.traced, model, arithmetic)
    row |= {
        "worst_token_relative_l2_error": judged["last_hidden_state"]["worst_token_relative_l2_error"],
        "class_token_relative_l2_error": judged["class_token"]["relative_l2_error"],
        "misses": judged["misses"],
        "begins_at": begins(rows),
        "stages": rows,
    }
    seconds = (len(run.task.views) + len(run.task.digits)) / row["throughput_img_s"]
    if run.args.views is None and run.args.probe is None and seconds > worth.SECONDS:
        flags = f"--views {worth.VIEWS} --probe {worth.DIGITS}"
        return row | {"worth": {"task": f"not run: about {seconds:.0f} s here; {flags} runs it"}}
    return row | {"worth": worth.measure_worth(run.task, model, arithmetic)}


def speed_and_error(run: Run, model: LoadedModel, arithmetic: Arithmetic) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each row says that compares arithmetics, and the whole verdict. Speed: the median of three synchronised runs."""
    size = run.args.batch_size
    judged = run.judge(outputs_of(model, arithmetic, run.crops, size, arithmetic.name))
    crops = run.crops[:size].to(model.device.torch_device)
    with arithmetic.active(model.device):
        times = [inference.time_once(model.device, lambda: inference.forward(model, crops)) for _ in range(4)]
    row = {key: judged[key] for key in ("overall", "smallest_bar_percent", "faithful")}
    row["relative_l2_error"] = judged["last_hidden_state"]["relative_l2_error"]
    return row | {"throughput_img_s": len(crops) / statistics.median(times[1:])}, judged


def recommend(rows: Sequence[dict[str, Any]]) -> str | None:
    """The fastest arithmetic that keeps the bar."""
    kept = [row for row in rows if row["overall"] == "PASS"]
    return max(kept, key=lambda row: row["throughput_img_s"])["arithmetic"] if kept else None


class CastingBlock(levers.Block):
    """A layer that computes in the dtype of its weights, whatever the one before it left."""

    def __init__(self, layer: torch.nn.Module, heads: int, used: Sequence[str]) -> None:
        super().__init__(layer, heads, used)
        self.norm_before, self.norm_after = casting(self.norm_before), casting(self.norm_after)

    def add(self, more: torch.Tensor, tokens: torch.Tensor, norm: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        return super().add(more, tokens.to(more.dtype), norm)


def casting(norm: torch.nn.LayerNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer norm of tokens in any dtype."""
    return lambda tokens: norm(tokens.to(norm.weight.dtype))


def mixed_model(args: argparse.Namespace, device: Device, first: int, last: int) -> LoadedModel:
    """bfloat16 with the `first` and the `last` layers, the embeddings and the final norm in float32."""
    model = inference.load_as_asked(args, device, dtype="float32")
    used = levers.fitting(model, [lever for lever in levers.asked_levers(args) if lever == "fused_attention"])
    layers, heads = inference.layers_of(model.module), model.module.config.num_attention_heads
    for layer in layers[first : len(layers) - last]:
        layer.to(torch.bfloat16)
    norm = model.module.layernorm
    norm.register_forward_pre_hook(lambda _norm, inputs: (inputs[0].to(norm.weight.dtype),))
    lean = levers.Lean(model, used)
    lean.blocks = [CastingBlock(layer, heads, used) for layer in layers]
    return dataclasses.replace(model, levers=(*used, "mixed_precision"), lean=lean)


def find_recipe(run: Run, keep: Callable[..., None]) -> None:
    """Keep with how many of the first, or of the last, layers in float32 bfloat16 keeps the bar, and at what throughput."""
    arithmetic, count = Arithmetic("bfloat16, some layers in float32"), len(inference.layers_of(run.reference.module))
    tried: dict[tuple[int, int], dict[str, Any]] = {}

    def tell(best: dict[str, Any] | None = None) -> None:
        keep(recipe={"layers": count, "tried": [tried[option] for option in sorted(tried)], "best": best})

    def attempt(first: int, last: int) -> bool:
        if (first, last) not in tried:
            log.info(f"Recipe: the first {first} and the last {last} of {count} layers in float32 ...")
            try:
                row, _ = speed_and_error(run, mixed_model(run.args, run.device, first, last), arithmetic)
            except (RuntimeError, UsageError) as error:
                inference.raise_if_lost(error)
                row = {"overall": "not available", "reason": inference.first_line(error)}
            tried[first, last] = {"first": first, "last": last} | row
            tell()
        return tried[first, last]["overall"] == "PASS"

    first = bisect_left(range(count), True, key=lambda number: attempt(number, 0))
    options = [(first, 0), (0, bisect_left(range(count), True, key=lambda number: attempt(0, number)))]
    kept = [tried[option] for option in options if attempt(*option)]
    tell(min(kept, key=lambda row: row["first"] + row["last"], default=None))


# --- tables: what stands in the log, the README and results/README.md ---

OUTPUT_COLUMNS = (
    Column("Output", "输出", "label"),
    Column("Filtered MRE (%)", "过滤后（%）", "relative_error.filtered_mean_relative_error", ".4f", 100),
    Column("MRE (%)", "平均相对误差（%）", "relative_error.mean_relative_error", ".4f", 100),
    Column("Max abs.", "最大绝对误差", "relative_error.max_absolute_error", ".2e"),
    Column("Mean abs.", "平均绝对误差", "relative_error.mean_absolute_error", ".2e"),
    Column("Cosine", "余弦相似度", "cosine_similarity", ".7f"),
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
    Column("Smallest bar (%)", "可达到的最小门限（%）", "smallest_bar_percent", ".2g"),
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
    Column("Smallest bar (%)", "可达到的最小门限（%）", "smallest_bar_percent", ".2g"),
    Column("Verdict", "结论", "overall"),
    Column("Images/s", "图片/秒", "throughput_img_s", ".2f"),
)
# Words that stand in the cells, for a table in Chinese.
CHINESE = {
    **dict(zip(LABELS.values(), ("池化输出", "隐藏状态", "类别词元", "图块词元均值"), strict=True)),
    **{"Patch embedding": "图块嵌入", "patch embedding": "图块嵌入", "position embedding": "位置嵌入", "pixels": "像素"},
    **{"attention": "注意力", "MLP": "MLP", "final norm": "末层归一化", "pooler": "池化层", "nowhere": "无"},
    **{
        "yes": "是",
        "no": "否",
        "kept": "保持",
        "lost": "下降",
        "none": "无",
        "not available": "不可用",
        "too few digits to say": "数字图片太少，无法判断",
    },
}


def output_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for OUTPUT_COLUMNS; of the published run's result too."""
    rows = [{"label": LABELS[name]} | result[name] for name in OUTPUTS if name in result]
    for row in rows:
        row["verdict"] = ("PASS" if passes(row) else "FAIL") + ("" if row.get("counts", True) else ", does not count")
    return rows


def sweep_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row | {"begins": ", ".join(row.get("begins_at", [])) or "nowhere"} for row in result.get("sweep") or []]


def yardstick_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    found = result.get("yardsticks") or {}
    return [{"label": LABELS[name]} | found[name] for name in OUTPUTS if name in found]


# --- the log ---


def log_published(judged: dict[str, Any], run: Run) -> None:
    """The published run's lines, in their order."""
    reference = "float64" if run.args.reference == "golden" else run.reference.device.kind.upper()
    note = " (random weights)" if run.args.random_weights else ""
    log.info(f"=== Accuracy Comparison ({run.device.kind.upper()} vs {reference}){note} ===")
    found = {LABELS[name]: judged[name] for name in OUTPUTS if name in judged}
    for label, values in found.items():
        label, mre = label.replace("Hidden", "Hidden States"), values["relative_error"]["filtered_mean_relative_error"]
        log.info(f"{label} Filtered MRE: {number(mre, '.4%')}")
        log.info(f"{label} Cosine Similarity: {number(values['cosine_similarity'], '.9f')}")
    for label, values in found.items():
        note = "" if values["counts"] else " (the pooler is not trained: reported, but it does not count)"
        log.info(f"{label} MRE < {run.args.threshold_percent:g}%: {'PASS' if values['mre_pass'] else 'FAIL'}{note}")
        log.info(f"{label} Cosine > {run.args.cosine_threshold:g}: {'PASS' if values['cosine_pass'] else 'FAIL'}{note}")
    log.info(f"Overall: {judged['overall']}")


def log_recipe(recipe: dict[str, Any]) -> None:
    log_table(RECIPE_COLUMNS, recipe["tried"])
    told, best = "no number of first or last layers", recipe["best"]
    if best:
        told = f"the first {best['first']} and the last {best['last']} of {recipe['layers']} layers, embeddings and final norm"
    log.info(f"Recipe: bfloat16 keeps the bar with {told} in float32")


def log_verdict(result: dict[str, Any]) -> None:
    """The whole in a line or two, last, where a reader looks first."""
    if result["misses"]:
        log.info(f"Over their bars: {', '.join(result['misses'])}")
    bar = number(result["smallest_bar_percent"], ".2g")
    log.info(f"Smallest bar that the relative errors of {result['dtype']} meet: {bar}%; task: {result['worth']['task']}")
    log.info(f"Faithful float32 (relative L2 against float64 <= {FAITHFUL:g}): {'yes' if result['faithful'] else 'NO'}")
    log.info(f"Overall: {result['overall']}")


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# --- command line ---


def count_of_images(text: str) -> int:
    """An argparse type."""
    if text != "0" and inference.positive_int(text) < 100:
        raise argparse.ArgumentTypeError(f"{text!r} says too little; use 0 (off) or 100 and more")
    return int(text)


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    add = parser.add_argument_group("comparison").add_argument
    add("--image_path", nargs="+", default=[str(SAMPLES)], metavar="PATH", help="images or folders (default: assets/samples)")
    what = "device of the float32 reference, or golden: float64 on the CPU (default: cpu; golden for a device against itself)"
    add("--reference", type=lambda text: text if text == "golden" else inference.device_spec(text), default="cpu", help=what)
    bar, cosine = "bar for relative errors in percent (default: 1.0)", "bar for the cosine similarity (default: 0.9999)"
    add("--threshold_percent", type=positive_float, default=1.0, metavar="P", help=bar)
    add("--cosine_threshold", type=partial(positive_float, at_most=1.0), default=0.9999, metavar="C", help=cosine)
    add("--batch_size", type=inference.positive_int, default=8, metavar="N", help="images at once (default: 8)")
    add("--sweep", action="store_true", help="compare all arithmetics of the device: which is the fastest within the bar")
    add("--recipe", action="store_true", help="find how many layers must stay in float32 for bfloat16 to keep the bar")
    fits = "where they take less than two minutes"
    views = f"views of the photos for the neighbour check, 0 for none (default: {worth.VIEWS} {fits})"
    add("--views", type=count_of_images, metavar="N", help=views)
    digits = f"scikit-learn's digits for the linear probe, 0 for none (default: {worth.DIGITS} {fits})"
    add("--probe", type=count_of_images, metavar="N", help=digits)
    levers.add_lever_arguments(parser)
    inference.add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return inference.run_script("accuracy_eval", make_parser().parse_args(argv), evaluate)


if __name__ == "__main__":
    inference.leave(main())
