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

import checked
import eval_accuracy
import eval_performance
import stacks
import tune
from common import Column

if TYPE_CHECKING:
    from evidence import Evidence

KINDS = {"npu": "NPU", "cuda": "GPU", "cpu": "CPU"}
PUBLISHED = "published/"
TRAINED = "trained_vit/accuracy_eval_cpu"  # the evaluation with the small trained model of the tests


class Table(NamedTuple):
    """Headings in English and Chinese, and rows of Markdown cells in English."""

    headings: Sequence[tuple[str, str]]
    rows: list[list[str]]


Part = str | Table  # a string is Markdown in English


# --- the one way to Markdown, and to Chinese ---

LIFTED = "A host with an Ascend NPU lifts it: follow Set-up there, then run `python eval/submit.py --device npu`."
WORDS = eval_accuracy.CHINESE | {
    **{"Repository": "仓库", "Hardware metadata": "硬件元数据", "NPU inference output": "NPU 推理输出"},
    **{"Accuracy requirement: error below 1%": "精度要求：误差低于 1%", "Performance evidence": "性能证据"},
    **{
        "Evidence files": "证据文件",
        "no NPU here": "本机无 NPU",
        "environment": "环境",
        "runs": "可运行",
        "images/s": "图片/秒",
    },
    **{
        "published Ascend run": "已公布的昇腾运行",
        "not this code": "非本代码",
        "published, **not this code**": "已公布，**非本代码**",
    },
    **{"complete": "已完成", "missing": "缺失", "ran on": "已运行于"},
    **{"throughput": "吞吐", "faithful": "忠实", "without": "不用", "with": "使用", "HF32, TF32 allowed": "允许 HF32、TF32"},
    LIFTED: "在有昇腾 NPU 的主机上即可解除：按“安装”一节设置，再运行 `python eval/submit.py --device npu`。",
    **{"filtered MRE": "过滤后 MRE", "bar": "门限", "cosine": "余弦", "relative L2": "相对 L2", "worst token": "最差词元"},
    **{"unfiltered mean": "未过滤平均", "not recorded": "未记录", "best": "最高", "latency": "延迟", "[published]": "[已公布]"},
    **{"batch": "批大小", "times the published rate": "× 已公布吞吐", "times its latency": "× 其延迟"},
    **{
        "not measured": "未测量",
        "random weights": "随机权重",
        "random&nbsp;weights": "随机权重",
        "partial": "不完整",
        "against": "对比",
    },
    **{"means nothing": "无意义", "does not count": "不计入", "not finite": "非有限值"},
    **{"out of memory": "内存不足", "launch-bound": "受下发限制", "unsteady": "不稳定"},
    **{"HF32 or TF32 allowed": "允许 HF32 或 TF32"},
    **{"torch_npu is not installed": "未安装 torch_npu", "CANN is not installed or not set up": "CANN 未安装或未配置环境"},
    **{"torch sees no NPU": "torch 找不到 NPU", "CANN's compiler cannot start": "CANN 编译器无法启动"},
    **{"torch_npu does not fit this torch or this CANN": "torch_npu 与当前 torch 或 CANN 不匹配"},
    **{"do not go together": "不匹配", "is listed but fails at first use": "已列出但首次使用失败"},
    **{"threads": "线程", "CANN finds no device": "CANN 找不到设备", "CANN cannot start the device": "CANN 无法启动设备"},
    **{"CANN knows no device of this number": "CANN 没有此编号的设备", "a library of the system is missing": "缺少系统库"},
    "the driver is too old for this CANN": "驱动版本对当前 CANN 过旧",
    "libc++ is missing, which this CANN needs": "缺少当前 CANN 所需的 libc++",
    **{"this user may not open the device": "当前用户无权打开设备", "the driver reports an error of its own": "驱动自身报错"},
    "this torch_npu is built for another Python": "torch_npu 为另一 Python 版本编译",
    "torch_npu cannot work beside a CUDA build of torch on a machine with a GPU": "有 GPU 时不能与 CUDA 版 torch 共存",
    "a library asks for thread-local memory after others have taken it": "静态 TLS 空间已被其他库占用",
    **{"torch_npu cannot be used": "torch_npu 无法使用"},
    checked.PROVES: "未经修改的 torch_npu 运行于 CANN 替身之上，证明的是 torch_npu 如何执行本代码：下发、捕获、拷贝了什么，"
    "数值是否正确；不证明 CANN、其算子与速度。",
    **{"no hardware": "无硬件", "ways": "种方式", "error against the CPU": "与 CPU 对比的误差"},
    **{"no speed": "无速度数据", "operators an image": "每张图片算子数", "default": "默认", "all levers": "全部手段"},
    **{"captured as a graph": "可捕获成图", "features": "特征相差", "off those of `exact`": "（相对 `exact`）"},
    **{"of views keep their nearest neighbour": "的视图最近邻不变"},
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


def label_of(data: dict[str, Any], is_short: bool = False) -> str:
    """What a row calls the device of a result: also its arithmetic, what it is compared with, random weights, half a run.

    is_short: for the narrow tables of a README, on two lines at most, and without what it is compared with.
    """
    if "weights" not in data:
        return "published, **not this code**" if is_short else "published Ascend run, **not this code**"
    label, reference = KINDS[data["device"]], data.get("reference")
    ways = [data.get("dtype"), data.get("execution"), "HF32 or TF32 allowed" if data.get("allow_hf32") else None]
    label += "".join(f", **{way}**" for way in ways if way not in (None, "float32", "eager"))
    if reference and not is_short:
        label += f" against {KINDS.get(reference['device'], reference['dtype'])}"
    random = "random&nbsp;weights" if is_short else "random weights"
    label += f", **{random}**" if data["weights"]["source"] == "random" else ""
    return label + (", **partial**" if data.get("partial") else "")


def device_table(
    evidence: Evidence,
    name: str,
    columns: Sequence[Column],
    rows_of: Callable,
    kinds: Sequence[str] = tuple(KINDS),
    is_short: bool = False,
) -> Table:
    """Rows of a result, rows_of(result), for each kind of device that has it."""
    table = Table([("Device", "设备"), *(column[:2] for column in columns)], [])
    for kind in kinds:
        if data := evidence.measured(name, kind):
            with blaming(stem_of(name, kind)):
                rows = [[label_of(data, is_short), *(plain(column.cell(row)) for column in columns)] for row in rows_of(data)]
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
    recorded = [column for column in ERRORS if "weights" in data or column.cell(hidden) != "-"]
    errors = [f"{column.en} {column.cell(hidden, 'NaN')}" for column in recorded]
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
    "inference": ("NPU inference output", audit_inference),
    "accuracy_eval": ("Accuracy requirement: error below 1%", audit_accuracy),
    "performance_eval": ("Performance evidence", audit_performance),
}
AUDIT = (
    ("Audit item", "审核项"),
    ("Result", "直接结果"),
    ("Real torch_npu, over a stand-in for CANN", "真实 torch_npu，运行于 CANN 替身之上"),
    ("Published Ascend run (not made by this code)", "已公布的昇腾运行（非本代码）"),
)


