"""Does this bundle run on the real torch_npu? Run it there, over the stand-in for CANN, and write what came of it.

    python tests/cann/check.py             # all wheels; makes what is missing, with 1.2 GB to download once
    python tests/cann/check.py 2.13.0      # one of them

inference.py and embed.py (eager, and as a captured graph) run in each dtype and with each set of levers on a few photos, on
unmodified wheels of torch_npu. Written down are the error against the CPU's plain float32 features, the operators that one more
image launches, by name, from the stand-in's trace, and whether the forward pass was captured. A run of all wheels in which
everything kept its bar writes results/torch_npu_check.json, which evidence.py makes tables of; any other results/trial/.

Exit codes: 0 everything kept its bar; 1 something did not, or a wheel cannot be had; 2 wrong usage, or no wheel can be had;
70 an error nobody foresaw (its traceback is in logs/trial/torch_npu_check.log); 130 stopped.
"""

from __future__ import annotations

import itertools
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval"), str(ROOT / "tests")]

import inference  # first of all: it sets what must precede torch
import numpy as np
from inference import DTYPES, STAND_IN, UsageError, log

from bulk.levers import DEFAULT_LEVERS, LEVERS
from cann import build, harness, stacks
from checked import NAME, PROVES
from measures import relative_l2

LAYERS = 24
PHOTOS = ("chelsea.jpg", "coffee.jpg", "rocket.jpg")
SETS = {
    "none": ("--without", *DEFAULT_LEVERS),
    "two": ("--without", "stacked_qkv"),  # all that there were once
    "default": (),
    "all": ("--with", *LEVERS[len(DEFAULT_LEVERS) :]),
}
ERROR_BARS = {"float32": 1e-6, "float16": 1e-2, "bfloat16": 5e-2}
LAUNCH_BARS = {"float32": 208, "float16": 160, "bfloat16": 160}  # of an image, with all levers
SECONDS = 300  # that a scenario may take


class Scenario(NamedTuple):
    """A way to run the bundle."""

    script: str
    execution: str
    dtype: str
    levers: str

    def __str__(self) -> str:
        return f"{self.script}.py, {self.execution}, {self.dtype}, levers: {self.levers}"

    @property
    def flags(self) -> list[str]:
        chosen = ["--dtype", self.dtype, "--batch_size", "1"]
        return chosen + ([*SETS[self.levers], "--execution", self.execution] if self.script == "embed" else [])


SCENARIOS = [
    *(Scenario("inference", "eager", dtype, "none") for dtype in DTYPES),
    *(Scenario("embed", *way) for way in itertools.product(("eager", "graph"), DTYPES, SETS)),
]


# --- a scenario, in a process of its own ---

IMPORTS = f"""
sys.path[:0] = [{str(ROOT)!r}]
import inference, embed
inference.import_transformers("npu")
"""
# Runs the script on one photo, then on all of them: what the second launches more is what the further images cost.
RUN = """
import numpy as np
def run(photos, name):
    output = f"{name}.npz" if script is inference else name
    where = ["--device", "npu", "--model_path", model, "--output", output, "--results_dir", ".", "--output_log", "log"]
    if code := script.main(["--image_path", *photos, *where, *flags]):
        sys.exit(code)
    if script is embed:
        made = json.load(open(f"{name}/manifest.json"))
        return f"{name}/part-00000.npz", len(photos), made | made["made_from"]
    made = json.load(open("inference.json"))
    return output, len(photos) + len(made["inference_times_s"]), made
_, few, _ = run(photos[:1], "one")
lines = sum(1 for _ in open(os.environ["STANDIN_TRACE"]))
output, more, made = run(photos, "all")
found = np.load(output)
say(lines=lines, passes=more - few, levers=made["levers"], versions=made["versions"], device_name=made["device_name"])
say(features={name: found[name].tolist() for name in inference.JUDGED})
"""


