"""The scripts that measure and report: they run, and the documents are what the results give."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while they are made.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_documents_are_what_the_results_give() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "report.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["study", "recipes", "report", "hash_table", "gpu"])
def test_every_script_tells_what_it_measures(name: str) -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_a_study_runs_the_commands_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study = load("study")
    calls: list[tuple[str, ...]] = []

    def fake(*arguments: str) -> dict[str, Any]:
        calls.append(arguments)
        return {}

    monkeypatch.setattr(study, "_geep", fake)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    folder = tmp_path / "runs" / "trec"
    folder.mkdir(parents=True)
    made = {
        "training.json": {"about": {"rows": 3, "settings": {}}, "result": {"steps": 1}},
        "calibration.json": {"record": {"calibration": {"speed": 0.3}, "profile": {"criterion": "entropy"}}},
    }
    for name, content in made.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "evaluation.jsonl").write_text('{"kind": "run"}\n', encoding="utf-8")
    (folder / "evaluation.png").write_bytes(b"png")
    arguments = ["--data-dir", "d", "--model", "m", "--runs-dir", str(tmp_path / "runs"), "--only", "trec"]
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
    study.main()
    assert [call[0] for call in calls] == ["train", "profile", "calibrate", "evaluate"]
    lines = (tmp_path / "results" / "study-trec.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["training", "calibration", "profile", "run"]


def test_hash_table_measurements_agree_and_are_not_made_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = load("hash_table")
    monkeypatch.setitem(bench.SCALES, "quick", bench.Scale((64,), 100, (3,), 2))
    arguments = ["hash_table.py", "--quick", "--device", "cpu", "--results-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    (path,) = tmp_path.glob("hash_table-*.jsonl")
    text = path.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["method"] for line in lines} == {"reference", "searchsorted", "dict", "gather", "embedding_bag"}
    assert {line.get("load_factor") for line in lines} == {*bench.LOAD_FACTORS, None}
    assert all(min(line["rounds"]) <= line["seconds"] <= max(line["rounds"]) for line in lines)
    assert "left out" in capsys.readouterr().out
    bench.main()
    assert path.read_text(encoding="utf-8") == text


def test_hash_table_methods_that_disagree_are_not_timed() -> None:
    bench = load("hash_table")
    methods = {"one": lambda: torch.tensor([1]), "other": lambda: torch.tensor([2])}
    with pytest.raises(RuntimeError, match="another answer of other than of one"):
        bench.measure(bench.Case({"kind": "x"}, 1, methods), 1, torch.device("cpu"))


def test_the_gpu_benchmark_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = load("gpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "found no CUDA device. It needs an NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "gemm,magic"])
    assert gpu.main() == 2
    assert "Unknown measurements ['magic']" in capsys.readouterr().err


def test_the_gpu_benchmark_runs_at_toy_sizes(tmp_path: Path) -> None:
    gpu = load("gpu")
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    model, tokenizer = gpu.random_model(vocab_size=200, **shape)
    engine = gpu.Engine(model, tokenizer, config=gpu.EngineConfig(device="cpu", backend="cuda", compile=False))
    sizes = gpu.Sizes(
        gemm=32, tokens=(128,), mean_lengths=(16, 150), attention_tokens=300, texts=(20,), full_texts=2, raw_texts=8,
        pipeline_texts=4, pipeline_batches=(2,), rounds=1, inner=1,
    )  # fmt: skip
    bench = gpu.Bench(engine, sizes)
    path = tmp_path / "results" / "gpu-toy.jsonl"
    counts = {}
    for kind, measure in gpu.KINDS.items():
        rows = measure(bench)
        counts[kind] = len(rows)
        for _ in range(2):  # measured again, rows are replaced
            gpu.write(path, kind, rows, {"encoder": "toy", "device": "cpu"})
    assert counts == {"gemm": 4, "full_depth": 1, "layer": 3, "attention": 5, "staircase": 2, "texts": 4}
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(found) == sum(counts.values())
    numbers = [value for row in found for value in row.values() if isinstance(value, float)]
    assert all(value > 0 for value in numbers)
    # The work that is counted for a text of n tokens: 24 n width² of products at BERT's proportions, 4 n² width beside.
    shape["intermediate_size"] = 128
    wide = gpu.Bench(gpu.Engine(*gpu.random_model(vocab_size=200, **shape), config=engine.config), sizes)
    assert wide.flops(np.array([10])) == 24 * 10 * 32**2 + 4 * 100 * 32
