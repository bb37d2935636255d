"""Reading images and making crops: equal to transformers' PIL processor, right on odd inputs, exact about broken ones."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import struct
import zlib
from pathlib import Path

import inference
import numpy as np
import pytest
import torch
from inference import BadImage, Preprocess, Unreadable, UsageError, crop_uint8, decode, normalize, read_bytes, read_preprocess
from PIL import Image, ImageOps

import embed
from conftest import SAMPLES, TINY_PREPROCESS

PHOTOS = sorted(path for path in SAMPLES.iterdir() if path.suffix in (".jpg", ".png"))
DEFAULTS = Preprocess()
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def library_processor(**options):
    try:
        from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil as Processor
    except ImportError:  # transformers 4
        from transformers import BitImageProcessor as Processor
    return Processor(image_mean=list(MEAN), image_std=list(STD), **options)


def library_pixels(image: Image.Image, **options) -> torch.Tensor:
    # Told where the channels are: of an image one or three pixels high, the library would guess.
    return library_processor(**options)(image, return_tensors="pt", input_data_format="channels_last").pixel_values


def our_pixels(image: Image.Image, preprocess: Preprocess = DEFAULTS) -> torch.Tensor:
    return normalize(torch.from_numpy(crop_uint8(image, preprocess).copy())[None], preprocess)


def assert_same_pixels(ours: torch.Tensor, library: torch.Tensor) -> None:
    assert ours.shape == library.shape
    assert (ours - library).abs().max() < 1e-6


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def cat() -> Image.Image:
    return Image.open(SAMPLES / "chelsea.jpg").convert("RGB")


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.name)
def test_sample_photos_give_the_librarys_pixel_values(path):
    from transformers.image_utils import load_image

    assert_same_pixels(our_pixels(decode(path.read_bytes())), library_pixels(load_image(str(path))))


def test_images_of_any_shape_give_the_librarys_pixel_values():
    numbers = np.random.default_rng(0)
    sizes = [
        (1, 1),
        (2, 3),
        (224, 224),
        (224, 300),
        (300, 224),
        (225, 223),
        (100, 900),
        (900, 100),
        (31, 217),
        (643, 1201),
        (640, 480),
    ]
    sizes += [tuple(numbers.integers(1, 800, 2).tolist()) for _ in range(40)]
    for size in sizes:
        if max(size) / min(size) < 90:
            image = Image.fromarray(numbers.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
            assert_same_pixels(our_pixels(image), library_pixels(image))


@pytest.mark.parametrize("mode", ["1", "L", "CMYK"])
def test_modes_without_transparency_give_the_librarys_pixel_values(cat, mode):
    image = cat.convert(mode)
    data = encoded(image, "TIFF") if mode != "CMYK" else encoded(image, "JPEG", quality=90)
    assert Image.open(io.BytesIO(data)).mode == mode
    assert_same_pixels(our_pixels(decode(data)), library_pixels(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "colour key", "webp"])
def test_transparency_is_laid_onto_white(cat, kind):
    alpha = Image.linear_gradient("L").resize(cat.size)
    image = cat.convert("RGBA")
    image.putalpha(alpha)
    data = {
        "RGBA": lambda: encoded(image, "PNG"),
        "LA": lambda: encoded(image.convert("LA"), "PNG"),
        "palette": lambda: encoded(image.quantize(64), "PNG"),
        "colour key": lambda: encoded(cat, "PNG", transparency=cat.getpixel((5, 5))),
        "webp": lambda: encoded(image, "WEBP", lossless=True),
    }[kind]()
    source = Image.open(io.BytesIO(data))
    source.load()
    assert source.has_transparency_data
    colours = np.asarray(source.convert("RGBA"), np.float64)
    opacity = colours[..., 3:] / 255
    expected = Image.fromarray((colours[..., :3] * opacity + 255 * (1 - opacity)).round().astype(np.uint8))
    difference = np.asarray(decode(data), int) - np.asarray(expected, int)
    assert np.abs(difference).max() <= 1  # Pillow composites in integers
    try:  # transformers 5 lays transparency onto white as well; 4 drops it and shows what lies beneath
        from transformers.models.bit import image_processing_pil_bit  # noqa: F401
    except ImportError:
        return
    assert_same_pixels(our_pixels(decode(data)), library_pixels(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_range(cat, format):
    grey = np.asarray(cat.convert("L"))
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    data = encoded(sixteen, format)
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert np.array_equal(np.asarray(decode(data)), grey)
    assert_same_pixels(our_pixels(decode(data)), library_pixels(Image.fromarray(grey)))


def grey_tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """A little-endian TIFF of one strip; Pillow writes neither 12 bits nor white as zero."""
    height, width = values.shape
    if bits == 16:
        data = values.astype("<u2").tobytes()
    else:
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).tolist())
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)], ids=["12 bits", "16 bits", "white is zero"])
def test_a_grey_tiff_is_neither_dark_nor_inverted(bits, photometric):
    shades = np.arange(256).reshape(16, 16)
    stored = shades << (bits - 8)
    data = grey_tiff(stored if photometric else (1 << bits) - 1 - stored, bits, photometric)
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    assert np.array_equal(np.asarray(decode(data)), shades)


def test_the_transparent_shade_of_sixteen_bit_grey_is_laid_onto_white():
    grey = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)
    seen = np.asarray(decode(encoded(Image.fromarray(grey), "PNG", transparency=7 * 257)))
    expected = np.arange(256).reshape(16, 16)
    expected[0, 7] = 255
    assert np.array_equal(seen, expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_grey_without_a_defined_white_is_refused(mode):
    values = np.full((8, 8), 70_000, np.int32 if mode == "I" else np.float32)
    with pytest.raises(BadImage, match="whose black and white are not defined"):
        decode(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_exif_orientation_is_turned_upright(cat, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(cat, "JPEG", exif=exif, quality=95)
    stored = Image.open(io.BytesIO(data)).convert("RGB")
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(upright))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(stored)) == (orientation == 1)
    assert_same_pixels(our_pixels(decode(data)), library_pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_damaged_exif_costs_the_orientation_and_not_the_photo(cat, format):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x829A] = 6, "maker", 0.5
    data = encoded(cat.resize((24, 16)), format, exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    allowed = [np.asarray(Image.fromarray(stored).transpose(Image.Transpose(turn))) for turn in range(7)] + [stored]
    tags = exif.tobytes().removeprefix(b"Exif\0\0")
    start, end = data.index(tags), data.index(tags) + len(tags)
    lost = 0
    for bit in range(8 * start, 8 * end):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        seen = np.asarray(decode(bytes(damaged)))
        assert any(np.array_equal(seen, pixels) for pixels in allowed), bit
        lost += np.array_equal(seen, stored)
    assert lost > 20  # the tag or its type was hit: taken as it is stored


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(cat, format):
    first, second = cat.quantize(256).convert("RGB"), Image.new("RGB", cat.size, "red")
    data = encoded(first, format, save_all=True, append_images=[second], **({"lossless": True} if format == "WEBP" else {}))
    assert np.array_equal(np.asarray(decode(data).convert("RGB")), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(np.asarray(decode(data).convert("RGB"), int) - np.asarray(first, int)).mean() < 1


def test_a_strip_costs_no_gigabytes():
    tall = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5000, 1, 3), dtype=np.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crops = [
        crop_uint8(image, Preprocess()) for image in (tall, tall.transpose(Image.Transpose.ROTATE_90), tall.resize((1, 60_000)))
    ]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    # Resized to 224x1120000, row y shows 5000 rows of 224 each, and the crop begins at row 559888, the middle of row 2499.
    blend = np.asarray(tall.crop((0, 2490, 1, 2510)).resize((224, 20 * 224), Image.Resampling.BICUBIC))
    start = 559_888 - 2490 * 224
    assert np.array_equal(crops[0], blend[start : start + 224])


def test_one_pixel_fills_the_crop():
    assert np.unique(crop_uint8(Image.new("RGB", (1, 1), (10, 20, 30)), Preprocess()).reshape(-1, 3), axis=0).tolist() == [
        [10, 20, 30]
    ]


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"a text that calls itself an image", "not an image that can be read"),
        ((SAMPLES / "chelsea.jpg").read_bytes()[:9000], "truncated"),
        (png_header(14_000, 14_000), "DecompressionBombError"),
        (png_header(50, 50), "OSError|SyntaxError|truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read"),
    ],
    ids=["empty", "text", "truncated", "bomb", "no data", "postscript"],
)
def test_what_cannot_be_decoded_says_why(data, reason):
    with pytest.raises(BadImage, match=reason) as caught:
        decode(data)
    assert "0x" not in str(caught.value)  # an address would make the record differ from run to run


def test_a_large_photo_under_the_limit_decodes_without_warnings(recwarn):
    assert decode(encoded(Image.new("L", (10_000, 9_500)), "PNG")).size == (10_000, 9_500)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("missing.jpg", lambda path: None, "--image_path"),
        ("folder.jpg", lambda path: path.mkdir(), "no images in it"),
        ("text.jpg", lambda path: path.write_text("hello"), "text.jpg: not an image"),
        ("empty.jpg", lambda path: path.touch(), "empty.jpg: empty file"),
        ("pipe.jpg", os.mkfifo, "pipe.jpg: not a regular file"),
    ],
)
def test_a_file_that_is_no_image_is_named_in_one_line(run, tiny_folder, tmp_path, name, make, reason):
    make(tmp_path / name)
    done = run("--image_path", tmp_path / name, "--model_path", tiny_folder, "--device", "cpu")
    assert done.code == 2
    error = done.terminal.splitlines()[-1]
    assert error.startswith("error: ") and name in error and reason in error
    assert "Traceback" not in done.terminal


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The waits between tries, which take no time here."""
    asked: list[float] = []
    monkeypatch.setattr(inference.time, "sleep", asked.append)
    return asked