def run_scenario(stack: str, scenario: Scenario, model: Path, expected: dict[str, np.ndarray]) -> dict[str, Any]:
    """The row of a scenario on a stack; `about` in it says on what it ran."""
    photos = [str(ROOT / "assets" / "samples" / name) for name in PHOTOS]
    given = f"script, flags, model, photos = {scenario.script}, {scenario.flags}, {str(model)!r}, {photos}\n"
    prelude = harness.PRELUDE + IMPORTS
    outcome = harness.run(stack, given + RUN, prelude=prelude, seconds=SECONDS, STANDIN_THREADS="1")
    found, row = outcome.found, scenario._asdict() | {"ran": False}
    if outcome.code != 0 or "features" not in found:
        said = outcome.err.strip().splitlines() or ["nothing was said"]
        ended = f"no end within {SECONDS} s" if outcome.code is None else f"exit code {outcome.code}"
        return row | {"reason": f"{ended}: {said[-1]}"[:300]}
    launched = count_operators(outcome.trace[found["lines"] :])
    launched.subtract(count_operators(outcome.trace[: found["lines"]]))
    if any(count % found["passes"] for count in launched.values()):
        return row | {"reason": f"the launches differ from image to image: {dict(launched)}"}
    operators = {name: count // found["passes"] for name, count in sorted(launched.items()) if count}
    fallback = re.search(r"cannot be captured as a graph \((.*)\): going on", outcome.err)
    return row | {
        "ran": True,
        "about": {name: found[name] for name in ("versions", "device_name")},
        "levers_used": found["levers"],
        "relative_l2_error": worst_error(found["features"], expected),
        "captured": None if scenario.execution == "eager" else bool(outcome.operators("replayed")),
        "execution_fallback": fallback and fallback[1],
        "launches": sum(operators.values()),
        "operators": operators,
    }


def count_operators(trace: Sequence[str]) -> Counter[str]:
    """How often each operator reached the device, now or in a replayed graph, by the lines of a trace."""
    lines = (line.split() for line in trace)
    return Counter(words[0] for words in lines if words[0].startswith("aclnn") and words[2:3] in (["eager"], ["replayed"]))


def worst_error(found: dict[str, Any], expected: dict[str, np.ndarray]) -> float:
    """The largest relative L2 error of a photo's class token or mean patch token."""
    pairs = [pair for name in expected for pair in zip(np.array(found[name]), expected[name], strict=True)]
    return max(relative_l2(*pair) for pair in pairs)


# --- all of them ---


def run_stack(
    stack: str, model: Path, expected: dict[str, np.ndarray], wanted: Sequence[Scenario], stopped: threading.Event
) -> dict[str, Any]:
    """What a stack is made of, and a row for each scenario; or why it cannot be had."""
    try:
        build.environment(stacks.interpreter(stack))
    except (stacks.StackError, build.StandinError) as error:
        log.error(f"error: {error}")
        return {"torch_npu": stack, "unavailable": str(error), "rows": []}
    rows, about = [], {"versions": None, "device_name": None}
    for scenario in itertools.takewhile(lambda _: not stopped.is_set(), wanted):
        row = run_scenario(stack, scenario, model, expected)
        about = row.pop("about", about)
        rows.append(row)
        told = f"{row['relative_l2_error']:.1e}, {row['launches']} launches" if row["ran"] else row["reason"]
        log.info(f"torch_npu {stack}: {scenario}: {told}")
    return {"torch_npu": stack, **about, "rows": rows}


def check(names: Sequence[str], wanted: Sequence[Scenario] = SCENARIOS) -> dict[str, Any]:
    """The whole result. Raises UsageError where none of the stacks can be had."""
    try:
        from conftest import SAMPLES, save_checkpoint, tiny_model
    except ModuleNotFoundError as error:
        raise UsageError(f"{error}; run: pip install -r tests/requirements.txt") from error
    stopped = threading.Event()
    with TemporaryDirectory() as folder, ThreadPoolExecutor(len(names)) as pool:
        path = save_checkpoint(Path(folder), tiny_model(layers=LAYERS))
        model = inference.load_model(inference.open_device("cpu"), str(path))
        expected = inference.features(model, [SAMPLES / name for name in PHOTOS])
        try:
            found = list(pool.map(lambda name: run_stack(name, path, expected, wanted, stopped), names))
        except BaseException:
            stopped.set()
            raise
    if all("unavailable" in stack for stack in found):
        raise UsageError("no torch_npu can be had here, and nothing was checked")
    config = model.module.config
    sizes = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "patch_size", "image_size")
    return {
        "device": STAND_IN,
        "proves": PROVES,
        **inference.run_provenance(),
        "stand_in_sha256": {path.name: inference.sha256(path) for path in sorted(build.HERE.glob("*.[ch]*"))},
        "model": f"as many layers, and heads and patches of the size, as {inference.MODEL_NAME} has, in a narrow model",
        "dimensions": {name: getattr(config, name) for name in sizes},
        "weights": {"source": "random"},
        "photos": list(PHOTOS),
        "error_bars": ERROR_BARS,
        "launch_bars": LAUNCH_BARS,
        "stacks": found,
    }


def misses(result: dict[str, Any]) -> Iterator[str]:
    """A line for all that did not run, or not within its bar."""
    for stack in result["stacks"]:
        if "unavailable" in stack:
            yield stack["unavailable"]
        for row in stack["rows"]:
            what = f"torch_npu {stack['torch_npu']}: {Scenario(*(row[name] for name in Scenario._fields))}"
            if not row["ran"]:
                yield f"{what}: {row['reason']}"
            elif not row["relative_l2_error"] <= ERROR_BARS[row["dtype"]]:  # a NaN is over it
                yield f"{what}: its error is {row['relative_l2_error']:.1e}, over {ERROR_BARS[row['dtype']]:g}"
            elif row["levers"] == "all" and row["launches"] > LAUNCH_BARS[row["dtype"]]:
                yield f"{what}: {row['launches']} launches, over {LAUNCH_BARS[row['dtype']]}"


# --- command line ---


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    add = parser.add_argument
    add("stacks", nargs="*", metavar="TORCH_NPU", help=f"which of {', '.join(stacks.STACKS)} (default: all)")
    add("--results_dir", metavar="DIR", help="folder for the result, whatever it says")
    return parser


def run(names: Sequence[str], results_dir: str | None) -> int:
    """Check, write, say what did not keep its bar. Returns the exit code."""
    result = check(names)
    missed = list(misses(result))
    for line in missed:
        log.error(f"error: {line}")
    whole = not missed and set(names) == set(stacks.STACKS)
    folder = Path(results_dir) if results_dir else inference.ROOT / "results" / ("." if whole else "trial")
    path = folder / f"{NAME}.json"
    inference.write_json(path, result)
    log.info(f"Results saved to {inference.relative_to_root(path)}")
    return int(bool(missed))


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if unknown := [name for name in args.stacks if name not in stacks.STACKS]:
        parser.error(f"there is no stack {unknown[0]}; there are {', '.join(stacks.STACKS)}")
    return inference.guarded(NAME, lambda: run(args.stacks or list(stacks.STACKS), args.results_dir))


if __name__ == "__main__":
    inference.leave(main())
