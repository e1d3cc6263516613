"""Gather and vet checkpoints before anything large is read: each by itself, then against the others."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints import lora
from hf_radin.checkpoints.files import ADAPTER_CONFIG, CONFIG, PROCESSOR_FILES
from hf_radin.checkpoints.model import (
    check_header,
    check_saves,
    check_task,
    is_multi_label,
    load_config,
    load_processor,
    model_class,
)
from hf_radin.checkpoints.processor import ProcessorDifference, find_processor_differences
from hf_radin.ingredients.checkpoint_files import CheckpointFiles, Options, read_places
from hf_radin.ingredients.compatibility import describe, find_differences
from hf_radin.ingredients.ingredient import Ingredient, Ingredients, Version
from hf_radin.ingredients.labels import Alignment, align, chosen_classes, read_labels
from hf_radin.ingredients.resolve import Place, find_places
from hf_radin.runtime.files import digest, read_text
from hf_radin.runtime.hub_errors import asking_the_hub

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What was found out about a checkpoint.

    Args:
        id: what the user called it.
        problem: why it can't go into a soup with the others; empty if it can.
        notes: what the user should know of how it is used: it is a copy that is left out, or its classes are permuted.
        parameters: of its model; 0 if not known.
        files: of the checkpoint; None if they could not be read.
        ingredient: for a soup; None if there is a problem, or if it is a copy of another one.
    """

    id: str
    problem: str = ""
    notes: tuple[str, ...] = ()
    parameters: int = 0
    files: CheckpointFiles | None = field(default=None, repr=False)  # headers are long
    ingredient: Ingredient | None = None


def gather(
    models: str | Path | Sequence[str | Path | Place],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    image_processor: str | Path | None = None,
    base_model: str | Path | None = None,
    classes: str | Sequence[str] | None = None,
    checkpoint: str | None = None,
) -> Ingredients:
    """Find checkpoints and vet them from their small files and the headers of their weights.

    No weights are downloaded. Of checkpoints with equal weights the first one is used. Classes that stand in another
    order are brought into that of most; placeholders (`LABEL_0`) are matched to names by their numbers.

    Args:
        models: a pattern (`runs/ft-*`, `org/ft-*`), a Hub id (`org/a`, `org/a@rev`, `org/a@rev:subfolder`), the
            address of a collection on the Hub, a folder, a Trainer's run (see `checkpoint`), a `.txt` or `.yaml` file
            that lists such names, or a list of these. What is on disk goes before what is on the Hub. A place that
            `find_places` gave is taken as it is.
        revision: branch, tag or commit for the Hub ids that name none.
        token: for the Hub.
        allow_pickle: read `.bin` weights where there are no safetensors.
        trust_remote_code: run code that comes with a checkpoint.
        image_processor: Hub id or folder of the processor to use in place of the checkpoints' own.
        base_model: Hub id or folder of the model that LoRA adapters are merged into, if it is not where they say.
        classes: of the soup, where those of the checkpoints differ: `common` for those that all have, or names in the
            order that the soup shall have them. Other classes are left out of the checkpoints' heads. By default all
            have the same classes.
        checkpoint: of each run, a folder in that a Trainer saved checkpoints: `best` by its `trainer_state.json`,
            `last`, `root` for the model at its top, or `all`. By default the model at the top if there is one (the
            best, if that model mixes several), else the best, else the last, as a line says.

    Raises:
        ValueError: if nothing matches, fewer than two checkpoints are left, one of them lacks its configuration,
            weights, head or processor, or they differ in architecture, classes, sizes or preprocessing. The error
            names the checkpoint that differs and the difference.
    """
    names = _names(models)
    ingredients = locate(
        names,
        revision=revision,
        token=token,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        image_processor=image_processor,
        base_model=base_model,
        classes=classes,
        checkpoint=checkpoint,
    )
    if len(ingredients) < 2:
        raise ValueError(
            f"A soup needs at least two different checkpoints; {', '.join(map(str, names)) or 'an empty list'} gives "
            f"{ingredients[0].id if ingredients else 'none'}."
        )
    return ingredients


