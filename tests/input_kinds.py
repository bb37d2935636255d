"""What the bundle does with each kind of input, found out by giving it one of each. Writes tests/INPUTS.md.

    python tests/input_kinds.py

What becomes of a picture is told by comparing what decode() gives with what Pillow and arithmetic give; what is refused is told
by the line that a user gets. test_input_kinds.py holds the page equal to what a run gives.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import inference
import numpy as np
import torch
from inference import BadImage, UsageError
from PIL import Image, ImageCms, ImageOps
from safetensors.torch import load_file, save_file

from bulk import storage
from bulk.sources import index_tar, list_sources
from bulk_runs import make_tar
from conftest import SAMPLES, TINY_PREPROCESS, save_checkpoint, tiny_model, to_native_names
from made_images import bmp, encoded, grey_tiff, png, png_header, tiff_of_bands

PAGE = TESTS / "INPUTS.md"
TRAINED = TESTS / "data" / "trained_vit"
Rows = Iterator[tuple[str, str]]  # a kind, and what becomes of it

# --- pictures ---


def pictures() -> dict[str, bytes]:
    """A file of each kind."""
    cat = Image.open(SAMPLES / "chelsea.jpg").convert("RGB").resize((48, 32))
    grey, clear = cat.convert("L"), cat.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(cat.size))
    shades, colours = np.asarray(grey), np.asarray(cat)
    deep = Image.fromarray(shades.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    opaque, unset = np.dstack([colours, np.full_like(shades, 255)]), np.dstack([colours, np.zeros_like(shades)])

    def several(format: str, **options: object) -> bytes:  # with fresh pictures: those that were saved as JPEG have become odd
        more = {"save_all": True, "append_images": [Image.new("RGB", cat.size, "red")]}
        return encoded(cat.copy(), format, **more, **options)

    return {
        "JPEG": encoded(cat, "JPEG"),
        "JPEG, progressive": encoded(cat, "JPEG", progressive=True),
        "JPEG, grey": encoded(grey, "JPEG"),
        "JPEG, CMYK": encoded(cat.convert("CMYK"), "JPEG"),
        "JPEG, turned by EXIF orientation 6": encoded(cat, "JPEG", exif=exif),
        "JPEG with a second picture (MPO, as phones write for depth)": several("MPO"),
        "PNG, black and white (1 bit)": encoded(cat.convert("1"), "PNG"),
        "PNG, grey of 8 bits": encoded(grey, "PNG"),
        "PNG, grey of 16 bits": encoded(deep, "PNG"),
        "PNG, grey with a transparent shade": encoded(grey, "PNG", transparency=int(shades[0, 0])),
        "PNG, grey with alpha": encoded(clear.convert("LA"), "PNG"),
        "PNG, colours of 8 bits": encoded(cat, "PNG"),
        "PNG, colours of 16 bits": png(colours.astype(">u2") * 257),
        "PNG, colours with alpha": encoded(clear, "PNG"),
        "PNG, palette": encoded(cat.quantize(64), "PNG"),
        "PNG, palette with alpha": encoded(clear.quantize(64), "PNG"),
        "PNG, animated": several("PNG"),
        "GIF": encoded(cat.quantize(64), "GIF"),
        "GIF, animated": several("GIF"),
        "GIF, one colour transparent": encoded(cat.quantize(64), "GIF", transparency=3),
        "WebP": encoded(cat, "WEBP"),
        "WebP with alpha": encoded(clear, "WEBP", lossless=True),
        "WebP, animated": several("WEBP", lossless=True),
        "BMP of 1 bit": encoded(cat.convert("1"), "BMP"),
        "BMP, palette": encoded(cat.quantize(64), "BMP"),
        "BMP of 24 bits": encoded(cat, "BMP"),
        "BMP of 32 bits, the fourth byte set": bmp(opaque),
        "BMP of 32 bits, the fourth byte zero throughout": bmp(unset),
        "TIFF": encoded(cat, "TIFF"),
        "TIFF, LZW": encoded(cat, "TIFF", compression="tiff_lzw"),
        "TIFF, JPEG inside": encoded(cat, "TIFF", compression="jpeg"),
        "TIFF, fax (1 bit)": encoded(cat.convert("1"), "TIFF", compression="group4"),
        "TIFF, CMYK": encoded(cat.convert("CMYK"), "TIFF"),
        "TIFF, several pages": several("TIFF"),
        "TIFF, grey of 12 bits": grey_tiff(shades.astype(int) << 4, 12, 1),
        "TIFF, grey of 16 bits": encoded(deep, "TIFF"),
        "TIFF, grey of 16 bits, white is zero": grey_tiff(65_535 - (shades.astype(int) << 8), 16, 0),
        "TIFF, grey of 32 bits": encoded(Image.fromarray(shades.astype(np.int32) * 300), "TIFF"),
        "TIFF, grey as floating point": encoded(Image.fromarray(shades.astype(np.float32)), "TIFF"),
        "TIFF of 6 bands": tiff_of_bands(6),
        "JPEG 2000": encoded(cat, "JPEG2000"),
        "PPM": encoded(cat, "PPM"),
        "AVIF": b"\0\0\0\x20ftypavif" + bytes(64),
        "HEIC (phones; convert it first)": b"\0\0\0\x24ftypheic" + bytes(64),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "a page that a server sent instead": b"<!DOCTYPE html><html></html>",
        "an empty file": b"",
        "a JPEG that is cut": encoded(cat, "JPEG")[:500],
        "a PNG without its pixels": png_header(50, 50),
        "over the limit of pixels": png_header(30_000, 20_000),
    }


HIGH_BYTE = "its high byte, as viewers show it"


def ways(image: Image.Image, is_deep: bool) -> dict[str, np.ndarray]:
    """What may become of a picture, by what it is called: as Pillow and arithmetic have it, not the bundle.

    is_deep: a PNG of 16 bits, of whose colours Pillow gives the high byte.
    """
    found: dict[str, Image.Image] = {}
    if image.mode in ("L", "RGB") and not image.has_transparency_data:
        found[HIGH_BYTE if is_deep else "taken as it is"] = image
    if image.mode.startswith("I"):
        values, bits = np.asarray(image).astype(int), getattr(image, "tag_v2", {}).get(258, (16,))[0]
        found[HIGH_BYTE] = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
        found[f"inverted, {HIGH_BYTE}"] = Image.fromarray(255 - (values >> (bits - 8)).astype(np.uint8))
    else:
        colours = np.asarray(image.convert("RGBA"), float)
        opacity = colours[..., 3:] / 255
        white = Image.fromarray((colours[..., :3] * opacity + 255 * (1 - opacity)).round().astype(np.uint8))
        if image.has_transparency_data and (opacity < 1).any():
            found["laid onto white"] = white
            found["converted to RGB, without its alpha"] = image.convert("RGB")
        found["converted to grey"] = image.convert("L")
        found["converted to RGB"] = image.convert("RGB")
    found |= {f"{name}, turned upright": ImageOps.exif_transpose(way) for name, way in found.items()}
    return {name: np.asarray(way.convert("RGB"), int) for name, way in found.items()}


def what_becomes_of_a_picture(data: bytes) -> str:
    try:
        ours = np.asarray(inference.decode(data).convert("RGB"), int)
    except BadImage as error:
        told = re.sub(r"^(?:OSError|SyntaxError): .*", "(what Pillow says is wrong)", str(error))
        return f"refused: {told}"
    image = Image.open(io.BytesIO(data))
    image.load()
    frames = ", its first picture" if getattr(image, "n_frames", 1) > 1 else ""
    for name, expected in ways(image, data[:4] == b"\x89PNG" and data[24] == 16).items():
        if expected.shape == ours.shape and np.abs(expected - ours).max() <= 1:
            return name + frames
    raise AssertionError("none of the ways that are known here")


@contextmanager
def limit_of_pixels() -> Iterator[None]:
    """As a script sets it."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = inference.MAX_MEGAPIXELS * 500_000
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def picture_rows(_folder: Path) -> Rows:
    with limit_of_pixels():
        for kind, data in pictures().items():
            yield kind, what_becomes_of_a_picture(data)


