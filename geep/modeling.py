"""The model: any BERT-class encoder of Hugging Face, with an exit classifier at inner layers and a teacher at the end.

Read in this order: `FAMILIES` (what differs between encoders), `layer_calls` (an encoder taken apart into its layers),
the heads, `GeepForSequenceClassification`.

The module knows nothing of texts, thresholds, tables or batches, and the model keeps no run-time state: what a call
needs is an argument, what it learns is returned.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Literal

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
from transformers.utils.generic import ModelOutput

# --------------------------------------------------------------------------------------------------------------------
# Encoder families
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Family:
    """What geep has to know of an encoder family of Hugging Face; everything else is the encoder's own code.

    Attributes:
        layers: Dotted path from the encoder to the modules that its layer loop calls.
        row_arguments: Arguments of a layer whose first axis is the batch; cut with it when only some rows go on.
        output: Length of the tuple that a layer returns, hidden state first; 0: the hidden state alone.
        final_norm: Dotted path of a norm applied after the last layer; exits read through it too.
        init_kwargs: Extra arguments for building the encoder (pooling layers are not used).
        has_token_type_ids: Whether the encoder takes `token_type_ids`.
        packed: Whether the layer is the plain post-norm BERT layer that the packed backend implements.
        positions_after_pad: Whether position ids start at `pad_token_id + 1` (RoBERTa) instead of 0.
    """

    layers: str
    row_arguments: tuple[str, ...] = ("attention_mask",)
    output: int = 0
    final_norm: str | None = None
    init_kwargs: Mapping[str, Any] | None = None
    has_token_type_ids: bool = True
    packed: bool = False
    positions_after_pad: bool = False


ProblemType = Literal["single_label_classification", "multi_label_classification"]

_NO_POOLER: Mapping[str, Any] = {"add_pooling_layer": False}

FAMILIES: dict[str, Family] = {
    "bert": Family("encoder.layer", init_kwargs=_NO_POOLER, packed=True),
    "roberta": Family("encoder.layer", init_kwargs=_NO_POOLER, packed=True, positions_after_pad=True),
    "xlm-roberta": Family("encoder.layer", init_kwargs=_NO_POOLER, packed=True, positions_after_pad=True),
    "electra": Family("encoder.layer", packed=True),
    "distilbert": Family("transformer.layer", has_token_type_ids=False, packed=True),
    "mpnet": Family(
        "encoder.layer",
        row_arguments=("attention_mask", "position_bias"),
        output=1,
        init_kwargs=_NO_POOLER,
        has_token_type_ids=False,
        positions_after_pad=True,
    ),
    "albert": Family("encoder.albert_layer_groups", init_kwargs=_NO_POOLER),
    "deberta-v2": Family("encoder.layer", output=2),
    "modernbert": Family("layers", final_norm="final_norm", has_token_type_ids=False),
}


def family_of(encoder_config: PreTrainedConfig) -> Family:
    """Return the family row of an encoder config.

    Raises:
        ValueError: If the family is not in `FAMILIES`, or the encoder mixes a convolution into its layers.
    """
    model_type = encoder_config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"Unsupported encoder {model_type!r}; supported: {sorted(FAMILIES)}.")
    if getattr(encoder_config, "conv_kernel_size", 0):
        raise ValueError(
            f"Encoder {model_type!r} has conv_kernel_size={encoder_config.conv_kernel_size}: a convolution beside its "
            "first layer, which exits cannot see. Use a checkpoint without it (DeBERTa-v3 has none)."
        )
    return FAMILIES[model_type]


# --------------------------------------------------------------------------------------------------------------------
# An encoder, taken apart into its layers
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One step of an encoder's layer loop: the module and the arguments Hugging Face gives it beside the hidden state.

    The arguments do not depend on the hidden state (masks, position biases), so the layer may be run on any of them:
    on the output of the layer before it, or, for the shared exit, on the output of any layer.
    """

    module: nn.Module
    arguments: Mapping[str, Any]
    row_arguments: tuple[str, ...]
    returns_tuple: bool

    def __call__(self, hidden: Tensor) -> Tensor:
        """Run the layer on `hidden` (rows, seq_len, hidden), whose rows are a prefix of the batch; same shape out."""
        out = self.module(hidden, **self._for_rows(hidden.shape[0]))
        return out[0] if self.returns_tuple or isinstance(out, tuple) else out

    def select(self, rows: Tensor, gathered: dict[int, Tensor]) -> LayerCall:
        """Keep some rows of the batch; arguments that several layers share are gathered once, into `gathered`."""
        taken = {}
        for name in self.row_arguments:
            value = self.arguments.get(name)
            if isinstance(value, Tensor):
                if id(value) not in gathered:
                    gathered[id(value)] = value.index_select(0, rows) if value.shape[0] > 1 else value
                taken[name] = gathered[id(value)]
        return replace(self, arguments={**self.arguments, **taken})

    def _for_rows(self, rows: int) -> Mapping[str, Any]:
        """Cut the row-indexed arguments to the first `rows` rows; views, no copies."""
        cut = {}
        for name in self.row_arguments:
            value = self.arguments.get(name)
            if isinstance(value, Tensor) and value.shape[0] > max(rows, 1):
                cut[name] = value[:rows]
        return {**self.arguments, **cut} if cut else self.arguments


