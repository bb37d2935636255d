"""Reading images and making crops: equal to transformers' PIL processor, right on odd inputs, exact about broken ones."""

from __future__ import annotations

import io
import os
import resource
from pathlib import Path

import inference
import numpy as np
import pytest
import torch
from inference import BadImage, Preprocess, UsageError, crop_uint8, decode, normalize
from PIL import Image, ImageOps

from conftest import SAMPLES
from made_images import bmp, encoded, grey_tiff, png_header, tiff_of_bands

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


@pytest.mark.parametrize("shade", [-1, 65_536])
def test_a_picture_of_shades_that_sixteen_bits_do_not_have_is_refused(shade):
    values = np.full((8, 8), shade, np.int32)
    with pytest.raises(BadImage, match="whose black and white are not defined"):
        decode(Image.fromarray(values))
    assert np.asarray(decode(Image.fromarray(np.full((8, 8), 65_535, np.int32)))).max() == 255


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


@pytest.mark.parametrize(("bands", "bits"), [(6, 8), (6, 16), (5, 16)])
def test_a_tiff_of_many_bands_says_what_it_is(bands, bits):
    """As satellites make them: Pillow has no name for it."""
    assert decode(tiff_of_bands(1)).size == (4, 2)  # else the next line would say nothing of bands
    with pytest.raises(BadImage) as caught:
        decode(tiff_of_bands(bands, bits))
    assert str(caught.value) == f"a TIFF of {bands} bands of {bits} bits: no picture in colours or grey"


def test_a_bmp_whose_fourth_byte_nobody_set_is_no_blank_image(cat):
    pixels = np.dstack([np.asarray(cat), np.zeros((cat.height, cat.width), np.uint8)])
    assert Image.open(io.BytesIO(bmp(pixels))).mode == "RGBA"
    assert np.array_equal(np.asarray(decode(bmp(pixels))), np.asarray(cat))
    pixels[3, 7, 3] = 255  # somebody did: all else is transparent
    expected = np.full_like(np.asarray(cat), 255)
    expected[3, 7] = np.asarray(cat)[3, 7]
    assert np.array_equal(np.asarray(decode(bmp(pixels))), expected)
    png = encoded(Image.fromarray(np.dstack([np.asarray(cat), np.zeros((cat.height, cat.width), np.uint8)])), "PNG")
    assert (np.asarray(decode(png)) == 255).all()  # there it is meant


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"a text that calls itself an image", "not an image that can be read"),
        ((SAMPLES / "chelsea.jpg").read_bytes()[:9000], "truncated"),
        (
            png_header(14_000, 14_000),
            "^more pixels than the limit of 179 megapixels; --max_megapixels raises it, in Python PIL.Image.MAX_IMAGE_PIXELS$",
        ),
        (png_header(50, 50), "OSError|SyntaxError|truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read"),
    ],
    ids=["empty", "text", "truncated", "bomb", "no data", "postscript"],
)
def test_what_cannot_be_decoded_says_why(monkeypatch, data, reason):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)  # Pillow's own, which a run of a script replaces
    with pytest.raises(BadImage, match=reason) as caught:
        decode(data)
    assert "0x" not in str(caught.value)  # an address would make the record differ from run to run


def test_a_large_photo_under_the_limit_decodes_without_warnings(recwarn):
    assert decode(encoded(Image.new("L", (10_000, 9_500)), "PNG")).size == (10_000, 9_500)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("size", "flags", "fits"),
    [
        ((1000, 1000), ["--max_megapixels", "1"], True),
        ((1000, 1001), ["--max_megapixels", "1"], False),
        ((1000, 1001), ["--max_megapixels", "2"], True),
        ((1000, 1001), [], True),
    ],
)
def test_the_limit_of_pixels_is_the_flags(run, tiny_folder, tmp_path, monkeypatch, size, flags, fits):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Image.new("L", size, 77).save(tmp_path / "large.png")
    done = run("--image_path", tmp_path / "large.png", "--model_path", tiny_folder, "--device", "cpu", *flags)
    assert done.code == (0 if fits else 2)
    if not fits:
        last = f"error: {tmp_path}/large.png: more pixels than the limit of 1 megapixels; {inference.RAISED_BY}"
        assert done.terminal.splitlines()[-1] == last


def test_by_default_a_photo_may_have_300_megapixels(run, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "large.png").write_bytes(png_header(17_321, 17_321))
    done = run("--image_path", tmp_path / "large.png", "--model_path", tiny_folder, "--device", "cpu")
    assert (done.code, "large.png: more pixels than the limit of 300 megapixels" in done.terminal) == (2, True)


