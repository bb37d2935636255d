#!/usr/bin/env bash
# transformers 4.57.6: a model called by two threads at once with output_hidden_states=True gives one thread the other's states.
#
# One would expect a forward pass under no_grad to keep what it returns to itself: PyTorch's modules are used by several
# threads so, and the last hidden state is right. But to record hidden states 4.57.6 exchanges the layers' own forward for the
# time of a call, on the model that both share, so that each thread's states end up in whichever list was put there last.
# Seen: most calls come back with wrong states, or with too many or too few of them, and nothing is raised. 5.24.0 is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/threads.py" <<'PYTHON'
import sys
import threading

import torch
import transformers
from transformers import ViTConfig, ViTModel

torch.set_num_threads(1)
torch.manual_seed(0)
sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 64}
model = ViTModel(ViTConfig(**sizes)).eval()
inputs = [torch.randn(1, 3, 64, 64) for _ in range(2)]
calls, wrong = 200, [0, 0]


def states(thread):
    with torch.no_grad():
        return model(inputs[thread], output_hidden_states=True).hidden_states


alone = [states(thread) for thread in range(2)]


def call(thread):
    for _ in range(calls):
        found = states(thread)
        same = found is not None and len(found) == len(alone[thread]) and all(map(torch.equal, found, alone[thread]))
        wrong[thread] += not same


threads = [threading.Thread(target=call, args=(thread,)) for thread in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(f"transformers {transformers.__version__}: {sum(wrong)} of {2 * calls} calls by two threads have wrong hidden states")
sys.exit(0 if (sum(wrong) > 0) == (sys.argv[1] == "wrong") else 1)
PYTHON
for expected in "4.57.6 wrong" "5.24.0 right"; do
  read -r version outcome <<< "$expected"
  "$folder/venv/bin/pip" install -q "transformers==$version"
  "$folder/venv/bin/python" "$folder/threads.py" "$outcome"
done