@pytest.mark.parametrize("name", ["gone.jpg", "gone/too.jpg", "file/below.jpg", "circle", "x" * 300, "null\0byte"])
def test_a_path_that_is_wrong_is_the_images_own_fault_and_costs_no_wait(tmp_path, waits, name):
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(BadImage):
        read_bytes(str(tmp_path / name))
    assert not waits


@pytest.mark.parametrize(
    ("number", "tries"), [(errno.EACCES, 1), (errno.EPERM, 1), (errno.EIO, 3), (errno.ESTALE, 3), (errno.ETIMEDOUT, 3)]
)
def test_what_cannot_be_read_now_is_not_called_a_bad_image(tmp_path, monkeypatch, waits, number, tries):
    path = tmp_path / "good.jpg"
    path.write_bytes(b"x")
    opened = []

    def refuse(*arguments):
        opened.append(arguments)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(Unreadable, match=f"good.jpg: {os.strerror(number)}"):
        read_bytes(str(path))
    assert (len(opened), len(waits)) == (tries, tries - 1)


def test_a_file_that_is_read_at_the_second_try_is_read(tmp_path, monkeypatch, waits):
    path = tmp_path / "good.jpg"
    path.write_bytes(b"x")
    stat, errors = os.stat, [OSError(errno.EIO, "flaky")]

    def flaky(*given, **options):
        if errors:
            raise errors.pop()
        return stat(*given, **options)

    monkeypatch.setattr(os, "stat", flaky)
    assert read_bytes(str(path)) == b"x"
    assert waits == [0.5]


