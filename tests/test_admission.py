"""Models and tokenizers that do not belong together are refused at load; layers are tried before they are believed."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MAX_LENGTH, VOCAB, alone, make_engine, make_model, make_tokenizer, random_batch, tiny_encoder
from tokenizers.processors import TemplateProcessing

from geep.backends import packed_layer
from geep.backends.likeness import unlike_hugging_face
from geep.backends.mixers import Disentangled, Rotary, mixers_of
from geep.engine import Engine, EngineConfig
from geep.modeling import FAMILIES, GeepConfig, GeepForSequenceClassification

ON_CPU = EngineConfig(device="cpu")


def layer_of(model: GeepForSequenceClassification, number: int) -> Any:
    return model.encoder.get_submodule(FAMILIES[model.encoder.config.model_type].layers)[number]


# Layers


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("head", ["mean", "cls", "attention"])
def test_a_family_as_it_is_passes_the_trial(family: str, head: str) -> None:
    model = make_model(family, head=head)
    ways = (True, False)
    assert [unlike_hugging_face(model, packed=packed, max_length=MAX_LENGTH) for packed in ways] == [None, None]


def other_distances(mixer: Any) -> Any:
    """The same mixer, but for what is far apart."""
    if isinstance(mixer, Rotary):
        return mixer if mixer.window is None else Rotary.of(mixer.turns, mixer.window + 1, torch.float32)
    if isinstance(mixer, Disentangled) and mixer.keys is not None:
        buckets = mixer.keys.shape[1]  # each distance gets its own, as far as they go
        own = torch.arange(len(mixer.rows)) - len(mixer.rows) // 2 + buckets // 2
        return replace(mixer, rows=own.clamp(0, buckets - 1))
    table = mixer.table.clone()
    table[:, table.shape[1] // 2 + 25 :] += 1
    return replace(mixer, table=table)


@pytest.mark.parametrize("family", ["deberta-v2", "modernbert", "mpnet"])
def test_far_distances_that_are_other_ones_are_found_before_the_first_text(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def others(encoder: Any, layers: Any) -> list[Any]:
        return [other_distances(mixer) for mixer in mixers_of(encoder, layers)]

    monkeypatch.setattr(packed_layer, "mixers_of", others)
    with pytest.raises(ValueError, match=f"packed layers do not answer as .*'{family}'.*Use backend='padded'"):
        Engine(make_model(family), make_tokenizer(), config=EngineConfig(device="cpu", backend="packed"))


class Doubled(torch.nn.Module):
    """A part of a layer that a switch nobody knows has made another one."""

    def __init__(self, own: torch.nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, *arguments: Any) -> Any:
        return 1.01 * self.own(*arguments)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["own"], name)


def switched() -> GeepForSequenceClassification:
    model = make_model()
    layer = layer_of(model, 2)
    layer.intermediate = Doubled(layer.intermediate)
    return model


def test_a_layer_that_is_another_one_runs_padded_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = switched(), random_batch(6, seed=4)
    with caplog.at_level(logging.WARNING):
        engine = Engine(model, make_tokenizer(), config=ON_CPU)
    assert engine.deployment.backend_name == "padded"
    assert re.search(r"packed layers do not answer as .*'bert' does.*differ by.*Running padded", caplog.text)
    assert torch.allclose(engine.exit_logits(batch), alone(engine.model, batch), atol=1e-4)


def test_a_layer_that_is_another_one_is_refused_where_packed_was_asked_for() -> None:
    with pytest.raises(ValueError, match="packed layers do not answer.*Use backend='padded'"):
        Engine(switched(), make_tokenizer(), config=EngineConfig(device="cpu", backend="packed"))


def _stretch(module: Any, inputs: Any, out: Any) -> Any:
    out.last_hidden_state = 1.01 * out.last_hidden_state
    return out


def test_an_encoder_that_does_more_than_its_layers_is_refused() -> None:
    model = make_model("albert")
    model.encoder.register_forward_hook(_stretch)
    with pytest.raises(ValueError, match="padded layers do not answer as .*'albert'.*Nothing here can run it"):
        Engine(model, make_tokenizer(), config=ON_CPU)


def test_feed_forward_in_pieces_takes_any_length() -> None:
    for family in ("bert", "albert"):
        model, batch = make_model(family, chunk_size_feed_forward=7), random_batch(6, seed=4)
        engine = Engine(model, make_tokenizer(), config=ON_CPU)
        assert torch.allclose(engine.exit_logits(batch), alone(make_model(family), batch), atol=1e-4)


# Tokens


def test_special_tokens_in_a_text_are_split_where_the_tokenizer_says_so() -> None:
    tokenizer = make_tokenizer()
    tokenizer.split_special_tokens = True
    engine = Engine(make_model(), tokenizer, config=ON_CPU)
    texts = ["w1 [SEP] w2", "[PAD]"]
    assert engine.tokenize(texts).batch.input_ids.tolist() == [
        token for row in tokenizer(texts)["input_ids"] for token in row
    ]


def test_segment_ids_of_single_texts_are_the_tokenizers() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:1 [SEP]:1", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    batch = Engine(make_model(), tokenizer, config=ON_CPU).tokenize(["w1 w2"]).batch
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == tokenizer("w1 w2")["token_type_ids"] == [0, 1, 1, 1]


def test_ids_around_texts_that_have_no_embedding_are_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 0), ("[SEP]", len(VOCAB) + 3)],
    )
    with pytest.raises(ValueError, match=f"token ids up to {len(VOCAB) + 3}.*embeddings for 0..{len(VOCAB) - 1}"):
        Engine(make_model(), tokenizer, config=ON_CPU)


@pytest.mark.parametrize(
    ("family", "switches", "message"),
    [
        ("roberta", {"pad_token_id": None}, "counts positions from its pad token.*set pad_token_id"),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size of the encoder's config is 0, expected 1 or more"),
        ("bert", {"pad_token_id": -1}, "pad_token_id of the encoder's config is -1.*0..199"),
        ("bert", {"max_position_embeddings": 2}, "reads 2 tokens.*expected at least 3"),
    ],
)
def test_encoders_that_cannot_read_a_text_are_refused(family: str, switches: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(make_model(family, **switches), make_tokenizer(), config=ON_CPU)


def test_a_tokenizer_without_a_pad_token_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="tokenizer has no pad token, expected one"):
        Engine(make_model(), tokenizer, config=ON_CPU)


@pytest.mark.parametrize("name", ["banana", "xpu9", "meta", "", "cpu:x"])
def test_a_device_that_torch_cannot_use_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device={name!r} is none that torch can use here.*expected 'cpu' or"):
        Engine(make_model(), make_tokenizer(), config=EngineConfig(device=name))


# Longest text


@pytest.mark.parametrize(
    ("family", "positions", "expected"), [("bert", 512, 512), ("roberta", 514, 512), ("mpnet", 514, 512)]
)
def test_a_tokenizer_without_a_limit_is_cut_at_the_position_table(family: str, positions: int, expected: int) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = int(1e30)
    engine = Engine(make_model(family, max_position_embeddings=positions), tokenizer, config=ON_CPU)
    assert engine.deployment.max_length == expected
    assert engine.predict(["w1 " * 600])[0].truncated


def test_mpnet_counts_from_1_whatever_its_config_says() -> None:
    engine = Engine(make_model("mpnet", pad_token_id=0), make_tokenizer(), config=ON_CPU)
    assert engine.deployment.max_length == MAX_LENGTH - 2
    assert engine.predict(["w1 " * 100])[0].truncated


def test_more_than_the_model_reads_is_refused_and_no_less_is() -> None:
    with pytest.raises(ValueError, match=r"max_length=65 is more than the 64 tokens .*no more positions"):
        make_engine(config=EngineConfig(device="cpu", max_length=65), table=False)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 20
    with pytest.raises(ValueError, match=r"max_length=21 is more than the 20 tokens .*model_max_length"):
        Engine(make_model(), tokenizer, config=EngineConfig(device="cpu", max_length=21))
    engine = Engine(make_model(), tokenizer, config=EngineConfig(device="cpu", max_length=20))
    assert engine.deployment.max_length == 20


# Labels


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A model folder of three labels whose config.json was changed."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, r"ids \[1, 2, 3\], expected 0..2"),
        ({"id2label": {"0": "a", "1": "b"}}, "have 3 labels, and config.json names 2"),
        ({"id2label": None}, "have 3 labels, and config.json names 2"),
        ({"id2label": {}}, "id2label is {}, expected names by number"),
        ({"id2label": {"a": "a", "b": "b", "c": "c"}}, "expected names by number"),
        # What old versions of Hugging Face refuse themselves is one message all the same.
        ({"id2label": ["a", "b", "c"]}, "id2label"),
        ({"id2label": {"0": "a", "1": "b", "2": 7}}, r"(?s)id2label.*\b7\b"),
        ({"problem_type": "nonsense"}, "problem_type.*nonsense"),
        ({"num_labels": 5}, "num_labels=5, but id2label names 3 labels"),
        ({"problem_type": "regression"}, "problem_type of config.json is 'regression', expected one of"),
        ({"text_pairs": "yes"}, "text_pairs is 'yes'"),
    ],
)
def test_labels_that_do_not_fit_the_weights_are_refused_at_load(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(changed(tmp_path, lambda config: config.update(fields)), device="cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 16}, r"other shapes than config.json says: 'encoder.*has \(32,\), expected \(16,\)"),
        ({"hidden_act": "nonsense"}, "names 'nonsense', which this version of transformers does not know"),
    ],
)
def test_an_encoder_config_of_another_model_is_one_message(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(changed(tmp_path, lambda found: found["encoder_config"].update(fields)), device="cpu")


def test_a_plain_encoder_whose_config_is_another_models_is_one_message(tmp_path: Path) -> None:
    tiny_encoder("bert").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"vocab_size": 150}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"word_embeddings.weight' has \(200, 32\), expected \(150, 32\)"):
        GeepForSequenceClassification.from_encoder(str(tmp_path), num_labels=2)


def test_labels_that_do_not_fit_the_classifiers_are_refused_in_memory() -> None:
    model = make_model()
    model.config.id2label = {0: "a", 1: "b"}
    with pytest.raises(ValueError, match="classifier at layer 1 gives 3 logits, and id2label of the config names 2"):
        Engine(model, make_tokenizer(), config=ON_CPU)
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match="problem_type of config.json is 'regression'"):
        Engine(model, make_tokenizer(), config=ON_CPU)
    with pytest.raises(ValueError, match="num_labels=4, but id2label names 3"):
        GeepConfig(num_labels=4, id2label={0: "a", 1: "b", 2: "c"})


# One process


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_an_engine_is_neither_pickled_nor_copied(copied: Callable[[Engine], Any], tiny_engine: Engine) -> None:
    with pytest.raises(TypeError, match=r"load it in each process.*Engine.from_pretrained\(folder\)"):
        copied(tiny_engine)
