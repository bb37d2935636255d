"""What embed_cluster.py costs beside embed.py: seconds, CPU seconds of all processes, and the steady rate, in turns.

    python tests/cluster/cost.py --images 2000 --pairs 5

Random weights of the real size would hide it: a tiny model on small photos is the worst case. Ray is begun anew for each run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

from PIL import Image

from conftest import ROOT, SAMPLES, save_checkpoint, script_environment, tiny_model

TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds_of(session: int, found: dict[int, float]) -> None:
    """Put the CPU seconds of all processes that have begun in a session, or below it, into `found`."""
    parents, sessions, used = {}, {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            pid = int(path.name)
            parents[pid], sessions[pid] = int(fields[1]), int(fields[3])
            used[pid] = (int(fields[11]) + int(fields[12])) / TICK
    ours = {pid for pid, number in sessions.items() if number == session} | (found.keys() & used.keys())
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    found.update({pid: used[pid] for pid in ours})


def measure(script: str, *arguments: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/terminal", "w+b") as terminal:
        command = [sys.executable, str(ROOT / script), *arguments, "--output", f"{folder}/out", "--output_log", f"{folder}/log"]
        environment = script_environment(RAY_AUTH_MODE="token", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
        environment.pop("RAY_ADDRESS", None)
        started, used = time.perf_counter(), {}
        running = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment, start_new_session=True)
        while running.poll() is None:
            cpu_seconds_of(running.pid, used)
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        terminal.seek(0)
        told = terminal.read().decode(errors="replace")
        assert running.returncode == 0, told
        parts = sorted(path.stat().st_mtime_ns / 1e9 for path in Path(f"{folder}/out").glob("part-*.npz"))
        return {"seconds": seconds, "cpu": sum(used.values()), "parts_per_s": (len(parts) - 1) / (parts[-1] - parts[0])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = save_checkpoint(Path(folder) / "weights", tiny_model())
        photos = Path(folder) / "photos"
        photos.mkdir()
        photo = Image.open(SAMPLES / "chelsea.jpg").convert("RGB").resize((320, 240))
        for number in range(args.images):
            photo.save(photos / f"{number:06d}.jpg")
        common = ("--image_path", str(photos), "--model_path", str(weights), "--device", "cpu", "--num_workers", "1")
        common += ("--part_size", str(max(1, args.images // 20)))
        found = {"embed.py": [], "embed_cluster.py": []}
        for _ in range(args.pairs):
            for script, runs in found.items():
                runs.append(measure(script, *common))
                print(json.dumps({script: runs[-1]}), flush=True)
    for name in ("seconds", "cpu", "parts_per_s"):
        ratios = [ray[name] / alone[name] for alone, ray in zip(*found.values())]
        spread = re.sub(r"[\[\]]", "", str([round(ratio, 3) for ratio in sorted(ratios)]))
        print(f"{name}: embed_cluster.py takes {statistics.median(ratios):.3f} of embed.py's (pairs: {spread})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
