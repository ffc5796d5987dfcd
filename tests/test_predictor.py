"""Rows, counts and predictions equal slow references, files come back whole or are refused, signals are found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from geep.folder import TABLE_NAME, digest_tensors
from geep.hash_table import HashTable
from geep.predictor import (
    ABSENT_LOGIT,
    LEXICAL_PENALTIES,
    PREDICTORS,
    ExitPrediction,
    ExitPredictor,
    ExitTable,
    FittedTable,
    Keys,
    Levels,
    ScoreRows,
    TextExits,
    fit_levels,
    fit_lexical,
    fit_predictor,
    parts as predictor_parts,
    score_by_ridge,
)
from geep.predictor.features import Features
from geep.predictor.keys import with_key_weight
from geep.predictor.linear import SIGMOIDS, SOFTMAX, LinearModel, fit_linear
from geep.predictor.parts import frequent_ngrams, parts_of

VOCAB_SIZE = 50
SPECIAL_IDS = (0, 1, 2)
DEPTHS = (1, 2, 4, 6)
SPEEDS = (0.2, 0.5, 0.8)
FINGERPRINT = {"model": "m", "tokenizer": "t"}
# A small vocabulary, so that n-grams repeat and special ids fall between tokens.
TEXTS = st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=12)


def pack(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    return ids, torch.tensor([len(text) for text in texts], dtype=torch.int64)


def exits_for(texts: list[list[int]], num_speeds: int = len(SPEEDS)) -> Tensor:
    """Return arbitrary exits that depend on the text alone."""
    sums = torch.tensor([sum(text) + len(text) for text in texts], dtype=torch.int64)
    return (sums[:, None] + torch.arange(num_speeds)) % len(DEPTHS)


def build(texts: list[list[int]], **changes: Any) -> ExitTable:
    options = {"depths": DEPTHS, "speeds": SPEEDS, "vocab_size": VOCAB_SIZE, "special_ids": SPECIAL_IDS} | changes
    return ExitTable.build(*pack(texts), exits_for(texts), **options)


def ngrams_of(text: list[int], order: int) -> list[tuple[int, ...]]:
    found = []
    for size in range(2, order + 1):
        grams = [tuple(text[start : start + size]) for start in range(len(text) - size + 1)]
        found += [gram for gram in grams if not set(gram) & set(SPECIAL_IDS)]
    return found


def slow_keys(texts: list[list[int]], order: int, min_count: int, max_ngrams: int) -> list[tuple[int, ...]]:
    """Return the n-grams that get a row, in the order of their rows."""
    seen = Counter(gram for text in texts for gram in ngrams_of(text, order))
    frequent = [gram for gram, count in seen.items() if count >= min_count]
    by_key = sorted(frequent, key=lambda gram: (len(gram), gram))
    return sorted(sorted(by_key, key=lambda gram: -seen[gram])[:max_ngrams], key=lambda gram: (len(gram), gram))


def slow_rows(text: list[int], grams: list[tuple[int, ...]], order: int) -> list[int]:
    """Return the rows of a text's keys, without the neutral one, sorted."""
    place = {gram: VOCAB_SIZE + index for index, gram in enumerate(grams)}
    unigrams = [token for token in text if token not in SPECIAL_IDS]
    return sorted(unigrams + [place[gram] for gram in ngrams_of(text, order) if gram in place])


def split_rows(table: ExitTable, texts: list[list[int]]) -> list[list[int]]:
    rows, offsets = table.rows_of(*pack(texts))
    borders = [*offsets.tolist(), rows.numel()]
    bags = [rows[start:end].tolist() for start, end in zip(borders[:-1], borders[1:], strict=True)]
    return [sorted(row for row in bag if row != table.keys.neutral_row) for bag in bags]


def planted(num_texts: int, seed: int) -> tuple[list[list[int]], Tensor, Tensor]:
    """Return texts, exits and labels: token 10 leaves last, tokens 20.. early; token 30 + label tells the label."""
    random = np.random.default_rng(seed)
    hard = random.random(num_texts) < 0.4
    labels = random.integers(0, 3, num_texts)
    texts = [
        [0, *random.integers(20, 28, random.integers(3, 8)).tolist(), 10 if deep else 11, 30 + int(label), 2]
        for deep, label in zip(hard, labels, strict=True)
    ]
    noise = random.random((num_texts, len(SPEEDS))) < 0.1
    exits = np.where(hard[:, None] ^ noise, [3, 3, 2], [1, 1, 0])
    return texts, torch.from_numpy(exits), torch.from_numpy(labels)


