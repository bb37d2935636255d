"""What a plan costs: seconds on one core, and memory, for 100,000 tars of object storage and for 10 million loose files.

    python tests/cluster/plan_size.py --tars 100000
    python tests/cluster/plan_size.py --files 10000000
    python tests/cluster/plan_size.py --files 10000000 --local

Storage is simulated: listings are made up as they are asked for, so that what is measured is the plan and not a server.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import inference
import fsspec

import embed
from bulk import rounds
from bulk.parts import check_disk, find_changed
from bulk.sources import list_sources, walk_files

FOLDER = 10_000  # names in a folder
CHANGED = datetime(2026, 1, 1, tzinfo=timezone.utc)


class MadeUp(fsspec.AbstractFileSystem):
    """A bucket of folders with FOLDER files each."""

    protocol, count, suffix = "madeup", 0, ".jpg"

    def info(self, path: str, **_: object) -> dict[str, object]:
        return {"name": path, "size": 0, "type": "directory"}

    def ls(self, path: str, detail: bool = True, **_: object) -> list[dict[str, object]]:
        path = self._strip_protocol(path)
        last = path.rpartition("/")[2]
        if not last.isdigit():
            return [{"name": f"{path}/{first:08d}", "size": 0, "type": "directory"} for first in range(0, self.count, FOLDER)]
        names = (f"{path}/{place:09d}{self.suffix}" for place in range(int(last), min(int(last) + FOLDER, self.count)))
        return [{"name": name, "size": 123_456, "type": "file", "LastModified": CHANGED} for name in names]


def walked(count: int):
    """What os.walk gives of such a tree on this machine."""

    def walk(folder: str, **_: object):
        tops = [f"{first:08d}" for first in range(0, count, FOLDER)]
        yield folder, tops, []
        for top in tops:
            yield f"{folder}/{top}", [], [f"{place:09d}.jpg" for place in range(int(top), min(int(top) + FOLDER, count))]

    return walk


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", type=int, default=0)
    parser.add_argument("--files", type=int, default=0)
    parser.add_argument("--local", action="store_true", help="files of this machine")
    args = parser.parse_args()
    MadeUp.count, MadeUp.suffix = args.tars or args.files, ".tar" if args.tars else ".jpg"
    fsspec.register_implementation("madeup", MadeUp)
    before, started, cpu = peak(), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        named = "madeup://bucket/laion/images"
        if args.local:
            named, numbers = folder, iter(range(1 << 62))
            os.walk, stat = walked(args.files), os.stat
            os.stat = lambda path, **more: (
                stat(folder, **more) if not str(path).startswith(f"{folder}/0") else Folder(next(numbers))
            )
            assert next(walk_files(named, {})).endswith("000000000.jpg")
        sources = list_sources([named])
        listed = time.process_time() - cpu
        with rounds.lock(f"{folder}/out", 0, 1) as lock:
            manifest = {"made_from": {"format": embed.FORMAT}, "rounds": []}
            recipe = embed.Recipe({"class_token": (1024,)}, embed.PART_SIZE, 64, "", manifest)
            named_args = argparse.Namespace(feature_dtype="float32", add=False, retry_failed=False)
            plan = embed.make_plan(named_args, sources, recipe, lock)
            find_changed(plan, plan.numbers)
            if not args.local and args.tars:
                check_disk(plan)
            left = plan.unfinished()
            unit = plan.unit(left[-1])
    took = f"{time.process_time() - cpu:.1f} CPU s, {listed:.1f} of them listing; {time.perf_counter() - started:.1f} s"
    print(f"{sources}: {len(left):,} parts, the last of {len(unit.images):,} files; {took}; {peak() - before:,.0f} MB", end="")
    print(f" beside the {before:,.0f} MB of the imports")
    return 0


class Folder:
    def __init__(self, number: int) -> None:
        self.st_dev, self.st_ino = 1, number


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    inference.log.setLevel("ERROR")
    sys.exit(main())
