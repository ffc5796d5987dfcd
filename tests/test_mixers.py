"""What makes a family's attention its own: by itself, and in every setting of a config that an encoder may have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import MAX_LENGTH, NUM_LAYERS, alone, make_model, make_tokenizer, random_batch
from hypothesis import given, settings, strategies as st
from test_backends import built_run, close, one_walk
from test_cuda import TOLERANCES, on_gpu
from torch import Tensor
from transformers import AutoConfig

from geep.backends import BACKENDS, CudaBackend, CudaOptions, PackedBackend
from geep.backends.forms import FORMS
from geep.backends.int8 import observe
from geep.backends.mixers import Disentangled, DistanceBias, DotProduct, Rotary, by_distance, paired
from geep.backends.packed_layer import packed_layers
from geep.engine import Engine, EngineConfig
from geep.modeling import FAMILIES

# Settings that change what a layer computes, one row a model.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("mpnet", {}),
    ("mpnet", {"hidden_act": "silu"}),
    ("albert", {}),
    ("albert", {"num_hidden_groups": 2}),
    ("albert", {"num_hidden_groups": 2, "inner_group_num": 2}),
    ("deberta-v2", {}),
    ("deberta-v2", {"share_att_key": False}),
    ("deberta-v2", {"position_buckets": -1}),
    ("deberta-v2", {"position_buckets": -1, "max_relative_positions": 10, "share_att_key": False}),
    ("deberta-v2", {"pos_att_type": ["c2p"], "norm_rel_ebd": "layer_norm", "position_biased_input": False}),
    ("deberta-v2", {"pos_att_type": ["p2c"], "share_att_key": False, "embedding_size": 16}),
    ("deberta-v2", {"pos_att_type": []}),
    ("deberta-v2", {"relative_attention": False}),
    ("modernbert", {}),
    ("modernbert", {"local_attention": 4, "global_attn_every_n_layers": 3}),
    ("modernbert", {"local_attention": 2, "global_attn_every_n_layers": 1}),
    ("modernbert", {"local_attention": 1}),
    ("modernbert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "hidden_activation": "silu"}),
]
every_setting = pytest.mark.parametrize(
    ("family", "changes"), [pytest.param(*row, id="-".join([row[0], *map(str, row[1].items())])) for row in SETTINGS]
)


def longest(family: str) -> int:
    return MAX_LENGTH - (2 if FAMILIES[family].positions_after_pad else 0)


@every_setting
@pytest.mark.parametrize("backend", sorted(BACKENDS))
@torch.no_grad()
def test_texts_of_any_length_equal_hugging_face_in_every_setting(
    family: str, changes: dict[str, Any], backend: str
) -> None:
    model = make_model(family, **changes)
    batch = random_batch(8, seed=2, longest=longest(family))
    built = BACKENDS[backend].build(model, dtype="float32")
    assert sum(one_walk(model, built, batch, alone(model, batch), seed) for seed in range(3)) > 10


@every_setting
@torch.no_grad()
def test_texts_that_end_may_go_on_as_their_first_tokens(family: str, changes: dict[str, Any]) -> None:
    model = make_model(family, head="cls", **changes)
    batch = random_batch(7, seed=3, longest=longest(family))
    expected, built = alone(model, batch), PackedBackend.build(model, dtype="float32")
    live, num_texts = built.start(batch), 7
    for layer, continuing in ((1, 7), (2, 5), (3, 4), (4, 0)):
        live = built.advance(live, layer, num_texts, continuing=continuing)
        assert live.lengths[continuing:].tolist() == ([1] * (num_texts - continuing))
        assert close(built.exit_logits(live, layer, 0, num_texts), expected[layer - 1, :num_texts])
        num_texts = continuing


@every_setting
@torch.no_grad()
def test_graphs_of_layers_and_exits_equal_hugging_face(family: str, changes: dict[str, Any]) -> None:
    model = make_model(family, **changes).double()  # in float32 heads of loud weights round
    batch = random_batch(12, seed=4, longest=longest(family))
    options = CudaOptions(graphs=True, record_after=0)
    built, expected = CudaBackend.build(model, dtype="float32", options=options), alone(model, batch)
    for _ in range(2):  # recorded, then replayed
        live = built.start(batch)
        for layer, num_texts in ((1, 12), (2, 9), (3, 9), (4, 5)):
            live = built.advance(live, layer, num_texts)
            assert close(built.exit_logits(live, layer, 0, num_texts), expected[layer - 1, :num_texts])


@every_setting
@pytest.mark.parametrize("backend", ["packed", "cuda"])
@torch.no_grad()
def test_bfloat16_stays_near_float32(family: str, changes: dict[str, Any], backend: str) -> None:
    model = make_model(family, **changes)
    batch = random_batch(6, seed=5, longest=longest(family))
    expected = alone(model, batch)[-1]
    model = model.to(BACKENDS[backend].model_dtype("bfloat16", "cpu"))
    built: Any = BACKENDS[backend].build(model, dtype="bfloat16")
    found = built.exit_logits(built_run(built, batch), NUM_LAYERS, 0, 6).float()
    assert torch.allclose(found, expected, atol=TOLERANCES[torch.bfloat16] * float(expected.abs().max()), rtol=0)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        CudaOptions(attention="tiles", compile=False, graphs=False),
        CudaOptions(attention="runs", compile=False, graphs=False),
        CudaOptions(compile=True, graphs=True, record_after=0),
    ],
    ids=["tiles", "runs", "compile-graphs"],
)
@every_setting
@torch.inference_mode()
def test_a_gpu_gives_the_answers_of_float32_on_the_cpu(
    family: str, changes: dict[str, Any], options: CudaOptions, dtype: torch.dtype
) -> None:
    model = make_model(family, num_attention_heads=2, **changes)
    batch = random_batch(8, seed=7, longest=longest(family))
    expected = alone(model, batch)
    built = CudaBackend.build(model.to("cuda", dtype), dtype="float32", options=options)
    for _ in range(3):  # the second time compiled code and graphs are there
        live = built.start(batch)
        for layer, num_texts in ((1, 8), (2, 8), (3, 6), (4, 6)):
            live = built.advance(live, layer, num_texts)
            found, wanted = built.exit_logits(live, layer, 0, num_texts).float().cpu(), expected[layer - 1, :num_texts]
            assert torch.allclose(found, wanted, atol=TOLERANCES[dtype] * max(1.0, float(wanted.abs().max())), rtol=0)


def test_layers_with_shared_weights_lay_them_out_once() -> None:
    built = PackedBackend.build(make_model("albert"), dtype="float32")
    assert len(built.layers) == NUM_LAYERS
    assert len(set(map(id, built.layers))) == 1
    groups = PackedBackend.build(make_model("albert", num_hidden_groups=2, inner_group_num=2), dtype="float32").layers
    number = {id(layer): place for place, layer in reversed(list(enumerate(groups)))}
    assert [number[id(layer)] for layer in groups] == [0, 1, 0, 1, 4, 5, 4, 5]


def test_each_family_has_its_mixer() -> None:
    kinds = {family: type(packed_layers(make_model(family))[1].mixer) for family in FORMS}
    others = {"mpnet": DistanceBias, "deberta-v2": Disentangled, "modernbert": Rotary}
    assert kinds == dict.fromkeys(FORMS, DotProduct) | others


# Eight bits


@pytest.mark.parametrize("family", ["mpnet", "albert", "deberta-v2"])
@torch.no_grad()
def test_eight_bits_stay_near_float32_where_the_layer_is_built_like_berts(family: str) -> None:
    model = make_model(family, head="cls")
    batch = random_batch(20, seed=6)
    live = PackedBackend.build(model, dtype="float32").start(batch)
    ranges = observe(packed_layers(model), [(live.hidden, live.layout)])
    built, expected = PackedBackend.build(model, dtype="int8", ranges=ranges), alone(model, batch)[-1]
    found = built.exit_logits(built_run(built, batch), NUM_LAYERS, 0, 20)
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 0.1


@torch.no_grad()
def test_eight_bits_are_refused_where_it_is_not() -> None:
    model = make_model("modernbert")
    live = PackedBackend.build(model, dtype="float32").start(random_batch(3))
    with pytest.raises(ValueError, match=r"normalises first or is gated \(ModernBERT\); use float32 or bfloat16"):
        observe(packed_layers(model), [(live.hidden, live.layout)])


# Pieces


@given(st.integers(1, 9), st.integers(0, 4))
def test_a_table_of_distances_is_laid_out_by_distance(length: int, beyond: int) -> None:
    reach = length + beyond
    table = torch.arange(1 - reach, reach)[None]
    place = torch.arange(length)
    assert torch.equal(by_distance(table, length)[0], place - place[:, None])


def test_a_text_beyond_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="positions for 4 tokens, got a text of 5"):
        by_distance(torch.zeros(1, 7), 5)
    with pytest.raises(ValueError, match="positions for 4 tokens, got a text of 5"):
        Rotary.of(torch.ones(4, 2, dtype=torch.complex64), None, torch.float32)(torch.zeros(1, 5, 3, 1, 4))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(0, 9), st.integers(1, 3))
def test_a_window_hides_what_is_further_however_it_is_computed(length: int, window: int, num_texts: int) -> None:
    torch.manual_seed(length)
    block = torch.randn(num_texts, length, 3, 2, 4)
    query, key, value = block.permute(2, 0, 3, 1, 4)
    place = torch.arange(length)
    far = (place[:, None] - place).abs() > window
    expected = (query @ key.transpose(-1, -2) / 2).masked_fill(far, -torch.inf).softmax(-1) @ value
    unturned = Rotary.of(torch.ones(40, 2, dtype=torch.complex64), window, torch.float32)
    assert torch.allclose(unturned(block.clone()), expected, atol=1e-5)
    # Tiles bring a bias of their own.
    zeros = torch.zeros(num_texts, 1, length, length)
    assert torch.allclose(unturned(block.clone(), zeros), expected, atol=1e-5)


@given(st.integers(1, 4), st.integers(1, 4))
def test_what_is_turned_together_comes_to_lie_side_by_side(num_heads: int, pairs: int) -> None:
    head = 2 * pairs
    rows = torch.arange(num_heads * head)
    found = paired(rows, num_heads).view(num_heads, pairs, 2)
    assert torch.equal(found[..., 1] - found[..., 0], torch.full((num_heads, pairs), pairs))
    assert sorted(found.flatten().tolist()) == rows.tolist()


def scores_of(mixer: Disentangled, block: Tensor) -> Tensor:
    """Scores from the definition, one pair of tokens after another."""
    num_texts, length, _, num_heads, _ = block.shape
    query, key = block[:, :, 0], block[:, :, 1]
    scores = torch.zeros(num_texts, num_heads, length, length)
    for i, j in np.ndindex(length, length):
        bucket = mixer.rows[len(mixer.rows) // 2 + i - j]
        scores[:, :, i, j] = mixer.scale * (query[:, i] * key[:, j]).sum(-1)
        if mixer.keys is not None:
            scores[:, :, i, j] += (query[:, i] * mixer.keys[:, bucket]).sum(-1)
        if mixer.queries is not None:
            scores[:, :, i, j] += (key[:, j] * mixer.queries[:, bucket]).sum(-1)
    return scores


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 12), st.sampled_from([(1, 1), (1, 0), (0, 1)]))
def test_disentangled_scores_are_those_of_the_definition(
    length: int, num_texts: int, buckets: int, parts: tuple[int, int]
) -> None:
    torch.manual_seed(length)
    block = torch.randn(num_texts, length, 3, 2, 4)
    keys, queries = (torch.randn(2, buckets, 4) if part else None for part in parts)
    mixer = Disentangled(0.3, keys, queries, torch.randint(0, buckets, (2 * length + 3,)))
    expected = scores_of(mixer, block).softmax(-1) @ block[:, :, 2].transpose(1, 2)
    assert torch.allclose(mixer(block.clone()), expected, atol=1e-5)
    assert torch.allclose(mixer(block, torch.zeros(num_texts, 1, length, length)), expected, atol=1e-5)


# Deployed


@pytest.mark.parametrize("family", ["mpnet", "albert", "deberta-v2", "modernbert"])
def test_engines_run_packed_by_themselves(family: str) -> None:
    engine = Engine(make_model(family), make_tokenizer(), config=EngineConfig(device="cpu"))
    assert engine.deployment.deployed_as.startswith("packed, float32")


@torch.no_grad()
def test_mpnet_distances_share_as_many_numbers_as_hugging_face_lets_them() -> None:
    few = AutoConfig.for_model("mpnet", relative_attention_num_buckets=8)
    more = make_model("mpnet", relative_attention_num_buckets=40)
    assert not BACKENDS["packed"].supports(few)
    batch = random_batch(4, longest=longest("mpnet"))
    built = PackedBackend.build(more, dtype="float32")
    assert close(built.exit_logits(built_run(built, batch), NUM_LAYERS, 0, 4), alone(more, batch)[-1])
