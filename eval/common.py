"""What the evaluations share: sample photos, child processes, and that what was measured is kept whatever ends a run."""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference  # first of all: it sets what must precede torch
from inference import UsageError, torch

from measures import finite_or_null

FEATURES = ("class_token", "mean_patch_token")
SAMPLES = inference.ROOT / "assets" / "samples"
START_UP_S = 120.0  # what a child's imports may take
CHILD = f"""
import json, os, sys, time
sys.path[:0] = {[str(inference.ROOT), str(inference.ROOT / "eval")]!r}
given, answers = json.loads(sys.argv[1]), open(int(sys.argv[2]), "w", buffering=1)
def tell(answer):
    print(json.dumps(answer, allow_nan=False), file=answers)
"""


def sample_crops(preprocess: inference.Preprocess) -> torch.Tensor:
    """The sample photos as uint8 crops [N, H, W, 3]."""
    return inference.crops_of(inference.find_images([str(SAMPLES)]), preprocess)


def positive_float(text: str, at_most: float = math.inf) -> float:
    """An argparse type."""
    with suppress(ValueError):
        if 0 < float(text) <= at_most and math.isfinite(float(text)):
            return float(text)
    limit = "" if at_most == math.inf else f" and at most {at_most:g}"
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero{limit}")


class ChildError(UsageError):
    """What ended a child process before it told all: it hung, or crashed."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def ask_child(
    code: str, given: dict[str, Any], count: int, limit_s: float, environment: dict[str, str] | None = None
) -> Iterator[Any]:
    """`count` answers that `code` tells in a process of its own, which knows `given`; then it is ended.

    Raises ChildError where one takes more than `limit_s` seconds, or the process ends before.
    """
    reader, writer = os.pipe()  # libraries print to the standard output
    command = [sys.executable, "-c", CHILD + code, json.dumps(given, default=str), str(writer)]
    with open(reader, "rb", buffering=0) as answers, tempfile.TemporaryFile("w+", errors="replace") as said:
        child = subprocess.Popen(command, stdout=said, stderr=said, env=environment, pass_fds=[writer], start_new_session=True)
        os.close(writer)
        try:
            allowed = max(limit_s, START_UP_S)
            for _ in range(count):
                if not select.select([answers], [], [], allowed)[0]:
                    raise ChildError("hung", f"no answer within {allowed:g} s")
                answer = answers.readline()
                if not answer:
                    child.wait()
                    said.seek(0)
                    lines = said.read().strip().splitlines() or ["it said nothing"]
                    raise ChildError("crashed", f"exit code {child.returncode}: {lines[-1][:200]}")
                yield json.loads(answer)
                allowed = limit_s
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@contextmanager
def keeping(args: argparse.Namespace, result: dict[str, Any]) -> Iterator[Callable[..., None]]:
    """Gives a function that adds what was measured to `result` and saves it: whatever ends the block, the last line says where.

    The file is NAME_partial.json beside the whole result, which it never replaces; it goes when all is done.
    """
    path = args.results / f"{inference.result_name(f'{args.script}_partial', result['device'])}.json"
    kept = "nothing was measured yet"
    inference.stopping.last_words = f"stopped; {kept}"

    def keep(**measured: Any) -> None:
        nonlocal kept
        result.update(finite_or_null(measured))
        inference.write_json(path, {"partial": True} | result)
        kept = f"what was measured so far is in {inference.relative_to_root(path)}"
        inference.stopping.last_words = f"stopped; {kept}"

    try:
        yield keep
    except UsageError as error:
        raise UsageError(f"{error}; {kept}") from error
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {inference.first_line(error)}; {kept}") from error
    path.unlink(missing_ok=True)
