"""What the pages say: each table as columns and rows, in both languages, and the one way from there to Markdown.

evidence.py puts these tables between the markers of README.md and README.zh.md, and writes results/README.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference
from inference import Column, UsageError

import end_to_end
import eval_accuracy
import eval_performance
import stacks

if TYPE_CHECKING:
    from evidence import Evidence

KINDS = {"npu": "NPU", "cuda": "GPU", "cpu": "CPU"}
PUBLISHED = "published/"


class Text(NamedTuple):
    """Markdown in both languages."""

    en: str
    zh: str


class Table(NamedTuple):
    """Columns, and a dict for each row; a cell that is no Text is plain text of a file."""

    columns: Sequence[Column]
    rows: Sequence[dict[str, Any]]


Part = str | Text | Table


# --- words ---

WORDS = eval_accuracy.CHINESE | {
    **{"not measured": "未测量", "random weights": "随机权重", "means nothing": "无意义", "does not count": "不计入"},
    **{"out of memory": "内存不足", "launch-bound": "受下发限制", "unsteady": "不稳定", "not finite": "非有限值"},
    **{"forward pass": "前向计算", "batch": "批大小", "folder of photos to features": "照片文件夹到特征"},
    **{"torch_npu is not installed": "未安装 torch_npu", "CANN is not installed or not set up": "CANN 未安装或未配置环境"},
    **{"torch sees no NPU": "torch 找不到 NPU", "CANN's compiler cannot start": "CANN 编译器无法启动"},
    **{
        "torch_npu does not fit this torch or this CANN": "torch_npu 与当前 torch 或 CANN 不匹配",
        "do not go together": "不匹配",
    },
    **{"is listed but fails at first use": "已列出但首次使用失败", "as torch_npu leaves it": "torch_npu 默认设置"},
    **{"torch_npu cannot be used": "torch_npu 无法使用", "this bundle": "本项目"},
    **{"strict": "严格", "allowed": "允许", "autocast": "自动混合精度", "plain": "原样", "trained": "已训练"},
}
PHRASES = re.compile("|".join(rf"(?<!\w){re.escape(words)}(?!\w)" for words in sorted(WORDS, key=len, reverse=True)))


def chinese(text: str) -> str:
    """Words that stand in the files' cells, in Chinese; names, numbers, PASS, FAIL and BLOCKED stay."""
    return PHRASES.sub(lambda found: WORDS[found[0]], text)


def joined(texts: Sequence[Text], en: str = ", ", zh: str = "，") -> Text:
    return Text(en.join(text.en for text in texts), zh.join(text.zh for text in texts))


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


def number(value: float | None, form: str) -> str:
    return "NaN" if value is None else format(value, form)


def link(evidence: Evidence, *paths: str) -> str:
    return ", ".join(f"[{Path(path).name}]({path})" for path in paths if (evidence.root / path).is_file()) or "-"


def why_not(evidence: Evidence, name: str) -> Text:
    """Why the NPU has no result."""
    record = evidence.blocked(name)
    text = f"**BLOCKED**: {plain(record['reason'])}" if record else "not measured"
    return Text(text, chinese(text))


RANDOM = Text("**random weights**", "**随机权重**")


def label_of(data: dict[str, Any]) -> Text:
    """What a row calls the device of a result: also what it is compared with, random weights, a simulation, half a run."""
    kind, reference = KINDS[data["device"]], data.get("reference")
    against = reference and KINDS.get(reference["device"], reference["dtype"])
    said = [Text(f"{kind} against {against}", f"{kind} 对比 {against}") if against else Text(kind, kind)]
    said += [RANDOM] if data["weights"]["source"] == "random" else []
    said += [Text("SIMULATED", "SIMULATED")] if "simulated" in data["device_name"].lower() else []
    said += [Text("**partial**", "**不完整**")] if data.get("partial") else []
    return joined(said)


PUBLISHED_LABEL = Text("published Ascend run, **not this code**", "已公布的昇腾运行，**非本代码**")


def pick(columns: Sequence[Column], *keys: str) -> list[Column]:
    return [column for key in keys for column in columns if column.key == key]


