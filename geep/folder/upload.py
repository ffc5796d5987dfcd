"""A model folder sent to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict, Unpack


class UploadOptions(TypedDict, total=False):
    """How a folder is sent.

    Attributes:
        token: Access token, or True for the stored one; None: the stored one.
        private: Whether a repository that is made is private; None: the account's default.
        revision: Branch to commit to; None: the default branch.
        commit_message: The commit's message.
    """

    token: str | bool | None
    private: bool | None
    revision: str | None
    commit_message: str


def upload(folder: str | Path, repo_id: str, **options: Unpack[UploadOptions]) -> str:
    """Commit all files of a folder to a repository, which is made if it does not exist; return the commit's address."""
    # Who keeps models in folders asks no hub.
    from huggingface_hub import HfApi

    hub = HfApi(token=options.get("token"))
    made = hub.create_repo(repo_id, private=options.get("private"), exist_ok=True)
    commit = hub.upload_folder(
        repo_id=made.repo_id,
        folder_path=str(folder),
        revision=options.get("revision"),
        commit_message=options.get("commit_message", "Upload geep classifier"),
    )
    return str(commit)
