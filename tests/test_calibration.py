"""What calibration reports is what the engine then does: same exits, same risk, on a model trained here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    FRESH,
    HELDOUT,
    TRAIN,
    VOCAB,
    make_engine,
    make_model,
    random_texts,
    unlabelled,
)
from numpy.typing import NDArray
from scipy.stats import spearmanr

from geep.backends import TokenBatch
from geep.calibration import (
    TABLE_SPEEDS,
    TRIAL_SPEEDS,
    Calibration,
    ExitRun,
    Outcomes,
    ProfileResult,
    Route,
    calibrate,
    choose,
    layer_quality,
    learn_settings,
    profile,
    save_refusal,
    try_speed,
)
from geep.calibration.ordering import WALK_SPEEDS
from geep.calibration.profiling import LABEL_SHARE, label_targets
from geep.data import Split
from geep.engine import Engine, EngineConfig, ExitSettings
from geep.exits import AGREEMENT, CRITERIA, AgreementScore, ExitProfile, OnMiss, follow
from geep.folder import CalibrationFile
from geep.predictor import PREDICTORS
from geep.promise import ConstantModelError, Promise, TooFewTextsError, Trial, Walk, walk
from geep.scheduler import CostModel

PROMISES = {"drop": Promise(max_accuracy_drop=0.02), "agreement": Promise(min_agreement=0.98)}


# Profiles


def test_a_profile_makes_a_table_and_settings(trained: Engine, profiled: ProfileResult) -> None:
    engine = profiled.engine
    assert trained.predictor is None  # the engine that was given is left as it was
    assert engine.predictor is not None
    assert engine.predictor.depths == engine.depths
    assert engine.predictor.num_labels == 3
    assert engine.settings.speed == 0
    assert engine.settings.criterion == AGREEMENT
    assert engine.settings.temperatures.keys() == {0, 1, 2, 3, 4}
    assert engine.settings.agreement.keys() == {0, 1, 2, 3}
    assert len(profiled.quality) == len(PREDICTORS) * len(TABLE_SPEEDS)
    assert [speed for speed, *_ in profiled.mean_exit_layers] == list(TABLE_SPEEDS)


def test_the_predictor_that_ranks_best_is_taken(trained: Engine) -> None:
    # By agreement all of these texts leave at the first exit, which leaves nothing to foretell.
    profiled = profile(trained, TRAIN, HELDOUT, criterion="margin")
    engine = profiled.engine
    assert engine.predictor is not None
    assert max(row.rank_correlation for row in profiled.quality) > 0.2
    best = {
        kind: np.mean([row.rank_correlation for row in profiled.quality if row.kind == kind]) for kind in PREDICTORS
    }
    assert best[engine.predictor.kind] == max(best.values())


def test_a_kind_and_a_criterion_may_be_asked_for(trained: Engine) -> None:
    for kind in PREDICTORS:
        found = profile(trained, TRAIN, HELDOUT, kind=kind, criterion="confidence", ngram_order=1).engine
        assert found.predictor is not None
        assert (found.predictor.kind, found.settings.criterion) == (kind, "confidence")
        assert not found.settings.agreement
    with pytest.raises(ValueError, match="Unknown criterion 'luck'"):
        profile(trained, TRAIN, HELDOUT, criterion="luck")


def test_a_table_keeps_the_most_frequent_ngrams(trained: Engine) -> None:
    whole, few = (profile(trained, TRAIN, HELDOUT, **limit).engine.predictor for limit in ({}, {"max_ngrams": 3}))
    assert whole is not None
    assert few is not None
    assert len(few.table.keys.ngrams) == 3 < len(whole.table.keys.ngrams)
    counts = whole.table.counts[len(VOCAB) : -1, 0].sum(1).sort(descending=True).values
    assert few.table.counts[len(VOCAB) : -1, 0].sum(1).sort(descending=True).values.tolist() == counts[:3].tolist()


def test_speed_0_is_the_full_model_alone_whatever_is_fused(trained: Engine, profiled: ProfileResult) -> None:
    settings = learn_settings(Outcomes(profiled.engine, profiled.heldout), "margin", by_labels=True, fuse_last=True)
    assert set(settings.fusing) == set(trained.depths)
    assert settings.fusing[trained.depths[-1]].table > 0
    batch = trained.tokenize(FRESH.texts).batch
    alone = trained.run_tokens(batch).logits / settings.temperature(trained.depths[-1])
    assert torch.equal(profiled.engine.replace(settings=settings).run_tokens(batch).logits, alone)
    fused = profiled.engine.replace(settings=replace(settings, speed=1e-9)).run_tokens(batch).logits
    assert not torch.allclose(fused, alone, atol=1e-3)


def test_a_promise_about_agreement_leaves_the_full_models_answer_alone(profiled: ProfileResult) -> None:
    last = profiled.engine.depths[-1]
    kept = {
        kind: calibrate(profiled.engine, profiled.heldout, FRESH, promise).engine.settings
        for kind, promise in PROMISES.items()
    }
    assert all(last not in settings.fusing for kind, settings in kept.items() if kind != "drop")
    assert kept["drop"].fusing


def test_what_merely_looks_good_gives_way_to_what_can_be_certified(
    profiled: ProfileResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused last answers change some texts at every speed: too many for few rows, however few layers they need."""
    promise, honest = Promise(min_agreement=0.98), Outcomes.trial

    def doubtful(outcomes: Outcomes, settings: ExitSettings, promise: Promise) -> Trial:
        trial = honest(outcomes, settings, promise)
        if settings.criterion != "margin":
            return trial
        return replace(trial, passed=False, risk=0.0, bound=0.03, mean_exit_layer=0.0)

    monkeypatch.setattr(Outcomes, "trial", doubtful)
    chosen = choose(Outcomes(profiled.engine, profiled.heldout), promise)
    assert chosen.settings.criterion != "margin"
    assert chosen.is_certain


