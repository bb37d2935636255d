"""README and pictures say what the files say, all of it, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import eval_accuracy
import evidence
import inference
import numpy as np
import pytest
from conftest import ROOT, SAMPLES, save_checkpoint, script_environment, tiny_model
from PIL import Image

HASH = "0123456789abcdef" * 4
REASON = "torch_npu sees no NPU (ASCEND_RT_VISIBLE_DEVICES=). Check the driver with npu-smi info"
STAGES = ["pixels", "patch embedding", "layer 0", "layer 1", "final norm"]


# --- results as the scripts write them ---


def provenance(**changes: Any) -> dict[str, Any]:
    return {
        "device": "cpu",
        "device_name": "Some CPU, 2 threads",
        "dtype": "float32",
        "time_utc": "2026-05-15T04:33:04+00:00",
        "git_commit": "a1b2c3d4" * 5,
        "git_dirty": False,
        "allow_hf32": False,
        "pooler": "trained",
        "weights": {"source": "checkpoint", "path": "weights/w", "sha256": {"model.safetensors": HASH}},
        **changes,
    }


def inference_result(**changes: Any) -> dict[str, Any]:
    colours = [np.full((4, 4, 3), 40 * place, np.uint8).tobytes().hex() for place in range(2)]
    return provenance(
        image_size=64,
        image_path=["assets/samples/a.png", "assets/samples/b.png"],
        last_hidden_shape=[2, 17, 128],
        pooler_norm=6.25,
        hidden_mean_norm=17.0625,
        inference_time_s=0.0125,
        throughput_img_s=160.0,
        batch_size=2,
        pca={"explained_variance_percent": 65.92, "colours_hex": colours},
        **changes,
    )


def stages(last: float) -> list[dict[str, Any]]:
    return [{"stage": name, "relative_l2_error": last * place / len(STAGES)} for place, name in enumerate(STAGES)]


def output(relative_l2: float = 1.234e-7, **changes: Any) -> dict[str, Any]:
    return {
        "relative_error": {"filtered_mean_relative_error": 0.0012345},
        "cosine_similarity": 0.99999,
        **dict.fromkeys(("mre_pass", "cosine_pass", "l2_pass", "worst_token_pass"), True),
        "relative_l2_error": relative_l2,
        "worst_token_relative_l2_error": 5.678e-6,
        "counts": True,
        **changes,
    }


def sweep_row(arithmetic: str, error: float, **changes: Any) -> dict[str, Any]:
    errors = {f"{key}relative_l2_error": error for key in ("", "worst_token_", "class_token_")}
    row = {"arithmetic": arithmetic, "overall": "PASS", "faithful": False, "stages": stages(error), **errors}
    return {**row, "throughput_img_s": 12.5, "batch_size": 8, **changes}


def accuracy_result(**changes: Any) -> dict[str, Any]:
    golden = {"device_relative_l2_error": 2e-7, "reference_relative_l2_error": 1.6e-7, "device_to_reference_ratio": 1.25}
    found = {
        **{name: output() for name in eval_accuracy.OUTPUTS},
        "overall": "PASS",
        "faithful": True,
        "golden": {"last_hidden_state": golden},
        "stages": stages(1.2e-7),
        "starts_at": None,
        "sweep": [sweep_row("float32", 1.2e-7), sweep_row("float16", 4.4e-4)],
        "recommended": "float16",
        "reference": {"device": "cpu", "dtype": "float32"},
        "threshold_percent": 1.0,
    }
    return provenance(**found | changes)


def performance_row(batch_size: int, rate: float) -> dict[str, Any]:
    time = batch_size / rate
    times = {"mean_time_s": time, "p50_s": time, "p95_s": 1.1 * time, "throughput_img_s": rate}
    return {
        "batch_size": batch_size,
        **times,
        "peak_resident_memory_mb": 900.4,
        "unsteady": False,
        "share_of_limit_percent": 62.5,
    }


def performance_result(**changes: Any) -> dict[str, Any]:
    peer = {
        "peer": "transformers",
        "batch_size": 1,
        "median_time_s": 0.5,
        "throughput_img_s": 2.0,
        "bundle_throughput_img_s": 2.125,
        "speed_ratio": 1.0625,
        "rounds": 3,
    }
    folder_row = {"what": "this bundle", "images_per_s": 10.0, "ratio_to_this_bundle": 1.0}
    cold = dict.fromkeys(("import_s", "load_s", "first_image_s", "total_s", "bare_minimum_s", "ratio_to_bare"), 1.5)
    found = {
        "image_size": 224,
        "warmup": 3,
        "num_runs": 10,
        "results": [performance_row(1, 2.125), performance_row(4, 4.25)],
        "limit": {"limit_img_s": 6.8, "matmul_tflops": 0.835, "copy_gb_s": 22.3},
        "peers": [peer, {"peer": "openvino", "unavailable": "ModuleNotFoundError: No module named 'openvino'"}],
        "end_to_end": {
            "cold_start": {**cold, "peak_memory_mb": 1500.0, "bare_peak_memory_mb": 1400.0},
            "folder": {"images": 500, "megapixels_mean": 2.9, "batch_size": 8, "num_workers": 2, "rows": [folder_row]},
            "preprocessing": {"ratio_to_library": 1.75},
        },
    }
    return provenance(**found | changes)


RESULTS = {"inference": inference_result, "accuracy_eval": accuracy_result, "performance_eval": performance_result}
ENVIRONMENT = {
    **{"os": "Linux", "architecture": "x86_64", "cpu": "Some CPU", "cpu_cores": 2, "memory_gb": 23.5, "gpu": None},
    **{"npu_model": None, "npu_count": None, "npu_status": "available", "npu_blocked_reason": None, "advice": []},
    **{f"{name}_version": "1.2.3" for name in ("cann", "python", "torch", "torch_npu", "transformers", "numpy")},
    **{"time_utc": "2026-05-15T04:33:04+00:00", "git_commit": HASH[:40], "git_dirty": True},
}


# --- a bundle to try it on ---


def skeleton(names: Any = evidence.TABLES) -> str:
    return "# A model\n" + "".join(f"\nText.\n\n<!-- evidence:{name} -->\n<!-- /evidence:{name} -->\n" for name in names)


@pytest.fixture
def bundle(tmp_path, monkeypatch) -> Path:
    """A bundle without results: README skeletons, two photos, the published run."""
    root = tmp_path / "bundle"
    (root / "assets" / "samples").mkdir(parents=True)
    for place, name in enumerate("ab"):
        Image.new("RGB", (64, 64), (60 * place, 90, 120)).save(root / "assets" / "samples" / f"{name}.png")
    for folder in ("results", "logs"):
        shutil.copytree(ROOT / folder / "published", root / folder / "published")
    for name in evidence.READMES:
        (root / name).write_text(skeleton())
    monkeypatch.setattr(inference, "ROOT", root)
    return root


def save(root: Path, name: str, kind: str = "cpu", **changes: Any) -> Path:
    """Write a result of a kind of device; returns its path."""
    path = root / "results" / f"{inference.result_name(name, kind)}.json"
    path.write_text(json.dumps(RESULTS[name](device=kind, **changes)))
    return path


def save_all(root: Path) -> None:
    for name in RESULTS:
        save(root, name)
    (root / "results" / "env_info.json").write_text(json.dumps(ENVIRONMENT))


@pytest.fixture
def run(bundle, capsys) -> Callable[..., SimpleNamespace]:
    """Run evidence.py in this process: exit code and what it printed."""

    def run_main(*arguments: str) -> SimpleNamespace:
        code = evidence.main(arguments)
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out.splitlines(), err=printed.err)

    return run_main


def lines_of(root: Path, name: str, allow_simulated: bool = False) -> list[str]:
    return evidence.TABLES[name](evidence.read_evidence(root, allow_simulated))


def rows_of(root: Path, name: str, device: str) -> list[list[str]]:
    """Cells of a table's rows of a device, without the device."""
    rows = [line.strip("| ").split(" | ") for line in lines_of(root, name) if line.startswith("| ")]
    return [row[1:] for row in rows if row[0] == device]


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(
        ["git", "-C", str(root), *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


# --- what the tables say ---


def test_the_figures_are_those_of_the_files(bundle):
    save_all(bundle)
    assert rows_of(bundle, "inference", "CPU") == [["2", "2 x 17 x 128", "2", "17.0625", "6.2500", "12.50", "160.00", "65.9"]]
    hidden = ["Hidden", "1.23e-07", "5.68e-06", "0.123450%", "0.999990000", "PASS"]
    judged = ["PASS", "CPU, float32", "yes", "2.00e-07", "1.60e-07", "1.25", "nowhere above rounding", "-", "-"]
    assert hidden in rows_of(bundle, "accuracy", "CPU") and judged in rows_of(bundle, "accuracy", "CPU")
    assert rows_of(bundle, "sweep", "CPU")[1] == [
        *("float16", "4.40e-04", "4.40e-04", "4.40e-04", "12.50 (batch 8)", "PASS", "**fastest within the bar**")
    ]
    speed = rows_of(bundle, "performance", "CPU")
    assert speed[1] == ["4", "941.18", "1035.29", "4.25", "-", "900", "-", "62.5", "yes"]
    assert speed[2][:3] == ["6.80", "0.83", "22.30"]
    peers = rows_of(bundle, "peers", "CPU")
    assert peers[0] == ["transformers", "1", "2.00", "2.12", "1.062", "3"]
    assert peers[1][:2] == ["openvino", "not measured: ModuleNotFoundError: No module named 'openvino'"]
    assert rows_of(bundle, "end_to_end", "CPU")[1] == [
        "this bundle",
        "10.00",
        "1.000",
        "500 of 2.9 megapixels",
        "batch 8, 2 workers",
    ]
    assert rows_of(bundle, "scale", "CPU")[1] == ["folder of photos to features", "10.00", "27.8", "3,472", "434"]
    assert "| NPU | none found |" in lines_of(bundle, "environment")


def test_limit_and_peers_are_drawn_by_their_ratio_to_this_bundle(bundle):
    """Their own rates were measured at another time, when a shared machine may have been faster or slower."""
    save_all(bundle)
    figure = evidence.Figure()
    source = evidence.read_evidence(bundle).results["performance_eval"]["cpu"]
    rates, times = figure.subplots(1, 2)
    evidence.draw_throughput(rates, source, None)
    evidence.draw_latency(times, source, None)
    drawn = {line.get_label(): list(line.get_ydata()) for line in rates.lines}
    assert drawn["this bundle"] == [2.125, 4.25]
    assert drawn["transformers"] == pytest.approx([2.125 / 1.0625])
    assert drawn["limit: matrix\nproducts alone"] == pytest.approx([2.125 / 0.625, 4.25 / 0.625])
    assert list(times.lines[-1].get_ydata()) == pytest.approx([1e3 / 2.125 * 1.0625])


def test_each_table_names_file_device_dtype_weights_date_and_commit(bundle):
    save_all(bundle)
    wanted = (
        "- [results/{0}](results/{0}): CPU, Some CPU, 2 threads, float32, checkpoint weights/w, "
        "sha256 model.safetensors 0123456789ab, 2026-05-15 04:33 UTC, commit a1b2c3d"
    )
    sources = {"inference": "inference", "accuracy": "accuracy_eval", "sweep": "accuracy_eval"}
    sources |= dict.fromkeys(("performance", "peers", "end_to_end", "scale"), "performance_eval")
    for name, result in sources.items():
        assert lines_of(bundle, name)[0] == wanted.format(f"{result}_cpu.json")
    assert lines_of(bundle, "environment")[0].endswith("2026-05-15 04:33 UTC, commit 0123456 (dirty)")


def test_random_weights_are_said_in_bold(bundle):
    save(bundle, "performance_eval", weights={"source": "random", "note": "", "seed": 0})
    assert ", **random weights**, " in lines_of(bundle, "performance")[0]
    result = evidence.read_evidence(bundle).results["performance_eval"]["cpu"]
    assert evidence.describe_run(result).endswith("float32, random weights")


def test_devices_stand_in_one_table_the_npu_first(bundle):
    for kind in ("cpu", "cuda", "npu"):
        save(bundle, "performance_eval", kind)
    rows = [line.split(" | ")[0] for line in lines_of(bundle, "performance")]
    assert [row for row in rows if row in ("| NPU", "| GPU", "| CPU")][:6] == [
        "| NPU",
        "| NPU",
        "| GPU",
        "| GPU",
        "| CPU",
        "| CPU",
    ]


@pytest.mark.parametrize("name", ["inference", "accuracy", "sweep", "performance", "peers", "end_to_end", "scale"])
def test_what_is_missing_is_not_measured(bundle, name):
    for device in ("NPU", "GPU", "CPU"):
        assert [row[0] for row in rows_of(bundle, name, device)] == ["not measured"]
    assert not any("|  |" in line for line in lines_of(bundle, name))


def test_a_result_without_its_optional_parts_says_not_measured(bundle):
    save(bundle, "accuracy_eval", sweep=None, recommended=None)
    save(bundle, "performance_eval", limit=None, peers=None, end_to_end=None)
    for name in ("sweep", "peers", "end_to_end"):
        assert rows_of(bundle, name, "CPU")[0][0] == "not measured"
    assert rows_of(bundle, "performance", "CPU")[2][0] == "not measured"


def test_the_last_line_of_a_log_says_why_the_npu_is_blocked(bundle):
    log = bundle / "logs" / "inference.log"
    log.write_text(f"2026-05-15 04:33:04,368 [INFO] text\n2026-05-15 04:33:04,368 [ERROR] BLOCKED: {REASON}\n")
    (bundle / "results" / "env_info.json").write_text(
        json.dumps(ENVIRONMENT | {"npu_status": "blocked", "npu_blocked_reason": "CANN is not set up"})
    )
    short = "BLOCKED: torch_npu sees no NPU (ASCEND_RT_VISIBLE_DEVICES=)"
    assert rows_of(bundle, "inference", "NPU")[0][0] == f"{short} ([inference.log](logs/inference.log))"
    assert rows_of(bundle, "accuracy", "NPU")[0][0].startswith("BLOCKED: CANN is not set up ([env_info.json]")
    deliverables = lines_of(bundle, "deliverables")
    assert f"| results/inference.json | {short} |" in deliverables
    assert "| results/accuracy_eval.json | BLOCKED: CANN is not set up |" in deliverables
    log.write_text(log.read_text() + "2026-05-15 05:00:00,000 [INFO] another run\n")
    assert rows_of(bundle, "inference", "NPU")[0][0].startswith("BLOCKED: CANN is not set up")


def test_a_result_of_the_npu_counts_more_than_a_later_blocked_run(bundle):
    save(bundle, "inference", "npu")
    (bundle / "logs" / "inference.log").write_text(f"2026-05-15 04:33:04,368 [ERROR] BLOCKED: {REASON}\n")
    assert rows_of(bundle, "inference", "NPU")[0][0] == "2"
    assert "| results/inference.json | present |" in lines_of(bundle, "deliverables")


def test_an_untrained_pooler_is_marked(bundle):
    save(bundle, "accuracy_eval", pooler="missing", pooler_output=output(counts=False))
    save(bundle, "inference", pooler="untrained")
    assert rows_of(bundle, "accuracy", "CPU")[0][-1] == "PASS, does not count: the pooler is missing"
    assert rows_of(bundle, "inference", "CPU")[0][4] == "6.2500 (untrained: means nothing)"


def test_what_failed_is_told(bundle):
    save(bundle, "accuracy_eval", class_token=output(None, l2_pass=False), starts_at="layer 1", overall="FAIL", faithful=False)
    rows = rows_of(bundle, "accuracy", "CPU")
    assert rows[2][1] == "not finite" and rows[2][-1] == "FAIL"
    assert rows[4][:3] == ["FAIL", "CPU, float32", "**no**"] and rows[4][6] == "layer 1"
    short = {"batch_size": 64, "image_size": 224, "out_of_memory": True, "reason": "tried | [3 GiB]"}
    save(bundle, "performance_eval", results=[performance_row(1, 2.0), short])
    assert "| CPU | 64 | out of memory: tried \\| \\[3 GiB\\] | - |" in "".join(lines_of(bundle, "performance"))


def test_the_sweep_names_each_bar_that_is_missed_once(bundle):
    misses = ["Hidden: relative L2", "Hidden: worst token", "Class token: relative L2"]
    save(bundle, "accuracy_eval", sweep=[sweep_row("bfloat16", 1.3e-2, overall="FAIL", misses=misses)], recommended=None)
    assert rows_of(bundle, "sweep", "CPU")[0][-2:] == ["FAIL (relative L2, worst token)", "no"]


def test_what_an_interrupted_run_left_says_that_it_is_partial(bundle):
    whole = save(bundle, "performance_eval", partial=True)
    whole.rename(whole.with_name("performance_eval_partial_cpu.json"))
    line = lines_of(bundle, "performance")[0]
    assert "performance_eval_partial_cpu.json" in line and "**partial: the run was interrupted**" in line
    save(bundle, "performance_eval", partial=False)
    assert "partial" not in lines_of(bundle, "performance")[0]


def test_the_published_run_is_told_apart_and_its_percent_is_right(bundle):
    lines = lines_of(bundle, "published")
    assert lines[0].startswith("**Not produced by this code:**")
    file = "[results/published/accuracy_eval.json](results/published/accuracy_eval.json)"
    for what, figure in (
        ("Hidden, filtered MRE", "0.117%"),
        ("Hidden, unfiltered mean", "1.886%"),
        ("Pooler, filtered MRE", "0.218%"),
    ):
        assert f"| {what} | {figure} | {file} |" in lines
    assert any(line.startswith("| Batch 8 | 332.75 images/s, median 24.04 ms") for line in lines)
    assert "- [results/published/inference.json](results/published/inference.json): NPU, Ascend910_9362, float32" in "\n".join(
        lines
    )


def test_the_bar_of_faithful_float32_is_that_of_the_evaluation():
    assert evidence.FAITHFUL == eval_accuracy.FAITHFUL
    assert list(evidence.LABELS) == list(eval_accuracy.OUTPUTS)


# --- what is refused ---


@pytest.mark.parametrize("place", ["result", "environment", "reference"])
def test_results_of_the_simulator_are_refused(run, bundle, place):
    simulated = "simulated NPU (CPU)"
    name = "accuracy_eval.json"
    if place == "result":
        save(bundle, "accuracy_eval", "npu", device_name=simulated)
    elif place == "reference":
        save(bundle, "accuracy_eval", "npu", reference={"device": "npu", "dtype": "float32", "device_name": simulated})
    else:
        name = "env_info.json"
        (bundle / "results" / name).write_text(json.dumps(ENVIRONMENT | {"npu_model": simulated}))
    before = content(bundle)
    for arguments in ([], ["--check"]):
        done = run(*arguments)
        assert done.code == 2 and done.err.startswith(f"error: results/{name}: made on the simulated NPU")
        assert done.err.count("\n") == 1
    assert content(bundle) == before
    assert "SIMULATED" in "".join(lines_of(bundle, "environment" if place == "environment" else "accuracy", True))


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"device": "cpu"',
        "[]",
        json.dumps(accuracy_result(starts_at=float("nan"))),
        json.dumps(accuracy_result(device="npu")),
        '{"device": "cpu"}',
        "\xff",
    ],
    ids=["empty", "cut off", "a list", "not a number", "another device", "hardly anything", "not text"],
)
def test_a_malformed_result_is_one_line_that_names_it(run, bundle, text):
    (bundle / "results" / "accuracy_eval_cpu.json").write_bytes(text.encode("latin-1"))
    before = content(bundle)
    done = run("--check")
    assert done.code == 2 and done.err.startswith("error: results/accuracy_eval_cpu.json: "), done.err
    assert done.err.count("\n") == 1 and done.out == []
    assert run().code == 2 and content(bundle) == before


