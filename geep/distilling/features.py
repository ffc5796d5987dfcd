"""What heads read at every depth and the answers of the full model, computed once and kept on disk.

How heads are fitted is not known here. Read `FeatureCache`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from geep.backends import TokenBatch, token_positions
from geep.data import Split
from geep.engine import Engine
from geep.folder import publish
from geep.modeling import HEADS, Features, PooledHead, Spans
from geep.progress import Progress, no_progress
from geep.scheduler import budget_cuts

Integers = NDArray[np.int64]

logger = logging.getLogger(__name__)

# Tokens between two entries of the journal: some seconds of work are lost by a kill.
_TOKENS_AT_A_TIME = 32_768

MAX_GIGABYTES = 32.0
"""Room for features on disk: of short texts and twelve layers a quarter of a million."""

# The largest number of half precision; what lies beyond is cut rather than made infinite.
_LARGEST = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """What heads of one kind read of some texts.

    Attributes:
        features: At every exit layer, one row for each text where the heads pool, else one for each token of the texts,
            one text after another: (num_exits, num_rows, width).
        offsets: Where the rows of each text begin, and the end of the last, (num_texts + 1,).
        longest: Rows of the longest text.
        firsts: Tokens of the first text of each pair, (num_texts,); None where none is told apart.
        logits: Of the full model, (num_texts, num_labels).
    """

    features: Tensor
    offsets: Tensor
    longest: int
    firsts: Tensor | None
    logits: Tensor

    def answers(self, heads: Sequence[nn.Module]) -> Tensor:
        """Logits (num_exits, num_texts, num_labels) of the heads of all exit layers."""
        found = []
        spans = Spans(self.offsets, self.features.shape[1], self.longest, self.firsts)
        for head, features in zip(heads, self.features, strict=True):
            if isinstance(head, PooledHead):
                found.append(head.classify(features))
            else:
                reader: Any = head
                found.append(reader.forward_packed(features, spans))
        return torch.stack(found)


@dataclass(frozen=True)
class FeatureCache:
    """What heads of one kind read of some texts at every exit layer, beside the full model's answers.

    Invariant: rows stand in the texts' order; the encoder that made them has not moved.

    Attributes:
        kind: Row of `HEADS` that reads such features.
        depths: Layers of the exits, ascending, without the full model.
        features: Half precision, mapped from disk, (num_rows, num_exits, width): features of each text for heads that
            pool, else hidden states of each token.
        lengths: Rows of each text, (num_texts,).
        firsts: Tokens of the first text of each pair, (num_texts,); None where none is told apart.
        logits: Of the full model, float32, mapped from disk, (num_texts, num_labels).
        texts: The texts: those that were given, or as many of them as there was room for.
    """

    kind: str
    depths: tuple[int, ...]
    features: NDArray[np.float16]
    lengths: Integers
    firsts: Integers | None
    logits: NDArray[np.float32]
    texts: Split

    @classmethod
    def of(
        cls,
        engine: Engine,
        texts: Split,
        folder: str | Path,
        *,
        kind: str = "conv",
        exit_layers: Sequence[int] | None = None,
        max_gigabytes: float = MAX_GIGABYTES,
        seed: int = 0,
        what: str = "features of all depths",
        progress: Progress = no_progress,
    ) -> FeatureCache:
        """Run the encoder over texts, or go on where a killed call stopped, or take what is there already.

        Args:
            engine: The model as it answers: in float32, since heads are taught by its scores.
            texts: The texts; labels are not read.
            folder: Where the cache is kept: `features.bin`, `logits.bin` and a journal. A cache of other texts, of
                another model or for another kind of head is written anew.
            kind: Row of `HEADS`. One that pools takes far less room: a row for each text in the place of one for each
                token.
            exit_layers: Layers that are to have an exit, ascending. None: those that have one, or where none has, all
                but the last two, and of two the first.
            max_gigabytes: Room for the features: of texts that need more, some are taken that fill it, drawn by `seed`.
            seed: Of the drawing.
            what: Name of the work for `progress`.
            progress: Told how many texts are done.

        Raises:
            ValueError: If the engine rounds, the kind is unknown, there is no such exit layer, there are no texts, or
                there is no room.
            FloatingPointError: If the full model gives a text logits that are not finite.
        """
        if engine.deployment.is_rounded:
            raise ValueError(
                "Heads are fitted to the float32 model's scores, found an engine in "
                f"{engine.deployment.dtype}; load it with dtype='float32'."
            )
        reader = _reader(engine, kind)
        last = engine.depths[-1]
        depths = tuple(exit_layers or engine.depths[:-1] or range(1, max(last - 1, 2)))
        if not depths or list(depths) != sorted(set(depths)) or not 1 <= depths[0] <= depths[-1] < last:
            raise ValueError(f"exit_layers must ascend within 1..{last - 1}, got {list(depths)}.")
        batch = engine.tokenize(texts.inputs).batch
        if not len(batch.input_ids):
            raise ValueError("There are no texts to learn from; expected some thousands.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lengths = np.ones_like(batch.lengths) if reader.is_by_text else batch.lengths
        bytes_a_row = len(depths) * _width(engine, reader) * np.dtype(np.float16).itemsize
        kept = _drawn(lengths, int(max_gigabytes * 1e9 / bytes_a_row), seed)
        if len(kept) < len(texts):
            if not len(kept):
                raise ValueError(f"No text's features fit {max_gigabytes:g} GB (max_gigabytes); allow some gigabytes.")
            logger.info("%d of %d texts are learned from: their features fill what is allowed.", len(kept), len(texts))
            texts, batch, lengths = texts.select(kept), batch.select(kept), lengths[kept]
        ends = np.cumsum(lengths)
        made_of = {
            **engine.identity,
            "kind": kind,
            "depths": list(depths),
            "max_length": engine.deployment.max_length,
            "dtype": engine.deployment.dtype,
            "texts": Split(texts.texts, texts.text_pairs).digest(),
        }
        journal = folder / "features.json"
        done = _rows_done(journal, made_of)
        shapes = {
            "features": (int(ends[-1]), len(depths), _width(engine, reader)),
            "logits": (len(texts), len(engine.label_names)),
        }
        dtypes = {"features": np.float16, "logits": np.float32}
        if done == 0:
            _check_room(folder, shapes["features"], kind)
        maps: dict[str, Any] = {
            name: _mapped(folder / f"{name}.bin", dtypes[name], shape, fresh=done == 0)
            for name, shape in shapes.items()
        }
        for cut in budget_cuts(batch.lengths[done:], max_tokens=_TOKENS_AT_A_TIME):
            start, stop = (done + end for end in cut)
            rows = slice(ends[start] - lengths[start], ends[stop - 1])
            found = _read(engine, batch.select(np.arange(start, stop)), reader, maps["features"][rows].shape, depths)
            broken = np.flatnonzero(~np.isfinite(found[1]).all(axis=1))
            if len(broken):
                raise FloatingPointError(
                    f"Text {start + broken[0]} has logits that are not finite; heads cannot be taught by such answers. "
                    "Mend the model."
                )
            maps["features"][rows], maps["logits"][start:stop] = found
            for each in maps.values():
                each.flush()
            publish(journal, json.dumps({"made_of": made_of, "rows": stop}).encode())
            progress(what, stop, len(texts))
        firsts = None if reader.is_by_text else batch.firsts(engine.model.config.separator_id)
        return cls(kind, depths, maps["features"], lengths, firsts, maps["logits"], texts)

    def __len__(self) -> int:
        return len(self.logits)

    def batches(
        self, size: int, device: torch.device, *, generator: torch.Generator | None = None
    ) -> Iterator[FeatureBatch]:
        """Bring `size` texts at a time to a device, in their order; with a generator in any."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for texts in order.split(size):
            yield self._batch(np.sort(texts.numpy()), device)

    def _batch(self, texts: Integers, device: torch.device) -> FeatureBatch:
        # In half precision to the device: there it is made float32 and turned around.
        rows = torch.from_numpy(self.features[token_positions(self.lengths, texts)]).to(device).transpose(0, 1)
        lengths = self.lengths[texts]
        offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths)))).to(device)
        return FeatureBatch(
            rows.to(torch.float32, memory_format=torch.contiguous_format),
            offsets,
            int(lengths.max()),
            None if self.firsts is None else torch.from_numpy(self.firsts[texts]).to(device),
            torch.from_numpy(self.logits[texts]).to(device),
        )


