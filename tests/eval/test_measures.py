"""The metrics, verdicts and yardsticks of eval_accuracy.py, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

import measures
from measures import judge, metrics, relative_l2, token_errors


def whole(*rows: list[float]) -> np.ndarray:
    """One image's tokens as [1, T, D]."""
    return np.array([rows])


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
