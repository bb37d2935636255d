"""What the evaluations share: tables, sample photos, child processes, and keeping what was measured whatever ends a run."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference  # first of all: it sets what must precede torch
import torch
from inference import Device, UsageError, log

from measures import finite_or_null

FEATURES = inference.JUDGED
SAMPLES = inference.ROOT / "assets" / "samples"
START_UP_S = 120.0  # what a child's imports may take
CHILD = f"""
import json, os, sys, time
sys.path[:0] = {[str(inference.ROOT), str(inference.ROOT / "eval")]!r}
given, answers = json.loads(sys.argv[1]), open(int(sys.argv[2]), "w", buffering=1)
def tell(answer):
    print(json.dumps(answer, allow_nan=False), file=answers)
"""


class Column(NamedTuple):
    """A column of a table: its heading in two languages, where its value is in a row (a.b for a nested one), the format."""

    en: str
    zh: str
    key: str
    form: str = ""
    scale: float = 1

    def cell(self, row: dict[str, Any], none: str = "-") -> str:
        """The value in a row as text, `none` where it is null or not there."""
        value: Any = row
        for key in self.key.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return none
        if isinstance(value, bool):
            return "yes" if value else "no"
        return format(value * self.scale, self.form) if isinstance(value, (int, float)) else str(value)


def log_table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> None:
    """Log rows as a table in the columns' formats; nothing where there are none."""
    cells = [[column.en for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells if rows else ():
        log.info("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))


def peak_memory_mb(device: Device) -> float:
    """Peak memory in MiB: allocated on an accelerator since it was last reset, resident for this process on the CPU."""
    if device.kind != "cpu":
        return torch.get_device_module(device.torch_device).max_memory_allocated(device.torch_device) / 2**20
    import resource

    with suppress(OSError, TypeError):  # getrusage would give the peak of the process that started this one, if larger
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


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
                    raise ChildError("no answer in time", f"no answer within {allowed:g} s")
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
def keeping(args: argparse.Namespace, result: dict[str, Any], device: Device) -> Iterator[Callable[..., None]]:
    """Gives a function that adds what was measured to `result` and saves it: whatever ends the block, the last line says where.

    The file is NAME_partial.json beside the whole result, which it never replaces; it goes when all is done. Nothing is saved
    once the device has stopped computing.
    """
    path = args.results / f"{inference.result_name(f'{args.script}_partial', result['device'])}.json"
    kept = "nothing was measured yet"

    def keep(**measured: Any) -> None:
        nonlocal kept
        inference.require_computing(device)
        result.update(finite_or_null(measured))
        inference.write_json(path, {"partial": True} | result)
        kept = f"what was measured so far is in {inference.relative_to_root(path)}"

    try:
        yield keep
    except UsageError as error:
        raise UsageError(f"{error}; {kept}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {kept}") from None
    except Exception as error:
        if inference.is_lost(error):
            raise inference.DeviceLost(f"{inference.what_lost_means(error)}; {kept}") from error
        raise RuntimeError(f"{type(error).__name__}: {inference.first_line(error)}; {kept}") from error
    path.unlink(missing_ok=True)
