"""Single texts and pairs: a model that has learned the one kind has nothing to say of the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from geep.data.rows import BadRow, Row

# Rows looked at before it is said that the whole file is of the other kind.
_LOOKED_AT = 100


def of_one_kind(
    rows: Iterable[Row | BadRow], source: Path, pair_column: str, *, pairs: bool | None
) -> Iterator[Row | BadRow]:
    """Pass rows on; those of the other kind than the model's become bad ones.

    Args:
        rows: Rows of the source.
        source: The file, for messages.
        pair_column: Column of the second text.
        pairs: Whether the model has learned pairs, or single texts; None: not known, both are taken.

    Raises:
        ValueError: If not one of the first rows is of the model's kind.
    """
    if pairs is None:
        yield from rows
        return
    rows = iter(rows)
    first: list[Row | BadRow] = []
    damage = None
    try:
        for row in islice(rows, _LOOKED_AT):
            first.append(row)  # noqa: PERF402 (what was read before the damage is kept)
    except (ValueError, OSError) as err:
        damage = err  # the rows before it are passed on first
    good = [row for row in first if isinstance(row, Row)]
    if good and all((row.text_pair is not None) != pairs for row in good):
        raise ValueError(
            f"{source} has no second texts in column {pair_column!r}, and the model was trained on pairs; name the "
            "right column with --text-pair-column."
            if pairs
            else f"{source} has second texts in column {pair_column!r}, and the model was trained on single texts; "
            "take that column out or give it another name."
        )
    reason = (
        f"no second text in column {pair_column!r}; the model was trained on pairs"
        if pairs
        else f"a second text in column {pair_column!r}; the model was trained on single texts"
    )
    for part in (first, rows):
        for row in part:
            is_other = isinstance(row, Row) and (row.text_pair is not None) != pairs
            yield BadRow(row.line, reason) if is_other else row
        if damage is not None:
            raise damage