def device_table(
    evidence: Evidence, name: str, columns: Sequence[Column], rows_of: Callable[[dict], Sequence[dict]], published: bool = False
) -> list[Part]:
    """Rows of a result for each device that has it, and of the published run; none where no device has it."""
    found = [(inference.result_name(name, kind), evidence.measured(name, kind)) for kind in KINDS]
    found += [(PUBLISHED + name, evidence.records.get(PUBLISHED + name) if published else None)]
    rows: list[dict[str, Any]] = []
    for stem, data in found:
        with blaming(stem):
            label = PUBLISHED_LABEL if stem.startswith(PUBLISHED) else data and label_of(data)
            rows += [row | {"_device": label} for row in rows_of(data)] if data else []
    return [Table([Column("Device", "设备", "_device"), *columns], rows)] if rows else []


def sources(evidence: Evidence, name: str) -> list[Part]:
    """A line for each result that figures come from: file, device, arithmetic, weights, date and commit."""
    lines = []
    for kind, data in ((kind, evidence.measured(name, kind)) for kind in KINDS):
        stem = inference.result_name(name, kind)
        with blaming(stem):
            if data is None:
                continue
            hashes = [digest[:12] for file, digest in data["weights"].get("sha256", {}).items() if not file.endswith(".json")]
            made = f"{link(evidence, f'results/{stem}.json', f'logs/{stem}.log')}: {plain(data['device_name'])}"
            commit = (
                f"commit {data['git_commit'][:7]}{' (dirty)' if data['git_dirty'] else ''}" if data["git_commit"] else "no git"
            )
            rest = ", ".join([*hashes, data.get("dtype", "-"), f"{data['time_utc'][:16].replace('T', ' ')} UTC", commit])
            lines.append(
                joined([Text(f"- {made}", f"- {made}"), Text("checkpoint", "检查点") if hashes else RANDOM, Text(rest, rest)])
            )
    return [joined(lines, "\n", "\n")] if lines else []


# --- the tables of the READMEs ---

AUDIT = (
    Column("Check", "检查项", "check"),
    Column("This code on an NPU", "本代码在 NPU 上", "ours"),
    Column("Published Ascend run (not made by this code)", "已公布的昇腾运行（非本代码）", "theirs"),
    Column("Files", "文件", "files"),
)


def audit_inference(data: dict[str, Any], _published: dict[str, Any] | None) -> Text:
    shape = " x ".join(map(str, data["last_hidden_shape"]))
    figures = f"{shape}, {1e3 * data['inference_time_s']:.2f} ms, {data['throughput_img_s']:.2f}"
    return Text(f"**runs**: {figures} images/s", f"**可运行**：{figures} 图片/秒")


def audit_accuracy(data: dict[str, Any], _published: dict[str, Any] | None) -> Text:
    hidden, verdict = data["last_hidden_state"], f"**{data['overall']}**"
    errors, bar = hidden["relative_error"], data.get("threshold_percent", 1)
    mre, cosine = number(errors["filtered_mean_relative_error"], ".4%"), number(hidden["cosine_similarity"], ".6f")
    said = [Text(f"{verdict}: filtered MRE {mre} (bar {bar:g}%)", f"{verdict}：过滤后 MRE {mre}（门限 {bar:g}%）")]
    said.append(Text(f"cosine {cosine}", f"余弦 {cosine}"))
    if "relative_l2_error" in hidden:
        whole, worst = (number(hidden[f"{key}relative_l2_error"], ".1e") for key in ("", "worst_token_"))
        return joined([*said, Text(f"relative L2 {whole}, worst token {worst}", f"相对 L2 {whole}，最差词元 {worst}")])
    mean = number(errors["mean_relative_error"], ".3%")
    return joined([*said, Text(f"unfiltered mean {mean}, relative L2 not recorded", f"未过滤平均 {mean}，相对 L2 未记录")])


def audit_performance(data: dict[str, Any], published: dict[str, Any] | None) -> Text:
    """The best throughput, and the latency of the smallest batch."""

    def best(result: dict[str, Any]) -> tuple[float, int, float, int] | None:
        rows = [row for row in result["results"] if "throughput_img_s" in row]
        if not rows:
            return None
        most, first = max(rows, key=lambda row: row["throughput_img_s"]), min(rows, key=lambda row: row["batch_size"])
        return most["throughput_img_s"], most["batch_size"], 1e3 * first["p50_s"], first["batch_size"]

    if best(data) is None:
        return Text("out of memory", "内存不足")
    rate, size, latency, first = best(data)
    en = f"best {rate:.2f} images/s (batch {size}), latency {latency:.2f} ms (batch {first})"
    zh = f"最高 {rate:.2f} 图片/秒（批大小 {size}），延迟 {latency:.2f} ms（批大小 {first}）"
    if published is None:
        return Text(en, zh)
    rates, latencies = f"{rate / best(published)[0]:.2f}", f"{latency / best(published)[2]:.2f}"
    en += f": {rates} times the published rate, {latencies} times its latency"
    return Text(en, zh + f"：吞吐为已公布运行的 {rates} 倍，延迟为其 {latencies} 倍")


