"""What needs no encoder at all, on all data sets: TF-IDF with logistic regression, and static embeddings (model2vec).

Measured: accuracy on the whole test split, after learning from all rows with labels (training and development split).
The two texts of a pair are joined: neither system has a place for two. Not measured: time, in which both are raced
beside all others by `throughput.py`.

    python benchmarks/cheap.py --data-dir DATA --model ENCODER

appends to benchmarks/results/cheap.jsonl what is not there yet.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from certified import FIRST, FURTHER
from rivals.environments import ensure
from rivals.runner import Worker, worker_env
from rivals.worker import Job
from tables import append, read

from geep.data import Split, load_dataset

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "cheap.jsonl"
SYSTEMS = ("lexical", "embeddings")
PATIENCE = 7200.0


def main() -> None:
    """Parse arguments and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of data set folders")
    parser.add_argument("--model", required=True, help="folder of the encoder that embeddings are distilled from")
    parser.add_argument("--only", help="data sets, by commas; default: all")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--envs-dir", type=Path, default=ROOT.parent / ".bench-envs", help="environments")
    args = parser.parse_args()
    done = {(line["data"], line["system"]) for line in read(RESULTS)}
    for data in args.only.split(",") if args.only else (*FIRST, *FURTHER):
        for system in SYSTEMS:
            if (data, system) not in done:
                line = measured(data, system, args)
                append(RESULTS, line)
                print(data, system, line["accuracy"], flush=True)


def measured(data: str, system: str, args: argparse.Namespace) -> dict[str, Any]:
    """One line: a system in a process of its own learns all rows and answers the test texts."""
    dataset = load_dataset(data, data_dir=args.data_dir)
    if dataset.test is None or dataset.test.labels is None:
        raise SystemExit(f"{data} has no labelled test split, which this reports on.")
    labelled = [part for part in (dataset.train, dataset.dev) if part is not None and part.labels is not None]
    texts, labels = joined(dataset.test), [int(label) for label in dataset.test.labels]
    job = Job(
        texts=texts,
        labels=labels,
        calibration_texts=[],
        label_names=list(dataset.label_names),
        export_dir="",
        model_dir="",
        max_length=0,
        threads=args.threads,
        labelled_texts=[text for part in labelled for text in joined(part)],
        labelled=[int(label) for part in labelled for label in part.labels],
    )
    with tempfile.TemporaryDirectory() as folder:
        job_file, log = Path(folder) / "job.json", args.envs_dir / f"{system}.log"
        job.save(job_file)
        options = json.dumps({"encoder": args.model})
        python = ensure(system, args.envs_dir)
        command = [python, ROOT / "rivals" / f"{system}.py", "--job", job_file, "--options", options]
        with Worker(system, command, log=log, env=worker_env(args.threads)) as worker:
            loaded = worker.ask({"do": "load"}, seconds=PATIENCE)
            (way,) = loaded["ways"]
            answers = worker.ask({"do": "run", "way": way["name"], "count": len(texts)}, seconds=PATIENCE)["answers"]
    return {
        "data": data,
        "system": system,
        "name": way["name"],
        "setting": way["setting"],
        "rows": len(job.labelled),
        "tested_on": len(texts),
        "accuracy": round(100 * sum(a == b for a, b in zip(answers, labels, strict=True)) / len(labels), 2),
        "versions": loaded["versions"],
    }


def joined(part: Split) -> list[str]:
    """Texts; of pairs both, one after the other."""
    if part.text_pairs is None:
        return list(part.texts)
    return [f"{first} {second}" for first, second in zip(part.texts, part.text_pairs, strict=True)]


if __name__ == "__main__":
    main()