@pytest.mark.parametrize(
    "change", [{"throughput_img_s": "fast"}, {"last_hidden_shape": 5}, {"weights": "some"}, {"time_utc": 5}]
)
def test_a_value_of_a_wrong_type_is_one_line_that_names_the_file(run, bundle, change):
    path = save(bundle, "inference")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    done = run("--check")
    assert done.code == 2 and done.err.startswith("error: results/inference_cpu.json: ") and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (skeleton() + "<!-- evidence:speed -->\n", 52, "is not known"),
        (skeleton() + "<!-- evidence:peers -->\n<!-- /evidence:peers -->\n", 52, "stands there twice"),
        (skeleton().replace("<!-- /evidence:environment -->\n", ""), 9, "does not pair"),
        (skeleton().replace("<!-- evidence:environment -->\n", ""), 5, "does not pair"),
        (skeleton(["peers"]).replace("<!-- /evidence:peers -->\n", ""), 5, "never closed"),
    ],
    ids=["unknown", "repeated", "not closed", "not opened", "not closed at the end"],
)
def test_a_marker_out_of_place_is_an_error_with_its_line(run, bundle, text, line, what):
    (bundle / "README.zh.md").write_text(text)
    if shutil.which("git"):
        git(bundle, "init", "-q")
        git(bundle, "commit", "-q", "--allow-empty", "-m", "first")
    before = content(bundle)
    for arguments in ([], ["--check"]):
        done = run(*arguments)
        assert done.code == 2 and done.err.startswith(f"error: README.zh.md:{line}: ") and what in done.err, done.err
    assert content(bundle) == before


