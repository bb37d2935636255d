"""What the pages say: each table as headings and rows in English, one mapping into Chinese, and one way to Markdown.

evidence.py puts these tables between the markers of README.md and README.zh.md, and writes results/README.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference
from inference import UsageError

import end_to_end
import eval_accuracy
import eval_performance
import stacks
from common import Column

if TYPE_CHECKING:
    from evidence import Evidence

KINDS = {"npu": "NPU", "cuda": "GPU", "cpu": "CPU"}
PUBLISHED = "published/"


class Table(NamedTuple):
    """Headings in English and Chinese, and rows of Markdown cells in English."""

    headings: Sequence[tuple[str, str]]
    rows: list[list[str]]


Part = str | Table  # a string is Markdown in English


# --- the one way to Markdown, and to Chinese ---

WORDS = eval_accuracy.CHINESE | {
    **{"Inference": "推理", "Accuracy": "精度", "Performance": "性能", "runs": "可运行", "images/s": "图片/秒"},
    **{"filtered MRE": "过滤后 MRE", "bar": "门限", "cosine": "余弦", "relative L2": "相对 L2", "worst token": "最差词元"},
    **{"unfiltered mean": "未过滤平均", "not recorded": "未记录", "best": "最高", "latency": "延迟", "[published]": "[已公布]"},
    **{"batch": "批大小", "times the published rate": "× 已公布吞吐", "times its latency": "× 其延迟"},
    **{"not measured": "未测量", "random weights": "随机权重", "partial": "不完整", "against": "对比"},
    **{"means nothing": "无意义", "does not count": "不计入", "not finite": "非有限值"},
    **{"out of memory": "内存不足", "launch-bound": "受下发限制", "unsteady": "不稳定"},
    **{"HF32 or TF32 allowed": "允许 HF32 或 TF32"},
    **{"torch_npu is not installed": "未安装 torch_npu", "CANN is not installed or not set up": "CANN 未安装或未配置环境"},
    **{"torch sees no NPU": "torch 找不到 NPU", "CANN's compiler cannot start": "CANN 编译器无法启动"},
    **{"torch_npu does not fit this torch or this CANN": "torch_npu 与当前 torch 或 CANN 不匹配"},
    **{"do not go together": "不匹配", "is listed but fails at first use": "已列出但首次使用失败"},
    **{"torch_npu cannot be used": "torch_npu 无法使用"},
    **{"forward pass": "前向计算", "folder of photos to features": "照片文件夹到特征"},
}
PHRASES = re.compile("|".join(rf"(?<!\w){re.escape(words)}(?!\w)" for words in sorted(WORDS, key=len, reverse=True)))
WIDE = str.maketrans(",;:", "，；：")


def chinese(text: str) -> str:
    """Markdown with the words of WORDS in Chinese; names, numbers, links, PASS, FAIL and BLOCKED stay."""
    text = PHRASES.sub(lambda found: WORDS[found[0]], text)
    return re.sub(r"(?<=[\u4e00-\u9fff*])[,;:] ", lambda found: found[0][0].translate(WIDE), text)


def render(parts: Sequence[Part], language: str) -> str:
    """Markdown in "en" or "zh", an empty line before each part; a block of code is the same in both."""
    said, lines = (chinese if language == "zh" else str), []
    for part in parts:
        lines.append("")
        if isinstance(part, Table):
            rows = [[heading[language == "zh"] for heading in part.headings], ["---"] * len(part.headings)]
            rows += [[said(cell) for cell in row] for row in part.rows]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
        else:
            lines.append(part if part.startswith("```") else said(part))
    return "\n".join(lines)


# --- what tables are made of ---


def stem_of(name: str, kind: str) -> str:
    """A result's file for a kind of device, without results/ and .json."""
    return PUBLISHED + name if kind == "published" else inference.result_name(name, kind)


