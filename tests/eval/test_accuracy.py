"""eval_accuracy.py: its verdicts, that every kind of damage is found, named and failed, and what is kept and said."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from types import SimpleNamespace

import inference
import pytest
import torch

import eval_accuracy
import measures
import stages
import worth
from conftest import SAMPLES, TESTS, TINY, save_checkpoint, tiny_model

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
    def run_evaluation(*flags, device="cpu", folder=deep_folder):
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


# --- the evaluation ---


def test_strict_float32_is_faithful(npu, evaluate):
    done = evaluate(device="npu")
    result = done.result
    assert (done.code, result["overall"], result["faithful"], result["starts_at"]) == (0, "PASS", True, None)
    assert result["last_hidden_state"]["relative_l2_error"] <= 1e-6
    assert result["last_hidden_state"]["float64_relative_l2_error"] <= 1e-6
    assert (done.folder / "accuracy_eval.json").is_file()
    assert result["device_name"] == npu.name
    assert result["invariance"]["repeatable_bit_for_bit"] is True
    assert result["invariance"]["batch_invariance_relative_l2_error"] < 5e-6
    assert result["yardsticks"]["last_hidden_state"]["same"] is True
    assert result["yardsticks"]["patch_embedding"] == {
        "off_by_a_thousandth_percent": pytest.approx(0, abs=0.1),
        "dual_thousandth": True,
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_strict_float32_is_faithful_on_a_gpu(evaluate):
    done = evaluate(device="cuda")
    assert (done.code, done.result["faithful"]) == (0, True)


def test_a_gelu_that_is_not_exact_is_traced_to_the_first_mlp(npu, evaluate, monkeypatch):
    real = inference.load_model
    monkeypatch.setattr(
        inference, "load_model", lambda device, *args, **options: real(device, *args, **options | {"exact_gelu": False})
    )
    done = evaluate(device="npu")
    assert (done.result["starts_at"], done.result["faithful"]) == ("layer 1 MLP", False)
    assert done.result["begins_at"] == ["layer 1 MLP"]
    assert [row["stage"] for row in done.result["stages"] if row["at_fault"]] == [
        f"layer {n} MLP" for n in range(1, LAYERS + 1)
    ]


def test_hf32_is_found_and_traced_to_the_patch_embedding(npu, evaluate):
    done = evaluate("--allow_hf32", device="npu")
    assert (done.code, done.result["overall"]) == (0, "PASS")  # one percent hides it
    assert done.result["faithful"] is False
    assert done.result["last_hidden_state"]["relative_l2_error"] >= 1e-5
    assert done.result["starts_at"] == "patch embedding"
    assert done.result["yardsticks"]["last_hidden_state"]["rmse_ratio"] > 10
    assert done.result["yardsticks"]["last_hidden_state"]["same"] is False
    assert done.result["yardsticks"]["last_hidden_state"]["class"] == "none"


def test_a_run_leaves_the_switches_as_it_was_asked_to(npu, evaluate):
    evaluate("--allow_hf32", "--dtype", "float16", device="npu")
    assert (torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32) == (True, True)


def test_a_device_is_never_compared_with_itself(evaluate):
    done = evaluate()
    assert done.result["reference"]["dtype"] == "float64"
    assert 0 < done.result["last_hidden_state"]["relative_l2_error"] < 2e-6
    assert (
        done.result["last_hidden_state"]["relative_l2_error"] == done.result["last_hidden_state"]["float64_relative_l2_error"]
    )
    assert "cpu is not compared with itself" in done.log
    assert "=== Accuracy Comparison (CPU vs float64) ===" in done.log


def test_float64_can_be_the_reference_of_an_npu(npu, evaluate):
    against_cpu, against_golden = evaluate(device="npu").result, evaluate("--reference", "golden", device="npu").result
    assert (against_cpu["reference"]["device"], against_golden["reference"]["dtype"]) == ("cpu", "float64")
    assert (
        against_golden["last_hidden_state"]["relative_l2_error"]
        == against_cpu["last_hidden_state"]["float64_relative_l2_error"]
    )
    assert against_cpu["last_hidden_state"]["relative_l2_error"] != against_golden["last_hidden_state"]["relative_l2_error"]


BY_MODULES = ("--without", "packed_weights")  # which pass by the linear layers, and so by their hooks


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

        linears(layer(model, number))[-1].register_forward_hook(on_output)

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
        (hook(6, replace_token), "layer 6 MLP", True),
        (hook(5, set_nan), "layer 5 MLP", True),
        (swap_channels, "pixels", True),
    ],
    ids=["matrix x 1.01", "matrix x 2", "two heads swapped", "one token replaced", "one NaN", "two channels swapped"],
)
def test_damage_is_found_named_and_failed(evaluate, damage, change, stage, fails):
    damage(change)
    done = evaluate(*BY_MODULES, "folded_patches")
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


def test_one_bad_image_among_good_ones_fails(evaluate, damage):
    damage(hook(6, only_the_third))
    done = evaluate(*BY_MODULES)
    assert done.code == 1
    assert done.result["last_hidden_state"]["worst_token_pass"] is False
    assert done.result["last_hidden_state"]["median_token_relative_l2_error"] < 1e-6


def test_an_image_that_changes_in_company_is_reported(evaluate, damage):
    damage(hook(6, only_the_third))
    invariance = evaluate(*BY_MODULES).result["invariance"]
    assert invariance["batch_invariance_relative_l2_error"] > 1e-2
    assert (invariance["batch_size"], invariance["repeatable_bit_for_bit"]) == (6, True)


def test_bits_that_vary_from_run_to_run_are_reported(evaluate, damage):
    times = itertools.count(1)

    def vary(model):
        linears(layer(model, 5))[-1].register_forward_hook(lambda _part, _inputs, output: output * (1 + 1e-7 * next(times)))

    damage(vary)
    done = evaluate(*BY_MODULES)
    assert done.result["invariance"]["repeatable_bit_for_bit"] is False
    assert "the same bits twice: no" in done.log


def test_bfloat16_over_the_bar_fails(evaluate):
    done = evaluate("--dtype", "bfloat16", "--threshold_percent", "0.2")
    assert done.result["last_hidden_state"]["relative_l2_error"] > 0.002
    assert (done.code, done.result["overall"], done.result["faithful"]) == (1, "FAIL", False)
    assert {"Hidden: relative L2", "Hidden: worst token"} <= set(done.result["misses"])
    assert "Hidden: relative L2" in done.log.split("Over their bars: ")[1]
    assert done.result["yardsticks"]["last_hidden_state"]["rmse_ratio"] == pytest.approx(
        1, abs=0.3
    )  # beside bfloat16, not float32


def test_an_untrained_pooler_is_marked_and_decides_nothing(evaluate, tmp_path, damage):
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


def test_a_trained_pooler_counts(evaluate, damage):
    damage(lambda model: model.module.pooler.dense.weight.mul_(-1))
    done = evaluate()
    assert (done.code, done.result["pooler_output"]["counts"], done.result["starts_at"]) == (1, True, "pooler")


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


# --- the sweep and the recipe ---


def test_the_sweep_compares_every_arithmetic_and_recommends_the_fastest_within_the_bar(npu, evaluate):
    done = evaluate("--sweep", "--image_path", SAMPLES / "chelsea.jpg", SAMPLES / "coffee.jpg", device="npu")
    rows = {row["arithmetic"]: row for row in done.result["sweep"]}
    strict, left, rounded = "float32, strict", "float32, as torch_npu leaves it", "float32, HF32 allowed"
    assert list(rows)[:6] == [strict, left, rounded, "float16", "bfloat16", "bfloat16 autocast"]
    assert list(rows)[6:] == ["float32, fused norms", "float16, fused norms", "float16, fused MLP"]
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
    assert (torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32) == (False, False)
    assert re.search(r"float16 +\d\.\d\de-0\d +\d\.\d\de-0\d +0\.\d+ +PASS +patch embedding", done.log)


def test_a_rate_is_that_of_the_median_run_without_the_first(tiny, monkeypatch):
    times = iter([9.0, 0.5, 0.25, 1.0])
    monkeypatch.setattr(inference, "time_once", lambda *_given: next(times))
    judged = dict.fromkeys(("overall", "smallest_bar_percent", "faithful")) | {"last_hidden_state": {"relative_l2_error": 0.1}}
    crops = torch.zeros(3, 64, 64, 3, dtype=torch.uint8)
    run = SimpleNamespace(args=SimpleNamespace(batch_size=2), judge=lambda _found: judged, crops=crops)
    row, _ = eval_accuracy.speed_and_error(run, tiny, stages.Arithmetic("float32"))
    assert (row["throughput_img_s"], row["relative_l2_error"]) == (2 / 0.5, 0.1)


def test_the_yardsticks_peer_in_half_precision_has_no_levers(evaluate, monkeypatch):
    asked, outputs_of = {}, eval_accuracy.outputs_of

    def watched(model, arithmetic, crops, size, what):
        asked[what] = model.dtype, model.levers
        return outputs_of(model, arithmetic, crops, size, what)

    monkeypatch.setattr(eval_accuracy, "outputs_of", watched)
    assert evaluate("--dtype", "float16").code == 0
    assert asked["CPU"] == (torch.float16, ("folded_patches", "stacked_qkv"))
    assert asked["The yardsticks' reference"] == (torch.float16, ())


def test_the_recipe_names_the_layers_that_must_stay_in_float32(evaluate):
    flags = ("--dtype", "bfloat16", "--recipe", "--threshold_percent", "1.0")
    done = evaluate(*flags, folder=TRAINED)
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
    done = evaluate("--recipe")
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
    done = evaluate("--recipe", "--dtype", "bfloat16")
    assert done.code == 130
    assert sorted((row["first"], row["last"]) for row in done.result["recipe"]["tried"]) == sorted(tried)


def test_layers_of_a_recipe_that_stay_in_float32_are_float32(evaluate):
    done = evaluate("--dtype", "bfloat16", "--recipe", "--threshold_percent", "0.001", folder=TRAINED)
    tried = {(row["first"], row["last"]): row for row in done.result["recipe"]["tried"]}
    assert tried[6, 0]["smallest_bar_percent"] < 1e-3 and tried[0, 6]["smallest_bar_percent"] < 1e-3
    assert done.result["recipe"]["best"]["overall"] == "PASS"


def test_what_misses_the_bar_is_not_recommended_however_fast():
    rows = [("slow", "PASS", 1.0), ("fast", "PASS", 2.0), ("wrong", "FAIL", 9.0)]
    keys = ("arithmetic", "overall", "throughput_img_s")
    assert eval_accuracy.recommend([dict(zip(keys, row)) for row in rows]) == "fast"
    assert eval_accuracy.recommend([dict(zip(keys, rows[2])), {"arithmetic": "none", "overall": "not available"}]) is None


# --- what is kept, said and refused ---


def test_the_result_carries_the_published_keys_and_its_formulas(evaluate):
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
    done = evaluate("--sweep", "--views", 100, "--probe", 100, folder=TRAINED)
    for row in done.result["sweep"]:
        assert (row["worth"]["views"], row["worth"]["digits"]) == (100, 100)
        assert row["worth"]["task"] in ("kept", "lost")
    exact, half = (row["worth"]["class_token"] for row in done.result["sweep"])
    assert exact["same_nearest_percent"] == exact["same_five_nearest_percent"] == 100.0
    assert 70 <= half["same_nearest_percent"] < 100  # views so easy that nothing moves would tell nothing
    assert half["centred_relative_l2_error"] > done.result["sweep"][1]["class_token_relative_l2_error"]
    assert exact["float32_probe_percent"] > 30  # one in ten by chance
    assert done.result["worth"]["task"] == "kept"
    told = re.search(r"Smallest bar that the relative errors of float32 meet: (.+)%; task: kept", done.log)
    assert float(told[1]) == pytest.approx(done.result["smallest_bar_percent"], rel=0.05) != 0
    for columns, rows_of in TABLES:
        for column in columns:
            assert column.en and column.zh
            assert any(column.cell(row) != "-" for row in rows_of(done.result)), column


def test_the_published_result_fits_the_same_columns():
    published = json.loads((inference.ROOT / "results" / "published" / "accuracy_eval.json").read_text())
    rows = eval_accuracy.output_rows(published)
    cells = [[column.cell(row) for column in eval_accuracy.OUTPUT_COLUMNS[:7]] for row in rows]
    assert cells == [
        ["Pooler", "0.2185", "0.8035", "4.51e-03", "1.10e-03", "0.9999937", "-"],
        ["Hidden", "0.1172", "1.8862", "4.59e-02", "1.86e-03", "0.9999894", "-"],
    ]
    assert [row["verdict"] for row in rows] == ["PASS", "PASS"]
    assert [rows_of(published) for _, rows_of in TABLES[1:]] == [[], [], [], []]


def test_without_scikit_learn_the_probe_says_what_to_install(evaluate, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    done = evaluate("--views", 0, "--probe", 100)
    assert (done.code, done.result["worth"]["task"]) == (0, "not run: pip install scikit-learn")


def test_the_log_has_the_published_lines_in_their_order(npu, evaluate):
    texts = [
        re.sub(r"0\.000\d%|[01]\.[09]{6}\d+$", "~", line.split("] ", 1)[1]) for line in evaluate(device="npu").log.splitlines()
    ]
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


def test_long_steps_say_how_far_they_are(evaluate, monkeypatch):
    monkeypatch.setattr(stages, "PROGRESS_SECONDS", 0.0)
    done = evaluate("--batch_size", 3)
    assert "CPU: batch 2 of 2" in done.log
    assert "float64: batch 3 of 3" in done.log


def test_short_steps_say_nothing_of_batches(evaluate):
    assert ": batch " not in evaluate("--batch_size", 3).log


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (ValueError("broken"), 70), (inference.UsageError("full"), 2)]
)
def test_whatever_ends_a_run_what_was_measured_is_kept(evaluate, monkeypatch, error, code):
    def end(*_arguments):
        raise error

    monkeypatch.setattr(eval_accuracy, "recommend", lambda rows: end() if len(rows) == 2 else None)
    done = evaluate("--sweep")
    assert done.code == code
    partial = done.folder / "accuracy_eval_partial_cpu.json"
    kept = json.loads(partial.read_text())
    assert kept["partial"] is True and kept["overall"] == "PASS"
    assert [row["arithmetic"] for row in kept["sweep"]] == ["float32, strict"]
    assert not (done.folder / "accuracy_eval_cpu.json").exists()
    assert str(partial) in done.terminal.strip().splitlines()[-1]


def test_a_run_that_ends_well_leaves_no_partial_result(evaluate):
    done = evaluate()
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


def test_a_blocked_device_overwrites_no_result(evaluate, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    older = tmp_path / "results" / "accuracy_eval_cuda.json"
    inference.write_json(older, {"device": "cuda", "overall": "PASS"})
    done = evaluate(device="cuda")
    assert (done.code, done.result) == (3, {"device": "cuda", "overall": "PASS"})
    assert [path.name for path in done.folder.iterdir()] == [older.name]
    assert "BLOCKED: this torch" in done.terminal
    assert "BLOCKED" in done.log


def test_a_reference_that_cannot_be_had_is_blocked_too(evaluate):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert evaluate("--reference", "cuda").code == 3
