"""A ViT in float64 NumPy, written from the paper and not from any library: what the loaded model is checked against.

Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929, equations 1 to 4; exact GELU, pre-norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def forward(weights: Mapping[str, np.ndarray], pixels: np.ndarray, heads: int, eps: float) -> np.ndarray:
    """Pixel values [N, 3, H, W] to last_hidden_state [N, 1 + patches, D], from tensors by the hub's names."""

    def tensor(name: str) -> np.ndarray:
        return np.asarray(weights[name], np.float64)

    def linear(values: np.ndarray, name: str) -> np.ndarray:
        return values @ tensor(f"{name}.weight").T + tensor(f"{name}.bias")

    def norm(values: np.ndarray, name: str) -> np.ndarray:
        centred = values - values.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return scaled * tensor(f"{name}.weight") + tensor(f"{name}.bias")

    kernel = tensor("embeddings.patch_embeddings.projection.weight")
    width, _, patch, _ = kernel.shape
    count, channels, height, _ = pixels.shape
    grid = height // patch
    patches = pixels.astype(np.float64).reshape(count, channels, grid, patch, grid, patch)
    patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(count, grid * grid, -1)
    tokens = patches @ kernel.reshape(width, -1).T + tensor("embeddings.patch_embeddings.projection.bias")
    class_token = np.broadcast_to(tensor("embeddings.cls_token"), (count, 1, width))
    tokens = np.concatenate([class_token, tokens], 1) + tensor("embeddings.position_embeddings")

    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    for layer in range(layers):
        prefix = f"encoder.layer.{layer}"
        normed = norm(tokens, f"{prefix}.layernorm_before")
        projected = (linear(normed, f"{prefix}.attention.attention.{part}") for part in ("query", "key", "value"))
        query, key, value = (part.reshape(count, -1, heads, width // heads).transpose(0, 2, 1, 3) for part in projected)
        scores = query @ key.transpose(0, 1, 3, 2) / math.sqrt(width // heads)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        attention = (scores / scores.sum(-1, keepdims=True)) @ value
        attention = attention.transpose(0, 2, 1, 3).reshape(count, -1, width)
        tokens = tokens + linear(attention, f"{prefix}.attention.output.dense")
        hidden = linear(norm(tokens, f"{prefix}.layernorm_after"), f"{prefix}.intermediate.dense")
        hidden = 0.5 * hidden * (1 + _erf(hidden / math.sqrt(2)))
        tokens = tokens + linear(hidden, f"{prefix}.output.dense")
    return norm(tokens, "layernorm")