def audit(evidence: Evidence) -> list[Part]:
    """The first screen: the card's items, what this code gave on an NPU, and beside it the published run."""
    machine, theirs = evidence.records.get("env_info", {}), evidence.records.get(f"{PUBLISHED}env_info", {})
    shown = checked_cells(evidence)
    npu = machine.get("npu_model") if not machine.get("npu_blocked_reason") else None
    rows = [
        ["Repository", *["webssl-mae300m-npu"] * 3],
        ["Hardware metadata", f"NPU, `#+NPU`; {plain(npu or 'no NPU here')}", shown[0], stack_of(theirs)],
    ]
    for (name, (check, describe)), cell in zip(CHECKS.items(), shown[1:], strict=True):
        data, published, record = evidence.measured(name), evidence.measured(name, "published"), evidence.blocked(name)
        with blaming(name):
            ours = describe(data, published) + label_of(data).removeprefix("NPU") if data else "not measured"
        with blaming(PUBLISHED + name):
            said = describe(published, None) if published else "not recorded"
        rows.append([check, "**BLOCKED**" if record else ours, cell, said])
    files = [("environment", OURS_OF_MACHINE), *((f"`{name}`", tuple(way.format(name) for way in OURS)) for name in CHECKS)]
    without = [("`torch_npu_check`", (f"results/{checked.NAME}.json",))]
    published = [(f"`{name}`", tuple(way.format(name) for way in THEIRS)) for name in CHECKS]
    rows.append(["Evidence files", *(links_of(evidence, column) for column in (files, without, published))])
    return [Table(AUDIT, rows), *blocked_words(evidence)]


def checked_cells(evidence: Evidence) -> list[str]:
    """What tests/cann/check.py found without an NPU, in the audit's words."""
    if not (data := evidence.records.get(checked.NAME)):
        return ["not measured"] * (1 + len(CHECKS))
    with blaming(checked.NAME):
        return checked.audit_cells(data)


