"""`training.json`: what a model was made of. It is written last, so a folder that has it is whole.

Plain words and numbers; what they mean is known to those who train and to those who load data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geep.folder.files import TRAINING_FILE, publish


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a model folder came to be.

    Attributes:
        about: What was asked for: encoder, head, exit layers, settings, data, number of rows.
        result: What came of it: steps, seconds, measures on rows held out.
        logs: The Trainer's log, entry by entry.
    """

    about: Mapping[str, Any]
    result: Mapping[str, Any]
    logs: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, folder: str | Path) -> Provenance:
        """Read the file of a model folder.

        Raises:
            FileNotFoundError: If the folder has none: it was not finished.
            ValueError: If the file is no such record.
        """
        path = Path(folder) / TRAINING_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing, which says what rows the model was trained on; {folder} is no folder finished by "
                "`geep train`. Train it (again): the same command goes on where it stopped."
            )
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(fields["about"], fields["result"], fields.get("logs", []))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no record of a training ({error!r}); expected a JSON object with 'about' and 'result'. "
                "Delete the folder and train again."
            ) from error

    def write(self, folder: str | Path) -> Path:
        """Write the file, as the last one of its folder, and return its path."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        return publish(Path(folder) / TRAINING_FILE, text.encode("utf-8"))

    @property
    def data(self) -> dict[str, Any]:
        """Where the rows came from and how they were divided: the fields of a `DataPlan`.

        Raises:
            ValueError: If the model was trained on rows that came from no plan.
        """
        data = self.about.get("data")
        if data is None and "classifier" in self.about:
            raise ValueError(
                f"The model was made of {self.about['classifier']} by `geep accelerate`, which keeps no texts. To make "
                "it anew, run `geep accelerate` with another output."
            )
        if data is None:
            raise ValueError(
                "The model was trained without plan=, so its training.json cannot say where its rows are and which of "
                "them were held out. Pass the parts it was trained with, or train it with a DataPlan."
            )
        return dict(data)

    def check_labels(self, label_names: Sequence[str]) -> None:
        """Check that labels have the names that the model was made with: another name is another number.

        Raises:
            ValueError: If they have not.
        """
        known = self.about.get("label_names")
        if known is not None and list(known) != list(label_names):
            other = sorted({*known} ^ {*label_names})[:10]
            raise ValueError(
                f"The rows have the labels {list(label_names)[:10]}, the model was made with {list(known)[:10]}; found "
                f"otherwise: {other}. Give the labels their old names, or train again."
            )

    def check_rows(self, digests: Mapping[str, str]) -> None:
        """Check that rows are those that the model was made with: else rows it has learned could certify a promise.

        Args:
            digests: Digest of each part, as they are found now.

        Raises:
            ValueError: If a part has changed; the message names it. If the record does not say.
        """
        known = self.about.get("digests")
        if known is None:
            raise ValueError(
                "The record of the training has no digests of its rows, so whether they are still the same is not "
                "known, and rows that the model has learned must not certify a promise. Train it again."
            )
        changed = sorted(name for name in {*known, *digests} if known.get(name) != digests.get(name))
        if changed:
            raise ValueError(
                f"The rows have changed since the model was trained: found others for {', '.join(changed)}, expected "
                "those of then. Rows that it has learned must not certify a promise: bring the old files back, or "
                "train again."
            )
