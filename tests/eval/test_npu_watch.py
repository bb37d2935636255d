"""What npu-smi tells of a chip, and what a run makes of it."""

from __future__ import annotations

import os
import re
import stat
import time
from types import SimpleNamespace

import pytest

import eval_performance
import npu_watch

WATCH = """NpuID(Idx)  ChipId(Idx) Pwr(W)      Temp(C)     AI Core(%)
0           0           170.5       45          0
0           1           -           47          80
1           0           90.0        40          0
NpuID(Idx)  ChipId(Idx) Pwr(W)      Temp(C)     AI Core(%)
0           0           180.5       46          1
0           1           -           49          NA
dcmi module get no answer (simulated)
0           1
"""

MAPPING = """\tNPU ID     Chip ID     Chip Logic ID     Chip Name
\t0          0           0                 Ascend910
\t0          1           1                 Ascend910
\t0          2           -                 Mcu
\t1          0           2                 Ascend910
"""

PROCESSES = """
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| 0     Ascend910           | OK            | 170.5       45                0    / 0             |
| 0     1                   | 0000:9D:00.0  | 0           0    / 0          3130 / 65536         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
| 0       1                 | 48988         | python                   | 13330                   |
| 0       1                 | {pid:<13} | python                   | 1024                    |
| 0       1                 | 50001         |                          | 134                     |
| 1       0                 | 60000         | sglang                   | 60970                   |
| No running processes found in NPU 2                                                            |
"""


@pytest.fixture
def npu_smi(tmp_path, monkeypatch):
    """An npu-smi on the PATH that says what A3's does, and whose watch goes on for ever."""
    for name, text in (("watch", WATCH), ("mapping", MAPPING), ("processes", PROCESSES.format(pid=os.getpid()))):
        (tmp_path / name).write_text(text)
    script = tmp_path / "bin" / "npu-smi"
    script.parent.mkdir()
    ways = f'watch) cat "{tmp_path}/watch"; exec sleep 600;; -m) cat "{tmp_path}/mapping";; *) cat "{tmp_path}/processes";;'
    script.write_text(f'#!/bin/sh\ncase "$2" in {ways} esac\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


def npu_number(index: int) -> SimpleNamespace:
    return SimpleNamespace(torch_device=SimpleNamespace(index=index))


@pytest.mark.parametrize(("visible", "index", "chip"), [(None, 0, ("0", "0")), (None, 2, ("1", "0")), ("1,2", 0, ("0", "1"))])
def test_a_device_of_torch_is_found_among_cards_of_two_chips(npu_smi, monkeypatch, visible, index, chip):
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    assert npu_watch.chip_of(npu_number(index)) == chip


def test_other_processes_on_the_chip_are_named(npu_smi):
    assert npu_watch.others_on(("0", "1")) == ["python (48988)", " (50001)"]
    assert npu_watch.others_on(("1", "0")) == []  # one there is this one, whatever number the host gives it


def test_the_power_is_the_cards_and_the_rest_the_chips_own(npu_smi):
    with npu_watch.watching(("0", "1")) as lines:
        time.sleep(0.5)
    found = npu_watch.summarize_watch(lines, ("0", "1"), 100.0)
    assert found == {
        "samples": 2,
        "watts": pytest.approx(175.5),
        "temperature_c": 49.0,
        "ai_core_percent": 80.0,
        "images_per_s": 100.0,
        "joules_per_image": pytest.approx(1.755),
    }
    alone = npu_watch.summarize_watch([{"NpuID": "0", "ChipId": "1", "Pwr": "100"}], ("0", "1"), 50.0)
    assert (alone["joules_per_image"], alone["temperature_c"], alone["ai_core_percent"]) == (2.0, None, None)


def test_without_npu_smi_there_is_no_power_and_nobody_else(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with npu_watch.watching(("0", "0")) as lines:
        pass
    assert npu_watch.summarize_watch(lines, ("0", "0"), 1.0) is None
    assert npu_watch.others_on(("0", "0")) == []
    assert npu_watch.chip_of(npu_number(3)) == ("3", "0")


def test_a_hanging_npu_smi_says_nothing(monkeypatch):
    def hang(command, timeout, **options):
        raise npu_watch.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(npu_watch.subprocess, "run", hang)
    assert npu_watch.npu_smi("-m") == ""


def test_watch_with_all_of_its_columns():
    names = (
        "NpuID(Idx)  ChipId(Idx) Pwr(W) Temp(C) AI Core(%) AI Cpu(%) Ctrl Cpu(%) Memory(%) Memory BW(%) NPU Util(%) AI Cube(%)"
    )
    (line,) = npu_watch.parse_watch(f"npu-smi info watch\n{names}\n2 0 90.1 34 55 1 2 3 4 5 6\n")
    assert (line["Pwr"], line["Temp"], line["AI Core"], line["Memory BW"]) == ("90.1", "34", "55", "4")


def test_others_on_the_npu_are_said_and_its_power_is_measured(npu, npu_smi, no_peers, monkeypatch, measure):
    monkeypatch.setattr(eval_performance, "measure_deterministic_cost", lambda *arguments: None)
    real = eval_performance.measure_power
    monkeypatch.setattr(eval_performance, "measure_power", lambda *arguments: real(*arguments, seconds=0.3))
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1")
    done = measure("--batch_sizes", 2, device="npu")
    assert done.code == 0, done.terminal
    assert "Other processes are on this NPU, and its times may be too long: python (48988)" in done.terminal
    power = done.result["power"]
    assert power["joules_per_image"] == pytest.approx(175.5 / power["images_per_s"])
    assert re.search(r"Power of the card \(W\).*\n.* 175\.5 ", done.log)