def test_a_photo_that_is_gone_is_an_error(run, bundle):
    save(bundle, "inference")
    (bundle / "assets" / "samples" / "b.png").unlink()
    done = run()
    assert done.code == 2 and done.err.startswith("error: results/inference_cpu.json: assets/samples/b.png"), done.err


# --- writing and checking ---


@pytest.fixture
def written(run, bundle) -> Path:
    """A bundle with results, tables and pictures."""
    save_all(bundle)
    done = run()
    assert done.code == 0, done.err
    return bundle


def test_what_was_written_passes_and_a_second_run_changes_nothing(run, written):
    before = content(written)
    assert run("--check").code == 0
    assert run().out == ["Nothing has changed"]
    assert content(written) == before
    english, chinese = (before[name].decode() for name in evidence.READMES)
    assert english == chinese
    assert all(f"<!-- evidence:{name} -->\n\n" in english for name in evidence.TABLES)
    assert english.startswith("# A model\n\nText.\n\n<!--") and english.count("\nText.\n") == len(evidence.TABLES)


def test_pictures_are_wide_carry_their_digest_and_are_the_same_again(written):
    found = evidence.read_evidence(written)
    for name, draw in evidence.PICTURES.items():
        path = written / "assets" / name
        digest = evidence.picture_digest(name, found)
        with Image.open(path) as picture:
            assert picture.width == 1500 and 100 < picture.height < 2500
            assert picture.info["Source-SHA256"] == digest
        assert evidence.to_png(draw(found), digest) == path.read_bytes()


