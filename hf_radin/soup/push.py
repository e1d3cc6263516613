"""A saved soup on the Hub: what is uploaded, and that the card and the recipe may be seen by those who will."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_radin.checkpoints.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    PROCESSOR_FILES,
    WEIGHTS_INDEX,
    read_fields,
    weight_files,
)
from hf_radin.checkpoints.forward import batch_logits
from hf_radin.checkpoints.model import load_processor, quiet_transformers
from hf_radin.checkpoints.processor import made_up_images, prepare_image
from hf_radin.runtime.files import ADAPTER_FOLDER
from hf_radin.runtime.hub_commit import PushOptions, commit_files, full_id, is_private, refuse_offline
from hf_radin.runtime.hub_errors import UNKNOWN, asking_the_hub, is_late, patiently, status_of
from hf_radin.runtime.text import one_line
from hf_radin.soup import card, pictures
from hf_radin.soup.redact import find_name, private_names, without_names, without_paths
from hf_radin.soup.report import RECIPE, SETTINGS_FILES, SearchReport

if TYPE_CHECKING:
    import torch
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)

# The files of a saved soup beside its weights; code is uploaded where the configuration names it.
UPLOADED = (*SETTINGS_FILES, RECIPE, "README.md", *pictures.NAMES)
# What an earlier soup says of itself, which is replaced with it, and its adapter.
REPLACED = (
    *(card.EVAL_RESULTS, *pictures.NAMES),
    *(f"{ADAPTER_FOLDER}/{name}" for name in (ADAPTER, ADAPTER_CONFIG, *PROCESSOR_FILES)),
)
# Files that a name may stand in.
TEXTS = (".json", ".md", ".py")
COMMIT_MESSAGE = "Upload a model soup cooked with hf_radin"


@dataclass(frozen=True)
class CardOptions:
    """What a pushed card and recipe say. The names are those of `push_soup_to_hub`, which explains them."""

    license: str | None = None
    hide_private: bool = False
    eval_task: str | None = None


# The card and the recipe as they were saved, but for paths.
AS_SAVED = CardOptions()


def push_folder(folder: Path, repo_id: str, options: PushOptions, shown: CardOptions = AS_SAVED) -> CommitInfo:
    """Upload a saved soup in one commit: its checkpoint, recipe, card and pictures, and nothing else that lies there.

    Then the model is loaded once from what the Hub has, and predicts three images, unless `options.verify` is False.

    Raises:
        ValueError: if the folder holds no weights or others than were saved, as `commit_files` does, or if the pushed
            model is loaded or predicts otherwise than that of the folder.
    """
    files = files_to_push(folder, repo_id, options, shown)
    options = replace(options, commit_message=options.commit_message or COMMIT_MESSAGE)
    if _names_code(folder):
        logger.info("The model takes code that comes with it, which nobody allowed to run: it is pushed unseen.")
        options = replace(options, verify=False)
    if not options.verify:
        return commit_files(repo_id, files, options, replaces=REPLACED)
    before = _Loaded.read(folder)
    with tempfile.TemporaryDirectory() as temporary:
        arrived, repo_id = Path(temporary), full_id(repo_id, options.token)
        commit = commit_files(repo_id, files, options, replaces=REPLACED, arrived=arrived)
        patiently(lambda: _complete(arrived, repo_id, commit.oid, files, options.token), passes=is_late)
        try:
            before.compare(_Loaded.read(arrived))
            # that of the folder may have been overwritten after its files were looked at
            if (pushed := SearchReport.read(arrived / RECIPE)).files:
                pushed.check_files(arrived)
        except ValueError as error:
            place = f"{repo_id} at commit {commit.oid}"
            problem = str(error).replace(str(arrived), place)
            raise ValueError(f"{place} was pushed, but is not the model of {folder}: {problem}") from error
    return commit


@dataclass(frozen=True)
class _Loaded:
    """What transformers makes of the checkpoint in a folder.

    Args:
        misfits: what its loading report names.
        logits: for made-up images, each `(1, classes)`; none if the model takes no such images.
    """

    misfits: dict[str, list[str]]
    logits: list[torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> _Loaded:
        """Load a checkpoint as anybody would, and run it.

        Raises:
            ValueError: if it can't be loaded, or if weights are missing or don't fit.
        """
        import torch
        from transformers import AutoModelForImageClassification

        processor = load_processor(folder)
        try:
            with quiet_transformers():
                model, report = AutoModelForImageClassification.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
                )
        except Exception as error:  # each model has its own errors
            raise ValueError(f"{folder} can't be loaded by transformers: {one_line(error)}") from error
        misfits = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
        for kind in ("missing_keys", "mismatched_keys"):
            if kind in misfits:
                raise ValueError(f"{folder}: transformers reports {kind} for {', '.join(misfits[kind][:3])}.")
        try:
            with torch.inference_mode():
                batches = [_as_batch(prepare_image(processor, image), model.dtype) for image in made_up_images()]
                logits = [batch_logits(model.eval(), batch, nullcontext()) for batch in batches]
        except Exception as error:  # such as for images of another size than the one that the model takes
            logger.warning("The model of %s takes no made-up images, and is only loaded: %s", folder, one_line(error))
            logits = []
        return cls(misfits, logits)

    def compare(self, other: _Loaded) -> None:
        """Raises a ValueError if another checkpoint is loaded or predicts otherwise."""
        import torch

        if other.misfits != self.misfits:
            raise ValueError(f"transformers reports {other.misfits} of it where it was {self.misfits}.")
        if len(other.logits) != len(self.logits):
            raise ValueError(f"it takes {len(other.logits)} of three images where it was {len(self.logits)}.")
        for number, (now, before) in enumerate(zip(other.logits, self.logits, strict=True), 1):
            if now.shape != before.shape or not torch.allclose(now, before, rtol=1e-4, atol=1e-4, equal_nan=True):
                shown = [f"{logits.max():.6g} for class {logits.argmax()}" for logits in (now, before)]
                raise ValueError(f"the largest logit of image {number} is {' where it was '.join(shown)}.")


def _as_batch(values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inputs of a model for one image as a batch."""
    return {
        name: value[None].to(dtype) if value.is_floating_point() else value[None] for name, value in values.items()
    }