CHECKS = {
    "inference": (Text("Inference", "推理"), audit_inference),
    "accuracy_eval": (Text("Accuracy", "精度"), audit_accuracy),
    "performance_eval": (Text("Performance", "性能"), audit_performance),
}


def audit(evidence: Evidence) -> list[Part]:
    """The first screen: what runs, how exact, how fast, on which evidence, beside the published run."""
    rows = []
    for name, (check, describe) in CHECKS.items():
        ours, theirs = evidence.measured(name), evidence.records.get(PUBLISHED + name)
        row = {"check": check, "ours": why_not(evidence, name), "theirs": Text("not recorded", "未记录")}
        if ours:
            with blaming(name):
                label = label_of(ours)
                said = Text(label.en.removeprefix("NPU"), label.zh.removeprefix("NPU"))
                row["ours"] = joined([describe(ours, theirs), said], "", "")
        if theirs:
            with blaming(PUBLISHED + name):
                row["theirs"] = describe(theirs, None)
        links, theirs = link(evidence, f"results/{name}.json", f"logs/{name}.log"), f"results/{PUBLISHED}{name}.json"
        row["files"] = Text(f"{links}; [published]({theirs})", f"{links}；[已公布]({theirs})")
        rows.append(row)
    return [Table(AUDIT, rows)]


def short_table(evidence: Evidence, name: str, columns: Sequence[Column], rows_of: Callable, note: Text) -> list[Part]:
    """A table for a README: the NPU first, also where it has no result, and below what must be known to read it."""
    [table] = device_table(evidence, name, columns, rows_of) or [Table([Column("Device", "设备", "_device"), *columns], [])]
    if not evidence.measured(name):
        why = Text("**BLOCKED**", "**BLOCKED**") if evidence.blocked(name) else Text("not measured", "未测量")
        table.rows.insert(0, {"_device": Text("NPU", "NPU"), columns[0].key: why})  # the reason stands in the audit
    return [table, joined([note, *sources(evidence, name)], "\n", "\n")]


def accuracy(evidence: Evidence) -> list[Part]:
    """The outputs that the card names."""
    keys = ("label", "relative_error.filtered_mean_relative_error", "cosine_similarity", "relative_l2_error")
    columns = pick(eval_accuracy.OUTPUT_COLUMNS, *keys, "worst_token_relative_l2_error", "verdict")
    names = [eval_accuracy.LABELS[name] for name in ("pooler_output", "last_hidden_state")]
    note = Text(
        "Filtered MRE: mean relative error without elements below a tenth of the RMS. Worst token: the largest of the single "
        "tokens' relative L2 errors. The CPU is compared with float64, not with itself.",
        "过滤后平均相对误差：不计小于均方根十分之一的元素。最差词元：单个词元相对 L2 误差的最大值。CPU 与 float64 比较。",
    )

    def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
        return [row for row in eval_accuracy.output_rows(result) if row["label"] in names]

    return short_table(evidence, "accuracy_eval", columns, rows_of, note)


def performance(evidence: Evidence) -> list[Part]:
    """The smallest batch size, and the one with the best throughput."""
    keys = ("batch_size", "p50_s", "throughput_img_s", "memory_mb", "share_of_limit_percent", "remarks")
    note = Text(
        "The smallest and the fastest batch size. P50: median time of a batch. Limit: the rate of its matrix products alone.",
        "仅列最小批与最快批。P50：每批耗时的中位数。上限：仅做模型矩阵乘的速率。",
    )

    def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
        rows = sorted(eval_performance.rows(result), key=lambda row: row["batch_size"])
        best = max(rows[1:], key=lambda row: row.get("throughput_img_s", 0), default=None)
        return rows[:1] + ([best] if best else [])

    return short_table(evidence, "performance_eval", pick(eval_performance.ROW_COLUMNS, *keys), rows_of, note)


