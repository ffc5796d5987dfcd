"""What calibration reports is what the engine then does: same exits, same risk, on a model trained here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, tiny_encoder, toy_task
from scipy.stats import spearmanr

from geep.calibration import (
    TABLE_SPEEDS,
    TRIAL_SPEEDS,
    ExitRun,
    ProfileResult,
    full_profile,
    keep_promise,
    layer_quality,
    planned_columns,
    profile,
)
from geep.data import Split
from geep.engine import Engine, EngineConfig, ExitSettings
from geep.exits import AGREEMENT, CRITERIA, AgreementScore, OnMiss, Promise, TooFewTextsError, follow
from geep.modeling import GeepForSequenceClassification
from geep.predictor import PREDICTORS
from geep.scheduler import CostModel
from geep.training import TrainSettings, encode, train

PROMISES = {"drop": Promise(max_accuracy_drop=0.02), "agreement": Promise(min_agreement=0.98)}


def split(count: int, *, seed: int, labelled: bool = True) -> Split:
    texts, labels = toy_task(count, seed=seed, noise=0.1)
    return Split(texts, labels=labels if labelled else None)


def unlabelled(part: Split) -> Split:
    return Split(part.texts)


TRAIN, HELDOUT, FRESH = split(1500, seed=0), split(500, seed=1), split(700, seed=2)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A tiny BERT that learnt the toy task, not to perfection."""
    torch.manual_seed(0)
    encoder = tiny_encoder("bert")
    encoder.apply(encoder._init_weights)
    model = GeepForSequenceClassification.from_encoder(encoder, num_labels=3, exit_layers=[1, 2, 3])
    tokenizer = make_tokenizer()
    assert TRAIN.labels is not None
    train(
        model,
        tokenizer,
        encode(tokenizer, TRAIN.texts, TRAIN.labels, max_length=32),
        settings=TrainSettings(epochs=2, batch_size=32, learning_rate=4e-3),
        checkpoint_dir=tmp_path_factory.mktemp("train") / "checkpoints",
        device="cpu",
        report=lambda *_: None,
    )
    return Engine(model, tokenizer, config=EngineConfig(device="cpu", max_batch_tokens=500))


@pytest.fixture(scope="session")
def profiled(trained: Engine) -> ProfileResult:
    return profile(trained, TRAIN, HELDOUT)


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


def test_a_profile_may_be_given_runs_in_the_place_of_texts(trained: Engine, profiled: ProfileResult) -> None:
    found = profile(trained, ExitRun.of(trained, TRAIN), ExitRun.of(trained, HELDOUT))
    assert found.quality == profiled.quality
    assert found.engine.settings == profiled.engine.settings


def test_agreement_is_the_share_of_texts_that_disagree_with_the_full_model(profiled: ProfileResult) -> None:
    engine = profiled.engine
    chosen = replace(engine.settings, criterion=AGREEMENT)
    found = full_profile(engine, ExitRun.of(engine, FRESH), chosen)
    for column in range(len(found.depths) - 1):
        assert found.uncertainty[:, column].mean() == pytest.approx((~found.agrees[:, column]).mean(), abs=0.05)


def test_a_profile_without_labels_has_no_lexical_exit_of_its_own(trained: Engine) -> None:
    found = profile(trained, unlabelled(TRAIN), unlabelled(HELDOUT)).engine
    assert found.predictor is not None
    assert found.predictor.num_labels is None
    assert 0 not in found.settings.temperatures
    assert len(found.predict(FRESH.texts[:5], speed=0.5)) == 5


def test_nothing_to_profile_is_refused(trained: Engine) -> None:
    with pytest.raises(ValueError, match="No held-out texts"):
        profile(trained, TRAIN, Split([]))
    with pytest.raises(ValueError, match="No training texts"):
        profile(trained, Split([]), HELDOUT)


