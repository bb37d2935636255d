"""What a user waits for: a cold start, and a folder of photos through each way."""

from __future__ import annotations

from pathlib import Path

import inference
import numpy as np
import pytest
import torch
from PIL import Image

import end_to_end
from bulk.decoding import Decoder
from bulk.encoder import Encoder
from conftest import SAMPLES


def test_hours_follow_from_the_best_rates():
    folder = {"rows": [{"what": "this bundle", "images_per_s": 500.0}, {"what": "transformers loop", "images_per_s": 900.0}]}
    sizes = [{"batch_size": size, "throughput_img_s": rate} for size, rate in ((1, 90.0), (8, 1000.0), (64, 800.0))]
    whole, bulk = end_to_end.scale_rows({"results": sizes, "end_to_end": {"folder": folder}})
    assert whole["what"] == "forward pass, batch 8"
    assert (whole["million_h"], whole["billion_8_h"]) == pytest.approx((1000 / 3600, 125_000 / 3600))
    assert (bulk["images_per_s"], bulk["billion_64_h"]) == pytest.approx((500.0, 1e9 / 64 / 500 / 3600))


def test_photos_are_made_in_the_sizes_asked_for(tmp_path):
    mean = end_to_end.make_photos(tmp_path, 8, (0.01, 0.04))
    sizes = [Image.open(path).size for path in sorted(tmp_path.iterdir())]
    megapixels = [width * height / 1e6 for width, height in sizes]
    assert len(sizes) == 8
    assert 0.0095 < min(megapixels) < max(megapixels) < 0.0405
    assert np.mean(megapixels) == pytest.approx(mean, rel=0.02)
    assert len({round(width / height, 1) for width, height in sizes}) > 2


@pytest.fixture
def fixed_ways(monkeypatch):
    """Three ways with fixed costs, in seconds, and rates, in images a second; counts what each was given."""
    costs = {"this bundle": (2.0, 1000.0), "slow loop": (0.1, 2.0), "fast loop": (1.0, 4000.0)}
    given = {what: [] for what in costs}

    def quietly(device, way, share):
        given[way].append(len(share))
        fixed, rate = costs[way]
        return fixed + len(share) / rate

    monkeypatch.setattr(end_to_end, "quietly", quietly)
    return {what: what for what in costs}, given


def test_a_turn_is_long_enough_for_fixed_costs_to_be_small(fixed_ways):
    ways, given = fixed_ways
    bundle, slow, fast = end_to_end.measure_folder(None, ways, list("abcdefghij"), 2, None)
    assert all(0 < row["fixed_percent"] <= 5.1 for row in (bundle, slow, fast))
    assert bundle["images_per_s"] == pytest.approx(1000, rel=0.06)
    assert fast["images_per_s"] == pytest.approx(4000, rel=0.06)
    assert bundle["images_per_turn"] == given["this bundle"][-1] >= 40_000
    assert slow["images_per_turn"] < 200  # a slow way is not made to take as many
    assert slow["ratio_to_this_bundle"] == pytest.approx(slow["images_per_s"] / bundle["images_per_s"])
    assert [len(row["images_per_s_by_turn"]) for row in (bundle, slow, fast)] == [2, 2, 2]


def test_where_fixed_costs_are_not_small_that_is_said_and_nothing_subtracted(fixed_ways, caplog, monkeypatch):
    rows = end_to_end.measure_folder(None, fixed_ways[0], list("abcdefghij"), 2, 0.001)
    bundle = rows[0]
    assert bundle["fixed_percent"] > 90
    assert bundle["images_per_s"] == pytest.approx(5 / (2 + 5 / 1000))
    found = {"folder": {"images": 10, "megapixels_mean": 1.0, "rows": rows}}
    monkeypatch.setattr(inference.log, "propagate", True)
    end_to_end.log_end_to_end({"results": [], "end_to_end": found})
    assert "Fixed costs are 100% of this bundle's turns, and nothing is subtracted" in caplog.text


def test_a_cold_start_is_that_of_a_process_of_its_own(tiny, tiny_folder):
    ballast = np.ones(2**28)  # 2 GiB: the memory of a cold start is its own, not that of the process which starts it
    cold = end_to_end.measure_cold_start(tiny, tiny_folder, 1)
    assert cold["total_s"] == pytest.approx(cold["import_s"] + cold["load_s"] + cold["first_image_s"])
    assert min(cold.values()) > 0
    assert 100 < cold["peak_memory_mb"] < 2000
    assert ballast.sum() > 0


