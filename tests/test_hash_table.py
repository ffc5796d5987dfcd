"""The table equals a dict, its bytes depend on its contents alone, and damaged bytes are refused."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from geep.hash_table import EMPTY_KEY, MISSING, HashTable, on_device
from geep.hash_table.cpu import _hash

LARGEST = (1 << 63) - 1
# Few different keys make duplicates and reassignments, the others reach all 63 bits.
KEYS = st.one_of(st.integers(0, 40), st.integers(0, LARGEST))
PAIRS = st.lists(st.tuples(KEYS, st.integers(0, LARGEST)), max_size=120)


def ints(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def insert(table: HashTable, pairs: list[tuple[int, int]]) -> HashTable:
    table.insert_or_assign(ints([key for key, _ in pairs]), ints([value for _, value in pairs]))
    return table


def same_bytes(one: HashTable, other: HashTable) -> bool:
    return all(torch.equal(tensor, other.state()[name]) for name, tensor in one.state().items())


def splitmix_finaliser(bits: int) -> int:
    mask = (1 << 64) - 1
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
    return bits ^ (bits >> 31)


def colliding_keys(count: int, capacity: int) -> list[int]:
    """Return keys whose home is the last slot, so that their walk goes round the end."""
    keys = torch.arange(count * capacity * 4)
    found = keys[(_hash(keys) & (capacity - 1)) == capacity - 1][:count]
    assert found.numel() == count
    return found.tolist()


@given(KEYS)
@settings(deadline=None, max_examples=100)
def test_hash_is_the_splitmix64_finaliser(key: int) -> None:
    assert int(_hash(ints([key]))[0]) % (1 << 64) == splitmix_finaliser(key)


@given(st.lists(PAIRS, max_size=4), st.integers(1, 200), st.sampled_from([0.3, 0.8, 0.95]), st.lists(KEYS, max_size=30))
@settings(deadline=None, max_examples=80)
def test_table_equals_a_dict(
    batches: list[list[tuple[int, int]]], capacity: int, max_load_factor: float, others: list[int]
) -> None:
    table, expected = HashTable(capacity, max_load_factor=max_load_factor), {}
    for batch in batches:
        insert(table, batch)
        expected.update(batch)
    wanted = [*expected, *others, *expected]
    assert table.find(ints(wanted)).tolist() == [expected.get(key, MISSING) for key in wanted]
    assert len(table) == len(expected)
    assert table.load_factor == len(expected) / table.capacity <= max_load_factor
    assert table.capacity & (table.capacity - 1) == 0


@given(PAIRS, st.randoms(use_true_random=False), st.integers(1, 40))
@settings(deadline=None, max_examples=80)
def test_layout_depends_on_the_set_of_pairs_alone(pairs: list[tuple[int, int]], random: Random, step: int) -> None:
    distinct = list(dict(pairs).items())
    shuffled = list(distinct)
    random.shuffle(shuffled)
    whole, split = insert(HashTable(1), distinct), HashTable(1)
    for start in range(0, len(shuffled), step):
        insert(split, shuffled[start : start + step])
    assert whole.capacity == split.capacity
    assert same_bytes(whole, split)


@given(PAIRS)
@settings(deadline=None, max_examples=40)
def test_layout_is_the_first_slot_that_no_larger_key_holds(pairs: list[tuple[int, int]]) -> None:
    table = insert(HashTable(1, max_load_factor=0.95), pairs)
    slots = [(EMPTY_KEY, MISSING)] * table.capacity
    for key, value in sorted(dict(pairs).items(), reverse=True):
        slot = splitmix_finaliser(key) % table.capacity
        while slots[slot][0] != EMPTY_KEY:
            slot = (slot + 1) % table.capacity
        slots[slot] = (key, value)
    state = table.state()
    assert list(zip(state["keys"].tolist(), state["values"].tolist(), strict=True)) == slots


@pytest.mark.parametrize("capacity", [16, 256, 1024])
@pytest.mark.parametrize("load_factor", [0.5, 0.95, 0.99])
def test_full_tables_and_walks_round_the_end_work(capacity: int, load_factor: float) -> None:
    count = int(capacity * load_factor)
    near = colliding_keys(count // 2, capacity)
    keys = near + [LARGEST - number for number in range(count - len(near))]
    table = insert(HashTable(capacity, max_load_factor=load_factor), [(key, index) for index, key in enumerate(keys)])
    assert (table.capacity, len(table)) == (capacity, count)
    assert table.find(ints(keys)).tolist() == list(range(count))
    absent = [key + capacity * 4 * capacity for key in near]
    assert table.find(ints(absent)).tolist() == [MISSING] * len(absent)
    backwards = HashTable(capacity, max_load_factor=load_factor)
    for part in torch.arange(count).flip(0).split(max(1, capacity // 16)):
        backwards.insert_or_assign(ints(keys)[part], part)
    assert same_bytes(table, backwards)


def test_last_of_equal_keys_wins_in_a_batch_and_between_batches() -> None:
    table = insert(HashTable(4), [(7, 1), (9, 5), (7, 2), (7, 3)])
    assert table.find(ints([7, 9])).tolist() == [3, 5]
    assert insert(table, [(9, 6)]).find(ints([9])).tolist() == [6]
    assert len(table) == 2


def test_capacity_is_rounded_up_and_doubles_when_needed() -> None:
    table = HashTable(100)
    assert (table.capacity, table.load_factor, len(table), table.max_load_factor) == (128, 0.0, 0, 0.5)
    insert(table, [(key, key) for key in range(64)])
    assert table.capacity == 128
    insert(table, [(1000, 1)])
    assert table.capacity == 256
    assert HashTable(1).capacity == 1
    assert insert(HashTable(1), [(0, 0)]).capacity == 2


def test_empty_batches_change_nothing() -> None:
    table = insert(HashTable(8), [])
    assert table.find(ints([])).shape == (0,)
    assert table.find(ints([3])).tolist() == [MISSING]
    assert table.state()["keys"].tolist() == [EMPTY_KEY] * 8
    insert(table, [(3, 4)])
    assert same_bytes(insert(table, []), insert(HashTable(8), [(3, 4)]))


@given(PAIRS)
@settings(deadline=None, max_examples=40)
def test_state_makes_the_same_table_again(pairs: list[tuple[int, int]]) -> None:
    table = insert(HashTable(16), pairs)
    again = HashTable.from_state(table.state())
    assert same_bytes(table, again)
    assert (len(again), again.capacity) == (len(table), table.capacity)
    insert(again, [(41, 1)])
    assert same_bytes(again, insert(table, [(41, 1)]))
    assert same_bytes(on_device(table, "cpu"), table)


def test_a_table_filled_as_they_once_were_still_loads_and_stays_as_it_is() -> None:
    former = insert(HashTable(16, max_load_factor=0.8), [(key, key + 1) for key in range(12)])
    again = HashTable.from_state(former.state())
    assert same_bytes(again, former)
    assert again.find(ints([0, 11, 12])).tolist() == [1, 12, MISSING]
    assert insert(again, [(99, 1)]).capacity == 32
    assert again.max_load_factor == 0.8
    with pytest.raises(ValueError, match=r"Found 12 keys in 16 slots, expected a load factor of at most 0\.5"):
        HashTable.from_state(former.state(), max_load_factor=0.5)


def test_state_is_a_copy() -> None:
    table = insert(HashTable(8), [(1, 2)])
    state = table.state()
    state["keys"].fill_(5)
    on_device(table, "cpu").insert_or_assign(ints([1]), ints([9]))
    assert table.find(ints([1])).tolist() == [2]


def damaged(change: str) -> dict[str, Tensor]:
    """Return the state of a small table with one thing wrong."""
    state = insert(HashTable(16), [(key, key) for key in range(10)]).state()
    keys, values = state["keys"], state["values"]
    used, free = torch.nonzero(keys >= 0)[:, 0], torch.nonzero(keys < 0)[:, 0]
    if change == "name":
        state["more"] = keys
    elif change == "length":
        state = {"keys": keys[:15], "values": values[:15]}
    elif change == "empty":
        state = {"keys": keys[:0], "values": values[:0]}
    elif change == "shapes":
        state["values"] = values[:8]
    elif change == "negative key":
        keys[used[0]] = -7
    elif change == "negative value":
        values[used[0]] = -7
    elif change == "value without key":
        values[free[0]] = 3
    elif change == "key without value":
        values[used[0]] = MISSING
    elif change == "moved":
        keys[free[0]], values[free[0]] = keys[used[0]].clone(), values[used[0]].clone()
        keys[used[0]], values[used[0]] = EMPTY_KEY, MISSING
    elif change == "duplicate":
        keys[free[0]], values[free[0]] = keys[used[0]].clone(), 3
    elif change == "rotated":
        state = {name: tensor.roll(1) for name, tensor in state.items()}
    elif change == "full":
        keys[free], values[free] = 77, 1
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("name", "Found tensors"),
        ("length", "power of two"),
        ("empty", "power of two"),
        ("shapes", "power of two"),
        ("negative key", "negative key"),
        ("negative value", "negative key"),
        ("value without key", "value without a key"),
        ("key without value", "key without a value"),
        ("moved", "does not reach"),
        ("duplicate", "does not reach"),
        ("rotated", "does not reach"),
        ("full", "load factor"),
    ],
)
def test_damaged_state_is_refused(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HashTable.from_state(damaged(change))


def test_wrong_arguments_are_refused() -> None:
    table = insert(HashTable(4), [(1, 1)])
    before = table.state()
    for keys, values, error, message in [
        (ints([2, -1]), ints([1, 1]), ValueError, "keys must be >= 0, got -1"),
        (ints([2]), ints([-3]), ValueError, "values must be >= 0, got -3"),
        (ints([2]), ints([1, 2]), ValueError, "1 keys came with 2 values"),
        (ints([[2]]), ints([[1]]), ValueError, "must be flat"),
        (torch.tensor([2], dtype=torch.int32), ints([1]), TypeError, "keys must be torch.int64"),
        (ints([2]).to("meta"), ints([1]), ValueError, "keys are on meta"),
    ]:
        with pytest.raises(error, match=message):
            table.insert_or_assign(keys, values)
    assert torch.equal(table.state()["keys"], before["keys"])
    with pytest.raises(ValueError, match="must be >= 0"):
        table.find(ints([-1]))
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        HashTable(0)
    with pytest.raises(ValueError, match="max_load_factor must be inside"):
        HashTable(8, max_load_factor=1.0)
    with pytest.raises(TypeError, match="keys of the state"):
        HashTable.from_state({"keys": before["keys"].int(), "values": before["values"]})
