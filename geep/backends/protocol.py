"""What every backend offers, and the records that pass between it and the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedConfig

from geep.modeling import first_lengths_packed

Integers = NDArray[np.int64]

# Dtypes of the backends that compute in the model's own dtype, by kind of device, the default first. float16 is left
# out on CPUs, which have no fast kernels for it.
FLOAT_DTYPES: Mapping[str, tuple[str, ...]] = {
    "cpu": ("float32", "bfloat16"),
    "cuda": ("bfloat16", "float16", "float32"),
    "other": ("float32", "bfloat16", "float16"),
}


# The dtype of a model that is cast as a whole.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Token ids of several texts, one after another, without padding; on the host.

    Attributes:
        input_ids: Shape (num_tokens,).
        token_type_ids: Segment ids, shape (num_tokens,); None where every token has segment 0.
        lengths: Tokens of each text, shape (num_texts,); they sum to num_tokens.
    """

    input_ids: Integers
    token_type_ids: Integers | None
    lengths: Integers

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, rows: Integers) -> TokenBatch:
        """Return the texts at `rows`, in that order."""
        tokens = token_positions(self.lengths, rows)
        types = self.token_type_ids
        return TokenBatch(self.input_ids[tokens], None if types is None else types[tokens], self.lengths[rows])

    def firsts(self, separator_id: int | None) -> Integers | None:
        """Tokens of the first text of each pair, (num_texts,), as `first_lengths_packed` counts; None without an id."""
        if separator_id is None:
            return None
        ids, lengths = torch.from_numpy(self.input_ids), torch.from_numpy(self.lengths)
        return first_lengths_packed(ids, lengths, separator_id).numpy()

    @classmethod
    def concat(cls, batches: Sequence[TokenBatch]) -> TokenBatch:
        """Put texts one after another; batches without segment ids count as segment 0."""
        types = [batch.token_type_ids for batch in batches]
        return cls(
            np.concatenate([batch.input_ids for batch in batches]),
            None
            if all(part is None for part in types)
            else np.concatenate(
                [
                    np.zeros_like(batch.input_ids) if part is None else part
                    for batch, part in zip(batches, types, strict=True)
                ]
            ),
            np.concatenate([batch.lengths for batch in batches]),
        )


def token_positions(lengths: Integers, rows: Integers) -> Integers:
    """Positions, in a packed batch of texts of these lengths, of the tokens of the texts at `rows`, in order."""
    starts = (np.cumsum(lengths) - lengths)[rows]
    counts = lengths[rows]
    first = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - first, counts)


class LiveTexts(Protocol):
    """Texts on their way through the encoder; what else it holds is the backend's business. Never changed in place."""

    @property
    def lengths(self) -> Integers:
        """Tokens of each text that may run further layers, shape (num_texts,)."""


Live = TypeVar("Live", bound=LiveTexts)


class Backend(Protocol[Live]):
    """Runs an encoder layer by layer on a shrinking prefix of texts.

    Invariant, tested for every row of `BACKENDS`: whatever the batch, the prefix lengths, the selections and the
    mergers on the way, the logits of a text at a layer equal those of the Hugging Face model run on that text alone,
    within the tolerance of the dtype (docs/design.md).

    Attributes:
        keeps_above: Share of a batch's tokens. Where texts leave it one by one, those that go on are picked out
            (`select`) once they have so few of the tokens left, or fewer; until then texts that are answered already
            run along. 1: at once.
    """

    keeps_above: ClassVar[float]

    @classmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Whether the backend runs encoders with this config: its family, and every switch that changes a layer."""

    @classmethod
    def dtypes(cls, device_type: str) -> tuple[str, ...]:
        """Dtypes ("float32", "bfloat16", "float16", "int8") it runs on a kind of device, its default first."""

    @classmethod
    def model_dtype(cls, dtype: str, device_type: str) -> torch.dtype:
        """Dtype that a model must have to be built in one of `dtypes`; float32 where the backend rounds by itself."""

    @classmethod
    def build(cls, model: object, *, dtype: str, ranges: object = None) -> Self:
        """Take a model that is on its device, in eval mode, in the `model_dtype` of `dtype`.

        `ranges` are the `ActivationRanges` of the model, for backends that quantise by observed ranges.
        """

    def start(self, batch: TokenBatch) -> Live:
        """Embed texts."""

    def advance(self, live: Live, layer: int, num_texts: int, *, continuing: int | None = None) -> Live:
        """Run layer `layer` (counted from 1) on the first `num_texts` texts; the others are let go.

        Args:
            live: The texts.
            layer: The layer.
            num_texts: How many texts run it.
            continuing: How many of them may run further layers. Of the others only `exit_logits` of this layer will
                be asked, so a backend may keep no more of them than that exit reads, and may report any length of
                them. None: all may go on.
        """

    def exit_logits(self, live: Live, layer: int, start: int, stop: int, *, head: nn.Module | None = None) -> Tensor:
        """Run the classifier of `layer` on texts start … stop - 1: logits (stop - start, num_labels), on the device.

        `head`: read by another one of `HEADS`, or by `Features`, in its place; it is on the device.
        """

    def select(self, live: Live, rows: Integers) -> Live:
        """Keep the texts at `rows`, in that order."""

    def concat(self, lives: Sequence[Live]) -> Live:
        """Put texts that have run the same layers together into one batch."""
