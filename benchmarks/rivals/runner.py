"""The parent's side of the protocol in `worker.py`: start workers, ask them one at a time, outlive those that die."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self


class RivalFailed(Exception):
    """A worker died, was silent for too long, or answered with an error."""


class Worker:
    """One rival in a process of its own. Use as a context manager: on leaving, the process is gone."""

    def __init__(self, name: str, command: Sequence[str | Path], *, log: Path, env: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        self._stderr = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **env},
        )
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def ask(self, order: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
        """Send an order and wait for its answer.

        Args:
            order: What to do; see `worker.py`.
            seconds: How long to wait. A worker that takes longer is ended: it would disturb the others.

        Raises:
            RivalFailed: If the worker died, took too long, or answered with an error; the message says which.
        """
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(dict(order)).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(time.monotonic() + seconds)
        except (BrokenPipeError, EOFError):
            code = self._process.wait()
            raise RivalFailed(f"{self.name} died with code {code}: {self._last_words()}") from None
        except TimeoutError:
            self.close()
            raise RivalFailed(f"{self.name} gave no answer within {seconds:.0f} s and was ended") from None
        answer = json.loads(line)
        if "error" in answer:
            raise RivalFailed(f"{self.name}: {answer['error']}")
        return answer["ok"]

    def _read_line(self, deadline: float) -> bytes:
        """Read up to the end of a line; raises EOFError or TimeoutError."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise TimeoutError
                chunk = os.read(self._process.stdout.fileno(), 1 << 20)
                if not chunk:
                    raise EOFError
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _last_words(self, limit: int = 300) -> str:
        self._stderr.flush()
        words = self.log.read_text(encoding="utf-8", errors="replace").strip()
        return words[-limit:] or "it said nothing"

    def cpu_seconds(self) -> float:
        """CPU seconds the process has used so far, all threads; 0 where the system does not tell."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        if self.alive:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None and not stream.closed:
                # What was left to write has nobody to read it.
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class IdleWatch:
    """Notes how much CPU workers use while it is another's turn: it must be next to nothing."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = tuple(workers)
        self.worst: dict[str, float] = {worker.name: 0.0 for worker in workers}

    def ask(self, worker: Worker, order: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
        """Ask a worker and watch the others meanwhile."""
        others = [other for other in self.workers if other is not worker and other.alive]
        before, begin = [other.cpu_seconds() for other in others], time.monotonic()
        answer = worker.ask(order, seconds=seconds)
        elapsed = time.monotonic() - begin
        # /proc counts in hundredths of a second: short turns would tell nothing.
        if elapsed >= 0.5:
            for other, used in zip(others, before, strict=True):
                share = (other.cpu_seconds() - used) / elapsed
                self.worst[other.name] = max(self.worst[other.name], share)
        return answer


def worker_env(threads: int) -> dict[str, str]:
    """Environment of a worker: as many threads as all others, no network."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "INFINITY_ANONYMOUS_USAGE_STATS": "0",
        "DO_NOT_TRACK": "1",
    }


def this_python() -> Path:
    """The Python that runs this process, with geep in it."""
    return Path(sys.executable)