def locate(models: Sequence[str | Path | Place], **options: Any) -> Ingredients:
    """Like `gather`, for any number of checkpoints: a recipe may have a single ingredient."""
    verdicts = inspect(models, **options)
    problems = [verdict.problem for verdict in verdicts if verdict.problem]
    if problems:
        text = problems[0]
        if problems[1:]:
            text = text if text.endswith((".", "?")) else f"{text}."
            text += f" {len(problems) - 1} more can't be used either; `hf-radin inspect` lists all."
        raise ValueError(text)
    for text in _merged_notes(verdicts):
        logger.warning("%s", text)
    return Ingredients([verdict.ingredient for verdict in verdicts if verdict.ingredient])


def _names(models: str | Path | Sequence[str | Path | Place]) -> list[str | Place]:
    names = [models] if isinstance(models, (str, Path)) else models
    return [name if isinstance(name, Place) else str(name) for name in names]


def _merged_notes(verdicts: Sequence[Verdict]) -> list[str]:
    """The notes of all checkpoints; notes that differ in nothing but the checkpoint's name become one."""
    ids_by_note: dict[str, list[str]] = {}
    for verdict in verdicts:
        for note in verdict.notes:
            ids_by_note.setdefault(note.replace(verdict.id, "\0"), []).append(verdict.id)
    texts = []
    for note, (first, *others) in ids_by_note.items():
        text = note.replace("\0", first)
        if others:
            remaining = f" and {len(others) - 3} more" if others[3:] else ""
            text += f" The same holds for {', '.join(others[:3])}{remaining}."
        texts.append(text)
    return texts


def inspect(
    models: str | Path | Sequence[str | Path | Place],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    image_processor: str | Path | None = None,
    base_model: str | Path | None = None,
    classes: str | Sequence[str] | None = None,
    checkpoint: str | None = None,
    base_revisions: Mapping[str, str] | None = None,
    recorded: Mapping[Version, Alignment] | None = None,
) -> tuple[Verdict, ...]:
    """Find out for each checkpoint whether it can go into a soup with the others. Arguments as in `gather`.

    Args:
        base_revisions: of the base models of adapters by their ids, in place of those that the adapters name.
        recorded: which classes of its checkpoints a recipe was made with, by their versions: nothing is decided anew,
            and others are left aside.

    Raises:
        ValueError: if a name matches nothing, there is no such image processor, or `classes` is none.
    """
    chosen = chosen_classes(classes)
    base = str(base_model) if base_model is not None else None
    options = Options(allow_pickle, trust_remote_code, token, base, base_revisions or {})
    places = find_places(_names(models), revision=revision, token=token, checkpoint=checkpoint)
    processor = _NamedProcessor() if image_processor is None else find_processor(image_processor, options)
    checks = _Checks(options, processor)
    verdicts = [
        Verdict(place.name, problem=str(files)) if isinstance(files, ValueError) else checks.vet(files)
        for place, files in zip(places, read_places(places, options), strict=True)
    ]
    if recorded is None:
        return tuple(_without_copies(_vet_together(verdicts, partial(align, classes=chosen))))
    listed = [verdict for verdict in verdicts if not verdict.ingredient or verdict.ingredient.version in recorded]
    return tuple(_without_copies(_vet_together(listed, partial(_as_recorded, recorded))))


@dataclass(frozen=True)
class _NamedProcessor:
    """The image processor that the user named in place of the checkpoints' own; None if the user named none.

    Args:
        name: with its revision, if it is on the Hub.
        folder: where it is.
    """

    name: str | None = None
    folder: Path | None = None