def test_a_stretch_of_a_file_is_read_whole_or_not_at_all(tmp_path, waits):
    path = tmp_path / "shard"
    path.write_bytes(b"0123456789")
    assert read_bytes(str(path), 2, 3) == b"234"
    assert read_bytes(str(path)) == b"0123456789"
    with pytest.raises(Unreadable, match="shorter than it was"):
        read_bytes(str(path), 8, 3)


def test_a_file_over_the_limit_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "large.jpg"
    with path.open("wb") as file:
        file.truncate(inference.MAX_FILE_BYTES + 1)
    with pytest.raises(BadImage, match="1,073,741,825 bytes, over the limit of 1,073,741,824"):
        read_bytes(str(path))


@pytest.mark.parametrize("name", ["with space.jpg", "照片.jpg", "Ünïcödé — 'quoted'.jpg", "line\nbreak.jpg"])
def test_names_may_hold_anything(run, tiny_folder, tmp_path, name):
    path = tmp_path / name
    path.write_bytes((SAMPLES / "chelsea.jpg").read_bytes())
    done = run("--image_path", path, "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "f.npz")
    assert (done.code, done.result["image_path"]) == (0, f".../{name}")
    assert np.load(tmp_path / "f.npz")["path"].tolist() == [str(path)]


def test_a_name_that_is_not_text_survives(run, tiny_folder, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(path, "wb") as file:
        file.write((SAMPLES / "chelsea.jpg").read_bytes())
    flags = ("--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "f.npz")
    done = run("--image_path", tmp_path / "*.jpg", *flags)
    assert done.code == 0, done.terminal
    assert os.fsencode(np.load(tmp_path / "f.npz")["path"].tolist()[0]) == path


# --- pre-processing that follows the checkpoint ---


def write_config(folder: Path, **changes) -> Path:
    config = {key: value for key, value in (TINY_PREPROCESS | changes).items() if value != "absent"}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def test_without_a_file_the_defaults_are_the_official_demos(tmp_path):
    assert read_preprocess(tmp_path, 224) == Preprocess(224, 224, 3, 1 / 255, MEAN, STD)
    assert read_preprocess(tmp_path, 64) == Preprocess(64, 64, 3, 1 / 255, MEAN, STD)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}),
        ({"size": {"shortest_edge": 80}, "resample": 2}, {"size": {"shortest_edge": 80}, "resample": 2, "crop_size": 64}),
        ({"size": {"height": 70, "width": 90}}, {"size": {"height": 70, "width": 90}, "crop_size": 64}),
        ({"image_mean": [0.1, 0.2, 0.3], "rescale_factor": 0.003}, {"size": {"shortest_edge": 64}, "crop_size": 64}),
    ],
)
def test_the_configuration_is_followed(tmp_path, cat, changes, options):
    preprocess = read_preprocess(write_config(tmp_path, **changes), 64)
    processor = library_processor(**options)
    processor.image_mean = changes.get("image_mean", list(MEAN))
    processor.rescale_factor = changes.get("rescale_factor", 1 / 255)
    for image in (cat, cat.transpose(Image.Transpose.ROTATE_90)):
        assert_same_pixels(our_pixels(image, preprocess), processor(image, return_tensors="pt").pixel_values)


