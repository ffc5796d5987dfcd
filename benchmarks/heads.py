"""What exits on a frozen encoder can know: heads of several kinds, fitted to the full model's answers.

Measured: for each row of `rows`, at every depth asked for, on held-out texts: accuracy, agreement with the full model,
cross-entropy with its answers; and the mean layers at which texts leave if 99 % are to be answered as by the full
model (one threshold on the confidence, scaled by a temperature for each depth, chosen on one half of the held-out
texts and counted on the other, both ways; no table). Heads that pool are fitted by `geep.distilling.fit_heads`; the
others (FastBERT's attention, a Transformer layer of the exit's own) on the tokens' hidden states, which do not move
either. Not measured: wall-clock, several seeds. Never looks at a test split.

The hidden states of all tokens are computed once (bfloat16) and kept under --work. Stopped, it goes on with the rows
that are missing:

    python benchmarks/heads.py --data-dir DATA --data sst2 --model CLASSIFIER --max-train 8000

appends to benchmarks/results/heads.jsonl. CLASSIFIER is a folder that `geep train --recipe vanilla` made of the same
data with --max-train 8000.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from geep.data import Split, divide, load_dataset, unseen
from geep.distilling import FeatureCache, FitSettings, fit_heads
from geep.engine import Engine
from geep.modeling import HEADS, PooledHead, first_lengths_packed, standardise_input

RESULTS = Path(__file__).parent / "results"

# Texts to a step where tokens are read.
BATCH = 64


@dataclass(frozen=True)
class Tokens:
    """Hidden states of the tokens of some texts at every depth, beside the full model's logits and the labels."""

    hidden: NDArray[np.float16]  # (num_layers, num_tokens, hidden), mapped from disk
    lengths: NDArray[np.int64]
    firsts: NDArray[np.int64]
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, engine: Engine, texts: Split, place: Path) -> Tokens:
        """Run the encoder, unless it was run before."""
        arrays, states = place.with_suffix(".npz"), place.with_suffix(".npy")
        if not arrays.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            batch, last = engine.tokenize(texts.inputs).batch, engine.depths[-1]
            starts = np.concatenate([[0], np.cumsum(batch.lengths)])
            shape = (last, len(batch.input_ids), engine.model.config.hidden_size)
            hidden = np.lib.format.open_memmap(states, mode="w+", dtype=np.float16, shape=shape)
            logits = np.empty((len(texts), len(engine.label_names)), np.float32)

            def note(live: Any, layer: int, rows: NDArray[np.int64]) -> None:
                where = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])
                hidden[layer - 1, where] = live.hidden.float().numpy()
                if layer == last:
                    logits[rows] = engine.deployment.backend.exit_logits(live, layer, 0, len(rows)).float().numpy()

            engine.course.visit(batch, note, range(1, last + 1), what="")
            hidden.flush()
            np.savez(arrays, ids=batch.input_ids, lengths=batch.lengths, logits=logits, labels=texts.labels)
        found = np.load(arrays)
        ids, lengths = (torch.from_numpy(found[name]) for name in ("ids", "lengths"))
        firsts = first_lengths_packed(ids, lengths, engine.tokenizer.sep_token_id).numpy()
        return cls(np.load(states, mmap_mode="r"), found["lengths"], firsts, found["logits"], found["labels"])

    def first(self, count: int) -> Tokens:
        """The first texts."""
        parts = (self.lengths, self.firsts, self.logits, self.labels)
        return Tokens(self.hidden, *(part[:count] for part in parts))

    def features(self, kind: str, depths: tuple[int, ...], config: Any) -> FeatureCache:
        """What a head that pools reads, as `FeatureCache.of` computes it."""
        head: Any = HEADS[kind](config)
        found = np.empty((len(self), len(depths), head.widths * config.hidden_size), np.float16)
        ends = np.cumsum(self.lengths)
        for start in range(0, len(self), 2048):
            stop = min(start + 2048, len(self))
            lengths = self.lengths[start:stop]
            offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
            firsts = torch.from_numpy(self.firsts[start:stop])
            for column, depth in enumerate(depths):
                hidden = torch.from_numpy(
                    self.hidden[depth - 1, ends[start] - lengths[0] : ends[stop - 1]].astype(np.float32)
                )
                features = head.pool_packed(hidden, offsets, int(lengths.max()), firsts)
                found[start:stop, column] = features.numpy()
        return FeatureCache(kind, depths, found, self.logits)

    def batches(self, generator: np.random.Generator | None, depths: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
        """Rows, padded hidden states (num_depths, rows, seq_len, hidden) and masks, of texts about equally long."""
        starts = np.cumsum(self.lengths) - self.lengths
        order = np.arange(len(self)) if generator is None else generator.permutation(len(self))
        for block in np.array_split(order, max(1, len(self) // (20 * BATCH))):
            block = block[np.argsort(self.lengths[block], kind="stable")]
            parts = [block[start : start + BATCH] for start in range(0, len(block), BATCH)]
            for number in range(len(parts)) if generator is None else generator.permutation(len(parts)):
                rows = parts[number]
                column = np.arange(self.lengths[rows].max())
                mask = column < self.lengths[rows][:, None]
                where = (starts[rows][:, None] + column)[mask]
                hidden = np.zeros((len(depths), *mask.shape, self.hidden.shape[2]), np.float32)
                for place, depth in enumerate(depths):
                    hidden[place][mask] = self.hidden[depth - 1, where]
                yield rows, torch.from_numpy(hidden), torch.from_numpy(mask)


class LayerHead(nn.Module):
    """A Transformer layer of the exit's own, a copy of one of the encoder's, and `mean+max` on what it gives."""

    def __init__(self, layer: nn.Module, head: PooledHead) -> None:
        super().__init__()
        self.layer, self.head = copy.deepcopy(layer), head

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """As `PooledHead.forward`."""
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None]
        found = self.layer(hidden, bias)
        found = found[0] if isinstance(found, tuple) else found
        return self.head(found.float(), mask)  # type: ignore[no-any-return]


def losses(found: Tensor, logits: NDArray[np.float32]) -> Tensor:
    """Cross-entropy with the full model's probabilities, by depth."""
    return -(torch.from_numpy(logits).softmax(-1) * F.log_softmax(found, -1)).sum(-1).mean(1)


def by_features(seen: Tokens, held: Tokens, kind: str, depths: tuple[int, ...], config: Any, epochs: int) -> Tensor:
    """Fit heads that pool, and answer the held-out texts: (num_depths, num_texts, num_labels)."""
    cache = held.features(kind, depths, config)
    fitted = fit_heads(
        seen.features(kind, depths, config), cache, config, settings=FitSettings(epochs=epochs, patience=epochs)
    )
    with torch.no_grad():
        each = torch.from_numpy(cache.features).float().transpose(0, 1)
        return torch.stack([head.eval().classify(one) for head, one in zip(fitted.heads, each, strict=True)])


def by_tokens(seen: Tokens, held: Tokens, kind: str, depths: tuple[int, ...], engine: Engine, epochs: int) -> Tensor:
    """Fit heads that read tokens, all depths side by side, and answer the held-out texts."""
    torch.manual_seed(0)
    config, heads = engine.model.config, []
    layers: Any = engine.model.encoder.get_submodule("encoder.layer")
    if kind == "layer":  # each begins as the pooled head of the next depth, and can only become better
        following = tuple(depth + 1 for depth in depths)
        fitted = fit_heads(
            *(part.features("mean+max", following, config) for part in (seen, held)),
            config,
            settings=FitSettings(epochs=epochs + 2),
        )
        heads = [LayerHead(layers[depth], head) for depth, head in zip(depths, fitted.heads, strict=True)]
    else:
        first = seen.first(2048).features("mean", depths, config).features.astype(np.float32)
        for each in torch.from_numpy(first).unbind(1):
            head = HEADS[kind](config)
            standardise_input(head, each.mean(0), each.std(0).clamp(min=0.1 * float(each.std(0).mean())))
            heads.append(head)
    slow = [weight for head in heads if kind == "layer" for weight in head.layer.parameters()]
    fast = [weight for head in heads for weight in (head.head if kind == "layer" else head).parameters()]
    optimiser = torch.optim.AdamW([{"params": slow}, {"params": fast}], weight_decay=0.02)
    steps = epochs * (-(-len(seen) // BATCH) + 20)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [2e-4, 1e-3], total_steps=steps, pct_start=0.1)
    generator, best, kept = np.random.default_rng(0), torch.full((len(depths),), torch.inf), None
    for _ in range(epochs):
        for head in heads:
            head.train()
        for rows, hidden, mask in seen.batches(generator, depths):
            with torch.autocast("cpu", torch.bfloat16):
                found = torch.stack([head(one, mask).float() for head, one in zip(heads, hidden, strict=True)])
            optimiser.zero_grad()
            losses(found, seen.logits[rows]).sum().backward()
            optimiser.step()
            schedule.step()
        answers = torch.empty(len(depths), len(held), config.num_labels)
        with torch.no_grad():
            for rows, hidden, mask in held.batches(None, depths):
                for place, (head, one) in enumerate(zip(heads, hidden, strict=True)):
                    answers[place, rows] = head.eval()(one, mask)
        now = losses(answers, held.logits)
        kept = answers.clone() if kept is None else torch.where((now < best)[:, None, None], answers, kept)
        best = torch.minimum(best, now)
    assert kept is not None
    return kept


def layers_needed(
    found: Tensor, held: Tokens, depths: tuple[int, ...], agreement: float, *, price: int = 0
) -> dict[str, float]:
    """Mean layers, agreement and accuracy if texts leave where they are sure: chosen on one half, counted on the other.

    Args:
        found: Answers of the exits, (num_depths, num_texts, num_labels).
        held: The texts.
        depths: Where the exits sit.
        agreement: What is asked for.
        price: Layers that each look at an exit costs.
    """
    full, labels = torch.from_numpy(held.logits).argmax(-1), torch.from_numpy(held.labels)
    answers = torch.cat([found.argmax(-1), full[None]])
    halves = [torch.arange(len(held)) % 2 == part for part in (0, 1)]
    cost = torch.tensor([*((depth + price * (place + 1)) for place, depth in enumerate(depths)), 0.0])
    cost[-1] = held.hidden.shape[0] + price * len(depths)
    once = torch.tensor([*(depth + price for depth in depths), held.hidden.shape[0]]).float()
    rows = []
    for choose, count in (halves, halves[::-1]):
        scales = torch.logspace(-1, 1, 41)
        sure = []
        for each in found:
            fits = torch.stack([F.cross_entropy(each[choose] / scale, full[choose]) for scale in scales])
            sure.append((each / scales[fits.argmin()]).softmax(-1).amax(-1))
        best: tuple[Tensor, ...] | None = None
        for threshold in np.concatenate([np.linspace(0.4, 0.9, 51), 1 - np.geomspace(0.1, 1e-5, 100)]):
            leaves = torch.cat([torch.stack(sure) >= threshold, torch.ones(1, len(held), dtype=torch.bool)])
            at = leaves.int().argmax(0)
            said = answers.gather(0, at[None])[0]
            agrees = (said == full).float()
            if agrees[choose].mean() >= agreement and (best is None or cost[at][choose].mean() < best[0]):
                columns = (cost[at], once[at], agrees, (said == labels).float())
                best = (cost[at][choose].mean(), *(column[count].mean() for column in columns))
        assert best is not None, "where no text leaves early all agree"
        rows.append([float(value) for value in best[1:]])
    names = ("layers", "layers_if_foretold", "agreement", "accuracy")
    return {name: round(float(value), 4) for name, value in zip(names, np.mean(rows, 0), strict=True)}


def rows_of(pairs: bool, sizes: list[int]) -> list[dict[str, Any]]:
    """What is compared: the head, how many texts it learns from, and how often it sees them."""
    most = sizes[-1]
    kinds = [name for name, head in HEADS.items() if issubclass(head, PooledHead) and (pairs or not head.reads_pairs)]
    rows = [{"head": kind, "texts": most, "epochs": 8} for kind in kinds]
    rows += [{"head": "pair" if pairs else "mean+max", "texts": size, "epochs": 8} for size in sizes[:-1]]
    rows += [{"head": "attention", "texts": most, "epochs": 3}, {"head": "layer", "texts": most, "epochs": 2}]
    return rows


def main() -> None:
    """Fit and measure what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of data set folders")
    parser.add_argument("--data", required=True, help="data set name")
    parser.add_argument("--model", required=True, type=Path, help="folder of a fine-tuned classifier")
    parser.add_argument("--max-train", type=int, help="rows that it was trained on, as --max-train of geep train")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--texts", default="2000,4000,8000", help="texts to learn from, ascending")
    parser.add_argument("--heldout", type=int, default=2500)
    parser.add_argument("--depths", default="1,2,3,4,6,8", help="layers with an exit")
    parser.add_argument("--only", help="heads, by commas; default: all")
    parser.add_argument("--work", type=Path, default=Path("runs/heads"), help="where hidden states are kept")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    path = RESULTS / "heads.jsonl"
    done = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    sizes, depths = ([int(part) for part in text.split(",")] for text in (args.texts, args.depths))
    seen, held = texts_of(args, sizes[-1])
    engine = Engine.from_pretrained(args.model, exits=False, device="cpu", dtype="bfloat16", max_length=args.max_length)
    tokens = [Tokens.of(engine, part, args.work / name) for part, name in ((seen, "train"), (held, "held"))]
    engine = Engine.from_pretrained(args.model, exits=False, device="cpu", dtype="float32")
    engine.model.config.separator_id = engine.tokenizer.sep_token_id
    for row in rows_of(seen.text_pairs is not None, sizes):
        key = {"kind": "head", "data": args.data, "classifier": args.model.name, "depths": depths, **row}
        key["texts"] = min(row["texts"], len(seen))
        if (args.only and row["head"] not in args.only.split(",")) or any(key.items() <= each.items() for each in done):
            continue
        begin = time.perf_counter()
        learn, rest = tokens[0].first(row["texts"]), (tokens[1], row["head"], tuple(depths))
        is_pooled = row["head"] in HEADS and issubclass(HEADS[row["head"]], PooledHead)
        found = (
            by_features(learn, *rest, engine.model.config, row["epochs"])
            if is_pooled
            else by_tokens(learn, *rest, engine, row["epochs"])
        )
        full, labels = (torch.from_numpy(part) for part in (tokens[1].logits.argmax(-1), tokens[1].labels))
        price = int(row["head"] == "layer")
        line = {
            **key,
            "heldout": len(held),
            "full": round(float((full == labels).float().mean()), 4),
            "accuracy": [round(float((each.argmax(-1) == labels).float().mean()), 4) for each in found],
            "agreement": [round(float((each.argmax(-1) == full).float().mean()), 4) for each in found],
            "loss": [round(value, 4) for value in losses(found, tokens[1].logits).tolist()],
            "at_99": layers_needed(found, tokens[1], tuple(depths), 0.99, price=price),
            "at_98": layers_needed(found, tokens[1], tuple(depths), 0.98, price=price),
            "seconds": round(time.perf_counter() - begin, 1),
        }
        print(json.dumps(line), flush=True)
        RESULTS.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def texts_of(args: argparse.Namespace, most: int) -> tuple[Split, Split]:
    """Texts to learn from, those first that the classifier was not trained on, and held-out ones."""
    dataset = load_dataset(args.data, data_dir=args.data_dir)
    parts = divide(dataset, max_train=args.max_train)
    random = np.random.default_rng(0)
    held = _joined(parts.profile, parts.calibration)
    held = held.select(np.sort(random.permutation(len(held))[: args.heldout]))
    fresh = unseen(unseen(dataset.train, parts.train), held)
    seen = fresh.select(random.permutation(len(fresh))[:most])
    if len(seen) < most:
        seen = _joined(seen, parts.train.select(random.permutation(len(parts.train))[: most - len(seen)]))
    return seen, held


def _joined(one: Split, other: Split) -> Split:
    pairs = None if one.text_pairs is None else [*one.text_pairs, *(other.text_pairs or ())]
    return Split([*one.texts, *other.texts], pairs, np.concatenate([one.labels, other.labels]))


if __name__ == "__main__":
    main()
