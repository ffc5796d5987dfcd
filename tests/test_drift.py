"""Whether texts are still like those that a promise was certified on: sums that add up, and a test that errs rarely."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CLS,
    FRESH,
    HELDOUT,
    MAX_LENGTH,
    SEP,
    SPECIAL_TOKENS,
    TRAIN,
    UNK,
    VOCAB,
    fit_predictor,
    random_batch,
    split,
)
from hypothesis import given, settings as hypothesis_settings, strategies as st

import geep
from geep.calibration import Calibration, ProfileResult, calibrate
from geep.engine import Engine, Predictions
from geep.predictor import TextExits, fit_predictor as fit_table
from geep.promise import Drift, Promise, Traffic

TEXTS = st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1, width=32)), min_size=1, max_size=40)


def traffic_of(rows: list[tuple[int, float]], *, with_table: bool = True) -> Traffic:
    layers, shares = (np.array([row[column] for row in rows]) for column in (0, 1))
    return Traffic.of(layers.astype(np.int64), shares if with_table else None)


@given(TEXTS, TEXTS)
def test_the_traffic_of_two_calls_is_that_of_one(
    first: list[tuple[int, float]], second: list[tuple[int, float]]
) -> None:
    both, whole = traffic_of(first) + traffic_of(second), traffic_of(first + second)
    assert both.exit_layers == whole.exit_layers
    assert list(both.exit_layers) == sorted(both.exit_layers)
    assert both.num_texts == len(first) + len(second)
    assert both.unknown_share == pytest.approx(whole.unknown_share)
    assert both.unknown_squares == pytest.approx(whole.unknown_squares)
    assert both + Traffic() == Traffic() + both == both
    # What one of them does not know is not known of both.
    assert (both + traffic_of(first, with_table=False)).unknown_share is None
    assert Traffic.from_dict(json.loads(json.dumps(both.to_dict()))) == both


@given(TEXTS)
def test_texts_do_not_drift_from_themselves(rows: list[tuple[int, float]]) -> None:
    found = Drift.between(traffic_of(rows), traffic_of(rows))
    assert (found.layers, found.figure, found.p_value, found.is_certain) == (0, pytest.approx(0), 1, False)


@hypothesis_settings(max_examples=50)
@given(TEXTS, TEXTS)
def test_a_drift_is_a_share_and_the_same_both_ways(
    first: list[tuple[int, float]], second: list[tuple[int, float]]
) -> None:
    there, back = (Drift.between(*pair) for pair in (_both(first, second), _both(second, first)))
    assert there.layers == pytest.approx(back.layers)
    assert there.unknown == pytest.approx(-(back.unknown or 0.0))
    assert there.p_value == pytest.approx(back.p_value)
    assert 0 <= there.figure <= 1
    assert 0 <= there.p_value <= 1
    # The distance of Kolmogorov and Smirnov, by its definition.
    values = [[row[0] for row in rows] for rows in (first, second)]
    shares = [[sum(value <= layer for value in part) / len(part) for layer in range(7)] for part in values]
    assert there.layers == pytest.approx(max(abs(a - b) for a, b in zip(*shares, strict=True)))


def _both(first: list[tuple[int, float]], second: list[tuple[int, float]]) -> tuple[Traffic, Traffic]:
    return traffic_of(first), traffic_of(second)


def draws(generator: np.random.Generator, count: int, mix: list[float], unknown: float) -> Traffic:
    return Traffic.of(generator.choice(len(mix), count, p=mix), generator.binomial(12, unknown, count) / 12)


def test_chance_is_taken_for_drift_no_more_often_than_said_and_drift_is_found() -> None:
    generator = np.random.default_rng(0)
    mix, same, other, odd = [0.5, 0.2, 0.2, 0.1], [], [], []
    for _ in range(400):
        reference = draws(generator, 1000, mix, 0.02)
        same.append(Drift.between(reference, draws(generator, 200, mix, 0.02)).p_value)
        other.append(Drift.between(reference, draws(generator, 200, [0.3, 0.2, 0.3, 0.2], 0.02)).is_certain)
        odd.append(Drift.between(reference, draws(generator, 200, mix, 0.1)).is_certain)
    # 20 of 400 are expected below .05, and no more than 32 in 99 of 100 such tests.
    assert np.sum(np.array(same) < 0.05) <= 32
    assert np.mean(other) > 0.95
    assert np.mean(odd) > 0.95


@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 20])
def test_a_handful_of_texts_is_not_taken_for_others(count: int) -> None:
    generator = np.random.default_rng(count)
    mix = [0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]

    def texts(number: int) -> Traffic:
        # Most texts have no unknown token, so that a handful of them often has no spread at all.
        shares = np.where(generator.random(number) < 0.15, generator.beta(1, 8, number), 0.0)
        return Traffic.of(generator.choice(len(mix), number, p=mix), shares)

    reference = texts(3000)
    assert sum(Drift.between(reference, texts(count)).is_certain for _ in range(500)) <= 3


def test_what_is_large_is_what_is_certain() -> None:
    by_chance = Drift(layers=0.25, unknown=0.02, p_layers=0.2, p_unknown=0.0001, num_texts=20)
    assert by_chance.is_certain
    assert not by_chance.is_large
    assert Drift(layers=0.05, unknown=-0.2, p_layers=0.2, p_unknown=0.0001, num_texts=20).is_large
    assert Drift(layers=0.25, unknown=None, p_layers=0.0001, p_unknown=None, num_texts=90).is_large
    assert by_chance.to_dict()["p_value"] == 0.0001
    assert by_chance.to_dict()["is_large"] is False


@pytest.mark.parametrize("pair", [(Traffic(), Traffic({1: 1})), (Traffic({1: 1}), Traffic())])
def test_nothing_is_no_drift(pair: tuple[Traffic, Traffic]) -> None:
    with pytest.raises(ValueError, match="expected some of each"):
        Drift.between(*pair)


def test_shares_of_unknown_tokens_are_those_counted_by_hand(tiny_engine: Engine) -> None:
    predictor = fit_predictor(tiny_engine)
    batch = random_batch(60, seed=9)
    # Texts without a token, without one that counts, and with some that the tokenizer does not know.
    ids = [*batch.input_ids.tolist(), CLS, SEP, CLS, UNK, UNK, SEP]
    lengths = [*batch.lengths.tolist(), 0, 2, 4]
    special, counts = set(predictor.table.keys.special_ids), predictor.table.counts
    for unk, left_out in ((UNK, special - {UNK}), (None, special)):
        expected, start = [], 0
        for length in lengths:
            counted = [token for token in ids[start : start + length] if token not in left_out]
            unseen = sum(token in special or int(counts[token].sum()) == 0 for token in counted)
            expected.append(unseen / len(counted) if counted else 0.0)
            start += length
        found = predictor.unknown_shares(np.array(ids), np.array(lengths), unk_token_id=unk)
        assert found.tolist() == pytest.approx(expected)
        assert expected[-3:] == [0, 0, 1 if unk else 0]
        assert len(set(expected)) > 3


def test_what_both_texts_of_pairs_had_is_not_unknown() -> None:
    both, first, never = 20, 21, 22
    pair = torch.tensor([CLS, both, first, SEP, both, SEP])
    texts = TextExits(pair.repeat(3), torch.full((3,), len(pair)), torch.zeros(3, 1, dtype=torch.int64))
    predictor = fit_table(
        "counts",
        texts,
        None,
        texts,
        depths=(1, 2),
        speeds=(0.5,),
        num_labels=2,
        vocab_size=len(VOCAB),
        special_ids=range(len(SPECIAL_TOKENS)),
        separator_id=SEP,
    )
    found = predictor.unknown_shares(
        np.array([CLS, both, first, never, SEP, both, SEP]), np.array([7]), unk_token_id=UNK
    )
    assert found.tolist() == [0.25]


@pytest.fixture(scope="module")
def certified(profiled: ProfileResult) -> Calibration:
    return calibrate(profiled.engine, HELDOUT, FRESH, Promise(min_agreement=0.95))


def reference_of(engine: Engine) -> Traffic:
    assert engine.certificate is not None
    assert engine.certificate.traffic is not None
    return engine.certificate.traffic


def test_a_certificate_knows_how_its_texts_were_answered(certified: Calibration) -> None:
    found = certified.engine.predict_columns(FRESH.texts)
    assert found.traffic == reference_of(certified.engine)
    assert found.traffic.mean_exit_layer == pytest.approx(found.exit_layers.mean())
    assert Predictions.join([found, found]).traffic.num_texts == 2 * len(FRESH)


def test_texts_of_the_same_task_drift_little_and_others_much(certified: Calibration) -> None:
    engine = certified.engine
    reference = reference_of(engine)
    same = Drift.between(reference, engine.predict_columns(split(400, seed=77).texts).traffic)
    assert not same.is_certain
    # Words of the vocabulary that no text of the task has.
    known = set(" ".join(TRAIN.texts).split())
    strange = [word for word in engine.tokenizer.get_vocab() if word.startswith("w") and word not in known]
    texts = [" ".join(strange[number % len(strange) :][:6] or strange) for number in range(200)]
    other = Drift.between(reference, engine.predict_columns(texts).traffic)
    assert other.is_certain
    assert other.unknown is not None
    assert other.figure >= other.unknown > 0.5


def test_a_folder_keeps_it_and_older_folders_have_none(certified: Calibration, tmp_path: Path) -> None:
    engine = certified.engine
    engine.save_pretrained(tmp_path)
    certified.save(tmp_path)
    options = {"dtype": "float32", "device": "cpu", "max_length": MAX_LENGTH}
    assert reference_of(geep.Engine.from_pretrained(tmp_path, **options)) == reference_of(engine)
    path = tmp_path / "calibration.json"
    kept = json.loads(path.read_text())
    del kept["certificate"]["traffic"]
    path.write_text(json.dumps(kept))
    older = geep.Engine.from_pretrained(tmp_path, **options).certificate
    assert older is not None
    assert older.traffic is None
    kept["certificate"]["traffic"] = {"exit_layers": 3}
    path.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="damaged"):
        geep.Engine.from_pretrained(tmp_path, **options)


def test_an_engine_without_a_table_knows_its_layers_alone(certified: Calibration) -> None:
    bare = replace(certified.engine.predict_columns(FRESH.texts), unknown_shares=None)
    drift = Drift.between(reference_of(certified.engine), bare.traffic)
    assert drift.unknown is None
    assert drift.figure == drift.layers == 0