def versions(evidence: Evidence) -> list[Part]:
    """The whole line for a bare host, by CANN, with what else is recommended there and where pip was asked."""
    lines = []
    tried = evidence.records.get("install_resolution", {}).get("resolved", [])
    for row in stacks.stack_rows():
        pythons = ", ".join(one["python"] for one in tried if one["cann"] == row["cann"] and one["resolves"]) or "-"
        stack = f"# CANN {row['cann']} (torch_npu {row['paired']})"
        lines.append(
            Text(
                f"{stack}; pip resolves it on aarch64 for Python {pythons}\n{row['install']}",
                f"{stack}；pip 在 aarch64 上可解析：Python {pythons}\n{row['install']}",
            )
        )
    found = joined(lines, "\n", "\n")
    return [Text(f"```text\n{found.en}\n```", f"```text\n{found.zh}\n```")]


WRITTEN_HERE = re.compile(r"assets/|results/git_submit")
SCRIPTS = ("inference.py", "eval/env_check.py", "eval/eval_accuracy.py", "eval/eval_performance.py")
DELIVERABLES = {
    Text("Card and code", "模型卡与代码"): ("README.md", "requirements.txt", "locked_models.md", *SCRIPTS, "weights/README.md"),
    Text("Environment", "环境"): ("results/env_info.json", "logs/env_check.log", "assets/env_check.png"),
    Text("List of files", "文件清单"): ("results/git_submit.json", "assets/git_submit_result.png"),
}


def deliverables(evidence: Evidence) -> list[Part]:
    """Each deliverable with its state."""
    made = {name: (f"results/{name}.json", f"logs/{name}.log", f"assets/{name}_result.png") for name in CHECKS}
    rows = []
    for what, paths in (DELIVERABLES | {CHECKS[name][0]: paths for name, paths in made.items()}).items():
        there = [path for path in paths if WRITTEN_HERE.match(path) or (evidence.root / path).is_file()]
        lacking = ", ".join(path for path in paths if path not in there)
        state = Text(f"missing: {lacking}", f"缺少：{lacking}") if lacking else Text("present", "已有")
        for name in (name for name in made if made[name] == paths):
            devices = [Text(KINDS[kind], KINDS[kind]) for kind in KINDS if evidence.measured(name, kind)]
            state = Text("**BLOCKED**", "**BLOCKED**") if evidence.blocked(name) else state
            state = joined([state, joined(devices)], "; measured: ", "；已测量：") if devices else state
        links = ", ".join(f"[{Path(path).name}]({path})" for path in there)
        rows.append({"what": what, "files": Text(links, links), "state": state})
    columns = [Column("Deliverable", "交付项", "what"), Column("Files", "文件", "files"), Column("State", "状态", "state")]
    return [Table(columns, rows)]


LOG_LINES = {
    "inference": r"Last hidden state shape|Pooler L2 norm|Inference time|Throughput",
    "accuracy_eval": r"Hidden States (Filtered MRE|Cosine Similarity)|Overall",
    "performance_eval": r"--- Batch size|Throughput",
}
MOST_LINES = {"performance_eval": 2}  # the largest batch size


def log_lines(evidence: Evidence) -> list[Part]:
    """The key lines of the logs of the results, and of an NPU that is BLOCKED."""
    lines = []
    for name, wanted in LOG_LINES.items():
        kind, found = next((kind for kind in KINDS if evidence.measured(name, kind)), "npu"), []
        stems = dict.fromkeys((name, inference.result_name(name, kind)))
        for stem in stems:
            path = evidence.root / "logs" / f"{stem}.log"
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            if not evidence.measured(name):
                found += re.findall(r"^.*\[ERROR\] BLOCKED: .*$", text, re.MULTILINE)[-1:]
            runs = re.split(r"^(?=.*\[INFO\] Device: \S+, .*\)$)", text, flags=re.MULTILINE)
            saved = [run for run in runs if f"Results saved to results/{stem}.json" in run][-1:]
            key_lines = [line for run in saved for line in run.splitlines() if re.search(rf"\[INFO\] ({wanted})", line)]
            key_lines = list({line[24:]: line for line in key_lines}.values())  # a verdict stands there twice
            found += key_lines[-MOST_LINES.get(name, len(key_lines)) :] if key_lines else []
        lines += [f"# {', '.join(f'logs/{stem}.log' for stem in stems)}", *found] if found else []
    return ["```text\n" + "\n".join(lines).replace("```", "") + "\n```"] if lines else [Text("not measured", "未测量")]


