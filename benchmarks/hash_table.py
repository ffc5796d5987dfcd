"""How many keys a second the hash table finds and inserts, and how many texts a second the exit table predicts.

Measured, over table size, load factor and share of absent keys:

- `triton`: the kernels (CUDA only), `reference`: the same table by torch operations on the device,
- `gather`: direct addressing, what a perfect hash would cost and the bound for all others,
- `searchsorted`: binary search in sorted keys,
- `dict`: Python's, on the host, for at most a million keys, with fewer searches and in turns of its own.

Insertion puts all keys into an empty table in one batch, checks and duplicates' removal included; for `searchsorted` it
is a sort. Prediction (`fused` against `embedding_bag`) is a whole `ExitPredictor.predict`. All tensors are on the
device before the clock starts, and the clock stops when the device is done.

All methods of a case must give equal answers. They take turns in the same run, round by round; a line of the results is
one method in one case, with the median and all rounds. A case whose lines are in the file is not measured again:

    python benchmarks/hash_table.py --device cuda

writes benchmarks/results/hash_table-<device>.jsonl. On a CPU the Triton rows are left out: there its kernels run in an
interpreter only, whose speed means nothing. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geep.hash_table import MISSING, HashTable
from geep.predictor import ExitPrediction, ExitPredictor, ExitTable, FittedTable, Levels, Lexical, ScoreRows

RESULTS = Path(__file__).parent / "results"
LOAD_FACTORS = (0.5, 0.7, 0.8, 0.9)
ABSENT_SHARES = (0.0, 0.5)
SEPARATOR = 102
# A dict of more keys would take gigabytes, a loop of Python over more searches minutes.
MOST_DICT_KEYS = 1 << 20
MOST_DICT_QUERIES = 1 << 18

Method = Callable[[], Any]


@dataclass(frozen=True)
class Scale:
    """How much is measured: slots of the tables, searches a call, texts a batch, rounds."""

    capacities: tuple[int, ...]
    num_queries: int
    batches: tuple[int, ...]
    rounds: int


SCALES: dict[str, Scale] = {
    "quick": Scale((1 << 12,), 1 << 14, (64,), 3),
    "cpu": Scale((1 << 14, 1 << 17, 1 << 20), 1 << 20, (1, 64, 4096), 7),
    # Searches of a millisecond, beside which a launch is nothing.
    "cuda": Scale((1 << 14, 1 << 17, 1 << 20, 1 << 24), 1 << 24, (1, 64, 4096, 65536), 21),
}


@dataclass(frozen=True)
class Case:
    """What several methods do to the same numbers.

    Args:
        about: What tells the case from others; part of each of its lines.
        items: Keys or texts that a call works on.
        methods: The calls; each returns its answer.
        equal: Whether two answers are equal.
    """

    about: dict[str, Any]
    items: int
    methods: dict[str, Method]
    equal: Callable[[Any, Any], bool] = field(default=lambda one, other: torch.equal(one.cpu(), other.cpu()))


def main() -> None:
    """Parse arguments and measure what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one small size, to see that it works")
    parser.add_argument("--results-dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    device, scale = torch.device(args.device), SCALES["quick" if args.quick else args.device]
    machine = describe(device)
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    path = args.results_dir / f"hash_table-{slug}.jsonl"
    if device.type == "cpu":
        print("The Triton kernels are left out: on a CPU they are interpreted, and that speed means nothing.")
    done = read(path)
    for case in cases(device, scale):
        about = case.about | machine
        missing = [name for name in case.methods if identity(about | {"method": name}) not in done]
        if missing:
            write(path, [about | line for line in measure(case, scale.rounds, device)])


def cases(device: torch.device, scale: Scale) -> Iterator[Case]:
    """Make the cases one after another, so that only one table is in memory."""
    for capacity in scale.capacities:
        for load_factor in LOAD_FACTORS:
            yield from table_cases(device, capacity, load_factor, scale.num_queries)
    for num_texts in scale.batches:
        yield predict_case(device, num_texts)


def table_cases(device: torch.device, capacity: int, load_factor: float, num_queries: int) -> Iterator[Case]:
    """Insertion of all keys, then searches with each share of absent keys."""
    generator = torch.Generator().manual_seed(capacity)
    num_keys = int(capacity * load_factor)
    # Odd numbers are stored, even ones absent; the permutation makes all distinct.
    numbers = torch.randperm(2 * num_keys, generator=generator) * 0x1234567 * 2
    keys, others = (numbers[:num_keys] + 1).to(device), numbers[num_keys:].to(device)
    values = torch.arange(num_keys, device=device)
    about = {"capacity": capacity, "load_factor": load_factor, "num_keys": num_keys, "dtype": "int64"}

    def build(kind: type[HashTable]) -> HashTable:
        table = kind(capacity, max_load_factor=0.95, device=device)
        table.insert_or_assign(keys, values)
        return table

    kinds = {"reference": HashTable}
    if device.type == "cuda":
        from geep.hash_table.triton import TritonHashTable

        kinds["triton"] = TritonHashTable
    tables = {name: build(kind) for name, kind in kinds.items()}
    methods: dict[str, Method] = {name: lambda kind=kind: build(kind) for name, kind in kinds.items()}
    methods["searchsorted"] = lambda: torch.sort(keys)
    key_list, value_list = (keys.tolist(), values.tolist()) if num_keys <= MOST_DICT_KEYS else ([], [])
    if key_list:
        methods["dict"] = lambda: dict(zip(key_list, value_list, strict=True))
    yield Case({"kind": "hash_table", "operation": "insert", **about}, num_keys, methods, equal_tables)

    ordered, order = torch.sort(keys)
    stored = dict(zip(key_list, value_list, strict=True))
    for absent in ABSENT_SHARES:
        places = torch.randint(num_keys, (num_queries,), generator=generator).to(device)
        is_absent = (torch.rand(num_queries, generator=generator) < absent).to(device)
        wanted = torch.where(is_absent, others[places], keys[places])
        methods = {name: lambda table=table, wanted=wanted: table.find(wanted) for name, table in tables.items()}
        methods["searchsorted"] = lambda wanted=wanted: search(ordered, order, wanted)
        direct = torch.where(is_absent, num_keys, places)
        padded = torch.cat([values, values.new_full((1,), MISSING)])
        methods["gather"] = lambda direct=direct, padded=padded: padded[direct]
        more = {"kind": "hash_table", "operation": "find", "absent_share": absent}
        yield Case(more | {"num_queries": num_queries} | about, num_queries, methods)
        if stored:
            few = wanted[:MOST_DICT_QUERIES].tolist()
            by_dict: dict[str, Method] = {"dict": lambda few=few: [stored.get(key, MISSING) for key in few]}
            yield Case(more | {"num_queries": len(few)} | about, len(few), by_dict, list.__eq__)


def search(ordered: Tensor, order: Tensor, wanted: Tensor) -> Tensor:
    """Find keys in sorted ones."""
    place = torch.searchsorted(ordered, wanted).clamp(max=ordered.numel() - 1)
    return torch.where(ordered[place] == wanted, order[place], MISSING)


def equal_tables(one: Any, other: Any) -> bool:
    """Compare what was built where both are hash tables; sorted keys and dicts are checked by their searches."""
    if not isinstance(one, HashTable) or not isinstance(other, HashTable):
        return True
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one.slots, other.slots, strict=True))


