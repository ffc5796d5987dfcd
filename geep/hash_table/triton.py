"""The hash table in Triton: the bytes of `cpu.py`, made by as many threads as a GPU has.

The walk of `cpu.py`, one lane a key, without locks. A walking key and the resident of a slot are compared and swapped
by one `atomic_max`: the larger of the two is in the slot afterwards, the smaller one walks on in the lane. Shun and
Blelloch ("Phase-concurrent hash tables for determinism", SPAA 2014) do this with a compare-and-swap that is repeated
when it fails. The maximum is the same step and never fails, and in Triton it can be masked, which `atomic_cas` cannot.

Invariant: in a phase of insertions a slot's key only grows, and every key that ever stood before a slot on its walk
was put to its maximum. So when the last lane stops, the slots hold the one layout of `cpu.py`, in whatever order the
lanes ran. The order of memory accesses between slots does not matter to this; therefore the atomics are relaxed.

Values follow in a second phase, after the kernel has ended: see `TritonHashTable`. Searches write nothing.

The module needs Triton, and a GPU unless Triton's interpreter was chosen before the import. Read `_home`, `_walk`,
`_insert_kernel`, then `TritonHashTable`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from geep.hash_table import cpu

try:
    import triton
    import triton.language as tl
except ImportError as err:
    raise ImportError("The hash table's kernels need Triton, which is not installed: pip install 'geep[gpu]'.") from err

EMPTY_KEY = tl.constexpr(cpu.EMPTY_KEY)
MISSING = tl.constexpr(cpu.MISSING)

# Multipliers of the splitmix64 finaliser, see `cpu.py`; unsigned here, for an unsigned shift fills with zeros.
_MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)

# A tile is one warp: its lanes agree to stop by shuffles, without a barrier. Two keys a lane overlap their loads.
_TILE = 64
_WARPS = 1


@triton.jit
def _home(key: tl.tensor, slot_mask: tl.tensor) -> tl.tensor:
    """Return the slot where the walk of an int64 key begins: splitmix64, cut to the capacity."""
    bits = key.to(tl.uint64, bitcast=True)
    bits = (bits ^ (bits >> 30)) * _MULTIPLIER_1
    bits = (bits ^ (bits >> 27)) * _MULTIPLIER_2
    bits = bits ^ (bits >> 31)
    return (bits & slot_mask.to(tl.uint64)).to(tl.int64)


@triton.jit
def find_in_slots(slot_keys: tl.tensor, key: tl.tensor, wanted: tl.tensor, slot_mask: tl.tensor) -> tl.tensor:
    """Return the slot of each key of a one-dimensional tile, `MISSING` where it is absent or not `wanted`.

    The walk of a key ends at itself or at a smaller resident, which it would have displaced; at least one slot is
    free, so it ends. Negative keys do not walk.
    """
    slot = _home(key, slot_mask)
    found = tl.full(key.shape, MISSING, tl.int64)
    walking = wanted & (key >= 0)
    while tl.max(walking.to(tl.int32), axis=0) > 0:
        resident = tl.load(slot_keys + slot, mask=walking, other=EMPTY_KEY)
        found = tl.where(walking & (resident == key), slot, found)
        walking = walking & (resident > key)
        slot = (slot + 1) & slot_mask
    return found


@triton.jit(do_not_specialize=["num_keys", "slot_mask"])
def _find_kernel(
    slot_keys: tl.tensor,
    slot_values: tl.tensor,
    keys: tl.tensor,
    answers: tl.tensor,
    num_keys: tl.tensor,
    slot_mask: tl.tensor,
    OF_VALUES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write the value of each key, or the slot of each; `MISSING` where the key is absent."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = place < num_keys
    key = tl.load(keys + place, mask=inside, other=EMPTY_KEY)
    found = find_in_slots(slot_keys, key, inside, slot_mask)
    if OF_VALUES:
        found = tl.load(slot_values + found, mask=found >= 0, other=MISSING)
    tl.store(answers + place, found, mask=inside)


@triton.jit(do_not_specialize=["num_keys", "slot_mask"])
def _insert_kernel(
    slot_keys: tl.tensor, keys: tl.tensor, num_keys: tl.tensor, slot_mask: tl.tensor, TILE: tl.constexpr
) -> None:
    """Let the keys and whatever they displace walk until each has a slot; the table must have room for all."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    key = tl.load(keys + place, mask=place < num_keys, other=EMPTY_KEY)
    slot = _home(key, slot_mask)
    walking = key != EMPTY_KEY
    while tl.max(walking.to(tl.int32), axis=0) > 0:
        resident = tl.atomic_max(slot_keys + slot, key, mask=walking, sem="relaxed")
        # A free slot ends the walk, and so would the key itself.
        walking = walking & (resident != EMPTY_KEY) & (resident != key)
        key = tl.where(walking, tl.minimum(resident, key), key)
        slot = (slot + 1) & slot_mask