END_TO_END = ("--batch_sizes", 1, "--end_to_end", 3, "--megapixels", 0.01, 0.05, "--turn_seconds", 0.001)


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_end_to_end_takes_photos_through_each_way(npu, quick_npu, monkeypatch, measure, device):
    monkeypatch.setattr(end_to_end, "measure_cold_start", lambda model, checkpoint, rounds: {"total_s": 1.5})
    done = measure(*END_TO_END, device=device)
    assert done.code == 0, done.terminal
    folder = done.result["end_to_end"]["folder"]
    rates = {row["what"]: row["images_per_s"] for row in folder["rows"]}
    ways = ("this bundle", "transformers loop", "image-feature-extraction pipeline", "decoding alone", "computing alone")
    assert tuple(rates) == ways
    for row in folder["rows"]:
        assert row["ratio_to_this_bundle"] == pytest.approx(rates[row["what"]] / rates["this bundle"])
    assert (folder["images"], done.result["end_to_end"]["cold_start"]) == (3, {"total_s": 1.5})
    assert "=== End to end ===" in done.log


def test_a_failed_cold_start_keeps_what_was_measured(monkeypatch, no_peers, measure):
    monkeypatch.setattr(end_to_end, "COLD_START", "print('noise'); raise SystemExit('no room')")
    done = measure(*END_TO_END)
    assert done.code == 2
    last = done.terminal.splitlines()[-1]
    assert last.startswith("error: the cold start failed (exit code 1: no room); what was measured so far is in ")
    assert len(done.result["results"]) == 1


def tiny_plain(cpu, tiny):
    return inference.load_model(cpu, tiny.weights.path)


def test_the_bundles_way_saves_a_row_for_each_photo(monkeypatch, cpu, tiny, tmp_path):
    made = []
    real = end_to_end.embed.embed

    def embed_and_look(args, *given):
        code = real(args, *given)
        made.extend(np.load(path)["path"].tolist() for path in sorted(Path(args.output).glob("part-*.npz")))
        return code

    monkeypatch.setattr(end_to_end.embed, "embed", embed_and_look)
    ways = end_to_end.ways_through(tiny, tiny_plain(cpu, tiny), "eager", tmp_path)
    photos = sorted(str(path) for path in SAMPLES.glob("*.jpg")) * 3
    end_to_end.quietly(cpu, ways["this bundle"], photos)
    assert made == [photos]
    assert list(tmp_path.iterdir()) == []


def test_the_bundles_halves_alone_take_each_photo_once(monkeypatch, cpu, tiny, tmp_path):
    computed, decoded = [], []
    submit, decode = Encoder.submit, Decoder.decode
    monkeypatch.setattr(Encoder, "submit", lambda self, crops: computed.append(len(crops)) or submit(self, crops))
    monkeypatch.setattr(
        Decoder, "decode", lambda *given: (decoded.append(len(batch.rows)) or batch for batch in decode(*given))
    )
    ways = end_to_end.ways_through(tiny, tiny_plain(cpu, tiny), "eager", tmp_path)
    photos = sorted(str(path) for path in SAMPLES.glob("*.jpg")) * 3
    end_to_end.quietly(cpu, ways["decoding alone"], photos)
    assert (sum(decoded), max(decoded), computed) == (len(photos), 8, [])
    end_to_end.quietly(cpu, ways["computing alone"], photos)
    assert (sum(computed), max(computed), sum(decoded)) == (len(photos), 8, len(photos))


def test_a_cold_start_loads_float32_as_the_real_checkpoint_is(monkeypatch, measure, no_peers):
    from safetensors.torch import load_file

    found = []

    def look(_model, checkpoint, _rounds):
        found.extend({values.dtype for values in load_file(checkpoint / "model.safetensors").values()})
        raise KeyboardInterrupt

    monkeypatch.setattr(end_to_end, "measure_cold_start", look)
    assert measure(*END_TO_END, "--dtype", "bfloat16").code == 130
    assert found == [torch.float32]
