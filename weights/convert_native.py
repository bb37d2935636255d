"""Turn Meta's native Web-SSL MAE checkpoint (.pth, timm's names) into a folder in transformers' layout, once.

    python weights/convert_native.py webssl_mae300m_full2b_224.pth weights/webssl-mae300m-full2b-224

Writes config.json, preprocessor_config.json and model.safetensors, all or nothing, after the bundle's own loader has taken
them. Takes the encoder of the 300M and its sisters (700M, 1B, 2B, 3B), also out of a training checkpoint; the decoder of MAE
pre-training is left out. The file has no pooler, and none is made up. The number of heads is not in such a file: it comes from
the width, or for another model from a config.json beside it with {"num_attention_heads": N}. A preprocessor_config.json beside
it is taken along. Nothing in the file is executed.

Exit codes: 0 done; 2 wrong usage, or a file that is no such checkpoint; 70 an error nobody foresaw; 130 stopped.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference  # first of all: it sets what must precede torch
import torch
from inference import UsageError, log

LAYER_NORM_EPS = 1e-6  # timm's, with which Meta's files were trained
# timm's names and transformers' (the hub's), applied in this order.
NAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.qkv\.", ".attention.attention.qkv."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def read_native(path: Path) -> dict[str, torch.Tensor]:
    """The encoder's tensors by timm's names. Raises UsageError where the file is damaged or something else."""
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type for entry in archive.infolist()):
                    raise ValueError("a compressed archive, which torch.save never writes")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        try:
            damage = inference.damage_of(path)
        except OSError as unreadable:
            raise UsageError(f"{path}: cannot be read ({unreadable.strerror})") from unreadable
        raise UsageError(f"{path}: {damage}, or not a plain state dict ({inference.first_line(error)})") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        log.info(f"{path}: a training checkpoint; its 'model' is taken")
        state = state["model"]
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{path}: not a plain state dict of tensors; Meta's native .pth is wanted")
    decoder = {name for name in state if name.startswith("decoder_") or name == "mask_token"}
    if decoder:
        log.info(f"{path}: {len(decoder)} tensors of the decoder of MAE pre-training (mask_token, decoder_*) are left out")
    return {name: tensor for name, tensor in state.items() if name not in decoder}


def config_of(path: Path, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """ViTConfig's fields by the tensors' shapes. A wrong number of heads would give wrong features without any error."""
    try:
        width = state["cls_token"].shape[-1]
        patch_size = state["patch_embed.proj.weight"].shape[-1]
        mlp = state["blocks.0.mlp.fc1.weight"].shape[0]
        image_size = math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size
    except (KeyError, IndexError) as error:
        raise UsageError(f"{path}: not a ViT in timm's layout: {error} is missing") from error
    heads = {card.width: card.heads for card in inference.CARDS}.get(width)
    beside = path.with_name("config.json")
    if beside.is_file():
        heads = inference.read_json(beside, "the model's configuration").get("num_attention_heads", heads)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        known = ", ".join(str(card.width) for card in inference.CARDS)
        raise UsageError(
            f"{path}: {width} wide is none of the Web-SSL MAE encoders ({known}), and the number of heads is not in the file; "
            'put a config.json with {"num_attention_heads": N} beside it'
        )
    return {
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith(".attn.qkv.weight") for name in state),
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "image_size": image_size,
        "patch_size": patch_size,
        "layer_norm_eps": LAYER_NORM_EPS,
    }


def to_hub_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by the hub's names; `attn.qkv` holds query, key and value stacked in that order.

    Names that are not known are kept, so that the loader reports them as unexpected.
    """
    mapped = {}
    for name, tensor in state.items():
        for native, hub in NAMES:
            name = re.sub(native, hub, name)
        if ".qkv." in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            mapped |= {name.replace("qkv", part): chunk.contiguous() for part, chunk in parts}
        else:
            mapped[name] = tensor.contiguous()
    return mapped


def convert(path: Path, folder: Path) -> None:
    """Write the folder. Raises UsageError where the file is not what it should be, or the folder cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import ViTConfig

    if folder.exists():
        raise UsageError(f"{folder}: there already; remove it, or name another folder")
    state = read_native(path)
    config = ViTConfig(**config_of(path, state), architectures=["ViTModel"])
    check_lock(path, inference.identify(config))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
            made = Path(name) / folder.name
            made.mkdir()
            config.save_pretrained(made)
            save_file(to_hub_names(state), made / "model.safetensors", metadata={"format": "pt"})
            write_preprocess(path, config.image_size, made)
            try:
                model = inference.load_model(inference.open_device("cpu"), str(made), allow_unlocked=True)
            except UsageError as error:  # it names a folder that is about to go
                raise UsageError(f"{path}: {str(error).replace(f'{name}/', '')}") from error
            made.rename(folder)
    except (OSError, SafetensorError) as error:  # safetensors has a name of its own for a disk that is full
        reason = getattr(error, "strerror", None) or inference.first_line(error)
        raise UsageError(f"{folder}: cannot be written ({reason})") from error
    log.info(f"{folder}: {model.title}, {model.parameters:,} parameters with a pooler that the file does not have")
    log.info(f"Use it: python inference.py --model_path {folder} --image_path photo.jpg")


def check_lock(path: Path, model: str) -> None:
    """Raises UsageError if the file's hash is not the one that locked_models.md records for it."""
    digest, locked = inference.sha256(path), inference.read_locks().get((model, path.name))
    log.info(f"{path}: {model}, sha256 {digest}")
    if locked not in (None, digest):
        raise UsageError(f"{path}: its sha256 is not the one recorded in locked_models.md for {model}; fetch the file again")


def write_preprocess(path: Path, image_size: int, folder: Path) -> None:
    """Take along the pre-processing that lies beside the native file, else write down the official demo's."""
    if (beside := path.with_name("preprocessor_config.json")).is_file():
        shutil.copy(beside, folder)
        return
    default = inference.Preprocess().resized(image_size)
    fields = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": default.resize},
        "resample": default.resample,
        "do_center_crop": True,
        "crop_size": {"height": default.image_size, "width": default.image_size},
        "do_rescale": True,
        "rescale_factor": default.rescale_factor,
        "do_normalize": True,
        "image_mean": default.mean,
        "image_std": default.std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    parser.add_argument("file", metavar="FILE.pth", type=Path, help="Meta's native checkpoint")
    parser.add_argument("folder", metavar="weights/NAME", type=Path, help="the folder to write, which must not be there yet")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    return inference.guarded("convert_native", lambda: convert(args.file, args.folder) or 0)


if __name__ == "__main__":
    inference.leave(main())
