"""The Triton table equals the reference byte for byte, and the fused prediction equals the predictor's.

Without a GPU the kernels run in Triton's interpreter (see conftest.py): one program after another, the lanes of a tile
in step, so these tests show what is computed and not how the threads of a GPU race. With a GPU all of them run there.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from geep.hash_table import EMPTY_KEY, MISSING, HashTable, devices, kernels_run_on, on_device
from geep.hash_table.cpu import _hash
from geep.predictor import ExitPrediction, ExitPredictor, TextExits, fit_predictor

pytest.importorskip("triton", reason="Triton is not installed")

from geep.hash_table.triton import TritonHashTable

pytestmark = pytest.mark.any_device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LARGEST = (1 << 63) - 1
# Few different keys make duplicates and reassignments, the others reach all 63 bits.
KEYS = st.one_of(st.integers(0, 40), st.integers(0, LARGEST))
PAIRS = st.lists(st.tuples(KEYS, st.integers(0, LARGEST)), max_size=100)
VOCAB_SIZE = 50
# Not 0, which is what a masked load gives.
SPECIAL_IDS = (1, 2)
DEPTHS = (1, 2, 4, 6)
SPEEDS = (0.2, 0.5, 0.8)


def ints(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=DEVICE)


def insert(table: HashTable, pairs: list[tuple[int, int]]) -> None:
    keys, values = ([pair[part] for pair in pairs] for part in (0, 1))
    table.insert_or_assign(ints(keys), ints(values))


def same_bytes(one: HashTable, other: HashTable) -> bool:
    pairs = zip(one.slots, other.slots, strict=True)
    return len(one) == len(other) and all(torch.equal(mine.cpu(), theirs.cpu()) for mine, theirs in pairs)


def both(capacity: int, max_load_factor: float) -> tuple[TritonHashTable, HashTable]:
    options: dict[str, Any] = {"max_load_factor": max_load_factor, "device": DEVICE}
    return TritonHashTable(capacity, **options), HashTable(capacity, **options)


# ---------------------------------------------------------------------------------------------------------- the table


@given(st.lists(PAIRS, max_size=3), st.integers(1, 200), st.sampled_from([0.3, 0.9, 0.95]), st.lists(KEYS, max_size=30))
@settings(deadline=None, max_examples=25)
def test_table_equals_reference_and_dict(
    batches: list[list[tuple[int, int]]], capacity: int, max_load_factor: float, others: list[int]
) -> None:
    table, reference = both(capacity, max_load_factor)
    expected: dict[int, int] = {}
    for batch in batches:
        insert(table, batch)
        insert(reference, batch)
        expected.update(batch)
        assert same_bytes(table, reference)
    wanted = [*expected, *others, *expected]
    assert table.find(ints(wanted)).tolist() == [expected.get(key, MISSING) for key in wanted]


@given(PAIRS, st.randoms(use_true_random=False), st.integers(1, 40))
@settings(deadline=None, max_examples=15)
def test_order_and_batches_leave_no_trace(pairs: list[tuple[int, int]], random: Random, step: int) -> None:
    distinct = list(dict(pairs).items())
    split, reference = both(1, 0.9)
    insert(reference, distinct)
    random.shuffle(distinct)
    for start in range(0, len(distinct), step):
        insert(split, distinct[start : start + step])
    assert same_bytes(split, reference)


@pytest.mark.parametrize("ascending", [True, False], ids=["every key displaces", "every key walks on"])
@pytest.mark.parametrize(("capacity", "batch_size"), [(16, 1), (64, 9), (128, 115)])
def test_full_tables_and_walks_round_the_end_equal_the_reference(
    ascending: bool, capacity: int, batch_size: int
) -> None:
    count = int(0.9 * capacity)
    table, reference = both(capacity, 0.9)
    numbers = torch.arange(capacity * 500)
    # Half of the keys share the last slot as their home.
    near = numbers[(_hash(numbers) & (capacity - 1)) == capacity - 1][: count // 2].tolist()
    keys = sorted([*near, *range(1 << 40, (1 << 40) + count - len(near))], reverse=not ascending)
    for start in range(0, count, batch_size):
        insert(table, [(key, key + 1) for key in keys[start : start + batch_size]])
    insert(reference, [(key, key + 1) for key in keys])
    assert (table.capacity, table.load_factor) == (capacity, count / capacity)
    assert same_bytes(table, reference)
    wanted = [*keys, *(key + LARGEST // 2 for key in near)]
    assert table.find(ints(wanted)).tolist() == [*(key + 1 for key in keys), *[MISSING] * len(near)]


def test_negative_keys_are_absent_for_a_search_and_refused_by_an_insertion() -> None:
    table, _ = both(4, 0.9)
    insert(table, [(3, 4)])
    assert table.find(ints([-1, 3, -(1 << 63), -2])).tolist() == [MISSING, 4, MISSING, MISSING]
    with pytest.raises(ValueError, match="keys must be >= 0, got -1"):
        insert(table, [(5, 1), (-1, 1)])
    with pytest.raises(TypeError, match=r"keys must be torch.int64"):
        table.find(ints([1]).int())
    with pytest.raises(ValueError, match="keys are on meta"):
        table.find(ints([1]).to("meta"))
    assert len(table) == 1


def test_views_and_empty_batches_work() -> None:
    table, reference = both(1, 0.9)
    insert(table, [])
    assert table.find(ints([])).shape == (0,)
    grid = torch.arange(60, device=DEVICE).view(20, 3)
    table.insert_or_assign(grid[:, 1], grid[:, 2])
    reference.insert_or_assign(grid[:, 1], grid[:, 2])
    assert same_bytes(table, reference)
    assert torch.equal(table.find(grid[:, 1]), grid[:, 2])


def test_state_and_copies_keep_class_and_bytes() -> None:
    table, reference = both(64, 0.9)
    insert(table, [(key * key, key) for key in range(50)])
    again = TritonHashTable.from_state(table.state(), max_load_factor=0.9)
    assert type(again) is TritonHashTable
    assert same_bytes(again, table)
    assert type(on_device(table, "cpu")) is HashTable
    copy = TritonHashTable.copy_of(on_device(table, "cpu"), DEVICE)
    insert(copy, [(10**9, 7)])
    assert table.find(ints([10**9])).tolist() == [MISSING]
    insert(reference, [(key * key, key) for key in range(50)] + [(10**9, 7)])
    assert same_bytes(copy, reference)
    damaged = table.state()
    damaged["keys"] = damaged["keys"].roll(1)
    damaged["values"] = damaged["values"].roll(1)
    with pytest.raises(ValueError, match="does not reach"):
        TritonHashTable.from_state(damaged)


# ---------------------------------------------------------------------------------------------------- fused prediction


def pack(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    return ints([token for text in texts for token in text]), ints([len(text) for text in texts])


def draw(count: int, seed: int, longest: int = 14) -> list[list[int]]:
    """Draw texts of few different tokens, special ones among them, so that n-grams repeat and are cut."""
    random = np.random.default_rng(seed)
    return [random.choice([0, 2, *range(4, 12)], random.integers(5, longest)).tolist() for _ in range(count)]


def said_twice(texts: list[list[int]]) -> list[list[int]]:
    """Make pairs, whose separator is 2: much of the first text comes again in the second."""
    return [[*text, 2, *text[1:], 5] for text in texts]


def fit(
    *,
    num_labels: int | None = 3,
    ngram_order: int = 2,
    multi_label: bool = False,
    separator_id: int | None = None,
) -> ExitPredictor:
    """Fit a predictor on the CPU whose scores spread over all levels."""
    parts: list[TextExits] = []
    for seed in (0, 1):
        texts = draw(400, seed)
        if separator_id is not None:
            texts = [*texts[:200], *said_twice(texts[200:])]
        share = torch.tensor([sum(token > 7 for token in text) / len(text) for text in texts])
        deep = (share[:, None] * 5 - torch.arange(len(SPEEDS)) / 2).long().clamp(0, len(DEPTHS) - 1)
        parts.append(TextExits(*(tensor.cpu() for tensor in pack(texts)), deep))
    labels = None
    if num_labels is not None:
        labels = parts[0].exit_indices[:, 0] % num_labels
        labels = torch.nn.functional.one_hot(labels, num_labels).float() if multi_label else labels
    return fit_predictor(
        "fitted",
        parts[0],
        labels,
        parts[1],
        depths=DEPTHS,
        speeds=SPEEDS,
        num_labels=num_labels or 2,
        vocab_size=VOCAB_SIZE,
        special_ids=SPECIAL_IDS,
        multi_label=multi_label,
        ngram_order=ngram_order,
        separator_id=separator_id,
    )


def assert_equal_predictions(predictor: ExitPredictor, found: ExitPrediction, expected: ExitPrediction) -> None:
    """Sums within rounding; layers identical unless the score lies within 1e-4 of an edge."""
    scores = found.scores.cpu()
    torch.testing.assert_close(scores, expected.scores, atol=1e-5, rtol=1e-5)
    clear = ((predictor.fitted.levels.edges[..., None] - scores).abs() > 1e-4).all(dim=(0, 1))
    assert clear.float().mean() > 0.8
    assert torch.equal(found.exit_layers.cpu()[clear], expected.exit_layers[clear])
    assert found.exit_layers.dtype == torch.int64
    if expected.lexical_logits is None:
        assert found.lexical_logits is None
    else:
        assert found.lexical_logits is not None
        torch.testing.assert_close(found.lexical_logits.cpu(), expected.lexical_logits, atol=1e-5, rtol=1e-5)


# Empty, special tokens alone, one key, and two that take several tiles.
CORNERS = [[], [2, 2, 1], [7], *draw(2, 9, longest=90), [4] * 33, []]
# Long pairs, also such whose separator is beyond the first tile, with equal texts, several separators, and ends that
# would go on as the other text does if 0 came next.
CORNERS += [[*[5, 6, 7] * 13, 2, *[6, 7, 8] * 15], [4, 5, 2, 4, 5], [2, 2, 4], [4, 2], [9, 4, 2, 2, 9, 2, 4, 9]]
CORNERS += [*said_twice(draw(3, 11)), [5, 0, 2, 5], [5, 7, 0, 2, 6, 5, 7], [4, 5, 6, 9, 11, 2, 11, 4, 5, 6, 8, 9]]


@pytest.mark.parametrize(
    ("options", "speed", "quantile"),
    [
        ({"ngram_order": 1}, 0.5, 0.5),
        ({"ngram_order": 2}, 0.2, 0.7),
        ({"ngram_order": 3}, 0.8, 0.3),
        ({"ngram_order": 3, "num_labels": None}, 0.5, 0.9),
        ({"multi_label": True}, 1.0, 1.0),
        ({"num_labels": 140}, 0.0, 0.5),
        ({"ngram_order": 1, "separator_id": 2}, 0.5, 0.5),
        ({"ngram_order": 2, "separator_id": 2}, 0.2, 0.7),
        ({"ngram_order": 3, "separator_id": 2, "num_labels": None}, 0.8, 0.3),
    ],
    ids=[
        "unigrams",
        "bigrams",
        "trigrams",
        "no labels",
        "multi-label",
        "many labels, speed 0",
        "pairs, unigrams",
        "pairs, bigrams",
        "pairs, trigrams",
    ],
)
def test_fused_prediction_equals_the_predictor(options: dict[str, Any], speed: float, quantile: float) -> None:
    predictor = fit(**options)
    ids, lengths = pack([*CORNERS, *draw(12, 5)])
    expected = predictor.predict(ids.cpu(), lengths.cpu(), speed=speed, quantile=quantile)
    found = predictor.to(DEVICE, kernel="triton").predict(ids, lengths, speed=speed, quantile=quantile)
    assert_equal_predictions(predictor, found, expected)
    if 0 < speed < 1:
        assert expected.exit_layers.unique().numel() > 1


def test_a_score_on_an_edge_is_above_it_in_both() -> None:
    base = fit(num_labels=None).fitted
    # A text without keys scores the prior, to the last bit.
    on_the_prior = base.score_rows.prior[:, None].expand_as(base.levels.edges).contiguous()
    fitted = replace(base, levels=replace(base.levels, edges=on_the_prior))
    ids, lengths = pack([[]])
    expected = ExitPredictor(fitted).predict(ids.cpu(), lengths.cpu(), speed=0.5).exit_layers
    found = ExitPredictor(fitted).to(DEVICE, kernel="triton").predict(ids, lengths, speed=0.5).exit_layers
    assert found.tolist() == expected.tolist() == [DEPTHS[-1]]


@pytest.mark.parametrize("separator_id", [None, 2], ids=["single texts", "pairs"])
def test_fused_prediction_does_not_depend_on_neighbours(separator_id: int | None) -> None:
    predictor = fit(ngram_order=3, separator_id=separator_id).to(DEVICE, kernel="triton")
    texts = draw(5, 6, longest=50)
    together = predictor.predict(*pack(texts), speed=0.5)
    for place, text in enumerate(texts):
        alone = predictor.predict(*pack([text]), speed=0.5)
        for name, tensor in vars(alone).items():
            assert torch.equal(tensor[0], getattr(together, name)[place])


def test_fused_prediction_of_no_texts_is_empty_and_bad_ids_are_refused() -> None:
    predictor = fit().to(DEVICE, kernel="triton")
    found = predictor.predict(*pack([]), speed=0.5)
    assert (found.exit_layers.shape, found.scores.shape) == ((0,), (0,))
    with pytest.raises(ValueError, match=r"input_ids must be within 0..49, found 3..50"):
        predictor.predict(*pack([[3, 50]]), speed=0.5)
    with pytest.raises(ValueError, match="lengths must be >= 0"):
        predictor.predict(ints([3, 4]), ints([3]), speed=0.5)


def test_a_fused_predictor_moves_saves_and_loads_as_any(tmp_path: Path) -> None:
    predictor, fingerprint = fit(), {"model": "m"}
    fused = predictor.to(DEVICE, kernel="triton")
    one = predictor.save(tmp_path / "one.safetensors", fingerprint=fingerprint).read_bytes()
    assert fused.save(tmp_path / "two.safetensors", fingerprint=fingerprint).read_bytes() == one
    ids, lengths = (tensor.cpu() for tensor in pack(draw(5, 3)))
    back, expected = (each.predict(ids, lengths, speed=0.5) for each in (fused.to("cpu"), predictor))
    assert torch.equal(back.scores, expected.scores)


# ---------------------------------------------------------------------------------------- without Triton, without a GPU


def test_without_triton_the_reference_serves_cuda_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda _: None)
    kernels_run_on.cache_clear()
    assert [kernels_run_on("cuda"), kernels_run_on("cpu"), kernels_run_on("cuda")] == [False] * 3
    assert [record.name for record in caplog.records] == ["geep.hash_table.devices"]
    assert "geep[gpu]" in caplog.text
    monkeypatch.undo()
    kernels_run_on.cache_clear()
    assert kernels_run_on("cuda")


@pytest.mark.parametrize("module", ["triton", "triton_bags"])
def test_without_triton_the_kernels_say_what_to_install(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("triton", "triton_bags"):
        monkeypatch.delitem(sys.modules, f"geep.hash_table.{name}", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'geep\[gpu\]'"):
        __import__(f"geep.hash_table.{module}")


def test_compiled_kernels_need_a_gpu_to_run_and_none_to_compile(tmp_path: Path) -> None:
    """A process in which Triton compiles: to the code of a GPU, without locks, and without barriers in the walks."""
    code = """
