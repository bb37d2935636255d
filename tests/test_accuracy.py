"""eval_accuracy.py: its metrics by hand, its verdicts, and that every kind of damage is found, named and failed."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import inference
import numpy as np
import pytest
import torch

import eval_accuracy
import measures
import stages
import worth
from conftest import SAMPLES, TESTS, TINY, save_checkpoint, tiny_model
from measures import judge, metrics, relative_l2, token_errors

LAYERS = 9
TRAINED = TESTS / "data" / "trained_vit"  # tests/make_trained_fixture.py


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory):
    """Nine layers, with the spread of weights that a ViT has, so that errors are as small as in a real one."""
    torch.manual_seed(0)
    module = tiny_model(layers=LAYERS)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.data = torch.empty(parameter.shape).normal_(0, 0.06)
        else:
            parameter.data = torch.full_like(parameter, 1.01 if "norm" in name and name.endswith("weight") else 0.01)
    return save_checkpoint(tmp_path_factory.mktemp("deep") / "model", module)


@pytest.fixture
def evaluate(run, deep_folder):
    def run_evaluation(*flags, device="npu", folder=deep_folder):
        asked = [*flags] if "--views" in flags else [*flags, "--views", 0, "--probe", 0]
        common = ("--model_path", folder, "--device", device, "--image_path", SAMPLES)
        return run(*common, *asked, main=eval_accuracy.main, name="accuracy_eval")

    return run_evaluation


@pytest.fixture
def damage(monkeypatch):
    """Change the model that is evaluated, but neither the reference nor the golden one."""

    def install(change):
        real = inference.load_from_args

        def load_damaged(args, device):
            model = real(args, device)
            with torch.no_grad():
                changed = change(model)
            return changed if isinstance(changed, inference.LoadedModel) else model

        monkeypatch.setattr(inference, "load_from_args", load_damaged)

    return install


def layer(model: inference.LoadedModel, number: int) -> torch.nn.Module:
    """A layer by its number from 1."""
    return inference.layers_of(model.module)[number - 1]


def linears(part: torch.nn.Module) -> list[torch.nn.Linear]:
    return [inner for inner in part.modules() if isinstance(inner, torch.nn.Linear)]


def last_linear(part: torch.nn.Module, block: str) -> torch.nn.Module:
    """The linear layer at the end of a layer's "attention" or "MLP", in either version of transformers, packed or not."""
    named = dict(part.named_modules())
    names = {"attention": ("attention.o_proj", "attention.output.dense"), "MLP": ("mlp.fc2", "output.dense")}[block]
    return next(named[name] for name in names if name in named)


def whole(*rows: list[float]) -> np.ndarray:
    """One image's tokens as [1, T, D]."""
    return np.array([rows])


# --- metrics by hand ---


def test_metrics_agree_with_hand_computed_values():
    value, reference = whole([3.0, 4.4], [0.0, 2.0]), whole([3.0, 4.0], [0.0, 1.0])
    result = metrics(value, reference, 1.0, 0.9999)
    assert result["relative_error"] == {
        "max_relative_error": pytest.approx(1.0),
        "mean_relative_error": pytest.approx((0 + 0.1 + 1.0) / 3),  # the zero of the reference is left out
        "filtered_mean_relative_error": pytest.approx((0 + 0.1 + 1.0) / 3),
        "max_absolute_error": pytest.approx(1.0),
        "mean_absolute_error": pytest.approx(1.4 / 4),
    }
    assert result["relative_l2_error"] == pytest.approx(math.sqrt((0.16 + 1) / 26))
    assert result["cosine_similarity"] == pytest.approx((9 + 17.6 + 2) / math.sqrt((9 + 19.36 + 4) * 26))
    assert result["worst_token_relative_l2_error"] == pytest.approx(1.0)
    assert result["median_token_relative_l2_error"] == pytest.approx((0.08 + 1.0) / 2)
    assert result["p99_token_relative_l2_error"] == pytest.approx(0.08 + 0.99 * 0.92)
    assert (result["nan_count"], result["inf_count"]) == (0, 0)


def test_the_filter_goes_by_each_image_and_leaves_out_what_is_near_zero():
    reference = np.array([[[1.0, 1.0, 0.07, 0.08]], [[100.0, 100.0, 7.0, 8.0]]])  # a tenth of the RMS: 0.0709 and 7.09
    result = metrics(reference + [[[0.01]], [[1.0]]], reference, 1.0, 0.9999)["relative_error"]
    assert result["filtered_mean_relative_error"] == pytest.approx((0.01 + 0.01 + 0.125) / 3)
    assert result["mean_relative_error"] == pytest.approx((0.01 + 0.01 + 0.01 / 0.07 + 0.125) / 4)


def test_sizes_of_one_and_zeros():
    assert relative_l2(whole([2.0]), whole([2.0])) == 0.0
    assert relative_l2(whole([3.0]), whole([2.0])) == 0.5
    assert token_errors(whole([0.0], [1.0]), whole([0.0], [0.0])).tolist() == [[0.0, math.inf]]
    nothing = metrics(whole([0.0]), whole([0.0]), 1.0, 0.9999)
    assert (nothing["relative_l2_error"], nothing["relative_error"]["mean_relative_error"]) == (0.0, 0.0)
    something = metrics(whole([1.0]), whole([0.0]), 1.0, 0.9999)
    assert (something["relative_l2_error"], something["l2_pass"], something["worst_token_pass"]) == (None, False, False)