def test_settings_that_fuse_nothing_stay_so(profiled: ProfileResult) -> None:
    engine = profiled.engine.replace(settings=replace(profiled.engine.settings, fusing={}))
    for promise in PROMISES.values():
        assert calibrate(engine, profiled.heldout, FRESH, promise).engine.settings.fusing == {}


def test_a_profile_may_be_given_runs_in_the_place_of_texts(trained: Engine, profiled: ProfileResult) -> None:
    found = profile(trained, ExitRun.of(trained, TRAIN), ExitRun.of(trained, HELDOUT))
    assert found.quality == profiled.quality
    assert found.engine.settings == profiled.engine.settings


def test_agreement_is_the_share_of_texts_that_disagree_with_the_full_model(profiled: ProfileResult) -> None:
    engine = profiled.engine
    chosen = replace(engine.settings, criterion=AGREEMENT)
    found = Outcomes(engine, ExitRun.of(engine, FRESH)).profile(chosen)
    for column in range(len(found.depths) - 1):
        assert found.uncertainty[:, column].mean() == pytest.approx((~found.agrees[:, column]).mean(), abs=0.05)


def test_the_full_model_teaches_the_lexical_exit_with_and_without_labels(trained: Engine) -> None:
    run, held = ExitRun.of(trained, TRAIN), ExitRun.of(trained, HELDOUT)
    bare = replace(run, labels=None)
    soft, mixed = (label_targets(each, multi_label=False) for each in (bare, run))
    assert run.labels is not None
    assert torch.equal(soft, run.exit_logits[-1].softmax(-1))
    gold = torch.nn.functional.one_hot(run.labels, soft.shape[1])
    assert torch.allclose(mixed, (1 - LABEL_SHARE) * soft + LABEL_SHARE * gold)
    engines = [profile(trained, each, held).engine for each in (bare, run)]
    rows = []
    for engine in engines:
        assert engine.predictor is not None
        assert engine.predictor.lexical is not None
        assert 0 in engine.settings.temperatures
        rows.append(engine.predictor.lexical.rows)
        found = Outcomes(engine, held)
        assert float((found.logits[0].argmax(-1) == found.full_answers).double().mean()) > 0.8
    assert not torch.equal(*rows)


def test_several_labels_are_taught_by_a_probability_each() -> None:
    logits = torch.tensor([[[0.0, 9.0]], [[-1.0, 2.0]]])
    run = ExitRun(TokenBatch(np.array([3]), None, np.array([1])), logits, None)
    assert torch.equal(label_targets(run, multi_label=True), logits[-1].sigmoid())
    mixed = label_targets(replace(run, labels=torch.tensor([[1.0, 0.0]])), multi_label=True)
    expected = (1 - LABEL_SHARE) * logits[-1].sigmoid() + LABEL_SHARE * torch.tensor([[1.0, 0.0]])
    assert torch.allclose(mixed, expected)


def test_nothing_to_profile_is_refused(trained: Engine) -> None:
    with pytest.raises(ValueError, match="No held-out texts"):
        profile(trained, TRAIN, Split([]))
    with pytest.raises(ValueError, match="No training texts"):
        profile(trained, Split([]), HELDOUT)


