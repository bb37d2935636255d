"""What npu-smi tells of a chip: which it is, who else is on it, its power, temperature and use of AI Cores."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference import Device


def npu_smi(*arguments: str) -> str:
    """What `npu-smi info` prints; "" without it, or where it fails or hangs."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["npu-smi", "info", *arguments]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True).stdout
    return ""


def chip_of(device: Device) -> tuple[str, str]:
    """npu-smi's numbers of the card and of the chip on it: of an Atlas A3, a card is two devices of torch."""
    visible, index = re.findall(r"\d+", os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "")), device.torch_device.index or 0
    logic = visible[index] if index < len(visible) else str(index)
    table = [line.split() for line in npu_smi("-m").splitlines()]  # NPU ID, chip ID, chip logic ID, ...
    return next(((cells[0], cells[1]) for cells in table if len(cells) > 2 and cells[2] == logic), (logic, "0"))


def others_on(chip: tuple[str, str]) -> list[str]:
    """Processes on a chip beside one, which is this: in a container, npu-smi may give it a number of the host's."""
    found = re.findall(r"^\|\s*(\d+)\s+(\d+)\s*\|\s*(\d+)\s*\|\s*(\S*)\s*\|", npu_smi(), re.MULTILINE)
    here = [(number, name) for card, die, number, name in found if (card, die) == chip]
    return [f"{name} ({number})" for number, name in sorted(here, key=lambda each: each[0] == str(os.getpid()))[:-1]]


@contextmanager
def watching(chip: tuple[str, str]) -> Iterator[list[dict[str, str]]]:
    """A list that holds, once the block has ended, a line of `npu-smi info watch` for each second; empty without npu-smi."""
    lines: list[dict[str, str]] = []
    command = ["npu-smi", "info", "watch", "-i", chip[0], "-d", "1", "-s", "pta"]
    if shutil.which("stdbuf"):  # into a pipe it would write only when its buffer is full
        command = ["stdbuf", "-oL", *command]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace")
    except OSError:
        yield lines
        return
    try:
        yield lines
    finally:
        process.kill()
        lines += parse_watch(process.communicate()[0])


def parse_watch(text: str) -> list[dict[str, str]]:
    """Lines of `npu-smi info watch` by the names in its header, which comes again and again; whatever else is left out."""
    names: list[str] = []
    lines = []
    for line in text.splitlines():
        cells = line.split()
        if "NpuID" in line:
            names = [name.strip() for name in re.findall(r"([A-Za-z][A-Za-z ]*)\([^)]*\)", line)]
        elif names and len(cells) == len(names):
            lines.append(dict(zip(names, cells, strict=True)))
    return lines


def summarize_watch(lines: Sequence[dict[str, str]], chip: tuple[str, str], images_per_s: float) -> dict[str, Any] | None:
    """Power of the card (one of its chips tells it), temperature and AI Core use of the chip; None where no power was told."""

    def numbers(name: str, of: Sequence[dict[str, str]]) -> list[float]:
        return [float(line[name]) for line in of if re.fullmatch(r"\d+(\.\d+)?", line.get(name, ""))]

    card = [line for line in lines if line["NpuID"] == chip[0]]
    own = [line for line in card if line.get("ChipId") == chip[1]]
    watts = numbers("Pwr", own) or numbers("Pwr", card)
    if not watts:
        return None
    temperatures, use = numbers("Temp", own), numbers("AI Core", own)
    return {
        "samples": len(watts),
        "watts": statistics.mean(watts),
        "temperature_c": max(temperatures, default=None),
        "ai_core_percent": statistics.mean(use) if use else None,
        "images_per_s": images_per_s,
        "joules_per_image": statistics.mean(watts) / images_per_s,
    }
