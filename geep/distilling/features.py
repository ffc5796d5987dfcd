"""Features of every depth and the answers of the full model, computed once and kept on disk. Heads are not known here.

Read `FeatureCache`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geep.data import Split
from geep.engine import Engine
from geep.folder import publish
from geep.modeling import HEADS, Features, PooledHead
from geep.progress import Progress, no_progress

Integers = NDArray[np.int64]

# Texts between two entries of the journal: some seconds of work are lost by a kill.
_TEXTS_AT_A_TIME = 1024

# The largest number of half precision; what lies beyond is cut rather than made infinite.
_LARGEST = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True)
class FeatureCache:
    """What heads of one kind read of some texts at every exit layer, beside the full model's answers.

    Invariant: rows stand in the texts' order; the encoder that made them has not moved.

    Attributes:
        kind: Row of `HEADS` that reads such features.
        depths: Layers of the exits, ascending, without the full model.
        features: Half precision, mapped from disk, (num_texts, num_exits, width).
        logits: Of the full model, float32, mapped from disk, (num_texts, num_labels).
    """

    kind: str
    depths: tuple[int, ...]
    features: NDArray[np.float16]
    logits: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        engine: Engine,
        texts: Split,
        folder: str | Path,
        *,
        kind: str = "mean+max",
        exit_layers: Sequence[int] | None = None,
        what: str = "features of all depths",
        progress: Progress = no_progress,
    ) -> FeatureCache:
        """Run the encoder over texts, or go on where a killed call stopped, or take what is there already.

        Args:
            engine: The model as it answers: in float32, since heads are taught by its scores.
            texts: The texts; labels are not read.
            folder: Where the cache is kept: `features.bin`, `logits.bin` and a journal. A cache of other texts, of
                another model or for another kind of head is written anew.
            kind: Row of `HEADS` whose features do not depend on what is learned (`PooledHead`).
            exit_layers: Layers that are to have an exit, ascending. None: those that have one, or where none has, all
                but the last two, and of two the first.
            what: Name of the work for `progress`.
            progress: Told how many texts are done.

        Raises:
            ValueError: If the kind is unknown or reads tokens, or reads pairs whose separator the model's config does
                not name; if there is no such exit layer, or there are no texts.
            FloatingPointError: If the full model gives a text logits that are not finite.
        """
        head = _head(engine, kind)
        last = engine.depths[-1]
        depths = tuple(exit_layers or engine.depths[:-1] or range(1, max(last - 1, 2)))
        if not depths or list(depths) != sorted(set(depths)) or not 1 <= depths[0] <= depths[-1] < last:
            raise ValueError(f"exit_layers must ascend within 1..{last - 1}, got {list(depths)}.")
        if not len(texts):
            raise ValueError("There are no texts to learn from; expected some thousands.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        width = head.widths * engine.model.config.hidden_size
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
        shapes = {"features": (len(texts), len(depths), width), "logits": (len(texts), len(engine.label_names))}
        dtypes = {"features": np.float16, "logits": np.float32}
        maps: dict[str, Any] = {
            name: _mapped(folder / f"{name}.bin", dtypes[name], shape, fresh=done == 0)
            for name, shape in shapes.items()
        }
        reader = Features(head)
        for start in range(done, len(texts), _TEXTS_AT_A_TIME):
            rows = np.arange(start, min(start + _TEXTS_AT_A_TIME, len(texts)))
            found = _read(engine, texts.select(rows), reader, width, depths)
            broken = np.flatnonzero(~np.isfinite(found[1]).all(axis=1))
            if len(broken):
                raise FloatingPointError(
                    f"Text {start + broken[0]} has logits that are not finite; heads cannot be taught by such answers. "
                    "Mend the model."
                )
            maps["features"][rows], maps["logits"][rows] = found
            for each in maps.values():
                each.flush()
            done = int(rows[-1]) + 1
            publish(journal, json.dumps({"made_of": made_of, "rows": done}).encode())
            progress(what, done, len(texts))
        return cls(kind, depths, maps["features"], maps["logits"])

    def __len__(self) -> int:
        return len(self.logits)

    def batches(self, size: int, *, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (num_exits, num_rows, width) and logits, a batch at a time; with a generator, shuffled."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for rows in order.split(size):
            index = rows.numpy() if generator is None else np.sort(rows.numpy())
            yield torch.from_numpy(self.features[index]).float().transpose(0, 1), torch.from_numpy(self.logits[index])


def check_kind(kind: str) -> None:
    """Refuse a row of `HEADS` that cannot be fitted on features.

    Raises:
        ValueError: If it reads tokens, or there is no such row.
    """
    if kind not in HEADS or not issubclass(HEADS[kind], PooledHead):
        known = sorted(name for name, head in HEADS.items() if issubclass(head, PooledHead))
        raise ValueError(f"Heads of kind {kind!r} cannot be fitted on features; known: {known}.")


def _head(engine: Engine, kind: str) -> PooledHead:
    check_kind(kind)
    head = cast(type[PooledHead], HEADS[kind])
    if head.reads_pairs and engine.model.config.separator_id is None:
        raise ValueError(
            f"Heads of kind {kind!r} tell the texts of a pair apart, found no separator_id in the config; set it "
            "to the tokenizer's sep_token_id, or take another kind for single texts."
        )
    with torch.device("meta"):  # what it would learn is not needed
        return head(engine.model.config)


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
    engine: Engine, texts: Split, reader: Features, width: int, depths: tuple[int, ...]
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Features and the full model's logits of some texts."""
    batch, last = engine.tokenize(texts.inputs).batch, engine.depths[-1]
    features = np.empty((len(batch), len(depths), width), dtype=np.float16)
    logits = np.empty((len(batch), len(engine.label_names)), dtype=np.float32)
    backend = engine.deployment.backend

    def note(live: Any, layer: int, rows: Integers) -> None:
        if layer == last:
            logits[rows] = backend.exit_logits(live, layer, 0, len(rows)).float().cpu().numpy()
        else:
            found = backend.exit_logits(live, layer, 0, len(rows), head=reader)
            features[rows, depths.index(layer)] = found.clamp(-_LARGEST, _LARGEST).half().cpu().numpy()

    engine.course.visit(batch, note, (*depths, last), what="")
    return features, logits
