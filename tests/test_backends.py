"""Every backend equals the Hugging Face model on each text alone, whatever happens to the batch on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import MAX_LENGTH, NUM_LAYERS, PAD, alone, make_model, make_tokenizer, random_batch
from hypothesis import given, strategies as st
from torch import Tensor
from transformers import AutoConfig

from geep.backends import BACKENDS, TokenBatch
from geep.backends.forms import FORMS
from geep.backends.layout import Layout
from geep.backends.protocol import token_positions
from geep.engine import Engine, EngineConfig
from geep.modeling import FAMILIES, HEADS, GeepForSequenceClassification

ROWS = [
    pytest.param(backend, family, id=f"{backend}-{family}")
    for backend, row in BACKENDS.items()
    for family in FAMILIES
    if row.supports(AutoConfig.for_model(family))
]
every_row = pytest.mark.parametrize(("backend", "family"), ROWS)
every_head = pytest.mark.parametrize("head", sorted(HEADS))


def close(found: Tensor, expected: Tensor) -> bool:
    # Float32: 5e-5 of the size of the logits. The order of sums differs between backends and numbers of threads.
    return torch.allclose(found, expected, atol=5e-5 * max(1.0, float(expected.abs().max())), rtol=0)


def one_walk(model: GeepForSequenceClassification, backend: Any, batch: TokenBatch, expected: Tensor, seed: int) -> int:
    """Send texts through random prefixes, selections and mergers; compare all that exits say. Returns the count."""
    random = np.random.default_rng(seed)
    border = int(random.integers(1, len(batch)))
    everyone = np.arange(len(batch))
    live = [(backend.start(batch.select(part)), part) for part in (everyone[:border], everyone[border:])]
    compared = 0
    for layer in range(1, NUM_LAYERS + 1):
        following = []
        for state, texts in live:
            kept = int(random.integers(1, len(texts) + 1)) if random.random() < 0.5 else len(texts)
            texts = texts[:kept]
            state = backend.advance(state, layer, kept)
            assert state.lengths.tolist() == batch.lengths[texts].tolist()
            if layer in model.config.depths:
                start = int(random.integers(0, kept))
                stop = int(random.integers(start + 1, kept + 1))
                logits = backend.exit_logits(state, layer, start, stop)
                place = model.config.depths.index(layer)
                assert close(logits, expected[place, torch.from_numpy(texts[start:stop])])
                compared += stop - start
            if random.random() < 0.5:
                rows = random.permutation(kept)[: int(random.integers(1, kept + 1))]
                before = state.hidden.clone()
                chosen = backend.select(state, rows)
                assert torch.equal(state.hidden, before)
                state, texts = chosen, texts[rows]
            following.append((state, texts))
        if len(following) > 1 and random.random() < 0.5:
            order = random.permutation(len(following)).tolist()
            states, texts_of = zip(*(following[place] for place in order), strict=True)
            following = [(backend.concat(states), np.concatenate(texts_of))]
        live = following
    return compared


@every_row
@every_head
@torch.no_grad()
def test_logits_equal_those_of_each_text_alone_on_every_way(backend: str, family: str, head: str) -> None:
    model = make_model(family, head=head)
    batch = random_batch(9, seed=1, pairs=FAMILIES[family].has_token_type_ids)
    expected = alone(model, batch)
    built = BACKENDS[backend].build(model, dtype="float32")
    compared = sum(one_walk(model, built, batch, expected, seed) for seed in range(12))
    assert compared > 60


@every_row
@torch.no_grad()
def test_texts_of_special_tokens_alone_are_answered(backend: str, family: str) -> None:
    model = make_model(family)
    batch = TokenBatch.concat([random_batch(3, seed=2, longest=2), random_batch(3, seed=3), random_batch(1, longest=2)])
    expected = alone(model, batch)
    live = built_run(BACKENDS[backend].build(model, dtype="float32"), batch)
    assert close(BACKENDS[backend].build(model, dtype="float32").exit_logits(live, NUM_LAYERS, 0, 7), expected[-1])


def built_run(backend: Any, batch: TokenBatch) -> Any:
    live = backend.start(batch)
    for layer in range(1, NUM_LAYERS + 1):
        live = backend.advance(live, layer, len(batch))
    return live


@every_row
@every_head
@torch.no_grad()
def test_texts_without_any_token_harm_no_other(backend: str, family: str, head: str) -> None:
    model = make_model(family, head=head)
    batch = random_batch(3, seed=4)
    empty = TokenBatch(batch.input_ids[:0], None, np.zeros(1, dtype=np.int64))
    mixed = TokenBatch.concat([empty, batch.select(np.array([0])), empty, batch.select(np.array([1, 2])), empty])
    built = BACKENDS[backend].build(model, dtype="float32")
    logits = built.exit_logits(built_run(built, mixed), NUM_LAYERS, 0, 6)
    assert close(logits[[1, 3, 4]], alone(model, batch)[-1])
    assert torch.isfinite(logits).all()


@every_row
@torch.no_grad()
def test_segment_ids_are_honoured(backend: str, family: str) -> None:
    model = make_model(family)
    pairs = random_batch(6, seed=5, pairs=True)
    plain = TokenBatch(pairs.input_ids, None, pairs.lengths)
    built = BACKENDS[backend].build(model, dtype="float32")
    with_types, without = (built.exit_logits(built_run(built, batch), NUM_LAYERS, 0, 6) for batch in (pairs, plain))
    assert close(with_types, alone(model, pairs)[-1])
    assert close(without, alone(model, plain)[-1])
    assert close(with_types, without) != FAMILIES[family].has_token_type_ids


@every_row
@torch.no_grad()
def test_a_pad_token_inside_a_text_is_a_token_like_others(backend: str, family: str) -> None:
    model = make_model(family)
    batch = random_batch(4, seed=6, shortest=6)
    batch.input_ids[[2, 3, 9]] = PAD
    built = BACKENDS[backend].build(model, dtype="float32")
    assert close(built.exit_logits(built_run(built, batch), NUM_LAYERS, 0, 4), alone(model, batch)[-1])


@every_row
@torch.no_grad()
def test_texts_of_the_longest_length_fit(backend: str, family: str) -> None:
    model = make_model(family)
    longest = MAX_LENGTH - (PAD + 1 if FAMILIES[family].positions_after_pad else 0)
    batch = random_batch(3, seed=7, shortest=longest, longest=longest)
    built = BACKENDS[backend].build(model, dtype="float32")
    assert close(built.exit_logits(built_run(built, batch), NUM_LAYERS, 0, 3), alone(model, batch)[-1])


def test_what_has_a_form_is_packed_and_every_family_is_run() -> None:
    assert FORMS.keys() <= FAMILIES.keys()
    assert not any(backend.supports(AutoConfig.for_model("gpt2")) for backend in BACKENDS.values())
    configs = [AutoConfig.for_model(family) for family in FAMILIES]
    assert all(BACKENDS["padded"].supports(config) for config in configs)
    for name in ("packed", "cuda"):
        assert {config.model_type for config in configs if BACKENDS[name].supports(config)} == FORMS.keys()


# Frequencies that are not those of the plain rotation.
_SCALED = {
    kind: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
}


@pytest.mark.parametrize(
    ("family", "switch"), [("bert", {"is_decoder": True}), ("modernbert", {"rope_parameters": _SCALED})]
)
def test_a_layer_that_a_switch_makes_another_one_runs_padded(family: str, switch: dict[str, Any]) -> None:
    """Engine and model agree whatever the config says of the layers: what is not known is not packed."""
    model = make_model(family, **switch)
    assert not BACKENDS["packed"].supports(model.encoder.config)
    with pytest.raises(ValueError, match=r"the encoder's config has .*use backend='padded'"):
        BACKENDS["packed"].build(model, dtype="float32")
    engine = Engine(model, make_tokenizer(), config=EngineConfig(device="cpu"))
    assert engine.deployment.deployed_as.startswith("padded")
    batch = random_batch(6, seed=4)
    assert close(engine.exit_logits(batch), alone(model, batch))


@torch.no_grad()
def test_the_packed_layer_knows_the_encoders_activation() -> None:
    model = make_model(hidden_act="gelu_new")
    batch = random_batch(4)
    built = BACKENDS["packed"].build(model, dtype="float32")
    assert close(built.exit_logits(built_run(built, batch), NUM_LAYERS, 0, 4), alone(model, batch)[-1])


# Token batches

LENGTHS = st.lists(st.integers(0, 6), max_size=20)


@given(LENGTHS)
def test_runs_cover_all_tokens_in_blocks_of_equal_length(lengths: list[int]) -> None:
    runs = Layout(np.array(lengths, dtype=np.int64)).runs
    assert [run.length for run in runs for _ in range(run.num_texts)] == [length for length in lengths if length]
    position = 0
    for run in runs:
        assert run.start == position
        position += run.num_texts * run.length
    assert position == sum(lengths)


@given(LENGTHS)
def test_equal_neighbours_share_a_run(lengths: list[int]) -> None:
    runs = Layout(np.array(sorted(lengths), dtype=np.int64)).runs
    assert len(runs) == len(set(lengths) - {0})


@given(LENGTHS, st.data())
def test_selected_texts_bring_their_own_tokens(lengths: list[int], data: st.DataObject) -> None:
    texts = [[10 * place + token for token in range(length)] for place, length in enumerate(lengths)]
    flat = np.array([token for text in texts for token in text], dtype=np.int64)
    batch = TokenBatch(flat, flat + 1, np.array(lengths, dtype=np.int64))
    rows = data.draw(st.lists(st.integers(0, max(len(lengths) - 1, 0)), max_size=20 if lengths else 0))
    chosen = np.array(rows, dtype=np.int64)
    expected = [token for row in rows for token in texts[row]]
    assert flat[token_positions(batch.lengths, chosen)].tolist() == expected
    found = batch.select(chosen)
    assert found.input_ids.tolist() == expected
    assert found.token_type_ids is not None
    assert found.token_type_ids.tolist() == [token + 1 for token in expected]
    assert found.lengths.tolist() == [lengths[row] for row in rows]


def test_batches_without_segment_ids_count_as_segment_0() -> None:
    pairs, plain = random_batch(2, pairs=True), random_batch(2, seed=1)
    assert pairs.token_type_ids is not None
    both = TokenBatch.concat([plain, pairs])
    assert both.token_type_ids is not None
    assert both.token_type_ids.tolist() == [0] * len(plain.input_ids) + pairs.token_type_ids.tolist()
    assert TokenBatch.concat([plain, plain]).token_type_ids is None
    assert len(both) == 4
