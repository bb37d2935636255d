"""Turns results/ and logs/ into the tables of README.md and README.zh.md, into results/README.md and the pictures of assets/.

    python eval/evidence.py
    python eval/evidence.py --check

Tables stand between the markers <!-- evidence:NAME --> and <!-- /evidence:NAME -->. A figure comes from a file or it is not
there: what is missing says "not measured", or BLOCKED with the reason that a run has recorded. Refused are results of the
stand-in for CANN, of another model, and with a path of somebody's machine. --check prints what does not follow from the files.

Exit codes: 0 done, or nothing has drifted; 1 --check found drift; 2 wrong usage, or a file that is not what it should be;
70 an error nobody foresaw (its traceback is in logs/trial/evidence.log); 130 stopped.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference
from inference import UsageError

import checked
import end_to_end
import eval_accuracy
import eval_performance
import pictures
import stages
import tables
import tune
import worth
from common import Column
from tables import CHECKS, KINDS, PUBLISHED, Part

RUN = "python eval/evidence.py"
READMES = {"README.md": "en", "README.zh.md": "zh"}
DETAILS_PAGE = "results/README.md"
SUBMISSION = "results/git_submit.json"
ON_THE_STAND_IN = (checked.NAME, checked.BESIDE_MSPROBE)  # whose device it is
OTHERS = (
    "env_info",
    "env_info_cpu",
    "git_submit",
    "install_resolution",
    "published/env_info",
    *ON_THE_STAND_IN,
    tables.TRAINED,
)
# An absolute path that a system does not come with.
OWN_PATH = re.compile(r"(?<![\w.~:/-])/(?!usr/|dev/|proc/|opt/|etc/|lib)[\w.-]+/[\w./-]+|\b[A-Z]:\\")


@dataclass(frozen=True)
class Evidence:
    """All that pages and pictures are made from: the JSON files of results/, by path without results/ and .json."""

    root: Path
    records: dict[str, dict[str, Any]]

    def measured(self, name: str, kind: str = "npu") -> dict[str, Any] | None:
        """A device's result, or what an interrupted run has kept where there is nothing else; also of kind "published"."""
        found = [self.records.get(tables.stem_of(stem, kind), {}) for stem in (name, f"{name}_partial")]
        return next((data for data in found if data and data.get("status") != "BLOCKED"), None)

    def blocked(self, name: str) -> dict[str, Any] | None:
        """The record that says why the NPU gave no result."""
        record = self.records.get(name, {})
        return record if record.get("status") == "BLOCKED" and not self.measured(name) else None


def read_evidence(root: Path) -> Evidence:
    """Read results/. Raises UsageError naming the file that is malformed or no evidence."""
    kinds: dict[str, str | None] = dict.fromkeys((*OTHERS, *(PUBLISHED + name for name in CHECKS)))
    for name, kind in itertools.product((*CHECKS, "tuned", "pca"), KINDS):
        kinds |= {inference.result_name(stem, kind): kind for stem in (name, f"{name}_partial")}
    records = {}
    for stem, kind in kinds.items():
        path = f"results/{stem}.json"
        if (root / path).is_file():
            records[stem] = inference.read_json(root / path, path)
            if refusal := refuse(records[stem], inference.STAND_IN if stem in ON_THE_STAND_IN else kind):
                raise UsageError(f"{path}: {refusal}")
    return Evidence(root, records)


def refuse(data: dict[str, Any], kind: str | None) -> str | None:
    """Why a file is no evidence. kind: the device that its name promises; None where it promises none."""
    text = json.dumps(data, ensure_ascii=False)
    if found := OWN_PATH.search(text):
        return f"it shows a path of somebody's machine ({found[0]}); make it again with a path inside this folder"
    if inference.STAND_IN in text and kind != inference.STAND_IN:
        return f"made on the {inference.STAND_IN}, which is no evidence; remove it, or measure on a real NPU"
    if kind and data.get("device") != kind:
        return f"its device is {data.get('device')!r}, and a file of this name is of {kind!r}; make it again with its script"
    if kind in KINDS and data.get("status") != "BLOCKED" and data.get("model") != inference.MODEL_NAME:
        return f"its model is {data.get('model')!r}, not {inference.MODEL_NAME}; make it again with the card's weights"
    return None


