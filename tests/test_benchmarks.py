"""The scripts that measure and report: they run, and the documents are what the results give."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCAB, make_engine, make_model, make_tokenizer, random_texts, split, tiny_encoder, toy_task

from geep.calibration import TABLE_SPEEDS, ExitRun
from geep.data import Dataset, Split
from geep.engine import Engine, EngineConfig, ExitSettings
from geep.promise import RISKS, Promise
from geep.training import TrainSettings

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


@pytest.mark.parametrize(
    "name",
    [
        "accuracy",
        "study",
        "recipes",
        "report",
        "hash_table",
        "gpu",
        "throughput",
        "scaling",
        "plot",
        "prediction",
        "heads",
        "ablation",
        "table_scale",
        "betting",
        "certified",
        "guarantee",
        "searches",
        "families",
        "staircase",
        "calls",
    ],
)
def test_every_script_tells_what_it_measures(name: str) -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_betting_certifies_no_more_often_than_the_exact_bound(capsys: pytest.CaptureFixture[str]) -> None:
    betting = load("betting")
    betting.main(["--texts", "1500", "--rounds", "40"])
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[-3:] == ["exact", "adaptive", "mixture"]
    assert len(rows) == len(betting.WORLDS)
    shares = np.array([row[-3:] for row in rows], dtype=float)
    assert (shares[:, :1] + 0.05 >= shares[:, 1:]).all()
    assert (shares[:, 0].mean() > shares[:, 1:].mean(0) + 0.02).all()
    assert shares[0].tolist() == [1.0, 1.0, 1.0]  # where no answer changes, each of them certifies
    # Each holds where just more is lost than is allowed.
    broken = betting.certified(1500, 0.0055, 1.0, rounds=200)
    assert max(broken.values()) <= 0.05 + 2 * (0.05 * 0.95 / 200) ** 0.5


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


@pytest.fixture
def certified(rivals: None) -> ModuleType:
    return load("certified")


def test_cells_are_run_once_the_default_recipe_first(certified: ModuleType) -> None:
    cells = list(dict.fromkeys(certified.cells()))
    assert {cell.recipe for cell in cells[: len(certified.FIRST)]} == {"fitted"}
    everywhere = [*certified.FIRST, *certified.FURTHER]
    assert sorted(cell.data for cell in cells if (cell.recipe, cell.seed) == ("fitted", 0)) == sorted(everywhere)
    rivals = [certified.Cell(data, recipe, 0) for recipe in certified.ONE_SEED for data in certified.FIRST]
    assert [cell for cell in cells if cell.recipe in certified.ONE_SEED] == rivals == cells[-len(rivals) :]


def test_a_cell_is_measured_and_reported_and_not_measured_again(
    certified: ModuleType,
    rivals: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    encoder = tiny_encoder("bert")
    encoder.apply(encoder._init_weights)
    encoder.save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    (tmp_path / "data" / "toy").mkdir(parents=True)
    for seed, (part, count) in enumerate({"train": 400, "dev": 2200, "test": 100}.items()):
        texts, labels = toy_task(count, seed=seed)
        rows = [{"text": text, "label": "abc"[label]} for text, label in zip(texts, labels, strict=True)]
        path = tmp_path / "data" / "toy" / f"{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    monkeypatch.setattr(certified, "FIRST", ("toy",))
    output = tmp_path / "out.jsonl"
    cell = certified.Cell("toy", "fitted", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certified, "TrainSettings", partial(TrainSettings, bf16=False))
        certified._run(cell, str(tmp_path / "data"), str(tmp_path / "encoder"), str(tmp_path / "work"), None, output)
    assert "done" in capsys.readouterr().out
    (line,) = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert line["depths"] == [1, 2, 4]
    assert line["agreement"][-1] == 100.0
    for promise in line["promises"].values():
        assert "refused" in promise or 0 <= promise["layers"] <= 4
    args = SimpleNamespace(data_dir=tmp_path / "data", only=None, recipes=None, seeds=1)
    assert cell not in certified._wanted(args, output)
    assert certified.Cell("toy", "geep", 0) in certified._wanted(args, output)
    from sections.exits import _certified

    section = _certified([line, {**line, "recipe": "geep"}])
    assert [row.split(" | ")[1] for row in section.parts[1].splitlines()[2:]] == ["fitted", "geep"]
    # Two recipes that made the same model: neither is better.
    assert "Against `geep` its full model is the better in 0 of 1 sets" in section.answer
    # FastBERT's and GEEP's own rules, and a model of fewer layers.
    for rule in line["published"].values():
        assert [at["speed"] for at in rule] == list(certified.PUBLISHED_SPEEDS)
        assert [at["layers"] for at in rule] == sorted((at["layers"] for at in rule), reverse=True)
        assert {at["by_table"] for at in rule} == {0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certified, "TrainSettings", partial(TrainSettings, bf16=False))
        for recipe in ("geep", "2 layers"):
            other = certified.Cell("toy", recipe, 0)
            certified._run(
                other, str(tmp_path / "data"), str(tmp_path / "encoder"), str(tmp_path / "work"), None, output
            )
    one_step, shorter = map(json.loads, output.read_text("utf-8").splitlines()[1:])
    # On the full model's own depth the shared exit is the full model.
    assert len(one_step["shared_accuracy"]) == len(one_step["depths"])
    assert one_step["shared_accuracy"][-1] == one_step["accuracy"][-1]
    assert (shorter["layers"], shorter["depths"], len(shorter["accuracy"])) == (2, [2], 1)
    from sections.baselines import baseline_sections

    shutil.move(output, tmp_path / "certified.jsonl")
    published, shared, fewer = baseline_sections(tmp_path)
    # Of depths 1, 2 and 4 only 2 is a layer behind another: the shared exit on layer 1 against the exit at 2.
    gain = one_step["shared_accuracy"][0] - one_step["accuracy"][1]
    assert shared.parts[1].splitlines()[2] == f"| toy | `geep`, 1 | {one_step['accuracy'][1]:.2f}, {gain:+.2f} |"
    assert "recipe `fastbert`" not in published.parts[1]  # no such cell was run
    assert f"{shorter['accuracy'][0]:.2f}" in fewer.parts[1]


def test_test_texts_that_stand_in_training_rows_are_known(certified: ModuleType) -> None:
    train, test = Split(["Oil rose, again.", "Wheat"]), Split(["oil rose again", "Wheat!", "wheat exports"])
    dataset = Dataset("toy", ("a", "b"), train, Split(["Corn?"]), test, multi_label=False)
    assert certified.repeated(dataset).tolist() == [True, True, False]
    pairs = [Split(["a", "b"], text_pairs=["c", "d"]), Split(["A", "a"], text_pairs=["C.", "d"])]
    assert certified.repeated(Dataset("toy", ("a", "b"), pairs[0], None, pairs[1], multi_label=False)).tolist() == [
        True,
        False,
    ]


def test_the_published_table_counts_exits_that_answer_by_themselves(rivals: None, tiny_engine: Engine) -> None:
    published = load("published")
    runs = [ExitRun.of(tiny_engine, split(300, seed=seed)) for seed in (1, 2)]
    engine = published.as_published(tiny_engine, *runs)
    assert (engine.settings.fusing, engine.settings.temperatures, engine.predictor.num_labels) == ({}, {}, None)
    chances = runs[0].exit_logits.softmax(-1)
    unsure = -(chances * chances.log()).sum(-1) / math.log(chances.shape[-1])
    tokens = torch.from_numpy(runs[0].batch.lengths) - 2  # but for [CLS] and [SEP]
    for place, speed in enumerate(TABLE_SPEEDS):
        sure = unsure < speed
        sure[-1] = True
        expected = torch.bincount(sure.int().argmax(0), weights=tokens, minlength=len(unsure))
        vocabulary = engine.predictor.table.counts[: len(VOCAB), place].sum(0)
        assert vocabulary.tolist() == expected.tolist()


def test_logits_are_kept_by_part_and_those_of_other_texts_refused(
    rivals: None, tiny_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablation, asked = load("ablation"), []
    parts = SimpleNamespace(teaching=split(20, seed=1), profile=split(10, seed=2), calibration=split(12, seed=3))
    dataset = SimpleNamespace(test=split(8, seed=4))
    monkeypatch.setattr(ablation.geep, "parts_of", lambda folder: (SimpleNamespace(load=lambda: dataset), parts))
    monkeypatch.setattr(ablation.Engine, "from_pretrained", lambda *_, **__: tiny_engine)
    run = ExitRun.of

    def noted(engine: Engine, part: Split, *, what: str) -> ExitRun:
        asked.append(what)
        return run(engine, part, what=what)

    monkeypatch.setattr(ablation.ExitRun, "of", noted)
    cache = tmp_path / "logits" / "toy.pt"
    _, first = ablation.runs_of(tmp_path, cache)
    assert asked == ["teaching", "profile", "calibration", "test"]
    _, again = ablation.runs_of(tmp_path, cache, more=lambda *_: split(5, seed=5))
    assert asked[4:] == ["more"]
    ablation.runs_of(tmp_path, cache)
    assert len(asked) == 5
    for name, part in first.items():
        assert torch.equal(part.exit_logits, again[name].exit_logits)
    parts.profile = split(10, seed=6)
    with pytest.raises(SystemExit, match="of other texts; delete it"):
        ablation.runs_of(tmp_path, cache)


def test_promises_are_kept_in_a_made_up_world_and_broken_where_nothing_certifies(rivals: None) -> None:
    guarantee = load("guarantee")
    random, num_texts = np.random.default_rng(0), 4000
    luck = random.random(num_texts)
    # Each step changes more answers than the one before; from the sixth on more than is allowed.
    changed = np.stack([luck < 0.002 * step for step in range(1, 11)])
    promise = Promise(min_agreement=0.99)
    layers = np.stack([np.full(num_texts, 12 - step, dtype=np.int8) for step in range(10)])
    none = np.zeros_like(changed)
    steps = guarantee.Steps(promise, np.linspace(0.1, 1, 10), layers, changed, none, none)
    found = guarantee.checked([steps], promise, 1500, splits=200)
    assert found["broken"] <= 0.05
    assert 0 < found["certified"] <= found["splits"] == 200
    assert found["lost"][-1] <= 1.0
    assert 7 < found["layers"] <= 12
    # A walk that is told that every step passes keeps the last one, which breaks what was promised.
    blind = guarantee.Steps(Promise(min_agreement=0.5), steps.speeds, layers, changed, none, none)
    assert guarantee.checked([blind], promise, 1500, splits=20)["broken"] == 1.0
    line = {"data": "toy", "promise": "99 % agreement", **found}
    refused = {**line, "certified": 0, "lost": None, "layers": None}
    from sections.promises import _guarantee
    from sections.raw import plain_tables

    assert "Yes: 2 of 2 promises" in _guarantee(Path(), [line, refused]).answer
    broken = _guarantee(Path(), [line, {**line, "broken": 0.5}]).answer
    assert "Not always: 1 of 2 promises" in broken
    assert "the worst in 50.0 %" in broken
    *_, rows = plain_tables([line, refused])
    assert rows.splitlines()[3].endswith("| 0 | – | – |")


def test_a_guarantee_is_looked_at_on_texts_that_nothing_was_learned_on(
    rivals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarantee = load("guarantee")
    engine = make_engine(table=False, settings=ExitSettings())
    sizes = {"teaching": 120, "profile": 400, "calibration": 700, "test": 200, "more": 100}
    runs = {}
    for seed, (name, count) in enumerate(sizes.items()):
        texts, labels = toy_task(count, seed=seed, noise=0.1)
        runs[name] = ExitRun.of(engine, Split(texts, labels=labels))
    monkeypatch.setattr(guarantee, "runs_of", lambda folder, cache, more: (engine, runs))
    monkeypatch.setattr(guarantee, "PROMISES", {"70 % agreement": Promise(min_agreement=0.7)})
    (line,) = guarantee.measured(tmp_path, tmp_path / "cache", splits=10)
    assert line["num_certifying"] == 700
    assert 700 < line["num_texts"] <= 1000  # copies of texts that were learned from are left out
    assert line["broken"] <= 0.2


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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # it reads a neighbour
    return load("gpu")


def test_the_gpu_benchmark_says_what_it_needs(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "found no CUDA device. It needs an NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "gemm,magic"])
    assert gpu.main() == 2
    assert "Unknown measurements ['magic']" in capsys.readouterr().err


def test_the_gpu_benchmark_runs_at_toy_sizes(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    model, tokenizer = gpu.random_model(vocab_size=200, **shape)
    engine = gpu.Engine(model, tokenizer, config=gpu.EngineConfig(device="cpu", backend="cuda", compile=False))
    sizes = gpu.Sizes(
        gemm=32, tokens=(128,), mean_lengths=(16, 150), attention_tokens=300, texts=(1, 20, 30), small_texts=20,
        full_texts=2, raw_texts=8, predicted_texts=5, pipeline_texts=4, pipeline_batches=(2,), rounds=1, seconds=0,
    )  # fmt: skip
    bench = gpu.Bench(engine, sizes)
    path = tmp_path / "results" / "gpu-toy.jsonl"
    for _ in range(2):  # measured again, rows are replaced
        results = gpu.Results(path, {"encoder": "toy", "device": "cpu"})
        gpu.measure_all(bench, list(gpu.KINDS), results, seconds=600)
    counts = {kind: len(rows) for kind, rows in results.rows.items()}
    # Of the staircase: one text, and twenty, with both heads, with and without graphs; twenty with both ways to miss;
    # thirty with graphs.
    assert counts == {
        "staircase": 4 + 8 + 2, "texts": 3, "full_depth": 1, "prediction": 2, "layer": 3, "attention": 5, "gemm": 4,
        "pipeline": 1,
    }  # fmt: skip
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(found) == sum(counts.values())
    numbers = [value for row in found for value in row.values() if isinstance(value, float)]
    assert all(value > 0 for value in numbers)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-len(counts) :]] == list(counts)
    assert bench.with_graphs.graphs is not None
    assert any(bucket.replays for bucket in bench.with_graphs.graphs._buckets.values())
    went_on = [row for row in results.rows["staircase"] if row["on_miss"] == "continue"]
    stopped = [row for row in results.rows["staircase"] if row["texts"] == 20 and row["on_miss"] == "stop"]
    assert len(went_on) == 4
    assert min(row["mean_exit_layer"] for row in went_on) > max(row["mean_exit_layer"] for row in stopped)


def test_what_the_gpu_benchmark_has_no_time_for_is_left_out_and_named(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu-toy.jsonl"
    clock = iter(range(100))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(clock))
    rows = {"one": [{"n": 1, "s": 2.0}, {"n": 2, "s": 3.0}], "two": [{"n": 1, "s": 2.0}], "three": [{"n": 1, "s": 2.0}]}
    for name, found in rows.items():
        monkeypatch.setitem(gpu.KINDS, name, gpu.Kind(lambda bench, found=found: iter(found), ("n",), ("s",)))
    gpu.measure_all(None, list(rows), gpu.Results(path, {"encoder": "toy"}), seconds=7)
    assert [json.loads(line)["kind"] for line in path.read_text(encoding="utf-8").splitlines()] == ["one", "one", "two"]
    assert capsys.readouterr().out.splitlines()[3:] == [
        "one (3 s): 1: s 2; 2: s 3",
        "two: what may have followed was left out, 7 seconds are over",
        "two (2 s): 1: s 2",
        "three: left out, 7 seconds are over",
    ]


def test_the_gpu_benchmark_counts_the_work_of_a_text(gpu: ModuleType) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = gpu.EngineConfig(device="cpu", backend="cuda", compile=False)
    # The work that is counted for a text of n tokens: 24 n width² of products at BERT's proportions, 4 n² width beside.
    model = gpu.random_model(vocab_size=200, intermediate_size=128, **shape)
    wide = gpu.Bench(gpu.Engine(*model, config=config), gpu.Sizes())
    assert wide.flops(np.array([10])) == 24 * 10 * 32**2 + 4 * 100 * 32


def test_the_prediction_study_runs_on_a_few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    study = load("prediction")
    engine = make_engine(table=False, settings=ExitSettings())

    def run(count: int, seed: int) -> ExitRun:
        texts, labels = toy_task(count, seed=seed, noise=0.1)
        return ExitRun.of(engine, Split(texts, labels=labels))

    texts = study.Texts(engine, run(150, 0), run(300, 1), run(30, 2), num_profile=150)
    monkeypatch.setattr(study, "PROMISES", {"drop 0.5": Promise(max_accuracy_drop=0.1)})
    kept = dict(RISKS), study.choosing.thin_out
    lines = {step: list(measure(texts, 1)) for step, measure in study.STEPS.items()}
    assert (RISKS, study.choosing.thin_out) == kept  # what a method swaps is put back
    assert [line["method"] for line in lines["promises"]] == list(study.METHODS)
    assert {step: len(found) for step, found in lines.items()} == {"criteria": 6, "promises": 8, "probe": 12, "test": 5}
    assert all(0 <= line["layers"] <= 4 for line in lines["promises"])
    json.dumps(lines)


# --- throughput: the protocol between parent and workers

FAKE = """
import os, sys, time
from worker import Outcome, Way, best_batch_size, serve

