"""How the layer of each family is built, and where it keeps its weights: one row a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Form:
    """How a family's layer is built, and where it keeps its parts.

    Attributes:
        parts: Dotted paths from the layer to its modules: query, key and value, or one for all ("qkv"); out,
            attention_norm, up, down, output_norm.
        activation: The config's name for the activation.
        norm_first: Whether parts read normalised hidden states and add to what they read (ModernBERT), instead of the
            sum being normalised.
        is_gated: Whether the upper half of what `up` gives multiplies the lower, activated half.
        inner: Where one step of the encoder's loop keeps several layers (ALBERT).
    """

    parts: Mapping[str, str]
    activation: str = "hidden_act"
    norm_first: bool = False
    is_gated: bool = False
    inner: str | None = None


def _bert_like(query: str, key: str, value: str, out: str, norm: str) -> Mapping[str, str]:
    attention = {"query": query, "key": key, "value": value, "out": out, "attention_norm": norm}
    return attention | {"up": "intermediate.dense", "down": "output.dense", "output_norm": "output.LayerNorm"}


_BERT = Form(
    _bert_like(
        *("attention.self.query", "attention.self.key", "attention.self.value"),
        *("attention.output.dense", "attention.output.LayerNorm"),
    )
)
FORMS: Mapping[str, Form] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": Form(
        {
            "query": "attention.q_lin",
            "key": "attention.k_lin",
            "value": "attention.v_lin",
            "out": "attention.out_lin",
            "attention_norm": "sa_layer_norm",
            "up": "ffn.lin1",
            "down": "ffn.lin2",
            "output_norm": "output_layer_norm",
        },
        activation="activation",
    ),
    "mpnet": Form(
        _bert_like(
            "attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o", "attention.LayerNorm"
        )
    ),
    "albert": Form(
        {
            "query": "attention.query",
            "key": "attention.key",
            "value": "attention.value",
            "out": "attention.dense",
            "attention_norm": "attention.LayerNorm",
            "up": "ffn",
            "down": "ffn_output",
            "output_norm": "full_layer_layer_norm",
        },
        inner="albert_layers",
    ),
    "deberta-v2": Form(
        _bert_like(
            *("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
            *("attention.output.dense", "attention.output.LayerNorm"),
        )
    ),
    "modernbert": Form(
        {
            "qkv": "attn.Wqkv",
            "out": "attn.Wo",
            "attention_norm": "attn_norm",
            "up": "mlp.Wi",
            "down": "mlp.Wo",
            "output_norm": "mlp_norm",
        },
        activation="hidden_activation",
        norm_first=True,
        is_gated=True,
    ),
}
