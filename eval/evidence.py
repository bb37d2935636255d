"""Turns results/ and logs/ into the tables of README.md and README.zh.md, into results/README.md and the pictures of assets/.

    python eval/evidence.py
    python eval/evidence.py --check

Tables stand between the markers <!-- evidence:NAME --> and <!-- /evidence:NAME -->, the same in both files. A figure comes from
a file or it is not there: what is missing says "not measured", or BLOCKED with the reason that a run has recorded. Refused are
results of the simulated NPU, of another model, and with a path of somebody's machine. --check writes nothing, and prints a line
for each table, page or picture that does not follow from the files.

Exit codes: 0 done, or nothing has drifted; 1 --check found drift; 2 wrong usage, or a file that is not what it should be;
70 an error nobody foresaw (its traceback is in logs/trial/evidence.log); 130 stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference
from inference import Column, UsageError, log

import end_to_end
import eval_accuracy
import eval_performance
import pictures
import stages
import tables
import tune
import worth
from tables import CHECKS, KINDS, PUBLISHED, Part, Table

RUN = "python eval/evidence.py"
READMES = {"README.md": "en", "README.zh.md": "zh"}
DETAILS_PAGE = "results/README.md"
SUBMISSION = "results/git_submit.json"
SHOWN = ("results/", "logs/", "assets/")
RESULTS = (*CHECKS, "tuned")
OTHERS = ("env_info", "env_info_cpu", "git_submit", "install_resolution", "published/env_info")
# An absolute path that a system does not come with.
OWN_PATH = re.compile(r"(?<![\w.~:/-])/(?!usr/|dev/|proc/|opt/|etc/|lib)[\w.-]+/[\w./-]+|\b[A-Z]:\\")


@dataclass(frozen=True)
class Evidence:
    """All that pages and pictures are made from: the JSON files of results/, by path without results/ and .json."""

    root: Path
    records: dict[str, dict[str, Any]]

    def measured(self, name: str, kind: str = "npu") -> dict[str, Any] | None:
        """A device's result, or what an interrupted run has kept where there is nothing else."""
        found = [self.records.get(inference.result_name(stem, kind), {}) for stem in (name, f"{name}_partial")]
        return next((data for data in found if data and data.get("status") != "BLOCKED"), None)

    def blocked(self, name: str) -> dict[str, Any] | None:
        """The record that says why the NPU gave no result."""
        record = self.records.get(name, {})
        return record if record.get("status") == "BLOCKED" and not self.measured(name) else None


# --- reading ---


def read_evidence(root: Path, allow_simulated: bool = False) -> Evidence:
    """Read results/. Raises UsageError naming the file that is malformed or no evidence."""
    kinds: dict[str, str | None] = {}
    for name, kind in itertools.product(RESULTS, KINDS):
        kinds |= {inference.result_name(stem, kind): kind for stem in (name, f"{name}_partial")}
    kinds |= dict.fromkeys((*OTHERS, *(PUBLISHED + name for name in CHECKS)))
    records = {}
    for stem, kind in kinds.items():
        path = f"results/{stem}.json"
        if (root / path).is_file():
            records[stem] = inference.read_json(root / path, path)
            refusal = refuse(records[stem], kind, allow_simulated)
            if refusal:
                raise UsageError(f"{path}: {refusal}")
    return Evidence(root, records)


def refuse(data: dict[str, Any], kind: str | None, allow_simulated: bool) -> str | None:
    """Why a file is no evidence. kind: the device that its name promises; None where it promises none."""
    text = json.dumps(data, ensure_ascii=False)
    if found := OWN_PATH.search(text):
        return f"it shows a path of somebody's machine ({found[0]}); make it again with a path inside this folder"
    if "simulated npu" in text.lower() and not allow_simulated:  # the name that it goes by; a file may have it in its name
        return "made on the simulated NPU, which is no evidence; remove it, or measure on a real one"
    if kind and data.get("device") != kind:
        return f"its device is {data.get('device')!r}, and a file of this name is of {kind!r}; make it again with its script"
    if kind and data.get("status") != "BLOCKED" and data.get("model") != inference.MODEL_NAME and not allow_simulated:
        return f"its model is {data.get('model')!r}, not {inference.MODEL_NAME}; make it again with the card's weights"
    return None


