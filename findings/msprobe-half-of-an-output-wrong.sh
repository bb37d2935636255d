#!/usr/bin/env bash
# msprobe 26.2.0 (mindstudio-probe, Ascend's accuracy tool): its compare passes an output of which half is 50% off.
#
# In task "tensor" it counts the elements within a thousandth of the golden ones (One Thousandth Err Ratio). Its own message says
# what to expect: an error where this is over 0.9 for the inputs "while the output < 0.6". Seen: a linear layer of equal inputs
# and weights, whose output is 50% off for one image of two, has a ratio of 0.5 and passes; the code asks for less than 0.1.
# Here the layer is made wrong on a CPU, inside torch.nn.functional.linear; all images wrong by as much are an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${1:-$folder/venv/bin/python}
if [ $# = 0 ]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install -q torch==2.13.0 mindstudio-probe==26.2.0
fi
export TORCH_DEVICE_BACKEND_AUTOLOAD=0
cat > "$folder/dump.py" <<'PYTHON'
import sys

import torch

folder, wrong_images = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3))).eval()
images = torch.randn(2, 16, 64)
linear, calls = torch.nn.functional.linear, []


def wrong(*arguments, **named):
    found = linear(*arguments, **named).clone()
    calls.append(found)
    if len(calls) == 2:
        found[:wrong_images] *= 1.5
    return found


torch.nn.functional.linear = wrong  # before msprobe takes hold of it
from msprobe.pytorch import PrecisionDebugger

debugger = PrecisionDebugger(dump_path=folder, task="tensor", level="L1")
debugger.start(model)
with torch.no_grad():
    model(images)
debugger.stop()
debugger.step()
PYTHON
cat > "$folder/read.py" <<'PYTHON'
import csv
import glob
import sys

with open(glob.glob(f"{sys.argv[1]}/*.csv")[0], newline="") as file:
    rows = {row["NPU Name"]: row for row in csv.DictReader(file)}
row = rows["Functional.linear.1.forward.output.0"]
ratio = float(row["One Thousandth Err Ratio"])
print(f"{sys.argv[2]} of 2 images wrong by 50%: One Thousandth Err Ratio {ratio:.2f}, result: {row['Result']}")
sys.exit(0 if row["Result"] == sys.argv[3] and ratio < 0.6 else 1)
PYTHON
for wrong in 0 1 2; do
  "$python" "$folder/dump.py" "$folder/$wrong" "$wrong" > "$folder/log" 2>&1 || { tail -n 5 "$folder/log"; exit 1; }
done
for expected in "1 pass" "2 error"; do
  read -r wrong result <<< "$expected"
  compare=(-c 'import sys; from msprobe.msprobe import main; sys.argv[0] = "msprobe"; main()' compare)
  "$python" "${compare[@]}" -tp "$folder/$wrong/step0" -gp "$folder/0/step0" -o "$folder/out$wrong" > "$folder/log" 2>&1 ||
    { tail -n 5 "$folder/log"; exit 1; }
  "$python" "$folder/read.py" "$folder/out$wrong" "$wrong" "$result"
done
