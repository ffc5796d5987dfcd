"""The head that reads phrases and tells the texts of a pair apart: ids say where they meet, plain loops its logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLS, PAD, SEP, make_engine, make_model, make_tokenizer, random_texts
from hypothesis import given, strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from geep.backends import TokenBatch
from geep.data import Split
from geep.distilling import FeatureCache, FitSettings, fit_heads, with_exits
from geep.engine import Engine, EngineConfig
from geep.modeling import ConvHead, GeepConfig, Spans, first_lengths, first_lengths_packed

PAIRS = list(zip(random_texts(24, seed=1), random_texts(24, seed=2), strict=True))


CONFIG = {"encoder_config": {"model_type": "bert", "hidden_size": 32}, "num_labels": 3}
HEADS_OF = {separator: ConvHead(GeepConfig(**CONFIG, separator_id=separator)).eval() for separator in (None, SEP)}


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


def by_hand(head: ConvHead, tokens: Tensor, first: int) -> Tensor:
    """Logits of one text, a token and a neighbour at a time."""
    narrow = [F.gelu(head.narrow(token)) for token in tokens]
    weight = head.convolution.weight.view(64, 64, 5)
    read = []
    for place, token in enumerate(narrow):
        found = head.convolution.bias.clone()
        for step in range(5):
            if 0 <= place + step - 2 < len(narrow):
                found += weight[:, :, step] @ narrow[place + step - 2]
        read.append(token + F.gelu(found))
    parts = [read] if head.dense.in_features == 128 else [read[:first], read[first:]]
    pooled = [
        torch.cat([torch.stack(part).mean(0), torch.stack(part).amax(0)]) if part else torch.zeros(128)
        for part in parts
    ]
    if len(pooled) == 2:
        one, other = pooled
        pooled = [one, other, (one - other).abs(), one * other]
    return head.out(torch.tanh(head.dense(torch.cat(pooled))))  # type: ignore[no-any-return]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
    st.booleans(),
    st.sampled_from([None, SEP]),
)
@torch.no_grad()
def test_logits_are_those_of_plain_loops(
    sizes: list[tuple[int, int]], side: str, single: bool, separator: int | None
) -> None:
    head = HEADS_OF[separator]
    texts = [torch.randn(sum(size), 32) for size in sizes]
    firsts = torch.tensor([sum(size) if single else size[0] for size in sizes])
    expected = torch.stack([by_hand(head, text, first) for text, first in zip(texts, firsts.tolist(), strict=True)])
    _, mask = padded([[0] * len(text) for text in texts], side)
    hidden = torch.randn(*mask.shape, 32)
    hidden[mask.bool()] = torch.cat(texts)
    given_firsts = None if single else firsts
    assert torch.allclose(head(hidden, mask, given_firsts), expected, atol=1e-5)
    lengths = torch.tensor([len(text) for text in texts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for kind in (torch.int64, torch.int32):  # on a GPU places are 32 bits wide
        where = None if given_firsts is None else given_firsts.to(kind)
        found = head.forward_packed(
            torch.cat(texts), Spans(offsets.to(kind), int(lengths.sum()), int(lengths.max()), where)
        )
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["packed", "padded", "cuda"])
def test_an_engine_answers_pairs_as_the_model_does(backend: str) -> None:
    model = make_model(head="conv", separator_id=SEP)
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
    model = make_model(head="conv", separator_id=SEP)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.separator_id == SEP
    inputs = make_tokenizer()(["w1 w2 w3"], ["w3 w4"], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.allclose(again(**inputs).logits, logits, atol=1e-5)
        again.config.separator_id = CLS  # then all but the first token is the second text
        assert not torch.allclose(again(**inputs).logits, logits, atol=1e-3)


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
    for kind in ("mean+max", "conv"):
        model = make_model(num_labels=2)
        model.config.separator_id = SEP
        engine = Engine(model, make_tokenizer(), config=EngineConfig(device="cpu"))
        caches = [
            FeatureCache.of(engine, part, tmp_path / f"{kind} {number}", kind=kind) for number, part in enumerate(parts)
        ]
        # The full model is made to know the answer; heads are to come near to it.
        taught = [
            replace(each, logits=(torch.eye(2)[label.long()] * 8 - 4).numpy())
            for each, label in zip(caches, same, strict=True)
        ]
        fitted = fit_heads(*taught, model.config, settings=FitSettings(batch_size=32, epochs=12))
        losses[kind] = fitted.losses[0]
        exits = with_exits(model, fitted)
        assert (exits.config.exit_head, exits.config.separator_id) == (kind, SEP)
    assert losses["conv"] < 0.5 * losses["mean+max"]
