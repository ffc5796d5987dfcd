"""A model folder on disk: names of its files, where they are, and how they get there.

What is inside model, table and settings is not known here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

TABLE_FILE = "exit_table.safetensors"
SETTINGS_FILE = "calibration.json"
RANGES_FILE = "activation_ranges.safetensors"
TRAINING_FILE = "training.json"


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How a model that is no folder is had from the Hugging Face hub; the words are the hub's.

    Attributes:
        revision: Branch, tag or commit; None: the default branch.
        token: Access token, or True for the one that `hf auth login` stored; None: the stored one where needed.
        cache_dir: Where downloads are kept; None: the hub's cache.
        local_files_only: Whether to use what is in the cache already and ask no network.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    def keywords(self) -> dict[str, Any]:
        """Return the options as `from_pretrained` of transformers takes them: those that were given."""
        given: dict[str, Any] = {"local_files_only": True} if self.local_files_only else {}
        for name in ("revision", "token", "cache_dir"):
            value = getattr(self, name)
            if value is not None:
                given[name] = value
        return given


def file_of(model: str | Path, name: str, hub: HubOptions | None = None) -> Path | None:
    """Path of a file that a model folder, or a model of the hub, may have; None where it has none."""
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.exists() else None
    # Who has a folder asks no hub, and those who only want to know a file's name load no transformers.
    from transformers.utils.hub import cached_file

    options = {} if hub is None else hub.keywords()
    try:
        found = cached_file(str(model), name, _raise_exceptions_for_missing_entries=False, **options)
    except OSError as error:
        logger.warning("%s of %s cannot be had (%s); going on as if the model had none.", name, model, error)
        return None
    return None if found is None else Path(found)


def publish(path: str | Path, data: bytes) -> Path:
    """Write a file whole or not at all: beside its place, flushed, then renamed. Its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


class HasParameters(Protocol):
    """A model, as far as its fingerprint goes."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """Every weight with its name."""


class HasVocabulary(Protocol):
    """A tokenizer, as far as its fingerprint goes."""

    def get_vocab(self) -> Mapping[str, int]:
        """Token ids by token."""


def fingerprint(model: HasParameters, tokenizer: HasVocabulary) -> dict[str, str]:
    """Digest model and tokenizer, so that a table made with others is refused.

    The model's digest covers every parameter's name, shape and float32 bytes, so it does not depend on how the weights
    were stored.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    words = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return {"model": digest.hexdigest(), "tokenizer": hashlib.sha256(words.encode()).hexdigest()}
