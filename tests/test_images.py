"""Reading images and making crops: equal to transformers' PIL processor, right on odd inputs, exact about broken ones."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import tarfile
import zlib
from pathlib import Path

import inference
import numpy as np
import pytest
import torch
from conftest import SAMPLES, TINY_PREPROCESS
from inference import BadImage, ImageKey, Preprocess, UsageError, crop_uint8, decode, list_images, normalize, read_crop, read_preprocess
from PIL import Image, ImageOps

PHOTOS = sorted(path for path in SAMPLES.iterdir() if path.suffix in (".jpg", ".png"))
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


def our_pixels(image: Image.Image, preprocess: Preprocess = Preprocess()) -> torch.Tensor:
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
    sizes = [(1, 1), (2, 3), (224, 224), (224, 300), (300, 224), (225, 223), (100, 900), (900, 100), (31, 217), (643, 1201), (640, 480)]
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
    turns = [None, None, 0, 3, 1, 5, 4, 6, 2]  # EXIF's numbers as Image.Transpose's
    upright = stored if turns[orientation] is None else stored.transpose(Image.Transpose(turns[orientation]))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(upright))
    assert_same_pixels(our_pixels(decode(data)), library_pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(cat, format):
    first, second = cat.quantize(256).convert("RGB"), Image.new("RGB", cat.size, "red")
    data = encoded(first, format, save_all=True, append_images=[second], **({"lossless": True} if format == "WEBP" else {}))
    assert np.array_equal(np.asarray(decode(data).convert("RGB")), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(np.asarray(decode(data).convert("RGB"), int) - np.asarray(first, int)).mean() < 1


def test_a_strip_costs_no_gigabytes():
    tall = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5000, 1, 3), dtype=np.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crops = [crop_uint8(image, Preprocess()) for image in (tall, tall.transpose(Image.Transpose.ROTATE_90), tall.resize((1, 60_000)))]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    # Resized to 224x1120000, row y shows 5000 rows of 224 each, and the crop begins at row 559888, the middle of row 2499.
    blend = np.asarray(tall.crop((0, 2490, 1, 2510)).resize((224, 20 * 224), Image.Resampling.BICUBIC))
    start = 559_888 - 2490 * 224
    assert np.array_equal(crops[0], blend[start : start + 224])


def test_one_pixel_fills_the_crop():
    assert np.unique(crop_uint8(Image.new("RGB", (1, 1), (10, 20, 30)), Preprocess()).reshape(-1, 3), axis=0).tolist() == [[10, 20, 30]]


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
        ("missing.jpg", lambda path: None, "no such file"),
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(BadImage, match="Permission denied"):
        inference.read_bytes(ImageKey(0, str(path), str(path), 0, -1))


def test_a_permission_error_is_the_paths_own_fault(tmp_path, monkeypatch):
    path = tmp_path / "secret.jpg"
    path.write_bytes(b"x")

    def refuse(*_arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(BadImage, match="Permission denied"):
        inference.read_bytes(ImageKey(0, str(path), str(path), 0, -1))


@pytest.mark.parametrize("name", ["with space.jpg", "照片.jpg", "Ünïcödé — 'quoted'.jpg", "line\nbreak.jpg"])
def test_names_may_hold_anything(run, tiny_folder, tmp_path, name):
    path = tmp_path / name
    path.write_bytes((SAMPLES / "chelsea.jpg").read_bytes())
    done = run("--image_path", path, "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "f.npz")
    assert (done.code, done.result["image_path"]) == (0, str(path))
    assert np.load(tmp_path / "f.npz")["path"].tolist() == [str(path)]


def test_a_name_that_is_not_text_survives(run, tiny_folder, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(path, "wb") as file:
        file.write((SAMPLES / "chelsea.jpg").read_bytes())
    done = run("--image_path", tmp_path / "*.jpg", "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "f.npz")
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
    preprocess = read_preprocess(write_config(tmp_path, size={"shortest_edge": 80}), 64).for_image_size(128)
    assert (preprocess.resize, preprocess.image_size) == (160, 128)


# --- lists of images ---


@pytest.fixture
def tree(tmp_path) -> Path:
    photo = (SAMPLES / "chelsea.jpg").read_bytes()
    for name in ("b.JPG", "a.jpeg", "sub/c.Webp", "sub/deep/d.tif", "z.png", "e.gif", "f.BMP"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(photo)
    (tmp_path / "photos" / "notes.md").write_text("not an image")
    (tmp_path / "photos" / "sub" / "labels.csv").write_text("")
    return tmp_path / "photos"


def names(images: inference.ImageList, folder: Path) -> list[str]:
    return [os.path.relpath(key.name, folder) for key in images]


def test_a_folder_is_read_recursively_in_a_fixed_order(tree):
    images = list_images([str(tree)])
    assert names(images, tree) == ["a.jpeg", "b.JPG", "e.gif", "f.BMP", "z.png", "sub/c.Webp", "sub/deep/d.tif"]
    assert images.ignored == 2
    assert [key.index for key in images] == list(range(7))


def test_links_to_folders_are_followed_but_not_in_circles(tree):
    (tree / "again").symlink_to(tree)
    (tree / "sub" / "link").symlink_to(tree / "sub" / "deep")
    assert len(list_images([str(tree)])) == 7


def test_globs_files_and_repeats_keep_the_order_they_were_given_in(tree):
    given = [str(tree / "z.png"), str(tree / "**" / "*.tif"), str(tree / "z.png")]
    assert names(list_images(given), tree) == ["z.png", "sub/deep/d.tif", "z.png"]


def test_a_list_of_paths_is_read_line_by_line(tree, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_bytes(b"\xef\xbb\xbf" + f"{tree}/z.png\r\n\n{tree}/with space.jpg\n{tree}/gone.jpg".encode())
    assert names(list_images([str(listing)]), tree) == ["z.png", "with space.jpg", "gone.jpg"]


@pytest.fixture
def shard(tmp_path) -> Path:
    path = tmp_path / "00012.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {
            "000120001.txt": b"a caption",
            "000120001.jpg": (SAMPLES / "chelsea.jpg").read_bytes(),
            "000120001.json": b"{}",
            "folder/000120000.PNG": (SAMPLES / "moon.png").read_bytes(),
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_tar_is_a_folder(shard):
    images = list_images([str(shard.parent)])
    assert [key.name for key in images] == [f"{shard}/000120001.jpg", f"{shard}/folder/000120000.PNG"]
    assert images.ignored == 2
    for key, photo in zip(images, ("chelsea.jpg", "moon.png"), strict=True):
        expected = crop_uint8(decode((SAMPLES / photo).read_bytes()), Preprocess())
        assert np.array_equal(read_crop(key, Preprocess()), expected)


def test_a_list_may_name_members_of_tars(shard, tmp_path):
    (tmp_path / "again.txt").write_text(f"{shard}/folder/000120000.PNG\n{shard}\n")
    images = list_images([str(tmp_path / "again.txt")])
    assert [key.name.rpartition("/")[2] for key in images] == ["000120000.PNG", "000120001.jpg", "000120000.PNG"]
    assert images[0][2:] == images[2][2:]
    (tmp_path / "again.txt").write_text(f"{shard}/nobody.png\n")
    with pytest.raises(UsageError, match=r"has no member nobody\.png"):
        list_images([str(tmp_path / "again.txt")])


@pytest.mark.parametrize("name", ["photos.tar.gz", "photos.tgz"])
def test_a_compressed_tar_is_refused_with_advice(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"unpack it or make it a plain \.tar"):
        list_images([str(tmp_path / name)])


def test_a_damaged_tar_is_named(shard):
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UsageError, match=r"00012\.tar: cannot be read"):
        list_images([str(shard)])


def test_nothing_found_is_an_error(tmp_path):
    (tmp_path / "notes.md").touch()
    with pytest.raises(UsageError, match=r"no images in it \(1 other files ignored\)"):
        list_images([str(tmp_path)])
    with pytest.raises(UsageError, match="no such file or folder"):
        list_images([str(tmp_path / "*.jpg")])


def test_a_million_names_fit_into_little_memory():
    images = inference.ImageList()
    for number in range(1_000_000):
        images.append(f"photos/{number:012d}/image-{number:020d}.jpg")
    held = len(images._names) + sum(part.itemsize * len(part) for part in (images._ends, images._file_lengths, images._offsets, images._sizes))
    assert held / len(images) < 2e9 / 10e6 / 2  # half of what ten million may take, since growing needs room
    assert images[999_999].name == "photos/000000999999/image-00000000000000999999.jpg"


def test_the_digest_of_a_list_tells_names_apart():
    def digest(*given: str) -> str:
        images = inference.ImageList()
        for name in given:
            images.append(name)
        return images.sha256()

    assert len({digest("ab", "c"), digest("a", "bc"), digest("c", "ab"), digest("abc")}) == 4