def fit(kind: str = "fitted", labels: Tensor | None = None, num_labels: int = 3, **options: Any) -> ExitPredictor:
    texts, exits, own_labels = planted(300, 0)
    heldout, heldout_exits, _ = planted(200, 1)
    return fit_predictor(
        kind,
        TextExits(*pack(texts), exits),
        own_labels if labels is None else labels,
        TextExits(*pack(heldout), heldout_exits),
        **{
            "depths": DEPTHS,
            "speeds": SPEEDS,
            "num_labels": num_labels,
            "vocab_size": VOCAB_SIZE,
            "special_ids": SPECIAL_IDS,
        }
        | options,
    )


@pytest.fixture(scope="module", params=sorted(PREDICTORS))
def predictor(request: pytest.FixtureRequest) -> ExitPredictor:
    return fit(request.param)


def same(one: ExitPrediction, other: ExitPrediction) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one))


# ---------------------------------------------------------------------------------------------------- keys and counts


@given(TEXTS, TEXTS, st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 3, 1000]))
@settings(deadline=None, max_examples=80)
def test_rows_equal_a_slow_search(
    texts: list[list[int]], others: list[list[int]], order: int, min_count: int, max_ngrams: int
) -> None:
    table = build(texts, ngram_order=order, min_count=min_count, max_ngrams=max_ngrams)
    grams = slow_keys(texts, order, min_count, max_ngrams)
    assert table.num_rows == VOCAB_SIZE + len(grams) + 1
    for batch in (texts, others):
        rows, offsets = table.rows_of(*pack(batch))
        assert (rows.numel(), offsets.numel()) == (sum(map(len, batch)) * order, len(batch))
        assert split_rows(table, batch) == [slow_rows(text, grams, order) for text in batch]


@given(TEXTS, st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_counts_equal_a_slow_dict(texts: list[list[int]], order: int) -> None:
    table = build(texts, ngram_order=order)
    grams, exits = slow_keys(texts, order, 2, 1000), exits_for(texts).tolist()
    expected = Counter(
        (row, speed, exits[index][speed])
        for index, text in enumerate(texts)
        for row in slow_rows(text, grams, order)
        for speed in range(len(SPEEDS))
    )
    places = torch.nonzero(table.counts)
    found = {tuple(place): int(table.counts[tuple(place)]) for place in places.tolist()}
    assert found == dict(expected)


def test_table_does_not_depend_on_the_order_of_texts() -> None:
    texts, _, _ = planted(60, 3)
    one, other = build(texts), build(texts[::-1])
    assert torch.equal(one.counts, other.counts)
    state = other.keys.ngrams.state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.keys.ngrams.state().items())


def test_ngrams_of_the_largest_ids_are_kept_apart() -> None:
    top = (1 << 18) - 1
    texts = [[top, top, top], [top, 0, top], [0, top, 0], [0, 0, 0]] * 2
    table = build(texts, vocab_size=top + 1, special_ids=(), ngram_order=3)
    assert len(table.keys.ngrams) == 4 + 4
    with pytest.raises(ValueError, match="use ngram_order=1"):
        build(texts, vocab_size=top + 2, special_ids=(), ngram_order=2)
    assert build(texts, vocab_size=top + 2, special_ids=(), ngram_order=1).num_rows == top + 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ngram_order": 4}, "ngram_order must be within"),
        ({"ngram_order": 0}, "ngram_order must be within"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"special_ids": (VOCAB_SIZE,)}, "special_ids must be within"),
        ({"depths": (2, 1, 4, 6)}, "depths must be increasing"),
        ({"depths": (0, 1, 4, 6)}, "depths must be increasing"),
        ({"speeds": (0.2, 0.5, 0.5)}, "speeds must be increasing"),
        ({"speeds": (0.2, 0.5, 1.5)}, "speeds must be increasing"),
        ({"speeds": (0.2, 0.5)}, "exit_indices must have shape"),
        ({"depths": (1, 2)}, "give places in depths"),
        ({"min_count": 0}, "min_count must be >= 1"),
    ],
)
def test_build_refuses_wrong_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build([[3, 4, 5], [6, 7]], **changes)


def test_table_refuses_counts_of_another_shape() -> None:
    table = build([[3, 4]])
    with pytest.raises(ValueError, match="counts must be torch.int32"):
        replace(table, counts=table.counts[1:])


