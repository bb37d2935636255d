"""Draw photos beside their patch tokens as colours: the first three principal components over all photos.

    python eval/pca.py --image_path photos/ --output picture.png --device npu

Each crop stands beside a grid with a colour for each patch; colours compare between the photos of a picture, not between
pictures. The picture says which model and arithmetic it is of, and the variance that the three components explain. Writes
results/pca.json and logs/pca.log too (pca_cpu.json and so on for devices other than an NPU), from which the page's picture is
drawn.

Exit codes: 0 done; 2 wrong usage or unusable input; 3 BLOCKED: the device cannot be used; 70 an unforeseen error; 130 stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference  # first of all: it sets what must precede torch
import numpy as np
from inference import UsageError, log
from PIL import Image, ImageDraw, ImageFont

MAX_PHOTOS = 100  # of a picture
SIDE, MARGIN, LINE = 448, 16, 22  # pixels


def principal_components(patch_tokens: np.ndarray, count: int = 3) -> tuple[np.ndarray, float]:
    """Patch tokens [N, P, D] on their first components over all images: [N, P, count], and the variance explained in percent.

    The sign of a component is arbitrary; it is set so that its largest weight is positive.
    """
    tokens = patch_tokens.reshape(-1, patch_tokens.shape[-1]).astype(np.float64)
    tokens -= tokens.mean(0)
    _, singular, directions = np.linalg.svd(tokens, full_matrices=False)
    directions = directions[:count]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1, keepdims=True), 1)
    projected = tokens @ (directions * np.sign(largest)).T
    projected = np.pad(projected, ((0, 0), (0, count - len(directions))))  # fewer than three patches have fewer components
    explained = 100 * (singular[:count] ** 2).sum() / max((singular**2).sum(), np.finfo(np.float64).tiny)
    return projected.reshape(*patch_tokens.shape[:2], -1), float(explained)


def patch_colours(patch_tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """Colours uint8 [N, rows, columns, 3] of patch tokens [N, P, D]: their first three components as red, green and blue.

    They run from the 1st to the 99th percentile of each component over all images, so that they compare between images.
    Returns the variance explained in percent too.
    """
    projected, explained = principal_components(patch_tokens)
    low, high = np.percentile(projected, (1, 99), axis=(0, 1))
    colours = np.clip((projected - low) / np.maximum(high - low, 1e-12), 0, 1)
    grid = math.isqrt(patch_tokens.shape[1])
    return (colours.reshape(-1, grid, grid, 3) * 255).round().astype(np.uint8), explained


def colours_of(result: dict[str, Any]) -> np.ndarray:
    """The colours in a result, uint8 [N, rows, columns, 3]."""
    grids = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in result["colours_hex"]]
    side = math.isqrt(grids[0].size // 3)
    return np.stack(grids).reshape(-1, side, side, 3)


def draw(crops: np.ndarray, colours: np.ndarray, names: Sequence[str], heading: Sequence[str]) -> Image.Image:
    """Draw each crop uint8 [N, H, W, 3] beside its patches' colours uint8 [N, rows, columns, 3], under lines of heading."""
    font = ImageFont.load_default(size=16)
    top = MARGIN + LINE * len(heading)
    picture = Image.new("RGB", (2 * SIDE + 3 * MARGIN, top + len(crops) * (SIDE + LINE + MARGIN)), "white")
    pen = ImageDraw.Draw(picture)
    for number, text in enumerate(heading):
        pen.text((MARGIN, MARGIN // 2 + LINE * number), _fit_text(text, font), "black", font)
    for crop, colour, name in zip(crops, colours, names, strict=True):
        picture.paste(Image.fromarray(crop).resize((SIDE, SIDE), Image.Resampling.BICUBIC), (MARGIN, top))
        picture.paste(Image.fromarray(colour).resize((SIDE, SIDE), Image.Resampling.NEAREST), (2 * MARGIN + SIDE, top))
        pen.text((MARGIN, top + SIDE + 2), _fit_text(name, font), "black", font)
        top += SIDE + LINE + MARGIN
    return picture


def _fit_text(text: str, font: Any) -> str:
    """The end of `text` that fits: of a path, the end tells most."""
    shown = text
    while font.getlength(shown) > 2 * SIDE + MARGIN:
        shown = "..." + shown[4:]
    return shown


def heading(result: dict[str, Any]) -> list[str]:
    """What the picture of a result says of itself."""
    made_of = "random weights: the colours mean nothing" if result["weights"]["source"] == "random" else "patch tokens"
    return [
        f"{result['model']}, {result['dtype']} on {result['device_name']}",
        f"{made_of}; first 3 principal components, {result['explained_variance_percent']:.1f}% of the variance",
    ]


def run(args: argparse.Namespace) -> int:
    """The body of the script."""
    device = inference.open_as_asked(args)
    paths = inference.find_images(args.image_path)
    if len(paths) > MAX_PHOTOS:
        raise UsageError(f"--image_path: at most {MAX_PHOTOS} photos fit into a picture, and these are {len(paths):,}")
    model = inference.load_from_args(args, device)
    crops = inference.crops_of(paths, model.preprocess)
    found, _ = inference.host_features(model, crops, ["patch_tokens"], inference.default_batch_size(device.kind))
    inference.require_finite(found, paths, model)
    colours, explained = patch_colours(found["patch_tokens"])
    inference.require_computing(device)
    result = {
        "device": device.kind,
        "dtype": model.dtype_name,
        "image_size": model.preprocess.image_size,
        "image_path": [inference.shown_path(path) for path in paths],
        "explained_variance_percent": explained,
        "colours_hex": [patches.tobytes().hex() for patches in colours],
        **inference.provenance(model),
    }
    if args.output:
        picture, path = draw(crops.numpy(), colours, paths, heading(result)), Path(args.output)
        with inference.replacing(path) as file:
            picture.save(file, format="PNG" if path.suffix.lower() == ".png" else "JPEG", quality=95)
        log.info(f"Picture saved to {path}")
    log.info(f"The three components explain {explained:.1f}% of the variance")
    inference.write_result(args, result)
    return 0


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    add = parser.add_argument_group("picture").add_argument
    add("--image_path", nargs="+", required=True, metavar="PATH", help=f"images, globs, folders: {MAX_PHOTOS} photos at most")
    add("--output", metavar="FILE", help="FILE.png or FILE.jpg (default: the result alone)")
    inference.add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.output is not None and Path(args.output).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--output {args.output}: the name must end in .png or .jpg")
    return inference.run_script("pca", args, run)


if __name__ == "__main__":
    inference.leave(main())