def test_a_figure_edited_by_hand_is_found_with_its_line(run, written):
    path = written / "README.zh.md"
    lines = path.read_text().split("\n")
    place = next(place for place, line in enumerate(lines) if "160.00" in line)
    lines[place] = lines[place].replace("160.00", "460.00")
    path.write_text("\n".join(lines))
    done = run("--check")
    assert done.code == 1 and len(done.out) == 1
    assert done.out[0].startswith(f"README.zh.md:{place + 1}: table inference has ") and "460.00" in done.out[0]
    assert done.out[0].endswith("; run: python eval/evidence.py")
    assert run().out == ["Written: README.zh.md"] and run("--check").code == 0


@pytest.mark.parametrize("edit", ["a line more", "a line less", "all gone"])
def test_lines_that_come_or_go_are_drift(written, edit):
    text = (written / "README.md").read_text()
    row = "| torch | 1.2.3 |\n"
    block = text.split("<!-- evidence:peers -->\n")[1].split("<!-- /evidence:peers")[0]
    old, new = {"a line more": (row, row + row), "a line less": (row, ""), "all gone": (block, "")}[edit]
    found = evidence.read_evidence(written)
    tables = {name: make(found) for name, make in evidence.TABLES.items()}
    assert evidence.readme_drift(text, "README.md", tables) == []
    drift = evidence.readme_drift(text.replace(old, new), "README.md", tables)
    assert len(drift) == 1 and re.match(r"README\.md:\d+: table (environment|peers) has ", drift[0])