# --- results/README.md ---

MACHINE = (
    *(("Operating system", "os"), ("CPU", "cpu"), ("Cores", "cpu_cores"), ("Memory (GiB)", "memory_gb"), ("GPU", "gpu")),
    *(("NPU", "npu_model"), ("NPUs", "npu_count"), ("Why no NPU", "npu_blocked_reason"), ("CANN", "cann_version")),
    *(("Python", "python_version"), ("torch", "torch_version"), ("torch_npu", "torch_npu_version")),
    *(("transformers", "transformers_version"), ("numpy", "numpy_version"), ("Pairing", "pairing"), ("Install", "install")),
)
DETAILS: tuple[tuple[str, str, Sequence[Column], Callable[[dict], Sequence[dict]]], ...] = (
    ("inference", "Inference", inference.COLUMNS, lambda result: [result]),
    ("accuracy_eval", "Outputs", eval_accuracy.OUTPUT_COLUMNS, eval_accuracy.output_rows),
    ("accuracy_eval", "What arithmetic costs", eval_accuracy.SWEEP_COLUMNS, eval_accuracy.sweep_rows),
    ("accuracy_eval", "Where the error begins", stages.STAGE_COLUMNS, stages.stage_rows),
    ("accuracy_eval", "What the error is worth", worth.WORTH_COLUMNS, worth.worth_rows),
    ("accuracy_eval", "The field's yardsticks", eval_accuracy.YARDSTICK_COLUMNS, eval_accuracy.yardstick_rows),
    ("accuracy_eval", "Mixed arithmetic", eval_accuracy.RECIPE_COLUMNS, eval_accuracy.recipe_rows),
    ("performance_eval", "Batch sizes", eval_performance.ROW_COLUMNS, eval_performance.rows),
    ("performance_eval", "The limit", eval_performance.LIMIT_COLUMNS, eval_performance.limit_rows),
    ("performance_eval", "What one would use instead", eval_performance.PEER_COLUMNS, eval_performance.peer_rows),
    ("performance_eval", "A cold start", end_to_end.COLD_COLUMNS, end_to_end.cold_rows),
    ("performance_eval", "A folder of photos", end_to_end.FOLDER_COLUMNS, end_to_end.folder_rows),
    ("tuned", "Tuning", tune.TUNED_COLUMNS, tune.tuned_rows),
)
# What must be known to read a table.
NOTES = {
    "Outputs": "The result has the formulas; the published run's were not published, so its errors compare only roughly.",
    "What arithmetic costs": "Above its smallest bar an arithmetic passes; it begins where a block's own error is too large.",
    "Where the error begins": "A block's own error is what it adds when it is fed float64's input.",
    "What the error is worth": "Neighbours among views of the photos, and a linear probe of digits, beside plain float32's.",
    "The field's yardsticks": "Errors as multiples of plain float32's, both against float64.",
    "Mixed arithmetic": "bfloat16 with that many first and last layers in float32.",
    "The limit": "The rate of the model's matrix products alone, by torch; an engine with faster products may lie above it.",
    "What one would use instead": "Both took turns in one process. The ratio is the median over turns; the two rates beside it "
    "are medians by themselves, and their quotient may differ.",
    "A cold start": "From the process's start to the first feature. The bare minimum: import, read the file, one forward pass.",
    "A folder of photos": "From photos on disk to saved features.",
    "Tuning": "All points that `python eval/tune.py` tried.",
}


def machine(evidence: Evidence) -> Table:
    """What env_info.json says, beside the published run's."""
    stems = [stem for stem in ("env_info", "env_info_cpu", f"{PUBLISHED}env_info") if stem in evidence.records]
    columns = [Column("", "", "what"), *(Column(f"{stem}.json", "", stem) for stem in stems)]
    return Table(columns, [{"what": what} | {stem: evidence.records[stem].get(key) for stem in stems} for what, key in MACHINE])