SEPARATORS = st.sampled_from([None, 2])


@given(TEXTS, st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 3, 1000]), st.integers(1, 30), SEPARATORS)
@settings(deadline=None, max_examples=60)
def test_ngrams_counted_a_class_at_a_time_are_those_counted_at_once(
    texts: list[list[int]], order: int, min_count: int, max_ngrams: int, most_ngrams: int, separator_id: int | None
) -> None:
    keys = Keys(VOCAB_SIZE, SPECIAL_IDS, order, HashTable(1), separator_id)
    options = {"min_count": min_count, "max_ngrams": max_ngrams}
    once = frequent_ngrams(keys, *pack(texts), **options).state()
    found = frequent_ngrams(keys, *pack(texts), **options, most_ngrams=most_ngrams).state()
    assert all(torch.equal(tensor, once[name]) for name, tensor in found.items())


@given(TEXTS, st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_parts_are_all_texts_in_order_and_no_larger_than_they_must(texts: list[list[int]], most: int) -> None:
    ids, lengths = pack(texts)
    parts = list(parts_of(ids, lengths, most_tokens=most))
    assert [each for part in parts for each in range(len(texts))[part.texts]] == list(range(len(texts)))
    for name, whole in (("input_ids", ids), ("lengths", lengths)):
        assert torch.equal(torch.cat([whole[:0], *(getattr(part, name) for part in parts)]), whole)
    for part, after in zip(parts[:-1], parts[1:], strict=True):
        assert part.lengths.numel() == 1 or int(part.lengths.sum()) <= most
        assert int(part.lengths.sum() + after.lengths[0]) > most


@given(TEXTS, st.integers(1, 3), SEPARATORS)
@settings(deadline=None, max_examples=60)
def test_what_is_learned_does_not_depend_on_the_size_of_parts(
    texts: list[list[int]], order: int, separator_id: int | None
) -> None:
    options = {"ngram_order": order, "separator_id": separator_id}
    whole, ids = build(texts, **options), pack(texts)
    features = Features.of(whole.keys, *ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor_parts, "MOST_TOKENS", 3)
        assert torch.equal(build(texts, **options).counts, whole.counts)
        cut = Features.of(whole.keys, *ids)
    assert (cut.matrix != features.matrix).nnz == 0
    assert cut.scale.tolist() == features.scale.tolist()
    expected = torch.zeros(len(texts), whole.num_rows)
    for text, bag in enumerate(split_rows(whole, texts)):
        for row in bag:
            expected[text, row] += 1
    assert features.columns.tolist() == expected.any(0).nonzero().flatten().tolist()
    assert np.array_equal(features.matrix.toarray(), expected[:, features.columns].numpy())
    assert features.num_keys.tolist() == expected.sum(1).clamp(min=1).tolist()


# ------------------------------------------------------------------------------------------------------------- scores


def test_counts_predictor_equals_a_slow_dict() -> None:
    texts = [[3, 4, 5, 3], [5, 6], [3, 6, 6], [4, 5]]
    table = build(texts, ngram_order=1)
    exits = exits_for(texts).tolist()
    found = PREDICTORS["counts"](table, TextExits(*pack(texts), exits_for(texts)))
    for speed in range(len(SPEEDS)):
        layers = [(token, DEPTHS[exits[index][speed]]) for index, text in enumerate(texts) for token in text]
        prior = sum(layer for _, layer in layers) / len(layers)
        assert float(found.prior[speed]) == pytest.approx(prior)
        for token in range(3, 7):
            own = [layer for each, layer in layers if each == token]
            expected = (sum(own) + 8 * prior) / (len(own) + 8) - prior
            assert float(found.rows[token, speed]) == pytest.approx(expected, abs=1e-6)
    assert not found.rows[7:].any()


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_ridge_reads_only_keys_that_were_seen(alpha: float | None) -> None:
    texts, exits, _ = planted(100, 0)
    table = build(texts)
    found = score_by_ridge(table, TextExits(*pack(texts), exits), alpha=alpha)
    unseen = ~table.counts.flatten(1).any(1)
    assert bool(unseen[-1])
    assert not found.rows[unseen].any()
    assert bool((found.rows[10] > found.rows[11]).all())


def test_ridge_works_on_few_texts_and_on_texts_without_keys() -> None:
    few = [[3, 4], [5, 6]]
    found = score_by_ridge(build(few), TextExits(*pack(few), exits_for(few)))
    assert bool(found.rows.isfinite().all())
    bare = [[0, 2], []]
    found = score_by_ridge(build(bare), TextExits(*pack(bare), exits_for(bare)))
    assert found.prior.tolist() == pytest.approx(torch.tensor(DEPTHS)[exits_for(bare)].float().mean(0).tolist())


# ------------------------------------------------------------------------------------------------------------- levels


@given(st.integers(1, 400), st.integers(0, 1000), st.floats(0, 1), st.sampled_from([1, 4, 16]))
@settings(deadline=None, max_examples=60)
def test_levels_rise_with_the_score_at_every_quantile(count: int, seed: int, noise: float, num_bins: int) -> None:
    random = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, 2, generator=random).round(decimals=1)
    blurred = (1 - noise) * scores + noise * torch.rand(count, 2, generator=random)
    exits = (blurred * len(DEPTHS)).long().clamp(max=len(DEPTHS) - 1)
    levels = fit_levels(scores, exits, num_depths=len(DEPTHS), num_bins=num_bins)
    assert levels.cumulative.shape[1] == levels.edges.shape[1] + 1 <= num_bins
    grid = torch.linspace(-0.5, 1.5, 50)
    deeper = None
    for quantile in (1.0, 0.9, 0.5, 0.1):
        found = levels.exit_indices(grid, 1, quantile)
        assert bool((found.diff() >= 0).all())
        assert deeper is None or bool((found <= deeper).all())
        deeper = found
    assert bool((levels.exit_indices(grid, 0, 1.0) == exits[:, 0].max()).all())


