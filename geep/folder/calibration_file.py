"""`calibration.json`: what was decided for a model, beside how it was found. What the words mean is not known here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geep.folder.files import SETTINGS_FILE, publish


@dataclass(frozen=True)
class CalibrationFile:
    """The contents of `calibration.json`, as plain words and numbers.

    The file names the others that it is used with. They have their contents in their names, so that writing this file
    publishes all of them at once: whoever reads it, whenever, finds settings and table of one making.

    Attributes:
        settings: Fields of an `ExitSettings`.
        files: Names of files beside this one: "table" and "ranges", each None where there is none.
        belongs_to: Digests of model and tokenizer that all of it was made for (`fingerprint`).
        certificate: Fields of a `Certificate`; None where nothing was certified.
        record: How they were found: "profile" and "calibration", each absent until it was done.
    """

    settings: Mapping[str, Any]
    files: Mapping[str, str | None] = field(default_factory=dict)
    belongs_to: Mapping[str, str] = field(default_factory=dict)
    certificate: Mapping[str, Any] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> CalibrationFile:
        """Read the file, or the one of a folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, or was written before it named its files.
        """
        path = Path(path)
        path = path / SETTINGS_FILE if path.is_dir() else path
        raw = path.read_bytes()
        try:
            found = json.loads(raw)
            certificate = found["certificate"]
            return cls(
                dict(found["settings"]),
                {name: _checked(file) for name, file in found["files"].items()},
                dict(found["belongs_to"]),
                None if certificate is None else dict(certificate),
                dict(found.get("record") or {}),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged or of an older version ({error!r}), expected settings, files, belongs_to and "
                "certificate; run `geep profile` and `geep calibrate` again, or delete it."
            ) from error

    def write(self, folder: str | Path) -> None:
        """Put the file into a model folder, whole or not at all."""
        about = {
            "settings": self.settings,
            "files": self.files,
            "belongs_to": self.belongs_to,
            "certificate": self.certificate,
            "record": self.record,
        }
        text = json.dumps(about, indent=2, ensure_ascii=False)
        publish(Path(folder) / SETTINGS_FILE, (text + "\n").encode())


def _checked(name: str | None) -> str | None:
    """The name of a file beside this one: a model of the hub may not name files elsewhere."""
    if name is not None and (Path(name).name != name or not name.endswith(".safetensors")):
        raise ValueError(f"found the file name {name!r}, expected one in the same folder that ends with .safetensors")
    return name