def test_a_vit_processor_without_crop_is_followed(tmp_path, cat):
    changes = {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 64, "width": 64}, "do_center_crop": "absent"}
    preprocess = read_preprocess(write_config(tmp_path, **changes, crop_size="absent"), 64)
    expected = library_pixels(cat, size={"height": 64, "width": 64}, do_center_crop=False)
    assert_same_pixels(our_pixels(cat, preprocess), expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"do_resize": False}, "do_resize"),
        ({"do_normalize": False}, "do_normalize"),
        ({"do_convert_rgb": False}, "do_convert_rgb"),
        ({"size": {"longest_edge": 64}}, "size"),
        ({"size": 64}, "size"),
        ({"do_center_crop": False, "size": {"shortest_edge": 64}}, "size"),
        ({"crop_size": {"height": 64, "width": 32}}, "crop_size"),
        ({"crop_size": {"height": 96, "width": 96}}, "crop_size"),
        ({"image_mean": "absent"}, "image_mean"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"resample": "bicubic"}, "resample"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "image_processor_type"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(tmp_path, changes, named):
    with pytest.raises(UsageError, match=rf"preprocessor_config\.json: .*{named}"):
        read_preprocess(write_config(tmp_path, **changes), 64)


def test_a_field_without_a_value_changes_nothing(tmp_path):
    assert read_preprocess(write_config(tmp_path, do_pad=None), 64) == read_preprocess(write_config(tmp_path), 64)