@pytest.mark.parametrize("flag", ["0", "-1", "2.5", "many"])
def test_a_limit_of_pixels_that_makes_no_sense_is_refused(run, flag):
    done = run("--image_path", "x.jpg", "--max_megapixels", flag)
    assert (done.code, "--max_megapixels" in done.terminal) == (2, True)


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


# --- which images ---


def listed(tree: Path, *given: object) -> list[str]:
    """Names below `tree` of what inference.py takes."""
    return [os.path.relpath(path, tree) for path in inference.find_images(list(map(str, given)))]


def test_a_folder_is_read_recursively_in_a_fixed_order(tree):
    assert listed(tree, tree) == ["a.jpeg", "b.JPG", "e.gif", "f.BMP", "sub/c.Webp", "sub/deep/d.tif", "z.png"]


def test_links_in_circles_are_not_followed_for_ever(tree):
    (tree / "again").symlink_to(tree)
    assert listed(tree, tree)[-1] == "z.png"


def test_globs_files_and_repeats_keep_the_order_they_were_given_in(tree):
    (tree / "a[1].png").write_bytes(b"")
    found = listed(tree, tree / "z.png", tree / "?.*", tree / "z.png", tree / "a[1].png")
    assert found == ["z.png", "a.jpeg", "b.JPG", "e.gif", "f.BMP", "z.png", "z.png", "a[1].png"]


def test_a_pattern_takes_by_suffix_folders_whole_and_a_name_as_it_is(tree):
    (tree / "list.txt").touch()
    (tree / "shard.tar").touch()
    assert listed(tree, tree / "*") == ["a.jpeg", "b.JPG", "e.gif", "f.BMP", "sub/c.Webp", "sub/deep/d.tif", "z.png"]
    assert listed(tree, tree / "notes.md") == ["notes.md"]
    with pytest.raises(UsageError, match="no images in it"):
        listed(tree, tree / "*.md", tree / "*.t*")


def test_two_stars_are_any_depth_and_give_each_image_once(tree, monkeypatch):
    assert listed(tree, tree / "**" / "*.[tgw]*") == ["e.gif", "sub/deep/d.tif"]
    assert listed(tree, tree / "**") == listed(tree, tree)
    monkeypatch.chdir(tree / "sub")
    assert inference.find_images(["**/*.tif"]) == ["deep/d.tif"]


def test_the_shadow_that_a_mac_writes_beside_a_file_is_no_image(tree):
    (tree / "sub" / "._c.webp").touch()
    (tree / "._a.jpeg").touch()
    (tree / ".b.jpg").touch()
    assert not any("._" in name for name in listed(tree, tree, tree / "**", tree / "*"))
    assert ".b.jpg" in listed(tree, tree)
    assert not inference.is_image_name("folder/._x.jpg") and inference.is_image_name("folder/.x.JPG")


def test_nothing_found_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").touch()
    with pytest.raises(UsageError, match="no images in it"):
        listed(tmp_path, tmp_path / "empty")
    for pattern in ("empty/*.jpg", "gone"):
        with pytest.raises(UsageError, match="no such file or folder"):
            listed(tmp_path, tmp_path / pattern)


@pytest.mark.parametrize("name", ["photos.tar", "list.txt", "LIST.TXT"])
def test_lists_and_tars_are_for_embed(run, tmp_path, name):
    (tmp_path / name).touch()
    done = run("--image_path", tmp_path / name, "--device", "cpu")
    assert done.code == 2
    assert done.terminal.splitlines()[-1].endswith(f"{name}: lists and tars are for embed.py, which takes --output FOLDER/")


def test_folders_of_systems_and_folders_with_an_images_name_are_no_photos(tmp_path):
    for name in ("a.jpg", "@eaDir/b.jpg", "x/.thumbnails/c.jpg", "__MACOSX/d.jpg", "x/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert inference.find_images([str(tmp_path)]) == [f"{tmp_path}/a.jpg", f"{tmp_path}/x/e.png"]


def test_a_folder_that_is_named_is_taken_whatever_lies_above_it(tmp_path):
    folder = tmp_path / ".trash" / "photos"
    folder.mkdir(parents=True)
    (folder / "a.jpg").touch()
    assert inference.find_images([str(folder)]) == [f"{folder}/a.jpg"]
