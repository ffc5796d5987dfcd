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

    Attributes:
        settings: Fields of an `ExitSettings`.
        record: How they were found: "profile" and "calibration", each absent until it was done.
    """

    settings: Mapping[str, Any]
    record: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> CalibrationFile:
        """Read the file, or the one of a folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged.
        """
        path = Path(path)
        path = path / SETTINGS_FILE if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(dict(found["settings"]), dict(found.get("record") or {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); run `geep calibrate` again, or delete it.") from error

    def write(self, folder: str | Path) -> None:
        """Put the file into a model folder, whole or not at all."""
        text = json.dumps({"settings": self.settings, "record": self.record}, indent=2, ensure_ascii=False)
        publish(Path(folder) / SETTINGS_FILE, (text + "\n").encode())
