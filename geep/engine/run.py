"""One run of texts: its staircases, and the pools in which survivors wait."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geep.backends import Backend, TokenBatch
from geep.engine.planning import Plan
from geep.engine.settings import ExitSettings
from geep.progress import Progress, no_progress
from geep.scheduler import budget_cuts, schedule

Integers = NDArray[np.int64]

_NONE: Integers = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class RunResult:
    """Columns of a run, one row a text, in the caller's order.

    Attributes:
        logits: Logits over the temperature of the exit that answered, (num_texts, num_labels) float32, on the host.
        exit_layers: Encoder layers run, (num_texts,).
        predicted_layers: Layer at which each text was first asked, (num_texts,).
    """

    logits: Tensor
    exit_layers: Integers
    predicted_layers: Integers


@dataclass(frozen=True, slots=True)
class Course:
    """What every run of an engine shares.

    Attributes:
        backend: Runs layers and exits.
        depths: Layers at which an answer can be had, the full model last.
        num_labels: Labels.
        multi_label: Whether several labels may hold at once.
        max_batch_tokens: Tokens of a staircase.
        window_tokens: Tokens that are sorted and pooled together.
    """

    backend: Backend[Any]
    depths: tuple[int, ...]
    num_labels: int
    multi_label: bool
    max_batch_tokens: int
    window_tokens: int

    def run(self, batch: TokenBatch, plan: Plan, settings: ExitSettings) -> RunResult:
        """Run texts by a plan: staircases, and pooled survivors, a window at a time."""
        run = Run(self, settings, plan)
        with torch.inference_mode():
            rows = run.answer_known()
            for start, stop in budget_cuts(batch.lengths[rows], max_tokens=self.window_tokens):
                run.window(batch, rows[start:stop])
            return run.result()

    def exit_logits(self, batch: TokenBatch, *, what: str = "all exits", progress: Progress = no_progress) -> Tensor:
        """Logits of every exit and of the full model: (num_depths, num_texts, num_labels).

        Args:
            batch: The texts.
            what: Name of the work for `progress`.
            progress: Told how many tokens are done.
        """
        out = torch.empty(len(self.depths), len(batch), self.num_labels)

        def note(live: Any, layer: int, texts: Integers) -> None:
            logits = self.backend.exit_logits(live, layer, 0, len(texts))
            out[self.depths.index(layer), torch.from_numpy(texts)] = logits.float().cpu()

        self.visit(batch, note, self.depths, what=what, progress=progress)
        return out

    def visit(
        self,
        batch: TokenBatch,
        note: Callable[[Any, int, Integers], None],
        layers: Collection[int],
        *,
        what: str,
        progress: Progress = no_progress,
    ) -> None:
        """Run texts through all layers and look at them after some.

        Args:
            batch: The texts.
            note: Told after each of `layers`, in inference mode: the live texts, the layer, and which texts they are.
            layers: Where to look.
            what: Name of the work for `progress`.
            progress: Told how many tokens are done.
        """
        done, total = 0, len(batch.input_ids)
        full = np.full(len(batch), self.depths[-1])
        with torch.inference_mode():
            for staircase in schedule(full, batch.lengths, max_batch_tokens=self.max_batch_tokens):
                live = self.backend.start(batch.select(staircase.indices))
                for layer in range(1, self.depths[-1] + 1):
                    live = self.backend.advance(live, layer, len(staircase.indices))
                    if layer in layers:
                        note(live, layer, staircase.indices)
                done += int(staircase.lengths.sum())
                progress(what, done, total)


class Run:
    """One run of texts: its columns, and the pools in which survivors wait.

    Args:
        course: What every run of an engine shares.
        settings: When exits answer.
        plan: Where each text is asked first.
    """

    def __init__(self, course: Course, settings: ExitSettings, plan: Plan) -> None:
        self.course, self.settings, self.plan = course, settings, plan
        self.backend = course.backend
        num_texts = len(plan.predicted_layers)
        self.logits = torch.full((num_texts, course.num_labels), torch.nan)
        self.waiting: list[tuple[Integers, Integers, Tensor, int]] = []
        self.exit_layers: Integers = np.zeros(num_texts, dtype=np.int64)
        self.pools: dict[int, list[tuple[Any, Integers]]] = {}

    def answer_known(self) -> Integers:
        """Answer the texts that need no encoder, and return the rows of the others."""
        layers, logits = self.plan.predicted_layers, self.plan.lexical_logits
        if logits is not None:
            known = np.flatnonzero(layers == 0)
            self._answer(known, logits[torch.from_numpy(known)], 0)
        return np.flatnonzero(layers > 0)

    def window(self, batch: TokenBatch, rows: Integers) -> None:
        """Run the texts at `rows`; afterwards no pool holds any."""
        layers = self.plan.predicted_layers[rows]
        budget = self.course.max_batch_tokens
        if int(batch.lengths[rows].sum()) <= budget:
            self._batch(batch, rows)
            return
        for staircase in schedule(layers, batch.lengths[rows], max_batch_tokens=budget):
            texts = rows[staircase.indices]
            live = self.backend.start(batch.select(texts))
            for layer in range(1, int(staircase.exit_layers[0]) + 1):
                due = staircase.texts_at(layer + 1)
                continuing = due if self._is_final(layer) else None
                live = self.backend.advance(live, layer, staircase.texts_at(layer), continuing=continuing)
                if due < len(live.lengths):
                    self._ask(live, layer, due, texts)
        # Survivors of all staircases wait at the layer they have run. From the shallowest pool upwards they are packed
        # into full batches again and run to the next exit, so no batch shrinks as its texts leave.
        asked = self.settings.asked_layers(self.course.depths)
        for layer in self.course.depths[:-1]:
            following = int(asked[np.searchsorted(asked, layer, side="right")])
            for live, texts in self._merged(self.pools.pop(layer, []), budget):
                for step in range(layer + 1, following + 1):
                    continuing = 0 if self._is_final(step) else None
                    live = self.backend.advance(live, step, len(texts), continuing=continuing)
                self._ask(live, following, 0, texts)

    def _batch(self, batch: TokenBatch, rows: Integers) -> None:
        """Run texts that are one batch: survivors stay in it, beside those who were not asked yet.

        Waiting for others would win nothing, for there are none: so no layer and no exit runs more than once, of which
        the fixed cost is what few texts pay for.
        """
        layers = self.plan.predicted_layers[rows]
        order = np.lexsort((batch.lengths[rows], -layers))
        texts, first = rows[order], layers[order]
        live = self.backend.start(batch.select(texts))
        asked = set(self.settings.asked_layers(self.course.depths).tolist())
        unanswered = np.ones(len(texts), dtype=bool)
        for layer in range(1, self.course.depths[-1] + 1):
            # Asked are those whose first exit is here and, where everybody is asked, those who were before.
            due = int(np.searchsorted(-first, -layer))
            stop = len(texts) if layer in asked else int(np.searchsorted(-first, -layer, side="right"))
            ends = due < stop and self._is_final(layer)
            live = self.backend.advance(live, layer, len(texts), continuing=due if ends else None)
            if due == stop:
                continue
            # `nonzero`, for at each exit of a small call `flatnonzero` would take as long as half of its arithmetic.
            (among,) = unanswered[due:stop].nonzero()
            missed = self._judge(live, layer, texts, due, stop, among)
            unanswered[due:stop] = False
            unanswered[missed] = True
            (going,) = unanswered.nonzero()
            if not len(going):
                return
            # Behind the last that goes on nobody runs: a prefix costs nothing.
            texts, first, unanswered = (column[: going[-1] + 1] for column in (texts, first, unanswered))
            kept, there = int(live.lengths[going].sum()), int(live.lengths[: len(texts)].sum())
            if len(going) < len(texts) and kept <= self.backend.keeps_above * there:
                live = self.backend.select(live, going)
                texts, first, unanswered = texts[going], first[going], unanswered[going]

    def _ask(self, live: Any, layer: int, start: int, texts: Integers) -> None:
        """Let the exit at `layer` answer the live texts from `start` on; those not certain enough go to the pool."""
        stop = len(live.lengths)
        missed = self._judge(live, layer, texts, start, stop, np.arange(stop - start))
        if len(missed):
            everyone = len(missed) == len(live.lengths)
            survivors = live if everyone else self.backend.select(live, missed)
            self.pools.setdefault(layer, []).append((survivors, texts[missed]))

    def _judge(self, live: Any, layer: int, texts: Integers, start: int, stop: int, among: Integers) -> Integers:
        """Let the exit at `layer` answer live texts start … stop - 1, or those among them that have no answer yet.

        Args:
            live: The texts.
            layer: The exit's.
            texts: Which they are.
            start: First text that is asked.
            stop: The one behind the last.
            among: Which of those between have no answer yet, counted from `start`, ascending.

        Returns:
            Which of these are not certain enough, counted as `live` counts.
        """
        asked = texts[start:stop][among]
        logits = self.backend.exit_logits(live, layer, start, stop).float()
        is_final = self._is_final(layer)
        if is_final and logits.device.type != "cpu":
            # What the device says stays there until the end: fetching it now would wait for it.
            self.exit_layers[asked] = layer
            self.waiting.append((asked, among, logits, layer))
            return _NONE
        # The one wait for the device: who is certain enough decides who goes on.
        logits = _rows(logits.cpu(), among)
        guess = self._guess(asked)
        logits = self.settings.answered(logits, layer, guess)
        if is_final:
            self._answer(asked, logits, layer)
            return _NONE
        unsure = self.settings.uncertainty(logits, layer, multi_label=self.course.multi_label, lexical=guess)
        sure = (unsure < self.settings.speed).numpy()
        (hits,), (missed,) = sure.nonzero(), (~sure).nonzero()
        self._answer(asked[hits], logits[torch.from_numpy(hits)], layer)
        return start + among[missed]

    def _is_final(self, layer: int) -> bool:
        """Whether the texts that are asked at a layer end there, whatever the answer."""
        return self.settings.on_miss == "stop" or layer == self.course.depths[-1]

    def _guess(self, texts: Integers) -> Tensor | None:
        """The table's logits of some texts, where exits read them."""
        guess = self.plan.lexical_logits
        if guess is None or not self.settings.reads_table:
            return None
        return guess[torch.from_numpy(texts)]

    def _answer(self, texts: Integers, logits: Tensor, depth: int) -> None:
        if len(texts):
            self.exit_layers[texts] = depth
            self.logits[torch.from_numpy(texts)] = logits / self.settings.temperature(depth)

    def _merged(self, pool: list[tuple[Any, Integers]], budget: int) -> list[tuple[Any, Integers]]:
        """Pack the pieces of a pool into as few batches as the budget allows."""
        if not pool:
            return []
        sizes = np.array([int(live.lengths.sum()) for live, _ in pool], dtype=np.int64)
        merged = []
        for start, stop in budget_cuts(sizes, max_tokens=budget):
            pieces = pool[start:stop]
            if len(pieces) == 1:
                merged.append(pieces[0])
                continue
            live = self.backend.concat([piece for piece, _ in pieces])
            texts = np.concatenate([texts for _, texts in pieces])
            by_length = np.argsort(live.lengths, kind="stable")
            merged.append((self.backend.select(live, by_length), texts[by_length]))
        return merged

    def result(self) -> RunResult:
        """Fetch what waits on the device, in one copy."""
        if self.waiting:
            fetched = torch.cat([logits for _, _, logits, _ in self.waiting]).cpu()
            pieces = fetched.split([len(logits) for _, _, logits, _ in self.waiting])
            for (texts, among, _, depth), piece in zip(self.waiting, pieces, strict=True):
                logits = _rows(piece, among)
                self._answer(texts, self.settings.answered(logits, depth, self._guess(texts)), depth)
        return RunResult(self.logits, self.exit_layers, self.plan.predicted_layers)


def _rows(logits: Tensor, rows: Integers) -> Tensor:
    """Some rows, ascending; all of them as they are."""
    return logits if len(rows) == len(logits) else logits[torch.from_numpy(rows)]