def _complete(folder: Path, repo_id: str, commit: str, names: Collection[str], token: str | bool | None) -> None:
    """Download what else a commit has that decides about a model; what was read back already is there.

    Args:
        names: of the files that were pushed.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with asking_the_hub(f"{repo_id} at commit {commit}, which was pushed", revision=commit):
        for name in HfApi(token=token).list_repo_files(repo_id, revision=commit):
            if name in names or ("/" not in name and name.endswith(".json")):
                hf_hub_download(repo_id, name, revision=commit, token=token, local_dir=folder)


def files_to_push(
    folder: Path, repo_id: str, options: PushOptions, shown: CardOptions = AS_SAVED
) -> dict[str, Path | bytes]:
    """The files of a saved soup as they are uploaded, by name. Errors as of `push_folder`."""
    files = saved_files(folder)
    original = SearchReport.read(folder / RECIPE, is_saved=True)
    original.check_files(folder)  # before a Hub is asked that may not answer
    refuse_offline(repo_id)
    if shown.license is not None:
        check_license(shown.license, options.token)
    files |= {name: folder / name for name in original.files}
    report = without_paths(original)
    files[RECIPE] = report.text.encode()
    if shown.eval_task is not None:
        files[card.EVAL_RESULTS] = card.eval_results(report, shown.eval_task)
    is_public = not is_private(repo_id, options)
    # of the original: a folder is no repository
    names = private_names(original, options.token) if shown.hide_private or is_public else []
    if report.adapter:
        adapter, report = _adapter_to_push(folder, report, names if shown.hide_private else [])
        files |= {**adapter, RECIPE: report.text.encode()}
    if names and not shown.hide_private:
        warn_of_names(names)
    elif names:
        files |= _without_names(folder, report, names, shown.license)
        texts = {name: content for name, content in files.items() if name.endswith(TEXTS)}
        if match := find_name(texts, names):
            file, name = match
            raise ValueError(f"{folder / file} names {name}, which is private: take it out by hand, then push again.")
    if "README.md" in files:
        readme = _card_to_push(files["README.md"], folder, full_id(repo_id, options.token), shown.license)
        files["README.md"] = readme
        for name in pictures.NAMES:  # a picture that an earlier card showed stays here
            if f"]({name})".encode() not in readme:
                files.pop(name, None)
    return files


def warn_of_names(names: list[str]) -> None:
    """Say which private names will be public."""
    logger.warning(
        "The recipe and the card name what is private, and everybody can read them: %s. Push with hide_private "
        "(--hide-private) to leave these names out, or into a private repository.",
        ", ".join(names),
    )


def check_license(license: str, token: str | bool | None = None) -> None:
    """See that the Hub takes a card with such a licence; of a Hub that reads no cards it is not known.

    Raises:
        ValueError: if it does not.
    """
    from huggingface_hub import ModelCardData, constants, get_session
    from huggingface_hub.errors import BadRequestError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    content = {"repoType": "model", "content": f"---\n{ModelCardData(license=license)}\n---\n"}

    def ask() -> None:
        with asking_the_hub(f"license={license!r}"):
            # not `ModelCard.validate`, which asks without the token
            address, headers = f"{constants.ENDPOINT}/api/validate-yaml", build_hf_headers(token=token)
            answer = get_session().post(address, json=content, headers=headers)
            try:
                hf_raise_for_status(answer)
            except BadRequestError as error:
                raise ValueError(
                    f"license={license!r}: the Hub knows no such licence; hf.co/docs/hub/repositories-licenses has "
                    "those that it knows, and for any else there is 'other'."
                ) from error
            except OSError as error:
                if status_of(error) not in UNKNOWN:
                    raise

    patiently(ask)


def saved_files(folder: Path) -> dict[str, Path | bytes]:
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
        raise ValueError(f"{folder} holds no complete soup: there is no {CONFIG}. Save it again.")
    folders = [name for name in UPLOADED if (folder / name).is_dir()]
    if folders:
        raise ValueError(f"{folder / folders[0]} is a folder where a file should be: take it away, then push again.")
    patterns = [*UPLOADED, *(["*.py"] if _names_code(folder) else [])]
    weights = weight_files(folder)
    names = {path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    names |= {path.name for path in weights} | ({WEIGHTS_INDEX} if len(weights) > 1 else set())
    return {name: folder / name for name in sorted(names)}


def _adapter_to_push(
    folder: Path, report: SearchReport, hidden: Collection[str]
) -> tuple[dict[str, Path | bytes], SearchReport]:
    """The files of the adapter beside a soup, by name, and the report with their hashes.

    What they say of the base is what the report says: no path of this machine, and no name that is hidden.
    """
    assert report.adapter is not None  # as the caller has seen
    files: dict[str, Path | bytes] = {
        f"{ADAPTER_FOLDER}/{name}": folder / ADAPTER_FOLDER / name for name in report.adapter.files
    }
    fields = read_fields(folder / ADAPTER_FOLDER / ADAPTER_CONFIG)
    base = "hidden" if report.adapter.base in hidden else report.adapter.base
    shown = {**fields, "base_model_name_or_path": base}
    if shown == fields:
        return files, report
    content = (json.dumps({**shown, "revision": None}, indent=2, sort_keys=True) + "\n").encode()
    files[f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}"] = content
    hashes = {**report.adapter.files, ADAPTER_CONFIG: hashlib.sha256(content).hexdigest()}
    return files, replace(report, adapter=replace(report.adapter, base=base, revision=None, files=hashes))


def _names_code(folder: Path) -> bool:
    """Whether the configuration in a folder names code that comes with the model."""
    return b'"auto_map"' in (folder / CONFIG).read_bytes()


def _without_names(folder: Path, report: SearchReport, names: list[str], license: str | None) -> dict[str, bytes]:
    """The recipe and the card without these names."""
    logger.warning("Left out of the recipe and the card, since they are private: %s.", ", ".join(names))
    report = without_names(report, names)
    return {RECIPE: report.text.encode(), **card.renewed_card(folder, report, license=license)}


def _card_to_push(readme: Path | bytes, folder: Path, repo_id: str, license: str | None) -> bytes:
    """A card with the repository's name in the line to copy, and the licence in its head."""
    content = readme if isinstance(readme, bytes) else readme.read_bytes()
    if license is not None:
        content = card.licensed(content, license, folder / "README.md")
    return card.naming(content, repo_id)