def details_page(evidence: Evidence) -> str:
    """results/README.md: every table in full, in English."""
    parts: list[Part] = [f"# Results in full\n\nWritten by `{RUN}` from the files here; see [README.md](../README.md)."]
    parts += ["## Machine", machine(evidence)]
    shown = set()
    for name, heading, columns, rows_of in DETAILS:
        found = tables.device_table(evidence, name, columns, rows_of, published=heading in ("Outputs", "Batch sizes"))
        if found:
            made = [] if name in shown else tables.sources(evidence, name)
            parts += [f"## {heading}", *([NOTES[heading]] if heading in NOTES else []), *made, *found]
            shown.add(name)
    for name in CHECKS:
        if record := evidence.blocked(name):
            parts += [f"## BLOCKED: {name}", f"{tables.plain(record['reason'])}. {tables.plain(record['what_to_do'])}"]
    rows = [
        {"key": f"{name}: {key}", "value": value}
        for name in ("env_info", *CHECKS)
        for key, value in flat(evidence.records.get(PUBLISHED + name, {}))
    ]
    about = "Made by the original submission, not by this code; see [PROVENANCE.md](published/PROVENANCE.md)."
    table = Table([Column("Key", "", "key"), Column("Published Ascend run", "", "value")], rows)
    parts += ["## The published Ascend run", about, table, "## Versions that go together", *tables.versions(evidence)]
    return tables.render(parts, "en").lstrip("\n").replace("](results/", "](").replace("](logs/", "](../logs/") + "\n"


def flat(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each figure of a JSON file with the keys that lead to it."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for name, value in items:
        yield from flat(value, f"{key}.{name}".lstrip("."))
    if not isinstance(data, (dict, list)):
        yield key, data


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
        if name not in tables.TABLES:
            raise UsageError(f"{where} is not known; use one of {', '.join(tables.TABLES)}")
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


def splice(text: str, name_of_file: str, blocks: dict[str, str]) -> str:
    """The text with each table between its markers. Raises UsageError where a table has no marker."""
    places = find_blocks(text, name_of_file)
    lacking = [name for name in blocks if name not in places]
    if lacking:
        raise UsageError(
            f"{name_of_file}: no marker <!-- evidence:{lacking[0]} -->; add it and its end <!-- /evidence:{lacking[0]} -->"
        )
    lines, result, end = text.split("\n"), [], 0
    for name, (opened, closed) in places.items():
        result += [*lines[end : opened + 1], *blocks[name].lstrip("\n").split("\n"), ""]
        end = closed
    return "\n".join(result + lines[end:])


def pages(evidence: Evidence) -> dict[str, tuple[str, str]]:
    """Each generated page as it is, and as the files want it."""
    parts = {name: make(evidence) for name, make in tables.TABLES.items()}
    found = {DETAILS_PAGE: (read_text(evidence.root / DETAILS_PAGE), details_page(evidence))}
    for name, language in READMES.items():
        text = read_text(evidence.root / name)
        blocks = {table: tables.render(part, language) for table, part in parts.items()}
        found[name] = text, splice(text, name, blocks)
    return found


def read_text(path: Path) -> str:
    """A text file, or "" where there is none."""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, ValueError) as error:
        raise UsageError(f"{path.name}: cannot be read ({inference.first_line(error)})") from error


# --- what is submitted ---


def list_submission(root: Path) -> dict[str, int] | None:
    """Bytes of each file that a commit of everything would hold; None without git. The list itself counts nothing."""
    files = inference.git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if files is None or inference.git_state()["git_commit"] is None:
        return None
    itself = (SUBMISSION, "assets/git_submit_result.png")
    found = {
        name: 0 if name in itself else (root / name).stat().st_size for name in files.split("\0") if (root / name).is_file()
    }
    return dict(sorted((found | dict.fromkeys(itself, 0)).items()))