def test_another_image_size_scales_resize_and_crop_alike(tmp_path):
    preprocess = read_preprocess(write_config(tmp_path, size={"shortest_edge": 80}), 64).resized(128)
    assert (preprocess.resize, preprocess.image_size) == (160, 128)


@pytest.mark.parametrize(
    ("resize", "options"),
    [
        ("crop", {"size": {"shortest_edge": 96}, "crop_size": 96}),
        ("squash", {"size": {"height": 96, "width": 96}, "do_center_crop": False}),
        ("256", {"size": {"shortest_edge": 110}, "crop_size": 96}),
    ],
)
def test_the_three_official_ways_to_a_square(tmp_path, cat, resize, options):
    preprocess = read_preprocess(write_config(tmp_path), 64).resized(96, resize)
    for image in (cat, cat.transpose(Image.Transpose.ROTATE_90)):
        assert_same_pixels(our_pixels(image, preprocess), library_pixels(image, **options))


def test_the_way_to_a_square_is_followed_and_recorded(run, tiny_folder, tmp_path):
    common = ("--image_path", SAMPLES / "coffee.jpg", "--model_path", tiny_folder, "--device", "cpu")
    saved = []
    for resize, edges in (("crop", 64), ("squash", [64, 64]), ("256", 73)):
        done = run(*common, "--resize", resize, "--output", tmp_path / f"{resize}.npz")
        assert done.result["preprocess"]["resize"] == edges
        saved.append(np.load(tmp_path / f"{resize}.npz")["class_token"].tolist())
    assert saved[0] != saved[1] != saved[2] != saved[0]


# --- which images ---


@pytest.fixture(params=["inference.py", "embed.py"])
def listed(request, tree):
    """Names below `tree` of what each of the two scripts lists."""

    def names(*given: Path) -> list[str]:
        arguments = list(map(str, given))
        if request.param == "embed.py":
            found = [key.name for key in embed.list_images(arguments)]
        else:
            found = inference.find_images(arguments)
        return [os.path.relpath(path, tree) for path in found]

    return names


def test_a_folder_is_read_recursively_in_a_fixed_order(listed, tree):
    assert listed(tree) == ["a.jpeg", "b.JPG", "e.gif", "f.BMP", "z.png", "sub/c.Webp", "sub/deep/d.tif"]


def test_links_to_folders_are_followed_but_not_in_circles(listed, tree):
    (tree / "again").symlink_to(tree)
    (tree / "sub" / "link").symlink_to(tree / "sub" / "deep")
    assert len(listed(tree)) == 7


def test_globs_files_and_repeats_keep_the_order_they_were_given_in(listed, tree):
    (tree / "a[1].png").write_bytes(b"")
    found = listed(tree / "z.png", tree / "?.*", tree / "z.png", tree / "a[1].png")
    assert found == ["z.png", "a.jpeg", "b.JPG", "e.gif", "f.BMP", "z.png", "z.png", "a[1].png"]


def test_nothing_found_is_an_error(listed, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").touch()
    with pytest.raises(UsageError, match="no images in it"):
        listed(tmp_path / "empty")
    for pattern in ("empty/*.jpg", "gone"):
        with pytest.raises(UsageError, match="no such file or folder"):
            listed(tmp_path / pattern)