@contextmanager
def blaming(stem: str) -> Iterator[None]:
    """Whatever is missing or of a wrong type in a result becomes one line that names its file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else inference.first_line(error)
        raise UsageError(f"results/{stem}.json: not as its script writes it ({what}); make it again") from error


def plain(value: Any) -> str:
    """Text of a file as Markdown that shows just this text, on one line."""
    return re.sub(r"([\\|*`<\[\]])", r"\\\1", " ".join(str(value).split()))


def label_of(data: dict[str, Any]) -> str:
    """What a row calls the device of a result: also its arithmetic, what it is compared with, random weights, half a run."""
    if "weights" not in data:
        return "published Ascend run, **not this code**"
    label, reference = KINDS[data["device"]], data.get("reference")
    ways = [data.get("dtype"), data.get("execution"), "HF32 or TF32 allowed" if data.get("allow_hf32") else None]
    label += "".join(f", **{way}**" for way in ways if way not in (None, "float32", "eager"))
    if reference:
        label += f" against {KINDS.get(reference['device'], reference['dtype'])}"
    label += ", **random weights**" if data["weights"]["source"] == "random" else ""
    return label + (", **partial**" if data.get("partial") else "")


def device_table(
    evidence: Evidence, name: str, columns: Sequence[Column], rows_of: Callable, kinds: Sequence[str] = tuple(KINDS)
) -> Table:
    """Rows of a result, rows_of(result), for each kind of device that has it."""
    table = Table([("Device", "设备"), *(column[:2] for column in columns)], [])
    for kind in kinds:
        if data := evidence.measured(name, kind):
            with blaming(stem_of(name, kind)):
                rows = [[label_of(data), *(plain(column.cell(row)) for column in columns)] for row in rows_of(data)]
                table.rows.extend(rows)
    return table


# --- the tables of the READMEs ---


def audit_inference(data: dict[str, Any], _published: dict[str, Any] | None) -> str:
    shape = " x ".join(map(str, data["last_hidden_shape"]))
    return f"**runs**: {shape}, {1e3 * data['inference_time_s']:.2f} ms, {data['throughput_img_s']:.2f} images/s"


ERRORS = (
    Column("filtered MRE", "", "relative_error.filtered_mean_relative_error", ".4%"),
    Column("unfiltered mean", "", "relative_error.mean_relative_error", ".3%"),
    Column("cosine", "", "cosine_similarity", ".6f"),
    Column("relative L2", "", "relative_l2_error", ".1e"),
    Column("worst token", "", "worst_token_relative_l2_error", ".1e"),
)


def audit_accuracy(data: dict[str, Any], _published: dict[str, Any] | None) -> str:
    hidden = data["last_hidden_state"]
    none = "NaN" if "relative_l2_error" in hidden else "not recorded"
    errors = [f"{column.en} {column.cell(hidden, none)}" for column in ERRORS]
    return f"**{data['overall']}** (bar {data.get('threshold_percent', 1):g}%): {', '.join(errors)}"


def audit_performance(data: dict[str, Any], published: dict[str, Any] | None) -> str:
    """The best throughput, and the latency of the smallest batch, also as multiples of the published ones."""
    rows = [row for row in data["results"] if "throughput_img_s" in row]
    if not rows:
        return "out of memory"
    best, first = max(rows, key=lambda row: row["throughput_img_s"]), min(rows, key=lambda row: row["batch_size"])
    said = f"best {best['throughput_img_s']:.2f} images/s (batch {best['batch_size']}), "
    said += f"latency {1e3 * first['p50_s']:.2f} ms (batch {first['batch_size']})"
    if published is None:
        return said
    rate = best["throughput_img_s"] / max(row["throughput_img_s"] for row in published["results"])
    latency = first["p50_s"] / min(published["results"], key=lambda row: row["batch_size"])["p50_s"]
    return f"{said}: {rate:.2f} times the published rate, {latency:.2f} times its latency"


# A deliverable's name, and what is said of its result.
CHECKS = {
    "inference": ("Inference", audit_inference),
    "accuracy_eval": ("Accuracy", audit_accuracy),
    "performance_eval": ("Performance", audit_performance),
}
AUDIT = (
    ("Check", "检查项"),
    ("This code on an NPU", "本代码在 NPU 上"),
    ("Published Ascend run (not made by this code)", "已公布的昇腾运行（非本代码）"),
    ("Files", "文件"),
)


def audit(evidence: Evidence) -> list[Part]:
    """The first screen: what runs, how exact, how fast, on which evidence, beside the published run."""
    rows = []
    for name, (check, describe) in CHECKS.items():
        data, published, record = evidence.measured(name), evidence.measured(name, "published"), evidence.blocked(name)
        with blaming(name):
            ours = f"**BLOCKED**: {plain(record['reason'])}" if record else "not measured"
            ours = describe(data, published) + label_of(data).removeprefix("NPU") if data else ours
        with blaming(PUBLISHED + name):
            theirs = describe(published, None) if published else "not recorded"
        paths = (f"results/{name}.json", f"logs/{name}.log", f"assets/{name}_result.png")
        found = [path for path in paths if path.startswith("assets/") or (evidence.root / path).is_file()]  # drawn after this
        files = [f"[{path[path.rindex('.') + 1 :]}]({path})" for path in found]
        rows.append([check, ours, theirs, f"{', '.join(files)}; [published](results/{PUBLISHED}{name}.json)"])
    return [Table(AUDIT, rows)]


# The columns of a README's tables; results/README.md has all.
KEPT = {
    *("label", "relative_error.filtered_mean_relative_error", "cosine_similarity", "relative_l2_error"),
    *("worst_token_relative_l2_error", "verdict", "batch_size", "p50_s", "throughput_img_s", "memory_mb"),
    *("share_of_limit_percent", "remarks", "what", "images_per_s", "million_h", "billion_8_h", "billion_64_h"),
}


def short_table(name: str, columns: Sequence[Column], rows_of: Callable, evidence: Evidence) -> list[Part]:
    """The NPU's rows, or BLOCKED and the other devices' rows."""
    columns, measured = [column for column in columns if column.key in KEPT], evidence.measured(name)
    table = device_table(evidence, name, columns, rows_of, ["npu"] if measured else ["cuda", "cpu"])
    if not measured:  # the reason stands in the audit
        why = "**BLOCKED**" if evidence.blocked(name) else "not measured"
        table.rows.insert(0, ["NPU", why, *["-"] * (len(columns) - 1)])
    return [table]


def versions(evidence: Evidence) -> list[Part]:
    """The whole line for a bare host, by CANN, with every torch_npu recommended there and where pip resolves the line."""
    tried, lines = evidence.records.get("install_resolution", {}).get("resolved", []), []
    for stack in stacks.STACKS:
        pythons = [one["python"] for one in tried if one["cann"] == stack.cann and one["resolves"]]
        lines.append(f"# CANN {stack.cann}: torch_npu {', '.join(stack.paired)}; Python {', '.join(pythons) or '-'}")
        lines.append(stacks.install_line(stack))
    return ["\n".join(["```text", *lines, "```"])]


# Of each log: the key lines, and how many of them at most, the last ones.
LOG_LINES = {
    "inference": ("Last hidden state shape|Inference time|Throughput", 3),
    "accuracy_eval": ("Hidden States Filtered MRE|Hidden States Cosine Similarity|Overall", 3),
    "performance_eval": ("--- Batch size|Throughput", 2),
}


def log_lines(evidence: Evidence) -> list[Part]:
    """The key lines of the logs of the results, the NPU's before others, or of an NPU that is BLOCKED."""
    lines = []
    for name, (wanted, most) in LOG_LINES.items():
        stem = inference.result_name(name, next((kind for kind in KINDS if evidence.measured(name, kind)), "npu"))
        path = evidence.root / "logs" / f"{stem}.log"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        runs = re.split(r"^(?=.*\[INFO\] Device: \S+, .*\)$)", text, flags=re.MULTILINE)
        saved = next((run for run in reversed(runs) if f"Results saved to results/{stem}.json" in run), "")
        said = re.findall(rf"^.*\] (?:{wanted}|BLOCKED: ).*$", saved, re.MULTILINE)
        found = list({line[24:]: line for line in said}.values())[-most:]  # a verdict stands there twice
        lines += [f"# logs/{stem}.log", *found] if found else []
    return ["\n".join(["```text", *lines, "```"])] if lines else ["not measured"]


TABLES: dict[str, Callable[[Evidence], list[Part]]] = {
    **{"audit": audit, "versions": versions, "log": log_lines},
    "accuracy": partial(short_table, "accuracy_eval", eval_accuracy.OUTPUT_COLUMNS, eval_accuracy.output_rows),
    "performance": partial(short_table, "performance_eval", eval_performance.ROW_COLUMNS, eval_performance.rows),
    "rates": partial(short_table, "performance_eval", end_to_end.SCALE_COLUMNS, end_to_end.scale_rows),
}
