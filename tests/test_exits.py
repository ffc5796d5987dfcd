"""Uncertainties, the engine's rule on a profile, and promises that are kept as often as they say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, multinomial

from geep.exits import (
    AGREEMENT,
    CRITERIA,
    AgreementScore,
    ExitProfile,
    Promise,
    TooFewTextsError,
    answer_of,
    calibrate,
    clopper_pearson_upper,
    drop_bound,
    fit_temperature,
    follow,
    profile_exits,
    risk_bound,
    uncertainty,
)

every_criterion = pytest.mark.parametrize("criterion", sorted(CRITERIA))


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


# Criteria


@every_criterion
@pytest.mark.parametrize("num_labels", [2, 3, 40])
def test_certain_is_0_and_uniform_is_1(criterion: str, num_labels: int) -> None:
    certain = torch.full((1, num_labels), -50.0).index_fill_(1, torch.tensor([1]), 50.0)
    assert float(uncertainty(certain, criterion)) == pytest.approx(0, abs=1e-6)
    assert float(uncertainty(torch.full((1, num_labels), 3.0), criterion)) == pytest.approx(1, abs=1e-6)


def test_criteria_by_hand() -> None:
    logits = logits_of(0.7, 0.2, 0.1)
    entropy = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)) / math.log(3)
    assert float(uncertainty(logits, "entropy")) == pytest.approx(entropy, abs=1e-6)
    assert float(uncertainty(logits, "confidence")) == pytest.approx(0.3 * 3 / 2, abs=1e-6)
    assert float(uncertainty(logits, "margin")) == pytest.approx(1 - 0.5, abs=1e-6)


@every_criterion
@given(logits=st.lists(st.floats(-80, 80), min_size=2, max_size=6), multi_label=st.booleans())
def test_uncertainty_lies_between_0_and_1(criterion: str, logits: list[float], multi_label: bool) -> None:
    value = float(uncertainty(torch.tensor([logits]), criterion, multi_label=multi_label))
    assert 0 <= value <= 1


@every_criterion
def test_a_higher_temperature_is_less_certain(criterion: str) -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0]])
    values = [float(uncertainty(logits, criterion, temperature=t)) for t in (0.3, 1.0, 3.0)]
    assert values == sorted(values)
    assert values[0] < values[2]
    assert values[2] == pytest.approx(float(uncertainty(logits / 3, criterion)), abs=1e-6)


@every_criterion
def test_the_least_certain_of_several_labels_decides(criterion: str) -> None:
    value = uncertainty(torch.tensor([[9.0, 0.4, -7.0]]), criterion, multi_label=True)
    p = 1 / (1 + math.exp(-0.4))
    alone = uncertainty(logits_of(p, 1 - p), criterion)
    assert float(value) == pytest.approx(float(alone), abs=1e-6)


@every_criterion
def test_one_label_that_holds_or_not_has_an_uncertainty(criterion: str) -> None:
    assert float(uncertainty(torch.tensor([[0.0]]), criterion, multi_label=True)) == pytest.approx(1, abs=1e-6)
    assert float(uncertainty(torch.tensor([[30.0]]), criterion, multi_label=True)) == pytest.approx(0, abs=1e-6)


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown criterion 'luck'.*entropy"):
        uncertainty(torch.zeros(1, 2), "luck")


def test_half_precision_logits_are_read_in_full_precision() -> None:
    logits = torch.tensor([[1.5, -0.5, 0.25]])
    assert torch.equal(uncertainty(logits.bfloat16(), "entropy"), uncertainty(logits, "entropy"))


# Temperatures


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 8.0])
def test_fit_finds_the_temperature_that_labels_were_drawn_at(temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 4, generator=random) * 2 * temperature
    labels = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_fit_finds_the_temperature_of_several_labels_at_once(temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 3, generator=random) * 2 * temperature
    labels = torch.bernoulli((logits / temperature).sigmoid(), generator=random)
    assert fit_temperature(logits, labels, multi_label=True) == pytest.approx(temperature, rel=0.05)


def test_temperatures_stay_finite_where_the_loss_has_no_minimum() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert 1 / 20 <= fit_temperature(logits, torch.tensor([0, 1])) < 1
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(20, rel=0.01)
    assert 1 / 20 <= fit_temperature(torch.zeros(3, 2), torch.tensor([0, 1, 0])) <= 20


# The learned criterion


def test_an_agreement_score_by_hand() -> None:
    logits, lexical = torch.tensor([[3.0, 1, -2], [0, 1, 4]]), torch.tensor([[0.0, 2, 1], [5, 1, 7]])
    # Ahead of their best rivals by 2 and 3; the table is for another answer by 2, and for the same by 2.
    score = AgreementScore(bias=0.5, own=1.0, table=0.25)
    expected = 1 / (1 + np.exp([0.5 + 2 - 0.5, 0.5 + 3 + 0.5]))
    assert score.uncertainty(logits, lexical).tolist() == pytest.approx(expected.tolist())
    without = 1 / (1 + np.exp([0.5 + 2, 0.5 + 3]))
    assert score.uncertainty(logits, None).tolist() == pytest.approx(without.tolist())
    # Several labels: the nearest to 0 decides, in the exit (1 and 0) and in the table (-2 and -1).
    several = AgreementScore(bias=0.0, own=1.0, table=1.0).uncertainty(
        logits[:, :2] * torch.tensor([1.0, -1]), torch.tensor([[3.0, 2], [5, 1]]), multi_label=True
    )
    assert several.tolist() == pytest.approx((1 / (1 + np.exp([1 - 2, 0 - 5]))).tolist())


def test_an_agreement_score_is_the_share_that_disagrees() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 3, generator=random) * 2
    lexical = torch.randn(20_000, 3, generator=random)
    known = AgreementScore(bias=-0.5, own=1.2, table=0.4)
    agrees = (torch.rand(20_000, generator=random) > known.uncertainty(logits, lexical)).numpy()
    found = AgreementScore.fit(logits, lexical, agrees)
    assert (found.bias, found.own, found.table) == pytest.approx((-0.5, 1.2, 0.4), abs=0.1)
    unsure = found.uncertainty(logits, lexical).numpy()
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 0.7)):
        inside = (unsure >= low) & (unsure < high)
        assert unsure[inside].mean() == pytest.approx((~agrees[inside]).mean(), abs=0.03)


@pytest.mark.parametrize("agrees", [True, False])
def test_exits_that_always_or_never_agree_have_a_score(agrees: bool) -> None:
    score = AgreementScore.fit(torch.randn(98, 2), None, np.full(98, agrees))
    assert score.uncertainty(torch.randn(3, 2), None).tolist() == pytest.approx([0.01 if agrees else 0.99] * 3)
    # A table whose guess is always the same far-off one, as labels that no training text had, does no harm.
    flags = np.arange(98) % 2 == 0
    score = AgreementScore.fit(torch.randn(98, 2), torch.tensor([[-30.0, 30]]).expand(98, 2), flags)
    assert 0 < float(score.uncertainty(torch.zeros(1, 2), torch.tensor([[-30.0, 30]]))) < 1


def test_scores_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        AgreementScore(0.0, math.nan, 0.0)
    with pytest.raises(ValueError, match="Got 1 agreement scores for 3 depths"):
        profile_exits(torch.zeros(3, 4, 2), (1, 2, 4), criterion=AGREEMENT, agreement=[AgreementScore(0.0, 1.0, 0.0)])


def test_a_profile_by_agreement_lets_the_lexical_exit_vote_on_the_others() -> None:
    logits = torch.randn(4, 30, 3, generator=torch.Generator().manual_seed(1))
    scores = [AgreementScore(0.1 * place, 1.0, 0.5) for place in range(3)]
    found = profile_exits(logits, (0, 1, 2, 4), criterion=AGREEMENT, agreement=scores).uncertainty
    expected = [
        scores[0].uncertainty(logits[0], None),
        *(s.uncertainty(z, logits[0]) for s, z in zip(scores[1:], logits[1:3], strict=True)),
    ]
    assert np.allclose(found[:, :3], torch.stack(expected, dim=1).numpy())
    assert (found[:, 3] == 0).all()
    no_table = profile_exits(logits, (1, 2, 3, 4), criterion=AGREEMENT, agreement=scores).uncertainty
    assert np.allclose(no_table[:, 1], scores[1].uncertainty(logits[1], None).numpy())


# Profiles


def random_profile(num_texts: int, *, depths: tuple[int, ...] = (1, 2, 4), seed: int = 0) -> ExitProfile:
    random = np.random.default_rng(seed)
    shape = (num_texts, len(depths))
    agrees = random.random(shape) < 0.9
    agrees[:, -1] = True
    return ExitProfile(depths, random.random(shape).astype(np.float32), agrees, random.random(shape) < 0.8)


def test_a_profile_says_what_each_exit_would_answer() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [0.0, 4.0]]])  # (depths, texts, labels)
    profile = profile_exits(logits, (1, 3), temperatures=(1.0, 2.0), labels=torch.tensor([0, 1]))
    assert profile.depths == (1, 3)
    assert len(profile) == 2
    assert profile.agrees.tolist() == [[False, True], [True, True]]
    assert profile.correct is not None
    assert profile.correct.tolist() == [[True, False], [True, True]]
    expected = [[uncertainty(logits[d, t], "entropy", temperature=d + 1.0) for d in (0, 1)] for t in (0, 1)]
    assert profile.uncertainty == pytest.approx(np.array(expected), abs=1e-6)
    assert profile_exits(logits, (1, 3)).correct is None


def test_several_labels_agree_only_if_all_of_them_do() -> None:
    logits = torch.tensor([[[2.0, -1.0], [1.0, 1.0]], [[3.0, -2.0], [1.0, -1.0]]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    profile = profile_exits(logits, (1, 2), labels=labels, multi_label=True)
    assert profile.agrees.tolist() == [[True, True], [False, True]]
    assert profile.correct is not None
    assert profile.correct.tolist() == [[True, True], [True, False]]
    assert answer_of(logits[0], multi_label=True).tolist() == [[True, False], [True, True]]


def test_logits_and_depths_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="2 exits and 3 depths"):
        profile_exits(torch.zeros(2, 5, 3), (1, 2, 3))


def test_a_part_of_a_profile_is_the_profile_of_that_part() -> None:
    profile = random_profile(20)
    rows = np.array([3, 3, 0])
    part = profile.select(rows)
    assert np.array_equal(part.exit_indices(0.4), profile.exit_indices(0.4)[rows])
    deeper = profile.from_depth(2)
    assert deeper.depths == (2, 4)
    assert np.array_equal(deeper.uncertainty, profile.uncertainty[:, 1:])
    without_labels = ExitProfile(profile.depths, profile.uncertainty, profile.agrees, None)
    assert without_labels.select(rows).correct is None
    assert without_labels.from_depth(4).correct is None


# The rule


def slow_follow(profile: ExitProfile, predicted: list[int], speed: float, on_miss: str) -> list[int]:
    columns = []
    for text, first in enumerate(predicted):
        column = first
        if on_miss == "continue":
            while column < len(profile.depths) - 1 and not profile.uncertainty[text, column] < speed:
                column += 1
        columns.append(column)
    return columns


@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.floats(0, 1), st.sampled_from(["stop", "continue"]))
def test_following_equals_a_slow_loop(seed: int, num_texts: int, speed: float, on_miss: str) -> None:
    profile = random_profile(num_texts, seed=seed)
    predicted = np.random.default_rng(seed).integers(0, 3, num_texts)
    before = profile.uncertainty.copy()
    found = follow(profile, predicted, speed=speed, on_miss=on_miss)  # type: ignore[arg-type]
    assert found.tolist() == slow_follow(profile, predicted.tolist(), speed, on_miss)
    assert np.array_equal(profile.uncertainty, before)


def test_speed_0_is_the_full_model_and_higher_speeds_leave_no_later() -> None:
    profile = random_profile(50)
    assert profile.exit_layers(0.0).tolist() == [4] * 50
    layers = np.stack([profile.exit_layers(speed) for speed in np.linspace(0, 1, 21)])
    assert (np.diff(layers, axis=0) <= 0).all()
    assert set(layers.flatten().tolist()) == {1, 2, 4}


# Bounds


@given(st.integers(1, 400), st.data(), st.sampled_from([0.01, 0.05, 0.2]))
def test_the_exact_bound_is_scipys(trials: int, data: st.DataObject, tail: float) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = binomtest(successes, trials, alternative="less").proportion_ci(1 - tail, method="exact").high
    assert clopper_pearson_upper(successes, trials, tail) == pytest.approx(expected, abs=1e-9)


def test_nothing_seen_bounds_nothing() -> None:
    assert clopper_pearson_upper(0, 0, 0.05) == 1.0


@pytest.mark.parametrize(
    ("changed", "direction"), [(0.02, 0.8), (0.1, 0.55), (0.3, 0.5), (0.05, 1.0), (0.2, 0.3), (0.01, 0.6)]
)
def test_the_bound_on_the_drop_holds_as_often_as_it_says(changed: float, direction: float) -> None:
    random = np.random.default_rng(0)
    truth, held, rounds = changed * (2 * direction - 1), 0, 600
    for _ in range(rounds):
        full = random.random(300) < 0.5
        flips = random.random(300) < changed
        # Of the changed texts, a share `direction` was right before.
        full = np.where(flips, random.random(300) < direction, full)
        held += risk_bound(full, full ^ flips, 0.05) >= truth
    assert held >= rounds * 0.95 - 2 * math.sqrt(rounds * 0.05 * 0.95)


def test_the_bound_on_the_drop_is_never_below_what_was_seen() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        full, deployed = random.random((2, 80)) < random.random((2, 1))
        assert risk_bound(full, deployed, 0.05) >= full.mean() - deployed.mean()
    same = np.ones(100, dtype=bool)
    assert clopper_pearson_upper(0, 100, 0.05) <= risk_bound(same, same, 0.05) <= clopper_pearson_upper(0, 100, 0.005)


def test_the_bound_on_the_drop_is_exact() -> None:
    """Add up, over everything that 24 texts can show, the probability of a bound that is too low."""
    num_texts, tail = 24, 0.05
    counts = [(s, r) for s in range(num_texts + 1) for r in range(num_texts + 1 - s)]
    bounds = np.array([drop_bound(s, r, num_texts, tail) for s, r in counts])
    outcomes = np.array([(s, r, num_texts - s - r) for s, r in counts])
    worst = 0.0
    for spoilt in (0.03, 0.1, 0.2, 0.3, 0.4, 0.6, 0.9):
        for repaired in (0.0, 0.02, 0.1, 0.2, 0.35):
            if spoilt <= repaired or spoilt + repaired > 1:
                continue
            weights = multinomial.pmf(outcomes, num_texts, [spoilt, repaired, 1 - spoilt - repaired])
            worst = max(worst, float(weights[bounds < spoilt - repaired - 1e-9].sum()))
    assert 0.0 < worst <= tail


@pytest.mark.parametrize("num_texts", [200, 1000, 2500])
def test_more_texts_spoilt_is_a_higher_bound_and_more_repaired_beside_them_costs_little(num_texts: int) -> None:
    for repaired in (0, 3, 20):
        bounds = [drop_bound(spoilt, repaired, num_texts, 0.025) for spoilt in (0, 1, 4, 10, 30)]
        assert bounds == sorted(bounds)
    for spoilt in (1, 5, 20):
        # Changes that cancel: wider than none, narrower than if each were bounded by itself and multiplied.
        even = drop_bound(spoilt, spoilt, num_texts, 0.025)
        product = clopper_pearson_upper(2 * spoilt, num_texts, 0.025 * 0.35) * (
            2 * clopper_pearson_upper(spoilt, 2 * spoilt, 0.025 * 0.65) - 1
        )
        assert drop_bound(0, 0, num_texts, 0.025) < even < product * 0.9


# Promises


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of max_accuracy_drop and min_agreement"),
        ({"max_accuracy_drop": 0.1, "min_agreement": 0.9}, "one of max_accuracy_drop"),
        ({"max_accuracy_drop": 0.0}, "max_accuracy_drop must lie between 0 and 1"),
        ({"max_accuracy_drop": 1.5}, "max_accuracy_drop must lie between 0 and 1"),
        ({"min_agreement": 1.0}, "min_agreement must lie between 0 and 1"),
        ({"min_agreement": math.nan}, "min_agreement must lie between 0 and 1"),
        ({"min_agreement": 0.9, "confidence": 1.0}, "confidence must lie in"),
        ({"min_agreement": 0.9, "confidence": 0.4}, "confidence must lie in"),
    ],
)
def test_a_promise_that_makes_no_sense_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Promise(**arguments)


def faultless(num_texts: int) -> ExitProfile:
    right = np.ones((num_texts, 2), dtype=bool)
    return ExitProfile((1, 2), np.zeros((num_texts, 2), dtype=np.float32), right, right)


def ask_all(profile: ExitProfile) -> Callable[[float], np.ndarray]:
    return lambda _: np.zeros(len(profile), dtype=np.int64)


PROMISES = st.builds(
    lambda kind, allowed, confidence: (
        Promise(max_accuracy_drop=allowed, confidence=confidence)
        if kind
        else Promise(min_agreement=1 - allowed, confidence=confidence)
    ),
    st.booleans(),
    st.floats(0.003, 0.3),
    st.sampled_from([0.5, 0.9, 0.95, 0.99]),
)


@given(PROMISES)
def test_the_texts_needed_are_exactly_enough(promise: Promise) -> None:
    enough, too_few = faultless(promise.texts_needed), faultless(promise.texts_needed - 1)
    assert calibrate(enough, ask_all(enough), promise, speeds=[0.5]).speed == 0.5
    with pytest.raises(TooFewTextsError, match=f"at least {promise.texts_needed} are needed"):
        calibrate(too_few, ask_all(too_few), promise, speeds=[0.5])


def test_half_a_point_needs_hundreds_of_texts() -> None:
    assert 598 <= Promise(max_accuracy_drop=0.005).texts_needed < 1060
    assert Promise(min_agreement=0.99).texts_needed == math.ceil(math.log(0.05) / math.log(0.99))


def test_an_accuracy_promise_without_labels_is_refused() -> None:
    profile = faultless(1000)
    unlabelled = ExitProfile(profile.depths, profile.uncertainty, profile.agrees, None)
    with pytest.raises(ValueError, match="needs labelled texts.*min_agreement"):
        calibrate(unlabelled, ask_all(profile), Promise(max_accuracy_drop=0.05), speeds=[0.5])
    assert calibrate(unlabelled, ask_all(profile), Promise(min_agreement=0.9), speeds=[0.5]).speed == 0.5


@pytest.mark.parametrize("promise", [Promise(max_accuracy_drop=0.05), Promise(min_agreement=0.95)])
def test_the_walk_ends_at_the_first_speed_that_fails(promise: Promise) -> None:
    # Below 0.2 all is well; texts of uncertainty 0.25 are answered wrongly; above, everything would be right again.
    profile = faultless(1000)
    unsure = np.repeat(np.array([[0.1], [0.25]], dtype=np.float32), [700, 300], axis=0)
    wrong = unsure == 0.25
    right = np.concatenate([~wrong, np.ones_like(wrong)], axis=1)
    profile = ExitProfile((1, 2), np.concatenate([unsure, unsure], axis=1), right, right)

    def predicted(speed: float) -> np.ndarray:
        return np.full(1000, int(speed > 0.35))  # from there on, the full model answers all

    found = calibrate(profile, predicted, promise, speeds=[0.05, 0.15, 0.2, 0.3, 0.4, 0.5])
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
    assert found.num_texts == 1000


def test_nothing_that_passes_leaves_the_full_model() -> None:
    profile = faultless(1000)
    wrong = np.stack([np.zeros(1000, dtype=bool), np.ones(1000, dtype=bool)], axis=1)
    profile = ExitProfile(profile.depths, profile.uncertainty, wrong, wrong)
    found = calibrate(profile, ask_all(profile), Promise(min_agreement=0.9), speeds=[0.1, 0.2])
    assert found.speed == 0.0
    assert len(found.trials) == 1


def test_calibration_follows_the_rule_on_a_miss() -> None:
    profile = random_profile(2000)
    kept = ExitProfile(profile.depths, profile.uncertainty, np.ones_like(profile.agrees), None)
    options = {"promise": Promise(min_agreement=0.9), "speeds": [0.5]}
    stop = calibrate(kept, ask_all(kept), on_miss="stop", **options)  # type: ignore[arg-type]
    on = calibrate(kept, ask_all(kept), on_miss="continue", **options)  # type: ignore[arg-type]
    assert stop.trials[0].mean_exit_layer == 1
    assert on.trials[0].mean_exit_layer == pytest.approx(kept.exit_layers(0.5).mean())


@pytest.mark.parametrize("promise", [Promise(max_accuracy_drop=0.02), Promise(min_agreement=0.95)])
def test_promises_are_broken_no_more_often_than_they_say(promise: Promise) -> None:
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
        sample = world(600)
        speed = calibrate(sample, ask_all(sample), promise, speeds=speeds.tolist()).speed
        broken += truth[speed] > promise.allowed
        kept.append(speed)
    assert broken <= rounds * 0.05 + 2 * math.sqrt(rounds * 0.05 * 0.95)
    assert float(np.mean(kept)) > 0.05  # and it is no empty promise
