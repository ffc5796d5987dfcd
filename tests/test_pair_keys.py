"""Keys of pairs equal slow ones made of Python's sets, and tell what keys of single texts cannot."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLS, MASK, SEP, UNK, make_model, make_tokenizer, random_texts
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from torch import Tensor

from geep.calibration import profile
from geep.data import Split
from geep.engine import Engine, EngineConfig
from geep.hash_table import HashTable
from geep.predictor import ExitPredictor, ExitTable, Keys, TextExits, fit_predictor

VOCAB_SIZE = 50
# 0 begins a text, 2 ends it, 1 and 3 are a mask and an unknown token: special, but no separators.
SPECIAL_IDS, SEPARATOR = (0, 1, 2, 3), 2
FINGERPRINT = {"model": "m"}
TOKENS = st.lists(st.sampled_from([0, 1, 3, 4, 5, 6, 7, 8]), max_size=7)
# One or two separators between two texts, one more that somebody wrote, none at all: whatever comes.
PAIRS = st.one_of(
    st.builds(lambda one, two: [0, *one, 2, *two, 2], TOKENS, TOKENS),
    st.builds(lambda one, two: [0, *one, 2, 2, *two, 2], TOKENS, TOKENS),
    st.lists(st.integers(0, 9), max_size=14),
)


def pack(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    return ids, torch.tensor([len(text) for text in texts], dtype=torch.int64)


def build(texts: list[list[int]], **changes: Any) -> ExitTable:
    options: dict[str, Any] = {"depths": (1, 2), "speeds": (0.5,), "vocab_size": VOCAB_SIZE, "min_count": 1}
    options |= {"special_ids": SPECIAL_IDS, "separator_id": SEPARATOR} | changes
    return ExitTable.build(*pack(texts), torch.zeros(len(texts), 1, dtype=torch.int64), **options)


def bags(keys: Keys, texts: list[list[int]]) -> list[list[int]]:
    """Return the rows of each text's keys, without the neutral one, sorted."""
    rows, offsets = keys.rows_of(*pack(texts))
    parts = torch.tensor_split(rows, offsets[1:]) if len(texts) else ()
    return [sorted(row for row in part.tolist() if row != keys.neutral_row) for part in parts]


# ------------------------------------------------------------------------------------------------------ the reference


def packed(gram: tuple[int, ...], *, shared: bool) -> int:
    number = 0
    for token in gram:
        number = number << 18 | token
    return number | len(gram) << 54 | shared << 56


def counted(kind: int, bucket: int) -> int:
    return 1 << 56 | kind * 16 + min(bucket, 15)


