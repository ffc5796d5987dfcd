"""The folder of checkpoints while training runs: what they were made of, which are whole, how they go."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from geep.folder.files import publish
from geep.modeling.model import GeepForSequenceClassification
from geep.training.recipes import Recipe
from geep.training.rows import digest_rows
from geep.training.settings import TrainSettings

logger = logging.getLogger(__name__)

_LEDGER_FILE = "made_of.json"


@dataclass(frozen=True, slots=True)
class Ledger:
    """What checkpoints were made of, kept beside them: a training with other settings or rows does not go on there."""

    made_of: Mapping[str, str]

    @classmethod
    def of(
        cls,
        model: GeepForSequenceClassification,
        rows: Sequence[Mapping[str, Any]],
        dev: Sequence[Mapping[str, Any]] | None,
        settings: TrainSettings,
    ) -> Ledger:
        """Describe a training by its settings, its model's configuration and digests of its rows."""
        config = {**model.config.to_dict(), "transformers_version": None}
        return cls(
            {
                "settings": json.dumps(asdict(settings), sort_keys=True),
                "model": json.dumps(config, sort_keys=True, default=str),
                "rows": digest_rows(rows),
                "development rows": "none" if dev is None else digest_rows(dev),
            }
        )

    def open(self, folder: Path) -> None:
        """Note what is trained, or check that it is what was begun.

        Raises:
            ValueError: If the folder holds checkpoints of another training.
        """
        path = folder / _LEDGER_FILE
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            other = [name for name, value in self.made_of.items() if before.get(name) != value]
            if other:
                raise ValueError(
                    f"{folder} holds checkpoints of a training with other {' and '.join(other)}. Go on with the same, "
                    "choose another folder, or delete it."
                )
            return
        # Whole or not at all: of several processes that begin together, another one may be reading it.
        publish(path, json.dumps(self.made_of).encode())


def stage_folders(folder: Path, recipe: Recipe) -> list[Path]:
    """Where each stage of a recipe keeps its checkpoints."""
    return [folder / f"{number}-{stage.name}" for number, stage in enumerate(recipe.stages)]


def last_checkpoint(folder: Path) -> str | None:
    """Latest whole checkpoint; later ones that a killed process left half written are deleted."""
    while folder.is_dir() and (found := get_last_checkpoint(str(folder))) is not None:
        with contextlib.suppress(OSError, ValueError):
            json.loads((Path(found) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # the Trainer writes it last
            return found
        logger.warning("Checkpoint %s is not whole and is deleted; training goes on from the one before it.", found)
        shutil.rmtree(found)
    return None


def state_of(checkpoint: str) -> TrainerState:
    """What the Trainer noted in a whole checkpoint: steps, log, the best step so far."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def discard_checkpoints(folder: Path, recipe: Recipe) -> None:
    """Delete checkpoints and ledger, and the folder if nothing else is in it: the training is done."""
    for path in stage_folders(folder, recipe):
        shutil.rmtree(path, ignore_errors=True)
    (folder / _LEDGER_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