def test_levels_are_the_exits_seen_in_each_bin() -> None:
    scores = torch.arange(64.0)[:, None]
    exits = torch.tensor([0] * 32 + [3] * 32)[:, None]
    levels = fit_levels(scores, exits, num_depths=4, num_bins=2)
    assert levels.edges.tolist() == [[31.5]]
    # 32 texts of the bin and 4 of the whole, half of which left first.
    assert levels.cumulative[0, :, 0].tolist() == pytest.approx([34 / 36, 2 / 36])
    assert levels.exit_indices(torch.tensor([0.0, 31.0, 32.0, 99.0]), 0, 0.5).tolist() == [0, 0, 3, 3]


@pytest.mark.parametrize(
    ("scores", "exits", "options", "error", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, 2).long(), {}, ValueError, "at least one text"),
        (torch.zeros(3), torch.zeros(3).long(), {}, ValueError, "expected"),
        (torch.zeros(3, 1), torch.zeros(3, 1), {}, TypeError, "must be torch.int64"),
        (torch.zeros(3, 1), torch.full((3, 1), 9), {}, ValueError, "must be within 0..3"),
        (torch.full((3, 1), torch.nan), torch.zeros(3, 1).long(), {}, ValueError, "not finite"),
        (torch.zeros(3, 1), torch.zeros(3, 1).long(), {"num_bins": 0}, ValueError, "num_bins must be"),
    ],
)
def test_levels_refuse_wrong_input(
    scores: Tensor, exits: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit_levels(scores, exits, num_depths=4, **options)


# --------------------------------------------------------------------------------------------------------- prediction


def test_planted_signal_is_found(predictor: ExitPredictor) -> None:
    texts, exits, labels = planted(200, 2)
    for index, speed in enumerate(SPEEDS):
        found = predictor.predict(*pack(texts), speed=speed)
        is_deep = torch.tensor([10 in text for text in texts])
        deepest, shallow = (DEPTHS[[3, 3, 2][index]], DEPTHS[[1, 1, 0][index]])
        assert bool((found.exit_layers[is_deep] == deepest).all())
        # The one bin that holds both kinds of text has one answer for them.
        assert float((found.exit_layers[~is_deep] == shallow).float().mean()) > 0.9
        assert spearmanr(found.scores, torch.tensor(DEPTHS)[exits[:, index]]).statistic > 0.6
        assert found.lexical_logits is not None
        assert bool((found.lexical_logits.argmax(1) == labels).all())


def test_prediction_of_a_text_does_not_depend_on_its_neighbours(predictor: ExitPredictor) -> None:
    texts = [*planted(30, 4)[0], [], [10], [0], [45, 46], [0, 2]]
    together = predictor.predict(*pack(texts), speed=0.5)
    alone = [predictor.predict(*pack([text]), speed=0.5) for text in texts]
    for name in vars(together):
        assert torch.equal(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))


