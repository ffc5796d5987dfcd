"""Fine-tuned classifiers of Hugging Face, taken over as they are: encoder, pooler and classifier become the full model.

Read `CLASSIFIERS` (how each family is taken apart), then `from_classifier`. What exits are taught is not known here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from geep.modeling.families import FAMILIES, family_of
from geep.modeling.heads import PooledHead
from geep.modeling.inputs import longest_input, made_up_inputs
from geep.modeling.labels import label_names_of
from geep.modeling.loading import check_shapes, hub_keywords
from geep.modeling.model import GeepConfig, GeepForSequenceClassification


@dataclass(frozen=True, slots=True)
class ClassifierParts:
    """Where a family's classifier has what a head has; all paths are dotted ones from the classifier.

    Attributes:
        dense: First linear layer, on the pooled hidden state; it may have no bias.
        out: Second linear layer, to the logits.
        activation: Hugging Face's name of what stands between them.
        activation_field: Field of the config that names it instead.
        norm: Norm behind the activation; None: there is none.
        pooling_field: Field of the config that says how texts are pooled: "cls" or "mean". None: the first token.
    """

    dense: str
    out: str
    activation: str = "tanh"
    activation_field: str | None = None
    norm: str | None = None
    pooling_field: str | None = None


CLASSIFIERS: dict[str, ClassifierParts] = {
    "bert": ClassifierParts("bert.pooler.dense", "classifier"),
    "roberta": ClassifierParts("classifier.dense", "classifier.out_proj"),
    "xlm-roberta": ClassifierParts("classifier.dense", "classifier.out_proj"),
    "electra": ClassifierParts("classifier.dense", "classifier.out_proj", activation="gelu"),
    "distilbert": ClassifierParts("pre_classifier", "classifier", activation="relu"),
    "mpnet": ClassifierParts("classifier.dense", "classifier.out_proj"),
    "albert": ClassifierParts("albert.pooler", "classifier"),
    "deberta-v2": ClassifierParts("pooler.dense", "classifier", activation_field="pooler_hidden_act"),
    "modernbert": ClassifierParts(
        "head.dense",
        "classifier",
        activation_field="classifier_activation",
        norm="head.norm",
        pooling_field="classifier_pooling",
    ),
}

_KIND = "ForSequenceClassification"

# What rounding may do to logits, as a part of the largest; the weights are the same, so it is little.
_ALLOWED = 1e-4


def classifier_config(
    path: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> PreTrainedConfig:
    """Read the config of a fine-tuned classifier and refuse one that cannot be taken over; no weights are read.

    Args:
        path: Folder or model id.
        revision: Branch, tag or commit of a model of the hub. None: the default branch.
        token: Access token of the hub, or True for the stored one.
        cache_dir: Folder for what is fetched from the hub. None: the hub's own.
        local_files_only: Whether to use what was fetched before and ask no network.

    Raises:
        OSError: If there is no such model.
        ValueError: If it is of no family of `CLASSIFIERS`, runs code of its own, was made for another task, gives one
            score instead of labels, or names labels that cannot be told apart.
    """
    hub = hub_keywords(revision, token, cache_dir, local_files_only)
    raw = PreTrainedConfig.get_config_dict(path, **hub)[0]
    model_type = raw.get("model_type")
    if model_type == GeepConfig.model_type:
        raise ValueError(f"{path} is a geep model already, expected a plain classifier; use it as it is.")
    if model_type not in CLASSIFIERS:
        raise ValueError(
            f"{path} holds a {model_type!r} model, expected a sequence classifier of one of {sorted(CLASSIFIERS)}; "
            "fine-tune one of these."
        )
    if raw.get("auto_map"):
        raise ValueError(
            f"{path} brings code of its own ({sorted(raw['auto_map'])}), which is not run, and without it the model "
            "may answer otherwise. Expected a classifier of Hugging Face's own classes; save it as one."
        )
    made_for = list(raw.get("architectures") or [])
    if made_for and not any(name.endswith(_KIND) for name in made_for):
        raise ValueError(
            f"{path} holds a {made_for[0]}, expected a sequence classifier (…{_KIND}); fine-tune it first, or train it "
            f"with exits: `geep train DATA -m {path}`."
        )
    config = AutoConfig.from_pretrained(path, **hub)
    family_of(config)
    is_single_score = config.num_labels == 1 and config.problem_type != "multi_label_classification"
    if config.problem_type == "regression" or is_single_score:
        raise ValueError(
            f"{path} gives {config.num_labels} score{'s' * (config.num_labels > 1)} and no labels (regression), "
            "expected a classifier of two or more labels, or with problem_type 'multi_label_classification'. Exits "
            "answer with labels; scores cannot be accelerated yet."
        )
    label_names_of(config)
    return config


def from_classifier(
    path: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> GeepForSequenceClassification:
    """Take a fine-tuned classifier over: a model without exits, whose teacher is the classifier's own.

    Its logits are the classifier's: both are run on made-up texts before it is returned.

    Args:
        path: Folder or model id.
        revision: Branch, tag or commit of a model of the hub. None: the default branch.
        token: Access token of the hub, or True for the stored one.
        cache_dir: Folder for what is fetched from the hub. None: the hub's own.
        local_files_only: Whether to use what was fetched before and ask no network.

    Raises:
        OSError: If there is no such model.
        ValueError: As `classifier_config`; or if weights are damaged or missing, or the logits are other ones.
    """
    config = classifier_config(
        path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    classifier = _load(path, hub_keywords(revision, token, cache_dir, local_files_only))
    encoder: Any = classifier.base_model
    given = made_up_inputs(encoder, longest_input(encoder))
    with torch.inference_mode():
        expected = classifier(**given).logits
    model = _taken_apart(path, classifier, config)
    with torch.inference_mode():
        found = model(**given).logits
    difference, allowed = float((found - expected).abs().max()), _ALLOWED * max(1.0, float(expected.abs().max()))
    if difference > allowed:
        raise ValueError(
            f"Taken apart, {path} does not answer as Hugging Face's {type(classifier).__name__} does: on made-up texts "
            f"the logits differ by {difference:.2g}, where rounding explains {allowed:.2g}. Its config has a switch "
            "that is not known here; use the model as it is."
        )
    return model


def _load(path: str, hub: dict[str, Any]) -> PreTrainedModel:
    """Load a classifier in float32, whole or not at all."""
    try:
        classifier, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one message
            **hub,
        )
    except SafetensorError as error:
        raise ValueError(f"The weights of {path} are damaged ({error}); copy or train the model again.") from error
    check_shapes(path, info["mismatched_keys"])
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} weights of a {type(classifier).__name__}, such as {missing[0]!r}, which "
            f"would be random. Expected a fine-tuned classifier; fine-tune it first, or train it with exits: "
            f"`geep train DATA -m {path}`."
        )
    whole: PreTrainedModel = classifier.train(mode=False)
    return whole


def _taken_apart(path: str, classifier: PreTrainedModel, config: PreTrainedConfig) -> GeepForSequenceClassification:
    """A model without exits on the classifier's own encoder, which loses its pooler; its weights are not copied."""
    parts = CLASSIFIERS[config.model_type]
    pooling = "cls" if parts.pooling_field is None else getattr(config, parts.pooling_field)
    if pooling not in ("cls", "mean"):
        raise ValueError(f"{parts.pooling_field} of {path} is {pooling!r}, expected 'cls' or 'mean'.")
    activation = parts.activation if parts.activation_field is None else getattr(config, parts.activation_field)
    dense, out = (classifier.get_submodule(name) for name in (parts.dense, parts.out))
    norm: Any = None if parts.norm is None else classifier.get_submodule(parts.norm)
    encoder: Any = classifier.base_model
    names = label_names_of(config)
    inner = copy.deepcopy(config)
    # Labels belong to the whole; the encoder is the plain one.
    inner.id2label, inner.label2id, inner.problem_type = dict(enumerate(("LABEL_0", "LABEL_1"))), None, None
    model = GeepForSequenceClassification(
        GeepConfig(
            encoder_config=inner,
            exit_layers=[],
            teacher_head=pooling,
            teacher_activation=activation,
            teacher_norm_eps=None if norm is None else norm.eps,
            problem_type=config.problem_type or "single_label_classification",
            id2label=dict(enumerate(names)),
            label2id={name: label for label, name in enumerate(names)},
        )
    )
    teacher: Any = model.teacher
    assert isinstance(teacher, PooledHead)
    for place, found in ((teacher.dense, dense), (teacher.out, out), (teacher.norm, norm)):
        if found is not None:
            _copy(place, found, path)
    if not (FAMILIES[config.model_type].init_kwargs or {}).get("add_pooling_layer", True):
        encoder.pooler = None  # read by the teacher, and not there when the model is loaded again
    model.encoder = encoder
    return model.train(mode=False)


def _copy(place: nn.Module, found: nn.Module, path: str) -> None:
    """Copy weight and bias; a bias that is not there is zero."""
    weight: Any = found.weight
    bias: Any = getattr(found, "bias", None)
    target: Any = place
    if target.weight.shape != weight.shape:
        raise ValueError(
            f"The classifier of {path} has a layer of shape {tuple(weight.shape)}, expected "
            f"{tuple(target.weight.shape)}, the encoder's width; a model with a narrower or wider pooler cannot be "
            "taken over."
        )
    with torch.no_grad():
        target.weight.copy_(weight)
        if bias is None:
            target.bias.zero_()
        else:
            target.bias.copy_(bias)
