"""Texts a second of geep and of what people use instead: same texts, same weights, same run, each at its best setting.

Measured on the test split, from raw text to label ids, median of interleaved rounds: Hugging Face's pipeline (arrival
order, length-sorted, in bfloat16, compiled, cut to as many layers as give our accuracy), sentence-transformers,
infinity-emb, ONNX Runtime (float32, int8), OpenVINO (float32, the precision it chooses, int8, geep's table before it),
a model of as many layers as geep runs, fine-tuned at that depth, TF-IDF with logistic regression, static embeddings
(model2vec), FastBERT's shrinking batch; and geep at full depth, at every constant depth, the table before the full
model, and as calibrated, on each backend and dtype asked for. Also: FastBERT and geep with texts that come in calls of
8 … 4,096; where geep's time goes; how much of the machine's peak in matrix products the full model uses. Not measured:
GPUs (`gpu.py`), latency of single requests, pairs.

Every way gets the same time, so fast ones time more texts: all take the first of one random order of the test texts.
Accuracy is of these, and of all texts where a way answers them within seconds.
Every rival is a process of its own, in a virtual environment of its own where pins collide (made under --envs-dir the
first time), and waits without using the CPU while it is another's turn; that is checked and written down. Its batch
size is chosen on 64 texts. Run it on an otherwise idle machine:

    python benchmarks/throughput.py --data-dir DATA --model-dir runs/trec runs/sst2 \
        --engines packed:bfloat16,packed:int8=runs-int8/{data}

writes benchmarks/results/throughput-<data set>.jsonl; a data set measured already with the same settings is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rivals.environments import EnvironmentFailed, ensure
from rivals.lines import OTHER_GROUPS, Entry, Timed, lines_of
from rivals.runner import IdleWatch, RivalFailed, Worker, this_python, worker_env

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
BUDGETS = (8, 32, 128, 512, 4096)
LEAST_TEXTS = 64
# Texts of the ways that come in calls: a call at least, and enough calls for a mean.
LEAST_IN_CALLS = 512
# A way whose slowest round takes so many times longer than its fastest is measured again.
MOST_SPREAD = 1.3
# Whoever answers all texts in so many seconds does so once more, without a clock, for an accuracy of all of them.
SECONDS_FOR_ALL = 20.0
# Loading may export and quantise; a run that takes many times longer than its trial said hangs.
LOAD_SECONDS = 1800.0
PATIENCE = 20.0

Report = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """A backend and dtype of geep, and the folder whose table and calibration belong to them."""

    backend: str
    dtype: str
    folder: Path

    @property
    def name(self) -> str:
        """What it is called in results."""
        return f"{self.backend} {self.dtype}"


@dataclass(frozen=True, slots=True)
class RivalChoice:
    """A worker to start: its file, its environment (None: this one) and whether it reads the plain folder."""

    name: str
    script: str
    environment: str | None = None
    plain: bool = False


RIVALS: dict[str, RivalChoice] = {
    rival.name: rival
    for rival in (
        RivalChoice("hf", "hf.py"),
        RivalChoice("onnxruntime", "ort.py", "graphs"),
        RivalChoice("openvino", "ov.py", "graphs"),
        RivalChoice("sentence-transformers", "sentence.py", "sentence-transformers", plain=True),
        RivalChoice("infinity", "infinity.py", "infinity", plain=True),
        RivalChoice("shallow", "shallow.py"),
        RivalChoice("lexical", "lexical.py", "lexical"),
        RivalChoice("embeddings", "embeddings.py", "embeddings"),
    )
}


def main() -> None:
    """Parse arguments; measure each model folder that is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of data set folders")
    parser.add_argument("--model-dir", type=Path, nargs="+", required=True, help="folders made by `geep train`")
    parser.add_argument(
        "--engines",
        default="packed:float32",
        help="backend:dtype[=FOLDER], by commas, the one to compare with first; {data} in FOLDER is the data set",
    )
    parser.add_argument("--rivals", default=",".join(RIVALS), help="by commas, or nothing")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="texts a call, by commas, or nothing")
    parser.add_argument("--max-texts", type=int, default=4096, help="bound on the timed texts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=8.0, help="of timing, shared out; budgets come on top")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--envs-dir", type=Path, default=ROOT.parent / ".bench-envs", help="environments and exports")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="measure what is in the results already, too")
    args = parser.parse_args()
    for folder in args.model_dir:
        measure(folder, args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    """Race everything on one data set and write its lines."""
    data = json.loads((folder / "training.json").read_text(encoding="utf-8"))["about"]["data"]["name"]
    engines = engine_choices(args.engines, data, folder)
    made_of = {
        "engines": {engine.name: digest_of(engine.folder) for engine in engines},
        "weights": digest_of(folder),
        "rivals": _names(args.rivals),
        "budgets": [int(size) for size in _names(args.budgets)],
        "max_texts": args.max_texts,
        "rounds": args.rounds,
        "minutes": args.minutes,
        "threads": args.threads,
    }
    path = args.results / f"throughput-{data}.jsonl"
    if not args.again and path.exists():
        first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
        if first["made_of"] == made_of:
            print(f"{path.name} holds this measurement already; --again repeats it.")
            return
    lines = race(data, folder, engines, made_of, args)
    args.results.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)
    print(f"wrote {path}")


