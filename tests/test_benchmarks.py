"""The scripts that measure and report: they run, and the documents are what the results give."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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


@pytest.mark.parametrize("name", ["study", "recipes", "report"])
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
