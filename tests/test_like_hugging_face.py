"""Whatever the encoder's and the tokenizer's settings, the engine answers as plain Hugging Face does, or refuses."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import PAD, VOCAB, WORDS, make_model, make_tokenizer
from hypothesis import given, settings, strategies as st
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from geep.engine import Engine, EngineConfig
from geep.modeling import FAMILIES, GeepForSequenceClassification

_ACTIVATIONS = ("gelu", "relu", "silu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "tanh")


def _one_of(**values: Any) -> dict[str, st.SearchStrategy[Any]]:
    return {name: st.sampled_from(found) for name, found in values.items()}


# Switches of a config that change what an encoder computes, by the kind of encoder.
_USUAL = _one_of(
    hidden_act=_ACTIVATIONS,
    layer_norm_eps=(1e-12, 1e-5, 1e-2),
    num_attention_heads=(1, 2, 4),
    intermediate_size=(16, 64),
    max_position_embeddings=(9, 24, 64),
    type_vocab_size=(0, 1, 2, 3),
    pad_token_id=(None, 0, PAD, len(VOCAB) - 1),
    output_hidden_states=(False, True),
    return_dict=(True, False),
)
_BERT = _USUAL | _one_of(
    is_decoder=(False, True),
    chunk_size_feed_forward=(0, 1),
    position_embedding_type=("absolute", "relative_key"),
    tie_word_embeddings=(True, False),
)
_SWITCHES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT | _one_of(embedding_size=(16, 32)),
    "distilbert": _one_of(
        activation=("gelu", "relu"),
        n_heads=(1, 2, 4),
        hidden_dim=(16, 64),
        sinusoidal_pos_embds=(False, True),
        max_position_embeddings=(9, 24, 64),
        pad_token_id=(0, PAD, len(VOCAB) - 1),
    ),
    "mpnet": _USUAL | _one_of(relative_attention_num_buckets=(8, 32)),
    "albert": _USUAL | _one_of(embedding_size=(16, 32), num_hidden_groups=(1, 2), inner_group_num=(1, 2)),
    "deberta-v2": _USUAL
    | _one_of(
        relative_attention=(True, False),
        pos_att_type=(["c2p"], ["p2c"], ["p2c", "c2p"], []),
        share_att_key=(True, False),
        norm_rel_ebd=("none", "layer_norm"),
        position_biased_input=(True, False),
        position_buckets=(-1, 8),
        embedding_size=(16, 32),
    ),
    "modernbert": _one_of(
        hidden_activation=_ACTIVATIONS,
        norm_eps=(1e-5, 1e-2),
        norm_bias=(False, True),
        attention_bias=(False, True),
        mlp_bias=(False, True),
        num_attention_heads=(1, 2, 4),
        local_attention=(2, 8, 128),
        global_attn_every_n_layers=(1, 2, 3),
        max_position_embeddings=(9, 24, 64),
        pad_token_id=(0, PAD),
    ),
}

_PIECES = (*WORDS[:20], "[SEP]", "[PAD]", "[MASK]", "abc", "Straße", "北京", "\u0301", "\U0001f600", "\x00", "\n", "?")
_TEXTS = st.one_of(
    st.lists(st.sampled_from(_PIECES), max_size=40).map(" ".join),
    st.text(max_size=12),
)


class InPython:
    """A tokenizer that is not written in Rust, in front of one that is."""

    is_fast = False

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, *parts: Any, **options: Any) -> Any:
        return self.own(*parts, **options)

    def __deepcopy__(self, memo: Any) -> InPython:
        return InPython(copy.deepcopy(self.own))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


@st.composite
def tokenizers(draw: st.DrawFn) -> Any:
    found = make_tokenizer()
    if draw(st.booleans()):
        found.model_input_names = ["input_ids", "attention_mask"]
    found.padding_side = draw(st.sampled_from(("right", "left")))
    found.truncation_side = draw(st.sampled_from(("right", "left")))
    found.model_max_length = draw(st.sampled_from((7, 20, int(1e30))))
    found.split_special_tokens = draw(st.booleans())
    return found


def plain_call(model: Any, tokenizer: Any, texts: list[Any], max_length: int) -> tuple[Mapping[str, Tensor], Tensor]:
    """What anybody would write: tokenizer, then model; the inputs and what the model says of them."""
    columns = [list(column) for column in zip(*texts, strict=True)] if isinstance(texts[0], tuple) else [texts]
    inputs = tokenizer(*columns, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.inference_mode():
        return inputs, model(**inputs).logits.softmax(-1)


def by_hand(model: GeepForSequenceClassification, encoder: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The classifier, computed from what Hugging Face's AutoModel says of the inputs."""
    known = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    if FAMILIES[encoder.config.model_type].has_token_type_ids:
        known = dict(inputs)
    with torch.inference_mode():
        hidden = encoder(**known)[0]
        mask = inputs["attention_mask"][..., None].float()
        read = (hidden * mask).sum(1) / mask.sum(1) if model.config.exit_head == "mean" else hidden[:, 0]
        head: Any = model.teacher
        logits: Tensor = head.out(torch.tanh(head.dense(read)))
        return logits.softmax(-1)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_an_engine_at_full_depth_answers_as_plain_hugging_face_or_refuses(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(sorted(FAMILIES)), label="family")
    switches = data.draw(st.fixed_dictionaries({}, optional=_SWITCHES[family]), label="switches")
    tokenizer = data.draw(tokenizers(), label="tokenizer")
    kind = data.draw(st.sampled_from((_TEXTS, st.tuples(_TEXTS, _TEXTS))))
    head = data.draw(st.sampled_from(("mean", "cls")), label="head")
    texts = data.draw(st.lists(kind, min_size=1, max_size=4), label="texts")
    backend = data.draw(st.sampled_from((None, "padded")), label="backend")
    in_python = data.draw(st.booleans(), label="in python")
    try:
        model = make_model(family, head=head, **switches)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):
        return  # Hugging Face builds no such encoder
    config = EngineConfig(device="cpu", backend=backend)
    try:
        engine = Engine(model, InPython(tokenizer) if in_python else tokenizer, config=config)
        found = torch.tensor([[*answer.scores.values()] for answer in engine.predict(texts, speed=0.0)])
    except ValueError:
        # Nothing is refused that plain Hugging Face runs.
        with pytest.raises((AssertionError, IndexError, RuntimeError, TypeError, ValueError)):
            plain_call(model, tokenizer, texts, 6)
        return
    encoder = AutoModel.from_config(model.encoder.config).eval()
    encoder.load_state_dict(model.encoder.state_dict(), strict=False)
    longest = engine.deployment.max_length
    for row, text in enumerate(texts):
        inputs, expected = plain_call(model, tokenizer, [text], longest)
        assert torch.allclose(found[row], expected[0], atol=1e-4)
        assert torch.allclose(found[row], by_hand(model, encoder, inputs)[0], atol=1e-4)
    # Padded at the left, or with another id than the config's, encoders count positions otherwise: of the texts alone
    # that is no matter.
    if tokenizer.padding_side == "right" and model.encoder.config.pad_token_id == tokenizer.pad_token_id:
        assert torch.allclose(found, plain_call(model, tokenizer, texts, longest)[1], atol=1e-4)
