"""A conditional promise holds among those that leave early, too, and it is said what they lose where none was asked."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FRESH, HELDOUT, make_engine, make_model
from hypothesis import given, strategies as st

from geep.calibration import Answered, ExitRun, Outcomes, ProfileResult, Route, calibrate, choose
from geep.calibration.certifying import walked
from geep.engine import ExitSettings
from geep.exits import AGREEMENT
from geep.promise import RISKS, PairedCounts, Promise, Trial

ENGINE = make_engine(make_model(num_labels=2), table=False, settings=ExitSettings(criterion="confidence"))
PROMISE = Promise(max_accuracy_drop=0.02)

# The share of texts that exit 1 is sure of, and how often it is wrong on them: a hair more than may be lost.
EARLY, WRONG = 0.4, 0.0205


def world(count: int, random: np.random.Generator) -> ExitRun:
    """Texts of a model that is always right; exit 1 is wrong on some that it is sure of, exit 2 hardly ever."""
    labels = random.integers(0, 2, count)
    is_early, is_middle = random.random(count) < EARLY, random.random(count) < 0.7
    unsure = [np.where(sure, random.random(count) / 10, 0.9999) for sure in (is_early, is_middle)]
    wrong = [random.random(count) < share for share in (WRONG, 0.002)]
    exits = []
    for doubt, errs in (
        *zip(unsure, wrong, strict=True),
        (np.full(count, 0.9999), labels < 0),
        (labels < 0, labels < 0),
    ):
        margin = np.log((2 - doubt) / np.maximum(doubt, 1e-6)) / 2
        sign = np.where((labels == 1) ^ errs, 1.0, -1.0)
        exits.append(np.stack([-sign * margin, sign * margin], axis=1))
    logits = torch.from_numpy(np.stack(exits)).float()
    return ExitRun(ENGINE.tokenize(["w1"] * count).batch, logits, torch.from_numpy(labels))


@pytest.mark.parametrize("conditional", [True, False])
def test_promises_are_broken_among_early_leavers_no_more_often_than_they_say(conditional: bool) -> None:
    promise, random, rounds = replace(PROMISE, conditional=conditional), np.random.default_rng(0), 150
    tuning = Outcomes(ENGINE, world(1500, random))
    route = Route.all_to(promise)[0]
    choice = choose(tuning, replace(route.weighed, conditional=False), criterion="confidence")
    order = route.order(tuning, choice)
    opened = [1 in settings.asked_layers(ENGINE.depths) for settings in order]
    assert any(opened)  # there is something to break
    broken, layers = 0, []
    for _ in range(rounds):
        found = walked(Outcomes(ENGINE, world(1500, random)), order, route.each)
        assert found.kept is not None
        broken += opened[found.num_passed - 1] and found.kept.mean_exit_layer < 3.5
        layers.append(found.kept.mean_exit_layer)
    if conditional:
        assert broken / rounds <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / rounds)
        assert np.mean(layers) < 3  # most texts leave at exit 2
    else:
        assert broken / rounds > 0.5


@pytest.mark.parametrize("promise", [Promise(max_accuracy_drop=0.03), Promise(min_agreement=0.96)])
def test_the_engine_keeps_the_promise_among_those_that_leave_by_each_depth(
    profiled: ProfileResult, promise: Promise
) -> None:
    promise = replace(promise, conditional=True)
    found = calibrate(profiled.engine, HELDOUT, FRESH, promise, criterion=AGREEMENT)
    engine = found.engine
    assert found.walk.speed > 0
    assert engine.certificate is not None
    assert engine.certificate.promise.conditional
    assert str(engine.certificate.promise).endswith("among the texts answered by any depth at 95 % confidence")
    answers, full = engine.predict(FRESH.texts), engine.predict(FRESH.texts, speed=0.0)
    layers = np.array([answer.exit_layer for answer in answers])
    given, whole = (np.array([int(answer.label[-1]) for answer in part]) for part in (answers, full))
    asked = {0} if engine.settings.lexical_exit else set()
    assert [row.depth for row in found.leavers] == sorted({*engine.settings.asked_layers(engine.depths), *asked})
    bounds = []
    for row in found.leavers:
        among = layers <= row.depth
        spoilt, repaired = (
            int((among & (one == FRESH.labels) & (other != FRESH.labels)).sum())
            for one, other in ((whole, given), (given, whole))
        )
        counts = PairedCounts(int(among.sum()), int((among & (given != whole)).sum()), spoilt, repaired)
        assert row.num_texts == counts.num_texts
        assert row.risk == pytest.approx(promise.risk.observed(counts))
        bounds.append(promise.risk.bound(counts, 1 - promise.confidence))
    assert max(bounds) == pytest.approx(engine.certificate.bound)
    assert max(bounds) <= promise.allowed


def test_what_early_leavers_lose_is_told_whatever_was_promised(profiled: ProfileResult) -> None:
    found = calibrate(profiled.engine, HELDOUT, FRESH, Promise(min_agreement=0.98), criterion=AGREEMENT)
    assert found.leavers
    assert found.leavers[-1].num_texts == len(FRESH)
    assert found.walk.kept is not None
    assert found.leavers[-1].risk == pytest.approx(found.walk.kept.risk)
    assert [row["depth"] for row in found.record()["leavers"]] == [row.depth for row in found.leavers]
    counts = [row.num_texts for row in found.leavers]
    assert counts == sorted(counts)


def test_exits_are_opened_from_the_deepest_on_at_one_speed(profiled: ProfileResult) -> None:
    engine, promise = profiled.engine, Promise(min_agreement=0.96, conditional=True)
    tuning = Outcomes(engine, profiled.heldout)
    choice = choose(tuning, replace(promise, conditional=False), criterion=AGREEMENT, lexical_exit=True)
    (route,) = Route.all_to(promise)
    order = route.order(tuning, choice)
    opened = [settings.check_layers for settings in order]
    assert opened[:4] == [(3,), (2, 3), (1, 2, 3), None]
    assert [settings.lexical_exit for settings in order[:4]] == [False, False, False, True]
    speeds = [settings.speed for settings in order]
    assert len(set(speeds[:4])) == 1
    assert speeds[3:] == sorted(set(speeds[3:]))


@given(st.lists(st.tuples(*[st.integers(0, 30)] * 3), min_size=1, max_size=5), st.sampled_from(sorted(RISKS)))
def test_a_trial_of_several_strata_is_the_worst_of_them(rows: list[tuple[int, int, int]], name: str) -> None:
    strata = [
        PairedCounts(spoilt + repaired + same, spoilt + repaired, spoilt, repaired) for spoilt, repaired, same in rows
    ]
    promise = Promise(**{name: 0.5})
    found = Trial.of(promise, *strata, speed=0.5, mean_exit_layer=1.0)
    alone = [Trial.of(promise, counts, speed=0.5, mean_exit_layer=1.0) for counts in strata]
    assert found.bound == max(trial.bound for trial in alone)
    assert found.passed == all(trial.passed for trial in alone)
    assert found in alone


def test_of_nobody_nothing_is_known() -> None:
    for name in RISKS:
        trial = Trial.of(Promise(**{name: 0.9}), PairedCounts(0, 0, 0, 0), speed=0.5, mean_exit_layer=1.0)
        assert (trial.risk, trial.bound) == (0.0, 1.0)


def test_an_exit_that_is_closed_and_a_plain_promise_have_no_strata_of_their_own() -> None:
    column, changed = np.array([0, 0, 2, 1]), np.array([True, False, True, False])
    found = Answered(column, (1, 2, 4), changed, None, None)
    plain = Promise(min_agreement=0.5)
    assert [each.num_texts for each in found.strata(plain, [0, 1, 2])] == [4]
    conditional = replace(plain, conditional=True)
    assert [(each.num_texts, each.changed) for each in found.strata(conditional, [0, 1, 2])] == [(2, 1), (3, 1), (4, 2)]
    assert [each.num_texts for each in found.strata(conditional, [1, 2])] == [3, 4]
    outcomes = Outcomes(ENGINE, world(50, np.random.default_rng(1)))
    settings = ExitSettings(speed=0.5, criterion="confidence", check_layers=(2,))
    assert outcomes.asked(settings) == [1, 3]
    assert outcomes.asked(replace(settings, speed=0.0)) == [3]
