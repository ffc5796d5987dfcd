"""The model: an encoder of `FAMILIES` with an exit classifier at inner layers and a teacher at the end.

The model keeps no run-time state: what a call needs is an argument, what it learns is returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.utils.generic import ModelOutput

from geep.modeling.custom_code import refused_custom_code
from geep.modeling.families import ProblemType, family_of, layer_calls
from geep.modeling.gradients import scaled_gradient
from geep.modeling.heads import HEADS, PooledHead
from geep.modeling.inputs import first_lengths
from geep.modeling.loading import check_shapes, hub_keywords


@strict
class GeepConfig(PreTrainedConfig):
    """Configuration of `GeepForSequenceClassification`; the encoder's own config lies inside.

    Attributes:
        encoder_config: The encoder's Hugging Face config.
        exit_layers: Layers after which an exit classifier sits, ascending, each in 1 … num_hidden_layers - 1.
            None: 1 … num_hidden_layers - 2 (method of the paper; the last but one saves too little).
        exit_head: Row of `HEADS`, used by the exits.
        teacher_head: Row of `HEADS`, used by the teacher. None: that of the exits.
        teacher_activation: Hugging Face's name of what stands between the teacher's two linear layers; exits have tanh.
        teacher_norm_eps: Epsilon of a norm behind it. None: no norm.
        exit_hidden_size: Width of the `attention` head (FastBERT's 128).
        classifier_dropout: Dropout inside the heads while training.
        initializer_range: Standard deviation of the heads' initial weights.
        text_pairs: Whether the model has learned pairs of texts, or single ones; the other kind is then refused where
            it is used. None: not known.
        separator_id: Token id that ends the first text of a pair, for heads that tell the two apart. None: texts are
            single, or are read as if they were.
    """

    model_type = "geep"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}

    encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    exit_layers: list[int] | tuple[int, ...] | None = None
    exit_head: str = "mean"
    teacher_head: str | None = None
    teacher_activation: str = "tanh"
    teacher_norm_eps: float | None = None
    exit_hidden_size: int = 128
    classifier_dropout: float | int = 0.1
    initializer_range: float = 0.02
    text_pairs: bool | None = None
    separator_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.encoder_config is None:
            self.encoder_config = AutoConfig.for_model("bert")
        if isinstance(self.encoder_config, dict):
            fields = dict(self.encoder_config)
            self.encoder_config = AutoConfig.for_model(fields.pop("model_type", "bert"), **fields)
        family_of(self.encoder_config)
        num_layers = self.encoder_config.num_hidden_layers
        if self.exit_layers is None:
            self.exit_layers = list(range(1, num_layers - 1))
        layers = list(self.exit_layers)
        if layers != sorted(set(layers)) or any(not 1 <= layer < num_layers for layer in layers):
            raise ValueError(
                f"exit_layers must ascend within 1..{num_layers - 1} (the teacher sits at {num_layers}), got {layers}."
            )
        self.exit_layers = layers
        for name in ("exit_head", "teacher_head"):
            kind = getattr(self, name)
            if kind not in HEADS and not (kind is None and name == "teacher_head"):
                raise ValueError(f"Unknown {name} {kind!r}; known: {sorted(HEADS)}.")
        if self.teacher_activation not in ACT2FN:
            raise ValueError(f"Unknown teacher_activation {self.teacher_activation!r}; known: {sorted(ACT2FN)}.")
        is_usual = (self.teacher_activation, self.teacher_norm_eps) == ("tanh", None)
        if not is_usual and not issubclass(HEADS[self.teacher_head or self.exit_head], PooledHead):
            raise ValueError(
                f"teacher_activation={self.teacher_activation!r} and teacher_norm_eps={self.teacher_norm_eps} are for "
                f"heads that pool, found teacher_head {self.teacher_head or self.exit_head!r}; leave them out."
            )
        if self.text_pairs not in (None, True, False):
            raise ValueError(f"text_pairs is {self.text_pairs!r}, expected true, false or null.")
        _check_labels(self.id2label, kwargs.get("num_labels"))
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def num_hidden_layers(self) -> int:
        """Encoder layers of the full model."""
        return int(self.encoder_config.num_hidden_layers)  # type: ignore[union-attr]

    @property
    def hidden_size(self) -> int:
        """Width of the encoder's hidden states."""
        return int(self.encoder_config.hidden_size)  # type: ignore[union-attr]

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers at which an answer can be had: every exit layer, then the full model."""
        return (*self.exit_layers, self.num_hidden_layers)  # type: ignore[misc]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the encoder's config, where Hugging Face looks for vocabulary and position limits."""
        return self.encoder_config  # type: ignore[return-value]


def _check_labels(names: Any, num_labels: int | None) -> None:
    """Refuse names of labels of which Hugging Face would make others, or none."""
    if names is None:
        return  # LABEL_0, LABEL_1, …
    if not isinstance(names, dict) or not names or not all(str(label).isdigit() for label in names):
        raise ValueError(f"id2label is {names!r}, expected names by number: 0, 1, …; number the labels from 0.")
    if num_labels is not None and num_labels != len(names):
        raise ValueError(f"num_labels={num_labels}, but id2label names {len(names)} labels; leave num_labels out.")


@dataclass
class ExitOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: Loss of `logits` against the labels, if labels were given.
        logits: Logits of the full model (or of the asked exit), shape (batch, num_labels): where Hugging Face's
            pipeline and Trainer look for them.
        exit_logits: Logits of every exit, then of the full model, shape (num_exits + 1, batch, num_labels).
        shared_exit_logits: Teacher logits of every sub-network "layers 1 … k, last layer, teacher", then of the full
            model, shape (num_exits + 1, batch, num_labels); the training signal of the paper.
        hidden_states: Output of the embeddings and of every layer run, each (batch, seq_len, hidden).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: Tensor | None = None
    shared_exit_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class GeepForSequenceClassification(PreTrainedModel):
    """An encoder with an exit classifier after inner layers and a teacher classifier at the end.

    Exit k reads the output of layer k. Running to exit k runs layers 1 … k and that one classifier.
    """

    config_class = GeepConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: GeepConfig) -> None:
        super().__init__(config)
        family = family_of(config.encoder_config)  # type: ignore[arg-type]
        self.encoder = AutoModel.from_config(config.encoder_config, **(family.init_kwargs or {}))
        head = HEADS[config.exit_head]
        self.exits = nn.ModuleList(head(config) for _ in config.exit_layers)  # type: ignore[union-attr]
        self.teacher = _teacher(config)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_encoder(
        cls,
        encoder: str | PreTrainedModel,
        *,
        num_labels: int | None = None,
        label_names: Sequence[str] | None = None,
        exit_layers: Sequence[int] | None = None,
        exit_head: str = "mean",
        separator_id: int | None = None,
        problem_type: ProblemType = "single_label_classification",
        num_layers: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
    ) -> GeepForSequenceClassification:
        """Put fresh exits on a pretrained encoder.

        Args:
            encoder: Model id or folder of a plain encoder, or an encoder in memory (taken over, not copied).
            num_labels: Number of labels; may be left out where `label_names` are given.
            label_names: Names of the labels, in the order of the label ids.
            exit_layers: See `GeepConfig`.
            exit_head: See `GeepConfig`.
            separator_id: See `GeepConfig`.
            problem_type: "single_label_classification" or "multi_label_classification".
            num_layers: Take the first so many layers of a folder's or the hub's encoder; None: all.
            revision: Branch, tag or commit of an encoder from the hub. None: the default branch.
            token: Access token of the hub, or True for the stored one.
            cache_dir: Folder for what is fetched from the hub. None: the hub's own.
            local_files_only: Whether to use what was fetched before and ask no network.

        Raises:
            ValueError: If the checkpoint lacks weights of the encoder, or needs code of its own; or neither
                `num_labels` nor `label_names` is given, or they disagree, or there are fewer than two labels to choose
                from, or the encoder has fewer layers than are asked for.
        """
        if label_names is None and num_labels is None:
            raise ValueError("from_encoder needs num_labels= or label_names= for the new classifiers, got neither.")
        names = list(label_names) if label_names is not None else [f"LABEL_{i}" for i in range(num_labels or 0)]
        if num_labels is not None and num_labels != len(names):
            raise ValueError(f"num_labels={num_labels} but {len(names)} label_names given; pass one of them.")
        if len(names) < (1 if problem_type == "multi_label_classification" else 2):
            raise ValueError(f"A classifier needs at least two labels, got {names}.")
        if isinstance(encoder, str):
            hub = hub_keywords(revision, token, cache_dir, local_files_only)
            with refused_custom_code(encoder):
                encoder_config = AutoConfig.from_pretrained(encoder, **hub)
            family = family_of(encoder_config)
            if num_layers is not None:
                _cut(encoder_config, num_layers)
            pretrained, info = AutoModel.from_pretrained(
                encoder,
                config=encoder_config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, in one message
                **hub,
                **(family.init_kwargs or {}),
            )
            check_shapes(encoder, info["mismatched_keys"])
            # Heads of other tasks may be left over; a weight that is missing would be random.
            missing = sorted(info["missing_keys"])
            if missing:
                raise ValueError(
                    f"{encoder} lacks {len(missing)} weights of a {pretrained.config.model_type} encoder, such as "
                    f"{missing[0]!r}, and has {len(info['unexpected_keys'])} that the encoder has no place for"
                    f"{_such_as(info['unexpected_keys'])}. Expected a checkpoint whose names are Hugging Face's own; "
                    "nothing is trained on random weights."
                )
        else:
            if num_layers is not None:
                raise ValueError(
                    "num_layers= cuts encoders of a folder or the hub, found one in memory; cut it before."
                )
            family = family_of(encoder.config)
            pretrained = encoder
        config = GeepConfig(
            encoder_config=pretrained.config,
            exit_layers=None if exit_layers is None else list(exit_layers),
            exit_head=exit_head,
            separator_id=separator_id,
            problem_type=problem_type,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
        model = cls(config)
        if getattr(pretrained, "pooler", None) is not None and not (family.init_kwargs or {}).get(
            "add_pooling_layer", True
        ):
            pretrained.pooler = None  # not used by the heads, and not there when the model is loaded again
        model.encoder = pretrained
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a finished geep model; a plain encoder is refused with the call that was probably meant.

        Raises:
            ValueError: If the folder holds another kind of model.
        """
        if pretrained_model_name_or_path is not None and "config" not in kwargs:
            where = {name: kwargs[name] for name in ("revision", "token", "subfolder", "cache_dir") if name in kwargs}
            found = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **where)[0].get("model_type")
            if found != GeepConfig.model_type:
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds a {found!r} model, expected {GeepConfig.model_type!r}. "
                    "For a plain encoder write GeepForSequenceClassification.from_encoder(path, num_labels=…)."
                )
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's token embeddings."""
        return self.encoder.get_input_embeddings()

    def finish(self, hidden: Tensor) -> Tensor:
        """Apply the norm that the encoder has after its last layer, if any; every head reads through it."""
        norm = family_of(self.encoder.config).final_norm
        return self.encoder.get_submodule(norm)(hidden) if norm else hidden

    def head_at(self, layer: int) -> nn.Module:
        """Return the classifier that answers after `layer` layers.

        Raises:
            ValueError: If no classifier sits there.
        """
        depths = self.config.depths
        if layer not in depths:
            raise ValueError(f"No exit at layer {layer}; exits and the full model are at {list(depths)}.")
        return self.teacher if layer == depths[-1] else self.exits[depths.index(layer)]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        exit_layer: int | None = None,
        output_exits: bool = False,
        output_shared_exits: bool = False,
        gradient_equilibrium: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ExitOutput | tuple[Any, ...]:
        """Run the model, once through each layer it needs.

        Args:
            input_ids: Token ids, (batch, seq_len).
            attention_mask: 1 for tokens, 0 for padding, (batch, seq_len). None: no padding.
            token_type_ids: Segment ids, (batch, seq_len); ignored by encoders that have none.
            labels: Label ids (batch,), or 0/1 floats (batch, num_labels) for multi-label.
            exit_layer: Stop after this layer and let its exit answer. None: the full model.
            output_exits: Also run the exits on the way: `exit_logits`.
            output_shared_exits: Also run last layer and teacher on every exit's hidden state: `shared_exit_logits`.
                Each prefix is computed once, so a step is num_hidden_layers + num_exits layer passes (method.md).
            gradient_equilibrium: A layer gets the mean of the gradients of the classifiers behind it, in the place of
                their sum; a classifier all of its own (Li et al., ICCV 2019). The outputs stay as they are. Changes
                nothing without `output_exits`.
            output_hidden_states: Return the hidden states of all layers run.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: If `exit_layer` has no exit, or the shared exit is asked of a truncated run, or together with
                gradient equilibrium.
        """
        config = self.config
        stop = config.num_hidden_layers if exit_layer is None else exit_layer
        last_head = self.head_at(stop)
        if output_shared_exits and stop != config.num_hidden_layers:
            raise ValueError(f"The shared exit needs the whole encoder, got exit_layer={exit_layer}; leave it out.")
        if output_shared_exits and gradient_equilibrium:
            raise ValueError("gradient_equilibrium balances exits, found shared exits asked for too; leave one out.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        separator = config.separator_id
        firsts = None if separator is None else first_lengths(input_ids, attention_mask, separator)
        inputs = self.encoder_inputs(input_ids, attention_mask, token_type_ids)
        if not (output_exits or output_shared_exits or output_hidden_states or stop < config.num_hidden_layers):
            # The full model alone needs no look inside: the encoder runs as Hugging Face runs it.
            last = self.encoder(**{name: value for name, value in inputs.items() if value is not None})[0]
            logits = self.teacher(last, attention_mask, firsts)
            loss = None if labels is None else label_loss(logits, labels, config.problem_type)
            output = ExitOutput(loss=loss, logits=logits)
            return output.to_tuple() if return_dict is False else output
        calls = layer_calls(self.encoder, inputs)

        hidden = calls.embedding_output
        hidden_states = [hidden]
        exits: list[Tensor] = []
        shared: list[Tensor] = []
        behind = 1 + sum(layer < stop for layer in config.exit_layers)  # classifiers that the next exit's state feeds
        for layer, call in enumerate(calls.layers[:stop], start=1):
            hidden = call(hidden)
            hidden_states.append(hidden)
            if layer < stop and layer in config.exit_layers:
                if output_exits:
                    if gradient_equilibrium:
                        hidden = scaled_gradient(hidden, 1 / behind)
                    exits.append(self.head_at(layer)(self.finish(hidden), attention_mask, firsts))
                    behind -= 1
                    if gradient_equilibrium:
                        hidden = scaled_gradient(hidden, behind)
                if output_shared_exits:
                    shared.append(self.teacher(self.finish(calls.layers[-1](hidden)), attention_mask, firsts))
        logits = last_head(self.finish(hidden), attention_mask, firsts)

        output = ExitOutput(
            loss=None if labels is None else label_loss(logits, labels, config.problem_type),
            logits=logits,
            exit_logits=torch.stack([*exits, logits]) if output_exits else None,
            shared_exit_logits=torch.stack([*shared, logits]) if output_shared_exits else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def encoder_inputs(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Name the encoder's inputs; segment ids are left out where the family has none."""
        has_types = family_of(self.encoder.config).has_token_type_ids
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids if has_types else None,
        }


def _cut(encoder_config: PreTrainedConfig, num_layers: int) -> None:
    """Make a configuration one of the encoder's first layers alone."""
    if not 1 <= num_layers <= encoder_config.num_hidden_layers:
        raise ValueError(
            f"The first {num_layers} layers are asked for, the encoder has {encoder_config.num_hidden_layers}; "
            "expected at least one and at most all."
        )
    encoder_config.num_hidden_layers = num_layers
    if getattr(encoder_config, "layer_types", None):
        encoder_config.layer_types = encoder_config.layer_types[:num_layers]


def _teacher(config: GeepConfig) -> nn.Module:
    kind = HEADS[config.teacher_head or config.exit_head]
    if issubclass(kind, PooledHead):
        return kind(config, activation=config.teacher_activation, norm_eps=config.teacher_norm_eps)
    return kind(config)


def _such_as(names: Iterable[str]) -> str:
    return next((f", such as {name!r}" for name in sorted(names)), "")


def label_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Cross-entropy of logits (batch, num_labels), or binary cross-entropy where several labels may hold at once."""
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


# The one thing that happens at import: Hugging Face's auto classes learn the name, so that
# AutoModelForSequenceClassification.from_pretrained finds a geep folder after `import geep.modeling`.
AutoConfig.register(GeepConfig.model_type, GeepConfig, exist_ok=True)
AutoModelForSequenceClassification.register(GeepConfig, GeepForSequenceClassification, exist_ok=True)
