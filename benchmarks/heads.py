"""What exits on a frozen encoder can know: heads of several kinds, fitted to the full model's answers.

Measured: for each row of `rows_of`, at every depth asked for, on held-out texts: accuracy, agreement with the full
model, cross-entropy with its answers; and the mean layers at which texts leave if 98 or 99 % are to be answered as by
the full model (one threshold on the confidence, scaled by a temperature for each depth, chosen on one half of the
held-out texts and counted on the other, both ways; no table). All heads are fitted on the hidden states of the tokens,
which are computed once and kept under --work: `geep.distilling.fit_heads` fits the rows of `HEADS`; beside them stands
`layer`, a Transformer layer of the exit's own. Not measured: wall-clock, several seeds. Never looks at a test split.

CLASSIFIER is a folder that `geep train --recipe vanilla --max-train N` made of the same data. Stopped, it goes on with
the rows that are missing:

    python benchmarks/heads.py --data-dir DATA --data sst2 --model CLASSIFIER --max-train N

appends to benchmarks/results/heads.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from geep.data import Split, divide, load_dataset, unseen
from geep.distilling import FeatureCache, FitSettings, FittedHeads, fit_heads
from geep.engine import Engine
from geep.modeling import HEADS, GeepConfig, PooledHead, Spans, family_of

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")


class LayerHead(nn.Module):
    """A Transformer layer of the exit's own, a copy of one of the encoder's, and a head that pools what it gives."""

    def __init__(self, layer: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = copy.deepcopy(layer), copy.deepcopy(head)

    def forward_packed(self, hidden: Tensor, spans: Spans) -> Tensor:
        """As `PooledHead.forward_packed`."""
        mask = torch.arange(spans.longest) < spans.lengths[:, None]
        padded = hidden.new_zeros(*mask.shape, hidden.shape[1])
        padded[mask] = hidden
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None]
        found = self.layer(padded, bias)
        found = found[0] if isinstance(found, tuple) else found
        return self.head(found.float(), mask)  # type: ignore[no-any-return]


def losses(found: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy with the full model's probabilities, by depth."""
    return -(logits.softmax(-1) * F.log_softmax(found, -1)).sum(-1).mean(1)


def at_depths(cache: FeatureCache, depths: Sequence[int], kind: str) -> FeatureCache:
    """Hidden states at some depths, for another kind of head that reads tokens."""
    columns = [cache.depths.index(depth) for depth in depths]
    return replace(cache, kind=kind, depths=tuple(depths), features=np.ascontiguousarray(cache.features[:, columns]))


def pooled(tokens: FeatureCache, kind: str, config: GeepConfig) -> FeatureCache:
    """What a head that pools reads of the same texts, as `FeatureCache.of` computes it."""
    head: Any = HEADS[kind](config)
    parts = []
    for batch in tokens.batches(1024, CPU):
        found = [head.pool_packed(each, Spans(batch.offsets, each.shape[0], batch.longest)) for each in batch.features]
        parts.append(torch.stack(found, 1).half())
    lengths = np.ones(len(tokens), dtype=np.int64)
    return replace(tokens, kind=kind, features=torch.cat(parts).numpy(), lengths=lengths, firsts=None)


def first_texts(cache: FeatureCache, count: int) -> FeatureCache:
    """Keep the first texts."""
    rows, firsts = int(cache.lengths[:count].sum()), None if cache.firsts is None else cache.firsts[:count]
    kept = (cache.features[:rows], cache.lengths[:count], firsts, cache.logits[:count])
    return FeatureCache(cache.kind, cache.depths, *kept, cache.texts.select(range(min(count, len(cache)))))


def by_heads(seen: FeatureCache, held: FeatureCache, kind: str, config: GeepConfig, epochs: int) -> Tensor:
    """Fit heads of `HEADS`, and answer the held-out texts: (num_depths, num_texts, num_labels)."""
    both = [
        pooled(part, kind, config) if issubclass(HEADS[kind], PooledHead) else replace(part, kind=kind)
        for part in (seen, held)
    ]
    fitted = fit_heads(both[0], both[1], config, settings=FitSettings(epochs=epochs, patience=epochs))
    with torch.no_grad():
        return torch.cat([batch.answers(fitted.heads) for batch in both[1].batches(1024, CPU)], 1)