# --- the two ways to run it ---


def write(root: Path, allow_simulated: bool) -> int:
    """Write what has changed. Nothing is written before all pages are known."""
    evidence, written = read_evidence(root, allow_simulated), []

    def save(name: str, content: bytes) -> None:
        with inference.replacing(root / name) as file:
            file.write(content)
        written.append(name)
        print(f"Written: {name}", flush=True)

    for name, (found, wanted) in pages(evidence).items():
        if found != wanted:
            save(name, wanted.encode("utf-8"))
    for name in pictures.PICTURES:
        if name == "git_submit_result.png":  # last: it tells the sizes of all others
            files, recorded = list_submission(root), evidence.records.get("git_submit", {})
            if files is not None and files != recorded.get("files"):
                now = {"time_utc": inference.utc_now(), "after_commit": inference.git_state()["git_commit"], "files": files}
                save(SUBMISSION, (json.dumps(now, indent=2) + "\n").encode())
                evidence = dataclasses.replace(evidence, records=evidence.records | {"git_submit": now})
        digest = pictures.digest(name, evidence)
        if pictures.digest_in(root / "assets" / name) != digest:
            save(f"assets/{name}", pictures.draw(name, evidence, digest))
    if not written:
        print("Nothing has changed")
    return 0


def check(root: Path, allow_simulated: bool) -> int:
    """Print a line for each page or picture that does not follow from the files; 1 where there is one."""
    evidence = read_evidence(root, allow_simulated)
    drift = [difference(name, found, wanted) for name, (found, wanted) in pages(evidence).items() if found != wanted]
    for name in pictures.PICTURES:
        found = pictures.digest_in(root / "assets" / name)
        if found != pictures.digest(name, evidence):
            drift.append(
                f"assets/{name}: {'not drawn from these files' if found else 'missing, or without a digest'}; run: {RUN}"
            )
    listed, files = evidence.records.get("git_submit", {}).get("files", {}), list_submission(root) or {}
    drift += [
        f"{SUBMISSION}: does not list {name}; run: {RUN}" for name in files if name not in listed and name.startswith(SHOWN)
    ]
    for line in drift:
        print(line)
    if not drift:
        print(f"{', '.join(READMES)}, {DETAILS_PAGE} and assets/ follow from the files")
    return 1 if drift else 0


def difference(name: str, found: str, wanted: str, around: int = 30) -> str:
    """The first line of a page that differs, from a little before the first character that does."""
    pairs = enumerate(itertools.zip_longest(found.split("\n"), wanted.split("\n"), fillvalue="nothing"))
    place, pair = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
    alike = next((at for at, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))
    start = max(0, alike - around)
    has, give = (repr(text[start : start + 2 * around]) for text in pair)
    return f"{name}:{place + 1}: has {has}, and the files give {give}; run: {RUN}"


# --- command line ---


def guarded(script: str, body: Callable[[], int]) -> int:
    """body(), or whatever ends it as one line and an exit code."""
    inference.start_log()
    try:
        return body()
    except KeyboardInterrupt:
        log.error(inference.stopping.last_words)
        return 130
    except UsageError as error:
        log.error(f"error: {error}")
        return 2
    except Exception as error:  # noqa: BLE001
        inference.open_log(inference.ROOT / "logs" / "trial" / f"{script}.log")
        log.error(
            f"error: {type(error).__name__}: {inference.first_line(error)} (unforeseen; the traceback is in the log)",
            exc_info=True,
        )
        return 70
    finally:
        inference.stop_log()


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page or picture has drifted")
    text = "for the tests only: take results of the simulated NPU and of other models, marked"
    parser.add_argument("--allow_simulated", action="store_true", help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    inference.stopping.last_words = f"stopped; finish it with: {RUN}"
    return guarded("evidence", lambda: (check if args.check else write)(inference.ROOT, args.allow_simulated))


if __name__ == "__main__":
    sys.exit(main())