def load(job):
    print("libraries print")  # must not reach the parent's channel
    def answer(count):
        return Outcome(list(job.labels[:count]), [2] * count)
    def fail(count):
        raise ValueError("no such thing")
    def die(count):
        sys.stderr.write("out of everything")
        sys.stderr.flush()
        os._exit(7)
    def sleep(count):
        time.sleep(60)
    runs = {"answer": answer, "fail": fail, "die": die, "sleep": sleep, "again": answer}
    chosen = job.options.get("ways", list(runs))
    return [Way(name, "pipeline", "", runs[name], 0.001, 8) for name in chosen], {"fake": "1"}, {"depths": [2, 4]}

serve(load)
"""


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def fake_rival(tmp_path: Path, rivals: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts workers that run a script of a few lines."""
    from rivals.runner import Worker, worker_env
    from rivals.worker import Job

    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS / "rivals"))
    script, job = tmp_path / "fake.py", tmp_path / "job.json"
    script.write_text(FAKE, encoding="utf-8")
    Job(["a", "bb", "c"], [0, 1, 0], [], ["x", "y"], "", "", 8, 1).save(job)

    def start(name: str = "fake", **options: Any) -> Any:
        command = [sys.executable, script, "--job", job, "--options", json.dumps(options)]
        return Worker(name, command, log=tmp_path / f"{name}.log", env=worker_env(1))

    return start


