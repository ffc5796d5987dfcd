"""Predict the exit layer of a text, and a first guess at its label, from its token ids alone.

The exit table is a bag of keys. A key is a token id or an n-gram of ids, each has a row of numbers, and what is said
about a text is a function of the sum of its rows: one `embedding_bag` for a whole batch. Unigrams address their row
directly (token ids are a perfect hash already); n-grams find theirs through a `HashTable`. In pairs of texts keys also
tell what both texts have from what one of them has (`Keys`).

    token ids -> keys -> rows -> sum -> score -> level -> exit layer
                                    `-> lexical logits (exit 0)

Texts come packed: the token ids of all texts one after another and the number of tokens of each, no padding. How a
predictor was learned is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from geep.folder import TABLE_NAME, named_by
from geep.hash_table import BagKernel, bag_kernel, on_device
from geep.hash_table.bags import Bags, BagSums
from geep.hash_table.cpp_bags import reduce_bags as reduce_on_cpu
from geep.predictor.file import digest_table, read_table, write_table
from geep.predictor.keys import (
    NUM_BUCKETS,
    ORDER_SHIFT,
    SHARED_SHIFT,
    TOKEN_BITS,
    check_texts,
    is_usable,
    with_key_weight,
)
from geep.predictor.table import FittedTable, Levels, Lexical, ScoreRows


@dataclass(frozen=True, eq=False)
class ExitPrediction:
    """What the table says about a batch of texts.

    Args:
        exit_layers: Predicted encoder layers, each one of the table's depths, int64, shape (num_texts,).
        scores: Expected exit layer before the levels, float32, shape (num_texts,): an order, finer than the layers.
        lexical_logits: Logits of exit 0, float32, shape (num_texts, num_labels); `None` if no labels were learnt.
    """

    exit_layers: Tensor
    scores: Tensor
    lexical_logits: Tensor | None


class ExitPredictor:
    """Predict the exit layer of each text, and its label where the keys suffice, with one `embedding_bag` a batch.

    Where a kernel is (`geep.hash_table.bags`), it is one call instead.

    Invariant: a text's prediction does not depend on its neighbours in the batch, and nothing changes after
    construction; the rows of a speed are laid out when it is first asked for and kept. The kernel for CPUs says the
    same to the last bit. That for GPUs sums in another order: its scores and logits differ by rounding, its layers only
    where a score lies that close to a level's edge.

    Args:
        fitted: The table and what was learned from it.
        kernel: What sums rows, "none" for torch operations; None: what there is for the table's device. "triton" needs
            Triton, on a CPU its interpreter.
    """

    def __init__(self, fitted: FittedTable, *, kernel: BagKernel | None = None) -> None:
        self.fitted = fitted
        self.table = fitted.table
        self._kernel = bag_kernel(fitted.score_rows.rows.device.type) if kernel is None else kernel
        self._depths = torch.tensor(fitted.table.depths, device=fitted.score_rows.rows.device)
        self._matrices: dict[int, Tensor] = {}
        self._bags: dict[int, Bags] = {}

    @property
    def kind(self) -> str:
        """The row of `PREDICTORS` that made the scores."""
        return self.fitted.kind

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of each possible exit."""
        return self.table.depths

    @property
    def speeds(self) -> tuple[float, ...]:
        """The speeds for which there is a prediction; others take the nearest."""
        return self.table.speeds

    @property
    def lexical(self) -> Lexical | None:
        """Exit 0, `None` if there is none."""
        return self.fitted.lexical

    @property
    def num_labels(self) -> int | None:
        """Labels of exit 0, `None` if there is no exit 0."""
        return None if self.fitted.lexical is None else self.fitted.lexical.bias.numel()

    def predict(self, input_ids: Tensor, lengths: Tensor, *, speed: float, quantile: float = 0.5) -> ExitPrediction:
        """Predict where each text leaves.

        Args:
            input_ids: Token ids of the texts one after another, int64, shape (num_tokens,), on the table's device.
            lengths: Tokens of each text, int64, shape (num_texts,).
            speed: How soon texts leave, in [0, 1]; the nearest of `speeds` is taken, the slower one of two. 0 is
                the full model for every text.
            quantile: Share of such texts that should have left by the predicted layer, in (0, 1]; more is deeper.

        Returns:
            One prediction a text, in the caller's order.

        Raises:
            TypeError: If a tensor is not int64.
            ValueError: If `speed` or `quantile` is out of range, the shapes do not fit or an id is not in the
                vocabulary.
        """
        if not 0.0 <= speed <= 1.0:
            raise ValueError(f"speed must be within [0, 1], got {speed}; 0 is the full model.")
        if not 0.0 < quantile <= 1.0:
            raise ValueError(f"quantile must be in (0, 1], got {quantile}; 0.5 is the median.")
        index = self.speed_index(speed)
        if self._kernel != "none":
            found = self._reduce(input_ids, lengths, index, quantile)
            layers, scores, logits = found.layers, found.scores, found.outputs
        else:
            rows, offsets = self.table.rows_of(input_ids, lengths)
            sums = F.embedding_bag(rows, self._matrix(index), offsets, mode="sum")
            num_keys = sums[:, 0].clamp(min=1)
            scores = sums[:, 1] / num_keys + self.fitted.score_rows.prior[index]
            layers = self._depths[self.fitted.levels.exit_indices(scores, index, quantile)]
            logits = sums[:, 2:] * num_keys.rsqrt()[:, None]
            if self.fitted.lexical is not None:
                logits += self.fitted.lexical.bias
        if speed == 0.0:
            layers = self._depths[-1].expand_as(layers).clone()
        return ExitPrediction(layers, scores, None if self.fitted.lexical is None else logits)

    def unknown_shares(
        self, input_ids: NDArray[np.int64], lengths: NDArray[np.int64], *, unk_token_id: int | None
    ) -> NDArray[np.float32]:
        """Return the share of each text's tokens that stood in no text the table was made from, (num_texts,).

        Special tokens are not counted, but for the one that stands for what the tokenizer does not know; a text
        without others has 0. Computed on the host, whatever the table's device. In pairs a token that only ever stood
        in both texts of one counts as seen where that has a row: where it stood so often enough.

        Args:
            input_ids: Token ids of the texts one after another, (num_tokens,).
            lengths: Tokens of each text, (num_texts,).
            unk_token_id: The tokenizer's, every token of which is unknown; None where it has none.
        """
        usable, unseen = self._tokens
        is_unknown, ends = input_ids == (-1 if unk_token_id is None else unk_token_id), np.cumsum(lengths)

        def counted(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
            before = np.concatenate([[0], np.cumsum(flags[input_ids] | is_unknown)])
            found: NDArray[np.int64] = before[ends] - before[ends - lengths]
            return found

        return (counted(unseen) / np.maximum(counted(usable), 1)).astype(np.float32)

    @cached_property
    def _tokens(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which token ids may be part of a key, and which of these the table has never seen, both (vocab_size,)."""
        size = self.table.vocab_size
        usable = is_usable(torch.arange(size), self.table.keys.special_ids)
        seen = self.table.counts[:size].cpu().any(2).any(1)
        if self.table.keys.separator_id is not None:
            seen |= self.table.keys.shared_values().cpu() >= 0
        return usable.numpy(), (usable & ~seen).numpy()

    def speed_index(self, speed: float) -> int:
        """Place among `speeds` of the one that serves a speed: the nearest, the slower one of two."""
        return min(range(len(self.speeds)), key=lambda each: (abs(self.speeds[each] - speed), each))

    @cached_property
    def digest(self) -> str:
        """Digest of all that its predictions depend on, and of its counts."""
        return digest_table(self.fitted)

    @property
    def device(self) -> torch.device:
        """Where token ids are expected."""
        return self._depths.device

    def to(self, device: torch.device | str, *, kernel: BagKernel | None = None) -> ExitPredictor:
        """Return a copy that predicts on `device`; the counts, which no prediction reads, stay where they are.

        Args:
            device: Where token ids will be.
            kernel: As in the constructor.
        """
        fitted = self.fitted
        keys = replace(fitted.table.keys, ngrams=on_device(fitted.table.keys.ngrams, device))
        moved = replace(
            fitted,
            table=replace(fitted.table, keys=keys),
            score_rows=ScoreRows(*_moved(fitted.score_rows, device)),
            levels=Levels(*_moved(fitted.levels, device)),
            lexical=None if fitted.lexical is None else Lexical(*_moved(fitted.lexical, device)),
        )
        return ExitPredictor(moved, kernel=kernel)

    def save(self, path: str | Path, *, fingerprint: dict[str, str]) -> Path:
        """Write everything to one safetensors file, whole or not at all; the same predictor gives the same bytes.

        Args:
            path: The file if it ends in `.safetensors`, else a folder, in which the file is named by its contents.
            fingerprint: What the table belongs to, such as hashes of tokenizer and model. `load` asks for the same.

        Returns:
            The file.
        """
        path = Path(path)
        path = path if path.suffix == ".safetensors" else path / named_by(TABLE_NAME, self.digest)
        write_table(path, self.fitted, fingerprint=fingerprint)
        return path

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: dict[str, str]) -> ExitPredictor:
        """Read what `save` wrote, and refuse anything else.

        Args:
            path: The file.
            fingerprint: What the table has to belong to.

        Returns:
            The predictor, on the CPU; its predictions equal the saved one's.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If the file belongs to something else, is damaged, or holds shapes or numbers that cannot be.
        """
        return cls(read_table(Path(path), fingerprint=fingerprint))

    def _matrix(self, speed_index: int) -> Tensor:
        """Return key weight, score and label rows side by side, shape (num_rows, 2 + num_labels)."""
        if speed_index not in self._matrices:
            parts = [self.fitted.score_rows.rows[:, speed_index : speed_index + 1]]
            if self.fitted.lexical is not None:
                parts.append(self.fitted.lexical.rows)
            self._matrices[speed_index] = with_key_weight(self.table.keys, torch.cat(parts, 1))
        return self._matrices[speed_index]

    def _reduce(self, input_ids: Tensor, lengths: Tensor, speed_index: int, quantile: float) -> BagSums:
        bags = self._bags_at(speed_index)
        layers = self._depths[self.fitted.levels.exit_indices_of_bins(speed_index, quantile)]
        if self._kernel == "cpp":
            # It looks at its input itself, in passing; what is wrong is found out where something is.
            found = reduce_on_cpu(input_ids, lengths, bags, layers)
            if found is not None:
                return found
            if others := {each.device.type for each in (input_ids, lengths)} - {"cpu"}:
                raise ValueError(f"Found texts on {sorted(others)}, the table on a CPU; move one of them.")
        check_texts(input_ids, lengths, self.table.keys.vocab_size)
        if self._kernel == "cpp":
            raise ValueError("The lengths of the texts are no numbers of tokens: their sum overflows 64 bits.")
        # Triton is no dependency of geep: only who predicts with its kernel needs it.
        from geep.hash_table.triton_bags import reduce_bags

        return reduce_bags(input_ids, lengths, bags, layers)

    def _bags_at(self, speed_index: int) -> Bags:
        """What a kernel reads at a speed; made when it is first asked for, and kept."""
        if speed_index not in self._bags:
            keys = self.table.keys
            base = [self.fitted.score_rows.prior[speed_index : speed_index + 1]]
            if self.fitted.lexical is not None:
                base.append(self.fitted.lexical.bias)
            self._bags[speed_index] = Bags(
                table=keys.ngrams,
                order=keys.ngram_order,
                symbol_bits=TOKEN_BITS,
                size_shift=ORDER_SHIFT,
                is_key=is_usable(torch.arange(keys.vocab_size, device=self.device), keys.special_ids),
                # Kernels count keys themselves, so the key weight in the first column stays out.
                rows=self._matrix(speed_index)[:, 1:],
                base=torch.cat(base),
                edges=self.fitted.levels.edges[speed_index].contiguous(),
                separator=keys.separator_id,
                shared_shift=SHARED_SHIFT,
                num_buckets=NUM_BUCKETS,
            )
        return self._bags[speed_index]


def _moved(record: ScoreRows | Levels | Lexical, device: torch.device | str) -> list[Tensor]:
    return [tensor.to(device) for tensor in vars(record).values()]
