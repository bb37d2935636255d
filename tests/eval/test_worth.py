"""What an error is worth: neighbours, a linear probe, and when they are run."""

from __future__ import annotations

import dataclasses

import inference
import numpy as np
import pytest
import torch

import eval_accuracy
import stages
import worth
from conftest import SAMPLES, TESTS


def test_neighbours_are_those_of_a_plain_search():
    numbers = np.random.default_rng(2).normal(size=(20, 6))
    assert worth.neighbour_agreement(numbers, numbers) == (100.0, 100.0)
    shuffled = np.random.default_rng(3).normal(size=(20, 6))
    nearest, five = worth.neighbour_agreement(shuffled, numbers)

    def search(features):
        centred = features - features.mean(0)
        cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in centred] for a in centred])
        return [sorted((j for j in range(20) if j != i), key=lambda j: -cosine[i, j])[:5] for i in range(20)]

    ours, theirs = search(shuffled), search(numbers)
    assert nearest == pytest.approx(100 * np.mean([a[0] == b[0] for a, b in zip(ours, theirs, strict=True)]))
    assert five == pytest.approx(100 * np.mean([len(set(a) & set(b)) / 5 for a, b in zip(ours, theirs, strict=True)]))


def test_a_shift_that_all_features_share_changes_no_neighbour():
    numbers = np.random.default_rng(2).normal(size=(20, 6))
    assert worth.neighbour_agreement(numbers + 50, numbers) == (100.0, 100.0)


def test_the_probe_tells_classes_apart_and_never_sees_what_it_is_asked():
    numbers, labels = np.random.default_rng(0), np.arange(100) % 4
    centres = 3 * numbers.normal(size=(4, 16))
    features = centres[labels] + numbers.normal(size=(100, 16))
    assert (worth.linear_probe(features * 1e6 + 1e7, labels) == labels).mean() > 0.95
    assert (worth.linear_probe(np.eye(100), labels) == labels).mean() < 0.5  # a row that is its own name teaches nothing


def test_views_differ_and_are_the_same_on_every_run():
    photos = [inference.decode((SAMPLES / "chelsea.jpg").read_bytes())]
    first, second = (worth.make_views(photos, 12, inference.Preprocess().resized(64)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (12, 64, 64, 3)
    assert len({view.numpy().tobytes() for view in first}) == 12


def test_from_few_digits_no_verdict_is_drawn(tiny):
    pytest.importorskip("sklearn")
    digits, labels = worth.read_digits(100, tiny.preprocess)
    task = worth.Task(torch.empty(0), digits, labels, "")
    task.baseline = task.features(tiny, stages.PLAIN)
    assert worth.measure_worth(task, tiny, stages.PLAIN)["task"] == "too few digits to say"
    fewest = worth.FEWEST
    flipped = {"float32_probe_percent": 92.0, "probe_percent": 92.0 - 100 / fewest}
    assert worth.verdict_of(flipped, False) == "kept"  # one digit that is told otherwise decides nothing


def test_random_weights_are_run_and_marked_meaningless():
    found = {"probe_percent": 50.0, "float32_probe_percent": 50.0}
    assert worth.verdict_of(found, False) == "kept"
    assert worth.verdict_of(found, True) == "kept (random weights: means nothing)"
    assert worth.verdict_of(found | {"probe_percent": 49.94}, False) == "lost"


@pytest.mark.parametrize(
    ("flags", "seconds", "expected"),
    [
        ((), 1.0, (120, 0)),
        ((), 0.1, (120, 1200)),
        ((), 1.1, (0, 0)),
        ((), 1e-6, (120, 1797)),
        (("--probe", "500"), 1.0, (120, 500)),
    ],
)
def test_what_takes_too_long_is_not_run_unless_asked_for(flags, seconds, expected):
    assert worth.how_many(eval_accuracy.make_parser().parse_args(flags), seconds) == expected


# --- what --decode fast costs ---

TRAINED = TESTS / "data" / "trained_vit"  # tests/make_trained_fixture.py


@pytest.mark.parametrize("asked", ["exact", "fast"])
def test_what_fast_decoding_costs_is_fast_against_exact_whatever_was_asked(cpu, asked):
    paths = [str(SAMPLES / name) for name in ("chelsea.jpg", "coffee.jpg", "rocket.jpg")]
    model = inference.load_model(cpu, str(TRAINED), decode=asked)
    photos = [inference.read_photo(path) for path in paths]
    task = worth.Task(worth.make_views(photos, 12, model.preprocess), torch.empty(0), np.empty(0), "")
    task.baseline = task.features(model, stages.PLAIN)
    given = stages.outputs_of(model, stages.PLAIN, inference.crops_of(paths, model.preprocess), 8, "")
    found = worth.measure_fast(paths, photos, model, task, given)
    assert (found["photos"], found["views"]) == (3, 12)
    exact, fast = (
        inference.features(inference.load_model(cpu, str(TRAINED), decode=way), paths)["class_token"]
        for way in inference.DECODES
    )
    errors = np.linalg.norm(fast - exact, axis=1) / np.linalg.norm(exact, axis=1)
    row = found["class_token"]
    assert row["relative_l2_error"] == pytest.approx(np.linalg.norm(fast - exact) / np.linalg.norm(exact), rel=1e-3)
    assert row["worst_photo_relative_l2_error"] == pytest.approx(errors.max(), rel=1e-3)
    assert 0 < row["views_relative_l2_error"] < 0.1
    assert 50 < row["same_nearest_percent"] <= 100
    assert [one["label"] for one in worth.fast_rows({"decode_fast": found})] == ["Class token", "Mean patch token"]


def test_a_filter_that_cannot_be_fast_is_said(tiny):
    lanczos = dataclasses.replace(tiny, preprocess=dataclasses.replace(tiny.preprocess, resample=1))
    found = worth.measure_fast([], [], lanczos, worth.Task(torch.empty(0), torch.empty(0), np.empty(0), ""), {})
    assert found == {"unavailable": "not for this checkpoint's filter"}
    assert worth.fast_rows({"decode_fast": found}) == worth.fast_rows({}) == []