def race(
    data: str, folder: Path, engines: Sequence[EngineChoice], made_of: dict[str, Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Start every worker, time the ways in interleaved rounds, and return the lines of the result."""
    # Imported late: --help needs no torch.
    from rivals.materials import prepare

    from geep.evaluation import cpu_name

    begin, busy = time.monotonic(), os.getloadavg()[0]
    cache = args.envs_dir / "exports"
    material = prepare(data, args.data_dir, folder, cache, max_texts=args.max_texts, threads=args.threads)
    with ExitStack() as stack, progress_bar(data) as report:
        field_ = Field(material.job_file, cache, args.threads, stack, report)
        field_.enter("matrix products", "peak.py")
        for number, engine in enumerate(engines):
            options = {"backend": engine.backend, "dtype": engine.dtype, "folder": str(engine.folder.resolve())}
            options |= {"budgets": made_of["budgets"], "beside_fastbert": number == 0}
            field_.enter(f"geep {engine.name}", "geep_engine.py", options=options)
        if field_.main_engine is None:
            sys.exit(f"{data}: the first engine failed, so there is nothing to compare with; nothing is written.")
        for name in made_of["rivals"]:
            rival = RIVALS[name]
            if rival.plain and material.plain is not None:
                field_.fall_out(name, material.plain)
                continue
            options = {
                "not_comparable": material.not_comparable,
                "head": material.head,
                "static_depth": static_depth(field_.main_engine),
                "cascade": (field_.main_engine or {}).get("cascade"),
                "depth": shallow_depth(field_.main_engine),
                "dtypes": sorted({engine.dtype for engine in engines}),
            }
            if name == "shallow" and options["depth"] is None:
                field_.fall_out(name, "the calibrated engine runs as many layers as there are, or none")
                continue
            try:
                python = this_python() if rival.environment is None else ensure(rival.environment, args.envs_dir)
            except EnvironmentFailed as error:
                field_.fall_out(name, error)
                continue
            field_.enter(name, rival.script, python=python, options=options)
        field_.share_out(len(material.job.texts), args.rounds, 60 * args.minutes)
        field_.run_rounds(args.rounds)
        field_.answer_all(len(material.job.texts))
    if not any(entry.group == "full" for entry in field_.entries):
        sys.exit(f"{data}: the first engine did not last, so there is nothing to compare with; nothing is written.")
    header = {
        "kind": "about",
        "data": data,
        "made_of": made_of,
        "machine": {
            "device": cpu_name(),
            "threads": args.threads,
            "dtype": "float32",
            "torch": field_.entries[0].versions["torch"] if field_.entries else None,
        },
        "rounds": args.rounds,
        "load_before": round(busy, 2),
        "idle_cpu": {name: round(share, 3) for name, share in field_.idle.items()},
        "engines": {name: about_of(about) for name, about in field_.about.items() if name.startswith("geep ")},
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }
    main_about = field_.main_engine or {}
    timed = Timed(
        labels=material.job.labels,
        lengths=main_about.get("lengths", []),
        full_depth=max(main_about.get("depths", [0])),
    )
    return [header, *lines_of(data, field_.entries, field_.failures, timed)]


def about_of(about: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping of what an engine's worker told."""
    return {name: value for name, value in about.items() if name != "lengths"}


@dataclass
class Field:
    """The workers of one race: who has entered, what they offer, who fell out and why."""

    job_file: Path
    logs: Path
    threads: int
    stack: ExitStack
    report: Report
    workers: list[Worker] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)

    @property
    def main_engine(self) -> dict[str, Any] | None:
        """What the first engine told of itself; None if it fell out."""
        return next((about for name, about in self.about.items() if name.startswith("geep ")), None)

    def enter(
        self, name: str, script: str, *, python: Path | None = None, options: dict[str, Any] | None = None
    ) -> None:
        """Start a worker and let it load; one that cannot is noted and left out."""
        self.report(f"loading {name}", 0.0)
        command = [
            this_python() if python is None else python,
            ROOT / "rivals" / script,
            *("--job", self.job_file, "--options", json.dumps(options or {})),
        ]
        log = self.logs / f"{name.replace(' ', '-')}.log"
        worker = self.stack.enter_context(Worker(name, command, log=log, env=worker_env(self.threads)))
        try:
            loaded = worker.ask({"do": "load"}, seconds=LOAD_SECONDS)
        except RivalFailed as error:
            worker.close()
            self.fall_out(name, error)
            return
        self.workers.append(worker)
        self.about[name] = loaded["about"]
        self.entries += [Entry(worker, way, loaded["versions"]) for way in loaded["ways"]]

    def fall_out(self, name: str, error: Exception | str) -> None:
        """Note a failure; the race goes on without it."""
        self.failures[name] = str(error)
        print(f"left out: {name}: {error}", file=sys.stderr, flush=True)

    def share_out(self, available: int, rounds: int, seconds: float) -> None:
        """Decide how many texts each way times: as many as its share of the time allows, by its trial."""
        sharing = [entry for entry in self.entries if entry.seconds_per_text and not entry.texts_per_call]
        fixed = sum(entry.seconds_per_run for entry in self.entries)
        share = max(seconds / rounds - fixed, 0.0) / max(len(sharing), 1)
        for entry in self.entries:
            wanted = max(entry.texts_per_call, LEAST_IN_CALLS)
            if not entry.texts_per_call:
                wanted = max(int(share / max(entry.seconds_per_text, 1e-9)), LEAST_TEXTS)
            entry.count = min(wanted, available)
        whole = rounds * sum(entry.expected_seconds for entry in self.entries) / 60
        print(
            f"{len(self.entries)} ways, {rounds} rounds, {share:.1f} s each: at most {whole:.0f} minutes",
            file=sys.stderr,
            flush=True,
        )

    def run_rounds(self, rounds: int) -> None:
        """Run every way once a round, each round in a new order; those of uneven rounds once more, all rounds."""
        random = np.random.default_rng(0)
        watch = IdleWatch(self.workers)
        self._rounds(self.entries, rounds, random, watch)
        uneven = [entry for entry in self.entries if entry.spread() > MOST_SPREAD]
        for entry in uneven:
            entry.outcomes, entry.was_uneven = [], True
        self._rounds(uneven, rounds, random, watch)
        # A median of fewer rounds than the others' would not be theirs to stand beside.
        self.entries = [entry for entry in self.entries if len(entry.outcomes) == rounds]
        self.idle = watch.worst

    def answer_all(self, available: int) -> None:
        """Let every way that is fast enough answer all texts: of the few that it was timed on, accuracy is luck."""
        for entry in self.entries:
            if entry.group in OTHER_GROUPS or entry.seconds_per_text * available > SECONDS_FOR_ALL:
                continue
            self.report(f"answers of {entry.name}", 1.0)
            request = {"do": "run", "way": entry.name, "count": available}
            try:
                entry.all_answers = entry.worker.ask(request, seconds=PATIENCE * SECONDS_FOR_ALL)["answers"]
            except RivalFailed as error:
                self.fall_out(entry.name if entry.worker.alive else entry.worker.name, error)

    def _rounds(self, running: Sequence[Entry], rounds: int, random: np.random.Generator, watch: IdleWatch) -> None:
        steps, done = rounds * len(running), 0
        for _ in range(rounds):
            for index in random.permutation(len(running)):
                entry = running[index]
                done += 1
                self.report(entry.name, done / max(steps, 1))
                if entry.name in self.failures or entry.worker.name in self.failures:
                    continue
                seconds = max(120.0, PATIENCE * entry.expected_seconds)
                request = {"do": "run", "way": entry.name, "count": entry.count}
                try:
                    outcome = watch.ask(entry.worker, request, seconds=seconds)
                except RivalFailed as error:
                    # With a process go all of its ways.
                    self.fall_out(entry.name if entry.worker.alive else entry.worker.name, error)
                    continue
                entry.outcomes.append(outcome)


def static_depth(about: dict[str, Any] | None) -> int | None:
    """Depth of the cut model that is raced: the shallowest that is as good as the calibrated engine, else the best."""
    if about is None or "geep_quality" not in about:
        return None
    inner = {int(depth): quality for depth, quality in about["quality"].items() if int(depth) < max(about["depths"])}
    if not inner:
        return None
    good = [depth for depth, quality in inner.items() if quality >= about["geep_quality"]]
    return min(good) if good else max(inner, key=lambda depth: inner[depth])


def shallow_depth(about: dict[str, Any] | None) -> int | None:
    """Depth of the model that is trained at its depth: the calibrated engine's mean layers, rounded up, so at its cost.

    None where that engine runs all layers, or all texts are answered without any.
    """
    layers = (about or {}).get("mean_exit_layer")
    if about is None or layers is None or not 0 < layers <= max(about["depths"]) - 1:
        return None
    return math.ceil(layers)


def engine_choices(text: str, data: str, folder: Path) -> list[EngineChoice]:
    """Read --engines.

    Raises:
        ValueError: If an item is not backend:dtype or backend:dtype=FOLDER.
    """
    choices = []
    for item in _names(text):
        kind, _, where = item.partition("=")
        backend, _, dtype = kind.partition(":")
        if not backend or not dtype:
            raise ValueError(f"--engines takes backend:dtype or backend:dtype=FOLDER, by commas; got {item!r}.")
        choices.append(EngineChoice(backend, dtype, Path(where.replace("{data}", data)) if where else folder))
    return choices


def digest_of(folder: Path) -> str:
    """Digest of what a model folder answers with: weights, table and calibration."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "exit_table.safetensors", "calibration.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.exists() else b"none")
    return digest.hexdigest()[:16]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@contextmanager
def progress_bar(title: str) -> Iterator[Report]:
    """A bar on standard error: what runs, the share that is done, the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=1.0)

        def report(what: str, share: float) -> None:
            progress.update(task, description=f"{title}: {what}", completed=share)

        yield report


if __name__ == "__main__":
    main()
