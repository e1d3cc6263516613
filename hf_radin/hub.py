"""The Hub: one commit for a folder, so that nobody ever sees half a soup."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_radin.access import asking_the_hub
from hf_radin.checkpoint import weight_files
from hf_radin.processes import on_main_process

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from hf_radin.soup import Soup

# The files of a saved soup; code is there where the ingredients brought their own.
UPLOADED = ("*config.json", "recipe.json", "model*.safetensors*", "README.md", "*.png", "*.py")
COMMIT_MESSAGE = "Upload a model soup cooked with hf_radin"


def push_soup_to_hub(
    soup: Soup,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    license: str | None = None,
) -> CommitInfo:
    """Create the repository if need be and upload the whole soup, card included, in one commit.

    With several processes the main one pushes and the others wait.

    Args:
        private: visibility of a new repository; by default what the organisation or user chose.
        revision: branch to commit to.
        create_pr: open a pull request instead of committing.
        license: for the card; by default that of the ingredients, if they agree.

    Raises:
        ValueError: if the id is none, or the token may not write there.
    """

    def push() -> CommitInfo:
        with tempfile.TemporaryDirectory() as temporary:
            soup.write_into(Path(temporary), license=license)
            return push_folder(
                Path(temporary),
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or COMMIT_MESSAGE,
            )

    return on_main_process(push)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
) -> CommitInfo:
    """Upload a saved soup in one commit: its checkpoint, recipe, card and pictures, and nothing else that lies there.

    Raises:
        ValueError: if the folder holds no weights, the id is none, or the token may not write there.
    """
    weight_files(folder)
    paths = sorted(path for pattern in UPLOADED for path in folder.glob(pattern))
    return commit_files(
        repo_id,
        {path.name: path for path in paths},
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )


def commit_files(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
) -> CommitInfo:
    """Make the repository if need be, and upload files under their names in one commit.

    Raises:
        ValueError: if the id is none, or the token may not write there.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    ready_repo(repo_id, repo_type=repo_type, private=private, token=token)
    # not `upload_folder`: with Xet it splits a large folder into several commits
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    with asking_the_hub(repo_id, revision=revision):
        return HfApi(token=token).create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
        )


def ready_repo(
    repo_id: str, *, repo_type: str = "model", private: bool | None = None, token: str | bool | None = None
) -> None:
    """Make sure that the repository is there and may be written to.

    Raises:
        ValueError: if the id is none, or the token may not write there.
    """
    from huggingface_hub import HfApi

    with asking_the_hub(repo_id):
        HfApi(token=token).create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
