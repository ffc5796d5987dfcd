"""What a model folder keeps beside the model: table, settings, ranges, certificate. The model is not known here."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

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
        is_uncertified: Whether there are exits of which nothing is certified: the full model answers as it is.
    """

    predictor: ExitPredictor | None
    settings: ExitSettings
    ranges: ActivationRanges | None
    certificate: Certificate | None
    is_uncertified: bool = False

    @classmethod
    def load(
        cls, model: str | Path, hub: HubOptions, *, fingerprint: dict[str, str], exits: bool, dtype: str | None
    ) -> StoredExits:
        """Read what belongs to a model: of a folder or of the hub.

        Args:
            model: Folder or model id.
            hub: How a model of the hub is had.
            fingerprint: Digests of model and tokenizer, to which everything has to belong.
            exits: Whether table, settings and certificate are wanted.
            dtype: What will be run; None: what was certified. The ranges are read for int8.

        Raises:
            FileNotFoundError: If a file that is named is not there.
            ValueError: If a file is damaged or belongs to another model.
        """
        if not (exits or dtype == "int8"):
            return cls(None, ExitSettings(), None, None)
        while True:
            path = file_of(model, SETTINGS_FILE, hub)
            if path is None:
                return cls(None, ExitSettings(), None, None)
            found = CalibrationFile.read(path)
            if found.belongs_to != fingerprint:
                names = sorted(name for name in fingerprint if found.belongs_to.get(name) != fingerprint[name])
                raise ValueError(
                    f"{path} belongs to another {' and '.join(names)} than the folder's, whose exits it knows nothing "
                    "of: run `geep profile` and `geep calibrate` again, or delete it."
                )
            certified = None if found.certificate is None or not exits else Certificate.from_dict(found.certificate)
            runs_in = certified.made_with.get("dtype") if certified is not None and dtype is None else dtype
            wanted = {"table": exits, "ranges": runs_in == "int8"}
            names_of = {kind: name for kind, name in found.files.items() if name is not None and wanted.get(kind)}
            places = {kind: file_of(model, name, hub) for kind, name in names_of.items()}
            missing = [names_of[kind] for kind, place in places.items() if place is None]
            if not missing:
                break
            # Another process may have published others since: then they are named now.
            if CalibrationFile.read(file_of(model, SETTINGS_FILE, hub) or path) == found:
                raise FileNotFoundError(
                    f"{model} has no {missing[0]}, which its {SETTINGS_FILE} names; copy all files of the folder, or "
                    "run `geep profile` again."
                )
        table, observed = places.get("table"), places.get("ranges")
        return cls(
            None if table is None else ExitPredictor.load(table, fingerprint=fingerprint),
            ExitSettings.from_dict(found.settings) if exits else ExitSettings(),
            None if observed is None else ActivationRanges.load(observed, fingerprint=fingerprint),
            certified,
            exits and certified is None,
        )

    def save(self, folder: str | Path, *, fingerprint: dict[str, str], record: Mapping[str, Any] | None = None) -> None:
        """Write everything into a model folder, all of it or none.

        Table and ranges are named by their contents and written first; `calibration.json`, which names them, makes
        them valid in one step. Tables that it no longer names are then deleted; ranges that were observed before stay,
        for they depend on the model alone.

        Args:
            folder: The model's folder; one process at a time writes to it.
            fingerprint: Digests of model and tokenizer that all of it belongs to.
            record: How it was found. None: what the folder says already, if table and settings are those that it has.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _only_writer(folder):
            before = _before(folder, fingerprint)
            ranges = None if before is None else before.files.get("ranges")
            if self.ranges is not None:
                ranges = self.ranges.save(folder, fingerprint=fingerprint).name
            table = None if self.predictor is None else self.predictor.save(folder, fingerprint=fingerprint).name
            settings, files = self.settings.to_dict(), {"table": table, "ranges": ranges}
            if record is None:
                # As JSON has them: tuples are lists there.
                now = json.loads(json.dumps(settings)), table
                is_same = before is not None and (before.settings, before.files.get("table")) == now
                record = before.record if before is not None and is_same else {}
            certificate = None if self.certificate is None else self.certificate.to_dict()
            CalibrationFile(settings, files, fingerprint, certificate, record).write(folder)
            for stem in (TABLE_NAME, RANGES_NAME):
                for file in folder.glob(f"{stem}-*.safetensors"):
                    if file.name not in (table, ranges):
                        file.unlink(missing_ok=True)


def _only_writer(folder: Path) -> FileLock:
    """A lock of this machine's processes on a folder; its file lies elsewhere, for folders are copied and uploaded."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else 0
    return FileLock(Path(tempfile.gettempdir()) / f"geep-{user}-{name}.lock")


def _before(folder: Path, fingerprint: dict[str, str]) -> CalibrationFile | None:
    """What a folder has for this model; None where it has nothing that can be used."""
    try:
        found = CalibrationFile.read(folder)
    except (OSError, ValueError):
        return None
    name = found.files.get("ranges")
    if found.belongs_to != fingerprint or (name is not None and not (folder / name).exists()):
        return None
    return found
