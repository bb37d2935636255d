"""Pages and pictures say what the files say, in both languages, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import inference
import numpy as np
import pytest
from PIL import Image

import eval_accuracy
import evidence
import pictures
import tables
from conftest import ROOT

HASH = "0123456789abcdef" * 4
BLOCKED = {"status": "BLOCKED", "device": "npu", "reason": "torch_npu is not installed", "what_to_do": "Run eval/env_check.py"}
RANDOM = {"source": "random", "note": "", "seed": 0}


# --- results as the scripts write them ---


def provenance(**changes: Any) -> dict[str, Any]:
    return {
        "device": "cpu",
        "device_name": "Some CPU, 2 threads",
        "dtype": "float32",
        "model": inference.MODEL_NAME,
        "time_utc": "2026-05-15T04:33:04+00:00",
        "git_commit": "a1b2c3d4" * 5,
        "git_dirty": False,
        "allow_hf32": False,
        "weights": {
            "source": "checkpoint",
            "path": "weights/w",
            "sha256": {"config.json": "f" * 64, "model.safetensors": HASH},
        },
        **changes,
    }


def inference_result(**changes: Any) -> dict[str, Any]:
    colours = [np.full((4, 4, 3), 40 * place, np.uint8).tobytes().hex() for place in range(2)]
    found = dict(
        image_size=64,
        image_path=["assets/samples/a.png", "assets/samples/b.png"],
        last_hidden_shape=[2, 17, 128],
        hidden_mean_norm=17.0625,
        inference_time_s=0.0125,
        throughput_img_s=160.0,
        batch_size=2,
        preprocess={"resize": 64, "image_size": 64},
        pca={"explained_variance_percent": 65.92, "colours_hex": colours},
    )
    return provenance(**found | changes)


def stage(name: str, error: float) -> dict[str, Any]:
    keys = ("relative_l2_error", "own_relative_l2_error", "float32_own_relative_l2_error")
    return {"stage": name, "at_fault": False} | dict.fromkeys(keys, error)


def sweep_row(arithmetic: str, error: float, rate: float) -> dict[str, Any]:
    stages = [stage("layer 1 attention", error / 2), stage("final norm", error)]
    row = {"arithmetic": arithmetic, "overall": "PASS", "begins_at": [], "stages": stages, "relative_l2_error": error}
    return row | {"worst_token_relative_l2_error": error, "throughput_img_s": rate}


def accuracy_result(**changes: Any) -> dict[str, Any]:
    output = {
        "relative_error": {"filtered_mean_relative_error": 0.0012345},
        "cosine_similarity": 0.99999,
        **dict.fromkeys(("mre_pass", "cosine_pass", "l2_pass", "worst_token_pass"), True),
        "relative_l2_error": 1.234e-7,
        "worst_token_relative_l2_error": 5.678e-6,
        "float64_relative_l2_error": 2.5e-7,
        "counts": True,
    }
    found = {
        **{name: output for name in eval_accuracy.OUTPUTS},
        "overall": "PASS",
        "stages": [stage("layer 1 attention", 1e-7), stage("final norm", 2e-7)],
        "sweep": [sweep_row("float32, strict", 1.2e-7, 12.5), sweep_row("float16", 4.4e-4, 25.0)],
        "reference": {"device": "float64 on the CPU", "dtype": "float64"},
        "threshold_percent": 1.0,
    }
    return provenance(**found | changes)


def performance_row(batch_size: int, rate: float, **changes: Any) -> dict[str, Any]:
    time = batch_size / rate
    times = {"mean_time_s": time, "p50_s": time, "p95_s": 1.1 * time, "throughput_img_s": rate, "raw_times_s": [time] * 3}
    row = {"batch_size": batch_size, "peak_resident_memory_mb": 900.4, "share_of_limit_percent": 62.5, **times}
    return row | changes


def performance_result(**changes: Any) -> dict[str, Any]:
    peer = {"peer": "transformers", "batch_size": 1, "throughput_img_s": 1.9, "bundle_throughput_img_s": 2.4}
    folder = {"what": "this bundle", "images_per_s": 10.0, "ratio_to_this_bundle": 1.0}
    found = {
        "num_runs": 3,
        "results": [performance_row(1, 2.125), performance_row(4, 4.25, unsteady=True)],
        "limit": {"limit_img_s": 6.8, "matmul_tflops": 0.835},
        "peers": [
            peer | {"speed_ratio": 1.0625, "rounds": 3},
            {"peer": "openvino", "unavailable": "No module named 'openvino'"},
        ],
        "end_to_end": {"cold_start": {"import_s": 1.5, "load_s": 0.5}, "folder": {"rows": [folder]}},
        "execution": "eager",
    }
    return provenance(**found | changes)


MAKERS = {"inference": inference_result, "accuracy_eval": accuracy_result, "performance_eval": performance_result}
ENVIRONMENT = {
    **{
        "os": "Linux 6.1.0-x x86_64",
        "cpu": "Some CPU",
        "cpu_cores": 2,
        "memory_gb": 23.5,
        "npu_model": None,
        "npu_count": None,
    },
    **{f"{name}_version": "1.2.3" for name in ("python", "torch", "transformers", "numpy")},
}


# --- a bundle to try it on ---


@pytest.fixture
def bundle(tmp_path, monkeypatch) -> Path:
    """A bundle without results: README skeletons, two photos, the published run."""
    root = tmp_path / "bundle"
    (root / "assets" / "samples").mkdir(parents=True)
    for place, name in enumerate("ab"):
        Image.new("RGB", (64, 64), (60 * place, 90, 120)).save(root / "assets" / "samples" / f"{name}.png")
    for folder in ("results", "logs"):
        shutil.copytree(ROOT / folder / "published", root / folder / "published")
    shutil.copy(ROOT / "locked_models.md", root)
    marked = "".join(f"\nText.\n\n<!-- evidence:{name} -->\n<!-- /evidence:{name} -->\n" for name in tables.TABLES)
    for name in evidence.READMES:
        (root / name).write_text(f"# A model\n{marked}", encoding="utf-8")
    monkeypatch.setattr(inference, "ROOT", root)
    return root


def write(root: Path, stem: str, data: Any) -> Path:
    path = root / "results" / f"{stem}.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def save(root: Path, name: str, kind: str = "cpu", **changes: Any) -> Path:
    """Write a result of a kind of device; returns its path."""
    return write(root, inference.result_name(name, kind), MAKERS[name](device=kind, **changes))


def save_all(root: Path, kind: str = "cpu", **changes: Any) -> None:
    for name in MAKERS:
        save(root, name, kind, **changes)
    write(root, "env_info", ENVIRONMENT)


@pytest.fixture
def run(bundle, capsys) -> Callable[..., SimpleNamespace]:
    """Run evidence.py in this process: exit code and what it printed."""

    def run_main(*arguments: str) -> SimpleNamespace:
        code = evidence.main(arguments)
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out.splitlines(), err=printed.err)

    return run_main


def page(root: Path, name: str, language: str = "en") -> str:
    return tables.render(tables.TABLES[name](evidence.read_evidence(root)), language)


def cells(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# --- what the tables say ---


def test_the_figures_are_those_of_the_files(bundle):
    save_all(bundle)
    hidden = ["CPU against float64", "Hidden", "0.1234", "0.999990000", "1.23e-07", "5.68e-06", "PASS"]
    assert hidden in cells(page(bundle, "accuracy"))
    assert ["CPU", "4", "941.18", "4.25", "900", "62.5", "unsteady"] in cells(page(bundle, "performance"))
    assert ["CPU", "folder of photos to features", "10.00", "27.8", "3,472", "434"] in cells(page(bundle, "rates"))


@pytest.mark.parametrize(("language", "said"), [("en", "HF32 or TF32 allowed"), ("zh", "允许 HF32 或 TF32")])
def test_a_figure_says_which_arithmetic_and_execution_gave_it(bundle, language, said):
    save(bundle, "performance_eval", "npu", dtype="float16", execution="graph")
    save(bundle, "accuracy_eval", "npu", allow_hf32=True)
    audited = cells(page(bundle, "audit", language))
    assert audited[4][1].endswith(", **float16**, **graph**") or audited[4][1].endswith("，**float16**，**graph**")
    assert said in audited[3][1] and "float16" not in audited[3][1]
    assert all("**float16**" in row[0] for row in cells(page(bundle, "performance", language))[2:])
    assert all(said in row[0] for row in cells(page(bundle, "accuracy", language))[2:])


def test_a_path_in_what_a_library_says_does_not_keep_the_page_from_being_written(bundle):
    told = "cannot import name 'x' from 'y' (/tmp/peers/y.py); /data/venv/lib/libtorch_npu.so: undefined symbol"
    fields = {"peers": [{"peer": "y", "unavailable": told}], "npu_blocked_reason": told, "execution_fallback": None}
    path = bundle / "results" / "performance_eval_cpu.json"
    inference.write_json(path, performance_result(device="cpu", **fields))
    written = evidence.read_evidence(bundle).records["performance_eval_cpu"]
    masked = "cannot import name 'x' from 'y' (.../y.py); .../libtorch_npu.so: undefined symbol"
    assert (written["peers"][0]["unavailable"], written["npu_blocked_reason"]) == (masked, masked)


def test_before_an_npu_has_run_the_published_run_stands_in_a_column_of_its_own(bundle):
    write(bundle, "inference", BLOCKED)
    head, _, photo, accuracy, speed = cells(page(bundle, "audit"))
    assert head[1:3] == ["This code on an NPU", "Published Ascend run (not made by this code)"]
    assert photo[1] == "**BLOCKED**: torch_npu is not installed" and photo[2].startswith("**runs**: 1 x 197 x 1024, 12.63 ms")
    assert accuracy[1] == "not measured" and accuracy[2] == (
        "**PASS** (bar 1%): filtered MRE 0.1172%, unfiltered mean 1.886%, cosine 0.999989, relative L2 not recorded, "
        "worst token not recorded"
    )
    assert speed[2] == "best 332.75 images/s (batch 8), latency 11.81 ms (batch 1)"
    assert photo[3] == (
        "[json](results/inference.json), [png](assets/inference_result.png); [published](results/published/inference.json)"
    )


def test_after_an_npu_has_run_its_figures_fill_this_codes_column(bundle):
    save_all(bundle, "npu", device_name="Ascend910")
    *_, photo, accuracy, speed = cells(page(bundle, "audit"))
    assert photo[1] == "**runs**: 2 x 17 x 128, 12.50 ms, 160.00 images/s"
    assert accuracy[1].endswith("relative L2 1.2e-07, worst token 5.7e-06 against float64")
    assert "CPU" not in page(bundle, "accuracy")  # the other devices' rows are in results/README.md
    assert speed[1].startswith("best 4.25 images/s (batch 4), latency 470.59 ms (batch 1): 0.01 times the published rate")
    assert "not measured" not in page(bundle, "audit")


def test_random_weights_stand_in_every_row_that_shows_them(bundle):
    save_all(bundle, weights=RANDOM)
    for name in ("accuracy", "performance"):
        rows = [row for row in cells(page(bundle, name)) if row[0].startswith("CPU")]
        assert rows and all("**random weights**" in row[0] for row in rows)


def test_the_rows_of_an_interrupted_run_count_until_there_is_a_whole_one(bundle):
    write(bundle, "performance_eval", BLOCKED)
    write(bundle, "performance_eval_partial", performance_result(device="npu", partial=True))
    assert "NPU, **partial**" in page(bundle, "performance")
    assert page(bundle, "audit").count("**partial**") == 1
    save(bundle, "performance_eval", "npu")
    assert "partial" not in page(bundle, "performance")


def test_the_key_lines_of_the_run_that_was_saved_are_quoted(bundle):
    save(bundle, "inference")
    write(bundle, "performance_eval", BLOCKED)
    blocked = ("[INFO] Results saved to results/performance_eval.json", "[ERROR] BLOCKED: no torch_npu. Run it")
    (bundle / "logs" / "performance_eval.log").write_text("".join(f"2026-05-15 04:33:04,368 {line}\n" for line in blocked))
    text = "".join(
        f"2026-05-15 04:33:04,368 [INFO] {line}\n"
        for rate, end in (("1.5", "Results saved to results/inference_cpu.json"), ("2.5", "stopped"))
        for line in ("Device: cpu, A (asked for)", "Loading", f"Throughput: {rate} img/s", end)
    )
    (bundle / "logs" / "inference_cpu.log").write_text(text)
    quoted = page(bundle, "log")
    assert "[ERROR] BLOCKED: no torch_npu. Run it" in quoted
    assert "Throughput: 1.5 img/s" in quoted and "2.5" not in quoted and "Loading" not in quoted


def test_versions_say_which_stacks_pip_resolves(bundle):
    tried = [{"cann": "8.5", "python": "3.10", "resolves": True}, {"cann": "8.5", "python": "3.11", "resolves": False}]
    write(bundle, "install_resolution", {"resolved": tried})
    found = page(bundle, "versions")
    assert "# CANN 8.5: torch_npu 2.9.0, 2.9.0.post1; Python 3.10\n" in found
    assert "pip install torch==2.9.0 --index-url https://download.pytorch.org/whl/cpu && pip install torch_npu==2.9.0 " in found
    assert "; Python -\n" in found and page(bundle, "versions", "zh") == found


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_chinese_tables_hold_no_english_sentence(bundle, name):
    """Names, units, verdicts and what a log says stay."""
    save_all(bundle, weights=RANDOM)
    write(bundle, "inference", BLOCKED)
    text = re.sub(
        r"```.*?```|`[^`]*`|\]\([^)]*\)|[\w/]+\.(md|py|json|log|png|txt)", " ", page(bundle, name, "zh"), flags=re.DOTALL
    )
    words = set(re.findall(r"[A-Za-z][a-z]{2,}", text))
    known = {
        "torch",
        "numpy",
        "npu",
        "pip",
        "Python",
        "float",
        "Some",
        "threads",
        "commit",
        "post",
        "aarch",
        "RMS",
        "transformers",
    }
    assert words - known - {"json", "png"} == set()


def test_both_languages_have_the_same_figures(bundle):
    save_all(bundle)
    for name in tables.TABLES:
        found = []
        for language in ("en", "zh"):
            rows = [row for row in cells(page(bundle, name, language)) if row[0] != "---" and not re.search(r"[(（]h", row[-1])]
            found.append([re.findall(r"\d[\d.,e%-]*\d", " ".join(row)) for row in rows[1:]])
        assert found[0] == found[1], name
        assert name in ("log", "versions") or found[0]


def test_results_in_full_stand_on_a_page_of_their_own(bundle, run):
    save_all(bundle)
    assert run().code == 0
    text = (bundle / "results" / "README.md").read_text(encoding="utf-8")
    assert ["CPU", "1.50", "0.50", "-", "-", "-"] in cells(text)  # the cold start
    assert ["CPU", "transformers", "1", "1.90", "2.40", "1.062", "3", "-"] in cells(text)
    assert "The ratio is the median over turns" in text
    assert ["published Ascend run, **not this code**", "8", "24.04"] in [row[:2] + row[3:4] for row in cells(text)]
    made = ["CPU", "Some CPU, 2 threads", "checkpoint", "float32", "2026-05-15T04:33:04+00:00", "a1b2c3d4" * 5, "no"]
    assert cells(text).count(made) == 2  # the accuracy says also what it is against
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if not (bundle / "results" / link).exists()] == []


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device_name": "simulated NPU (CPU)"}, "made on the simulated NPU"),
        ({"model": "another model (128 wide)"}, "its model is 'another model (128 wide)'"),
        ({"model": None}, "its model is None"),
        ({"device": "cuda"}, "its device is 'cuda'"),
        ({"image_path": "/home/me/photo.jpg"}, "a path of somebody's machine (/home/me/photo.jpg)"),
        ({"command": "python inference.py --model_path C:\\weights"}, "a path of somebody's machine"),
    ],
)
def test_what_is_no_evidence_is_refused(bundle, run, changes, words):
    write(bundle, "inference", inference_result(**{"device": "npu"} | changes))
    before = content(bundle)
    done = run()
    assert done.code == 2
    assert done.err.startswith("error: results/inference.json: ") and words in done.err and done.err.count("\n") == 1
    assert content(bundle) == before


def test_paths_of_a_system_and_in_the_bundle_are_no_reason_to_refuse(bundle):
    paths = "weights/w /usr/local/Ascend/cann .../photo.jpg ~/ascend/log https://pytorch.org/whl/cpu 1.2 img/s /dev/davinci0"
    save(bundle, "inference", command=paths)
    assert "inference_cpu" in evidence.read_evidence(bundle).records


OURS = '"device": "cpu", "model": "webssl-mae300m-full2b-224", "weights": {"source": "random"}'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        (f"{{{OURS}}}", "('results' is missing)"),
        (f'{{{OURS}, "results": 5}}', "('int' object is not iterable)"),
    ],
)
def test_a_malformed_result_is_named(bundle, run, text, why):
    write(bundle, "performance_eval_cpu", text)
    done = run()
    assert done.code == 2 and "results/performance_eval_cpu.json" in done.err and done.err.count("\n") == 1
    assert why in done.err


# --- between the markers ---


def test_a_second_run_changes_nothing_and_the_check_agrees(bundle, run):
    save_all(bundle)
    assert run().code == 0
    before = content(bundle)
    assert run().out == ["Nothing has changed"]
    assert content(bundle) == before
    assert run("--check").code == 0
    assert "Text.\n" in (bundle / "README.md").read_text()


def test_the_check_finds_drift_of_every_kind_and_writes_nothing(bundle, run):
    save_all(bundle)
    run()
    for name in ("README.md", "README.zh.md", "results/README.md"):
        text = (bundle / name).read_text(encoding="utf-8")
        (bundle / name).write_text(text.replace("941.18", "141.18"), encoding="utf-8")
        before = content(bundle)
        found = run("--check")
        assert found.code == 1 and found.out == [f"{name}: not what the files give; run: python eval/evidence.py"]
        assert content(bundle) == before
        (bundle / name).write_text(text, encoding="utf-8")
    save(bundle, "performance_eval", num_runs=4)
    assert [line.split(":")[0] for line in run("--check").out] == ["assets/performance_eval_result.png"]
    (bundle / "assets" / "env_check.png").unlink()
    assert any(line.startswith("assets/env_check.png: missing") for line in run("--check").out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("<!-- evidence:audit -->\n<!-- /evidence:audit -->\n", ""), "<!-- evidence:audit --> must stand there once"),
        (("<!-- /evidence:log -->", ""), "and once <!-- /evidence:log --> after it"),
        (("evidence:log", "evidence:lgo"), "evidence:lgo is not known"),
        (("# A model", "<!-- evidence:log -->\n<!-- /evidence:log -->"), "<!-- evidence:log --> must stand there once"),
        (("<!-- evidence:log -->", "<!-- /evidence:log --><!-- evidence:log -->"), "once <!-- /evidence:log --> after it"),
    ],
)
def test_a_marker_out_of_place_is_named_before_anything_is_written(bundle, run, change, words):
    text = (bundle / "README.zh.md").read_text()
    (bundle / "README.zh.md").write_text(text.replace(*change))
    before = content(bundle)
    done = run()
    assert done.code == 2 and done.err.startswith("error: README.zh.md") and words in done.err
    assert content(bundle) == before


def test_an_unforeseen_error_is_one_line_and_its_traceback_is_in_the_log(bundle, run, monkeypatch):
    monkeypatch.setattr(evidence, "details_page", lambda _evidence: 1 / 0)
    done = run()
    assert done.code == 70 and done.err.count("\n") == 1
    assert "Traceback" in (bundle / "logs" / "trial" / "evidence.log").read_text()


# --- pictures ---


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


def test_the_limit_is_drawn_by_the_share_of_it_that_is_reached():
    """Its own rate was measured at another time, when a shared machine may have been faster or slower."""
    series = {label: dict(points) for label, _, _, points in pictures.performance_series(performance_result(), None)}
    assert series["results/published/"] == {}
    assert series["inference.py"] == {1: 2.125, 4: 4.25}
    assert series["limit"] == {1: pytest.approx(3.4), 4: pytest.approx(6.8)}


def test_a_picture_is_drawn_anew_only_when_its_sources_have_changed(bundle, run):
    save_all(bundle)
    run()
    save(bundle, "performance_eval", num_runs=4)
    assert [line for line in run().out if "assets" in line] == ["Written: assets/performance_eval_result.png"]
    Image.new("RGB", (64, 64), "red").save(bundle / "assets" / "samples" / "a.png")
    assert [line for line in run().out if "assets" in line] == ["Written: assets/inference_result.png"]


def test_a_users_own_photo_leaves_the_picture_to_another_result(bundle):
    save_all(bundle)
    save(bundle, "inference", "npu", image_path=".../holiday.jpg")
    kinds, photos = pictures.photos_of(evidence.read_evidence(bundle))
    assert kinds == ["cpu"] and [photo.name for photo in photos] == ["a.png", "b.png"]


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], capture_output=True, check=True)


def test_what_is_submitted_lists_what_a_commit_would_hold(bundle, run):
    """New results too, which git does not know yet; a second run and a commit in between change nothing."""
    git(bundle, "init", "-q")
    (bundle / ".gitignore").write_text("/logs/trial/\n")
    git(bundle, "add", ".")
    git(bundle, "commit", "-qm", "one")
    save_all(bundle, "npu")
    (bundle / "logs" / "trial").mkdir()
    (bundle / "logs" / "trial" / "x.log").write_text("x")
    run()
    files = json.loads((bundle / "results" / "git_submit.json").read_text())["files"]
    assert {"results/accuracy_eval.json", "README.md", "assets/git_submit_result.png", "results/git_submit.json"} <= set(files)
    assert "logs/trial/x.log" not in files
    git(bundle, "add", ".")
    git(bundle, "commit", "-qm", "two")
    assert run().out == ["Nothing has changed"]
    save(bundle, "accuracy_eval")
    told = "results/git_submit.json: does not list what there is: results/accuracy_eval_cpu.json; run: python eval/evidence.py"
    assert told in run("--check").out


def test_a_file_may_have_the_simulator_in_its_name_but_no_result_its_device():
    assert evidence.refuse({"files": ["tests/run_simulated.py"]}, None) is None
    assert "simulated NPU" in evidence.refuse({"device_name": "simulated NPU (CPU)"}, None)
