"""A soup on the Hub: one commit for all of it, so that nobody ever sees half a soup."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints.files import CONFIG, PROCESSOR_FILES, WEIGHTS_INDEX, weight_files
from hf_radin.runtime.hub_commit import PushOptions, commit_files, full_id, is_private, refuse_offline
from hf_radin.runtime.hub_errors import asking_the_hub, patiently
from hf_radin.soup import card, pictures
from hf_radin.soup.recipe_file import RECIPE, read_recipe_file
from hf_radin.soup.redact import private_names, still_named, without, without_paths

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


logger = logging.getLogger(__name__)

# The files of a saved soup beside its weights; code is one where the configuration says so.
UPLOADED = (CONFIG, "generation_config.json", *PROCESSOR_FILES, RECIPE, "README.md", *pictures.NAMES)
# What an earlier soup says of itself, which goes with it.
REPLACED = (card.EVAL_RESULTS, *pictures.NAMES)
# Files that a name may stand in.
TEXTS = (".json", ".md", ".py")
COMMIT_MESSAGE = "Upload a model soup cooked with hf_radin"


def push_folder(
    folder: Path,
    repo_id: str,
    options: PushOptions,
    *,
    license: str | None = None,
    hide_private: bool = False,
    eval_task: str | None = None,
) -> CommitInfo:
    """Upload a saved soup in one commit: its checkpoint, recipe, card and pictures, and nothing else that lies there.

    Args:
        license, hide_private, eval_task: as in `push_soup_to_hub`.

    Raises:
        ValueError: if the folder holds no weights, or as `commit_files` does.
    """
    files = prepared(folder, repo_id, options, license=license, hide_private=hide_private, eval_task=eval_task)
    options = replace(options, commit_message=options.commit_message or COMMIT_MESSAGE)
    return commit_files(repo_id, files, options, replaces=REPLACED)


def prepared(
    folder: Path,
    repo_id: str,
    options: PushOptions,
    *,
    license: str | None = None,
    hide_private: bool = False,
    eval_task: str | None = None,
) -> dict[str, Path | bytes]:
    """The files of a saved soup as they are uploaded, by name. Arguments and errors as of `push_folder`."""
    refuse_offline(repo_id)
    if license is not None:
        check_license(license)
    files = uploaded(folder)
    whole = read_recipe_file(folder / RECIPE)
    fields = _without_paths(folder / RECIPE, whole)
    files[RECIPE] = _json(fields)
    if eval_task is not None:
        files[card.EVAL_RESULTS] = card.eval_results(fields, eval_task)
    is_seen = not is_private(repo_id, options)
    names = private_names(whole) if hide_private or is_seen else []  # a folder is no repository
    if names and not hide_private:
        warn_of_names(names)
    elif names:
        files |= _hiding(folder, fields, names, license)
        if left := still_named({name: one for name, one in files.items() if name.endswith(TEXTS)}, names):
            name, found = left
            raise ValueError(f"{folder / name} names {found}, which is private: take it out by hand, then push again.")
    if readme := files.get("README.md"):
        content = readme if isinstance(readme, bytes) else readme.read_bytes()
        content = content if license is None else card.licensed(content, license, folder / "README.md")
        files["README.md"] = card.naming(content, full_id(repo_id, options.token))
        for name in pictures.NAMES:  # one that an earlier card showed stays here
            if f"]({name})".encode() not in content:
                files.pop(name, None)
    return files


def warn_of_names(names: list[str]) -> None:
    """Say which private names will be public."""
    logger.warning(
        "The recipe and the card name what is private, and everybody can read them: %s. Push with hide_private "
        "(--hide-private) to leave these names out, or into a private repository.",
        ", ".join(names),
    )


def _hiding(folder: Path, fields: dict[str, Any], names: list[str], license: str | None) -> dict[str, bytes]:
    """The recipe and the card without these names."""
    logger.warning("Left out of the recipe and the card, since they are private: %s.", ", ".join(names))
    try:
        fields = without(fields, names)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / RECIPE} is not a whole recipe ({error!r}).") from error
    return {RECIPE: _json(fields), **card.anew(folder, fields, license=license)}


def _without_paths(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """A recipe as others may see it."""
    try:
        return without_paths(fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole recipe ({error!r}).") from error


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2) + "\n").encode()


def check_license(license: str) -> None:
    """See that the Hub takes a card with such a licence.

    Raises:
        ValueError: if it does not.
    """
    from huggingface_hub import ModelCard, ModelCardData

    text = f"---\n{ModelCardData(license=license)}\n---\n"

    def ask() -> None:
        with asking_the_hub(f"license={license!r}"):
            try:
                ModelCard(text).validate()
            except ValueError as error:
                raise ValueError(
                    f"license={license!r}: the Hub knows no such licence; hf.co/docs/hub/repositories-licenses has "
                    "those that it knows, and for any else there is 'other'."
                ) from error

    patiently(ask)


def uploaded(folder: Path) -> dict[str, Path | bytes]:
    """The files of a saved soup that are uploaded, by name.

    Raises:
        ValueError: if the folder holds no weights or no configuration.
    """
    config = folder / CONFIG
    if not config.is_file() and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds the recipe alone, and no model: cook it where its ingredients are, with `hf-radin "
            f"average --recipe {folder / RECIPE} --models ... --output ...`, and push what that writes."
        )
    if not config.is_file():
        raise ValueError(f"{folder} holds no whole soup: there is no {CONFIG}. Save it again.")
    folders = [name for name in UPLOADED if (folder / name).is_dir()]
    if folders:
        raise ValueError(f"{folder / folders[0]} is a folder where a file should be: take it away, then push again.")
    patterns = [*UPLOADED, *(["*.py"] if b'"auto_map"' in config.read_bytes() else [])]
    weights = weight_files(folder)
    names = {path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    names |= {path.name for path in weights} | ({WEIGHTS_INDEX} if len(weights) > 1 else set())
    return {name: folder / name for name in sorted(names)}
