"""Pictures say what the files say, are drawn anew when those have changed, and the list of what is submitted with them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from made_results import BLOCKED, COLOURS, RANDOM, save, save_all, write
from PIL import Image

import evidence
import pictures


def test_the_same_arithmetic_has_the_same_colour_and_the_bar_one_of_its_own():
    names = (
        "float32, strict",
        "float32, as torch_npu leaves it",
        "float32, HF32 allowed",
        "float16",
        "bfloat16",
        "bfloat16 autocast",
    )
    colours = [pictures.colour_of(name) for name in names]
    assert len({*colours, pictures.BAR, pictures.QUIET}) == len(names) + 2
    assert pictures.colour_of(pictures.arithmetic_of({"dtype": "float32"})) == colours[0]
    assert pictures.colour_of(pictures.arithmetic_of({"dtype": "float32", "allow_hf32": True})) == colours[2]


def test_each_device_and_the_published_run_have_a_line_with_a_name(page_bundle):
    """Without an evaluation of its own, a device has what the tuner found within the bar, strictly, fastest at each size."""
    save(page_bundle, "performance_eval", weights=RANDOM)
    save(page_bundle, "tuned", "cuda")
    lines = pictures.performance_lines(evidence.read_evidence(page_bundle))
    assert lines.pop("published/ NPU float32")[0] == (1, pytest.approx(85.56, abs=0.01))
    assert lines == {
        "GPU float16 (tuned)": [(64, 2000.0)],
        "GPU float32 (tuned)": [(8, 1000.0)],
        "CPU float32, random weights": [(1, 2.125), (4, 4.25)],
    }
    save(page_bundle, "performance_eval", "cuda", dtype="float16")
    lines = pictures.performance_lines(evidence.read_evidence(page_bundle))
    assert [name for name in lines if "GPU" in name] == ["GPU float16"]


def test_a_picture_is_drawn_anew_only_when_its_sources_have_changed(page_bundle, make_pages):
    save_all(page_bundle)
    make_pages()
    save(page_bundle, "performance_eval", num_runs=4)
    assert [line for line in make_pages().out if "assets" in line] == ["Written: assets/performance_eval_result.png"]
    save(page_bundle, "inference", batch_size=1)
    assert [line for line in make_pages().out if "assets" in line] == []
    save(page_bundle, "pca", explained_variance_percent=50.0)
    assert [line for line in make_pages().out if "assets" in line] == ["Written: assets/inference_result.png"]
    Image.new("RGB", (64, 64), "red").save(page_bundle / "assets" / "samples" / "a.png")
    assert [line for line in make_pages().out if "assets" in line] == ["Written: assets/inference_result.png"]


def test_a_photos_crop_stands_above_the_colours_of_its_patches(page_bundle):
    save(page_bundle, "pca")
    drawn = np.asarray(pictures.draw_inference(evidence.read_evidence(page_bundle))).astype(int)
    above, below = np.split(drawn, 2)
    for place, colour in enumerate(COLOURS):
        crop = np.asarray(Image.open(page_bundle / "assets" / "samples" / f"{'ab'[place]}.png"))[0, 0]
        columns = slice(750 * place, 750 * (place + 1))
        for half, wanted in ((above, crop), (below, colour)):
            found = (np.abs(half - wanted).max(-1) == 0).sum(0)
            assert found[columns].sum() > 40_000 and found.sum() == found[columns].sum()


def test_where_there_are_no_colours_the_picture_says_why(page_bundle):
    empty = pictures.draw_inference(evidence.read_evidence(page_bundle))
    write(page_bundle, "pca", BLOCKED)
    blocked = pictures.draw_inference(evidence.read_evidence(page_bundle))
    assert empty.size == blocked.size and empty.tobytes() != blocked.tobytes()
    red = tuple(int(pictures.BAD[place : place + 2], 16) for place in (1, 3, 5))
    assert [red in {colour for _, colour in drawn.getcolors(1 << 16)} for drawn in (empty, blocked)] == [False, True]


def test_a_users_own_photo_leaves_the_picture_to_another_result(page_bundle):
    save_all(page_bundle)
    save(page_bundle, "pca", "npu", image_path=[".../holiday.jpg"])
    kinds, photos = pictures.photos_of(evidence.read_evidence(page_bundle))
    assert kinds == ["cpu"] and [photo.name for photo in photos] == ["a.png", "b.png"]


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], capture_output=True, check=True)


def test_what_is_submitted_lists_what_a_commit_would_hold(page_bundle, make_pages):
    """New results too, which git does not know yet; a second run and a commit in between change nothing."""
    git(page_bundle, "init", "-q")
    (page_bundle / ".gitignore").write_text("/logs/trial/\n")
    git(page_bundle, "add", ".")
    git(page_bundle, "commit", "-qm", "one")
    save_all(page_bundle, "npu")
    (page_bundle / "logs" / "trial").mkdir()
    (page_bundle / "logs" / "trial" / "x.log").write_text("x")
    make_pages()
    files = json.loads((page_bundle / "results" / "git_submit.json").read_text())["files"]
    assert {"results/accuracy_eval.json", "README.md", "assets/git_submit_result.png", "results/git_submit.json"} <= set(files)
    assert "logs/trial/x.log" not in files
    git(page_bundle, "add", ".")
    git(page_bundle, "commit", "-qm", "two")
    assert make_pages().out == ["Nothing has changed"]
    save(page_bundle, "accuracy_eval")
    told = "results/git_submit.json: does not list what there is: results/accuracy_eval_cpu.json; run: python eval/evidence.py"
    assert told in make_pages("--check").out
