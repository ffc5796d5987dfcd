"""A fitted table in one safetensors file, and back. How it is asked is not known here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from geep.folder import digest_tensors, publish
from geep.hash_table import EMPTY_KEY, HashTable
from geep.predictor.keys import Keys
from geep.predictor.table import ExitTable, FittedTable, Levels, Lexical, ScoreRows

_FORMAT = "geep exit table 2"
_METADATA = "exit_table"


@dataclass(frozen=True)
class _Header:
    """The part of a file that is no tensor."""

    kind: str
    depths: tuple[int, ...]
    speeds: tuple[float, ...]
    vocab_size: int
    special_ids: tuple[int, ...]
    ngram_order: int
    multi_label: bool
    separator_id: int | None = None

    def fields(self) -> dict[str, Any]:
        """Return what is written; tables of single texts name no separator, as those from before there were pairs'."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def write_table(path: Path, fitted: FittedTable, *, fingerprint: dict[str, str]) -> None:
    """Write a fitted table to a file, whole or not at all; the same table gives the same bytes.

    Args:
        path: The file.
        fitted: The table and what was learned from it.
        fingerprint: What it belongs to, such as hashes of tokenizer and model. `read_table` asks for the same.
    """
    tensors, config = _contents(fitted)
    header = {"format": _FORMAT, "config": config.fields(), "fingerprint": fingerprint}
    text = json.dumps(header, sort_keys=True)
    # One entry for both: safetensors writes the entries of its metadata in an order that changes from run to run.
    signed = {"header": text, "sha256": digest_tensors(tensors, text)}
    publish(path, save_safetensors(tensors, {_METADATA: json.dumps(signed, sort_keys=True)}))


def digest_table(fitted: FittedTable) -> str:
    """Digest all that a table's answers depend on, and its counts; whose table it is does not matter."""
    tensors, config = _contents(fitted)
    return digest_tensors(tensors, json.dumps(config.fields(), sort_keys=True))


def _contents(fitted: FittedTable) -> tuple[dict[str, Tensor], _Header]:
    """A table as tensors and the rest."""
    # Rows that were never counted are zero everywhere, so they need no place in the file.
    seen = torch.nonzero(fitted.table.counts.flatten(1).any(1))[:, 0]
    slots = fitted.table.keys.ngrams.state()
    tensors = {
        "rows": seen,
        "counts": fitted.table.counts[seen],
        "score_rows": fitted.score_rows.rows.cpu()[seen],
        "score_prior": fitted.score_rows.prior,
        "level_edges": fitted.levels.edges,
        "level_shares": fitted.levels.cumulative,
        "ngram_keys": slots["keys"],
        "ngram_values": slots["values"],
        "seen": fitted.seen,
    }
    if fitted.lexical is not None:
        tensors["label_rows"] = fitted.lexical.rows.cpu()[seen]
        tensors["label_bias"] = fitted.lexical.bias
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    config = _Header(
        kind=fitted.kind,
        depths=fitted.table.depths,
        speeds=fitted.table.speeds,
        vocab_size=fitted.table.vocab_size,
        special_ids=fitted.table.keys.special_ids,
        ngram_order=fitted.table.keys.ngram_order,
        multi_label=fitted.multi_label,
        separator_id=fitted.table.keys.separator_id,
    )
    return tensors, config


def read_table(path: Path, *, fingerprint: dict[str, str]) -> FittedTable:
    """Read what `write_table` wrote, and refuse anything else; the table is on the CPU.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If the file belongs to something else, is damaged, or holds shapes or numbers that cannot be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No exit table at {path}; make one with `geep profile`.")
    advice = "make the table anew with `geep profile`."
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as err:
        raise ValueError(f"{path} is no whole safetensors file ({err}), expected an exit table; {advice}") from err
    if _METADATA not in metadata:
        raise ValueError(f"{path} has metadata {sorted(metadata)}, expected [{_METADATA!r}]; {advice}")
    try:
        signed = json.loads(metadata[_METADATA])
        text, expected = signed["header"], signed["sha256"]
        header = json.loads(text)
        form, found, fields = header["format"], header["fingerprint"], header["config"]
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(f"The header of {path} cannot be read ({err!r}), expected what save wrote; {advice}") from err
    if form != _FORMAT:
        raise ValueError(f"{path} has format {form!r}, expected {_FORMAT!r}; {advice}")
    if expected != digest_tensors(tensors, text):
        raise ValueError(f"The contents of {path} differ from their checksum, expected them unchanged; {advice}")
    if found != fingerprint:
        names = sorted(name for name in {*found, *fingerprint} if found.get(name) != fingerprint.get(name))
        raise ValueError(
            f"{path} belongs to another model or tokenizer: found { ({n: found.get(n) for n in names}) }, expected "
            f"{ ({n: fingerprint.get(n) for n in names}) }; {advice}"
        )
    try:
        return _from_tensors(fields, tensors)
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(f"{path} holds no usable exit table: {err} Expected what save wrote; {advice}") from err


def _from_tensors(fields: dict[str, Any], tensors: dict[str, Tensor]) -> FittedTable:
    config = _Header(**fields)
    ngrams = HashTable.from_state({"keys": tensors["ngram_keys"], "values": tensors["ngram_values"]})
    values = tensors["ngram_values"][tensors["ngram_keys"] != EMPTY_KEY].sort().values
    if not torch.equal(values, torch.arange(len(ngrams))):
        raise ValueError(f"Found n-gram rows other than 0..{len(ngrams) - 1}.")
    keys = Keys(config.vocab_size, tuple(config.special_ids), config.ngram_order, ngrams, config.separator_id)
    rows, counts, score_rows = tensors["rows"], tensors["counts"], tensors["score_rows"]
    if (
        rows.dtype != torch.int64
        or rows.ndim != 1
        or bool((rows.diff() <= 0).any())
        or bool(((rows < 0) | (rows >= keys.neutral_row)).any())
    ):
        raise ValueError(f"Found rows that are not increasing within 0..{keys.neutral_row - 1}.")
    if counts.dtype != torch.int32 or bool((counts < 0).any()):
        raise ValueError(f"Found counts of {counts.dtype} or below 0.")
    table = ExitTable(keys, tuple(config.depths), tuple(config.speeds), _spread(keys, rows, "counts", counts))
    lexical = None
    if "label_rows" in tensors:
        lexical = Lexical(_spread(keys, rows, "label_rows", tensors["label_rows"]), tensors["label_bias"])
    return FittedTable(
        config.kind,
        table,
        ScoreRows(_spread(keys, rows, "score_rows", score_rows), tensors["score_prior"]),
        Levels(tensors["level_edges"], tensors["level_shares"]),
        lexical,
        multi_label=config.multi_label,
        seen=tensors["seen"],
    )


def _spread(keys: Keys, rows: Tensor, name: str, values: Tensor) -> Tensor:
    """Put the values of the given rows into a tensor of all rows, zero elsewhere."""
    if values.ndim < 2 or values.shape[0] != rows.numel():
        raise ValueError(f"Found {name} of shape {tuple(values.shape)} for {rows.numel()} rows.")
    spread = torch.zeros(keys.num_rows, *values.shape[1:], dtype=values.dtype)
    spread[rows] = values
    return spread