def check_kind(kind: str) -> None:
    """Refuse what is no row of `HEADS`.

    Raises:
        ValueError: If it is none.
    """
    if kind not in HEADS:
        raise ValueError(f"Unknown kind of heads {kind!r}; known: {sorted(HEADS)}.")


def _reader(engine: Engine, kind: str) -> Features:
    check_kind(kind)
    with torch.device("meta"):  # what it would learn is not needed
        return Features(HEADS[kind](engine.model.config))


def _width(engine: Engine, reader: Features) -> int:
    widths = reader.head.widths if isinstance(reader.head, PooledHead) else 1
    return widths * int(engine.model.config.hidden_size)


def _drawn(rows: Integers, most: int, seed: int) -> Integers:
    """Texts drawn at random, ascending, as many as have `most` rows together; all where these suffice."""
    if int(rows.sum()) <= most:
        return np.arange(len(rows))
    order = np.random.default_rng(seed).permutation(len(rows))
    return np.sort(order[np.cumsum(rows[order]) <= most])


def _check_room(folder: Path, shape: tuple[int, ...], kind: str) -> None:
    """Refuse what the disk cannot hold; in the middle of a write the process would be killed.

    Raises:
        ValueError: If it cannot.
    """
    needed, free = int(np.prod(shape)) * np.dtype(np.float16).itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"What {kind!r} heads read of the texts takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in "
            f"{folder}; give fewer texts or exit layers, a shorter max_length, or a head that pools (mean+max)."
        )


def _rows_done(journal: Path, made_of: dict[str, Any]) -> int:
    try:
        found = json.loads(journal.read_bytes())
        return int(found["rows"]) if found["made_of"] == made_of else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...], *, fresh: bool) -> NDArray[Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    is_whole = path.exists() and path.stat().st_size == size
    return np.memmap(path, dtype=dtype, mode="w+" if fresh or not is_whole else "r+", shape=shape)


def _read(
    engine: Engine, batch: TokenBatch, reader: Features, shape: tuple[int, ...], depths: tuple[int, ...]
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Features, in the shape given, and the full model's logits of some texts."""
    last = engine.depths[-1]
    features = np.empty(shape, dtype=np.float16)
    logits = np.empty((len(batch), len(engine.label_names)), dtype=np.float32)
    backend = engine.deployment.backend

    def note(live: Any, layer: int, texts: Integers) -> None:
        if layer == last:
            logits[texts] = backend.exit_logits(live, layer, 0, len(texts)).float().cpu().numpy()
        else:
            rows = texts if reader.is_by_text else token_positions(batch.lengths, texts)
            found = backend.exit_logits(live, layer, 0, len(texts), head=reader)
            features[rows, depths.index(layer)] = found.clamp(-_LARGEST, _LARGEST).half().cpu().numpy()

    engine.course.visit(batch, note, (*depths, last), what="")
    return features, logits
