"""The head that tells the texts of a pair apart: ids say where they meet, and plain loops what its features are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLS, PAD, SEP, make_engine, make_model, make_tokenizer, random_texts
from hypothesis import given, strategies as st
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from geep.backends import TokenBatch
from geep.data import Split
from geep.distilling import FeatureCache, FitSettings, fit_heads, with_exits
from geep.engine import Engine, EngineConfig
from geep.modeling import GeepConfig, PairHead, first_lengths, first_lengths_packed

PAIRS = list(zip(random_texts(24, seed=1), random_texts(24, seed=2), strict=True))


HEAD = PairHead(GeepConfig(encoder_config={"model_type": "bert", "hidden_size": 32}, separator_id=SEP))


def padded(texts: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """Ids and mask of texts, padded to one column at least."""
    longest = max([1, *map(len, texts)])
    ids, mask = torch.full((len(texts), longest), PAD), torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids[row, place], mask[row, place] = torch.tensor(text, dtype=torch.int64), 1
    return ids, mask


@given(st.lists(st.lists(st.integers(0, 5), max_size=7), min_size=1, max_size=5), st.sampled_from(["left", "right"]))
def test_the_first_text_ends_at_the_first_separator(texts: list[list[int]], side: str) -> None:
    expected = [text.index(SEP) + 1 if SEP in text else len(text) for text in texts]
    assert first_lengths(*padded(texts, side), SEP).tolist() == expected
    packed = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    lengths = torch.tensor([len(text) for text in texts])
    assert first_lengths_packed(packed, lengths, SEP).tolist() == expected


def test_padding_with_the_separator_ends_no_text() -> None:
    ids, mask = torch.tensor([[SEP, SEP, CLS, 9, 8]]), torch.tensor([[0, 0, 1, 1, 1]])
    assert first_lengths(ids, mask, SEP).tolist() == [3]


def by_hand(tokens: Tensor, first: int) -> Tensor:
    """Features of one text, (6 * hidden,)."""
    nothing = torch.zeros(tokens.shape[1])
    parts = [part if len(part) else nothing[None] for part in (tokens[:first], tokens[first:])]
    mean, most = [part.mean(0) for part in parts], [part.amax(0) for part in parts]
    return torch.cat([*mean, (mean[0] - mean[1]).abs(), mean[0] * mean[1], *most])


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=6),
    st.sampled_from(["left", "right"]),
    st.booleans(),
)
def test_features_are_those_of_plain_loops(sizes: list[tuple[int, int]], side: str, single: bool) -> None:
    texts = [torch.randn(sum(size), 32) for size in sizes]
    firsts = torch.tensor([sum(size) if single else size[0] for size in sizes])
    expected = torch.stack([by_hand(text, first) for text, first in zip(texts, firsts.tolist(), strict=True)])
    _, mask = padded([[0] * len(text) for text in texts], side)
    hidden = torch.randn(*mask.shape, 32)
    hidden[mask.bool()] = torch.cat(texts)
    given_firsts = None if single else firsts
    assert torch.allclose(HEAD.pool(hidden, mask, given_firsts), expected, atol=1e-5)
    lengths = torch.tensor([len(text) for text in texts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for kind in (torch.int64, torch.int32):  # on a GPU places are 32 bits wide
        where = None if given_firsts is None else given_firsts.to(kind)
        found = HEAD.pool_packed(torch.cat(texts), offsets.to(kind), int(lengths.max()), where)
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["packed", "padded", "cuda"])
def test_an_engine_answers_pairs_as_the_model_does(backend: str) -> None:
    model = make_model(head="pair")
    engine = Engine(model, make_tokenizer(), config=EngineConfig(device="cpu", backend="packed"))
    texts: list[Any] = [*PAIRS, "w1 w2", ("w3", ""), ("", "w3"), ("", ""), ("w1 [SEP] w2", "w3")]
    # In lists, for a single empty second text would count as none.
    parts = [([text],) if isinstance(text, str) else ([text[0]], [text[1]]) for text in texts]
    inputs = [engine.tokenizer(*part, return_tensors="pt") for part in parts]
    with torch.no_grad():
        expected = torch.cat([model(**each, output_exits=True).exit_logits for each in inputs], 1)
    found = make_engine(model, config=EngineConfig(device="cpu", backend=backend), table=False)
    batch = found.tokenize(texts).batch
    assert torch.allclose(found.exit_logits(batch), expected, atol=1e-4 * float(expected.abs().max()))
    # It matters where the texts meet.
    blind = TokenBatch(np.where(batch.input_ids == SEP, CLS, batch.input_ids), batch.token_type_ids, batch.lengths)
    assert batch.firsts(SEP).tolist() != blind.firsts(SEP).tolist()  # type: ignore[union-attr]


def test_a_border_is_kept_with_the_model(tmp_path: Path) -> None:
    model = make_model(head="pair")
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.separator_id == SEP
    inputs = make_tokenizer()(["w1 w2 w3"], ["w3 w4"], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.allclose(again(**inputs).logits, logits, atol=1e-5)
        again.config.separator_id = CLS  # then all but the first token is the second text
        assert not torch.allclose(again(**inputs).logits, logits, atol=1e-3)


@pytest.mark.parametrize("place", ["exit_head", "teacher_head"])
def test_without_a_separator_no_head_tells_texts_apart(place: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{place} 'pair' tells the texts of a pair apart and found no separator_id"):
        GeepConfig(**{place: "pair"})
    engine = Engine(make_model(), make_tokenizer(), config=EngineConfig(device="cpu"))
    with pytest.raises(ValueError, match="found no separator_id in the config"):
        FeatureCache.of(engine, Split(["w1"], ["w2"]), tmp_path, kind="pair")


def test_a_relation_between_the_texts_is_learned_that_their_words_do_not_tell(tmp_path: Path) -> None:
    """Whether both texts are the same word: every word is as frequent among pairs of either kind."""
    random = np.random.default_rng(0)
    words = [f"w{number}" for number in range(6)]

    def rows(count: int) -> Split:
        same = random.random(count) < 0.5
        one, other = random.integers(0, 6, (2, count))
        second = np.where(same, one, np.where(other == one, (one + 1) % 6, other))
        return Split([words[word] for word in one], [words[word] for word in second])

    parts = [rows(count) for count in (600, 200)]
    same = [torch.tensor([a == b for a, b in zip(part.texts, part.text_pairs or (), strict=True)]) for part in parts]
    losses = {}
    for kind in ("mean+max", "pair"):
        model = make_model(num_labels=2)
        model.config.separator_id = SEP
        engine = Engine(model, make_tokenizer(), config=EngineConfig(device="cpu"))
        caches = [
            FeatureCache.of(engine, part, tmp_path / f"{kind} {number}", kind=kind) for number, part in enumerate(parts)
        ]
        # The full model is made to know the answer; heads are to come near to it.
        taught = [
            FeatureCache(kind, each.depths, each.features, (torch.eye(2)[label.long()] * 8 - 4).numpy())
            for each, label in zip(caches, same, strict=True)
        ]
        fitted = fit_heads(*taught, model.config, settings=FitSettings(batch_size=32, epochs=12))
        losses[kind] = fitted.losses[0]
        exits = with_exits(model, fitted)
        assert (exits.config.exit_head, exits.config.separator_id) == (kind, SEP)
    assert losses["pair"] < 0.5 * losses["mean+max"]
