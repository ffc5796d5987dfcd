"""Data sets of the Hugging Face hub, read by its `datasets` library: columns joined, labels called by their names.

Which sets there are stands in `sources.py`. What the library does about caches and the network is left to it.
"""

from __future__ import annotations

import logging
import os
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from geep.data.sources import DatasetSource, HubSet
from geep.data.splits import Table
from geep.data.texts import TextCollector
from geep.data.wheels import FetchError

logger = logging.getLogger(__name__)

_BATCH_ROWS = 1024
_SWITCH = threading.Lock()


def read_hub(
    name: str,
    source: DatasetSource,
    hub: HubSet,
    part: str,
    cache_dir: str | os.PathLike[str] | None,
    *,
    local_files_only: bool,
) -> Table:
    """Read a part of a named data set of the hub; rows without a text are left out, with a warning.

    Args:
        name: Name of the data set.
        source: Its row.
        hub: Where the row says it is on the hub.
        part: ``train``, ``dev`` or ``test``; one that `hub` has.
        cache_dir: Folder for what the library makes of the files. None: the library's own.
        local_files_only: Whether to take what was made last of the set, of whatever commit, and ask no network.

    Raises:
        ImportError: If the `datasets` library is not installed.
        FetchError: If the library cannot get the set.
        ValueError: If it is not what the row says: other columns, other labels.
    """
    instead = source.as_folder(name)
    try:
        import datasets
    except ImportError as err:
        raise ImportError(
            f"The data set {name} is taken from the Hugging Face hub by the library `datasets`, which is not "
            f"installed. Do one of: pip install 'geep[hub]'; or {instead}."
        ) from err
    where = Path(hub.hub_id) / hub.splits[part]
    logger.info("Loading %s of the Hugging Face hub", where)
    try:
        with _offline(datasets, local_files_only):
            rows = datasets.load_dataset(
                hub.hub_id,
                split=hub.splits[part],
                revision=hub.revision,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            )
    except Exception as err:  # the client's library, and with it the kind of its errors, is not the same everywhere
        first = (
            "load it once with a network" if local_files_only else "see to what the message says, or check the network"
        )
        raise FetchError(
            f"The data set {name} could not be had from the Hugging Face hub ({where}: {err}). Do one of: {first}; or "
            f"{instead}."
        ) from err
    changed = f"the set has changed on the hub. Mend its row of DATASETS; or {instead}."
    expected = [*hub.text, *([] if hub.pair is None else [hub.pair]), hub.label]
    if not set(expected) <= set(rows.column_names):
        raise ValueError(f"{where} has the columns {rows.column_names}, expected {expected} among them: {changed}")
    return _table(where, rows, source, hub, changed)


@contextmanager
def _offline(datasets: Any, offline: bool) -> Iterator[None]:
    """Let the library take its cache alone, as HF_HUB_OFFLINE does: `local_files_only` of its own is not looked at."""
    with _SWITCH:  # the library has one for the whole process
        before = datasets.config.HF_HUB_OFFLINE
        datasets.config.HF_HUB_OFFLINE = before or offline
        try:
            yield
        finally:
            datasets.config.HF_HUB_OFFLINE = before


def _table(where: Path, rows: Any, source: DatasetSource, hub: HubSet, changed: str) -> Table:
    names = _label_names(rows.features[hub.label], source, hub)
    lines, labels = array("q"), list[str]()
    texts, pairs = TextCollector(), TextCollector()
    done = 0
    for batch in rows.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        columns = [(texts, _joined(batch, hub.text))]
        if hub.pair is not None:
            columns.append((pairs, _joined(batch, (hub.pair,))))
        kept = pa.array(range(batch.num_rows), pa.int64())
        for _, column in columns:
            kept = kept.filter(pc.not_equal(column.take(kept), ""))
        lines.extend(done + index + 1 for index in kept.to_pylist())
        for collector, column in columns:
            for text in column.take(kept).to_pylist():
                collector.append(text)
        for value in batch.column(hub.label).take(kept).to_pylist():
            if value not in names:
                expected = list(dict.fromkeys(names))
                raise ValueError(f"{where} has the label {value!r} in {hub.label!r}, expected {expected}: {changed}")
            labels.append(names[value])
        done += batch.num_rows
    if len(lines) < done:
        logger.warning("%s: %d of %d rows have no text and are left out.", where, done - len(lines), done)
    return Table(where, lines, texts.finish(), None if hub.pair is None else pairs.finish(), labels or None)


def _joined(batch: pa.Table, names: tuple[str, ...]) -> pa.Array:
    """Columns without blanks at their ends, joined by a space where they are not empty; empty where all are."""
    columns = [pc.utf8_trim_whitespace(batch.column(name).combine_chunks().cast(pa.large_string())) for name in names]
    filled = [pc.if_else(pc.equal(each, ""), None, each) for each in columns]
    joined, space = filled[0], pa.scalar(" ", pa.large_string())
    for each in filled[1:]:  # Arrow's own skipping of nulls loses the rows that have nothing else
        joined = pc.coalesce(pc.binary_join_element_wise(joined, each, space), joined, each)
    return pc.fill_null(joined, "")


def _label_names(feature: Any, source: DatasetSource, hub: HubSet) -> dict[object, str]:
    """The label's name by what stands in the column: a class number that has a name on the hub, a number or a name."""
    spelled = {
        each: name
        for written in (source.labels, *hub.spellings)
        for each, name in zip(written, source.labels, strict=True)
    }
    classes = getattr(feature, "names", None)  # of a ClassLabel
    if classes is not None:
        return {number: spelled[each] for number, each in enumerate(classes) if each in spelled}
    return dict(spelled) | {int(each): name for each, name in spelled.items() if each.isdecimal()}