def test_prediction_equals_a_slow_mean_over_keys(predictor: ExitPredictor) -> None:
    texts = [*planted(10, 5)[0], [], [10]]
    rows = predictor.fitted.score_rows
    found = predictor.predict(*pack(texts), speed=0.8)
    for index, bag in enumerate(split_rows(predictor.table, texts)):
        expected = rows.rows[bag, 2].sum() / max(len(bag), 1) + rows.prior[2]
        assert float(found.scores[index]) == pytest.approx(float(expected), abs=1e-5)


def test_texts_without_known_keys_get_the_prior(predictor: ExitPredictor) -> None:
    found = predictor.predict(*pack([[], [0, 2], [44], [44, 45, 46]]), speed=0.5)
    assert found.scores.tolist() == [float(predictor.fitted.score_rows.prior[1])] * 4
    assert len(set(found.exit_layers.tolist())) == 1
    assert found.lexical_logits is not None
    assert torch.equal(found.lexical_logits, found.lexical_logits[:1].expand(4, -1))


def test_empty_batch_gives_an_empty_prediction(predictor: ExitPredictor) -> None:
    found = predictor.predict(*pack([]), speed=0.5)
    assert found.exit_layers.dtype == torch.int64
    assert found.lexical_logits is not None
    assert [tuple(tensor.shape) for tensor in (found.exit_layers, found.scores, found.lexical_logits)] == [
        (0,),
        (0,),
        (0, 3),
    ]


def test_speed_takes_the_nearest_of_the_grid_and_zero_is_the_full_model(predictor: ExitPredictor) -> None:
    batch = pack(planted(40, 6)[0])
    at = {speed: predictor.predict(*batch, speed=speed) for speed in (0.0, 0.1, 0.2, 0.3, 0.6, 0.65, 0.7, 1.0)}
    assert at[0.0].exit_layers.tolist() == [DEPTHS[-1]] * 40
    assert same(at[0.1], at[0.2])
    assert same(at[0.3], at[0.2])
    assert same(at[0.7], at[1.0])
    assert same(at[0.6], predictor.predict(*batch, speed=0.5))


def test_a_higher_quantile_is_never_shallower(predictor: ExitPredictor) -> None:
    batch = pack(planted(40, 6)[0])
    layers = [predictor.predict(*batch, speed=0.5, quantile=each).exit_layers for each in (0.05, 0.5, 0.95, 1.0)]
    assert all(bool((low <= high).all()) for low, high in zip(layers[:-1], layers[1:], strict=True))
    assert layers[-1].tolist() == [DEPTHS[-1]] * 40