def stack_of(machine: dict[str, Any]) -> str:
    """A machine's NPU, CANN and torch_npu."""
    cann = str(machine.get("cann_version")).rpartition("cann-")[2]
    torch_npu = str(machine.get("torch_npu_version")).partition("+")[0]
    return plain(f"{machine['npu_model']}, CANN {cann}, torch_npu {torch_npu}") if machine else "not recorded"


OURS = ("results/{}.json", "logs/{}.log", "assets/{}_result.png")
OURS_OF_MACHINE = ("results/env_info.json", "logs/env_check.log", "assets/env_check.png")
THEIRS = ("results/published/{}.json", "logs/published/{}.log")


def links_of(evidence: Evidence, groups: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Links to those of the groups' files that are there; pictures are drawn after this."""
    told = []
    for label, paths in groups:
        found = [path for path in paths if path.startswith("assets/") or (evidence.root / path).is_file()]
        told += [f"{label}: " + ", ".join(f"[{path.rpartition('.')[2]}]({path})" for path in found)] if found else []
    return "; ".join(told) or "-"


def blocked_words(evidence: Evidence) -> list[Part]:
    """The reasons for BLOCKED, each once, and what lifts it."""
    records = filter(None, map(evidence.blocked, CHECKS))
    reasons = list(dict.fromkeys(plain(record["reason"]) for record in records))
    return [f"**BLOCKED**: {'; '.join(reasons)}. {LIFTED}"] if reasons else []


# What the card asks for: where it is, the files that make it complete, and the results that say on what it ran.
DELIVERABLES = (
    (("inference.py",), ("inference.py",), ("inference",)),
    (("README.md",), ("README.md", "README.zh.md"), ()),
    (("eval/eval_accuracy.py",), ("eval/eval_accuracy.py",), ("accuracy_eval",)),
    (("eval/eval_performance.py",), ("eval/eval_performance.py",), ("performance_eval",)),
    (
        ("logs/", "results/", "assets/"),
        (*OURS_OF_MACHINE[:2], *(way.format(name) for way in OURS[:2] for name in CHECKS)),
        tuple(CHECKS),
    ),
)


def deliverables(evidence: Evidence) -> list[Part]:
    """The card's files: whether they are there, on which devices they ran, and whether the NPU's part is BLOCKED."""
    rows = []
    for places, paths, names in DELIVERABLES:
        missing = [path for path in paths if not (evidence.root / path).is_file()]
        states = [f"missing: {', '.join(missing)}" if missing else "complete"]
        if names and places[0].endswith(".py"):
            ran = [label for kind, label in KINDS.items() if all(evidence.measured(name, kind) for name in names)]
            states += [f"ran on {', '.join(ran)}"] if ran else []
        states += ["NPU **BLOCKED**"] if any(evidence.blocked(name) for name in names) else []
        rows.append([", ".join(f"[{place}]({place})" for place in places), "; ".join(states)])
    return [Table((("Deliverable", "交付物"), ("State", "状态")), rows)]


# The columns of a README's tables; results/README.md has all.
KEPT = {
    *("label", "relative_error.filtered_mean_relative_error", "relative_error.mean_relative_error", "cosine_similarity"),
    *("relative_error.max_absolute_error", "relative_error.mean_absolute_error", "relative_l2_error"),
    *("worst_token_relative_l2_error", "verdict", "batch_size", "mean_time_s", "std_time_s", "p50_s", "earned_p95_s"),
    *("throughput_img_s", "memory_mb", "share_of_limit_percent", "remarks"),
}


def card_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The two outputs that the card asks for; the class token and the mean patch token stand in results/README.md."""
    return eval_accuracy.output_rows(result)[:2]


def short_table(name: str, columns: Sequence[Column], rows_of: Callable, evidence: Evidence) -> list[Part]:
    """Every device's rows, the published run's last; of an NPU that has none, BLOCKED."""
    columns = [column for column in columns if column.key in KEPT]
    table = device_table(evidence, name, columns, rows_of, [*KINDS, "published"], is_short=True)
    if table.rows and columns[-1].key == "remarks" and all(row[-1] == "-" for row in table.rows):
        table = Table(table.headings[:-1], [row[:-1] for row in table.rows])
    if not evidence.measured(name):  # the reason stands below the audit
        why = "**BLOCKED**" if evidence.blocked(name) else "not measured"
        table.rows.insert(0, ["NPU", why, *["-"] * (len(table.headings) - 2)])
    return [table]


def record_table(evidence: Evidence, name: str, columns: Sequence[Column], rows_of: Callable) -> Table:
    """Rows of a record that is of no device of ours; none where it is not there."""
    with blaming(name):
        rows = rows_of(evidence.records[name]) if name in evidence.records else []
        return Table([column[:2] for column in columns], [[plain(column.cell(row)) for column in columns] for row in rows])


def torch_npu_checked(evidence: Evidence) -> list[Part]:
    """A row for each wheel of torch_npu that ran without an NPU, and what that proves."""
    columns = [column for column in checked.SUMMARY_COLUMNS if column.key != "beside"]
    found = record_table(evidence, checked.NAME, columns, checked.summary_rows)
    return [found, checked.PROVES] if found.rows else ["not measured"]


def decoded(evidence: Evidence) -> list[Part]:
    """What --decode fast costs, in a sentence: by the class token of a model that is trained, if a small one."""
    if not (data := evidence.records.get(TRAINED)):
        return ["not measured"]
    with blaming(TRAINED):
        found = data["decode_fast"]["class_token"]
        error, nearest = f"{found['relative_l2_error']:.1%}", f"{found['same_nearest_percent']:.0f}%"
    return [
        f"`--decode fast`: features {error} off those of `exact`, {nearest} of views keep their nearest neighbour (tests/data)."
    ]


def tuned(evidence: Evidence) -> list[Part]:
    """What tune.py found fastest on each device, in a line each."""
    lines = []
    for kind in KINDS:
        if data := evidence.measured("tuned", kind):
            with blaming(stem_of("tuned", kind)):
                lines.append(
                    f"- {label_of(data)}, {plain(data['device_name'])}: {'; '.join(map(told_pick, tune.picked_rows(data)))}"
                )
    return ["\n".join(lines) or "not measured"]


def told_pick(row: dict[str, Any]) -> str:
    """One of the tuner's picks in words."""
    figure = f"{1e3 * row['median_time_s']:.2f} ms" if row["pick"] == "latency" else f"{row['images_per_s']:,.2f} images/s"
    settings = [row["arithmetic"], row["execution"], f"batch {row['batch_size']}", row["levers_text"], row["environment_text"]]
    return f"{row['pick']} {figure} ({', '.join(plain(word) for word in settings if word not in ('-', 'default'))})"


def versions(evidence: Evidence) -> list[Part]:
    """The whole line for a bare host, by CANN, with every torch_npu recommended there and where pip resolves the line."""
    tried, lines = evidence.records.get("install_resolution", {}).get("resolved", []), []
    for stack in stacks.STACKS:
        pythons = [one["python"] for one in tried if one["cann"] == stack.cann and one["resolves"]]
        lines.append(f"# CANN {stack.cann}: torch_npu {', '.join(stack.paired)}; Python {', '.join(pythons) or '-'}")
        lines.append(stacks.install_line(stack))
    return ["\n".join(["```text", *lines, "```"])]


# Of each log the key lines, of which the last of each kind is quoted.
LOG_LINES = {
    "inference": ("Inference time",),
    "accuracy_eval": ("Hidden States Filtered MRE", "Overall"),
    "performance_eval": ("Throughput",),
}


def log_lines(evidence: Evidence) -> list[Part]:
    """The key lines of the logs of the results, the NPU's before others, or of an NPU that is BLOCKED."""
    lines = []
    for name, wanted in LOG_LINES.items():
        stem = inference.result_name(name, next((kind for kind in KINDS if evidence.measured(name, kind)), "npu"))
        path = evidence.root / "logs" / f"{stem}.log"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        runs = re.split(r"^(?=.*\[INFO\] Device: \S+, .*\)$)", text, flags=re.MULTILINE)
        saved = next((run for run in reversed(runs) if f"Results saved to results/{stem}.json" in run), "")
        for words in (*wanted, "BLOCKED"):
            said = re.findall(rf"^.*\] {words}: .*$", saved, re.MULTILINE)
            lines += [f"logs/{stem}.log: {said[-1]}"] if said else []
    return ["\n".join(["```text", *lines, "```"])] if lines else ["not measured"]


TABLES: dict[str, Callable[[Evidence], list[Part]]] = {
    **{"audit": audit, "versions": versions, "log": log_lines},
    "accuracy": partial(short_table, "accuracy_eval", eval_accuracy.OUTPUT_COLUMNS, card_rows),
    "performance": partial(short_table, "performance_eval", eval_performance.ROW_COLUMNS, eval_performance.rows),
    "deliverables": deliverables,
    "torch_npu": torch_npu_checked,
    "tuned": tuned,
    "decode": decoded,
}
