"""Classifiers of others: taken over, they answer as Hugging Face's own do; what cannot be taken over is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, loud, make_tokenizer, random_texts, tiny_encoder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
)

from geep.engine import Engine, EngineConfig
from geep.folder import fingerprint
from geep.modeling import CLASSIFIERS, FAMILIES, GeepForSequenceClassification, from_classifier

NAMES = ("bad", "good", "neither")


def make_classifier(family: str, *, names: tuple[str, ...] = NAMES, **changes: Any) -> PreTrainedModel:
    """Hugging Face's own classifier of a family, with random weights that tell texts apart."""
    config = tiny_encoder(family, **changes).config
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(config)
    loud(classifier, std=0.25)
    return classifier.eval()


def batch(*, pairs: bool = False) -> dict[str, Tensor]:
    texts = random_texts(12, seed=5)
    inputs = (texts, texts[::-1]) if pairs else (texts,)
    return dict(make_tokenizer()(*inputs, padding=True, return_tensors="pt"))


def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    family = getattr(model.config, "encoder_config", model.config).model_type
    if not FAMILIES[family].has_token_type_ids:
        inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    with torch.inference_mode():
        return model(**inputs).logits


def test_every_family_is_taken_apart() -> None:
    assert CLASSIFIERS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_taken_over_answers_as_it_did(family: str, pairs: bool, tmp_path: Path) -> None:
    classifier = make_classifier(family)
    classifier.save_pretrained(tmp_path / "theirs")
    inputs = batch(pairs=pairs)
    expected = logits(classifier, inputs)
    assert float(expected.std()) > 0.1

    model = from_classifier(str(tmp_path / "theirs"))
    assert torch.allclose(logits(model, inputs), expected, atol=1e-5)
    assert (model.config.depths, model.config.problem_type) == ((4,), "single_label_classification")
    assert tuple(model.config.id2label.values()) == NAMES

    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert isinstance(again, GeepForSequenceClassification)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    tokenizer = make_tokenizer()
    assert fingerprint(again, tokenizer) == fingerprint(model, tokenizer)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_an_engine_answers_with_the_classifiers_logits(family: str, tmp_path: Path) -> None:
    classifier = make_classifier(family)
    classifier.config.problem_type = "multi_label_classification"
    classifier.save_pretrained(tmp_path)
    engine = Engine(from_classifier(str(tmp_path)), make_tokenizer(), config=EngineConfig(device="cpu"))
    assert engine.multi_label
    found = engine.exit_logits(engine.tokenize(random_texts(12, seed=5)).batch)[-1]
    assert torch.allclose(found, logits(classifier, batch()), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("modernbert", {"classifier_pooling": "mean"}),
        ("modernbert", {"classifier_bias": True, "norm_bias": True, "norm_eps": 1e-2}),
        ("modernbert", {"classifier_activation": "relu"}),
        ("deberta-v2", {"pooler_hidden_act": "tanh"}),
        ("deberta-v2", {"pooler_hidden_act": "silu"}),
    ],
)
def test_switches_of_a_classifier_are_kept(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    classifier = make_classifier(family, **changes)
    classifier.save_pretrained(tmp_path / "theirs")
    model = from_classifier(str(tmp_path / "theirs"))
    model.save_pretrained(tmp_path / "ours")
    again = GeepForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert torch.allclose(logits(again, batch()), logits(classifier, batch()), atol=1e-5)


def test_activation_and_norm_are_part_of_what_a_model_is(tmp_path: Path) -> None:
    make_classifier("bert").save_pretrained(tmp_path)
    model, tokenizer = from_classifier(str(tmp_path)), make_tokenizer()
    before = fingerprint(model, tokenizer)
    model.config.teacher_activation = "relu"
    assert fingerprint(model, tokenizer) != before


def test_a_switch_that_nobody_knows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_classifier("electra").save_pretrained(tmp_path)
    monkeypatch.setitem(CLASSIFIERS, "electra", CLASSIFIERS["roberta"])  # tanh in the place of gelu
    with pytest.raises(ValueError, match="does not answer as Hugging Face's ElectraForSequenceClassification does"):
        from_classifier(str(tmp_path))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "score"}, "label2id": {"score": 0}}, "gives 1 score and no labels .regression."),
        ({"problem_type": "regression"}, "gives 3 scores and no labels"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, r"several labels the name \['a'\]"),
        ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "number the labels from 0"),
        ({"auto_map": {"AutoModelForSequenceClassification": "own.Own"}}, "brings code of its own"),
        ({"model_type": "gpt_neo"}, "holds a 'gpt_neo' model, expected a sequence classifier of one of .*'bert'"),
        ({"model_type": "geep"}, "is a geep model already"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, "other shapes than its config.json says"),
        ({"architectures": ["BertForNextSentencePrediction"]}, "holds a BertForNextSentencePrediction, expected"),
    ],
)
def test_what_is_no_classifier_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_classifier("bert").save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        from_classifier(str(tmp_path))


def test_models_for_other_tasks_are_refused(tmp_path: Path) -> None:
    tiny_encoder("bert").save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="holds a BertModel, expected a sequence classifier.*`geep train DATA -m"):
        from_classifier(str(tmp_path / "encoder"))
    # Nothing says what it is: its weights do.
    change_config(tmp_path / "encoder", architectures=None)
    with pytest.raises(ValueError, match="lacks .* weights of a BertForSequenceClassification, such as"):
        from_classifier(str(tmp_path / "encoder"))
    for number, kind in enumerate((AutoModelForMaskedLM, AutoModelForTokenClassification)):
        kind.from_config(tiny_encoder("modernbert").config).save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match=r"holds a ModernBertFor\w+, expected a sequence classifier"):
            from_classifier(str(tmp_path / str(number)))
    generative = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=len(VOCAB), n_embd=16, n_layer=1, n_head=2, num_labels=3)
    )
    generative.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="holds a 'gpt2' model"):
        from_classifier(str(tmp_path / "gpt2"))


def test_weights_that_are_damaged_or_missing_are_refused(tmp_path: Path) -> None:
    make_classifier("distilbert").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: each for name, each in weights.items() if "pre_classifier" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 2 weights of a DistilBertForSequenceClassification, such as 'pre_cl"):
        from_classifier(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match="are damaged"):
        from_classifier(str(tmp_path))


def test_a_head_that_does_not_pool_has_no_activation_of_its_own() -> None:
    fields = {"encoder_config": tiny_encoder("bert").config, "exit_layers": [1]}
    config = GeepForSequenceClassification.config_class
    with pytest.raises(ValueError, match="found teacher_head 'attention'"):
        config(**fields, teacher_head="attention", teacher_activation="relu")
    with pytest.raises(ValueError, match="Unknown teacher_activation 'none'"):
        config(**fields, teacher_activation="none")