@pytest.mark.parametrize(
    ("ids", "lengths", "options", "error", "message"),
    [
        ([3], [1], {"speed": 1.2}, ValueError, "speed must be within"),
        ([3], [1], {"quantile": 0.0}, ValueError, "quantile must be in"),
        ([3], [2], {}, ValueError, "lengths must be >= 0 and sum"),
        ([3], [2, -1], {}, ValueError, "lengths must be >= 0 and sum"),
        ([VOCAB_SIZE], [1], {}, ValueError, "use the tokenizer that the table was built with"),
        ([-1], [1], {}, ValueError, "input_ids must be within"),
        ([[3]], [1], {}, ValueError, "pack the texts without padding"),
        ([3.0], [1], {}, TypeError, "input_ids must be torch.int64"),
    ],
)
def test_predict_refuses_wrong_input(
    ids: list[Any], lengths: list[int], options: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit_once().predict(torch.tensor(ids), torch.tensor(lengths), **({"speed": 0.5} | options))


_FITTED: list[ExitPredictor] = []


def fit_once() -> ExitPredictor:
    if not _FITTED:
        _FITTED.append(fit())
    return _FITTED[0]


def test_a_copy_on_a_device_predicts_the_same(predictor: ExitPredictor) -> None:
    batch = pack(planted(20, 7)[0])
    assert same(predictor.to("cpu").predict(*batch, speed=0.5), predictor.predict(*batch, speed=0.5))


def test_fit_refuses_unknown_kinds_and_missing_texts() -> None:
    with pytest.raises(ValueError, match=r"Unknown predictor 'magic'; supported: \['counts', 'fitted'\]"):
        fit("magic")
    none = TextExits(*pack([]), exits_for([]))
    with pytest.raises(ValueError, match="Found 0 training and 0 held-out texts"):
        fit_predictor(
            "counts", none, None, none, depths=DEPTHS, speeds=SPEEDS, num_labels=2, vocab_size=9, special_ids=()
        )


# ------------------------------------------------------------------------------------------------------------- labels


def test_label_absent_from_training_gets_a_very_low_logit(predictor: ExitPredictor) -> None:
    found = fit("counts", num_labels=5).predict(*pack([[10, 30], [44]]), speed=0.5).lexical_logits
    assert found is not None
    assert found[:, 3:].tolist() == [[ABSENT_LOGIT] * 2] * 2
    assert bool((found[:, :3] > ABSENT_LOGIT + 10).all())


@pytest.mark.parametrize(("num_present", "num_labels"), [(1, 1), (1, 3), (2, 2), (2, 3)])
def test_few_labels_present_work(num_present: int, num_labels: int) -> None:
    labels = planted(300, 0)[2] % num_present
    found = fit("counts", labels, num_labels).predict(*pack(planted(300, 0)[0]), speed=0.5).lexical_logits
    assert found is not None
    assert found.shape == (300, num_labels)
    assert bool((found.argmax(1) == labels).all())


def test_two_labels_are_a_softmax_with_the_right_odds() -> None:
    texts, _, labels = planted(300, 0)
    keys = build(texts).keys
    two = fit_lexical(keys, *pack(texts), labels % 2, num_labels=2, penalty=1.0)
    assert torch.allclose(two.rows[:, 0], -two.rows[:, 1])
    sigmoids = torch.stack([labels % 2 == 0, labels % 2 == 1], 1).float()
    ovr = fit_lexical(keys, *pack(texts), sigmoids, num_labels=2, multi_label=True, penalty=1.0)
    assert torch.allclose(two.rows[:, 1] - two.rows[:, 0], ovr.rows[:, 1], atol=0.05)
    assert float(ovr.rows.abs().max()) > 5


def test_label_ids_are_probabilities_of_one() -> None:
    texts, _, labels = planted(300, 0)
    keys = build(texts).keys
    hard = fit_lexical(keys, *pack(texts), labels, num_labels=4)
    soft = fit_lexical(keys, *pack(texts), torch.nn.functional.one_hot(labels, 4).double(), num_labels=4)
    assert torch.equal(hard.rows, soft.rows)
    assert torch.equal(hard.bias, soft.bias)


@pytest.mark.parametrize("multi_label", [False, True])
def test_probabilities_that_hang_on_a_token_are_learned(multi_label: bool) -> None:
    texts, _, labels = planted(2000, 0)
    says = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.7, 0.05], [0.3, 0.3, 0.4]])
    lexical = fit_lexical(build(texts).keys, *pack(texts), says[labels], num_labels=3, multi_label=multi_label)
    asked, _, known = planted(200, 1)
    rows, offsets = build(texts).keys.rows_of(*pack(asked))
    sums = torch.nn.functional.embedding_bag(
        rows, with_key_weight(build(texts).keys, lexical.rows), offsets, mode="sum"
    )
    logits = sums[:, 1:] * sums[:, :1].rsqrt() + lexical.bias
    found = logits.sigmoid() if multi_label else logits.softmax(1)
    assert torch.allclose(found, says[known], atol=0.06)
    assert float((found - says[known]).abs().mean()) < 0.02


@pytest.mark.parametrize("multi_label", [False, True])
def test_hard_labels_give_what_scikit_learn_gives(multi_label: bool) -> None:
    texts, _, labels = planted(400, 0)
    features = Features.of(build(texts).keys, *pack(texts))
    matrix = features.weighted(exponent=0.5)
    if multi_label:
        targets, hard, loss = (labels == 1).float()[:, None].numpy(), (labels == 1).numpy(), SIGMOIDS
    else:
        targets, hard, loss = torch.nn.functional.one_hot(labels).float().numpy(), labels.numpy(), SOFTMAX
    start = LinearModel(np.zeros((matrix.shape[1], targets.shape[1])), np.zeros(targets.shape[1]))
    found = fit_linear(matrix, targets, loss, penalty=2.0, start=start).outputs(matrix)
    model = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(matrix, hard)
    expected = model.decision_function(matrix).reshape(found.shape)
    if not multi_label:
        expected -= expected.mean(1, keepdims=True)
        found = found - found.mean(1, keepdims=True)
    assert np.allclose(found, expected, atol=0.05)


