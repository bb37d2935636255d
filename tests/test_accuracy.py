"""eval_accuracy.py: its metrics by hand, its verdicts, and that every kind of damage is found, named and failed."""

from __future__ import annotations

import math
import re

import eval_accuracy
import inference
import numpy as np
import pytest
import torch
from conftest import SAMPLES, TINY, save_checkpoint, tiny_model
from eval_accuracy import compare, first_jump, metrics, neighbour_agreement

LAYERS = 9


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory):
    """Nine layers, with the spread of weights that a ViT has, so that errors are as small as in a real one."""
    torch.manual_seed(0)
    module = tiny_model(layers=LAYERS)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.data = torch.empty(parameter.shape).normal_(0, 0.06)
        else:
            parameter.data = torch.full_like(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.01)
    return save_checkpoint(tmp_path_factory.mktemp("deep") / "model", module)


@pytest.fixture
def evaluate(run, deep_folder):
    def run_evaluation(*flags, device="npu"):
        common = ("--model_path", deep_folder, "--device", device, "--image_path", SAMPLES)
        return run(*common, *flags, main=eval_accuracy.main, name="accuracy_eval")

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
    return [part for part in model.module.modules() if type(part).__name__ == "ViTLayer"][number]


def linears(part: torch.nn.Module) -> list[torch.nn.Linear]:
    return [inner for inner in part.modules() if isinstance(inner, torch.nn.Linear)]


# --- metrics by hand ---


def test_metrics_agree_with_hand_computed_values():
    value, reference = np.array([[3.0, 4.4], [0.0, 2.0]]), np.array([[3.0, 4.0], [0.0, 1.0]])
    result = metrics(compare(value, reference), 1.0, 0.9999)
    assert result["relative_error"] == {
        "max_relative_error": pytest.approx(1.0),
        "mean_relative_error": pytest.approx((0 + 0.1 + 1.0) / 3),  # the zero of the reference is left out
        "filtered_mean_relative_error": pytest.approx((0 + 0.1 + 1.0) / 3),
        "max_absolute_error": pytest.approx(1.0),
        "mean_absolute_error": pytest.approx(1.4 / 4),
    }
    assert result["relative_l2_error"] == pytest.approx(math.sqrt((0.16 + 1) / 26))
    assert result["relative_l2_error_percent"] == pytest.approx(100 * math.sqrt(1.16 / 26))
    assert result["cosine_similarity"] == pytest.approx((9 + 17.6 + 2) / math.sqrt((9 + 19.36 + 4) * 26))
    assert result["worst_token_relative_l2_error"] == pytest.approx(1.0)
    assert result["worst_image_relative_l2_error"] == pytest.approx(math.sqrt(1.16 / 26))
    assert result["p99_token_relative_l2_error"] == pytest.approx(0.08 + 0.99 * 0.92)
    assert (result["nan_count"], result["inf_count"]) == (0, 0)


def test_the_filter_leaves_out_what_is_near_zero():
    reference = np.array([1.0, 1.0, 0.07, 0.08])  # RMS 0.709, a tenth of it 0.0709
    result = metrics(compare(reference + 0.01, reference), 1.0, 0.9999)["relative_error"]
    assert result["filtered_mean_relative_error"] == pytest.approx((0.01 + 0.01 + 0.125) / 3)
    assert result["mean_relative_error"] == pytest.approx((0.01 + 0.01 + 0.01 / 0.07 + 0.125) / 4)


def test_sizes_of_one_and_zeros():
    assert compare(np.array([2.0]), np.array([2.0])).relative_l2 == 0.0
    assert compare(np.array([3.0]), np.array([2.0])).relative_l2 == 0.5
    nothing = metrics(compare(np.zeros(3), np.zeros(3)), 1.0, 0.9999)
    assert (nothing["relative_l2_error"], nothing["relative_error"]["mean_relative_error"]) == (0.0, 0.0)
    something = metrics(compare(np.ones(3), np.zeros(3)), 1.0, 0.9999)
    assert (something["relative_l2_error"], something["l2_pass"], something["worst_token_pass"]) == (None, False, False)