# --- results/README.md ---

MOST_STAGES = 10  # of a device; the rest, fifty that are all but alike, is for who opens the JSON


def worst_stages(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages with the largest own errors, in the order of the forward pass; null, which was not finite, is the largest."""
    rows = result.get("stages") or []
    errors = [math.inf if row["own_relative_l2_error"] is None else row["own_relative_l2_error"] for row in rows]
    worst = sorted(range(len(rows)), key=errors.__getitem__, reverse=True)[:MOST_STAGES]
    return [rows[place] for place in sorted(worst)]


def other_stages(evidence: Evidence) -> list[str]:
    """A line that says how many stages are not shown, where there are any."""
    found = {kind: evidence.measured("accuracy_eval", kind) or {} for kind in KINDS}
    left = {kind: len(data.get("stages") or []) - MOST_STAGES for kind, data in found.items()}
    told = [f"{count} more of the {KINDS[kind]}" for kind, count in left.items() if count > 0]
    return [f"The {MOST_STAGES} stages with the largest own errors; the JSON has {', '.join(told)}."] if told else []


INFERENCE_COLUMNS = (
    Column("Last hidden state", "最后隐藏层", "last_hidden_shape"),
    Column("Batch", "批大小", "batch_size"),
    Column("Mean token norm", "词元平均范数", "hidden_mean_norm", ".4f"),
    Column("Time of a batch (ms)", "每批耗时（ms）", "inference_time_s", ".2f", 1e3),
    Column("Images/s", "图片/秒", "throughput_img_s", ".2f"),
)
DETAILS: tuple[tuple[str, str, Sequence[Column], Callable[[dict], Sequence[dict]]], ...] = (
    ("inference", "Inference", INFERENCE_COLUMNS, lambda result: [result]),
    ("accuracy_eval", "Outputs", eval_accuracy.OUTPUT_COLUMNS, eval_accuracy.output_rows),
    ("accuracy_eval", "What arithmetic costs", eval_accuracy.SWEEP_COLUMNS, eval_accuracy.sweep_rows),
    ("accuracy_eval", "Where the error begins", stages.STAGE_COLUMNS, worst_stages),
    ("accuracy_eval", "What the error is worth", worth.WORTH_COLUMNS, worth.worth_rows),
    ("accuracy_eval", "What --decode fast costs", worth.FAST_COLUMNS, worth.fast_rows),
    ("accuracy_eval", "The field's yardsticks", eval_accuracy.YARDSTICK_COLUMNS, eval_accuracy.yardstick_rows),
    ("accuracy_eval", "Mixed arithmetic", eval_accuracy.RECIPE_COLUMNS, lambda run: (run.get("recipe") or {}).get("tried", [])),
    ("performance_eval", "Batch sizes", eval_performance.ROW_COLUMNS, eval_performance.rows),
    ("performance_eval", "The limit", eval_performance.LIMIT_COLUMNS, eval_performance.limit_rows),
    ("performance_eval", "What one would use instead", eval_performance.PEER_COLUMNS, eval_performance.peer_rows),
    ("performance_eval", "A cold start", end_to_end.COLD_COLUMNS, end_to_end.cold_rows),
    ("performance_eval", "A folder of photos", end_to_end.FOLDER_COLUMNS, end_to_end.folder_rows),
    ("performance_eval", "Many images", end_to_end.SCALE_COLUMNS, end_to_end.scale_rows),
    ("tuned", "Tuning", tune.TUNED_COLUMNS, tune.tuned_rows),
    ("tuned", "Decoding", end_to_end.DECODING_COLUMNS, lambda result: result.get("decoding") or []),
)
# How a result was made.
SOURCES = (
    *(Column("Machine", "", "device_name"), Column("Weights", "", "weights.source"), Column("Arithmetic", "", "dtype")),
    *(Column("UTC", "", "time_utc"), Column("Commit", "", "git_commit"), Column("Uncommitted changes then", "", "git_dirty")),
)
# What must be known to read a table.
NOTES = {
    "Outputs": "The result has the formulas; the published run's were not published, so its errors compare only roughly.",
    "What arithmetic costs": "An arithmetic passes above its smallest bar, if its cosine does; it begins where a block errs.",
    "Where the error begins": "A block's own error is what it adds when it is fed float64's input.",
    "What the error is worth": "Neighbours among views of the photos, and a linear probe of digits, beside plain float32's.",
    "What --decode fast costs": "Plain float32's features of photos and views decoded fast, beside those decoded exactly.",
    "The field's yardsticks": "Errors as multiples of plain float32's, both against float64.",
    "Batch sizes": "Of limit: the share of the rate of its matrix products alone, the median of paired turns. The published "
    "percentiles are of ten timings.",
    "The limit": "The rate of the model's matrix products alone, by torch; an engine with faster products may lie above it.",
    "What one would use instead": "Both took turns in one process. The ratio is the median over turns; the two rates beside it "
    "are medians by themselves, and their quotient may differ.",
    "Many images": "Hours at the measured rate of one device; many are taken as so many times one, which was not measured.",
    "A cold start": "From the process's start to the first feature; medians, the photo and the checkpoint in the file cache.",
}


# What is of no device's own: the record, heading, columns, rows, note.
RECORD_DETAILS: tuple[tuple[str, str, Sequence[Column], Callable[[dict], Sequence[dict]], str], ...] = (
    (checked.NAME, "Checked against torch_npu", checked.SUMMARY_COLUMNS, checked.summary_rows, checked.PROVES),
    (
        checked.NAME,
        "Ways that were run",
        checked.MODE_COLUMNS,
        checked.mode_rows,
        "Errors of a photo against the CPU's plain float32; operators of one more image.",
    ),
    (checked.NAME, "Operators an image", checked.BUDGET_COLUMNS, checked.budget_rows, "Eager, by embed.py, from the trace."),
    (
        *(checked.BESIDE_MSPROBE, "Beside msprobe", checked.MSPROBE_COLUMNS, checked.msprobe_rows),
        "Errors planted in a matrix product: what eval_accuracy.py and Ascend's msprobe, as it comes, say of them.",
    ),
    (
        *(tables.TRAINED, "Fast decoding, on trained weights", worth.FAST_COLUMNS, worth.fast_rows),
        "Features by --decode fast beside those by exact, of the small trained model of the tests.",
    ),
)


def record_parts(evidence: Evidence) -> Iterator[Part]:
    """Their tables, each after how the record was made."""
    made = None
    for name, heading, columns, rows_of, note in RECORD_DETAILS:
        found = tables.record_table(evidence, name, columns, rows_of)
        if found.rows:
            yield from (f"## {heading}", note)
            data = evidence.records[name]
            if made != name:
                yield f"Made by `{data['command']}` at {data['time_utc']}, commit {data['git_commit']}: {data['model']}."
            yield found
            made = name


def details_page(evidence: Evidence) -> str:
    """results/README.md: every table in full, in English."""
    about = "the original submission's run, not made by this code, is in [published](published/PROVENANCE.md)."
    parts: list[Part] = [f"# Results in full\n\nWritten by `{RUN}` from the files here; {about}"]
    shown = set()
    for name, heading, columns, rows_of in DETAILS:
        found = tables.device_table(evidence, name, columns, rows_of, [*KINDS, "published"])
        if found.rows:
            made = [] if name in shown else [tables.device_table(evidence, name, SOURCES, lambda result: [result])]
            left_out = other_stages(evidence) if rows_of is worst_stages else []
            parts += [f"## {heading}", *filter(None, [NOTES.get(heading)]), *made, found, *left_out]
            shown.add(name)
    parts += record_parts(evidence)
    for name in CHECKS:
        if record := evidence.blocked(name):
            parts += [f"## BLOCKED: {name}", f"{tables.plain(record['reason'])}. {tables.plain(record['what_to_do'])}"]
    return tables.render(parts, "en").lstrip("\n").replace("](results/", "](").replace("](logs/", "](../logs/") + "\n"


# --- pages and pictures ---


def splice(text: str, name_of_file: str, blocks: dict[str, str]) -> str:
    """The text with each table between its markers. Raises UsageError for a marker that is out of place."""
    for name in re.findall(r"<!-- /?evidence:(.*?) -->", text):
        if name not in blocks:
            raise UsageError(f"{name_of_file}: the marker evidence:{name} is not known; use one of {', '.join(blocks)}")
    for name, block in blocks.items():
        opens, closes = f"<!-- evidence:{name} -->", f"<!-- /evidence:{name} -->"
        before, _, rest = text.partition(opens)
        _, closed, after = rest.partition(closes)
        if not closed or text.count(opens) + text.count(closes) != 2:
            raise UsageError(f"{name_of_file}: {opens} must stand there once, and once {closes} after it")
        text = f"{before}{opens}\n{block.strip()}\n\n{closes}{after}"
    return text


def pages(evidence: Evidence) -> dict[str, tuple[str, str]]:
    """Each generated page as it is, and as the files want it."""
    parts, page = {name: make(evidence) for name, make in tables.TABLES.items()}, evidence.root / DETAILS_PAGE
    found = {DETAILS_PAGE: (page.read_text(encoding="utf-8") if page.exists() else "", details_page(evidence))}
    for name, language in READMES.items():
        text = (evidence.root / name).read_text(encoding="utf-8")
        blocks = {table: tables.render(part, language) for table, part in parts.items()}
        found[name] = text, splice(text, name, blocks)
    return found


def list_submission() -> list[str]:
    """Every file that a commit of everything would hold; none without git."""
    files = inference.git("ls-files", "-z", "--cached", "--others", "--exclude-standard") or ""
    if inference.git_state()["git_commit"] is None:
        return []
    there = {name for name in files.split("\0") if (inference.ROOT / name).is_file()}
    return sorted({*there, DETAILS_PAGE, SUBMISSION, *(f"assets/{name}" for name in pictures.PICTURES)})


def stale(evidence: Evidence) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Each file that does not follow from the others: its name, how it differs, and what makes it anew."""
    for name, (found, wanted) in pages(evidence).items():
        if found != wanted:
            yield name, "not what the files give", wanted.encode
    files = list_submission()
    if files and (changed := set(files) ^ set(evidence.records.get("git_submit", {}).get("files", []))):
        now = {"time_utc": inference.utc_now(), "after_commit": inference.git_state()["git_commit"], "files": files}
        evidence.records["git_submit"] = now
        yield SUBMISSION, f"does not list what there is: {min(changed)}", lambda: (json.dumps(now, indent=2) + "\n").encode()
    for name in pictures.PICTURES:
        found, digest = pictures.digest_in(evidence.root / "assets" / name), pictures.digest(name, evidence)
        if found != digest:
            why = "not drawn from these files" if found else "missing, or without a digest"
            yield f"assets/{name}", why, partial(pictures.draw, name, evidence, digest)


def write(root: Path) -> int:
    """Write what has changed. Nothing is written before all pages are known."""
    changed = list(stale(read_evidence(root)))
    for name, _, make in changed:
        content = make()
        with inference.replacing(root / name) as file:
            file.write(content)
        print(f"Written: {name}", flush=True)
    if not changed:
        print("Nothing has changed")
    return 0


def check(root: Path) -> int:
    """Print a line for each page or picture that does not follow from the files; 1 where there is one."""
    drift = [f"{name}: {why}; run: {RUN}" for name, why, _ in stale(read_evidence(root))]
    print("\n".join(drift) or f"{', '.join(READMES)}, {DETAILS_PAGE} and assets/ follow from the files")
    return 1 if drift else 0


# --- command line ---


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page or picture has drifted")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    act = check if args.check else write
    return inference.guarded("evidence", lambda: act(inference.ROOT), f"stopped; finish it with: {RUN}")


if __name__ == "__main__":
    inference.leave(main())