class TritonHashTable(cpu.HashTable):
    """`HashTable` by kernels on a CUDA device: the same bytes, the same errors but one.

    Invariant of an insertion: the kernel places keys and touches no value, so until it has ended the value of slot s
    belongs to the key that stood there before. A slot has another key than before if and only if that key is one of
    the batch or a resident that was displaced. Both are looked up again and write their value; all other values are
    right where they are. The slots before are kept for this, so an insertion costs one copy of the keys of the whole
    table: insert in large batches.

    `find` does not wait for the device: it cannot see that a key is negative, and answers `MISSING` for it.

    Args:
        capacity: As in `HashTable`.
        max_load_factor: As in `HashTable`.
        device: A CUDA device; the CPU only in Triton's interpreter.

    Raises:
        ValueError: If the kernels cannot run on `device`, and as in `HashTable`.
    """

    def __init__(
        self, capacity: int = 1024, *, max_load_factor: float = cpu.MAX_LOAD_FACTOR, device: torch.device | str = "cuda"
    ) -> None:
        check_device(torch.device(device))
        super().__init__(capacity, max_load_factor=max_load_factor, device=device)

    def find(self, keys: Tensor) -> Tensor:
        """Return the value of each key, `MISSING` where the key is absent or negative.

        Args:
            keys: int64, shape (num_keys,). Equal keys are allowed.

        Returns:
            Values, int64, shape (num_keys,).

        Raises:
            TypeError: If `keys` is not int64.
            ValueError: If `keys` is not flat or is on another device.
        """
        self._check("keys", keys)
        return self._search(keys, of_values=True)

    def _find_slots(self, keys: Tensor) -> Tensor:
        return self._search(keys, of_values=False)

    def _search(self, keys: Tensor, *, of_values: bool) -> Tensor:
        keys = keys.contiguous()
        answers = torch.empty_like(keys)
        with on_device_of(keys):
            _find_kernel[_grid(keys)](
                *self.slots,
                keys,
                answers,
                keys.numel(),
                self.capacity - 1,
                OF_VALUES=of_values,
                TILE=_TILE,
                num_warps=_WARPS,
            )
        return answers

    def _insert_absent(self, keys: Tensor, values: Tensor) -> None:
        before = self._keys.clone()
        keys = keys.contiguous()
        with on_device_of(keys):
            _insert_kernel[_grid(keys)](self._keys, keys, keys.numel(), self.capacity - 1, TILE=_TILE, num_warps=_WARPS)
        moved = torch.nonzero((before != cpu.EMPTY_KEY) & (before != self._keys))[:, 0]
        keys = torch.cat([keys, before[moved]])
        # The values of the moved keys are read before any is written.
        values = torch.cat([values, self._values[moved]])
        self._values[self._find_slots(keys)] = values


def check_device(device: torch.device) -> None:
    """Refuse a device that the kernels of this process cannot run on.

    Raises:
        ValueError: If the device is not CUDA and Triton does not interpret.
    """
    compiled = isinstance(_find_kernel, triton.JITFunction)
    if compiled and device.type != "cuda":
        raise ValueError(
            f"The Triton kernels run on CUDA devices, got {device}; use geep.hash_table.HashTable there, or set "
            "TRITON_INTERPRET=1 before the import to try the kernels out slowly."
        )


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's device the current one, where Triton launches; nothing happens for the CPU."""
    return torch.cuda.device_of(tensor)


def _grid(items: Tensor) -> tuple[int]:
    return (triton.cdiv(items.numel(), _TILE),)