def test_a_worker_loads_and_answers(fake_rival: Any) -> None:
    with fake_rival() as worker:
        loaded = worker.ask({"do": "load"}, seconds=30)
        assert [way["name"] for way in loaded["ways"]] == ["answer", "fail", "die", "sleep", "again"]
        assert loaded["versions"] == {"fake": "1"}
        outcome = worker.ask({"do": "run", "way": "answer", "count": 2}, seconds=30)
        assert outcome["answers"] == [0, 1]
        assert outcome["seconds"] >= 0
    assert not worker.alive


def test_a_worker_that_fails_dies_or_hangs_says_so(fake_rival: Any) -> None:
    from rivals.runner import RivalFailed

    with fake_rival() as worker:
        worker.ask({"do": "load"}, seconds=30)
        with pytest.raises(RivalFailed, match="ValueError: no such thing"):
            worker.ask({"do": "run", "way": "fail", "count": 1}, seconds=30)
        assert worker.ask({"do": "run", "way": "answer", "count": 1}, seconds=30)["answers"] == [0]
        with pytest.raises(RivalFailed, match="(?s)died with code 7.*out of everything"):
            worker.ask({"do": "run", "way": "die", "count": 1}, seconds=30)
        with pytest.raises(RivalFailed, match="died with code 7"):
            worker.ask({"do": "run", "way": "answer", "count": 1}, seconds=30)
    with fake_rival() as worker:
        worker.ask({"do": "load"}, seconds=30)
        with pytest.raises(RivalFailed, match="no answer within"):
            worker.ask({"do": "run", "way": "sleep", "count": 1}, seconds=0.2)
        assert not worker.alive