@dataclass(frozen=True, slots=True)
class LayerCalls:
    """An encoder's work on one padded batch: embedding output (batch, seq_len, hidden) and the layers still to run."""

    embedding_output: Tensor
    layers: tuple[LayerCall, ...]


class _Recorder(nn.Module):
    """Stands in for a layer: notes how it is called and hands the hidden state through unchanged."""

    def __init__(self, module: nn.Module, calls: list[tuple[nn.Module, Tensor, dict[str, Any]]], output: int) -> None:
        super().__init__()
        # Kept out of nn.Module's registry: the recorder must not own the layer's parameters.
        object.__setattr__(self, "recorded", module)
        self.calls = calls
        self.output = output

    def __getattr__(self, name: str) -> Any:
        # ModernBERT's loop reads `attention_type` from the layer it is about to call.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["recorded"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = _argument_names(type(self.recorded).forward)
        self.calls.append((self.recorded, hidden, {**dict(zip(names, args, strict=False)), **kwargs}))
        return hidden if self.output == 0 else (hidden,) + (None,) * (self.output - 1)


@cache
def _argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a layer's positional arguments after the hidden state."""
    return tuple(inspect.signature(forward).parameters)[2:]


def _shallow(module: nn.Module) -> nn.Module:
    """Copy a module so that its children can be replaced; parameters and the children themselves are shared."""
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    return view


def layer_calls(encoder: PreTrainedModel, inputs: Mapping[str, Tensor | None]) -> LayerCalls:
    """Run an encoder's embeddings and mask code and return its layer loop, not yet run.

    The encoder's own forward runs once on a shallow view whose layers only note how they are called. So embeddings,
    masks, position biases and the order of the layers (shared ones included) are Hugging Face's own, for every family.
    Running all calls in order gives `hidden_states` of the encoder exactly. The encoder itself is not touched.

    Args:
        encoder: A model of one of `FAMILIES`.
        inputs: `input_ids`, `attention_mask`, `token_type_ids`, each (batch, seq_len) or None.
    """
    family = family_of(encoder.config)
    calls: list[tuple[nn.Module, Tensor, dict[str, Any]]] = []
    *parents, name = family.layers.split(".")
    view = inner = _shallow(encoder)
    for parent in parents:
        child = _shallow(inner._modules[parent])  # type: ignore[arg-type]
        inner._modules[parent] = child
        inner = child
    inner._modules[name] = nn.ModuleList(
        _Recorder(layer, calls, family.output)
        for layer in inner._modules[name]  # type: ignore[union-attr]
    )
    view(**{key: value for key, value in inputs.items() if value is not None})
    return LayerCalls(
        embedding_output=calls[0][1],
        layers=tuple(
            LayerCall(module, arguments, family.row_arguments, family.output > 0) for module, _, arguments in calls
        ),
    )


# --------------------------------------------------------------------------------------------------------------------
# Exit classifiers
# --------------------------------------------------------------------------------------------------------------------


