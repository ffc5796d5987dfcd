"""Uncertainties, scores learned from agreement, and the engine's rule on a profile."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from geep.exits import (
    AGREEMENT,
    CRITERIA,
    AgreementScore,
    ExitProfile,
    Fusing,
    answer_of,
    fit_agreement_score,
    fit_fusing,
    fit_temperature,
    follow,
    profile_exits,
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


@pytest.mark.parametrize("multi_label", [False, True])
def test_scores_are_no_surer_than_as_many_right_answers_allow(multi_label: bool) -> None:
    """Where all answers are right the loss alone has no minimum: every score would end at 1."""
    for count in (2, 200, 20_000):
        logits = torch.tensor([[3.0, -3.0], [-3.0, 3.0]]).repeat(count // 2, 1)
        labels = torch.eye(2).repeat(count // 2, 1) if multi_label else torch.tensor([0, 1]).repeat(count // 2)
        scaled = logits / fit_temperature(logits, labels, multi_label=multi_label)
        score = (scaled.sigmoid() if multi_label else scaled.softmax(-1)).amax(-1)
        # The rule of succession.
        assert score.tolist() == pytest.approx([(count + 1) / (count + 2)] * count, abs=1e-3)


def test_a_student_fitted_to_its_teacher_is_as_sure_as_that() -> None:
    random = torch.Generator().manual_seed(0)
    teacher = torch.randn(500, 4, generator=random)
    assert fit_temperature(3 * teacher, teacher.softmax(-1)) == pytest.approx(3, rel=1e-3)
    assert fit_temperature(3 * teacher, teacher.sigmoid(), multi_label=True) == pytest.approx(3, rel=1e-3)


def test_temperatures_stay_finite_where_the_loss_has_no_minimum() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
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
    found = fit_agreement_score(logits, lexical, agrees)
    assert (found.bias, found.own, found.table) == pytest.approx((-0.5, 1.2, 0.4), abs=0.1)
    unsure = found.uncertainty(logits, lexical).numpy()
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 0.7)):
        inside = (unsure >= low) & (unsure < high)
        assert unsure[inside].mean() == pytest.approx((~agrees[inside]).mean(), abs=0.03)


@pytest.mark.parametrize("agrees", [True, False])
def test_exits_that_always_or_never_agree_have_a_score(agrees: bool) -> None:
    score = fit_agreement_score(torch.randn(98, 2), None, np.full(98, agrees))
    assert score.uncertainty(torch.randn(3, 2), None).tolist() == pytest.approx([0.01 if agrees else 0.99] * 3)
    # A table whose guess is always the same far-off one, as labels that no training text had, does no harm.
    flags = np.arange(98) % 2 == 0
    score = fit_agreement_score(torch.randn(98, 2), torch.tensor([[-30.0, 30]]).expand(98, 2), flags)
    assert 0 < float(score.uncertainty(torch.zeros(1, 2), torch.tensor([[-30.0, 30]]))) < 1


def test_scores_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        AgreementScore(0.0, math.nan, 0.0)
    with pytest.raises(ValueError, match="Got 1 agreement scores for 3 depths"):
        profile_exits(torch.zeros(3, 4, 2), (1, 2, 4), criterion=AGREEMENT, agreement=[AgreementScore(0.0, 1.0, 0.0)])


@pytest.mark.parametrize("multi_label", [False, True])
def test_fused_answers_are_the_likeliest_sum_of_the_two(multi_label: bool) -> None:
    random = torch.Generator().manual_seed(0)
    own, table = (3 * torch.randn(30_000, 3, generator=random) for _ in range(2))
    true = Fusing(0.8, 0.4)
    wanted = true(own, table)
    if multi_label:
        labels = (torch.rand(wanted.shape, generator=random) < wanted.sigmoid()).float()
    else:
        labels = torch.multinomial(wanted.softmax(-1), 1, generator=random)[:, 0]
    soft = wanted.sigmoid() if multi_label else wanted.softmax(-1)
    for target in (labels, soft):
        found = fit_fusing(own, table, target, multi_label=multi_label)
        assert (found.own, found.table) == pytest.approx((0.8, 0.4), abs=0.03)


def test_a_table_that_says_the_contrary_is_not_fused() -> None:
    own, table = torch.randn(2, 2000, 3, generator=torch.Generator().manual_seed(1))
    found = fit_fusing(own, table, (own - table).softmax(-1))
    assert found == Fusing(1 / fit_temperature(own, (own - table).softmax(-1)), 0.0)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, -0.1), (float("nan"), 0.0), (1.0, float("inf"))])
def test_weights_that_cannot_be_are_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="own above 0"):
        Fusing(*weights)


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