def test_a_race_goes_on_without_those_that_die(fake_rival: Any, tmp_path: Path) -> None:
    from contextlib import ExitStack

    from rivals.lines import Entry, Timed, lines_of

    throughput = load("throughput")
    with ExitStack() as stack:
        field = throughput.Field(tmp_path / "job.json", tmp_path, 1, stack, lambda _what, _share: None)
        for name, ways in (("sound", ["answer", "fail"]), ("mortal", ["die", "again"])):
            worker = stack.enter_context(fake_rival(name, ways=ways))
            loaded = worker.ask({"do": "load"}, seconds=30)
            field.workers.append(worker)
            field.entries += [Entry(worker, way, loaded["versions"], count=3) for way in loaded["ways"]]
        field.run_rounds(rounds=2)
        field.answer_all(3)
    # A way that fails is left out alone, a process that dies with all it had.
    assert set(field.failures) == {"fail", "mortal"}
    # Waiting on standard input takes no CPU.
    assert max(field.idle.values()) < 0.5
    lines = lines_of("toy", field.entries, field.failures, Timed([0, 1, 1], [4, 4, 8], 4))
    (ran,) = [line for line in lines if line["kind"] == "throughput"]
    assert ran["name"] == "answer"
    assert ran["accuracy"] == ran["accuracy_of_all"] == pytest.approx(2 / 3)
    assert ran["agreement"] == ran["agreement_of_all"] == 1.0
    assert ran["layer_speedup"] == 2.0
    assert [line["name"] for line in lines if line["kind"] == "failed"] == list(field.failures)


def test_calls_of_a_size_stand_beside_their_own_full_depth(rivals: None) -> None:
    from rivals.lines import Entry, Timed, lines_of

    def entry(engine: str, system: str, seconds: float) -> Any:
        about = {"engine": engine, "system": system, "texts_per_call": 8}
        way = {"name": f"{engine} {system}", "group": "budget", "about": about}
        outcome = {"seconds": seconds, "layers": [2, 2], "extra": {}}
        return Entry(None, way, {}, count=2, outcomes=[outcome])  # type: ignore[arg-type]

    entries = [
        *(entry("a", system, seconds) for system, seconds in (("packed-full", 8.0), ("geep", 4.0))),
        *(entry("b", system, seconds) for system, seconds in (("packed-full", 6.0), ("geep", 1.0))),
    ]
    found = {line["engine"]: line["speedup"] for line in lines_of("toy", entries, {}, Timed(None, [4, 4], 4))}
    assert found == {"a": 2.0, "b": 6.0}


def test_the_strongest_rival_is_about_as_accurate_and_none_of_ours(rivals: None) -> None:
    def run(name: str, group: str, accuracy: float | None, rate: float) -> dict[str, Any]:
        return {"kind": "throughput", "name": name, "group": group, "accuracy": accuracy, "throughput": rate}

    from sections.race import strongest

    slow, fast = run("HF pipeline", "pipeline", 0.9, 10.0), run("fast", "openvino-int8", 0.895, 30.0)
    others = [run("wrong", "onnxruntime-int8", 0.85, 40.0), run("not told", "infinity", None, 50.0)]
    ours = [run(group, group, 0.9, 60.0) for group in ("static", "geep", "shallow", "table-first", "lexical")]
    assert strongest([slow, fast, *others, *ours]) is fast
    assert strongest([slow, *others]) is slow
    assert strongest(others) is None
    # Where all texts are answered, these tell and not the few that were timed.
    lucky = run("lucky", "openvino-int8", 0.95, 90.0) | {"accuracy_of_all": 0.85}
    assert strongest([slow | {"accuracy_of_all": 0.88}, fast | {"accuracy_of_all": 0.875}, lucky])["name"] == "fast"