class ClsHead(nn.Module):
    """First token -> linear + tanh -> linear: Hugging Face's pooler and classifier; exit k is then a plain model."""

    # Whether nothing but a text's first token is read: its last layer then needs no other row.
    reads_first_token_only: ClassVar[bool] = True

    def __init__(self, config: GeepConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.dense = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out = nn.Linear(hidden, config.num_labels or 0)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Map padded hidden states (batch, seq_len, hidden) and a 0/1 mask (batch, seq_len) to logits."""
        return self._classify(hidden[:, 0])

    def forward_packed(self, hidden: Tensor, offsets: Tensor, longest: int) -> Tensor:
        """Map packed texts to logits (num_texts, num_labels), without a wait for the device.

        Args:
            hidden: Hidden states of the texts' tokens, one text after another, (num_tokens, hidden).
            offsets: Where each text begins, and the end of the last: from 0 to num_tokens, (num_texts + 1,).
            longest: Tokens of the longest text.
        """
        if not hidden.shape[0]:
            return self._classify(hidden.new_zeros(offsets.shape[0] - 1, hidden.shape[1]))
        first = hidden.index_select(0, offsets[:-1].clamp(max=hidden.shape[0] - 1))
        # A text without tokens has no first one; it must not borrow its neighbour's.
        return self._classify(torch.where((offsets.diff() > 0)[:, None], first, 0.0))

    def _classify(self, pooled: Tensor) -> Tensor:
        return self.out(self.dropout(torch.tanh(self.dense(pooled))))


class MeanHead(ClsHead):
    """Masked mean of the tokens -> the same two linears; for sentence encoders, whose inner [CLS] carries little."""

    reads_first_token_only: ClassVar[bool] = False

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Map padded hidden states (batch, seq_len, hidden) and a 0/1 mask (batch, seq_len) to logits."""
        mask = attention_mask.to(hidden.dtype)
        total = torch.einsum("bth,bt->bh", hidden, mask)
        # Counted as integers: in bfloat16 a sum of ones stops at 256.
        counts = attention_mask.sum(1, keepdim=True).clamp(min=1)
        return self._classify(total / counts.to(hidden.dtype))

    def forward_packed(self, hidden: Tensor, offsets: Tensor, longest: int) -> Tensor:
        """Map packed texts to logits; arguments as `ClsHead.forward_packed`."""
        tokens = torch.arange(hidden.shape[0], dtype=offsets.dtype, device=hidden.device)
        return self._classify(F.embedding_bag(tokens, hidden, offsets[:-1], mode="mean"))


class AttentionHead(nn.Module):
    """FastBERT's classifier (Liu et al., ACL 2020): linear to 128 + tanh, self-attention with two heads over the text's
    own tokens, first token, linear + tanh, linear. Padding is masked; the authors' public GEEP code leaves that out.
    """  # noqa: D205

    num_heads: ClassVar[int] = 2
    reads_first_token_only: ClassVar[bool] = False

    def __init__(self, config: GeepConfig) -> None:
        super().__init__()
        size = config.exit_hidden_size
        self.narrow = nn.Linear(config.hidden_size, size)
        self.query = nn.Linear(size, size)
        self.key_value = nn.Linear(size, 2 * size)
        self.attention_out = nn.Linear(size, size)
        self.dense = nn.Linear(size, size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out = nn.Linear(size, config.num_labels or 0)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Map padded hidden states (batch, seq_len, hidden) and a 0/1 mask (batch, seq_len) to logits."""
        narrow = torch.tanh(self.narrow(hidden))  # (batch, seq_len, size)
        batch, seq_len, size = narrow.shape
        # Only the first token's output is read, so it is the only query.
        query = self.query(narrow[:, :1]).view(batch, 1, self.num_heads, -1).transpose(1, 2)
        key_value = self.key_value(narrow).view(batch, seq_len, 2, self.num_heads, -1)
        key, value = key_value.permute(2, 0, 3, 1, 4)
        keep = attention_mask.bool()[:, None, None, :]
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=keep, dropout_p=dropout)
        first = self.attention_out(mixed.transpose(1, 2).reshape(batch, size))
        return self.out(self.dropout(torch.tanh(self.dense(first))))

    def forward_packed(self, hidden: Tensor, offsets: Tensor, longest: int) -> Tensor:
        """Map packed texts to logits; arguments as `ClsHead.forward_packed`."""
        column = torch.arange(longest, dtype=offsets.dtype, device=hidden.device)
        mask = column < offsets.diff()[:, None]
        # Gathered by position, for a boolean index would wait for the device to count.
        token = (offsets[:-1, None] + column).clamp_(max=max(hidden.shape[0] - 1, 0))
        padded = hidden.index_select(0, token.flatten()).view(*mask.shape, -1)
        return self(torch.where(mask[..., None], padded, 0.0), mask)


def standardise_input(head: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Fold "subtract the mean, divide by the deviation" of a head's input features into its first linear layer.

    Sentence encoders' features share one large direction and vary little around it; a fresh head on them learns for
    hundreds of steps before it tells texts apart. Folding costs nothing at run time and changes no shape
    (data-dependent initialisation, Krähenbühl et al. 2016).

    Args:
        head: A head of `HEADS`; changed in place.
        mean: Mean of the features that its first linear layer reads, (hidden,).
        std: Their standard deviation, positive, (hidden,).
    """
    linear = first_linear(head)
    with torch.no_grad():
        linear.weight.div_(std)
        linear.bias.sub_(linear.weight @ mean)


def first_linear(head: nn.Module) -> nn.Linear:
    """The linear layer through which a head reads the encoder's features."""
    return next(module for module in head.modules() if isinstance(module, nn.Linear))


HEADS: dict[str, type[nn.Module]] = {"attention": AttentionHead, "cls": ClsHead, "mean": MeanHead}


# --------------------------------------------------------------------------------------------------------------------
# Config and model
# --------------------------------------------------------------------------------------------------------------------


@strict
class GeepConfig(PreTrainedConfig):
    """Configuration of `GeepForSequenceClassification`; the encoder's own config lies inside.

    Attributes:
        encoder_config: The encoder's Hugging Face config.
        exit_layers: Layers after which an exit classifier sits, ascending, each in 1 … num_hidden_layers - 1.
            None: 1 … num_hidden_layers - 2 (method of the paper; the last but one saves too little).
        exit_head: Row of `HEADS`, used by exits and teacher alike.
        exit_hidden_size: Width of the `attention` head (FastBERT's 128).
        classifier_dropout: Dropout inside the heads while training.
        initializer_range: Standard deviation of the heads' initial weights.
    """

    model_type = "geep"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}

    encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    exit_layers: list[int] | tuple[int, ...] | None = None
    exit_head: str = "mean"
    exit_hidden_size: int = 128
    classifier_dropout: float | int = 0.1
    initializer_range: float = 0.02

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
        if self.exit_head not in HEADS:
            raise ValueError(f"Unknown exit_head {self.exit_head!r}; known: {sorted(HEADS)}.")
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
        self.teacher = head(config)
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
        problem_type: ProblemType = "single_label_classification",
    ) -> GeepForSequenceClassification:
        """Put fresh exits on a pretrained encoder.

        Args:
            encoder: Model id or folder of a plain encoder, or an encoder in memory (taken over, not copied).
            num_labels: Number of labels; may be left out where `label_names` are given.
            label_names: Names of the labels, in the order of the label ids.
            exit_layers: See `GeepConfig`.
            exit_head: See `GeepConfig`.
            problem_type: "single_label_classification" or "multi_label_classification".

        Raises:
            ValueError: If neither `num_labels` nor `label_names` is given, or they disagree, or there are fewer than
                two labels to choose from.
        """
        if label_names is None and num_labels is None:
            raise ValueError("from_encoder needs num_labels= or label_names= for the new classifiers, got neither.")
        names = list(label_names) if label_names is not None else [f"LABEL_{i}" for i in range(num_labels or 0)]
        if num_labels is not None and num_labels != len(names):
            raise ValueError(f"num_labels={num_labels} but {len(names)} label_names given; pass one of them.")
        if len(names) < (1 if problem_type == "multi_label_classification" else 2):
            raise ValueError(f"A classifier needs at least two labels, got {names}.")
        if isinstance(encoder, str):
            family = family_of(AutoConfig.from_pretrained(encoder))
            pretrained = AutoModel.from_pretrained(encoder, dtype=torch.float32, **(family.init_kwargs or {}))
        else:
            family = family_of(encoder.config)
            pretrained = encoder
        config = GeepConfig(
            encoder_config=pretrained.config,
            exit_layers=None if exit_layers is None else list(exit_layers),
            exit_head=exit_head,
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
            output_hidden_states: Return the hidden states of all layers run.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: If `exit_layer` has no exit, or the shared exit is asked of a truncated run.
        """
        config = self.config
        stop = config.num_hidden_layers if exit_layer is None else exit_layer
        last_head = self.head_at(stop)
        if output_shared_exits and stop != config.num_hidden_layers:
            raise ValueError(f"The shared exit needs the whole encoder, got exit_layer={exit_layer}; leave it out.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = self.encoder_inputs(input_ids, attention_mask, token_type_ids)
        if not (output_exits or output_shared_exits or output_hidden_states or stop < config.num_hidden_layers):
            # The full model alone needs no look inside: the encoder runs as Hugging Face runs it.
            last = self.encoder(**{name: value for name, value in inputs.items() if value is not None})[0]
            logits = self.teacher(last, attention_mask)
            loss = None if labels is None else label_loss(logits, labels, config.problem_type)
            output = ExitOutput(loss=loss, logits=logits)
            return output.to_tuple() if return_dict is False else output
        calls = layer_calls(self.encoder, inputs)

        hidden = calls.embedding_output
        hidden_states = [hidden]
        exits: list[Tensor] = []
        shared: list[Tensor] = []
        for layer, call in enumerate(calls.layers[:stop], start=1):
            hidden = call(hidden)
            hidden_states.append(hidden)
            if layer < stop and layer in config.exit_layers:
                if output_exits:
                    exits.append(self.head_at(layer)(self.finish(hidden), attention_mask))
                if output_shared_exits:
                    shared.append(self.teacher(self.finish(calls.layers[-1](hidden)), attention_mask))
        logits = last_head(self.finish(hidden), attention_mask)

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


def label_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Cross-entropy of logits (batch, num_labels), or binary cross-entropy where several labels may hold at once."""
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


# The one thing that happens at import: Hugging Face's auto classes learn the name, so that
# AutoModelForSequenceClassification.from_pretrained finds a geep folder after `import geep`.
AutoConfig.register(GeepConfig.model_type, GeepConfig, exist_ok=True)
AutoModelForSequenceClassification.register(GeepConfig, GeepForSequenceClassification, exist_ok=True)
