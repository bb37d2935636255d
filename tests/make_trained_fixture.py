"""Make tests/data/trained_vit: a small ViT with what sets trained weights apart from random ones.

    python tests/make_trained_fixture.py

Masked-autoencoder steps on the sample photos (He et al., arXiv 2111.06377: 75% masked, error on the masked patches, normalised
per patch). Then massive activations are grown on a few tokens and channels (Sun et al., arXiv 2402.17762) and it is trained on,
so that the layers behind have learned to live with them. About a minute on two cores; the committed file is what tests use.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import inference
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import SAMPLES, TINY_PREPROCESS

FOLDER = Path(__file__).resolve().parent / "data" / "trained_vit"
CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 64,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}
CROPS, STEPS, STEPS_WITH_OUTLIERS, BATCH = 1500, 800, 400, 32
OUTLIER_TOKENS, OUTLIER_CHANNELS, OUTLIER = (1, 20, 43), (7, 50), 100.0


def photos() -> list[Image.Image]:
    return [
        inference.decode(path.read_bytes()).convert("RGB")
        for path in sorted(SAMPLES.iterdir())
        if inference.is_image_name(str(path))
    ]


def random_crops(images: list[Image.Image], numbers: np.random.Generator) -> torch.Tensor:
    """Normalised pixels [CROPS, 3, 64, 64] of random squares, half of them mirrored."""
    crops = []
    for _ in range(CROPS):
        image = images[numbers.integers(len(images))]
        side = int(min(image.size) * numbers.uniform(0.2, 1.0))
        left, top = (int(numbers.integers(edge - side + 1)) for edge in image.size)
        crop = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))
        crops.append(crop[:, ::-1] if numbers.random() < 0.5 else crop)
    return inference.normalize(torch.from_numpy(np.stack(crops)), inference.Preprocess())


class Autoencoder(torch.nn.Module):
    """The encoder on a quarter of the patches, and a decoder of one layer that paints the others."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        width, patches = CONFIG["hidden_size"], (CONFIG["image_size"] // CONFIG["patch_size"]) ** 2
        self.encoder = encoder
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.positions = torch.nn.Parameter(torch.empty(1, 1 + patches, width).normal_(0, 0.02))
        self.decoder = torch.nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.paint = torch.nn.Linear(width, 3 * CONFIG["patch_size"] ** 2)

    def forward(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, size = len(pixels), CONFIG["patch_size"]
        tokens = self.encoder.embeddings(pixels)
        order = torch.rand(count, tokens.shape[1] - 1, generator=generator).argsort(1) + 1
        kept = torch.cat([torch.zeros(count, 1, dtype=torch.long), order[:, : order.shape[1] // 4]], 1)
        wide = kept[..., None].expand(-1, -1, tokens.shape[-1])
        seen = tokens.gather(1, wide)
        for layer in inference.layers_of(self.encoder):
            output = layer(seen)
            seen = output[0] if isinstance(output, tuple) else output
        seen = self.encoder.layernorm(seen)
        whole = self.mask_token.expand_as(tokens).clone().scatter(1, wide, seen) + self.positions
        painted = self.paint(self.decoder(whole))[:, 1:]
        patches = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).reshape(count, -1, 3 * size**2)
        patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        hidden = order[:, order.shape[1] // 4 :] - 1
        error = (painted - patches).square().mean(-1)
        return error.gather(1, hidden).mean()


def train(model: Autoencoder, steps: int, crops: torch.Tensor, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        batch = crops[torch.randint(len(crops), (BATCH,), generator=generator)]
        loss = model(batch, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def main() -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    crops, generator = random_crops(photos(), np.random.default_rng(0)), torch.Generator().manual_seed(0)
    encoder = ViTModel(ViTConfig(**CONFIG))
    model = Autoencoder(encoder)
    train(model, STEPS, crops, generator)
    with torch.no_grad():
        for channel in OUTLIER_CHANNELS:
            encoder.embeddings.position_embeddings[0, list(OUTLIER_TOKENS), channel] += OUTLIER
    train(model, STEPS_WITH_OUTLIERS, crops, generator)
    with torch.no_grad():  # a pooler that has learned something: no zero bias, not the spread of an initialisation
        encoder.pooler.dense.weight.normal_(0, 0.1)
        encoder.pooler.dense.bias.normal_(0, 0.1)
    encoder.save_pretrained(FOLDER)
    tensors = {name: tensor.half() for name, tensor in load_file(FOLDER / "model.safetensors").items()}
    save_file(tensors, FOLDER / "model.safetensors", metadata={"format": "pt"})
    (FOLDER / "preprocessor_config.json").write_text(json.dumps(TINY_PREPROCESS, indent=2) + "\n")


if __name__ == "__main__":
    main()