def test_a_cosine_never_exceeds_one():
    numbers = np.random.default_rng(0).normal(size=(1, 197, 1024)).astype(np.float32)
    assert metrics(numbers, numbers, 1, 0.9)["cosine_similarity"] <= 1.0
    assert metrics(3 * numbers, numbers, 1, 0.9)["cosine_similarity"] == pytest.approx(1.0, abs=1e-15)
    assert metrics(-numbers, numbers, 1, 0.9)["cosine_similarity"] == pytest.approx(-1.0, abs=1e-15)


def test_the_worst_token_is_found_among_good_ones():
    reference = np.ones((3, 5, 4))
    value = reference.copy()
    value[1, 2] *= 1.5
    result = metrics(value, reference, 1.0, 0.9999)
    assert result["worst_token_relative_l2_error"] == pytest.approx(0.5)
    assert result["median_token_relative_l2_error"] == 0.0


def test_nan_and_infinity_are_counted_and_fail():
    reference = np.ones((1, 4, 8))
    value = reference.copy()
    value[0, 1, 2], value[0, 3, 4] = np.nan, np.inf
    result = metrics(value, reference, 1.0, 0.9999)
    assert (result["nan_count"], result["inf_count"], result["relative_l2_error"]) == (1, 1, None)
    assert not measures.passes(result)
    judged = judge({"class_token": value}, {"class_token": reference}, {"class_token": reference}, (1.0, 0.9999), True)
    assert (judged["overall"], judged["faithful"], judged["smallest_bar_percent"]) == ("FAIL", False, None)


def test_a_nan_in_an_output_that_does_not_count_fails_all_the_same():
    truth = {"pooler_output": np.ones((1, 1, 4)), "class_token": np.ones((1, 1, 4))}
    judged = judge(truth | {"pooler_output": np.full((1, 1, 4), np.nan)}, truth, truth, (1.0, 0.9999), False)
    assert (judged["misses"], judged["overall"], judged["faithful"]) == ([], "FAIL", False)


def test_each_bar_turns_at_its_own_limit():
    reference = np.ones((1, 4, 8))
    value = reference.copy()
    value[:, :, ::2] += 0.01  # a filtered MRE of 0.5%, a relative L2 of 0.707% for each token and for all
    passed = {bar: metrics(value, reference, bar, 0.9999) for bar in (0.49, 0.51, 0.7, 0.71)}
    assert [passed[bar]["mre_pass"] for bar in passed] == [False, True, True, True]
    assert [passed[bar]["l2_pass"] for bar in passed] == [False, False, False, True]
    assert [passed[bar]["worst_token_pass"] for bar in passed] == [False, False, False, True]
    cosine = passed[0.49]["cosine_similarity"]
    assert metrics(value, reference, 1.0, cosine - 1e-9)["cosine_pass"] is True
    assert metrics(value, reference, 1.0, cosine + 1e-9)["cosine_pass"] is False


def test_the_smallest_bar_can_be_that_of_the_relative_error():
    reference = {"class_token": np.array([[[100.0] + 99 * [11.0]]])}
    value = {"class_token": reference["class_token"] + np.array([[[0.0] + 99 * [0.11]]])}
    found = judge(value, reference, reference, (5.0, 0.9), True)
    mre = found["class_token"]["relative_error"]["filtered_mean_relative_error"]
    assert mre == pytest.approx(0.0099) and mre > found["class_token"]["worst_token_relative_l2_error"]
    assert found["smallest_bar_percent"] == pytest.approx(0.99)


def test_faithful_is_judged_against_float64_and_the_bars_against_the_reference():
    truth = {"class_token": np.ones((1, 1, 4))}
    near, far = {"class_token": truth["class_token"] * (1 + 9e-6)}, {"class_token": truth["class_token"] * (1 + 2e-5)}
    assert judge(near, near, truth, (1.0, 0.9999), True)["faithful"] is True
    assert judge(far, far, truth, (1.0, 0.9999), True)["faithful"] is False
    assert judge(far, far, truth, (1.0, 0.9999), True)["class_token"]["relative_l2_error"] == 0.0


def test_the_smallest_bar_is_the_one_that_turns_the_verdict():
    numbers = np.random.default_rng(0)
    truth = {name: numbers.normal(size=(2, 5, 8)) for name in measures.OUTPUTS}
    found = {name: values * (1 + 0.003 * numbers.normal(size=values.shape)) for name, values in truth.items()}
    found["pooler_output"] = -found["pooler_output"]
    bar = judge(found, truth, truth, (1.0, 0.99), False)["smallest_bar_percent"]
    assert judge(found, truth, truth, (bar * 1.0001, 0.99), False)["overall"] == "PASS"
    assert judge(found, truth, truth, (bar * 0.9999, 0.99), False)["overall"] == "FAIL"
    assert judge(found, truth, truth, (1.0, 0.99), True)["smallest_bar_percent"] > 100


@pytest.mark.parametrize(
    ("own", "plain", "fault"),
    [
        ([3e-7, 4e-7, 5e-7], [2e-7, 3e-7, 3e-7], False),
        ([3e-6, 3e-6, 3e-6], [3e-7, 3e-7, 3e-7], True),
        ([9e-7, 1e-5, 1e-5], [2e-7, 3e-7, 3e-7], True),  # the median
        ([8e-6, 8e-6, 8e-6], [3e-6, 3e-6, 3e-6], False),  # a block that is inexact in plain float32 too
        ([1e-7, 1e-7, 1e-4], [1e-7, 1e-7, 1e-7], True),  # one token
        ([1e-7, 1e-7, 1e-4], [1e-7, 1e-7, 2e-5], False),
        ([1e-7, 1e-7, math.nan], [1e-7, 1e-7, 1e-7], True),
    ],
)
def test_a_block_is_at_fault_beyond_what_float32_does_there(own, plain, fault):
    assert measures.is_at_fault(np.array([own]), np.array([plain])) is fault


