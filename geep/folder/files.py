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

SETTINGS_FILE = "calibration.json"
TRAINING_FILE = "training.json"

# Beginnings of the names of files that `calibration.json` names in full: what is in them is part of their names, so
# that a new one never takes the place of an old one that is still in use.
TABLE_NAME = "exit_table"
RANGES_NAME = "activation_ranges"


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How a model that is no folder is had from the Hugging Face hub; the words are the hub's.

    Attributes:
        revision: Branch, tag or commit; None: the default branch.
        token: Access token, or True for the one that `hf auth login` stored; None: the stored one where needed.
        cache_dir: Where downloads are kept, a string or a path; None: the hub's cache.
        local_files_only: Whether to use what is in the cache already and ask no network.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def keywords(self) -> dict[str, Any]:
        """Return the options as `from_pretrained` of transformers takes them: those that were given."""
        given: dict[str, Any] = {"local_files_only": True} if self.local_files_only else {}
        for name in ("revision", "token", "cache_dir"):
            value = getattr(self, name)
            if value is not None:
                given[name] = str(value) if isinstance(value, Path) else value
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


def named_by(stem: str, digest: str) -> str:
    """Name of a file of tensors that says what is in it."""
    return f"{stem}-{digest[:16]}.safetensors"


def digest_tensors(tensors: Mapping[str, Tensor], header: str) -> str:
    """Return a SHA-256 of a header and of names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        own = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {own.dtype} {tuple(own.shape)};".encode())
        digest.update(own.flatten().numpy().tobytes())
    return digest.hexdigest()


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
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _sync_folder(folder: Path) -> None:
    """Wait until names in a folder are on the disk, too, where the system can say so."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class HasParameters(Protocol):
    """A model, as far as its fingerprint goes."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """Every weight with its name."""


def fingerprint(model: HasParameters, tokenizer: Any) -> dict[str, str]:
    """Digest model and tokenizer, so that a table made with others is refused.

    The model's digest covers every parameter's name, shape and float32 bytes, so it does not depend on how the weights
    were stored, and of its config all that is not as usual, but for what only training and bookkeeping read. The
    tokenizer's covers all that turns a text into ids: normaliser, cutting into words, vocabulary,
    added tokens, special tokens and the side on which it truncates; not the length at which it does.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    digest.update(json.dumps(_switches(getattr(model, "config", None)), sort_keys=True, default=str).encode())
    return {"model": digest.hexdigest(), "tokenizer": _digest_tokenizer(tokenizer)}


# Fields of a config that no answer depends on.
_BOOKKEEPING = frozenset(
    {
        "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "return_dict",
        "output_attentions", "output_hidden_states", "attn_implementation", "initializer_range", "model_type",
        "classifier_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout",
        "bos_token_id", "eos_token_id",
    }
)  # fmt: skip


def _switches(config: Any) -> dict[str, Any]:
    """Fields of a Hugging Face config, and of those in it, that differ from the defaults of its class.

    Differences alone, so that a field that a later version of the library adds changes nothing.
    """
    if config is None:
        return {}
    inner = {name: getattr(config, name) for name in getattr(config, "sub_configs", {})}
    own = {name: value for name, value in config.to_diff_dict().items() if name not in _BOOKKEEPING | inner.keys()}
    return {"kind": config.model_type, **own, **{name: _switches(value) for name, value in inner.items()}}


# Case, accents, width, digits, ideographs, blanks, control characters, emoji, punctuation, an unknown word.
_PROBES = (
    "Straße CAFÉ cafe\u0301 naïve İstanbul",
    "\uff21\uff22\uff23 \ufb01 \u2460 1,234.50 -7e3",
    "北京大学 東京 서울",
    " two  blanks\ttab\nline\u00a0\u200bend ",
    "don't (stop)... #tag @me \U0001f600 \u0007 qzxwvk",
)


def _digest_tokenizer(tokenizer: Any) -> str:
    digest = hashlib.sha256(f"{tokenizer.truncation_side} {tokenizer.model_input_names}".encode())
    if tokenizer.is_fast:
        own = tokenizer.backend_tokenizer
        digest.update(repr(bool(getattr(tokenizer, "split_special_tokens", False))).encode())
        for part in (own.normalizer, own.pre_tokenizer, own.model, own.post_processor):
            digest.update(b"none;" if part is None else part.__getstate__() + b";")
        digest.update(repr(sorted(own.get_added_tokens_decoder().items())).encode())
    else:
        # Written in Python, it keeps its rules in code: texts that set common rules apart are tokenised.
        digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
        for text in _PROBES:
            digest.update(repr(tokenizer(text)["input_ids"]).encode())
        digest.update(repr(tokenizer("a", "b")["input_ids"]).encode())
    return digest.hexdigest()