import sys
import geep.engine
assert "geep.hash_table.triton" not in sys.modules, "kernels are for those who ask for them"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from geep.hash_table import triton_bags, triton as table

try:
    table.TritonHashTable(8, device="cpu")
except ValueError as err:
    print(err)

FLOATS = {"base", "edges", "text_scores", "text_outputs"}
NUMBERS = {"slot_mask", "stride", "width", "separator"}

def ptx(kernel, constants, **types):
    for name in kernel.arg_names:
        is_number = name in NUMBERS or name.startswith("num_")
        types.setdefault(name, "*fp32" if name in FLOATS else "i32" if is_number else "*i64")
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1}).asm["ptx"]

found = ptx(table._find_kernel, {"OF_VALUES": True, "TILE": table._TILE})
assert "bar.sync" not in found and "atom" not in found
inserted = ptx(table._insert_kernel, {"TILE": table._TILE})
assert "bar.sync" not in inserted and "relaxed.max.s64" in inserted
constants = {"SYMBOL_BITS": 18, "SIZE_SHIFT": 54, "PLACES": 32, "COLUMNS": 8, "EDGES": 16}
constants |= {"SHARED_SHIFT": 56, "BUCKETS": 16}
separator = f"[_reduce_kernel_param_{triton_bags._reduce_kernel.arg_names.index('separator')}"
for runs, order in ((1, 3), (2, 1), (2, 3)):
    found = ptx(triton_bags._reduce_kernel, constants | {"RUNS": runs, "ORDER": order}, is_key="*i1", rows="*fp32")
    assert "atom." not in found
    # Where texts are one run nobody looks for a separator.
    assert (separator in found) == (runs == 2)