def test_a_cosine_never_exceeds_one():
    numbers = np.random.default_rng(0).normal(size=(197, 1024)).astype(np.float32)
    assert compare(numbers, numbers).cosine <= 1.0
    assert compare(3 * numbers, numbers).cosine == pytest.approx(1.0, abs=1e-15)
    assert compare(-numbers, numbers).cosine == pytest.approx(-1.0, abs=1e-15)


def test_errors_of_images_add_up_to_the_errors_of_all():
    numbers = np.random.default_rng(1)
    values, references = numbers.normal(size=(3, 5, 4)), numbers.normal(size=(3, 5, 4))
    added = compare(values[0], references[0]) + compare(values[1], references[1]) + compare(values[2], references[2])
    whole = compare(values.reshape(15, 4), references.reshape(15, 4))
    assert added.relative_l2 == pytest.approx(whole.relative_l2)
    assert added.cosine == pytest.approx(whole.cosine)
    assert added.tokens == pytest.approx(whole.tokens)
    assert (added.max_absolute, added.count) == (whole.max_absolute, whole.count)
    assert len(added.images) == 3


def test_nan_and_infinity_are_counted_and_fail():
    reference = np.ones((4, 8))
    value = reference.copy()
    value[1, 2], value[3, 4] = np.nan, np.inf
    result = metrics(compare(value, reference), 1.0, 0.9999)
    assert (result["nan_count"], result["inf_count"], result["relative_l2_error"]) == (1, 1, None)
    assert not eval_accuracy.passes(result)


@pytest.mark.parametrize(
    ("errors", "stage"),
    [
        ([0, 0, 0], None),
        ([0, 1e-7, 9e-7], None),
        ([0, 1.5e-4, 1.6e-4], "b"),
        ([1e-7, 3e-7, 4e-6], "c"),
        ([1e-2, 1e-2, 1e-2], "a"),
        ([0, 1e-7, math.nan], "c"),
        ([1.5e-6, 2.5e-6, 4e-6], None),
    ],
)
def test_the_first_jump_is_named(errors, stage):
    assert first_jump(list(zip("abc", errors, strict=True))) == stage


def test_neighbours_are_those_of_a_plain_search():
    numbers = np.random.default_rng(2).normal(size=(20, 6))
    assert neighbour_agreement(numbers, numbers) == (100.0, 100.0)
    shuffled = np.random.default_rng(3).normal(size=(20, 6))
    nearest, three = neighbour_agreement(shuffled, numbers)

    def search(features):
        centred = features - features.mean(0)
        cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in centred] for a in centred])
        return [sorted((j for j in range(20) if j != i), key=lambda j: -cosine[i, j])[:3] for i in range(20)]

    ours, theirs = search(shuffled), search(numbers)
    assert nearest == pytest.approx(100 * np.mean([a[0] == b[0] for a, b in zip(ours, theirs, strict=True)]))
    assert three == pytest.approx(100 * np.mean([len(set(a) & set(b)) / 3 for a, b in zip(ours, theirs, strict=True)]))


# --- the evaluation on the simulated NPU ---


def test_strict_float32_is_faithful(npu, evaluate):
    done = evaluate()
    result = done.result
    assert (done.code, result["overall"], result["faithful"], result["starts_at"]) == (0, "PASS", True, None)
    assert result["last_hidden_state"]["relative_l2_error"] <= 1e-6
    assert (done.folder / "accuracy_eval.json").is_file()
    assert result["device_name"] == npu.NAME
    assert result["neighbours"]["views"] == 24
    assert result["neighbours"]["class_token"]["same_nearest_percent"] == 100.0
    assert result["invariance"]["repeatable_bit_for_bit"] is True
    assert result["invariance"]["batch_invariance_relative_l2_error"] < 5e-6


def test_hf32_is_found_and_traced_to_the_patch_embedding(npu, evaluate):
    done = evaluate("--allow_hf32")
    assert (done.code, done.result["overall"]) == (0, "PASS")  # one percent hides it
    assert done.result["faithful"] is False
    assert done.result["last_hidden_state"]["relative_l2_error"] >= 1e-5
    assert done.result["starts_at"] == "patch embedding"
    assert done.result["golden"]["last_hidden_state"]["device_to_reference_ratio"] > 10