def test_what_is_wrong_with_every_layer_is_named_once():
    names = {
        "patch embedding": False,
        "layer 1 attention": False,
        "layer 1 MLP": True,
        "layer 2 attention": True,
        "layer 2 MLP": True,
    }
    rows = [{"stage": name, "at_fault": fault} for name, fault in names.items()]
    assert measures.begins(rows) == ["layer 1 MLP", "layer 2 attention"]


def test_yardsticks_agree_with_hand_computed_values():
    truth = np.array([[[1.0, 2.0, 4.0]]])
    peer, value = truth + [0.001, 0.0, 0.002], truth + [0.002, 0.0, 0.002]
    found = measures.yardstick(value, peer, truth)
    assert found["max_ratio"] == pytest.approx(2.0, rel=1e-6)
    assert found["mean_ratio"] == pytest.approx(0.0025 / 0.0015, rel=1e-6)
    assert found["rmse_ratio"] == pytest.approx(math.sqrt(8 / 5))
    assert found["mean_relative_error"] == pytest.approx(0.0025 / 3, rel=1e-6)
    assert (found["class"], found["same"], found["within_2e-13"], found["within_2e-11"]) == ("L0", True, False, False)
    assert measures.yardstick(truth + 1e-4, truth + 1e-4, truth)["class"] == "L2"
    assert measures.yardstick(truth + 1e-4, truth + 1e-4, truth)["within_2e-13"] is True
    large = measures.yardstick(1000 * truth + 0.1, 1000 * truth, 1000 * truth)  # relative to what they are of
    assert (large["within_2e-13"], large["within_2e-11"]) == (True, True)


@pytest.mark.parametrize(("factor", "found"), [(1.15, "L2"), (1.4, "L1"), (1.9, "L0"), (2.1, "none")])
def test_ascend_classes_go_by_their_limits(factor, found):
    truth = np.random.default_rng(0).normal(size=(1, 4, 16))
    noise = 1e-3 * np.random.default_rng(1).normal(size=truth.shape)
    assert measures.yardstick(truth + factor * noise, truth + noise, truth)["class"] == found
    assert measures.yardstick(truth + factor * noise, truth + noise, truth)["same"] is (factor <= 2)
    assert measures.yardstick(truth + factor * noise, truth + noise, truth, half=True)["same"] is True


def test_dual_thousandth_counts_elements_over_a_thousandth():
    truth = np.ones((1, 10, 100))
    value = truth.copy()
    value[0, 0, :2], value[0, 1, 0], value[0, 2, 0] = 1.002, np.nan, 1.0009
    assert measures.dual_thousandth(value, truth) == pytest.approx(0.3)


# --- worth ---


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