def open_questions(evidence: Evidence) -> list[Part]:
    """What no result answers yet."""
    npu, reasons = {name: evidence.measured(name) for name in CHECKS}, {}
    for name, data in npu.items():
        if data is None or data.get("partial"):
            why = Text("the run was interrupted", "运行中断") if data else why_not(evidence, name)
            reasons.setdefault(why, []).append(CHECKS[name][0])
    reasons = [(why, joined(names)) for why, names in reasons.items()]
    found = [Text(f"On an NPU: {what.en}: {why.en}", f"NPU 上：{what.zh}：{why.zh}") for why, what in reasons]
    results = [data for name in CHECKS for kind in KINDS if (data := evidence.measured(name, kind))]
    if not any(is_trained(data) for data in results):
        what = Text("Features of the trained weights", "训练权重的特征")
        why = Text("random weights show speed and arithmetic, not quality", "随机权重只反映速度与数值，不反映质量")
        found.append(joined([what, why], ": ", "："))
    elif not all(is_trained(data) for data in npu.values()):
        found.append(Text("The trained weights on an NPU, in all of this", "在 NPU 上以训练权重完成全部测量"))
    if not any(model == inference.HUB_ID for model, _ in inference.read_locks(evidence.root / "locked_models.md")):
        place = "[locked_models.md](locked_models.md)"
        found.append(Text(f"Hashes of the weights ({place})", f"权重哈希（{place}）"))
    tried = [row for row in (evidence.measured("tuned") or {}).get("rows", []) if row["status"] == "ok"]
    if "graph" not in [row.get("execution") for row in (*filter(None, npu.values()), *tried)]:
        found.append(Text("Graph execution on an NPU (`--execution graph`)", "NPU 上的图模式（`--execution graph`）"))
    found.append(Text("Several NPUs at once: their rate is reckoned from one", "多个 NPU 并行：速率由单卡推算"))
    lines = joined(found, "\n- ", "\n- ")
    return [Text(f"- {lines.en}", f"- {lines.zh}")]


def is_trained(data: dict[str, Any] | None) -> bool:
    return bool(data) and data["weights"]["source"] == "checkpoint"


SIZES = (
    Column("Saved for an image", "每张图片保存", "what"),
    Column("Bytes, float32", "字节，float32", "bytes", ",.0f"),
    Column("1 million (GB), 1 billion (TB)", "一百万张（GB），十亿张（TB）", "bytes", ",.1f", 1e-3),
    Column("In float16", "float16", "bytes", ",.1f", 0.5e-3),
)


def sizes(evidence: Evidence) -> list[Part]:
    """Bytes of features, and hours at the rate of the NPU, or of what else was measured."""
    width, patches = inference.CARDS[0].width, (inference.Preprocess().image_size // inference.CARDS[0].patch_size) ** 2
    kinds = {2: Text("class and mean patch token", "类别词元与图块均值"), 2 + patches: Text("and all patches", "及全部图块")}
    rows = [{"what": what, "bytes": 4 * width * count} for count, what in kinds.items()]
    rates = device_table(evidence, "performance_eval", end_to_end.SCALE_COLUMNS, end_to_end.scale_rows)
    first = [table._replace(rows=[row for row in table.rows if row["_device"] == table.rows[0]["_device"]]) for table in rates]
    return [Table(SIZES, rows), *first]


TABLES: dict[str, Callable[[Evidence], list[Part]]] = {
    **{"audit": audit, "accuracy": accuracy, "performance": performance, "versions": versions, "deliverables": deliverables},
    **{"log": log_lines, "open": open_questions, "sizes": sizes},
}


# --- rendering: the one way from parts to Markdown ---


def cell(column: Column, row: dict[str, Any], language: str) -> str:
    value = row.get(column.key)
    if isinstance(value, Text):
        return getattr(value, language)
    text = plain(column.cell(row))
    return chinese(text) if language == "zh" else text


def render(parts: Sequence[Part], language: str) -> str:
    """Markdown, an empty line before each part."""
    lines = []
    for part in parts:
        lines.append("")
        if isinstance(part, Table):
            cells = [[getattr(column, language) for column in part.columns], ["---"] * len(part.columns)]
            cells += [[cell(column, row, language) for column in part.columns] for row in part.rows]
            lines += ["| " + " | ".join(line) + " |" for line in cells]
        else:
            lines.append(getattr(part, language) if isinstance(part, Text) else part)
    return "\n".join(lines)
