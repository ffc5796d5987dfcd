"""The comparison with the rivals: its arithmetic, its rows, its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FRESH, HELDOUT, TRAIN, make_engine, random_texts

from geep.backends import int8
from geep.calibration import ExitRun, Outcomes, profile, quantise
from geep.data import Split
from geep.engine import Engine
from geep.evaluation import BATCH_SIZES, EvaluationReport, ShrinkingBatch, draw, evaluate, headline, stable_oracle
from geep.evaluation.rivals import _run_at as run_at
from geep.exits import ExitProfile, follow

GROUPS = {
    "pipeline",
    "pipeline-sorted",
    "full",
    "lexical",
    "constant",
    "fastbert",
    "random",
    "geep-stop",
    "geep-continue",
    "oracle",
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def texts() -> Split:
    made = random_texts(40, seed=9)
    return Split(made, labels=np.arange(40) % 3)


@pytest.fixture(scope="module")
def report(engine: Engine, texts: Split) -> EvaluationReport:
    return evaluate(engine, texts, max_texts=12, rounds=1, sweep=(0.8,))


def test_every_rival_has_a_row(report: EvaluationReport, engine: Engine) -> None:
    assert {row.group for row in report.rows} == GROUPS
    assert sum(row.group == "constant" for row in report.rows) == len(engine.depths) - 1
    assert sum(row.group == "geep-continue" for row in report.rows) == 2
    assert len({row.name for row in report.rows}) == len(report.rows)
    assert report.num_texts == 40
    assert report.num_timed == 12


def test_quality_is_what_the_engine_really_answers(report: EvaluationReport, engine: Engine, texts: Split) -> None:
    answers = engine.predict(texts.texts)
    full = engine.predict(texts.texts, speed=0.0)
    assert texts.labels is not None
    truth = [engine.label_names[label] for label in texts.labels.tolist()]
    row = report.row("geep-continue")
    assert row.accuracy == pytest.approx(np.mean([a.label == t for a, t in zip(answers, truth, strict=True)]))
    assert row.agreement == pytest.approx(np.mean([a.label == f.label for a, f in zip(answers, full, strict=True)]))
    assert row.mean_exit_layer == pytest.approx(np.mean([answer.exit_layer for answer in answers]))
    assert report.row("full").agreement == 1.0
    assert report.row("full").layer_speedup == 1.0
    assert report.row("full").ratio == pytest.approx(1.0)


def test_the_oracle_answers_as_the_full_model_with_the_fewest_layers(report: EvaluationReport) -> None:
    assert report.row("oracle").agreement == 1.0
    profile = ExitProfile(
        (1, 2, 3),
        np.zeros((3, 3), dtype=np.float32),
        np.array([[True, True, True], [True, False, True], [False, True, True]]),
        None,
    )
    assert stable_oracle(profile).tolist() == [0, 2, 1]
    # In 8 bits even the last answer may differ from the full model's: then no exit has it for good.
    quantised = replace(profile, agrees=np.array([[True, True, False], [False, False, False], [False, True, True]]))
    assert stable_oracle(quantised).tolist() == [2, 2, 1]


def test_what_is_timed_answers_as_what_the_quality_was_taken_from(
    report: EvaluationReport, engine: Engine, texts: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [row.verified for row in report.rows] == [1.0] * len(report.rows)
    real = Engine.predict
    # A rival that is fast because it does something else is found out.
    monkeypatch.setattr(Engine, "predict", lambda self, texts, **options: real(self, texts[::-1], **options))
    cheating = evaluate(engine, texts, max_texts=12, rounds=1, sweep=())
    assert {row.group for row in cheating.rows if row.verified < 1} == {"full", "geep-stop", "geep-continue"}


@pytest.mark.skipif(not int8.is_available(), reason="this build of torch has no oneDNN")
def test_each_way_is_judged_and_timed_in_one_dtype(trained: Engine) -> None:
    """Of a quantised engine too: rivals that know no quantisation are float32 in quality as in time."""
    engine = profile(quantise(trained, TRAIN), TRAIN, HELDOUT).engine
    engine = engine.replace(settings=replace(engine.settings, speed=0.1, check_layers=(2,)))
    found = evaluate(engine, FRESH, max_texts=40, rounds=1, sweep=())
    assert FRESH.labels is not None
    plain = trained.in_float32().predict_columns(FRESH.texts)
    deployed = engine.predict_columns(FRESH.texts)
    for row in found.rows:
        assert row.verified == 1.0, row.name
        is_plain = row.group in ("pipeline", "pipeline-sorted", "fastbert")
        assert row.dtype == ("float32" if is_plain else "int8"), row.name
    assert found.row("pipeline").accuracy == pytest.approx((plain.label_ids == FRESH.labels).mean())
    assert found.row("pipeline").agreement == 1.0
    assert found.ours.accuracy == pytest.approx((deployed.label_ids == FRESH.labels).mean())
    assert found.ours.agreement == pytest.approx((deployed.label_ids == plain.label_ids).mean())
    assert headline(found).accuracy_drop == pytest.approx(
        (plain.label_ids == FRESH.labels).mean() - (deployed.label_ids == FRESH.labels).mean()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"on_miss": "stop", "quantile": 0.9, "check_layers": (1, 3), "lexical_exit": True},
        {"on_miss": "stop", "quantile": 0.05},
        {"on_miss": "continue", "quantile": 0.05, "check_layers": (2,), "lexical_exit": True},
        {"on_miss": "continue", "criterion": "margin", "lexical_exit": False},
    ],
)
def test_what_is_deployed_is_what_is_measured(changes: dict[str, Any], engine: Engine, texts: Split) -> None:
    engine = engine.replace(settings=replace(engine.settings, speed=0.6, **changes))
    found = evaluate(engine, texts, max_texts=40, rounds=1, sweep=(0.8,))
    answers = engine.predict_columns(texts.texts)
    full = engine.predict_columns(texts.texts, speed=0.0)
    assert found.ours.group == f"geep-{changes['on_miss']}"
    assert found.ours.mean_exit_layer == pytest.approx(answers.exit_layers.mean())
    assert found.ours.lexical_share == pytest.approx((answers.exit_layers == 0).mean())
    assert found.ours.agreement == pytest.approx((answers.label_ids == full.label_ids).mean())
    assert [row.deployed for row in found.rows].count(True) == 1
    assert {row.verified for row in found.rows} == {1.0}
    assert {row.setting for row in found.rows if row.group == found.ours.group} == {"speed 0.6", "speed 0.8"}


def test_random_depths_have_the_histogram_of_stop(report: EvaluationReport) -> None:
    assert report.row("random").mean_exit_layer == pytest.approx(report.row("geep-stop").mean_exit_layer)


@pytest.mark.parametrize("size", BATCH_SIZES)
def test_the_shrinking_batch_answers_as_fastberts_rule_says(engine: Engine, texts: Split, size: int) -> None:
    run = ExitRun.of(engine, texts)
    profile = Outcomes(engine, run).profile(engine.settings).from_depth(1)
    columns = follow(profile, np.zeros(40, dtype=np.int64), speed=engine.settings.speed, on_miss="continue")
    expected = run.exit_logits[columns, np.arange(40)].argmax(-1)
    assert ShrinkingBatch.of(engine)(texts.inputs, size).argmax(-1).tolist() == expected.tolist()


def test_rivals_at_given_depths_run_to_exactly_those(engine: Engine, texts: Split) -> None:
    assert engine.settings.on_miss == "continue"
    layers = np.resize(np.asarray(engine.depths), 40)
    assert run_at(engine, texts.inputs, layers).exit_layers.tolist() == layers.tolist()


def test_pairs_and_unlabelled_texts_can_be_evaluated(engine: Engine) -> None:
    split = Split(random_texts(10, seed=1), text_pairs=random_texts(10, seed=2))
    found = evaluate(engine, split, max_texts=6, rounds=1, sweep=())
    assert all(row.accuracy is None for row in found.rows)
    assert headline(found).accuracy_drop is None


def test_the_headline_compares_with_rivals_at_least_as_good(report: EvaluationReport) -> None:
    best = headline(report)
    ours, full = report.row("geep-continue"), report.row("full")
    assert best.over_full == pytest.approx(ours.throughput / full.throughput)
    rivals = [row for row in report.rows if row.group in ("constant", "full")]
    assert ours.accuracy is not None
    chosen = next((row for row in rivals if row.name == best.constant_depth), full)
    if any(row.accuracy is not None and row.accuracy >= ours.accuracy for row in rivals):
        assert chosen.accuracy is not None
        assert chosen.accuracy >= ours.accuracy


def test_reports_are_saved_as_json_lines_and_a_figure(report: EvaluationReport, tmp_path: Path) -> None:
    report.save(tmp_path / "report.jsonl", data="toy")
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["kind"] for line in lines].count("run") == len(report.rows)
    assert [line["predictor"] for line in lines if line["kind"] == "predictor"] == ["fitted", "length", "constant"]
    assert all(line["data"] == "toy" and line["machine"]["torch"] for line in lines)
    draw(report, tmp_path / "report.png", title="toy")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_planned_columns_are_the_plan(engine: Engine, texts: Split) -> None:
    outcomes = Outcomes(engine, ExitRun.of(engine, texts))
    layers = engine.planner.plan(outcomes.run.batch, engine.settings).predicted_layers
    assert np.array_equal(np.asarray((0, *engine.depths))[outcomes.planned(engine.settings)], layers)


def test_progress_ends_where_it_said_it_would(engine: Engine, texts: Split) -> None:
    told: dict[str, list[tuple[int, int | None]]] = {}
    evaluate(
        engine,
        texts,
        max_texts=4,
        rounds=1,
        sweep=(),
        progress=lambda what, *done: told.setdefault(what, []).append(done),
    )
    assert len(told) == 3
    for steps in told.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == steps[-1][1]


def test_what_cannot_be_compared_is_refused(engine: Engine, texts: Split) -> None:
    with pytest.raises(ValueError, match="No texts to evaluate"):
        evaluate(engine, Split([]))
    with pytest.raises(ValueError, match="speed is 0"):
        evaluate(engine.replace(settings=replace(engine.settings, speed=0.0)), texts)
    with pytest.raises(ValueError, match="no exit table"):
        evaluate(make_engine(table=False), texts)