def test_without_scikit_learn_the_probe_says_what_to_install(evaluate, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    done = evaluate("--views", 0, "--probe", 100, device="cpu")
    assert (done.code, done.result["worth"]["task"]) == (0, "not run: pip install scikit-learn")


# --- stages: who is at fault ---


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """The trained fixture with massive activations on three tokens and channels, by their size."""
    from transformers import ViTModel

    made = {}

    def grow(size: float) -> Path:
        if size not in made:
            module = ViTModel.from_pretrained(TRAINED)
            with torch.no_grad():
                module.embeddings.position_embeddings[0, [1, 20, 43], torch.tensor([[7], [50], [33]])] += size
            made[size] = save_checkpoint(tmp_path_factory.mktemp("grown") / str(size), module)
        return made[size]

    return grow


def measured(folder: Path, device: inference.Device, change=None, **options) -> list[dict]:
    """The rows of the stages for a model on a device, after `change`."""
    cpu = inference.open_device("cpu")
    golden = inference.load_model(cpu, str(folder), "float64", levers=())
    plain = inference.load_model(cpu, str(folder), levers=())
    model = inference.load_model(device, str(folder), **options)
    paths = [str(SAMPLES / "chelsea.jpg"), str(SAMPLES / "coffee.jpg")]
    prepared = stages.prepare_stages(golden, plain, inference.crops_of(paths, plain.preprocess))
    if change:
        change(model)
    return stages.measure_stages(prepared, model, stages.Arithmetic("float32"))


def times(factor: float, number: int, block: str):
    def change(model):
        last_linear(layer(model, number), block).register_forward_hook(lambda _part, _inputs, output: output * factor)

    return change


@pytest.mark.parametrize("size", [0.0, 100.0, 1000.0])
@pytest.mark.parametrize(("number", "block"), [(1, "MLP"), (4, "attention"), (4, "MLP"), (6, "attention")])
def test_a_small_fault_is_named_under_massive_activations(grown, cpu, size, number, block):
    rows = measured(grown(size), cpu, times(1 + 1e-5, number, block))
    assert [row["stage"] for row in rows if row["at_fault"]] == [f"layer {number} {block}"]
    assert [row["stage"] for row in measured(grown(size), cpu) if row["at_fault"]] == []


@pytest.mark.parametrize("size", [0.0, 1000.0])
def test_a_small_fault_is_named_on_an_npu_too(npu, grown, size):
    rows = measured(grown(size), inference.open_device("npu"), times(1 + 1e-5, 3, "MLP"))
    assert [row["stage"] for row in rows if row["at_fault"]] == ["layer 3 MLP"]


def test_own_error_stands_beside_what_is_inherited(grown, cpu):
    rows = {row["stage"]: row for row in measured(grown(0.0), cpu, times(1.01, 3, "attention"))}
    assert rows["layer 3 attention"]["own_relative_l2_error"] == pytest.approx(0.01, rel=0.01)
    assert rows["layer 5 MLP"]["own_relative_l2_error"] < 1e-6
    assert rows["layer 5 MLP"]["median_token_relative_l2_error"] > 1e-4
    assert rows["layer 2 MLP"]["median_token_relative_l2_error"] < 1e-6
    assert {row["float32_own_relative_l2_error"] < 1e-6 for row in rows.values()} == {True}


BIG_FAULTS = {
    "patch embedding": lambda module: module.embeddings.patch_embeddings,
    "position embedding": lambda module: module.embeddings,
    "layer 4 attention": lambda module: last_linear(inference.layers_of(module)[3], "attention"),
    "layer 6 MLP": lambda module: last_linear(inference.layers_of(module)[5], "MLP"),
    "final norm": lambda module: module.layernorm,
    "pooler": lambda module: module.pooler.dense,
}


@pytest.mark.parametrize("stage", BIG_FAULTS)
def test_nothing_that_comes_after_a_big_fault_is_blamed_for_it(grown, cpu, stage):
    def change(model):
        part = BIG_FAULTS[stage](model.module)
        part.register_forward_hook(lambda _part, _inputs, output: output + 0.5 * output.roll(1, -1))

    assert [row["stage"] for row in measured(grown(0.0), cpu, change) if row["at_fault"]] == [stage]


def test_plain_float32_is_measured_against_float64(grown, cpu):
    for row in measured(grown(0.0), cpu, levers=()):
        assert 0 < row["relative_l2_error"] < 2e-6, row["stage"]
        assert 0 < row["own_relative_l2_error"] == row["float32_own_relative_l2_error"]


def test_the_position_embedding_and_the_final_norm_answer_for_themselves(grown, cpu):
    def shift(model):
        model.module.embeddings.position_embeddings.mul_(1.001)
        model.module.layernorm.weight.mul_(1.001)

    rows = measured(grown(0.0), cpu, shift)
    assert [row["stage"] for row in rows if row["at_fault"]] == ["position embedding", "final norm"]


def test_the_median_tells_a_stage_that_three_huge_tokens_hide(grown, cpu):
    rows = {row["stage"]: row for row in measured(grown(1000.0), cpu, times(1.001, 4, "MLP"))}
    before, after = rows["layer 4 attention"], rows["layer 4 MLP"]
    assert after["median_token_relative_l2_error"] > 30 * before["median_token_relative_l2_error"]
    assert after["relative_l2_error"] < after["median_token_relative_l2_error"] / 10


def test_the_fixture_has_the_statistics_of_trained_weights(cpu):
    model = inference.load_model(cpu, str(TRAINED), levers=())
    assert (model.pooler, model.weights.note) == ("trained", None)
    crops = inference.crops_of([str(path) for path in sorted(SAMPLES.glob("*.jpg"))], model.preprocess)
    norms = inference.forward(model, crops, ["4"]).layers["4"].norm(dim=-1).mean(0)
    outliers = norms > 3 * norms.median()
    assert outliers.nonzero().flatten().tolist() == [1, 20, 43]
    channels = inference.forward(model, crops, ["4"]).layers["4"][:, 1].abs().mean(0)
    assert channels.topk(2).indices.sort().values.tolist() == [7, 50]


@pytest.mark.parametrize(
    ("spread", "bias", "state"),
    [
        (0.02, 0.0, "untrained"),
        (0.0204, 0.0, "untrained"),
        (0.0225, 0.0, "trained"),
        (0.0178, 0.0, "trained"),
        (0.02, 1e-6, "trained"),
    ],
)
def test_a_pooler_is_untrained_within_a_narrow_tolerance(spread, bias, state):
    weight = torch.empty(64, 64).normal_(0, 1, generator=torch.Generator().manual_seed(0))
    weight = (weight - weight.mean()) / weight.std() * spread
    assert inference.classify_pooler(weight, torch.full((64,), bias), 0.02) == state


# --- the evaluation on the simulated NPU ---


def test_strict_float32_is_faithful(npu, evaluate):
    done = evaluate()
    result = done.result
    assert (done.code, result["overall"], result["faithful"], result["starts_at"]) == (0, "PASS", True, None)
    assert result["last_hidden_state"]["relative_l2_error"] <= 1e-6
    assert result["last_hidden_state"]["float64_relative_l2_error"] <= 1e-6
    assert (done.folder / "accuracy_eval.json").is_file()
    assert result["device_name"] == npu.NAME
    assert result["invariance"]["repeatable_bit_for_bit"] is True
    assert result["invariance"]["batch_invariance_relative_l2_error"] < 5e-6
    assert result["yardsticks"]["last_hidden_state"]["same"] is True
    assert result["yardsticks"]["patch_embedding"] == {
        "off_by_a_thousandth_percent": pytest.approx(0, abs=0.1),
        "dual_thousandth": True,
    }


def test_a_gelu_that_is_not_exact_is_traced_to_the_first_mlp(npu, evaluate, monkeypatch):
    real = inference.load_model
    monkeypatch.setattr(
        inference, "load_model", lambda device, *args, **options: real(device, *args, **options | {"exact_gelu": False})
    )
    done = evaluate()
    assert (done.result["starts_at"], done.result["faithful"]) == ("layer 1 MLP", False)
    assert done.result["begins_at"] == ["layer 1 MLP"]
    assert [row["stage"] for row in done.result["stages"] if row["at_fault"]] == [
        f"layer {n} MLP" for n in range(1, LAYERS + 1)
    ]


def test_hf32_is_found_and_traced_to_the_patch_embedding(npu, evaluate):
    done = evaluate("--allow_hf32")
    assert (done.code, done.result["overall"]) == (0, "PASS")  # one percent hides it
    assert done.result["faithful"] is False
    assert done.result["last_hidden_state"]["relative_l2_error"] >= 1e-5
    assert done.result["starts_at"] == "patch embedding"
    assert done.result["yardsticks"]["last_hidden_state"]["rmse_ratio"] > 10
    assert done.result["yardsticks"]["last_hidden_state"]["same"] is False
    assert done.result["yardsticks"]["last_hidden_state"]["class"] == "none"


def test_a_run_leaves_the_switches_as_it_was_asked_to(npu, evaluate):
    evaluate("--allow_hf32", "--dtype", "float16")
    assert (npu.module.conv.allow_hf32, npu.module.matmul.allow_hf32) == (True, True)


def test_a_device_is_never_compared_with_itself(evaluate):
    done = evaluate(device="cpu")
    assert done.result["reference"]["dtype"] == "float64"
    assert 0 < done.result["last_hidden_state"]["relative_l2_error"] < 2e-6
    assert (
        done.result["last_hidden_state"]["relative_l2_error"] == done.result["last_hidden_state"]["float64_relative_l2_error"]
    )
    assert "cpu is not compared with itself" in done.log
    assert "=== Accuracy Comparison (CPU vs float64) ===" in done.log


def test_float64_can_be_the_reference_of_an_npu(npu, evaluate):
    against_cpu, against_golden = evaluate().result, evaluate("--reference", "golden").result
    assert (against_cpu["reference"]["device"], against_golden["reference"]["dtype"]) == ("cpu", "float64")
    assert (
        against_golden["last_hidden_state"]["relative_l2_error"]
        == against_cpu["last_hidden_state"]["float64_relative_l2_error"]
    )
    assert against_cpu["last_hidden_state"]["relative_l2_error"] != against_golden["last_hidden_state"]["relative_l2_error"]


def scaled(factor):
    return lambda model: linears(layer(model, 8))[0].weight.mul_(factor)


def swap_heads(model):
    size = TINY["hidden_size"] // 2
    for linear in linears(layer(model, 4))[:3]:
        rows = torch.arange(2 * size).roll(size).to(linear.weight.device)
        linear.weight.copy_(linear.weight[rows])
        linear.bias.copy_(linear.bias[rows])


def hook(number, change):
    def install(model):
        def on_output(_module, _inputs, output):
            output = output.clone()
            change(output)
            return output

        layer(model, number).register_forward_hook(on_output)

    return install


def replace_token(output):
    output[:, 5] = output[:, 9]


def set_nan(output):
    output[0, 2, 3] = float("nan")


def swap_channels(model):
    (r, g, b), (s, t, u) = model.preprocess.mean, model.preprocess.std
    return dataclasses.replace(model, preprocess=dataclasses.replace(model.preprocess, mean=(g, r, b), std=(t, s, u)))


@pytest.mark.parametrize(
    ("change", "stage", "fails"),
    [
        (scaled(1.01), "layer 8 attention", False),
        (scaled(2.0), "layer 8 attention", True),
        (swap_heads, "layer 4 attention", True),
        (hook(6, replace_token), "layer 6 MLP", True),  # which answers for the sum that the layer leaves
        (hook(5, set_nan), "layer 5 MLP", True),
        (swap_channels, "pixels", True),
    ],
    ids=["matrix x 1.01", "matrix x 2", "two heads swapped", "one token replaced", "one NaN", "two channels swapped"],
)
def test_damage_is_found_named_and_failed(npu, evaluate, damage, change, stage, fails):
    damage(change)
    done = evaluate("--without", "folded_patches")
    assert done.result["starts_at"] == stage
    assert done.result["faithful"] is False
    over = [
        name
        for name in measures.OUTPUTS
        for error in (done.result[name]["relative_l2_error"], done.result[name]["worst_token_relative_l2_error"])
        if error is None or error >= 0.01
    ]
    assert (done.code, done.result["overall"]) == ((1, "FAIL") if over else (0, "PASS"))
    assert bool(over) == fails
    assert f"The error starts at: {stage}" in done.log


def only_the_third(output):
    if len(output) > 2:
        output[2, 1] = output[2, 2]


def test_one_bad_image_among_good_ones_fails(npu, evaluate, damage):
    damage(hook(6, only_the_third))
    done = evaluate()
    assert done.code == 1
    assert done.result["last_hidden_state"]["worst_token_pass"] is False
    assert done.result["last_hidden_state"]["median_token_relative_l2_error"] < 1e-6


def test_an_image_that_changes_in_company_is_reported(npu, evaluate, damage):
    damage(hook(6, only_the_third))
    invariance = evaluate().result["invariance"]
    assert invariance["batch_invariance_relative_l2_error"] > 1e-2
    assert (invariance["batch_size"], invariance["repeatable_bit_for_bit"]) == (6, True)


def test_bits_that_vary_from_run_to_run_are_reported(npu, evaluate):
    npu.machine.faults.add("nondeterministic")
    invariance = evaluate().result["invariance"]
    assert invariance["repeatable_bit_for_bit"] is False


def test_bfloat16_over_the_bar_fails(npu, evaluate):
    done = evaluate("--dtype", "bfloat16", "--threshold_percent", "0.2")
    assert done.result["last_hidden_state"]["relative_l2_error"] > 0.002
    assert (done.code, done.result["overall"], done.result["faithful"]) == (1, "FAIL", False)
    assert {"Hidden: relative L2", "Hidden: worst token"} <= set(done.result["misses"])
    assert "Hidden: relative L2" in done.log.split("Over their bars: ")[1]
    assert done.result["yardsticks"]["last_hidden_state"]["rmse_ratio"] == pytest.approx(
        1, abs=0.3
    )  # beside bfloat16, not float32


def test_an_untrained_pooler_is_marked_and_decides_nothing(npu, evaluate, tmp_path, damage):
    torch.manual_seed(0)
    module = tiny_model()
    module.pooler.dense.weight.data.normal_(0, 0.02)
    module.pooler.dense.bias.data.zero_()
    folder = save_checkpoint(tmp_path / "untrained", module)
    damage(lambda model: model.module.pooler.dense.weight.mul_(-1))
    done = evaluate(folder=folder)
    assert done.result["pooler_output"]["cosine_pass"] is False
    assert done.result["pooler_output"]["counts"] is False
    assert eval_accuracy.output_rows(done.result)[0]["verdict"] == "FAIL, does not count"
    assert (done.code, done.result["overall"], done.result["misses"]) == (0, "PASS", [])
    assert "Pooler Cosine > 0.9999: FAIL (the pooler is not trained: reported, but it does not count)" in done.log


def test_a_trained_pooler_counts(npu, evaluate, damage):
    damage(lambda model: model.module.pooler.dense.weight.mul_(-1))
    done = evaluate()
    assert (done.code, done.result["pooler_output"]["counts"], done.result["starts_at"]) == (1, True, "pooler")


# --- the sweep and the recipe ---


def test_the_sweep_compares_every_arithmetic_and_recommends_the_fastest_within_the_bar(npu, evaluate):
    done = evaluate("--sweep", "--image_path", SAMPLES / "chelsea.jpg", SAMPLES / "coffee.jpg")
    rows = {row["arithmetic"]: row for row in done.result["sweep"]}
    strict, left, rounded = "float32, strict", "float32, as torch_npu leaves it", "float32, HF32 allowed"
    assert list(rows) == [strict, left, rounded, "float16", "bfloat16", "bfloat16 autocast"]
    errors = {name: row["relative_l2_error"] for name, row in rows.items()}
    assert errors[strict] < 1e-6 < errors[left] < errors["float16"] < errors["bfloat16 autocast"] < errors["bfloat16"]
    assert (rows[strict]["begins_at"], rows[left]["begins_at"]) == ([], ["patch embedding", "layer 1 MLP"])
    assert errors[rounded] > 1e-5 and "layer 1 attention" in rows[rounded]["begins_at"]
    kept = [row for row in rows.values() if row["overall"] == "PASS"]
    assert done.result["recommended"] == max(kept, key=lambda row: row["throughput_img_s"])["arithmetic"]
    assert (rows[strict]["faithful"], rows[left]["faithful"], rows["float16"]["faithful"]) == (True, False, False)
    assert (
        rows["bfloat16"]["smallest_bar_percent"]
        > rows["float16"]["smallest_bar_percent"]
        > rows[strict]["smallest_bar_percent"]
    )
    assert (npu.module.conv.allow_hf32, npu.module.matmul.allow_hf32) == (False, False)
    assert re.search(r"float16 +\d\.\d\de-0\d +\d\.\d\de-0\d +\d\.\d{4} +PASS +patch embedding", done.log)


def test_a_rate_is_that_of_the_median_run_without_the_first(tiny, monkeypatch):
    times = iter([9.0, 0.5, 0.25, 1.0])
    monkeypatch.setattr(inference, "time_once", lambda *_given: next(times))
    judged = dict.fromkeys(("overall", "smallest_bar_percent", "faithful")) | {"last_hidden_state": {"relative_l2_error": 0.1}}
    crops = torch.zeros(3, 64, 64, 3, dtype=torch.uint8)
    run = SimpleNamespace(args=SimpleNamespace(batch_size=2), judge=lambda _found: judged, crops=crops)
    row, _ = eval_accuracy.speed_and_error(run, tiny, stages.Arithmetic("float32"))
    assert (row["throughput_img_s"], row["relative_l2_error"]) == (2 / 0.5, 0.1)


def test_the_yardsticks_peer_in_half_precision_has_no_levers(npu, evaluate, monkeypatch):
    loaded, load = [], inference.load_model
    monkeypatch.setattr(inference, "load_model", lambda *given, **asked: loaded.append(load(*given, **asked)) or loaded[-1])
    assert evaluate("--dtype", "float16").code == 0
    assert [model.levers for model in loaded if model.dtype == torch.float16] == [("fused_attention", "folded_patches"), ()]


def test_the_recipe_names_the_layers_that_must_stay_in_float32(evaluate):
    flags = ("--dtype", "bfloat16", "--recipe", "--threshold_percent", "1.0")
    done = evaluate(*flags, device="cpu", folder=TRAINED)
    found = done.result["recipe"]
    assert all(column.cell(row) != "-" for row in done.result["recipe"]["tried"] for column in eval_accuracy.RECIPE_COLUMNS)
    tried = {(row["first"], row["last"]): row for row in found["tried"]}
    assert tried[0, 0]["overall"] == "FAIL"
    best = found["best"]
    assert best["overall"] == "PASS" and best["first"] + best["last"] >= 1
    assert best["throughput_img_s"] > 0
    fewer = (best["first"] - 1, 0) if best["first"] else (0, best["last"] - 1)
    assert tried[fewer]["overall"] == "FAIL"
    assert all(row["smallest_bar_percent"] < 1.0 for row in tried.values() if row["overall"] == "PASS")


def test_a_recipe_that_fails_costs_itself_alone(evaluate, monkeypatch):
    def fail(*_given):
        raise RuntimeError("no bfloat16 here")

    monkeypatch.setattr(eval_accuracy, "mixed_model", fail)
    done = evaluate("--recipe", device="cpu")
    assert (done.code, done.result["overall"]) == (0, "PASS")
    assert done.result["recipe"]["best"] is None
    assert {(row["overall"], row["reason"]) for row in done.result["recipe"]["tried"]} == {
        ("not available", "no bfloat16 here")
    }


def test_a_recipe_that_is_stopped_keeps_what_was_tried(evaluate, monkeypatch):
    mixed, tried = eval_accuracy.mixed_model, []

    def stopped(*given):
        if len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(given[2:])
        return mixed(*given)

    monkeypatch.setattr(eval_accuracy, "mixed_model", stopped)
    done = evaluate("--recipe", "--dtype", "bfloat16", device="cpu")
    assert done.code == 130
    assert sorted((row["first"], row["last"]) for row in done.result["recipe"]["tried"]) == sorted(tried)


def test_layers_of_a_recipe_that_stay_in_float32_are_float32(evaluate):
    done = evaluate("--dtype", "bfloat16", "--recipe", "--threshold_percent", "0.001", device="cpu", folder=TRAINED)
    tried = {(row["first"], row["last"]): row for row in done.result["recipe"]["tried"]}
    assert tried[6, 0]["smallest_bar_percent"] < 1e-3 and tried[0, 6]["smallest_bar_percent"] < 1e-3
    assert done.result["recipe"]["best"]["overall"] == "PASS"


def test_what_misses_the_bar_is_not_recommended_however_fast():
    rows = [("slow", "PASS", 1.0), ("fast", "PASS", 2.0), ("wrong", "FAIL", 9.0)]
    keys = ("arithmetic", "overall", "throughput_img_s")
    assert eval_accuracy.recommend([dict(zip(keys, row)) for row in rows]) == "fast"
    assert eval_accuracy.recommend([dict(zip(keys, rows[2])), {"arithmetic": "none", "overall": "not available"}]) is None


# --- what is kept, said and refused ---


def test_the_result_carries_the_published_keys_and_its_formulas(npu, evaluate):
    result = evaluate().result
    assert list(result["last_hidden_state"]["relative_error"]) == [
        "max_relative_error",
        "mean_relative_error",
        "filtered_mean_relative_error",
        "max_absolute_error",
        "mean_absolute_error",
    ]
    for name in measures.OUTPUTS:
        assert {"relative_error", "cosine_similarity", "mre_pass", "cosine_pass"} <= result[name].keys()
    assert result["overall"] in ("PASS", "FAIL")
    assert "RMS" in result["formulas"]["filtered_mean_relative_error"]
    assert [row["stage"] for row in result["stages"]] == [
        *("patch embedding", "position embedding"),
        *(f"layer {number} {block}" for number in range(1, LAYERS + 1) for block in ("attention", "MLP")),
        *("final norm", "pooler"),
    ]
    assert result["reference"]["device"] == "cpu"


TABLES = (
    (eval_accuracy.OUTPUT_COLUMNS, eval_accuracy.output_rows),
    (stages.STAGE_COLUMNS, lambda result: result.get("stages") or []),
    (eval_accuracy.SWEEP_COLUMNS, eval_accuracy.sweep_rows),
    (worth.WORTH_COLUMNS, worth.worth_rows),
    (eval_accuracy.YARDSTICK_COLUMNS, eval_accuracy.yardstick_rows),
)


def test_a_whole_run_has_error_beside_worth_and_a_value_in_every_column(evaluate, monkeypatch):
    pytest.importorskip("sklearn")
    two = [stages.Arithmetic("float32, strict"), stages.Arithmetic("bfloat16", "bfloat16")]
    monkeypatch.setattr(stages, "arithmetics", lambda device: two)
    monkeypatch.setattr(inference, "default_batch_size", lambda device: 50)
    monkeypatch.setattr(worth, "FEWEST", 100)
    done = evaluate("--sweep", "--views", 100, "--probe", 100, device="cpu", folder=TRAINED)
    for row in done.result["sweep"]:
        assert (row["worth"]["views"], row["worth"]["digits"]) == (100, 100)
        assert row["worth"]["task"] in ("kept", "lost")
    exact, half = (row["worth"]["class_token"] for row in done.result["sweep"])
    assert exact["same_nearest_percent"] == exact["same_five_nearest_percent"] == 100.0
    assert 70 <= half["same_nearest_percent"] < 100  # views so easy that nothing moves would tell nothing
    assert half["centred_relative_l2_error"] > done.result["sweep"][1]["class_token_relative_l2_error"]
    assert exact["float32_probe_percent"] > 30  # one in ten by chance
    assert done.result["worth"]["task"] == "kept"
    assert "Smallest bar that the relative errors of float32 meet: 0.0001%; task: kept" in done.log
    for columns, rows_of in TABLES:
        for column in columns:
            assert column.en and column.zh
            assert any(column.cell(row) != "-" for row in rows_of(done.result)), column


def test_the_published_result_fits_the_same_columns():
    published = json.loads((inference.ROOT / "results" / "published" / "accuracy_eval.json").read_text())
    rows = eval_accuracy.output_rows(published)
    cells = [[column.cell(row) for column in eval_accuracy.OUTPUT_COLUMNS[:4]] for row in rows]
    assert cells == [["Pooler", "0.2185", "0.999993656", "-"], ["Hidden", "0.1172", "0.999989404", "-"]]
    assert [row["verdict"] for row in rows] == ["PASS", "PASS"]
    assert [rows_of(published) for _, rows_of in TABLES[1:]] == [[], [], [], []]


def test_the_log_has_the_published_lines_in_their_order(npu, evaluate):
    texts = [re.sub(r"0\.000\d%|[01]\.[09]{6}\d+$", "~", line.split("] ", 1)[1]) for line in evaluate().log.splitlines()]
    expected = [
        "Running CPU inference ...",
        "CPU pooler: (6, 128), hidden: (6, 17, 128)",
        "Running NPU inference ...",
        "NPU pooler: (6, 128), hidden: (6, 17, 128)",
        "=== Accuracy Comparison (NPU vs CPU) ===",
        "Pooler Filtered MRE: ~",
        "Pooler Cosine Similarity: ~",
        "Hidden States Filtered MRE: ~",
        "Hidden States Cosine Similarity: ~",
        "Pooler MRE < 1%: PASS",
        "Pooler Cosine > 0.9999: PASS",
        "Hidden MRE < 1%: PASS",
        "Hidden Cosine > 0.9999: PASS",
        "Overall: PASS",
    ]
    places = [texts.index(text) for text in expected]
    assert places == sorted(places)
    assert texts[-1].startswith("Results saved to")


def test_long_steps_say_how_far_they_are(npu, evaluate, monkeypatch):
    monkeypatch.setattr(stages, "PROGRESS_SECONDS", 0.0)
    done = evaluate("--batch_size", 3)
    assert "NPU: batch 2 of 2" in done.log
    assert "float64: batch 3 of 3" in done.log


def test_a_line_comes_each_time_ten_seconds_have_passed(monkeypatch):
    """Not by caplog: pytest hangs its handler on a logger that does not propagate too, and which test ran before decides."""
    clock, told = iter(range(0, 1000, 6)), []
    monkeypatch.setattr(stages.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(stages, "log", SimpleNamespace(info=told.append))
    assert list(stages.with_progress("CPU", "abcdefg")) == list("abcdefg")
    # The clock moves on 6 s each time it is read: at each batch, and once more after a line.
    assert told == [f"CPU: batch {number} of 7" for number in (2, 4, 6)]


def test_short_steps_say_nothing_of_batches(npu, evaluate):
    assert ": batch " not in evaluate("--batch_size", 3).log


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (ValueError("broken"), 70), (inference.UsageError("full"), 2)]
)
def test_whatever_ends_a_run_what_was_measured_is_kept(evaluate, monkeypatch, error, code):
    def end(*_arguments):
        raise error

    monkeypatch.setattr(eval_accuracy, "recommend", lambda rows: end() if len(rows) == 2 else None)
    done = evaluate("--sweep", device="cpu")
    assert done.code == code
    partial = done.folder / "accuracy_eval_partial_cpu.json"
    kept = json.loads(partial.read_text())
    assert kept["partial"] is True and kept["overall"] == "PASS"
    assert [row["arithmetic"] for row in kept["sweep"]] == ["float32, strict"]
    assert not (done.folder / "accuracy_eval_cpu.json").exists()
    assert str(partial) in done.terminal.strip().splitlines()[-1]