def test_progress_is_reported_to_the_end(trained: Engine) -> None:
    told: dict[str, list[float]] = {}
    profile(trained, TRAIN, HELDOUT, report=lambda what, share: told.setdefault(what, []).append(share))
    assert len(told) == 3
    for shares in told.values():
        assert shares == sorted(shares)
        assert shares[-1] == 1.0


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
    columns = planned_columns(engine, batch, chosen)
    profiles = full_profile(engine, ExitRun(batch, engine.exit_logits(batch), None), chosen)
    assert profiles.depths == (0, 1, 2, 3, 4)
    assert np.array(profiles.depths)[columns].tolist() == engine.plan(batch).predicted_layers.tolist()
    assert lexical_exit or not (columns == 0).any()
    found = engine.run_tokens(batch)
    expected = np.array(profiles.depths)[follow(profiles, columns, speed=speed, on_miss=on_miss)]
    near = (np.abs(profiles.uncertainty - speed) < 1e-5).any(1)
    assert near.mean() < 0.05
    assert found.exit_layers[~near].tolist() == expected[~near].tolist()


def test_columns_of_an_engine_without_a_table_begin_at_the_first_exit(trained: Engine) -> None:
    batch = trained.tokenize(FRESH.texts[:9]).batch
    assert planned_columns(trained, batch, ExitSettings(speed=0.5)).tolist() == [0] * 9
    assert planned_columns(trained, batch, ExitSettings()).tolist() == [3] * 9


# Promises


@pytest.mark.parametrize("kind", list(PROMISES))
@pytest.mark.parametrize("on_miss", ["stop", "continue"])
@pytest.mark.parametrize("lexical_exit", [None, False, True])
def test_the_engine_keeps_exactly_the_risk_that_was_certified(
    profiled: ProfileResult, kind: str, on_miss: OnMiss, lexical_exit: bool | None
) -> None:
    promise = PROMISES[kind]
    result = keep_promise(profiled.engine, HELDOUT, FRESH, promise, on_miss=on_miss, lexical_exit=lexical_exit)
    engine, calibration = result.engine, result.calibration
    assert profiled.engine.settings.speed == 0  # the engine that was given is left as it was
    assert engine.settings.speed == calibration.speed
    assert engine.settings.on_miss == on_miss
    assert calibration.num_texts == len(FRESH)
    assert all(trial.passed == (trial.bound <= promise.allowed) for trial in calibration.trials)
    assert {trial.speed for trial in calibration.trials} <= set(TRIAL_SPEEDS)
    if lexical_exit is not None:
        assert engine.settings.lexical_exit == lexical_exit
    passed = [trial for trial in calibration.trials if trial.passed]
    assert calibration.speed == (passed[-1].speed if passed else 0.0)
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
    engine = engine.replace(settings=replace(engine.settings, agreement=doubts))
    runs = ExitRun.of(engine, HELDOUT), ExitRun.of(engine, FRESH)
    free = keep_promise(engine, *runs, promise, criterion=AGREEMENT, cost=CostModel(0, 1.0, 0, 0)).engine.settings
    assert free.check_layers == (1, 2, 3)
    dear = keep_promise(engine, *runs, promise, criterion=AGREEMENT, cost=CostModel(0, 1.0, 0, 1.0))
    assert dear.engine.settings.check_layers is not None
    assert 1 not in dear.engine.settings.check_layers
    answers = dear.engine.predict(FRESH.texts)
    kept = [trial for trial in dear.calibration.trials if trial.passed][-1]
    assert float(np.mean([answer.exit_layer for answer in answers])) == pytest.approx(kept.mean_exit_layer, abs=1e-9)
    assert {answer.exit_layer for answer in answers} <= {0, *dear.engine.settings.check_layers, 4}


def test_the_criterion_that_runs_fewest_layers_is_chosen(profiled: ProfileResult) -> None:
    never = AgreementScore(-50.0, 0.0, 0.0)
    blind = profiled.engine.replace(
        settings=replace(profiled.engine.settings, agreement=dict.fromkeys((0, 1, 2, 3), never))
    )
    runs, promise = (ExitRun.of(blind, HELDOUT), ExitRun.of(blind, FRESH)), PROMISES["drop"]
    chosen = keep_promise(blind, *runs, promise)
    assert chosen.engine.settings.criterion in CRITERIA
    assert chosen.calibration.speed > 0
    # Again from where that left off: the learned criterion is still weighed.
    able = chosen.engine.replace(
        settings=replace(chosen.engine.settings, agreement=profiled.engine.settings.agreement, speed=0.0)
    )
    again, first = keep_promise(able, *runs, promise), keep_promise(profiled.engine, *runs, promise)
    assert (again.calibration, again.engine.settings) == (first.calibration, first.engine.settings)
    for criterion in (AGREEMENT, "margin"):
        asked = keep_promise(profiled.engine, *runs, promise, criterion=criterion)
        assert asked.engine.settings.criterion == criterion
    plain = profile(profiled.engine, TRAIN, HELDOUT, criterion="margin").engine
    assert keep_promise(plain, *runs, promise).engine.settings.criterion == "margin"
    for refused, match in ((AGREEMENT, "run `geep profile`"), ("luck", "Unknown criterion 'luck'")):
        with pytest.raises(ValueError, match=match):
            # Refused before any text is run.
            keep_promise(plain, HELDOUT, FRESH, promise, criterion=refused, report=lambda *_: pytest.fail("ran"))