def by_layers(seen: FeatureCache, held: FeatureCache, after: list[FittedHeads], layers: Any, epochs: int) -> Tensor:
    """Fit a layer of each exit's own, with `mean+max` behind it, and answer the held-out texts.

    Each begins as the encoder's next layer with the head fitted there, and can only become better.
    """
    torch.manual_seed(0)
    heads = [LayerHead(layers[depth], fitted.heads[0]) for depth, fitted in zip(seen.depths, after, strict=True)]
    slow = [weight for head in heads for weight in head.layer.parameters()]
    fast = [weight for head in heads for weight in head.head.parameters()]
    optimiser = torch.optim.AdamW([{"params": slow}, {"params": fast}], weight_decay=0.02)
    steps = epochs * -(-len(seen) // 64) + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [2e-4, 1e-3], total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    best, kept = torch.full((len(heads),), torch.inf), torch.empty(0)
    for _ in range(epochs):
        for head in heads:
            head.train()
        for batch in seen.batches(64, CPU, generator=generator):
            with torch.autocast("cpu", torch.bfloat16):
                found = batch.answers(heads).float()
            optimiser.zero_grad()
            losses(found, batch.logits).sum().backward()
            optimiser.step()
            schedule.step()
        for head in heads:
            head.eval()
        with torch.no_grad():
            answers = torch.cat([batch.answers(heads) for batch in held.batches(256, CPU)], 1)
        now = losses(answers, torch.from_numpy(np.array(held.logits)))
        kept = torch.where((now < best)[:, None, None], answers, kept) if len(kept) else answers
        best = torch.minimum(best, now)
    return kept


def layers_needed(
    found: Tensor, full: Tensor, labels: Tensor, depths: Sequence[int], agreement: float
) -> dict[str, float]:
    """Mean layers, agreement and accuracy if texts leave where they are sure: chosen on one half, counted on the other.

    Args:
        found: Logits of the exits, then of the full model, (num_depths, num_texts, num_labels).
        full: Its answers, (num_texts,).
        labels: Of the texts, (num_texts,).
        depths: Layers that an answer at each depth has run.
        agreement: What is asked for.
    """
    cost, answers = torch.tensor(depths).float(), found.argmax(-1)
    halves = [torch.arange(len(full)) % 2 == part for part in (0, 1)]
    rows = []
    for choose, count in (halves, halves[::-1]):
        scales, sure = torch.logspace(-1, 1, 41), []
        for each in found[:-1]:
            fits = torch.stack([F.cross_entropy(each[choose] / scale, full[choose]) for scale in scales])
            sure.append((each / scales[fits.argmin()]).softmax(-1).amax(-1))
        sure.append(torch.full(full.shape, torch.inf))
        best: tuple[Tensor, ...] | None = None
        for threshold in np.concatenate([np.linspace(0.4, 0.9, 51), 1 - np.geomspace(0.1, 1e-5, 100)]):
            at = (torch.stack(sure) >= threshold).int().argmax(0)
            said = answers.gather(0, at[None])[0]
            columns = (cost[at], (said == full).float(), (said == labels).float())
            if columns[1][choose].mean() >= agreement and (best is None or columns[0][choose].mean() < best[0]):
                best = (columns[0][choose].mean(), *(column[count].mean() for column in columns))
        assert best is not None, "where no text leaves early all agree"
        rows.append([float(value) for value in best[1:]])
    names = ("layers", "agreement", "accuracy")
    return {name: round(float(value), 4) for name, value in zip(names, np.mean(rows, 0), strict=True)}


def rows_of(sizes: list[int]) -> list[dict[str, Any]]:
    """What is compared: the head, how many texts it learns from, and how often it sees them."""
    rows = [{"head": kind, "texts": sizes[-1], "epochs": 5} for kind in HEADS]
    rows += [{"head": kind, "texts": size, "epochs": 5} for size in sizes[:-1] for kind in ("mean+max", "conv")]
    return [*rows, {"head": "layer", "texts": sizes[-1], "epochs": 2}]


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
    parser.add_argument("--depths", default="1,2,3,4,5,6,7,8", help="layers with an exit")
    parser.add_argument("--only", help="heads, by commas; default: all")
    parser.add_argument("--work", type=Path, default=Path("runs/heads"), help="where hidden states are kept")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    path = RESULTS / "heads.jsonl"
    done = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    sizes, depths = ([int(part) for part in text.split(",")] for text in (args.texts, args.depths))
    seen, held = texts_of(args, sizes[-1])
    engine = Engine.from_pretrained(args.model, exits=False, device="cpu", dtype="float32", max_length=args.max_length)
    config: GeepConfig = engine.model.config
    config.separator_id = None if seen.text_pairs is None else engine.tokenizer.sep_token_id
    layers = engine.depths[-1]
    caches = [
        FeatureCache.of(engine, part, args.work / args.data / name, exit_layers=range(1, layers))
        for part, name in ((seen, "seen"), (held, "held"))
    ]
    logits, labels = torch.from_numpy(np.array(caches[1].logits)), torch.from_numpy(held.labels)
    full = logits.argmax(-1)
    for row in rows_of(sizes):
        key = {"kind": "head", "data": args.data, "classifier": args.model.name, "depths": depths, **row}
        key["texts"] = min(row["texts"], len(seen))
        if (args.only and row["head"] not in args.only.split(",")) or any(key.items() <= each.items() for each in done):
            continue
        begin, cpu = time.perf_counter(), time.process_time()

        def parts(where: Sequence[int], kind: str = "conv", count: int = key["texts"]) -> list[FeatureCache]:
            return [at_depths(cache, where, kind) for cache in (first_texts(caches[0], count), caches[1])]

        if row["head"] == "layer":
            after = [by_next(parts([depth + 1]), config) for depth in depths]
            found = by_layers(*parts(depths, "layer"), after, _layers_of(engine), row["epochs"])
        else:
            found = by_heads(*parts(depths), row["head"], config, row["epochs"])
        # A layer of the exit's own is run where it is asked, which is at every exit on the way.
        price = [place + 1 if row["head"] == "layer" else 0 for place in range(len(depths))]
        run = [*(depth + more for depth, more in zip(depths, price, strict=True)), layers + price[-1]]
        answered = torch.cat([found, logits[None]])
        line = {
            **key,
            "heldout": len(held),
            "full": round(float((full == labels).float().mean()), 4),
            "accuracy": [round(float((each.argmax(-1) == labels).float().mean()), 4) for each in found],
            "agreement": [round(float((each.argmax(-1) == full).float().mean()), 4) for each in found],
            "loss": [round(value, 4) for value in losses(found, logits).tolist()],
            **{f"at_{share}": layers_needed(answered, full, labels, run, share / 100) for share in (98, 99)},
            "seconds": round(time.perf_counter() - begin, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }
        print(json.dumps(line), flush=True)
        RESULTS.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def by_next(parts: list[FeatureCache], config: GeepConfig) -> FittedHeads:
    """The `mean+max` head of one depth."""
    seen, held = (pooled(part, "mean+max", config) for part in parts)
    return fit_heads(seen, held, config)


def _layers_of(engine: Engine) -> Any:
    return engine.model.encoder.get_submodule(family_of(engine.model.encoder.config).layers)


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