print("compiled")
"""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "run on CUDA devices, got cpu" in done.stdout
    assert "compiled" in done.stdout


# --------------------------------------------------------------------------------------------------- on a real GPU only


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("batches", [1, 7])
def test_a_million_keys_at_load_nine_tenths_equal_the_reference(batches: int) -> None:
    capacity = 1 << 20
    count = int(0.9 * capacity)
    keys = torch.randperm(4 * count, generator=torch.Generator().manual_seed(0))[:count] * ((1 << 40) + 1)
    table, reference = TritonHashTable(capacity, max_load_factor=0.9), HashTable(capacity, max_load_factor=0.9)
    reference.insert_or_assign(keys, keys ^ 5)
    for part in keys.cuda().chunk(batches):
        table.insert_or_assign(part, part ^ 5)
    assert (table.capacity, len(table)) == (capacity, count)
    assert same_bytes(table, reference)
    assert torch.equal(table.find(keys.cuda()).cpu(), keys ^ 5)
    assert bool((table.find(keys.cuda() + 1) == reference.find(keys + 1).cuda()).all())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("separator_id", [None, 2], ids=["single texts", "pairs"])
def test_thousands_of_texts_are_predicted_on_the_gpu_as_on_the_cpu(separator_id: int | None) -> None:
    predictor = fit(ngram_order=3, separator_id=separator_id)
    ids, lengths = pack(draw(20_000, 8, longest=80))
    moved = predictor.to("cuda")
    assert type(moved.table.keys.ngrams) is TritonHashTable
    expected = predictor.predict(ids.cpu(), lengths.cpu(), speed=0.5)
    assert_equal_predictions(predictor, moved.predict(ids, lengths, speed=0.5), expected)
    unfused = predictor.to("cuda", kernel="none").predict(ids, lengths, speed=0.5)
    assert_equal_predictions(predictor, unfused, expected)


@pytest.mark.gpu
@needs_gpu
def test_the_table_moves_to_the_gpu_and_back() -> None:
    table = HashTable(64)
    table.insert_or_assign(torch.arange(40) * 977, torch.arange(40))
    moved = on_device(table, "cuda")
    assert type(moved) is TritonHashTable
    moved.insert_or_assign(ints([5]), ints([6]))
    table.insert_or_assign(torch.tensor([5]), torch.tensor([6]))
    assert same_bytes(on_device(moved, "cpu"), table)
    assert int((moved.slots[0] == EMPTY_KEY).sum()) == moved.capacity - 41