def test_the_switch_is_off_again_after_a_rounded_run(npu, evaluate):
    evaluate("--sweep")
    assert (npu.module.conv.allow_hf32, npu.module.matmul.allow_hf32) == (False, False)


def scaled(factor):
    return lambda model: linears(layer(model, 7))[0].weight.mul_(factor)


def swap_heads(model):
    size = TINY["hidden_size"] // 2
    for linear in linears(layer(model, 3))[:3]:
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
    import dataclasses

    (r, g, b), (s, t, u) = model.preprocess.mean, model.preprocess.std
    return dataclasses.replace(model, preprocess=dataclasses.replace(model.preprocess, mean=(g, r, b), std=(t, s, u)))


@pytest.mark.parametrize(
    ("change", "stage", "fails"),
    [
        (scaled(1.01), "layer 7", False),
        (scaled(2.0), "layer 7", True),
        (swap_heads, "layer 3", True),
        (hook(5, replace_token), "layer 5", True),
        (hook(4, set_nan), "layer 4", True),
        (swap_channels, "pixels", True),
    ],
    ids=["matrix x 1.01", "matrix x 2", "two heads swapped", "one token replaced", "one NaN", "two channels swapped"],
)
def test_damage_is_found_named_and_failed(npu, evaluate, damage, change, stage, fails):
    damage(change)
    done = evaluate()
    assert done.result["starts_at"] == stage
    assert done.result["faithful"] is False
    over = [
        name
        for name in eval_accuracy.OUTPUTS
        for error in (done.result[name]["relative_l2_error"], done.result[name]["worst_token_relative_l2_error"])
        if error is None or error >= 0.01
    ]
    assert (done.code, done.result["overall"]) == ((1, "FAIL") if over else (0, "PASS"))
    assert bool(over) == fails
    assert f"The error starts at: {stage}" in done.log


def test_one_bad_image_among_good_ones_fails(npu, evaluate, damage):
    def only_the_third(output):
        if len(output) > 2:
            output[2, 1] = output[2, 2]

    damage(hook(6, only_the_third))
    done = evaluate()
    assert done.code == 1
    assert done.result["last_hidden_state"]["worst_token_pass"] is False
    assert done.result["images"][2]["last_hidden_state"] > 10 * done.result["images"][1]["last_hidden_state"]


def test_bfloat16_over_the_bar_fails(npu, evaluate):
    done = evaluate("--dtype", "bfloat16", "--threshold_percent", "0.2")
    error = done.result["last_hidden_state"]["relative_l2_error_percent"]
    assert error > 0.2
    assert (done.code, done.result["overall"], done.result["faithful"]) == (1, "FAIL", None)
    assert {"Hidden: relative L2", "Hidden: worst token"} <= set(done.result["misses"])
    assert "Hidden: relative L2" in done.log.split("Over their bars: ")[1]


def test_an_untrained_pooler_is_marked_and_decides_nothing(npu, run, tmp_path, damage):
    torch.manual_seed(0)
    module = tiny_model()
    module.pooler.dense.weight.data.normal_(0, 0.02)
    module.pooler.dense.bias.data.zero_()
    folder = save_checkpoint(tmp_path / "untrained", module)
    damage(lambda model: model.module.pooler.dense.weight.mul_(-1))
    flags = ("--model_path", folder, "--device", "npu", "--image_path", SAMPLES / "chelsea.jpg")
    done = run(*flags, main=eval_accuracy.main, name="accuracy_eval")
    assert done.result["pooler_output"]["cosine_pass"] is False
    assert done.result["pooler_output"]["counts"] is False
    assert (done.code, done.result["overall"], done.result["misses"]) == (0, "PASS", [])
    assert "Pooler Cosine > 0.9999: FAIL (the pooler is not trained: reported, but it does not count)" in done.log


def test_a_trained_pooler_counts(npu, evaluate, damage):
    damage(lambda model: model.module.pooler.dense.weight.mul_(-1))
    done = evaluate()
    assert (done.code, done.result["pooler_output"]["counts"]) == (1, True)