# --- colour profiles ---

# Red, green and blue as ICC has them (adapted to D50), and the curve: a gamma, or sRGB's own.
SPACES = {
    "Display P3": ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841), None),
    "Adobe RGB (1998)": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 563 / 256),
}


def icc_profile(name: str) -> bytes:
    """A profile of three colours and a curve, version 2."""
    *primaries, gamma = SPACES[name]

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65_536) for value in values))

    linear = np.linspace(0, 1, 1024)
    curve = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4) if gamma is None else linear**gamma
    text = name.encode() + b"\0"
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78), b"cprt": b"text" + bytes(4) + text}
    tags |= {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    tags |= {tag + b"XYZ": b"XYZ " + bytes(4) + fixed(*primary) for tag, primary in zip((b"r", b"g", b"b"), primaries)}
    points = struct.pack(">I1024H", 1024, *(curve * 65_535).round().astype(int).tolist())
    tags |= {tag + b"TRC": b"curv" + bytes(4) + points for tag in (b"r", b"g", b"b")}
    table, body, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = bytes(4) + struct.pack(">I", 0x02100000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += fixed(0.9642, 1, 0.8249) + bytes(48)
    return struct.pack(">I", 128 + len(table) + len(body)) + head + table + body


def profile_rows(_folder: Path) -> Rows:
    """The numbers are compared with those of the same file without a profile, features with those of converted pixels."""
    model = inference.load_model(inference.open_device("cpu"), str(TRAINED))
    photo = Image.open(SAMPLES / "coffee.jpg").convert("RGB")
    for name in SPACES:
        profile = icc_profile(name)
        kept = inference.decode(encoded(photo, "PNG", icc_profile=profile))
        assert Image.open(io.BytesIO(encoded(photo, "PNG", icc_profile=profile))).info["icc_profile"] == profile
        outcome = "its numbers are kept" if np.array_equal(np.asarray(kept), np.asarray(photo)) else "its numbers are changed"
        converted = ImageCms.profileToProfile(photo, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
        ours, theirs = (inference.features(model, image)["mean_patch_token"] for image in (kept, converted))
        difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        yield name, f"{outcome}; converting to sRGB would move the mean patch token by {difference:.1g}, relative L2"


# --- lists ---


def list_rows(folder: Path) -> Rows:
    """Each list names a file, and is taken where that file's bytes are found by it."""
    cat, line = folder / "a 猫.jpg", f"{folder}/a 猫.jpg"
    cat.write_bytes(b"the cat")
    latin = bytes(folder) + b"/caf\xe9.jpg"
    Path(inference.os.fsdecode(latin)).write_bytes(b"the cat")
    tar = make_tar(folder / "shard.tar", {"0.jpg": b"the cat"})
    lists = {
        "UTF-8": line.encode(),
        "UTF-8 with a byte-order mark": b"\xef\xbb\xbf" + line.encode(),
        "UTF-16 with a byte-order mark (PowerShell), little end first": b"\xff\xfe" + line.encode("utf-16-le"),
        "UTF-16 with a byte-order mark, big end first": b"\xfe\xff" + line.encode("utf-16-be"),
        "UTF-16 without a mark": line.encode("utf-16-le"),
        "UTF-16 that is cut": b"\xff\xfe" + line.encode("utf-16-le")[:-1],
        "another encoding than UTF-8, as the names of the files are": latin,
        "lines that end as on Windows, and empty ones": b"\r\n" + line.encode() + b"\r\n\r\n",
        "a member of a tar: shard.tar/0.jpg": f"{tar}/0.jpg".encode(),
        "a member that the tar has not": f"{tar}/1.jpg".encode(),
        "a path that is not there": f"{folder}/gone.jpg".encode(),
        "nothing": b"\n \n",
    }
    for kind, data in lists.items():
        (folder / "list.txt").write_bytes(data)
        try:
            keys = list(list_sources([str(folder / "list.txt")]).files)
            read = [storage.read(key.file, key.offset, key.size) for key in keys]
            yield kind, "taken" if read == [b"the cat"] else "taken for other names"
        except BadImage as error:
            yield kind, f"a failure for each line: {error}"
        except UsageError as error:
            yield kind, f"refused: {re.sub(r' in position .*(?=[)])', '', str(error))}"


# --- tars ---


def header_changed(data: bytes, place: int, value: bytes) -> bytes:
    """A tar whose first header has other bytes at a place, its checksum made right."""
    head = bytearray(data[:512])
    head[place : place + len(value)] = value
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + data[512:]


def tars(folder: Path) -> dict[str, bytes]:
    """A tar of each dialect; in each that is whole the images' bytes are b"0", b"1" and so on, in their order."""
    long = {f"{'x' * 90}/{'猫' * 40}.jpg": b"0", "1.jpg": b"1"}

    def made(members: object, format: int = tarfile.USTAR_FORMAT) -> bytes:
        return make_tar(folder / "made", members, format).read_bytes()

    plain = made({"0.jpg": b"0", "1.jpg": b"1"})
    with tarfile.open(folder / "made", "w") as tar:
        for name, kind in (("0.jpg", tarfile.SYMTYPE), ("1.jpg", tarfile.LNKTYPE), ("2.jpg", tarfile.GNUTYPE_SPARSE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x.jpg" if kind != tarfile.GNUTYPE_SPARSE else ""
            tar.addfile(info)
        info = tarfile.TarInfo("3.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"0"))
    links = (folder / "made").read_bytes()
    return {
        "ustar": plain,
        "v7, without a magic": header_changed(plain, 257, bytes(8)),
        "GNU, long names": made(long, tarfile.GNU_FORMAT),
        "PAX, long names in UTF-8": made(long, tarfile.PAX_FORMAT),
        "sizes in base 256 (members over 8 GiB)": header_changed(plain, 124, b"\x80" + bytes(10) + b"\x01"),
        "shadows of a Mac (._0.jpg)": made({"._0.jpg": b"x", "0.jpg": b"0"}),
        "a tar inside": made({"inner.tar": plain, "0.jpg": b"0"}),
        "a member twice": made([("0.jpg", b"x"), ("0.jpg", b"0")]),
        "masks beside an image (0.jpg, 0.seg.png)": made({"0.jpg": b"0", "0.seg.png": b"x"}),
        "links and sparse members": links,
        "no images": made({"0.txt": b"x"}),
        "cut": plain[:1300],
        "without the two empty blocks at its end": plain[:2048],
        "two tars, one behind the other": plain + plain,
        "a header with a wrong checksum": plain[:1024] + b"y" + plain[1025:],
        "an empty file": b"",
        "not a tar": b"<!DOCTYPE html>" * 99,
    }


def tar_rows(folder: Path) -> Rows:
    for kind, data in tars(folder).items():
        path = folder / "shard.tar"
        path.write_bytes(data)
        try:
            images, notes = index_tar(str(path))
            read = [storage.read(key.file, key.offset, key.size) for key in images]
            assert read == [b"%d" % number for number in range(len(read))], kind
            yield kind, "; ".join([f"images: {len(read)}", *notes])
        except UsageError as error:
            yield kind, f"refused: {error}"
    for suffix in ("tar.gz", "tar.zst"):
        (folder / f"shard.{suffix}").touch()
        try:
            list_sources([str(folder / f"shard.{suffix}")])
        except UsageError as error:
            yield f"compressed ({suffix})", f"refused: {error}"


# --- checkpoints ---


def checkpoints(folder: Path) -> Iterator[tuple[str, Path]]:
    """A checkpoint of each layout, each in a folder of its own."""
    whole = save_checkpoint(folder / "whole", tiny_model())
    tensors, config = load_file(whole / "model.safetensors"), json.loads((whole / "config.json").read_text())
    count = iter(range(99))

    def copy(change: Callable[[Path], object], without: str = "") -> Path:
        made = Path(shutil.copytree(whole, folder / f"{next(count)}"))
        (made / without).unlink() if without else None
        change(made)
        return made

    def saved(state: dict[str, torch.Tensor]) -> Callable[[Path], object]:
        return lambda made: save_file(state, made / "model.safetensors", metadata={"format": "pt"})

    def configured(**fields: object) -> Callable[[Path], object]:
        return lambda made: (made / "config.json").write_text(json.dumps(config | fields))

    def nested(made: Path) -> None:
        (made / "processor_config.json").write_text(json.dumps({"image_processor": TINY_PREPROCESS}))

    def fast(made: Path) -> None:
        fields = {"image_processor_type": "BitImageProcessorFast", "data_format": "channels_first", "device": None}
        (made / "preprocessor_config.json").write_text(json.dumps(TINY_PREPROCESS | fields))

    def native(made: Path) -> None:
        torch.save(to_native_names(tensors), made / "native.pth")

    def sharded(made: Path) -> None:
        shards = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
        for name, keys in shards.items():
            save_file({key: tensors[key] for key in keys}, made / name, metadata={"format": "pt"})
        weight_map = {key: name for name, keys in shards.items() for key in keys}
        (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    bare = {name: value for name, value in tensors.items() if not name.startswith("pooler")}
    lacking = {name: value for name, value in tensors.items() if name != "layernorm.bias"}
    yield "config.json, model.safetensors, preprocessor_config.json", whole
    yield "several safetensors files and their index", copy(sharded, "model.safetensors")
    yield "weights in float16", copy(saved({name: value.half() for name, value in tensors.items()}))
    yield "weights in bfloat16", copy(saved({name: value.bfloat16() for name, value in tensors.items()}))
    yield "no pooler", copy(saved(bare))
    yield "saved with a fast processor (data_format, device)", copy(fast)
    yield "processor_config.json alone", copy(nested, "preprocessor_config.json")
    yield "no pre-processing", copy(lambda _made: None, "preprocessor_config.json")
    yield "no config.json", copy(lambda _made: None, "config.json")
    yield "a tensor is missing", copy(saved(lacking))
    yield "whole numbers for weights (quantised)", copy(saved({name: value.to(torch.int8) for name, value in tensors.items()}))
    yield "pytorch_model.bin alone", copy(lambda made: torch.save(tensors, made / "pytorch_model.bin"), "model.safetensors")
    yield "Meta's native .pth", copy(native) / "native.pth"
    yield "the safetensors file itself is named", whole / "model.safetensors"
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    yield "a Git LFS pointer", copy(lambda made: (made / "model.safetensors").write_bytes(lfs))
    yield "an empty weight file", copy(lambda made: (made / "model.safetensors").write_bytes(b""))
    yield "another architecture (dinov2)", copy(configured(model_type="dinov2"))
    own = configured(model_type="own", auto_map={"AutoModel": "own.Model"})
    yield "its own code, without --trust_remote_code", copy(own)


def checkpoint_rows(folder: Path) -> Rows:
    cpu, warnings = inference.open_device("cpu"), []
    handler = inference.logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    handler.setLevel(inference.logging.WARNING)
    inference.log.addHandler(handler)
    expected = None
    try:
        for kind, path in checkpoints(folder):
            warnings.clear()
            try:
                model = inference.load_model(cpu, str(path))
            except UsageError as error:
                yield kind, f"refused: {error}"
                continue
            found = inference.features(model, SAMPLES / "chelsea.jpg")["class_token"]
            expected = found if expected is None else expected
            difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            same = ", with other features" if difference > 0.05 else ""
            yield kind, "; ".join([f"loaded{same}, its pooler {model.pooler}", *warnings])
    finally:
        inference.log.removeHandler(handler)


# --- the page ---

SECTIONS: dict[str, tuple[str, Callable[[Path], Rows]]] = {
    "Pictures": ("Sorted out by their bytes, not by their names.", picture_rows),
    "Colour profiles": (
        "A picture's numbers are taken as they stand, whatever profile it carries, as transformers' processors do. What "
        "converting would change was measured on a sample photo and the small trained model of tests/data.",
        profile_rows,
    ),
    "Lists of paths": ("", list_rows),
    "Tars": ("", tar_rows),
    "Checkpoints": ("`--model_path`; `...` is a folder.", checkpoint_rows),
}


def page(folder: Path) -> str:
    """The whole page; files are made in `folder`."""
    lines = ["# What becomes of each kind of input", "", "Written by `python tests/input_kinds.py`, from what it saw.", ""]
    for title, (told, rows) in SECTIONS.items():
        made = folder / title.partition(" ")[0].lower()
        made.mkdir()
        lines += [f"## {title}", "", *([told, ""] if told else []), "| Kind | What becomes of it |", "|---|---|"]
        for kind, outcome in rows(made):
            shown = re.sub(rf"{re.escape(str(made))}(?:/\d+|/whole)?", "...", outcome).replace("|", "\\|")
            lines.append(f"| {kind} | {shown} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        PAGE.write_text(page(Path(temporary)), encoding="utf-8")
    print(f"written: {PAGE.relative_to(TESTS.parent)}")