def find_processor(name: str | Path, options: Options) -> _NamedProcessor:
    """The image processor of that name.

    Raises:
        ValueError: if there is none, or it can't be used.
    """
    folder, pinned = Path(name), str(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        files = [*PROCESSOR_FILES, CONFIG]
        missing = f"The image processor {name} is no folder here and no model on the Hub"
        repo_id, _, revision = str(name).partition("@")
        with asking_the_hub(f"The image processor {name}", revision=revision, missing=missing):
            folder = Path(
                snapshot_download(repo_id, revision=revision or None, allow_patterns=files, token=options.token)
            )
        pinned = f"{repo_id}@{folder.name}"
    load_processor(folder, trust_remote_code=options.trust_remote_code)
    return _NamedProcessor(pinned, folder.resolve())


@dataclass(frozen=True)
class _Header:
    """What the headers of a checkpoint's weights say of its model.

    Args:
        architecture: class name of the model.
        parameters: how many it has; 0 if not known.
        notes: on tensors that the model does not use, without the name of the checkpoint.
    """

    architecture: str
    parameters: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Checks:
    """Checks of single checkpoints.

    Fine-tunes of one sweep have the same configuration, header and image processor: each of these is checked once.

    Args:
        options: what the user allows.
        processor: that the user named.
        headers: what is known of headers, by configuration and header.
        saved: configurations and image processors that can be saved.
    """

    options: Options
    processor: _NamedProcessor
    headers: dict[str, _Header] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)

    def vet(self, files: CheckpointFiles) -> Verdict:
        """Whether configuration, processor and weights of a checkpoint fit together."""
        name, trust = files.place.name, self.options.trust_remote_code
        base = None
        try:
            if files.base is None:
                config = load_config(files.folder, trust_remote_code=trust)
            else:
                base = _ingredient(files.base, (), "", self.options)
                config = lora.load_adapter_config(
                    files.folder, files.base.folder, files.header or {}, trust_remote_code=trust
                )
            check_task(name, config)
            labels = read_labels(name, config)
            header = self._check_header(files, config)
            notes = tuple(f"{name} {note}" for note in header.notes) + _notes_of_files(files, config, trust)
            ingredient = replace(
                _ingredient(files, labels, header.architecture, self.options),
                multi_label=is_multi_label(config),
                base=base,
                image_processor=self.processor.name,
                processor_folder=self.processor.folder,
            )
            self._check_saves(files.folder, ingredient)
        except ValueError as error:
            text = str(error).replace(str(files.folder), name)  # the name that the user knows
            return Verdict(name, problem=text if name in text else f"{name}: {text}", files=files)
        return Verdict(name, notes=notes, parameters=header.parameters, files=files, ingredient=ingredient)

    def _check_header(self, files: CheckpointFiles, config: PretrainedConfig) -> _Header:
        """Check that the headers fill the model.

        Raises:
            ValueError: if a tensor is missing or has another shape.
        """
        name, trust = files.place.name, self.options.trust_remote_code
        if files.header is None or (files.base and files.base.header is None):
            return _Header(model_class(config, trust_remote_code=trust).__name__, 0, ())
        if not files.header:
            raise ValueError(f"{name}: its weights hold no tensor.")
        base_header = (files.base.header or {}) if files.base else {}
        key = describe(config) + json.dumps([files.header, base_header, _adapter_config(files)], sort_keys=True)
        if key not in self.headers:
            notes: tuple[str, ...] = ()
            if files.base:
                model, notes = lora.check_adapter(
                    name, files.folder, config, files.header, base_header, trust_remote_code=trust
                )
            else:
                model, unused = check_header(name, config, files.header, trust_remote_code=trust)
                if unused:
                    listed = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if unused[3:] else "")
                    notes = (f"has weights that its model does not use: {listed}. The soup's does not either.",)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            self.headers[key] = _Header(type(model).__name__, parameters, notes)
        return self.headers[key]

    def _check_saves(self, folder: Path, ingredient: Ingredient) -> None:
        """Check that configuration and image processor can be saved. See `check_saves`."""
        config, processor = ingredient.config, ingredient.processor
        key = describe(config) + processor.to_json_string()
        if key not in self.saved:
            check_saves(folder, config, processor)
            self.saved.add(key)


def _ingredient(files: CheckpointFiles, labels: tuple[str, ...], architecture: str, options: Options) -> Ingredient:
    place = files.place
    return Ingredient(
        id=place.name,
        revision=files.revision,
        folder=files.folder,
        labels=labels,
        architecture=architecture,
        repo_id=place.repo_id,
        subfolder=place.subfolder,
        stamp=files.stamp,
        allow_pickle=options.allow_pickle,
        trust_remote_code=options.trust_remote_code,
        token=options.token if place.repo_id else None,
        size=files.size,
    )