def test_a_result_that_changed_is_found_in_tables_and_picture(run, written):
    path = written / "results" / "inference_cpu.json"
    path.write_text(path.read_text().replace("17.0625", "17.5"))
    done = run("--check")
    assert done.code == 1
    assert [re.match(r"([\w./]+:\d+): ", line)[1].rpartition(":")[0] for line in done.out] == [
        *evidence.READMES,
        "assets/inference_result.png",
    ]
    line = int(done.out[0].split(":")[1])
    assert "17.0625" in (written / "README.md").read_text().split("\n")[line - 1]
    assert run().out == ["Written: assets/inference_result.png", "Written: README.md", "Written: README.zh.md"]
    assert run("--check").code == 0


@pytest.mark.parametrize("what", ["no digest", "another digest", "not a picture", "gone"])
def test_a_picture_that_was_replaced_is_found(run, written, what):
    path = written / "assets" / "env_check.png"
    if what == "gone":
        path.unlink()
    elif what == "not a picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    elif what == "no digest":
        Image.new("RGB", (1500, 300)).save(path)
    else:
        path.write_bytes(evidence.to_png(Image.new("RGB", (1500, 300)), HASH))
    done = run("--check")
    assert done.code == 1 and len(done.out) == 1
    assert re.fullmatch(r"assets/env_check\.png:1: the picture .*; run: python eval/evidence\.py", done.out[0])


