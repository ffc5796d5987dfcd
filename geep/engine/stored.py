"""What a model folder keeps beside the model: table, settings, ranges, certificate. The model is not known here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geep.backends.int8 import ActivationRanges
from geep.engine.certificate import Certificate
from geep.engine.settings import ExitSettings
from geep.folder import RANGES_NAME, SETTINGS_FILE, TABLE_NAME, CalibrationFile, HubOptions, file_of
from geep.predictor import ExitPredictor


@dataclass(frozen=True, slots=True)
class StoredExits:
    """What was learned of a model's exits.

    Attributes:
        predictor: The exit table; None where there is none.
        settings: When exits answer.
        ranges: Ranges of activations, for int8; None where there are none.
        certificate: What was certified; None where nothing was.
    """

    predictor: ExitPredictor | None
    settings: ExitSettings
    ranges: ActivationRanges | None
    certificate: Certificate | None

    @classmethod
    def load(
        cls, model: str | Path, hub: HubOptions, *, fingerprint: dict[str, str], exits: bool, ranges: bool
    ) -> StoredExits:
        """Read what belongs to a model: of a folder or of the hub.

        Args:
            model: Folder or model id.
            hub: How a model of the hub is had.
            fingerprint: Digests of model and tokenizer, to which everything has to belong.
            exits: Whether table, settings and certificate are wanted.
            ranges: Whether the ranges for int8 are wanted.

        Raises:
            FileNotFoundError: If a file that is named is not there.
            ValueError: If a file is damaged or belongs to another model.
        """
        path = file_of(model, SETTINGS_FILE, hub) if exits or ranges else None
        if path is None:
            return cls(None, ExitSettings(), None, None)
        found = CalibrationFile.read(path)

        def place(kind: str) -> Path | None:
            name = found.files.get(kind)
            if name is None:
                return None
            place = file_of(model, name, hub)
            if place is None:
                raise FileNotFoundError(
                    f"{model} has no {name}, which its {SETTINGS_FILE} names; copy all files of the folder, or run "
                    "`geep profile` again."
                )
            return place

        table, observed = place("table") if exits else None, place("ranges") if ranges else None
        return cls(
            None if table is None else ExitPredictor.load(table, fingerprint=fingerprint),
            ExitSettings.from_dict(found.settings) if exits else ExitSettings(),
            None if observed is None else ActivationRanges.load(observed, fingerprint=fingerprint),
            None if found.certificate is None or not exits else Certificate.from_dict(found.certificate),
        )

    def save(self, folder: str | Path, *, fingerprint: dict[str, str], record: Mapping[str, Any]) -> None:
        """Write everything into a model folder, all of it or none.

        Table and ranges are named by their contents and written first; `calibration.json`, which names them, makes
        them valid in one step. Tables that it no longer names are then deleted; ranges that were observed before stay,
        for they depend on the model alone.
        """
        folder = Path(folder)
        ranges: str | None = None
        if self.ranges is not None:
            ranges = self.ranges.save(folder, fingerprint=fingerprint).name
        elif (folder / SETTINGS_FILE).exists():
            ranges = _ranges_before(folder, fingerprint)
        table = None if self.predictor is None else self.predictor.save(folder, fingerprint=fingerprint).name
        CalibrationFile(
            self.settings.to_dict(),
            {"table": table, "ranges": ranges},
            None if self.certificate is None else self.certificate.to_dict(),
            record,
        ).write(folder)
        for stem in (TABLE_NAME, RANGES_NAME):
            for file in folder.glob(f"{stem}-*.safetensors"):
                if file.name not in (table, ranges):
                    file.unlink(missing_ok=True)


def _ranges_before(folder: Path, fingerprint: dict[str, str]) -> str | None:
    """Name of the ranges that a folder has for this model; None where it has none that can be used."""
    try:
        name = CalibrationFile.read(folder).files.get("ranges")
        if name is not None:
            ActivationRanges.load(folder / name, fingerprint=fingerprint)
    except (OSError, ValueError):
        return None
    return name
