#!/usr/bin/env bash
# torch 2.13.0: a photo that becomes a batch of one by [None] is resized in the slow layout, although it is channels-last.
#
# A decoded photo lies in memory as [H, W, 3], and torch resizes uint8 in that layout without rearranging it. There are two ways
# to say that it is a batch of one: permute, then [None]; or [None], then permute. Values, shape and what is_contiguous says of
# channels_last are the same, so one would expect the same result at the same speed. But the stride of the batch, which nothing
# uses where there is one image, differs: 3 in the first. By the strides alone torch then takes the photo for channels-first:
# it unpacks it, resizes, and packs it, and its output lies channels-first, which whoever wants [H, W, 3] transposes once more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import statistics
import sys
import time

import torch

torch.set_num_threads(1)
photo = torch.randint(0, 256, (384, 512, 3), dtype=torch.uint8)
last = torch.channels_last
batches = {"permute, then [None]": photo.permute(2, 0, 1)[None], "[None], then permute": photo[None].permute(0, 3, 1, 2)}


def resized(batch):
    return torch.nn.functional.interpolate(batch, (224, 298), mode="bicubic", antialias=True)


times = {way: [] for way in batches}
for _ in range(200):
    for way, batch in batches.items():
        started = time.perf_counter()
        resized(batch).permute(0, 2, 3, 1).contiguous()
        times[way].append(time.perf_counter() - started)
kept = {}
for way, batch in batches.items():
    kept[way] = resized(batch).is_contiguous(memory_format=last)
    print(f"torch {torch.__version__}, {way}: shape {tuple(batch.shape)}, strides {batch.stride()}, channels-last "
          f"{batch.is_contiguous(memory_format=last)}; resized it is channels-last: {kept[way]}")
slow, fast = times.values()
print(f"the first takes {statistics.median(a / b for a, b in zip(slow, fast)):.2f} times as long (varies with the machine)")
one, other = batches.values()
same = torch.equal(one, other) and torch.equal(resized(one), resized(other))
alike = one.is_contiguous(memory_format=last) and other.is_contiguous(memory_format=last)
sys.exit(0 if same and alike and list(kept.values()) == [False, True] else 1)
PYTHON