def test_another_photo_under_the_same_name_is_found(run, written):
    Image.new("RGB", (64, 64), "red").save(written / "assets" / "samples" / "a.png")
    done = run("--check")
    assert done.code == 1 and done.out[0].startswith("assets/inference_result.png:1: ")


def test_a_table_that_a_readme_lacks_is_found(run, written):
    path = written / "README.md"
    path.write_text(re.sub(r"<!-- evidence:peers.*?/evidence:peers -->\n", "", path.read_text(), flags=re.DOTALL))
    done = run("--check")
    assert done.code == 1 and len(done.out) == 1 and "no marker <!-- evidence:peers -->" in done.out[0]
    assert run().out[0] == "README.md has no marker for: peers"


def test_without_results_the_pictures_say_what_to_run(run, bundle):
    assert run().code == 0
    assert run("--check").code == 0
    assert len(list((bundle / "assets").glob("*.png"))) == 5
    found = evidence.read_evidence(bundle)
    assert "    python eval/eval_accuracy.py --device npu --sweep" in evidence.missing_lines(found, "accuracy_eval")
    assert "| assets/accuracy_eval_result.png | present, says: not measured |" in lines_of(bundle, "deliverables")


def test_a_picture_changes_when_a_device_turns_out_to_be_blocked(bundle):
    before = evidence.picture_digest("accuracy_eval_result.png", evidence.read_evidence(bundle))
    (bundle / "logs" / "accuracy_eval.log").write_text(f"2026-05-15 04:33:04,368 [ERROR] BLOCKED: {REASON}\n")
    assert evidence.picture_digest("accuracy_eval_result.png", evidence.read_evidence(bundle)) != before