def test_a_run_that_ends_well_leaves_no_partial_result(evaluate):
    done = evaluate(device="cpu")
    assert [path.name for path in done.folder.iterdir()] == ["accuracy_eval_cpu.json"]
    assert "partial" not in done.result


@pytest.mark.parametrize(
    "flags",
    [
        *(("--threshold_percent", value) for value in ("0", "-1", "nan", "inf", "one")),
        *(("--cosine_threshold", value) for value in ("0", "-0.5", "1.0001", "nan")),
        *(("--views", value) for value in ("-1", "5", "99")),
        ("--reference", "tpu"),
    ],
)
def test_bars_that_make_no_sense_are_refused_before_anything_is_loaded(run, monkeypatch, flags):
    monkeypatch.setattr(inference, "load_model", None)
    done = run(*flags, main=eval_accuracy.main, name="accuracy_eval")
    assert done.code == 2 and flags[0] in done.terminal and done.log == ""


def test_a_path_that_is_no_image_is_refused_before_anything_is_loaded(run, monkeypatch, tmp_path):
    monkeypatch.setattr(inference, "load_model", None)
    for path, text in ((TESTS / "conftest.py", "not an image"), (tmp_path / "none.jpg", "no such file")):
        done = run("--device", "cpu", "--image_path", path, main=eval_accuracy.main, name="accuracy_eval")
        assert done.code == 2
        assert text in done.terminal and path.name in done.terminal


def test_a_blocked_device_overwrites_no_result(npu, evaluate):
    first = evaluate()
    npu.module.devices = 0
    second = evaluate()
    assert (second.code, second.result) == (3, first.result)
    assert "BLOCKED: torch sees no NPU" in second.terminal
    assert "BLOCKED" in second.log


def test_a_reference_that_cannot_be_had_is_blocked_too(evaluate):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert evaluate("--reference", "cuda", device="cpu").code == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_strict_float32_is_faithful_on_a_gpu(evaluate):
    done = evaluate(device="cuda")
    assert (done.code, done.result["faithful"]) == (0, True)
