"""The reference hash table: open addressing whose layout is a function of the set of keys alone.

Linear probing with priority by key, after Shun and Blelloch, "Phase-concurrent hash tables for determinism" (SPAA
2014): on its way from its home slot a key passes larger keys and displaces the first smaller one, which walks on. So
every slot between a key's home and its place holds a larger key, and there is exactly one such layout for a set of
keys and a capacity. Insertion order, batch splits, number of threads and device leave no trace in the bytes.

All work is done in rounds over whole tensors: in each round every walking key looks at one slot, `amax` decides who
stays there, the others take one step. A round costs a few tensor operations, the number of rounds is the longest walk.

The room refuses to know what a key means. Read `HashTable`, then `_hash`.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

EMPTY_KEY = -1
"""Key of a free slot: smaller than every key, so that each key displaces it and each search stops at it."""

MISSING = -1
"""What `HashTable.find` answers for a key that is absent, and the value of a free slot."""

# Multipliers of the splitmix64 finaliser (Steele, Lea and Flood, OOPSLA 2014), as signed 64-bit numbers.
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)

# Searches decide, for a table is built once: they take the longer the fuller it is, on a GPU four times at .9 as at .5.
MAX_LOAD_FACTOR = 0.5
_FORMER_MAX_LOAD_FACTOR = 0.8


class HashTable:
    """Map int64 keys >= 0 to int64 values >= 0, a batch at a time.

    Invariant: `state()` is a function of the set of (key, value) pairs and of the capacity, whatever the order and the
    batches of the insertions. The capacity itself is the smallest power of two, at least the one asked for, that holds
    the keys at `max_load_factor`.

    Searches change nothing and may run at the same time; an insertion must run alone.

    Args:
        capacity: Slots to begin with; rounded up to a power of two.
        max_load_factor: Share of slots in use beyond which the capacity doubles, inside (0, 1): one slot always stays
            free, which is where a search ends.
        device: Where the slots live. Keys and values given to the table must be there too.

    Raises:
        ValueError: If `capacity` is below 1 or `max_load_factor` outside (0, 1).
    """

    def __init__(
        self, capacity: int = 1024, *, max_load_factor: float = MAX_LOAD_FACTOR, device: torch.device | str = "cpu"
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}; leave it out for the default.")
        if not 0.0 < max_load_factor < 1.0:
            raise ValueError(
                f"max_load_factor must be inside (0, 1), got {max_load_factor}; {MAX_LOAD_FACTOR} is a good value."
            )
        self._max_load_factor = max_load_factor
        self._len = 0
        self._keys, self._values = _empty_slots(1 << (capacity - 1).bit_length(), torch.device(device))

    def __len__(self) -> int:
        return self._len

    @property
    def capacity(self) -> int:
        """Number of slots, a power of two."""
        return self._keys.numel()

    @property
    def load_factor(self) -> float:
        """Share of slots in use, at most `max_load_factor`."""
        return self._len / self.capacity

    @property
    def max_load_factor(self) -> float:
        """Share of slots in use beyond which the capacity doubles."""
        return self._max_load_factor

    @property
    def device(self) -> torch.device:
        """Where the slots live."""
        return self._keys.device

    @property
    def slots(self) -> tuple[Tensor, Tensor]:
        """The keys and values of the slots, int64, shape (capacity,): no copies, for kernels that search and not write.

        An insertion may put other tensors in their place.
        """
        return self._keys, self._values

    def insert_or_assign(self, keys: Tensor, values: Tensor) -> None:
        """Store `values` under `keys`, in place of what was stored there; of equal keys in the batch the last one wins.

        Nothing is stored if an error is raised.

        Args:
            keys: Keys >= 0, int64, shape (num_keys,).
            values: Values >= 0, int64, shape (num_keys,).

        Raises:
            TypeError: If a tensor is not int64.
            ValueError: If a shape differs, a key or value is negative, or a tensor is on another device.
        """
        for name, tensor in (("keys", keys), ("values", values)):
            self._check(name, tensor)
            _check_not_negative(name, tensor)
        if keys.shape != values.shape:
            raise ValueError(f"{keys.numel()} keys came with {values.numel()} values; give one value for each key.")
        if not keys.numel():
            return
        keys, values = _last_of_equal(keys, values)
        slots = self._find_slots(keys)
        known = slots >= 0
        self._values[slots[known]] = values[known]
        keys, values = keys[~known], values[~known]
        self._reserve(self._len + keys.numel())
        self._insert_absent(keys, values)
        self._len += keys.numel()

    def find(self, keys: Tensor) -> Tensor:
        """Return the value of each key, `MISSING` where the key is absent.

        Args:
            keys: Keys >= 0, int64, shape (num_keys,). Equal keys are allowed.

        Returns:
            Values, int64, shape (num_keys,).

        Raises:
            TypeError: If `keys` is not int64.
            ValueError: If `keys` is not flat, holds a negative key, or is on another device.
        """
        self._check("keys", keys)
        _check_not_negative("keys", keys)
        slots = self._find_slots(keys)
        return torch.where(slots >= 0, self._values[slots.clamp(min=0)], MISSING)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the slots: `keys` and `values`, int64, shape (capacity,), free slots (-1, -1)."""
        return {"keys": self._keys.clone(), "values": self._values.clone()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], *, max_load_factor: float | None = None) -> Self:
        """Return the table whose `state()` this is, on the device of its tensors.

        Every slot is checked first, so that a table from a damaged file is refused rather than searched.

        Args:
            state: `keys` and `values`, int64, shape (capacity,).
            max_load_factor: As in the constructor; at least the load factor of the state. None: the constructor's
                default, or for a table that is fuller the former one, 0.8.

        Raises:
            TypeError: If a tensor is not int64.
            ValueError: If a name or shape is off, a value does not belong to a key, the table is too full, or a key
                would not be found where it lies.
        """
        advice = "; the state is damaged or not a hash table's, build the table anew."
        if set(state) != {"keys", "values"}:
            raise ValueError(f"Found tensors {sorted(state)} in the state, expected ['keys', 'values']{advice}")
        keys, values = state["keys"], state["values"]
        for name, tensor in state.items():
            if tensor.dtype != torch.int64:
                raise TypeError(f"{name} of the state must be torch.int64, found {tensor.dtype}{advice}")
        capacity = keys.numel()
        if keys.ndim != 1 or keys.shape != values.shape or capacity & (capacity - 1) or not capacity:
            raise ValueError(
                f"Found keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)}, expected the same "
                f"power of two for both{advice}"
            )
        used = keys != EMPTY_KEY
        if bool((keys < EMPTY_KEY).any()) or bool(((values >= 0) != used).any()) or bool((values < MISSING).any()):
            raise ValueError(
                "Found a negative key, a key without a value or a value without a key, expected pairs >= 0 and free "
                f"slots ({EMPTY_KEY}, {MISSING}){advice}"
            )
        length = int(used.sum())
        if max_load_factor is None:
            max_load_factor = MAX_LOAD_FACTOR if length <= capacity * MAX_LOAD_FACTOR else _FORMER_MAX_LOAD_FACTOR
        table = cls(capacity, max_load_factor=max_load_factor, device=keys.device)
        table._len = length
        if table._len > capacity * max_load_factor:
            raise ValueError(
                f"Found {table._len} keys in {capacity} slots, expected a load factor of at most {max_load_factor}; "
                "give the max_load_factor that the table was built with."
            )
        table._keys, table._values = keys.clone(), values.clone()
        places = torch.nonzero(used)[:, 0]
        # A second copy of a key is found at the first one's slot, so this also refuses duplicates.
        if not torch.equal(table._find_slots(keys[places]), places):
            raise ValueError(f"Found a key that a search does not reach, expected every key on its probe path{advice}")
        return table

    @classmethod
    def copy_of(cls, table: HashTable, device: torch.device | str) -> Self:
        """Return a table of this class on `device` with the bytes of `table`, whatever class that is of."""
        copy = cls(table.capacity, max_load_factor=table._max_load_factor, device=device)
        copy._keys.copy_(table._keys)
        copy._values.copy_(table._values)
        copy._len = table._len
        return copy

    def _check(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be torch.int64, got {tensor.dtype}; convert them with .long().")
        if tensor.ndim != 1:
            raise ValueError(f"{name} must be flat, shape (num_keys,), got shape {tuple(tensor.shape)}.")
        if tensor.device != self.device:
            raise ValueError(f"{name} are on {tensor.device}, the table on {self.device}; move one of them.")

    def _reserve(self, num_keys: int) -> None:
        """Double the capacity until it holds `num_keys`, and lay the stored keys out again."""
        capacity = self.capacity
        while num_keys > capacity * self._max_load_factor:
            capacity *= 2
        if capacity != self.capacity:
            used = self._keys != EMPTY_KEY
            keys, values = self._keys[used], self._values[used]
            self._keys, self._values = _empty_slots(capacity, self.device)
            self._insert_absent(keys, values)

    def _find_slots(self, keys: Tensor) -> Tensor:
        """Return the slot of each key, -1 where the key is absent."""
        slots = torch.full_like(keys, -1)
        walking = torch.arange(keys.numel(), device=keys.device)
        slot = _hash(keys) & (self.capacity - 1)
        while walking.numel():
            wanted, resident = keys[walking], self._keys[slot]
            # A smaller resident ends the walk: the key would have displaced it.
            hit, on = resident == wanted, resident > wanted
            slots[walking[hit]] = slot[hit]
            walking, slot = walking[on], (slot[on] + 1) & (self.capacity - 1)
        return slots

    def _insert_absent(self, keys: Tensor, values: Tensor) -> None:
        """Lay out distinct keys that are absent, in a table that has room for them."""
        slot = _hash(keys) & (self.capacity - 1)
        while keys.numel():
            before = self._keys[slot]
            self._keys.scatter_reduce_(0, slot, keys, "amax")
            won = self._keys[slot] == keys
            # Exactly one key wins a slot, so each displaced pair is picked up once, before its value is overwritten.
            displaced = won & (before != EMPTY_KEY)
            next_keys = torch.cat([keys[~won], before[displaced]])
            next_values = torch.cat([values[~won], self._values[slot[displaced]]])
            self._values[slot[won]] = values[won]
            slot = (torch.cat([slot[~won], slot[displaced]]) + 1) & (self.capacity - 1)
            keys, values = next_keys, next_values


def _check_not_negative(name: str, tensor: Tensor) -> None:
    if bool((tensor < 0).any()):
        raise ValueError(f"{name} must be >= 0, got {int(tensor.min())}; negative numbers mark free slots.")


def _empty_slots(capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    free = torch.full((capacity,), EMPTY_KEY, dtype=torch.int64, device=device)
    return free, torch.full_like(free, MISSING)


def _last_of_equal(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keep one pair of each key, the last in the batch."""
    keys, order = torch.sort(keys, stable=True)
    is_last = torch.ones_like(keys, dtype=torch.bool)
    is_last[:-1] = keys[1:] != keys[:-1]
    return keys[is_last], values[order[is_last]]


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Shift 64 bits to the right and fill with zeros; torch's own shift of int64 repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _hash(keys: Tensor) -> Tensor:
    """Mix 64 bits with the splitmix64 finaliser, a bijection; int64 products wrap around as unsigned ones do."""
    bits = (keys ^ _shift_right(keys, 30)) * _MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)