def test_the_published_points_are_on_an_npu_chart_only(bundle, monkeypatch):
    beside = {}

    def draw_speed(source: evidence.Source, published: dict[str, Any] | None) -> Image.Image:
        beside[source.kind] = published
        return Image.new("RGB", (1500, 10))

    monkeypatch.setattr(evidence, "draw_speed", draw_speed)
    save(bundle, "performance_eval")
    assert "published" not in str(evidence.chart_sources("performance_eval", evidence.read_evidence(bundle)))
    save(bundle, "performance_eval", "npu")
    found = evidence.read_evidence(bundle)
    evidence.draw_performance(found)
    assert beside["cpu"] is None and beside["npu"]["results"][3]["batch_size"] == 8
    assert "results/published/performance_eval.json" in str(evidence.chart_sources("performance_eval", found))


def test_an_error_that_is_no_number_and_one_that_is_zero_can_be_drawn(bundle):
    assert [evidence.on_log_scale(error) for error in (0.0, 1e-12, 1e-3)] == [1e-9, 1e-9, 1e-3]
    assert np.isnan(evidence.on_log_scale(None))
    broken = stages(1.0)
    broken[3]["relative_l2_error"] = None
    save(bundle, "accuracy_eval", stages=stages(0.0), sweep=[sweep_row("float16", 1.0, stages=broken)])
    assert evidence.draw_accuracy(evidence.read_evidence(bundle)).width == 1500


# --- what is submitted ---


def test_commit_and_files_are_recorded_and_hold_after_the_picture_is_committed(run, bundle):
    shutil.which("git") or pytest.skip("no git")
    git(bundle, "init", "-q", "-b", "work")
    git(bundle, "add", "README.md", "results")
    git(bundle, "commit", "-q", "-m", "first")
    assert run().code == 0
    path = bundle / "results" / "git_submit.json"
    recorded = json.loads(path.read_text())
    assert (recorded["commit"], recorded["branch"]) == (git(bundle, "rev-parse", "HEAD"), "work")
    assert recorded["files"] == sorted(git(bundle, "ls-files").splitlines())
    path.write_text(json.dumps(recorded | {"time_utc": "2026-01-01T00:00:00+00:00"}))
    before = path.read_bytes()
    assert run().out == ["Written: assets/git_submit_result.png"] and path.read_bytes() == before
    git(bundle, "add", "-A")
    git(bundle, "commit", "-q", "-m", "with the pictures")
    assert run("--check").code == 0 and path.read_bytes() == before