def test_the_penalty_is_the_one_that_foretells_texts_it_was_not_fitted_to() -> None:
    texts, _, labels = planted(300, 0)
    keys, noise = build(texts).keys, labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    for given_labels, is_strongest in ((labels, False), (noise, True)):
        found = fit_lexical(keys, *pack(texts), given_labels, num_labels=3)
        strongest = fit_lexical(keys, *pack(texts), given_labels, num_labels=3, penalty=LEXICAL_PENALTIES[0])
        assert torch.allclose(found.rows, strongest.rows, atol=0.02) == is_strongest


def test_multi_label_has_a_sigmoid_for_each_label() -> None:
    texts, _, labels = planted(300, 0)
    is_deep = torch.tensor([10 in text for text in texts])
    targets = torch.stack([labels == 0, is_deep, torch.zeros(300).bool(), torch.ones(300).bool()], 1).float()
    predictor = fit("counts", targets, 4, multi_label=True)
    assert predictor.fitted.multi_label
    assert predictor.num_labels == 4
    found = predictor.predict(*pack(texts), speed=0.5).lexical_logits
    assert found is not None
    assert torch.equal(found > 0, targets.bool())
    assert found[0, 2:].tolist() == [ABSENT_LOGIT, -ABSENT_LOGIT]


def test_no_labels_means_no_lexical_exit(tmp_path: Path) -> None:
    texts, exits, _ = planted(60, 0)
    batch = pack(texts)
    left = TextExits(*batch, exits)
    predictor = fit_predictor(
        "counts", left, None, left, depths=DEPTHS, speeds=SPEEDS, num_labels=3,
        vocab_size=VOCAB_SIZE, special_ids=SPECIAL_IDS, ngram_order=1,
    )  # fmt: skip
    again = ExitPredictor.load(predictor.save(tmp_path, fingerprint={}), fingerprint={})
    for each in (predictor, again):
        assert each.num_labels is None
        assert each.predict(*batch, speed=0.5).lexical_logits is None


@pytest.mark.parametrize("multi_label", [False, True])
def test_texts_without_keys_leave_the_label_frequencies(multi_label: bool) -> None:
    labels = torch.tensor([0, 1, 1, 1])
    given_labels = torch.nn.functional.one_hot(labels, 3).float() if multi_label else labels
    keys = Keys(VOCAB_SIZE, SPECIAL_IDS, 2, HashTable(2))
    found = fit_lexical(keys, *pack([[0], [], [2], []]), given_labels, num_labels=3, multi_label=multi_label)
    shares = found.bias.sigmoid() if multi_label else found.bias.softmax(0)
    assert shares.tolist() == pytest.approx([0.25, 0.75, 0.0], abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "multi_label", "error", "message"),
    [
        (torch.tensor([0, 3]), False, ValueError, "labels must be within 0..2"),
        (torch.tensor([0, -1]), False, ValueError, "leave texts without a label out"),
        (torch.tensor([0.0, 1.0]), False, TypeError, "a probability for each label"),
        (torch.full((2, 3), 0.5), False, ValueError, "must sum to 1"),
        (torch.tensor([0]), False, ValueError, "labels must have shape"),
        (torch.tensor([0, 1]), True, ValueError, "labels must have shape"),
        (torch.full((2, 3), 2.0), True, ValueError, "within"),
        (torch.full((2, 3), torch.nan), True, ValueError, "within"),
    ],
)
def test_wrong_labels_are_refused(labels: Tensor, multi_label: bool, error: type[Exception], message: str) -> None:
    texts = [[3, 4], [5]]
    with pytest.raises(error, match=message):
        fit_lexical(build(texts).keys, *pack(texts), labels, num_labels=3, multi_label=multi_label)


# -------------------------------------------------------------------------------------------------------------- files


def test_saved_predictor_predicts_the_same(predictor: ExitPredictor, tmp_path: Path) -> None:
    batch = pack([*planted(50, 8)[0], [], [44]])
    path = predictor.save(tmp_path / "model", fingerprint=FINGERPRINT)
    assert path.parent == tmp_path / "model"
    assert path.name == f"{TABLE_NAME}-{predictor.digest[:16]}.safetensors"
    again = ExitPredictor.load(path, fingerprint=FINGERPRINT)
    assert again.digest == predictor.digest
    for speed in SPEEDS:
        assert same(predictor.predict(*batch, speed=speed), again.predict(*batch, speed=speed))
    assert torch.equal(again.table.counts, predictor.table.counts)
    assert (again.kind, again.depths, again.speeds) == (predictor.kind, DEPTHS, SPEEDS)
    other = again.save(tmp_path / "other.safetensors", fingerprint=FINGERPRINT)
    assert other.read_bytes() == path.read_bytes()
    assert list(path.parent.iterdir()) == [path]


