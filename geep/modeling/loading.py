"""What every load of weights from a folder or the hub has in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def hub_keywords(
    revision: str | None, token: str | bool | None, cache_dir: str | None, local_files_only: bool
) -> dict[str, Any]:
    """Options that were given, as `from_pretrained` of transformers takes them; no code of a checkpoint is run."""
    given = {"revision": revision, "token": token, "cache_dir": cache_dir}
    given = {name: value for name, value in given.items() if value is not None}
    return {**given, "local_files_only": local_files_only, "trust_remote_code": False}


def check_shapes(path: str, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuse weights of other shapes than their config gives them.

    Args:
        path: Folder or model id, for the message.
        mismatched: `mismatched_keys` of a load that went on in spite of them: name, shape there, shape expected.

    Raises:
        ValueError: If there are some.
    """
    first = min(mismatched, key=lambda row: str(row[0]), default=None)
    if first is not None:
        name, stored, made = first
        raise ValueError(
            f"The weights of {path} have other shapes than its config.json says: {name!r} has {tuple(stored)}, "
            f"expected {tuple(made)}; the two belong to different models."
        )