def test_the_sweep_compares_every_arithmetic_and_recommends_the_fastest_within_the_bar(npu, evaluate):
    done = evaluate("--sweep")
    rows = {row["arithmetic"]: row for row in done.result["sweep"]}
    assert list(rows) == ["float32", "float32, HF32 allowed", "float16", "bfloat16", "bfloat16 autocast"]
    errors = {name: row["relative_l2_error"] for name, row in rows.items()}
    assert errors["float32"] < 1e-6 < errors["float32, HF32 allowed"] < errors["float16"] < errors["bfloat16 autocast"]
    assert errors["bfloat16 autocast"] < errors["bfloat16"]
    kept = [row for row in rows.values() if row["overall"] == "PASS"]
    assert done.result["recommended"] == max(kept, key=lambda row: row["throughput_img_s"])["arithmetic"]
    assert rows["float32"]["faithful"] is True and rows["float16"]["faithful"] is False
    assert re.search(r"float16 +\d\.\d\de-0\d +\d\.\d\de-0\d +\d+\.\d\d +PASS", done.log)


def test_the_result_carries_the_published_keys_and_its_formulas(npu, evaluate):
    result = evaluate().result
    assert list(result["last_hidden_state"]["relative_error"]) == [
        "max_relative_error",
        "mean_relative_error",
        "filtered_mean_relative_error",
        "max_absolute_error",
        "mean_absolute_error",
    ]
    for name in eval_accuracy.OUTPUTS:
        assert {"relative_error", "cosine_similarity", "mre_pass", "cosine_pass"} <= result[name].keys()
    assert result["overall"] in ("PASS", "FAIL")
    assert "RMS" in result["formulas"]["filtered_mean_relative_error"]
    assert [row["stage"] for row in result["stages"]] == [
        *("pixels", "patch embedding"),
        *(f"layer {number}" for number in range(LAYERS)),
        "final norm",
    ]
    assert len(result["images"]) == 6
    assert result["reference"]["device"] == "cpu"


def test_the_log_is_in_the_published_style(npu, evaluate):
    texts = [line.split("] ", 1)[1] for line in evaluate().log.splitlines()]
    for expected in (
        "=== Accuracy Comparison (NPU vs CPU) ===",
        "Hidden Filtered MRE: 0.0000%",
        "Hidden Cosine Similarity: 1.000000000",
        "Hidden MRE < 1%: PASS",
        "Hidden Cosine > 0.9999: PASS",
        "Overall: PASS",
    ):
        assert expected in texts


def test_the_golden_run_is_float64(cpu, deep_folder):
    args = eval_accuracy.make_parser().parse_args(["--model_path", str(deep_folder)])
    golden = eval_accuracy.golden_model(args, cpu)
    crops = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    assert eval_accuracy.outputs(golden, eval_accuracy.STRICT, crops)["last_hidden_state"].dtype == np.float64
    assert {parameter.dtype for parameter in golden.module.parameters()} == {torch.float64}


def test_a_blocked_device_overwrites_no_result(npu, evaluate):
    first = evaluate()
    npu.module.devices = 0
    second = evaluate()
    assert (second.code, second.result) == (3, first.result)
    assert second.terminal.startswith("BLOCKED: torch_npu sees no NPU")
    assert "BLOCKED" in second.log


def test_a_reference_that_cannot_be_had_is_blocked_too(evaluate, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    done = evaluate("--reference", "cuda", device="cpu")
    assert done.code == 3


def test_the_full_size_model_with_hf32_starts_at_the_patch_embedding(npu, run):
    flags = ("--random_weights", "--device", "npu", "--allow_hf32", "--image_path", SAMPLES / "chelsea.jpg", "--neighbour_photos", 1)
    done = run(*flags, main=eval_accuracy.main, name="accuracy_eval")
    assert (done.code, done.result["starts_at"], done.result["faithful"]) == (0, "patch embedding", False)
    assert 1e-5 < done.result["last_hidden_state"]["relative_l2_error"] < 1e-3
    assert done.result["golden"]["last_hidden_state"]["reference_relative_l2_error"] < 2e-6
    assert len(done.result["stages"]) == 27
    assert done.result["weights"]["source"] == "random"
    assert "=== Accuracy Comparison (NPU vs CPU) (random weights) ===" in done.log


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_strict_float32_is_faithful_on_a_gpu(evaluate):
    done = evaluate(device="cuda")
    assert (done.code, done.result["faithful"]) == (0, True)