def test_two_fits_write_the_same_bytes(tmp_path: Path) -> None:
    one = fit("counts").save(tmp_path / "one", fingerprint={})
    other = fit("counts").save(tmp_path / "other", fingerprint={})
    assert one.read_bytes() == other.read_bytes()


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    path = fit_once().save(tmp_path, fingerprint=FINGERPRINT)
    for wrong in ({"model": "m", "tokenizer": "x"}, {}, {"model": "m"}, FINGERPRINT | {"dtype": "float16"}):
        with pytest.raises(ValueError, match="belongs to another model or tokenizer: found"):
            ExitPredictor.load(path, fingerprint=wrong)


def test_missing_and_cut_and_holed_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="geep profile"):
        ExitPredictor.load(tmp_path / "table.safetensors", fingerprint=FINGERPRINT)
    path = fit_once().save(tmp_path, fingerprint=FINGERPRINT)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="no whole safetensors file"):
            ExitPredictor.load(path, fingerprint=FINGERPRINT)
    path.write_bytes(whole[:-200] + bytes(200))
    with pytest.raises(ValueError, match="checksum"):
        ExitPredictor.load(path, fingerprint=FINGERPRINT)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="has metadata"):
        ExitPredictor.load(path, fingerprint=FINGERPRINT)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fit_once().save(tmp_path, fingerprint=FINGERPRINT)
    whole = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("geep.folder.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fit_once().save(tmp_path, fingerprint={})
    assert path.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 1


def save_signed(tensors: dict[str, Tensor], header: str, path: Path) -> None:
    save_file(tensors, path, {"exit_table": json.dumps({"header": header, "sha256": digest_tensors(tensors, header)})})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"format": "geep exit table 9", "fingerprint": {}, "config": {}}', "has format 'geep exit table 9'"),
        ('{"format": "geep exit table 2", "fingerprint": {}, "config": {"more": 1}}', "holds no usable exit table"),
    ],
)
def test_wrong_headers_are_refused(header: str, message: str, tmp_path: Path) -> None:
    save_signed({"x": torch.zeros(2)}, header, tmp_path / "table.safetensors")
    with pytest.raises(ValueError, match=message):
        ExitPredictor.load(tmp_path / "table.safetensors", fingerprint={})


def set_nan(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[0] = torch.nan

    return change


def negate(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = -tensors[name]

    return change


def shorten(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[(set_nan(name), "finite") for name in ("score_rows", "score_prior", "level_edges", "level_shares")],
        *[(set_nan(name), "finite") for name in ("label_rows", "label_bias")],
        *[(shorten(name), "") for name in ("rows", "counts", "score_rows", "score_prior", "level_edges")],
        *[(shorten(name), "") for name in ("level_shares", "label_rows", "label_bias", "ngram_keys", "ngram_values")],
        (negate("counts"), "counts"),
        (negate("rows"), "rows that are not increasing"),
        (negate("level_shares"), "levels out of order"),
        (lambda tensors: tensors.pop("rows"), "rows"),
        (lambda tensors: tensors["ngram_values"].clamp_(max=1), "n-gram rows other than"),
        (lambda tensors: tensors.update(label_bias=tensors["label_bias"].double()), "label bias"),
    ],
)
def test_wrong_contents_are_refused(change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    path = fit_once().save(tmp_path, fingerprint=FINGERPRINT)
    tensors = load_file(path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["exit_table"])["header"]
    change(tensors)
    save_signed(tensors, header, path)
    with pytest.raises(ValueError, match=f"holds no usable exit table.*{message}"):
        ExitPredictor.load(path, fingerprint=FINGERPRINT)


def test_parts_that_do_not_fit_are_refused() -> None:
    whole = fit_once().fitted
    rows, levels = whole.score_rows, whole.levels
    with pytest.raises(ValueError, match="score prior"):
        FittedTable("counts", whole.table, ScoreRows(rows.rows, rows.prior[:1]), levels)
    with pytest.raises(ValueError, match="level shares"):
        FittedTable("counts", whole.table, rows, Levels(levels.edges[:, :0], levels.cumulative[0]))