def test_ways_of_uneven_rounds_are_measured_again(
    rivals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import ExitStack
    from types import SimpleNamespace

    from rivals.lines import Entry

    throughput = load("throughput")
    seconds = {"even": iter([1.0, 1.1, 1.2]), "uneven": iter([1.0, 2.0, 1.0, 3.0, 3.0, 3.0])}

    def answers(_worker: Any, request: dict[str, Any], **_patience: float) -> dict[str, float]:
        return {"seconds": next(seconds[request["way"]])}

    monkeypatch.setattr(throughput, "IdleWatch", lambda _workers: SimpleNamespace(ask=answers, worst={}))
    field = throughput.Field(tmp_path / "job.json", tmp_path, 1, ExitStack(), lambda _what, _share: None)
    for name in seconds:
        way = {"name": name, "group": "geep", "about": {}, "seconds_per_text": 1.0, "seconds_per_run": 0.0}
        field.entries.append(Entry(SimpleNamespace(name=name, alive=True), way, {}, count=1))  # type: ignore[arg-type]
    field.run_rounds(rounds=3)
    assert {entry.name: (entry.seconds(), entry.was_uneven) for entry in field.entries} == {
        "even": (1.1, False),
        "uneven": (3.0, True),
    }


def test_every_way_gets_the_same_time(rivals: None, tmp_path: Path) -> None:
    from contextlib import ExitStack

    from rivals.lines import Entry

    def entry(per_text: float, per_run: float = 0.0, **about: Any) -> Any:
        way = {"seconds_per_text": per_text, "seconds_per_run": per_run, "about": about}
        return Entry(None, way, {})  # type: ignore[arg-type]

    def counts(available: int, seconds: float) -> list[int]:
        throughput = load("throughput")
        field = throughput.Field(tmp_path / "job.json", tmp_path, 1, ExitStack(), lambda _what, _share: None)
        field.entries = [entry(0.1), entry(0.01), entry(0.0, per_run=5.0), entry(0.1, texts_per_call=2048)]
        field.share_out(available, 2, seconds)
        return [field.entries[place].count for place in (0, 1, 3)]

    # Two rounds of 45 s, 5 of them for what does not grow with the texts: 20 s for each of two ways.
    assert counts(5000, 90.0) == [200, 2000, 2048]
    assert counts(100, 90.0) == [100, 100, 100]
    assert counts(5000, 1.0) == [64, 64, 2048]


def test_a_rival_that_cannot_load_is_left_out(rivals: None, tmp_path: Path) -> None:
    from contextlib import ExitStack

    throughput = load("throughput")
    (tmp_path / "job.json").write_text("{}", encoding="utf-8")
    with ExitStack() as stack:
        field = throughput.Field(tmp_path / "job.json", tmp_path, 1, stack, lambda _what, _share: None)
        field.enter("peak", "peak.py")
    assert "TypeError" in field.failures["peak"]
    assert not field.entries


def test_engines_are_read_with_the_folders_that_belong_to_them(rivals: None) -> None:
    throughput = load("throughput")
    choices = throughput.engine_choices("packed:float32, packed:int8=runs-int8/{data}", "trec", Path("runs/trec"))
    assert [choice.name for choice in choices] == ["packed float32", "packed int8"]
    assert [choice.folder for choice in choices] == [Path("runs/trec"), Path("runs-int8/trec")]
    with pytest.raises(ValueError, match="backend:dtype"):
        throughput.engine_choices("int8", "trec", Path("runs/trec"))


def test_the_cut_model_is_the_shallowest_as_good_as_ours(rivals: None) -> None:
    static_depth = load("throughput").static_depth
    about = {"depths": [1, 2, 3, 4], "quality": {"1": 0.5, "2": 0.8, "3": 0.9, "4": 0.9}, "geep_quality": 0.8}
    assert static_depth(about) == 2
    assert static_depth({**about, "geep_quality": 0.95}) == 3
    assert static_depth(None) is None


def test_the_shallow_model_costs_what_ours_does(rivals: None) -> None:
    depth = load("throughput").shallow_depth
    assert [depth({"depths": [1, 2, 4], "mean_exit_layer": layers}) for layers in (0.2, 1.0, 2.1)] == [1, 1, 3]
    assert [depth({"depths": [4], "mean_exit_layer": layers}) for layers in (0.0, 3.5)] == [None, None]
    assert depth(None) is depth({"depths": [4]}) is None


def test_padded_batches_hold_every_text_once_sorted_by_length(rivals: None) -> None:
    from rivals.worker import padded_batches

    ids = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], []]
    seen: dict[int, list[int]] = {}
    widths = []
    for rows, padded, mask in padded_batches(ids[:4], 2, pad=1):
        widths.append(padded.shape[1])
        assert (padded[mask == 0] == 1).all()
        seen |= {int(row): padded[at][mask[at] == 1].tolist() for at, row in enumerate(rows)}
    assert seen == dict(enumerate(ids[:4]))
    assert widths == [2, 4]


def test_the_pipeline_cut_to_its_first_layers_answers_as_the_exit_there(
    rivals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "rivals"))
    hf = load("rivals/hf")
    model = make_model()
    ids = torch.arange(6, 18).view(2, 6)
    with torch.no_grad():
        wanted = model(ids, exit_layer=2).logits
        found = hf.first_layers(model, 2)(ids).logits
        untouched = model(ids, exit_layer=3).logits
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(untouched, wanted)


def test_operations_are_those_of_the_products(rivals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "rivals"))
    flops = load("rivals/geep_engine").encoder_flops
    hidden, inner, lengths = 4, 16, (3, 5)
    linears = sum(2 * n * (4 * hidden * hidden + 2 * hidden * inner) for n in lengths)
    attention = sum(2 * 2 * n * n * hidden for n in lengths)
    assert flops(np.array(lengths), 2, hidden, inner) == 2 * (linears + attention)


# --- scaling


