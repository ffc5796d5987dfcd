"""What packing gains each family whose layer is not BERT's: packed against padded, at full depth, on mixed lengths.

Measured: encoders of the real shapes, random weights and a small vocabulary, cut to their first layers, since every
layer takes as long as the next; texts of random tokens whose lengths are lognormal, from 8 to 256 tokens. Both backends
run what the engine gives them: texts sorted by length, in batches of as many tokens as the engine takes. Beside them
the same model as Hugging Face's pipeline runs it: batches of 32 in the order in which texts come. Rounds are
interleaved; medians are kept. Beside the times stands how far the logits of both backends are apart.

Not measured: accuracy, exits, GPUs.

    OMP_NUM_THREADS=2 python benchmarks/families.py

appends to benchmarks/results/families.jsonl what is not there yet.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scaling import CASE_TOKENS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from geep.backends import TokenBatch
from geep.backends.onednn import multiplies_bfloat16
from geep.engine import Engine, EngineConfig, ExitSettings
from geep.evaluation import machine
from geep.modeling import FAMILIES, GeepForSequenceClassification

RESULTS = Path(__file__).resolve().parent / "results"
VOCABULARY, PAD = 4000, 1
SHORTEST, LONGEST = 8, 256


@dataclass(frozen=True, slots=True)
class Shape:
    """An encoder's shape.

    Attributes:
        family: Row of `FAMILIES`.
        layers: Layers that are measured; of ModernBERT twice the pattern of one global and two local ones.
        config: What its config has otherwise than the family's default.
    """

    family: str
    layers: int
    config: Mapping[str, Any]


_BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_DEBERTA_V3 = {
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
SHAPES = {
    "bert-base": Shape("bert", 4, _BASE),
    "mpnet-base": Shape("mpnet", 4, _BASE),
    "albert-base-v2": Shape("albert", 4, _BASE),
    "deberta-v3-small, -base": Shape("deberta-v2", 4, _BASE | _DEBERTA_V3),
    "ModernBERT-base": Shape("modernbert", 6, {}),
}


def main(argv: list[str] | None = None) -> None:
    """Measure what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=CASE_TOKENS // 2, help="of all texts together, at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    path = args.results / "families.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = {(line["model"], line["dtype"]) for line in map(json.loads, lines)}
    batch = mixed_lengths(args.tokens)
    for name in args.only:
        for dtype in ("float32", "bfloat16") if multiplies_bfloat16() else ("float32",):
            if (name, dtype) in done:
                continue
            line = {"kind": "families", "model": name, **compare(SHAPES[name], dtype, batch, args.rounds)}
            print(json.dumps(line), flush=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def mixed_lengths(tokens: int) -> TokenBatch:
    """Texts of random tokens; half of them have up to 40, the longest 256."""
    random = np.random.default_rng(0)
    lengths = np.clip(np.rint(random.lognormal(np.log(40), 0.8, tokens)), SHORTEST, LONGEST).astype(np.int64)
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(), tokens)) + 1]
    return TokenBatch(random.integers(5, VOCABULARY, int(lengths.sum())), None, lengths)


def compare(shape: Shape, dtype: str, batch: TokenBatch, rounds: int) -> dict[str, Any]:
    """Time both backends, one after the other in every round, after a round that is not counted."""
    model = random_model(shape)
    engines = {name: engine_of(model, name, dtype) for name in ("packed", "padded")}
    ways: dict[str, Callable[[], torch.Tensor]] = {
        name: lambda engine=engine: engine.run_tokens(batch, settings=ExitSettings()).logits
        for name, engine in engines.items()
    }
    ways["pipeline"] = lambda: as_they_come(engines["padded"].model, batch)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    logits = {}
    for number in range(rounds + 1):
        for name, run in ways.items():
            begin = time.perf_counter()
            logits[name] = run()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    packed, padded, pipeline = (float(np.median(seconds[name])) for name in ways)
    return {
        "dtype": dtype,
        "layers": shape.layers,
        "texts": len(batch),
        "tokens": len(batch.input_ids),
        "packed_seconds": packed,
        "padded_seconds": padded,
        "pipeline_seconds": pipeline,
        "gain": padded / packed,
        "gain_of_rounds": [b / a for a, b in zip(seconds["packed"], seconds["padded"], strict=True)],
        "apart": float((logits["packed"] - logits["padded"]).abs().max() / logits["padded"].abs().max()),
        "machine": machine(engines["packed"]),
    }


@torch.inference_mode()
def as_they_come(model: GeepForSequenceClassification, batch: TokenBatch, batch_size: int = 32) -> torch.Tensor:
    """Logits of the full model on texts in their order, padded to the longest of each batch."""
    texts = torch.from_numpy(batch.input_ids).split(batch.lengths.tolist())
    found = []
    for first in range(0, len(texts), batch_size):
        ids = pad_sequence(list(texts[first : first + batch_size]), batch_first=True, padding_value=PAD)
        lengths = torch.from_numpy(batch.lengths[first : first + batch_size])
        found.append(model(ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()).logits)
    return torch.cat(found)


def random_model(shape: Shape) -> GeepForSequenceClassification:
    """An encoder of random weights with one exit, halfway."""
    torch.manual_seed(0)
    ids = {"pad_token_id": PAD, "bos_token_id": 0, "cls_token_id": 0, "eos_token_id": 2, "sep_token_id": 2}
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": shape.layers}
    config = AutoConfig.for_model(shape.family, **(sizes | ids | dict(shape.config)))
    encoder = AutoModel.from_config(config, **(FAMILIES[shape.family].init_kwargs or {}))
    return GeepForSequenceClassification.from_encoder(encoder, num_labels=2, exit_layers=[shape.layers // 2])


def engine_of(model: GeepForSequenceClassification, backend: str, dtype: str) -> Engine:
    """An engine on a copy of the model; its tokenizer is there for form's sake."""
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": PAD}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    config = EngineConfig(device="cpu", backend=backend, dtype=dtype, max_length=LONGEST)
    return Engine(copy.deepcopy(model), tokenizer, config=config)


if __name__ == "__main__":
    main()
