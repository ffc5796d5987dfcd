"""How long it takes, and how much memory, to learn a table from many texts: keys, counts, exit 0, scores.

Measured, one after another in one process, so that each peak is the highest so far:

- table: which n-grams get a row, and how often each key stood in a text that left at each exit,
- exit 0: towards probabilities of all labels, the choice of the penalty included,
- counts, fitted: the two kinds of scores,
- prediction: of all texts at once.

Texts are made up: token ids by Zipf's law, each token with an opinion on labels and exits, so that there is something
to learn. Real texts repeat their n-grams more, so these ask for more memory than real ones. Not measured: how good the
table is. One call is one case, so that memory is its own:

    python benchmarks/table_scale.py --texts 1000000

appends a line to benchmarks/results/table_scale.jsonl. Seconds of the clock mean something on an idle machine only;
seconds of the processor stand beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent / "results"

SPECIAL_IDS = (0, 1, 2)
SPEEDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
# Texts for levels, as many as a profile holds out.
HELDOUT = 2500


def main() -> None:
    """Measure one case and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=30, help="mean tokens of a text")
    parser.add_argument("--labels", type=int, default=4)
    parser.add_argument("--depths", type=int, default=11, help="exits, the full model included")
    parser.add_argument("--vocabulary", type=int, default=30_000)
    parser.add_argument("--order", type=int, default=2, help="longest n-gram")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    case = {name: getattr(args, name) for name in ("texts", "length", "labels", "depths", "vocabulary", "order")}
    line = {"kind": "table_scale", **case, **measure(**case), "machine": machine()}
    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / "table_scale.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def measure(texts: int, length: int, labels: int, depths: int, vocabulary: int, order: int) -> dict[str, Any]:
    """Make texts up and learn everything from them; seconds, seconds of the processor and peak MiB of each step."""
    from geep.predictor import (
        PREDICTORS,
        ExitPredictor,
        ExitTable,
        FittedTable,
        ScoreRows,
        TextExits,
        fit_levels,
        fit_lexical,
    )

    ids, lengths, opinions, exits = made_up(texts, length, labels, depths, vocabulary)
    seen = TextExits(ids, lengths, exits)
    steps: dict[str, dict[str, float | None]] = {"texts": {"peak_mib": peak()}}

    def step(name: str, work: Callable[[], Any]) -> Any:
        clock, processor = time.perf_counter(), time.process_time()
        found = work()
        seconds, busy = time.perf_counter() - clock, time.process_time() - processor
        steps[name] = {"seconds": round(seconds, 1), "cpu_seconds": round(busy, 1), "peak_mib": peak()}
        print(f"{name}: {seconds:.1f} s, {busy:.1f} s of the processor, {peak()} MiB", file=sys.stderr, flush=True)
        return found

    places = tuple(range(1, depths + 1))
    options: dict[str, Any] = {"depths": places, "speeds": SPEEDS, "vocab_size": vocabulary}
    table = step(
        "table",
        lambda: ExitTable.build(ids, lengths, exits, special_ids=SPECIAL_IDS, ngram_order=order, **options),
    )
    lexical = step("exit 0", lambda: fit_lexical(table.keys, ids, lengths, opinions, num_labels=labels))
    rows: ScoreRows | None = None
    for kind, score in PREDICTORS.items():
        rows = step(kind, lambda score=score: score(table, seen))
    if rows is None:
        raise RuntimeError("There is no row of PREDICTORS, expected at least one.")
    few = slice(0, min(HELDOUT, texts))
    levels = fit_levels(torch.rand(few.stop, len(SPEEDS)), exits[few], num_depths=depths)
    predictor = ExitPredictor(FittedTable("fitted", table, rows, levels, lexical))
    found = step("prediction", lambda: predictor.predict(ids, lengths, speed=0.1))
    agreement = (found.lexical_logits.argmax(1) == opinions.argmax(1)).double().mean()
    return {
        "tokens": ids.numel(),
        "ngrams": len(table.keys.ngrams),
        "steps": steps,
        "agreement_on_texts_learned_from": round(float(agreement), 4),
    }


def made_up(
    texts: int, length: int, labels: int, depths: int, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, lengths, probabilities of labels and exits of texts; the same numbers give the same texts."""
    random = np.random.default_rng(0)
    lengths = np.maximum(random.poisson(length, texts), 4)
    first = len(SPECIAL_IDS)
    chances = (1 / np.arange(1, vocabulary - first + 1) ** 1.07).cumsum()
    ids = np.empty(lengths.sum(), np.int64)
    says = random.normal(size=(vocabulary, labels)).astype(np.float32)
    logits, starts = np.empty((texts, labels), np.float32), np.concatenate([[0], lengths.cumsum()])
    for begin in range(0, texts, 1 << 15):
        end = min(begin + (1 << 15), texts)
        part = slice(starts[begin], starts[end])
        ids[part] = first + np.searchsorted(chances, chances[-1] * random.random(part.stop - part.start))
        sums = np.add.reduceat(says[ids[part]], starts[begin:end] - starts[begin])
        logits[begin:end] = 3 * sums / np.sqrt(lengths[begin:end, None])
    opinions = torch.from_numpy(logits).softmax(1)
    unsure = (1 - opinions.max(1).values) / (1 - 1 / labels)
    exits = torch.empty(texts, len(SPEEDS), dtype=torch.int64)
    for column, speed in enumerate(SPEEDS):
        exits[:, column] = (unsure * depths * (1 - speed / 2)).long().clamp(max=depths - 1)
    return torch.from_numpy(ids), torch.from_numpy(lengths), opinions, exits


def peak() -> int | None:
    """Peak memory of this process in MiB; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:")), None)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"device": name, "threads": torch.get_num_threads(), "dtype": "float32", "torch": torch.__version__}


if __name__ == "__main__":
    main()