def slow_keys(text: list[int], order: int) -> tuple[list[int], list[int]]:
    """Return the token ids that are rows, and the packed keys."""
    border = text.index(SEPARATOR) if SEPARATOR in text else len(text)
    direct, hashed, tokens, common, twos = [], [], (0, 0), (0, 0), 0
    for size in range(1, order + 1):
        grams = [
            [gram for gram in zip(*(part[start:] for start in range(size)), strict=False) if not {*gram} & {0, 1, 2, 3}]
            for part in (text[:border], text[border:])
        ]
        both = set(grams[0]) & set(grams[1])
        own = [gram for part in grams for gram in part if gram not in both]
        direct += [gram[0] for gram in own if size == 1]
        hashed += [packed(gram, shared=False) for gram in own if size > 1]
        hashed += [packed(gram, shared=True) for gram in grams[0] if gram in both]
        found = [sum(gram in both for gram in part) for part in grams]
        if size == 1:
            tokens, common = (len(grams[0]), len(grams[1])), (found[0], found[1])
        if size == 2:
            twos = sum(found)
    if all(tokens):
        hashed += [counted(kind, tokens[kind] - common[kind]) for kind in (0, 1)]
        hashed += [counted(2 + kind, common[kind] * 16 // tokens[kind]) for kind in (0, 1)]
        hashed.append(counted(4, twos * 16 // sum(common) if sum(common) else 0))
    return direct, hashed


@given(st.lists(PAIRS, max_size=10), st.lists(PAIRS, max_size=5), st.integers(1, 3), st.integers(1, 3))
@settings(deadline=None, max_examples=150)
def test_rows_of_pairs_equal_those_of_python_sets(
    texts: list[list[int]], others: list[list[int]], order: int, min_count: int
) -> None:
    table = build(texts, ngram_order=order, min_count=min_count)
    counts = Counter(key for text in texts for key in slow_keys(text, order)[1])
    known = sorted(key for key, count in counts.items() if count >= min_count)
    place = {key: VOCAB_SIZE + row for row, key in enumerate(known)}
    assert table.num_rows == VOCAB_SIZE + len(known) + 1
    for batch in (texts, others):
        expected = []
        for text in batch:
            direct, hashed = slow_keys(text, order)
            expected.append(sorted(direct + [place[key] for key in hashed if key in place]))
        assert bags(table.keys, batch) == expected


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ([0, 5, 6, 2, 2, 6, 7, 2], [0, 5, 6, 2, 6, 7, 2]),
        ([0, 5, 6, 2, 2, 6, 7], [0, 5, 6, 2, 6, 7, 2]),
        ([0, 5, 1, 6, 2, 6, 3, 7, 2], [5, 3, 6, 2, 6, 1, 7]),
        ([0, 5, 2, 6, 2, 6, 7, 2], [5, 2, 6, 3, 6, 7]),
        ([0, 2, 5, 2], [5]),
        ([0, 5, 2, 2], [5]),
        ([0, 2, 2], []),
    ],
    ids=[
        "two separators",
        "cut at the end",
        "mask and unknown part no texts",
        "the first separator parts, also one that was written",
        "empty first text",
        "empty second text",
        "both empty",
    ],
)
def test_where_the_second_text_begins(text: list[int], same_as: list[int]) -> None:
    keys = build([text, same_as], ngram_order=3).keys
    one, other = bags(keys, [text, same_as])
    assert one == other


@given(st.lists(PAIRS, max_size=8), st.lists(TOKENS, max_size=5), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_a_text_without_a_second_one_is_read_as_by_a_table_of_single_texts(
    pairs: list[list[int]], texts: list[list[int]], order: int
) -> None:
    singles = [[0, *text, *ending] for text in texts for ending in ([], [2], [2, 2])]
    keys = build(pairs + singles, ngram_order=order).keys
    assert bags(keys, singles) == bags(replace(keys, separator_id=None), singles)


@given(st.lists(st.integers(4, 14), unique=True, min_size=1), st.lists(st.integers(4, 14), unique=True, min_size=1))
@settings(deadline=None, max_examples=60)
def test_which_text_is_first_shows_in_the_counts_alone(one: list[int], two: list[int]) -> None:
    there, back = [0, *one, 2, *two, 2], [0, *two, 2, *one, 2]
    (_, hashed), (_, turned) = slow_keys(there, 2), slow_keys(back, 2)
    assert sorted(hashed[:-5]) == sorted(turned[:-5])
    keys = build([there, back], ngram_order=2).keys
    counts = {VOCAB_SIZE + place for place, key in enumerate(sorted({*hashed, *turned})) if not key >> 54 & 3}
    here, other = bags(keys, [there, back])
    assert [row for row in here if row not in counts] == [row for row in other if row not in counts]
    assert len([row for row in here if row in counts]) == 5


def test_a_separator_that_is_no_special_token_and_ids_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match=r"separator_id must be one of special_ids, got 7"):
        build([[0, 4, 2]], separator_id=7)
    with pytest.raises(ValueError, match=r"use ngram_order=1 and no separator_id"):
        Keys((1 << 18) + 1, SPECIAL_IDS, 1, HashTable(1), SEPARATOR)
    top = (1 << 18) - 1
    keys = build([[0, top, top, 2, top, top, 2]], vocab_size=top + 1, ngram_order=3).keys
    assert len(bags(keys, [[0, top, top, 2, top, top, 2]])[0]) == 3 + 5


# ------------------------------------------------------------------------------------------------------- what it tells


def planted(count: int, seed: int) -> tuple[list[list[int]], Tensor]:
    """Draw pairs of equal bags: a token stands twice in one text (label 0), or once in each (label 1)."""
    random = np.random.default_rng(seed)
    texts, labels = [], random.integers(0, 2, count)
    for label in labels:
        twice, *others = random.permutation(np.arange(4, VOCAB_SIZE))[:9].tolist()
        one, two = [twice, *others[:4]], [twice, *others[4:]]
        if not label:
            one, two = [twice, twice, *others[:3]], others[3:]
        texts.append([0, *random.permutation(one).tolist(), 2, *random.permutation(two).tolist(), 2])
    return texts, torch.from_numpy(labels)


def fit(separator_id: int | None, kind: str = "fitted") -> ExitPredictor:
    texts, labels = planted(400, 0)
    fresh, answers = planted(200, 1)
    return fit_predictor(
        kind,
        TextExits(*pack(texts), 1 - labels[:, None]),
        labels,
        TextExits(*pack(fresh), 1 - answers[:, None]),
        depths=(1, 2),
        speeds=(0.5,),
        num_labels=2,
        vocab_size=VOCAB_SIZE,
        special_ids=SPECIAL_IDS,
        separator_id=separator_id,
    )


@pytest.mark.parametrize("kind", ["counts", "fitted"])
def test_what_both_texts_have_tells_label_and_exit_where_the_tokens_alone_do_not(kind: str) -> None:
    texts, labels = planted(300, 2)
    for separator_id, least, most in ((SEPARATOR, 0.95, 1.0), (None, 0.3, 0.7)):
        found = fit(separator_id, kind).predict(*pack(texts), speed=0.5)
        assert found.lexical_logits is not None
        assert least <= float((found.lexical_logits.argmax(1) == labels).double().mean()) <= most
        later, sooner = (found.scores[labels == label].mean() for label in (0, 1))
        assert (float(later - sooner) > 0.2) == (separator_id is not None)


def test_pairs_of_equal_texts_score_by_their_exits() -> None:
    texts = [[0, 4, 5, 2, 4, 5, 2]] * 10
    exits = torch.tensor([[0]] * 7 + [[1]] * 3)
    options: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "special_ids": SPECIAL_IDS, "separator_id": SEPARATOR}
    seen = TextExits(*pack(texts), exits)
    found = fit_predictor("counts", seen, None, seen, depths=(1, 2), speeds=(0.5,), num_labels=2, **options)
    assert found.predict(*pack(texts[:1]), speed=0.5).scores.tolist() == pytest.approx([1.3])


def test_a_table_of_pairs_comes_back_from_its_file(tmp_path: Path) -> None:
    predictor, batch = fit(SEPARATOR), pack([*planted(50, 3)[0], [], [0, 4, 2]])
    path = predictor.save(tmp_path, fingerprint=FINGERPRINT)
    again = ExitPredictor.load(path, fingerprint=FINGERPRINT)
    assert again.table.keys.separator_id == SEPARATOR
    found, expected = again.predict(*batch, speed=0.5), predictor.predict(*batch, speed=0.5)
    assert all(torch.equal(getattr(found, name), tensor) for name, tensor in vars(expected).items())
    assert again.save(tmp_path / "other", fingerprint=FINGERPRINT).read_bytes() == path.read_bytes()
    blind = replace(predictor.fitted.table, keys=replace(predictor.table.keys, separator_id=None))
    assert ExitPredictor(replace(predictor.fitted, table=blind)).digest != predictor.digest


def test_a_table_of_single_texts_is_written_as_before_there_were_pairs(tmp_path: Path) -> None:
    path = fit(None).save(tmp_path, fingerprint=FINGERPRINT)
    with safe_open(path, framework="pt") as file:
        header = json.loads(json.loads(file.metadata()["exit_table"])["header"])
    assert "separator_id" not in header["config"]
    assert ExitPredictor.load(path, fingerprint=FINGERPRINT).table.keys.separator_id is None


# ---------------------------------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize("pairs", [True, False, None])
def test_the_table_of_a_model_of_pairs_reads_pairs(pairs: bool | None) -> None:
    model = make_model()
    model.config.text_pairs = pairs
    engine = Engine(model, make_tokenizer(), config=EngineConfig(device="cpu", max_length=9))
    texts = [random_texts(80, seed=seed) for seed in range(4)]
    parts = [Split(texts[part], texts[part + 2] if pairs else None) for part in (0, 1)]
    found = profile(engine, parts[0], parts[1], kind="fitted").engine
    assert found.predictor is not None
    keys = found.predictor.table.keys
    assert keys.separator_id == (SEP if pairs else None)
    assert {CLS, SEP, UNK, MASK} <= set(keys.special_ids)
    # Texts are cut to nine tokens: what is left of both is compared.
    shared = ("w1 w2 w3 w4 w5 w6", "w2 w1 w7 w8 w9 w10") if pairs else "w1 w2 w3"
    batch = engine.tokenize([shared]).batch
    assert len(batch.input_ids) == (9 if pairs else 5)
    rows = keys.pack(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.lengths))
    assert int((rows.packed >> 56).sum()) == (2 + 5 if pairs else 0)


def test_a_tokenizer_without_a_separator_is_said_to_leave_pairs_unread(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    model.config.text_pairs, tokenizer.sep_token = True, None
    engine = Engine(model, tokenizer, config=EngineConfig(device="cpu"))
    texts = random_texts(40, seed=0)
    found = profile(engine, Split(texts, texts), Split(texts[::-1], texts), kind="fitted").engine.predictor
    assert found is not None
    assert found.table.keys.separator_id is None
    assert [record.name for record in caplog.records] == ["geep.calibration.profiling"]
    assert "names no sep_token" in caplog.text