def test_progress_is_reported_to_the_end(trained: Engine) -> None:
    told: dict[str, list[tuple[int, int | None]]] = {}
    profile(trained, TRAIN, HELDOUT, progress=lambda what, *done: told.setdefault(what, []).append(done))
    assert len(told) == 3
    for steps in told.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        (total,) = {total for _, total in steps}
        assert steps[-1] == (total, total)


def test_quality_is_scored_against_the_true_layers() -> None:
    scores, predicted, actual = np.array([1.0, 3, 2, 4]), np.array([1, 2, 2, 4]), np.array([1, 4, 2, 2])
    found = layer_quality("counts", 0.5, scores, predicted, actual)
    assert found.rank_correlation == pytest.approx(spearmanr(scores, actual).statistic)
    assert found.mean_absolute_error == 1.0
    assert found.early_share == 0.25
    assert layer_quality("constant", 0.5, np.ones(4), predicted, actual).rank_correlation == 0.0


# Plans


@pytest.mark.parametrize("lexical_exit", [False, True])
@pytest.mark.parametrize("on_miss", ["stop", "continue"])
@pytest.mark.parametrize("speed", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("criterion", ["margin", AGREEMENT])
@pytest.mark.parametrize("checks", [None, (1, 3)])
def test_the_engine_goes_where_the_profile_says(
    profiled: ProfileResult,
    on_miss: OnMiss,
    lexical_exit: bool,
    speed: float,
    criterion: str,
    checks: tuple[int, ...] | None,
) -> None:
    chosen = replace(
        profiled.engine.settings,  # temperatures for the one criterion, scores for the other
        speed=speed,
        criterion=criterion,
        check_layers=checks,
        on_miss=on_miss,
        lexical_exit=lexical_exit,
    )
    engine = profiled.engine.replace(settings=chosen)
    batch = engine.tokenize(FRESH.texts).batch
    outcomes = Outcomes(engine, ExitRun(batch, engine.exit_logits(batch), None))
    columns, profiles = outcomes.planned(chosen), outcomes.profile(chosen)
    assert profiles.depths == (0, 1, 2, 3, 4)
    assert (
        np.array(profiles.depths)[columns].tolist()
        == engine.planner.plan(batch, engine.settings).predicted_layers.tolist()
    )
    assert lexical_exit or not (columns == 0).any()
    found = engine.run_tokens(batch)
    answered = outcomes.answered(chosen)
    assert answered.tolist() == follow(profiles, columns, speed=speed, on_miss=on_miss).tolist()
    expected = np.array(profiles.depths)[answered]
    near = (np.abs(profiles.uncertainty - speed) < 1e-5).any(1)
    assert near.mean() < 0.05
    assert found.exit_layers[~near].tolist() == expected[~near].tolist()


def test_the_table_alone_then_all_layers_are_certified_as_two_steps(profiled: ProfileResult) -> None:
    promise = Promise(min_agreement=0.8)
    engine = calibrate(profiled.engine, HELDOUT, FRESH, promise, lexical_exit=True, check_layers=()).engine
    assert engine.settings.check_layers == ()
    assert engine.settings.speed > 0
    layers = {found.exit_layer for found in engine.predict(FRESH.texts)}
    assert 0 in layers
    assert layers <= {0, 4}
    chosen = calibrate(profiled.engine, HELDOUT, FRESH, promise, check_layers=(2,)).engine.settings
    assert chosen.check_layers == (2,)
    with pytest.raises(ValueError, match=r"check_layers names layers \[9\], the model has exits at \[1, 2, 3\]"):
        calibrate(profiled.engine, HELDOUT, FRESH, promise, check_layers=(9,))


def test_columns_of_an_engine_without_a_table_begin_at_the_first_exit(trained: Engine) -> None:
    outcomes = Outcomes(trained, ExitRun.of(trained, FRESH.select(range(9))))
    assert outcomes.planned(ExitSettings(speed=0.5)).tolist() == [0] * 9
    assert outcomes.planned(ExitSettings()).tolist() == [3] * 9


# Promises


@pytest.mark.parametrize("kind", list(PROMISES))
@pytest.mark.parametrize("on_miss", ["stop", "continue"])
@pytest.mark.parametrize("lexical_exit", [None, False, True])
def test_the_engine_keeps_exactly_the_risk_that_was_certified(
    profiled: ProfileResult, kind: str, on_miss: OnMiss, lexical_exit: bool | None
) -> None:
    promise = PROMISES[kind]
    result = calibrate(profiled.engine, HELDOUT, FRESH, promise, on_miss=on_miss, lexical_exit=lexical_exit)
    engine, found = result.engine, result.walk
    assert profiled.engine.settings.speed == 0  # the engine that was given is left as it was
    assert engine.settings.speed == found.speed
    assert engine.settings.on_miss == on_miss
    assert result.num_texts == len(FRESH)
    assert all(trial.passed == (trial.bound <= promise.allowed) for trial in found.trials)
    assert {trial.speed for trial in found.trials} <= set(WALK_SPEEDS)
    assert set(TRIAL_SPEEDS) < set(WALK_SPEEDS)
    assert list(WALK_SPEEDS) == sorted(set(WALK_SPEEDS))
    if lexical_exit is not None:
        assert engine.settings.lexical_exit == lexical_exit
    passed = [trial for trial in found.trials if trial.passed]
    assert found.speed == (passed[-1].speed if passed else 0.0)
    if not passed:
        return
    full = np.array([int(answer.label[-1]) for answer in engine.predict(FRESH.texts, speed=0)])
    answers = engine.predict(FRESH.texts)
    given = np.array([int(answer.label[-1]) for answer in answers])
    if promise.min_agreement is not None:
        risk = float((given != full).mean())
    else:
        risk = float((full == FRESH.labels).mean() - (given == FRESH.labels).mean())
    assert risk == pytest.approx(passed[-1].risk, abs=1e-9)
    assert risk <= passed[-1].bound <= promise.allowed
    mean_layer = float(np.mean([answer.exit_layer for answer in answers]))
    assert mean_layer == pytest.approx(passed[-1].mean_exit_layer, abs=1e-9)


@pytest.mark.parametrize("kind", list(PROMISES))
def test_costly_checks_are_left_out_and_the_engine_does_what_was_certified(profiled: ProfileResult, kind: str) -> None:
    # Table and first exit are never sure, but the table would have all texts asked there.
    scores = {0: (-50.0, 0.0, 0.0), 1: (-50.0, 0.0, 0.0), 2: (-1.0, 0.5, 0.1), 3: (0.0, 1.0, 0.1)}
    doubts = {depth: AgreementScore(*weights) for depth, weights in scores.items()}
    engine, promise = profiled.engine, PROMISES[kind]
    engine = engine.replace(settings=replace(engine.settings, agreement=doubts, fusing={}))
    runs = ExitRun.of(engine, HELDOUT), ExitRun.of(engine, FRESH)
    free = calibrate(engine, *runs, promise, criterion=AGREEMENT, cost=CostModel(0, 1.0, 0, 0)).engine.settings
    assert free.check_layers == (1, 2, 3)
    dear = calibrate(engine, *runs, promise, criterion=AGREEMENT, cost=CostModel(0, 1.0, 0, 1.0))
    assert dear.engine.settings.check_layers is not None
    assert 1 not in dear.engine.settings.check_layers
    answers = dear.engine.predict(FRESH.texts)
    kept = [trial for trial in dear.walk.trials if trial.passed][-1]
    assert float(np.mean([answer.exit_layer for answer in answers])) == pytest.approx(kept.mean_exit_layer, abs=1e-9)
    assert {answer.exit_layer for answer in answers} <= {0, *dear.engine.settings.check_layers, 4}


def test_a_size_of_calls_weighs_time(profiled: ProfileResult) -> None:
    runs = ExitRun.of(profiled.engine, HELDOUT), ExitRun.of(profiled.engine, FRESH)
    for options, found in (({}, "found 8 and no cost"), ({"cost": CostModel(1, 1)}, "found 0 and a cost")):
        with pytest.raises(ValueError, match=found):
            calibrate(profiled.engine, *runs, PROMISES["drop"], call_size=0 if options else 8, **options)


def test_the_criterion_that_runs_fewest_layers_is_chosen(profiled: ProfileResult) -> None:
    never = AgreementScore(-50.0, 0.0, 0.0)
    blind = profiled.engine.replace(
        settings=replace(profiled.engine.settings, agreement=dict.fromkeys((0, 1, 2, 3), never))
    )
    runs, promise = (ExitRun.of(blind, HELDOUT), ExitRun.of(blind, FRESH)), PROMISES["drop"]
    chosen = calibrate(blind, *runs, promise)
    assert chosen.engine.settings.criterion in CRITERIA
    assert chosen.walk.speed > 0
    # Again from where that left off: the learned criterion is still weighed.
    able = chosen.engine.replace(
        settings=replace(chosen.engine.settings, agreement=profiled.engine.settings.agreement, speed=0.0)
    )
    again, first = calibrate(able, *runs, promise), calibrate(profiled.engine, *runs, promise)
    assert (again.walk, again.engine.settings) == (first.walk, first.engine.settings)
    for criterion in (AGREEMENT, "margin"):
        asked = calibrate(profiled.engine, *runs, promise, criterion=criterion)
        assert asked.engine.settings.criterion == criterion
    plain = profile(profiled.engine, TRAIN, HELDOUT, criterion="margin").engine
    assert calibrate(plain, *runs, promise).engine.settings.criterion == "margin"
    for refused, match in ((AGREEMENT, "run `geep profile`"), ("luck", "Unknown criterion 'luck'")):
        with pytest.raises(ValueError, match=match):
            # Refused before any text is run.
            calibrate(plain, HELDOUT, FRESH, promise, criterion=refused, progress=lambda *_: pytest.fail("ran"))


def test_runs_may_be_given_in_the_place_of_texts(profiled: ProfileResult) -> None:
    engine, promise = profiled.engine, PROMISES["drop"]
    by_texts = calibrate(engine, HELDOUT, FRESH, promise)
    by_runs = calibrate(engine, ExitRun.of(engine, HELDOUT), ExitRun.of(engine, FRESH), promise)
    assert by_runs.walk == by_texts.walk
    assert by_runs.engine.settings == by_texts.engine.settings


def test_promises_on_this_model_save_layers(profiled: ProfileResult) -> None:
    for promise in PROMISES.values():
        result = calibrate(profiled.engine, HELDOUT, FRESH, promise)
        assert result.walk.speed > 0
        assert np.mean([answer.exit_layer for answer in result.engine.predict(FRESH.texts)]) < 3


def test_a_calibrated_engine_comes_back_from_its_folder(profiled: ProfileResult, tmp_path: Path) -> None:
    engine = calibrate(profiled.engine, HELDOUT, FRESH, PROMISES["agreement"]).engine
    engine.save_pretrained(tmp_path)
    loaded = Engine.from_pretrained(tmp_path, device="cpu")
    assert loaded.settings == engine.settings
    found, expected = loaded.predict(FRESH.texts), engine.predict(FRESH.texts)
    assert [(each.label, each.exit_layer) for each in found] == [(each.label, each.exit_layer) for each in expected]


def test_agreement_needs_no_labels(profiled: ProfileResult) -> None:
    promise = PROMISES["agreement"]
    with_labels = calibrate(profiled.engine, HELDOUT, FRESH, promise).walk
    without = calibrate(profiled.engine, unlabelled(HELDOUT), unlabelled(FRESH), promise).walk
    assert without == with_labels


@pytest.mark.parametrize(
    ("tuning", "fresh"), [(unlabelled(HELDOUT), FRESH), (HELDOUT, unlabelled(FRESH))], ids=["tuning", "fresh"]
)
def test_accuracy_needs_labels(profiled: ProfileResult, tuning: Split, fresh: Split) -> None:
    with pytest.raises(ValueError, match=r"texts to (choose settings|certify) on have no labels.*--max-drop"):
        calibrate(profiled.engine, tuning, fresh, PROMISES["drop"])


def test_too_few_fresh_texts_are_refused_with_the_number_needed(profiled: ProfileResult) -> None:
    needed = Route.all_to(PROMISES["drop"])[0].each.texts_needed
    few = FRESH.select(range(needed - 1))
    with pytest.raises(TooFewTextsError, match=f"{needed - 1} calibration texts.*at least {needed} are needed"):
        calibrate(profiled.engine, HELDOUT, few, PROMISES["drop"])


def test_an_engine_without_a_table_can_keep_a_promise_but_not_stop_blindly(trained: Engine) -> None:
    result = calibrate(trained, HELDOUT, FRESH, PROMISES["agreement"])
    assert result.engine.predictor is None
    answers = result.engine.predict(FRESH.texts)
    full = trained.predict(FRESH.texts, speed=0)
    differs = np.mean([one.label != two.label for one, two in zip(answers, full, strict=True)])
    kept = [trial for trial in result.walk.trials if trial.passed][-1]
    assert differs == pytest.approx(kept.risk, abs=1e-9)
    with pytest.raises(ValueError, match="needs an exit table"):
        calibrate(trained, HELDOUT, FRESH, PROMISES["agreement"], on_miss="stop")


# Trials


def faultless(num_texts: int) -> ExitProfile:
    right = np.ones((num_texts, 2), dtype=bool)
    return ExitProfile((1, 2), np.zeros((num_texts, 2), dtype=np.float32), right, right)


def walked(
    profiled: ExitProfile,
    promise: Promise,
    speeds: Sequence[float],
    *,
    planned: Callable[[float], NDArray[np.int64]] | None = None,
    on_miss: OnMiss = "continue",
) -> Walk:
    """Walk the speeds on a profile; without a plan, every text is asked at the first exit."""
    first = np.zeros(len(profiled), dtype=np.int64)
    return walk(
        lambda speed: try_speed(
            profiled, first if planned is None else planned(speed), promise, speed=speed, on_miss=on_miss
        ),
        speeds,
    )


@pytest.mark.parametrize("promise", [Promise(max_accuracy_drop=0.05), Promise(min_agreement=0.95)])
def test_a_walk_on_a_profile_ends_at_the_first_speed_that_fails(promise: Promise) -> None:
    # Below 0.2 all is well; texts of uncertainty 0.25 are answered wrongly; above, everything would be right again.
    unsure = np.repeat(np.array([[0.1], [0.25]], dtype=np.float32), [700, 300], axis=0)
    wrong = unsure == 0.25
    right = np.concatenate([~wrong, np.ones_like(wrong)], axis=1)
    profiles = ExitProfile((1, 2), np.concatenate([unsure, unsure], axis=1), right, right)

    def planned(speed: float) -> NDArray[np.int64]:
        return np.full(1000, int(speed > 0.35))  # from there on, the full model answers all

    found = walked(profiles, promise, [0.05, 0.15, 0.2, 0.3, 0.4, 0.5], planned=planned)
    assert found.speed == 0.2
    assert [(trial.speed, trial.passed) for trial in found.trials] == [
        (0.05, True),
        (0.15, True),
        (0.2, True),
        (0.3, False),
    ]
    assert [trial.risk for trial in found.trials] == pytest.approx([0, 0, 0, 0.3])
    assert [trial.mean_exit_layer for trial in found.trials] == pytest.approx([2, 1.3, 1.3, 1])
    assert all(trial.bound >= trial.risk for trial in found.trials)


def test_a_profile_without_labels_can_be_held_to_agreement_alone() -> None:
    labelled = faultless(1000)
    profiles = ExitProfile(labelled.depths, labelled.uncertainty, labelled.agrees, None)
    with pytest.raises(ValueError, match="needs labelled texts.*min_agreement"):
        walked(profiles, Promise(max_accuracy_drop=0.05), [0.5])
    assert walked(profiles, Promise(min_agreement=0.9), [0.5]).speed == 0.5


def test_an_exit_that_is_always_wrong_leaves_the_full_model() -> None:
    wrong = np.stack([np.zeros(1000, dtype=bool), np.ones(1000, dtype=bool)], axis=1)
    found = walked(ExitProfile((1, 2), faultless(1000).uncertainty, wrong, wrong), Promise(min_agreement=0.9), [0.1])
    assert (found.speed, len(found.trials)) == (0.0, 1)


def test_a_trial_follows_the_rule_on_a_miss() -> None:
    random = np.random.default_rng(0)
    kept = ExitProfile((1, 2, 4), random.random((2000, 3)).astype(np.float32), np.ones((2000, 3), dtype=bool), None)
    promise = Promise(min_agreement=0.9)
    stop, on = (walked(kept, promise, [0.5], on_miss=on_miss) for on_miss in ("stop", "continue"))
    assert stop.trials[0].mean_exit_layer == 1
    assert on.trials[0].mean_exit_layer == pytest.approx(kept.exit_layers(0.5).mean())


def test_a_trial_is_held_against_the_model_that_was_quantised() -> None:
    """Where the full model is no column, its answers are what is spoilt and repaired."""
    correct = np.array([[True, True], [False, True], [True, False], [False, False]])
    agrees = np.array([[True, True], [False, True], [False, True], [True, True]])
    full = np.array([True, True, False, False])
    profiles = ExitProfile((1, 2), np.zeros((4, 2), dtype=np.float32), agrees, correct, full)
    first = np.zeros(4, dtype=np.int64)
    drop, agreement = (
        try_speed(profiles, first, promise, speed=0.5, on_miss="stop")
        for promise in (Promise(max_accuracy_drop=0.9), Promise(min_agreement=0.1))
    )
    assert (drop.risk, agreement.risk) == (0.0, 0.5)
    last = try_speed(profiles, first + 1, Promise(max_accuracy_drop=0.9), speed=0.5, on_miss="stop")
    assert last.risk == 0.0


@pytest.mark.parametrize("promise", [Promise(max_accuracy_drop=0.02), Promise(min_agreement=0.95)])
def test_promises_on_profiles_are_broken_no_more_often_than_they_say(promise: Promise) -> None:
    """Draw calibration sets from a known world, in which the true risk of every speed can be computed."""
    random = np.random.default_rng(0)
    speeds = np.linspace(0.02, 1, 25)

    def world(count: int) -> ExitProfile:
        unsure = random.random((count, 3)).astype(np.float32)
        # The less certain an exit, the likelier it errs; the full model errs on a tenth of the texts.
        right = np.concatenate([random.random((count, 2)) > 0.3 * unsure[:, :2], random.random((count, 1)) > 0.1], 1)
        right[:, :2] = np.where(unsure[:, :2] < 0.1, right[:, 2:], right[:, :2])
        agrees = np.concatenate([right[:, :2] == right[:, 2:], np.ones((count, 1), dtype=bool)], axis=1)
        return ExitProfile((1, 2, 4), unsure, agrees, right)

    large = world(400_000)
    assert large.correct is not None
    truth = {0.0: 0.0}
    for speed in speeds:
        rows, column = np.arange(len(large)), large.exit_indices(float(speed))
        if promise.min_agreement is not None:
            truth[float(speed)] = 1 - float(large.agrees[rows, column].mean())
        else:
            truth[float(speed)] = float(large.correct[:, -1].mean() - large.correct[rows, column].mean())
    assert max(truth.values()) > promise.allowed  # there is something to break
    rounds, broken, kept = 300, 0, []
    for _ in range(rounds):
        speed = walked(world(600), promise, speeds.tolist()).speed
        broken += truth[speed] > promise.allowed
        kept.append(speed)
    assert broken <= rounds * 0.05 + 2 * math.sqrt(rounds * 0.05 * 0.95)
    assert float(np.mean(kept)) > 0.05  # and it is no empty promise


# A model that tells nothing apart


def constant_engine(*, multi_label: bool) -> Engine:
    """An engine whose full model answers the same whatever the text; its exits do not."""
    model = make_model(problem_type="multi_label_classification" if multi_label else "single_label_classification")
    with torch.no_grad():
        model.teacher.out.weight.zero_()
        model.teacher.out.bias.copy_(torch.tensor([-3.0, 2.0, 1.0]))
    return make_engine(model, config=EngineConfig(device="cpu", max_batch_tokens=500), settings=ExitSettings())


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("kind", list(PROMISES))
def test_a_model_that_answers_all_texts_alike_is_refused(multi_label: bool, kind: str) -> None:
    engine = constant_engine(multi_label=multi_label)
    labels = np.ones((700, 3), dtype=np.float32) if multi_label else np.ones(700, dtype=np.int64)
    tuning, fresh = (Split(random_texts(700, seed=seed), labels=labels) for seed in (5, 6))
    shown = r"\['LABEL_1', 'LABEL_2'\]" if multi_label else "'LABEL_1'"
    with pytest.raises(ConstantModelError, match=rf"all 1,3.. held-out texts the same answer, {shown}.*No speed"):
        calibrate(engine, tuning, fresh, PROMISES[kind])


def test_a_model_that_answers_one_text_otherwise_is_not_constant(trained: Engine) -> None:
    run = ExitRun.of(trained, FRESH)
    logits = torch.zeros_like(run.exit_logits)
    logits[..., 1] = 5.0
    one = replace(run, exit_logits=logits).select(torch.arange(300))
    fresh = replace(run, exit_logits=logits).select(torch.arange(300, len(run)))
    with pytest.raises(ConstantModelError):
        calibrate(trained, one, fresh, PROMISES["agreement"])
    logits = logits.clone()
    logits[:, 3] = torch.tensor([9.0, 0.0, 0.0])
    calibrate(trained, one, replace(fresh, exit_logits=logits[:, : len(fresh)]), PROMISES["agreement"])


def test_texts_that_were_learned_or_chosen_on_do_not_certify(trained: Engine, profiled: ProfileResult) -> None:
    promise = PROMISES["agreement"]
    with pytest.raises(TooFewTextsError, match=r"^0 calibration texts.*698 were left out, which something was learned"):
        calibrate(trained, FRESH, FRESH, promise)
    # In any order, in other letters' case, with other blanks: the tokens are the same.
    again = Split([f" {text.upper()}  " for text in reversed(TRAIN.texts)])
    with pytest.raises(TooFewTextsError, match="^0 calibration texts"):
        calibrate(profiled.engine, HELDOUT, again, promise)
    mixed = Split([*TRAIN.texts[:200], *FRESH.texts, *HELDOUT.texts[:50]])
    found = calibrate(profiled.engine, HELDOUT, mixed, promise)
    assert (found.num_texts, found.left_out) == (len(FRESH), 250)
    assert found.walk == calibrate(profiled.engine, HELDOUT, FRESH, promise).walk
    assert found.record()["left_out"] == 250
    # A run is looked through as the texts are.
    run = ExitRun.of(profiled.engine, mixed)
    assert calibrate(profiled.engine, profiled.heldout, run, promise).walk == found.walk


def test_copies_of_a_text_are_no_further_draws(profiled: ProfileResult, caplog: pytest.LogCaptureFixture) -> None:
    promise = PROMISES["agreement"]
    copies = Split(FRESH.texts[:30] * 20)
    with pytest.raises(TooFewTextsError, match=r"Of 600 texts so many are different; the others are copies"):
        calibrate(profiled.engine, HELDOUT, copies, promise)
    calibrate(profiled.engine, HELDOUT, Split(FRESH.texts * 3), promise)
    assert "only 69" in caplog.text
    assert "are different" in caplog.text


def test_a_run_of_another_engine_certifies_nothing(trained: Engine, profiled: ProfileResult) -> None:
    run = ExitRun.of(profiled.engine, FRESH)
    longest = replace(trained.config, max_length=9)
    padded = replace(trained.config, backend="padded")
    for config, what in ((longest, "max_length"), (padded, "backend")):
        other = Engine(trained.model, trained.tokenizer, config=config)
        with pytest.raises(ValueError, match=f"an engine with another {what}, expected one of this engine"):
            calibrate(other, ExitRun.of(other, HELDOUT), run, PROMISES["agreement"])
    stranger = make_engine()
    with pytest.raises(ValueError, match="an engine with another .*model.*, expected one of this engine"):
        Outcomes(stranger, run)
    # Table and settings are no part of what a run depends on.
    Outcomes(trained, run)


def test_logits_that_are_not_finite_are_no_answers() -> None:
    """Not a number agrees with itself at every exit: nothing would ever change."""
    engine = make_engine(table=False)
    with torch.no_grad():
        engine.model.exits[0].out.weight.fill_(3e38)
    with pytest.raises(FloatingPointError, match=r"of 30 texts have logits that are not finite at an exit.*text 0"):
        ExitRun.of(engine, Split(random_texts(30)))


# Files


def test_a_calibration_is_saved_beside_the_record_of_its_profile(profiled: ProfileResult, tmp_path: Path) -> None:
    profiled.save(tmp_path)
    found: Calibration = calibrate(profiled.engine, HELDOUT, FRESH, PROMISES["agreement"])
    found.save(tmp_path)
    assert ExitSettings.from_dict(CalibrationFile.read(tmp_path).settings) == found.engine.settings
    kept = CalibrationFile.read(tmp_path).record
    # As JSON has them: tuples have become lists.
    assert kept["profile"] == json.loads(json.dumps(profiled.record()))
    assert kept["calibration"] == json.loads(json.dumps({**found.record(), "asked": None}))
    assert kept["calibration"]["speed"] == found.walk.speed
    assert kept["calibration"]["promise"]["min_agreement"] == 0.98
    assert len(kept["calibration"]["trials"]) == len(found.walk.trials)
    assert {row["kind"] for row in kept["profile"]["quality"]} == set(PREDICTORS)
    # A new profile is of another table: what was certified for the old one is no longer there.
    profiled.save(tmp_path)
    assert "calibration" not in CalibrationFile.read(tmp_path).record
    assert CalibrationFile.read(tmp_path).certificate is None


def test_a_refusal_leaves_the_full_model_and_its_reason(profiled: ProfileResult, tmp_path: Path) -> None:
    profiled.save(tmp_path)
    certified = calibrate(profiled.engine, HELDOUT, FRESH, PROMISES["agreement"])
    certified.save(tmp_path)
    save_refusal(certified.engine, tmp_path, TooFewTextsError("too few of them"))
    kept = CalibrationFile.read(tmp_path)
    assert (kept.settings["speed"], kept.certificate) == (0.0, None)
    refused = {"speed": 0.0, "refused": "too few of them", "certificate": None, "asked": None}
    assert kept.record["calibration"] == refused
    assert "profile" in kept.record
    assert certified.engine.settings.speed > 0  # the engine that was given is left as it was


def test_a_calibration_can_be_saved_where_no_profile_was(trained: Engine, tmp_path: Path) -> None:
    calibrate(trained, HELDOUT, FRESH, PROMISES["agreement"]).save(tmp_path)
    assert CalibrationFile.read(tmp_path).record.keys() == {"calibration"}