def test_scaling_measures_a_tiny_model_and_a_file(rivals: None, tmp_path: Path) -> None:
    scaling = load("scaling")
    case = scaling.RandomCase("layers", layers=2, width=32, length=8, tokens=64, every_exit=True)
    measured = scaling.time_random(scaling.random_engine(case), case, repeats=1)
    assert measured["value"] == 2
    assert measured["tokens_per_second"] == pytest.approx(8 * measured["throughput"])
    found = scaling.time_file(make_engine(), random_texts(5), 12, tmp_path)
    assert found["value"] == 12
    assert len((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 12


def test_scaling_goes_on_with_what_is_missing(rivals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = load("scaling")
    asked: list[dict[str, Any]] = []

    def fake(case: dict[str, Any], _args: Any) -> dict[str, Any]:
        asked.append(case)
        return {"throughput": 1.0}

    monkeypatch.setattr(scaling, "run_child", fake)
    arguments = ["scaling.py", "--results", str(tmp_path), "--model-dir", "runs/toy", "--max-texts", "10000"]
    monkeypatch.setattr(sys, "argv", arguments)
    scaling.main()
    # A text a second: ten thousand of them are above the budget of ten minutes.
    assert [case["texts"] for case in asked if "texts" in case] == [1000]
    first = len(asked)
    scaling.main()
    assert len(asked) - first <= 1


# --- families


def test_families_measures_what_is_missing_and_the_report_tells_it(
    rivals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    families = load("families")
    tiny = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    shapes = {name: families.Shape(name, 2, tiny) for name in ("albert", "modernbert")}
    monkeypatch.setattr(families, "SHAPES", shapes)
    dtypes = ("float32", "bfloat16") if families.multiplies_bfloat16() else ("float32",)
    arguments = ["--tokens", "300", "--rounds", "2", "--results", str(tmp_path)]
    families.main(arguments)
    lines = [json.loads(line) for line in (tmp_path / "families.jsonl").read_text().splitlines()]
    assert [(line["model"], line["dtype"]) for line in lines] == [(name, dtype) for name in shapes for dtype in dtypes]
    assert all(line["tokens"] >= 300 and len(line["gain_of_rounds"]) == 2 for line in lines)
    assert all(line["apart"] < (1e-4 if line["dtype"] == "float32" else 0.1) for line in lines)
    capsys.readouterr()
    families.main(arguments)
    assert not capsys.readouterr().out
    from sections.machines import _families

    parts = str(_families(lines))
    assert all(f"| {line['model']}, {line['dtype']} |" in parts for line in lines)


# --- figures and report


def fake_results(folder: Path) -> None:
    """Tiny results of every kind that the report and the figures read."""
    machine = {"device": "a machine", "threads": 1, "dtype": "float32", "torch": "2"}
    about = {
        "kind": "about",
        "data": "toy",
        "texts": 64,
        "rounds": 1,
        "machine": machine,
        "load_before": 0.1,
        "idle_cpu": {"hf": 0.01},
    }

    def run(name: str, group: str, rate: float, **changes: Any) -> dict[str, Any]:
        fields = {
            "kind": "throughput",
            "data": "toy",
            "name": name,
            "group": group,
            "engine": None,
            "setting": "",
            "batch_size": 8,
            "versions": {"torch": "2"},
            "texts": 64,
            "accuracy": 0.5,
            "agreement": 0.75,
            "not_comparable": None,
            "mean_exit_layer": 3.0,
            "layer_speedup": 4.0,
            "throughput": rate,
            "throughput_low": rate,
            "throughput_high": rate,
            "ids_throughput": None,
            "over_pipeline": rate / 10,
            "over_full": None,
        }
        return fields | changes

    budget = {"kind": "budget", "data": "toy", "texts": 640, "throughput": 2.0, "full_throughput": 1.0, "speedup": 2.0}
    throughput = [
        about,
        run("HF pipeline", "pipeline", 10.0),
        run("other", "sentence-transformers", 11.0, accuracy=None, not_comparable="the head is another"),
        run("packed int8: GEEP", "geep", 77.0, engine="packed int8"),
        run("ONNX Runtime int8", "onnxruntime-int8", 33.0),
        *(
            {**budget, "system": system, "texts_per_call": size, "layer_speedup": 2.5, "kept": 0.8}
            for system in ("geep", "fastbert")
            for size in (32, 128)
        ),
        {
            "kind": "parts",
            "data": "toy",
            "engine": "packed int8",
            "line": "geep",
            "shares": {"tokenise": 0.1, "plan": 0.1, "schedule": 0.1, "run": 0.7},
        },
        {"kind": "peak", "data": "toy", "dtype": "int8", "gflops": {"1x1x1": 321.0}},
        {
            "kind": "utilisation",
            "data": "toy",
            "engine": "packed int8",
            "tokens": [25, 30],
            "texts": 8,
            "throughput": 5.0,
            "gflops": 100.0,
            "peak_gflops": 321.0,
            "utilisation": 0.31,
        },
        {"kind": "failed", "data": "toy", "name": "infinity", "why": "it could not be installed"},
    ]
    grown = {"kind": "scaling", "machine": machine, "loaded_mib": 9.0, "peak_mib": 1234.0, "mean_exit_layer": 1.5}
    scaling = [
        {**grown, "axis": axis, "value": value, "throughput": 8.0, "tokens_per_second": 80.0, "every_exit": False}
        for axis in ("texts", "length", "layers", "labels")
        for value in (2, 4)
    ]
    others = {"prediction": [{"step": "probe", "data": "toy", "depth": 2, "costs": [1]}]}
    for name, lines in {"throughput-toy": throughput, "scaling": scaling, **others}.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def test_every_result_is_drawn(rivals: None, tmp_path: Path) -> None:
    fake_results(tmp_path)
    names = [path.name for path in load("plot").draw_all(tmp_path)]
    assert names == ["throughput-toy.png", "budget-toy.png", "utilisation-toy.png", "scaling.png"]
    certify(tmp_path)
    kept = {"data": "toy", "promise": "99 % agreement", "allowed": 0.01, "confidence": 0.95, "broken": 0.0}
    promises = [kept | {"lost": lost} for lost in ([0.1, 0.2, 0.3], None)]
    (tmp_path / "guarantee.jsonl").write_text("".join(json.dumps(line) + "\n" for line in promises), "utf-8")
    names = [path.name for path in load("plot").draw_all(tmp_path)]
    assert names[3:] == ["races.png", "scaling.png", "guarantee.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_a_table_is_learned_from_made_up_texts_and_reported(rivals: None, tmp_path: Path) -> None:
    bench = load("table_scale")
    case = {"texts": 400, "length": 8, "labels": 3, "depths": 4, "vocabulary": 60, "order": 2}
    measured = bench.measure(**case)
    assert list(measured["steps"]) == ["texts", "table", "exit 0", "counts", "fitted", "prediction"]
    assert measured["agreement_on_texts_learned_from"] > 0.8
    line = {"kind": "table_scale", **case, **measured, "machine": bench.machine()}
    (tmp_path / "table_scale.jsonl").write_text(json.dumps(line) + "\n")
    from sections.raw import raw_pages

    page = dict(raw_pages(tmp_path))["growth"]
    assert "texts 400" in page
    assert "| exit 0 | " in page


def test_the_report_tells_what_was_measured_and_what_was_not(rivals: None, tmp_path: Path) -> None:
    from sections.machines import NO_GPU
    from sections.raw import raw_pages

    report = load("report")
    empty = report.results_page(tmp_path)
    assert re.findall("^## (.*)$", empty, flags=re.MULTILINE) == ["And on a GPU?"]
    assert NO_GPU in empty
    fake_results(tmp_path)
    page, raw = report.results_page(tmp_path), dict(raw_pages(tmp_path))
    assert list(raw) == ["throughput-toy", "prediction", "growth"]
    for piece in (
        "| packed int8: GEEP, batch 8 | – | 50.00 | 75.00 | 4.00x | 64 | 77.0 |",
        "other: no accuracy, since the head is another.",
        "infinity was left out: it could not be installed.",
        "| int8 | 321 |",
    ):
        assert piece in raw["throughput-toy"]
    assert "| 4 | 8 | 1.50 | 9 | 1234 |" in page
    assert "2 times the texts take 1.00 times the memory, at 1.00 times the speed." in page
    assert "# Prediction of exit layers" in raw["prediction"]
    looked_up = {"kind": "hash_table", "operation": "find", "absent_share": 0.5, "capacity": 4096, "load_factor": 0.5}
    rates = {"triton": 2.5e9, "searchsorted": 1e9, "dict": 4e6}
    lines = [
        {**looked_up, "device": "NVIDIA", "threads": 2, "method": name, "per_second": rate}
        for name, rate in rates.items()
    ]
    (tmp_path / "hash_table-nvidia.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "our table finds 2.50x (NVIDIA) as many keys a second" in report.results_page(tmp_path)
    assert "| find, 50 % absent | 4,096 | 0.5 | 2,500 | 1,000 | 4 |" in dict(raw_pages(tmp_path))["hash-table"]


def certify(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Let the engine of the tiny results be certified; returns the lines of its race."""
    kept = {"kind": "accuracy", "data": "toy", "engine": "packed int8", "full_accuracy": 0.5, "accuracy": 0.5}
    kept |= {"layer_speedup": 2.0, "agreement": 0.9, "lexical_share": 0.1, "constant_accuracy": {"3": 0.5}}
    kept |= {"certified": True, "quantile": 0.05, "texts": 900}
    with (folder / "accuracy.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(kept | changes) + "\n")
    return [json.loads(line) for line in (folder / "throughput-toy.jsonl").read_text("utf-8").splitlines()]


def test_what_was_let_go_or_is_not_certified_is_in_the_results_and_not_in_the_summary(
    rivals: None, tmp_path: Path
) -> None:
    from sections.race import race_sections, readme_table
    from sections.raw import raw_pages

    fake_results(tmp_path)
    lines = certify(tmp_path)
    certify(tmp_path, engine="gone int8")
    certify(tmp_path, engine="packed float32", certified=False)
    ours = next(line for line in lines if line.get("group") == "geep")
    with (tmp_path / "throughput-toy.jsonl").open("a", encoding="utf-8") as file:
        for engine in ("gone int8", "packed float32"):
            file.write(json.dumps(ours | {"engine": engine, "name": f"{engine}: GEEP"}) + "\n")
    (section,) = race_sections(tmp_path)
    for page in (str(section), readme_table(tmp_path)):
        assert "| toy | int8 |" in page
        assert "ONNX Runtime int8 |" in page
        assert "2.33x" in page
        assert "gone" not in page
        assert "| toy | float32 |" not in page
    assert section.answer.startswith("Yes: 7.70x Hugging Face's pipeline, 2.33x the strongest rival")
    assert "Nothing could be certified, and the full model answers: toy in float32." in section.answer
    page = dict(raw_pages(tmp_path))["throughput-toy"]
    assert "| gone int8: GEEP, batch 8 |" in page
    assert "\n\ngone int8: a backend that was let go.\n\n" in page
    assert "packed int8: a backend" not in page


def test_an_answer_says_no_where_the_numbers_do(rivals: None, tmp_path: Path) -> None:
    from sections.race import race_sections

    fake_results(tmp_path)
    lines = certify(tmp_path, accuracy=0.49)
    slower = [line | ({"throughput": 20.0} if line.get("group") == "geep" else {}) for line in lines]
    (tmp_path / "throughput-toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in slower), "utf-8")
    (section,) = race_sections(tmp_path)
    assert section.answer.startswith("Not always: ")
    assert "lost more on: toy in int8 1.00, in 0 of these 1 by more than chance may be." in section.answer
    assert "| 49.00 (-1.00 ± 2.06) |" in section.parts[1]
    certify(tmp_path, accuracy=0.4)
    (section,) = race_sections(tmp_path)
    assert "lost more on: toy in int8 10.00, in 1 of these 1 by more than chance may be." in section.answer


def test_an_interval_holds_for_what_is_drawn(rivals: None) -> None:
    from sections.race import chance_of

    random, held = np.random.default_rng(0), 0
    for _ in range(300):
        # Of 2,000 texts 6 % change their answer: 3 % from right to wrong, 2 % back, of 1 % both are wrong.
        change = random.choice([-1, 1, 0, 2], p=[0.03, 0.02, 0.94, 0.01], size=2000)
        gain = float((change == 1).mean() - (change == -1).mean())
        line = {"accuracy": 0.8 + gain, "full_accuracy": 0.8, "texts": 2000, "agreement": float((change == 0).mean())}
        held += abs(100 * gain + 1.0) <= chance_of(line)
    assert 0.95 <= held / 300 < 1


def test_the_summary_sets_other_ways_to_be_cheap_beside_ours(rivals: None, tmp_path: Path) -> None:
    from sections.race import race_sections

    fake_results(tmp_path)
    ours = next(line for line in certify(tmp_path) if line.get("group") == "geep")
    assert len(list(race_sections(tmp_path))) == 1
    others = [
        ours | {"name": "TF-IDF, logistic regression", "group": "lexical", "throughput": 770.0, "accuracy": 0.4},
        ours | {"name": "3 layers, packed int8", "group": "shallow", "throughput": 38.5, "accuracy_of_all": 0.45},
        ours | {"name": "3 layers, packed bfloat16", "group": "shallow", "throughput": 50.0},
        *(
            ours | {"name": name, "group": "table-first", "throughput": rate}
            for name, rate in (("a", 7.7), ("b", 11.0))
        ),
    ]
    path = tmp_path / "throughput-toy.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in others)
    _, section = race_sections(tmp_path)
    row = section.parts[1].splitlines()[-1]
    assert row == "| toy | int8 | 50.00 % | 3 layers: 45.00 %, 2.00x | 50.00 %, 7.00x | 40.00 %, 0.10x |"
    assert section.answer.startswith("Yes: none of them is both faster and as accurate.")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(ours | {"group": "fastbert", "throughput": 80.0, "accuracy": 0.6}) + "\n")
    *_, section = race_sections(tmp_path)
    assert section.answer.startswith("Not always: 1 of them is both faster and as accurate.")


# --- calls of few texts


def test_a_small_call_is_taken_apart(rivals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = load("calls")
    monkeypatch.setattr(calls, "SECONDS", 60)  # all calls
    settings = ExitSettings(speed=0.2, on_miss="continue", quantile=0.3, lexical_exit=True)
    engine = make_engine(settings=settings)
    texts, _ = toy_task(40, seed=1)
    asked: list[int] = []

    def other(call: list[str]) -> None:
        asked.append(len(call))

    lines = list(calls.measured(engine, other, "toy", texts, [1, 8]))
    assert [line["texts_per_call"] for line in lines] == [1, 8]
    assert set(asked) == {1, 8}
    for line in lines:
        steps = dict(line["steps_ms"])
        whole = steps.pop("whole")
        assert {"tokenise", "table", "embed", "layers", "exits", "rest"} <= set(steps)
        assert all(value > 0 for value in steps.values())
        assert sum(steps.values()) <= whole
    alone, together = lines
    layers = engine.predict_columns(texts).exit_layers
    assert alone["mean_layers"] == alone["deepest"] == together["mean_layers"] == layers.mean()
    assert together["deepest"] == layers.reshape(5, 8).max(1).mean()
    saved = 1 - layers.mean() / engine.depths[-1]
    assert alone["kept"] == pytest.approx((1 - alone["ms"]["certified"] / alone["ms"]["full"]) / saved)
    # What is measured again takes the place of what was there; the lines of others stay.
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [{**alone, "data": "other"}, *lines]))
    calls._forget(path, alone)
    assert [json.loads(line)["data"] for line in path.read_text().splitlines()] == ["other"]


def test_small_calls_are_told_of(rivals: None, tmp_path: Path) -> None:
    from sections.calls import small_call_sections

    assert not list(small_call_sections(tmp_path))
    line = {
        "kind": "call", "data": "toy", "dtype": "int8", "texts_per_call": 1, "tokens_per_call": 9.0,
        "mean_layers": 3.0, "deepest": 3.0, "layers": 12, "ms": {"certified": 2.0, "full": 4.0, "pipeline": 8.0},
        "kept": 2 / 3, "steps_ms": {"layers": 1.0, "embed": 0.2, "rest": 0.5, "whole": 2.0},
        "machine": {"device": "a CPU", "threads": 2, "torch": "2"},
    }  # fmt: skip
    slow = {**line, "texts_per_call": 8, "ms": {"certified": 5.0, "full": 4.0, "pipeline": 8.0}, "kept": -1 / 3}
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (line, slow)))
    fast, apart = small_call_sections(tmp_path)
    assert "2.00 of 4.00, 4.00x, 67 %" in str(fast)
    assert "67 % at 1, -33 % at 8 texts a call becomes time" in fast.answer
    assert "Slower than full depth are 1 of 2" in fast.answer
    assert "layers take 50 % of the time, exits 0 %" in apart.answer
    assert "and what is none of these 35 %; in calls of 8" in apart.answer


# --- the drawing of a window


def test_a_window_is_recorded_as_it_runs(rivals: None, tmp_path: Path) -> None:
    staircase = load("staircase")
    settings = ExitSettings(speed=0.2, on_miss="continue", quantile=0.3, lexical_exit=True)
    engine = make_engine(settings=settings, config=EngineConfig(device="cpu", max_batch_tokens=64))
    texts, labels = toy_task(60, seed=1)
    about, *lines = staircase.window(engine, Split(texts, labels=labels))
    assert about["texts"] == len(lines) == 60
    assert all(line["exit"] >= line["predicted"] for line in lines)
    assert sum(line["exit"] for line in lines) == engine.predict_columns(texts).exit_layers.sum()
    places = [line["staircase"] for line in lines]
    assert len(set(places)) > 2
    for place in set(places):
        members = [line for line in lines if line["staircase"] == place]
        predicted = [line["predicted"] for line in members]
        assert predicted == sorted(predicted, reverse=True)
        if place is None:
            assert set(predicted) == {0}
        else:
            assert min(predicted) > 0
            assert sum(line["tokens"] for line in members) <= 64
    (tmp_path / "staircase.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [about, *lines]))
    assert [path.name for path in load("plot").draw_all(tmp_path)] == ["staircase.png"]


def test_every_step_of_the_reproduction_is_a_script_that_takes_these_arguments(rivals: None) -> None:
    reproduce = load("reproduce")
    values = {"data": "a b/data", "model": "m", "work": "a b/work", "runs": "a b/work/runs", "jobs": "2"}
    seen = set()
    for step in reproduce.STEPS.values():
        for command in step.commands:
            script, *arguments = reproduce.filled(command, values)
            seen.add(script)
            source = (reproduce.HERE / script).read_text("utf-8")
            for flag in (word for word in arguments if word.startswith("--")):
                assert f'"{flag}"' in source, f"{script} {flag}"
            assert not any("{data}" in word and "int8" not in word for word in arguments)
    assert {"certified.py", "throughput.py", "report.py"} <= seen
    assert set(reproduce.RACED) <= set(load("study").STUDY)
