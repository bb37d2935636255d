#!/usr/bin/env bash
# transformers 5.17.0 and 5.24.0: an exported ViT computes attention with a mask of all true, the eager one with none.
#
# A ViT's patches all attend to each other, and its forward pass takes no mask. One would expect torch.export to keep the call
# of scaled_dot_product_attention as it is in eager. But while a model is traced transformers cannot look whether a mask may be
# left out, so it builds one, of all true, and gives it to every layer. The numbers are the same; a kernel that takes no mask
# can no longer be chosen, and whatever runs the exported graph computes one more addition in each layer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/masks.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import ViTConfig, ViTModel

sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 64}
model = ViTModel(ViTConfig(**sizes), add_pooling_layer=False).eval()
pixels = torch.zeros(1, 3, 64, 64)
masks = []
attention = torch.nn.functional.scaled_dot_product_attention


def seen(*args, attn_mask=None, **more):
    masks.append(attn_mask is not None)
    return attention(*args, attn_mask=attn_mask, **more)


torch.nn.functional.scaled_dot_product_attention = seen
with torch.no_grad():
    model(pixels)
    eager = masks.copy()
    masks.clear()
    torch.export.export(model, (pixels,))
print(f"transformers {transformers.__version__}: calls with a mask: eager {sum(eager)} of {len(eager)}, "
      f"exported {sum(masks)} of {len(masks)}")
sys.exit(0 if eager and masks and not any(eager) and all(masks) else 1)
PYTHON
for version in 5.17.0 5.24.0; do
  "$folder/venv/bin/pip" install -q "transformers==$version"
  "$folder/venv/bin/python" "$folder/masks.py"
done