def predict_case(device: torch.device, num_texts: int, *, pairs: bool = False) -> Case:
    """Predict a batch of texts of 5 to 45 tokens, frequent tokens often, with a table of uni- and bigrams.

    `pairs`: a separator stands in the middle of each text, and the table tells the two parts apart.
    """
    vocab_size, num_labels, speeds, depths = 30_522, 6, (0.5,), tuple(range(1, 13))
    generator = torch.Generator().manual_seed(7)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        lengths = torch.randint(5, 46, (count,), generator=generator)
        # Zipf's law: the logarithm of the rank is uniform.
        ranks = torch.rand(int(lengths.sum()), generator=generator) * torch.log(torch.tensor(vocab_size - 1000.0))
        ids = ranks.exp().long() + 999
        if pairs:
            ends = lengths.cumsum(0)
            ids[ends - 1] = ids[ends - lengths // 2] = SEPARATOR
        return ids, lengths

    ids, lengths = draw(20_000)
    exits = torch.randint(len(depths), (lengths.numel(), 1), generator=generator)
    special_ids = (0, 100, 101, SEPARATOR, 103)
    table = ExitTable.build(
        ids,
        lengths,
        exits,
        depths=depths,
        speeds=speeds,
        vocab_size=vocab_size,
        special_ids=special_ids,
        separator_id=SEPARATOR if pairs else None,
    )
    edges = torch.linspace(-0.5, 0.5, 15)[None] + 6
    shares = (torch.arange(12)[None, None] >= torch.arange(16)[None, :, None] * 11 // 15).float()
    rows = torch.randn(table.num_rows, 1 + num_labels, generator=generator)
    fitted = FittedTable(
        "counts",
        table,
        ScoreRows(rows[:, :1].contiguous(), torch.tensor([6.0])),
        Levels(edges, shares),
        Lexical(rows[:, 1:].contiguous(), torch.zeros(num_labels)),
    )
    predictor = ExitPredictor(fitted)
    ids, lengths = (tensor.to(device) for tensor in draw(num_texts))
    kinds = {"embedding_bag": predictor.to(device, kernel="none")}
    if device.type == "cuda":
        kinds["fused"] = predictor.to(device)
    methods: dict[str, Method] = {
        name: lambda each=each: each.predict(ids, lengths, speed=0.5) for name, each in kinds.items()
    }
    about = {
        "kind": "predict",
        "num_texts": num_texts,
        "num_tokens": ids.numel(),
        "num_ngrams": len(table.keys.ngrams),
        "num_labels": num_labels,
        "dtype": "float32",
    }
    return Case(about, num_texts, methods, equal_predictions)


def equal_predictions(one: ExitPrediction, other: ExitPrediction) -> bool:
    """Compare within rounding; a layer may differ where the score lies on an edge."""
    same_layers = (one.exit_layers == other.exit_layers).float().mean()
    return torch.allclose(one.scores, other.scores, atol=1e-4) and bool(same_layers > 0.999)


def measure(case: Case, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Run the methods in turns; the first turn, where kernels are compiled, is not timed but checked."""
    answers = [method() for method in case.methods.values()]
    for name, answer in zip(case.methods, answers, strict=True):
        if not case.equal(answer, answers[0]):
            raise RuntimeError(f"Found another answer of {name} than of {next(iter(case.methods))} in {case.about}.")
    del answers
    seconds: dict[str, list[float]] = {name: [] for name in case.methods}
    for _ in range(rounds):
        for name, method in case.methods.items():
            synchronize(device)
            start = time.perf_counter()
            method()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    lines = []
    for name, times in seconds.items():
        median = statistics.median(times)
        lines.append({"method": name, "seconds": median, "rounds": times, "per_second": case.items / median})
        print(*case.about.values(), name, f"{case.items / median:,.0f} a second", flush=True)
    return lines


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is always done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> dict[str, Any]:
    """Name the device and the versions that a number depends on."""
    names = {"python": platform.python_version(), "geep": version_of("geep"), "torch": torch.__version__}
    versions = names | {"triton": version_of("triton"), "cuda": torch.version.cuda}
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "versions": versions}
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    name = found.group(1) if found else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "versions": versions}


def version_of(package: str) -> str | None:
    """Return the installed version, `None` where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def identity(line: dict[str, Any]) -> str:
    """Return what makes two lines the same measurement."""
    measured = {"seconds", "rounds", "per_second"}
    return json.dumps({name: value for name, value in line.items() if name not in measured}, sort_keys=True)


def read(path: Path) -> set[str]:
    """Return what was measured already."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {identity(json.loads(line)) for line in lines}


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append the lines of a case, all or none: the longer file takes the place of the shorter one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    partial = path.with_suffix(".partial")
    partial.write_text(before + "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