# --- the whole way, on the simulated NPU ---


@pytest.fixture
def copy_of_bundle(tmp_path) -> Path:
    """What a user has, with one photo."""
    pytest.importorskip("npu_simulator", reason="this torch cannot register a device from Python", exc_type=ImportError)
    root = tmp_path / "copy"
    (root / "tests").mkdir(parents=True)
    (root / "assets" / "samples").mkdir(parents=True)
    shutil.copytree(ROOT / "eval", root / "eval", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("inference.py", "requirements.txt", "tests/npu_simulator.py", "tests/run_simulated.py"):
        shutil.copy(ROOT / name, root / name)
    shutil.copy(SAMPLES / "chelsea.jpg", root / "assets" / "samples")
    for folder in ("results", "logs"):
        shutil.copytree(ROOT / folder / "published", root / folder / "published")
    for name in evidence.READMES:
        (root / name).write_text(skeleton())
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """One layer is enough here, and runs on the simulator in a third of the time."""
    return save_checkpoint(tmp_path_factory.mktemp("weights") / "one_layer", tiny_model(layers=1))


def run_sequence(root: Path, checkpoint: Path, **variables: str) -> subprocess.CompletedProcess:
    """The README's one command for an Ascend machine, on the simulator, with a tiny model and few runs."""
    command = re.search(r"^python eval/env_check\.py && .*$", (ROOT / "README.md").read_text(), re.MULTILINE)[0]
    assert command.count("--device npu") == 3 and command.endswith(" && python eval/evidence.py")
    command = command.replace("--end_to_end 500", "--batch_sizes 1 2 --warmup 1 --num_runs 1 --rounds 1")
    command = command.replace("--device npu", f"--device npu --model_path {checkpoint}") + " --allow_simulated"
    command = re.sub(r"\bpython (?=\w)", f"{sys.executable} tests/run_simulated.py ", command)
    return subprocess.run(
        ["bash", "-c", command],
        cwd=root,
        env=script_environment(OMP_NUM_THREADS="1", **variables),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_documented_sequence_fills_the_readme_with_npu_figures(copy_of_bundle, checkpoint, monkeypatch, capsys):
    root = copy_of_bundle
    done = run_sequence(root, checkpoint)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    text = (root / "README.md").read_text()
    assert "NPU SIMULATED, simulated NPU (CPU), float32, checkpoint " in text
    for name in ("inference", "accuracy", "sweep", "performance", "peers"):
        block = text.split(f"<!-- evidence:{name} -->")[1].split("<!-- /evidence")[0]
        assert "| NPU SIMULATED | " in block and "| NPU | " not in block, block
    speed = json.loads((root / "results" / "performance_eval.json").read_text())["results"][1]["throughput_img_s"]
    assert f"| {speed:.2f} |" in text
    assert "| results/accuracy_eval.json | present, SIMULATED |" in text
    monkeypatch.setattr(inference, "ROOT", root)
    assert evidence.main(["--check", "--allow_simulated"]) == 0
    before = content(root)
    assert evidence.main(["--check"]) == evidence.main([]) == 2
    assert "made on the simulated NPU" in capsys.readouterr().err and content(root) == before


def test_the_documented_sequence_stops_where_there_is_no_npu(copy_of_bundle, checkpoint, monkeypatch):
    root = copy_of_bundle
    done = run_sequence(root, checkpoint, NPU_SIMULATOR_DEVICES="0")
    assert done.returncode == 3 and done.stderr.strip().splitlines()[-1].startswith("BLOCKED: torch_npu sees no NPU")
    assert not list((root / "results").glob("*eval*.json")) and (root / "README.md").read_text() == skeleton()
    monkeypatch.setattr(inference, "ROOT", root)
    assert evidence.main([]) == 0
    assert "| NPU | BLOCKED: torch_npu sees no NPU ([inference.log](logs/inference.log)) |" in (root / "README.md").read_text()