def test_runs_may_be_given_in_the_place_of_texts(profiled: ProfileResult) -> None:
    engine, promise = profiled.engine, PROMISES["drop"]
    by_texts = keep_promise(engine, HELDOUT, FRESH, promise)
    by_runs = keep_promise(engine, ExitRun.of(engine, HELDOUT), ExitRun.of(engine, FRESH), promise)
    assert by_runs.calibration == by_texts.calibration
    assert by_runs.engine.settings == by_texts.engine.settings


def test_promises_on_this_model_save_layers(profiled: ProfileResult) -> None:
    for promise in PROMISES.values():
        result = keep_promise(profiled.engine, HELDOUT, FRESH, promise)
        assert result.calibration.speed > 0
        assert np.mean([answer.exit_layer for answer in result.engine.predict(FRESH.texts)]) < 3


def test_a_calibrated_engine_comes_back_from_its_folder(profiled: ProfileResult, tmp_path: Path) -> None:
    engine = keep_promise(profiled.engine, HELDOUT, FRESH, PROMISES["agreement"]).engine
    engine.save_pretrained(tmp_path)
    loaded = Engine.from_pretrained(tmp_path, device="cpu")
    assert loaded.settings == engine.settings
    found, expected = loaded.predict(FRESH.texts), engine.predict(FRESH.texts)
    assert [(each.label, each.exit_layer) for each in found] == [(each.label, each.exit_layer) for each in expected]


def test_agreement_needs_no_labels(profiled: ProfileResult) -> None:
    promise = PROMISES["agreement"]
    with_labels = keep_promise(profiled.engine, HELDOUT, FRESH, promise).calibration
    without = keep_promise(profiled.engine, unlabelled(HELDOUT), unlabelled(FRESH), promise).calibration
    assert without == with_labels


@pytest.mark.parametrize(
    ("tuning", "fresh"), [(unlabelled(HELDOUT), FRESH), (HELDOUT, unlabelled(FRESH))], ids=["tuning", "fresh"]
)
def test_accuracy_needs_labels(profiled: ProfileResult, tuning: Split, fresh: Split) -> None:
    with pytest.raises(ValueError, match="needs labelled texts"):
        keep_promise(profiled.engine, tuning, fresh, PROMISES["drop"])


def test_too_few_fresh_texts_are_refused_with_the_number_needed(profiled: ProfileResult) -> None:
    needed = PROMISES["drop"].halved().texts_needed
    few = FRESH.select(range(needed - 1))
    with pytest.raises(TooFewTextsError, match=f"{needed - 1} calibration texts.*at least {needed} are needed"):
        keep_promise(profiled.engine, HELDOUT, few, PROMISES["drop"])


def test_an_engine_without_a_table_can_keep_a_promise_but_not_stop_blindly(trained: Engine) -> None:
    result = keep_promise(trained, HELDOUT, FRESH, PROMISES["agreement"])
    assert result.engine.predictor is None
    answers = result.engine.predict(FRESH.texts)
    full = trained.predict(FRESH.texts, speed=0)
    differs = np.mean([one.label != two.label for one, two in zip(answers, full, strict=True)])
    kept = [trial for trial in result.calibration.trials if trial.passed][-1]
    assert differs == pytest.approx(kept.risk, abs=1e-9)
    with pytest.raises(ValueError, match="needs an exit table"):
        keep_promise(trained, HELDOUT, FRESH, PROMISES["agreement"], on_miss="stop")