def _notes_of_files(files: CheckpointFiles, config: PretrainedConfig, trust_remote_code: bool) -> tuple[str, ...]:
    """What the user should know of how a checkpoint's files are read."""
    name, notes = files.place.name, []
    if files.header is None or (files.base and files.base.header is None):
        notes.append(f"{name}: its weights are pickled; whether they fit is known when they are loaded.")
    if files.wrapped:
        notes.append(
            f"{name}: it was saved as torch.compile or DistributedDataParallel wrapped it ({files.wrapped}): its "
            "tensors are read under their names without the wrapper."
        )
    elsewhere = [str(value) for value in (getattr(config, "auto_map", None) or {}).values() if "--" in str(value)]
    if trust_remote_code and elsewhere:
        notes.append(
            f"{name}: its code is not in the checkpoint: it is the current code of {elsewhere[0].partition('--')[0]} "
            "on the Hub."
        )
    return tuple(notes)


def _adapter_config(files: CheckpointFiles) -> str:
    """The text of an adapter's configuration (scale, rank, targets); empty for whole weights."""
    return read_text(files.folder / ADAPTER_CONFIG) if files.base else ""


def _as_recorded(recorded: Mapping[Version, Alignment], ingredients: Sequence[Ingredient]) -> dict[str, Alignment]:
    """The alignments that a recipe was made with."""
    return {ingredient.id: recorded[ingredient.version] for ingredient in ingredients}


def _vet_together(
    verdicts: list[Verdict], align_classes: Callable[[Sequence[Ingredient]], dict[str, Alignment]]
) -> list[Verdict]:
    """Refuse ingredients that can't be averaged with the others or take other images; align their classes.

    What most of them agree on is taken to be right, so the problem is that of the ingredient that differs.

    Args:
        align_classes: gives the alignments of ingredients that can be averaged, by their ids.
    """
    ingredients = [verdict.ingredient for verdict in verdicts if verdict.ingredient]
    problems = find_differences(ingredients)
    processors = find_processor_differences(
        {ingredient.id: ingredient.processor for ingredient in ingredients if ingredient.id not in problems}
    )
    problems |= {
        name: _pixel_problem(difference) for name, difference in processors.items() if difference.is_same is False
    }
    alignments = align_classes([ingredient for ingredient in ingredients if ingredient.id not in problems])
    vetted = []
    for verdict in verdicts:
        if verdict.ingredient is None:
            vetted.append(verdict)
        elif problem := problems.get(verdict.id) or alignments[verdict.id].problem:
            vetted.append(replace(verdict, problem=problem, ingredient=None))
        else:
            alignment, notes = alignments[verdict.id], list(verdict.notes)
            if alignment.note:
                notes.append(alignment.note)
            if verdict.id in processors:
                notes.append(_pixel_note(processors[verdict.id]))
            selection = {name: getattr(alignment, name) for name in ("labels", "order", "left_out")}
            ingredient = replace(verdict.ingredient, **selection)
            vetted.append(replace(verdict, ingredient=ingredient, notes=tuple(notes)))
    return vetted


def _pixel_problem(difference: ProcessorDifference) -> str:
    size = " Of images that have the models' own size already they make the same." if difference.only_resizes else ""
    return (
        f"{difference.text}. The two make other pixels of the same image.{size} Leave it out, or take one image "
        "processor for all with image_processor=... (--image-processor ID)."
    )


def _pixel_note(difference: ProcessorDifference) -> str:
    if difference.is_same is None:
        return f"{difference.text}. Whether they make the same pixels is tried on images of the split."
    return f"{difference.text}. They make the same pixels of the images that both were tried with."


def _without_copies(verdicts: list[Verdict]) -> list[Verdict]:
    """Of checkpoints that are the same, only the first stays an ingredient, with their content; others get a note.

    They are the same if their weights are equal, and the classes that their numbers mean, and for adapters their
    configurations and base models.
    """
    first_ids: dict[str, str] = {}
    vetted = []
    for verdict in verdicts:
        files, ingredient = verdict.files, verdict.ingredient
        if ingredient and files and files.weights:
            base = files.base.weights if files.base else None
            content = digest(files.weights, ingredient.order, _adapter_config(files), base)
            first = first_ids.setdefault(content, verdict.id)
            if first == verdict.id:
                verdict = replace(verdict, ingredient=replace(ingredient, content=content))
            else:
                note = f"{verdict.id} is the same checkpoint as {first}: kept once."
                verdict = replace(verdict, ingredient=None, notes=(*verdict.notes, note))
        vetted.append(verdict)
    return vetted
