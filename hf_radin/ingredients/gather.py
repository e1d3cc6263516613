"""Vet checkpoints before anything large is read: each by itself, then against the others."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints import lora
from hf_radin.checkpoints.files import ADAPTER_CONFIG, CONFIG, PROCESSOR_FILES
from hf_radin.checkpoints.model import check_header, check_saves, check_task, empty_model, load_config, load_processor
from hf_radin.checkpoints.processor import ProcessorDifference, find_processor_differences
from hf_radin.ingredients.compatibility import describe, find_differences
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.ingredients.inspect import Files, Options, look_at
from hf_radin.ingredients.labels import align, read_labels
from hf_radin.ingredients.resolve import find_places
from hf_radin.runtime.hub_errors import asking_the_hub

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What was found about one checkpoint.

    Args:
        id: what the user called it.
        problem: why it can't go into a soup with the others; empty if it can.
        notes: what is done about it and should be known: a copy that is kept once, classes that are permuted.
        parameters: of its model; 0 where that is not known.
        files: what it has; None if it could not be looked at.
        ingredient: for a soup; None if there is a problem or it is a copy.
    """

    id: str
    problem: str = ""
    notes: tuple[str, ...] = ()
    parameters: int = 0
    files: Files | None = field(default=None, repr=False)  # a header is thousands of letters
    ingredient: Ingredient | None = None


def gather(
    models: str | Path | Sequence[str | Path],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    image_processor: str | Path | None = None,
    base_model: str | Path | None = None,
) -> Ingredients:
    """Find checkpoints and vet them from their small files and the headers of their weights.

    No weights are downloaded. Of checkpoints with equal weights one is kept. Classes that stand in another order are
    brought into that of the first; placeholders (`LABEL_0`) are matched to names by their numbers.

    Args:
        models: a pattern (`runs/ft-*`, `org/ft-*`), a Hub id (`org/a`, `org/a@rev`, `org/a@rev:subfolder`), the
            address of a collection on the Hub, a folder, a Trainer's run (its best checkpoint), a `.txt` or `.yaml`
            file that lists such names, or a list of these. What is on disk goes before what is on the Hub.
        revision: branch, tag or commit for the Hub ids that name none.
        allow_pickle: read `.bin` weights where there are no safetensors.
        trust_remote_code: run code that comes with a checkpoint.
        image_processor: Hub id or folder of the processor to use in place of the checkpoints' own.
        base_model: Hub id or folder of the model that LoRA adapters are merged into, if it is not where they say.

    Raises:
        ValueError: if nothing matches, fewer than two checkpoints are left, one of them lacks its configuration,
            weights, head or processor, or they differ in architecture, classes, sizes or preprocessing. The odd one
            out and the difference are named.
    """
    named = [models] if isinstance(models, (str, Path)) else list(models)
    found = locate(
        named,
        revision=revision,
        token=token,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        image_processor=image_processor,
        base_model=base_model,
    )
    if len(found) < 2:
        raise ValueError(
            f"A soup needs at least two different checkpoints; {', '.join(map(str, named)) or 'an empty list'} gives "
            f"{found[0].id if found else 'none'}."
        )
    return found


def locate(models: Sequence[str | Path], **options: Any) -> Ingredients:
    """As `gather`, for any number of checkpoints: a recipe may have a single ingredient."""
    verdicts = inspect(models, **options)
    refused = [one for one in verdicts if one.problem]
    if refused:
        more = f" {len(refused) - 1} more can't be used either; `hf-radin inspect` lists all." if refused[1:] else ""
        text = refused[0].problem
        raise ValueError(f"{text if text.endswith(('.', '?')) or not more else text + '.'}{more}")
    for text in _said_once(verdicts):
        logger.warning("%s", text)
    return Ingredients([one.ingredient for one in verdicts if one.ingredient])


def _said_once(verdicts: Sequence[Verdict]) -> list[str]:
    """The notes of all checkpoints, those that say the same of several together."""
    owners: dict[str, list[str]] = {}
    for verdict in verdicts:
        for note in verdict.notes:
            owners.setdefault(note.replace(verdict.id, "\0"), []).append(verdict.id)
    texts = []
    for note, (first, *others) in owners.items():
        text = note.replace("\0", first)
        if others:
            more = f" and {len(others) - 3} more" if others[3:] else ""
            text += f" The same holds for {', '.join(others[:3])}{more}."
        texts.append(text)
    return texts


def inspect(
    models: str | Path | Sequence[str | Path],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    image_processor: str | Path | None = None,
    base_model: str | Path | None = None,
    base_revisions: Mapping[str, str] | None = None,
) -> tuple[Verdict, ...]:
    """Look at each checkpoint and say whether it can go into a soup with the others. Arguments as in `gather`.

    Args:
        base_revisions: of the base models of adapters by their ids, in place of what the adapters say.

    Raises:
        ValueError: if a name stands for nothing, or there is no such image processor.
    """
    base = str(base_model) if base_model is not None else None
    options = Options(allow_pickle, trust_remote_code, token, base, base_revisions or {})
    named = [models] if isinstance(models, (str, Path)) else list(models)
    places = find_places([str(name) for name in named], revision=revision, token=token)
    processor = _find_processor(image_processor, options) if image_processor is not None else {}
    known = _Known()
    found = look_at(places, options)
    verdicts = [
        Verdict(place.name, problem=str(one))
        if isinstance(one, ValueError)
        else _vet_alone(one, processor, options, known)
        for place, one in zip(places, found, strict=True)
    ]
    return tuple(_kept_once(list(_vet_together(verdicts))))


def _find_processor(name: str | Path, options: Options) -> dict[str, Any]:
    """What an ingredient says of the image processor that the user named: its revision, and where it is."""
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
    return {"image_processor": pinned, "processor_folder": folder.resolve()}


@dataclass(frozen=True)
class _Known:
    """What was found before: fine-tunes of one sweep have one configuration, one header and one image processor.

    Args:
        headers: by configuration and header the model's class, its parameters, and notes about it.
        saved: configurations and image processors that can be saved.
    """

    headers: dict[str, tuple[str, int, tuple[str, ...]]] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)


def _vet_alone(files: Files, processor: dict[str, Any], options: Options, known: _Known) -> Verdict:
    """Whether configuration, processor and weights of one checkpoint fit together."""
    name, trust = files.place.name, options.trust_remote_code
    base = None
    try:
        if files.base is None:
            config = load_config(files.folder, trust_remote_code=trust)
        else:
            base = _ingredient(files.base, (), "", options)
            config = lora.load_adapter_config(
                files.folder, files.base.folder, files.header or {}, trust_remote_code=trust
            )
        check_task(name, config)
        labels = read_labels(name, config)
        architecture, parameters, notes = _check_header(files, config, options, known.headers)
        notes += _notes_of_files(files, config, trust)
        ingredient = replace(
            _ingredient(files, labels, architecture, options),
            base=base,
            **processor,
        )
        _check_saves(files.folder, ingredient, known.saved)
    except ValueError as error:
        text = str(error).replace(str(files.folder), name)  # by the name that the user knows
        return Verdict(name, problem=text if name in text else f"{name}: {text}", files=files)
    return Verdict(name, notes=notes, parameters=parameters, files=files, ingredient=ingredient)


def _ingredient(files: Files, labels: tuple[str, ...], architecture: str, options: Options) -> Ingredient:
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


def _check_header(
    files: Files, config: PretrainedConfig, options: Options, headers: dict[str, tuple[str, int, tuple[str, ...]]]
) -> tuple[str, int, tuple[str, ...]]:
    """Whether headers fill the model: its class, its number of parameters, what is to be said of other tensors."""
    name, trust = files.place.name, options.trust_remote_code
    if files.header is None or (files.base and files.base.header is None):
        model = empty_model(config, trust_remote_code=trust)
        note = f"{name}: its weights are pickled; whether they fit is known when they are loaded."
        return type(model).__name__, 0, (note,)
    if not files.header:
        raise ValueError(f"{name}: its weights hold no tensor.")
    base_header = (files.base.header or {}) if files.base else {}
    adapter = _adapter_config(files)
    same = describe(config) + json.dumps([files.header, base_header, adapter], sort_keys=True)
    if same not in headers:
        notes: tuple[str, ...] = ()
        if files.base:
            model, notes = lora.check_adapter(
                name, files.folder, config, files.header, base_header, trust_remote_code=trust
            )
        else:
            model, unused = check_header(name, config, files.header, trust_remote_code=trust)
            if unused:
                left = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if unused[3:] else "")
                notes = (f"has weights that its model does not use: {left}. The soup's does not either.",)
        count = sum(one.numel() for one in model.parameters())
        headers[same] = (type(model).__name__, count, notes)
    architecture, count, notes = headers[same]
    return architecture, count, tuple(f"{name} {note}" for note in notes)


def _check_saves(folder: Path, ingredient: Ingredient, saved: set[str]) -> None:
    """As `modeling.check_saves`, once for each configuration and image processor."""
    config, processor = ingredient.config, ingredient.processor
    same = describe(config) + processor.to_json_string()
    if same not in saved:
        check_saves(folder, config, processor)
        saved.add(same)


def _notes_of_files(files: Files, config: PretrainedConfig, trust_remote_code: bool) -> tuple[str, ...]:
    """What is to be said of how a checkpoint's files are read."""
    name, notes = files.place.name, []
    if files.wrapped:
        notes.append(
            f"{name}: it was saved as torch.compile or DistributedDataParallel wrapped it ({files.wrapped}): its "
            "tensors are read by the names that they have without."
        )
    elsewhere = [str(value) for value in (getattr(config, "auto_map", None) or {}).values() if "--" in str(value)]
    if trust_remote_code and elsewhere:
        notes.append(
            f"{name}: its code comes from {elsewhere[0].partition('--')[0]} on the Hub as it is there now, and not "
            "from the checkpoint."
        )
    return tuple(notes)


def _adapter_config(files: Files) -> str:
    """What an adapter does with its tensors: scale, rank, targets; nothing for whole weights."""
    return (files.folder / ADAPTER_CONFIG).read_text() if files.base else ""


def _kept_once(verdicts: list[Verdict]) -> list[Verdict]:
    """Of checkpoints with equal weights the first is an ingredient, and the others say so.

    Equal are also the classes that the numbers mean, and of adapters what is done with them.
    """
    first: dict[Any, str] = {}
    kept = []
    for one in verdicts:
        if one.ingredient and one.files and one.files.weights:
            base = one.files.base.weights if one.files.base else None
            content = (one.files.weights, one.ingredient.order, _adapter_config(one.files), base)
            twin = first.setdefault(content, one.id)
            if twin != one.id:
                note = f"{one.id} is the same checkpoint as {twin}: kept once."
                one = replace(one, ingredient=None, notes=(*one.notes, note))
        kept.append(one)
    return kept


def _vet_together(verdicts: list[Verdict]) -> Iterator[Verdict]:
    """Refuse ingredients that can't be averaged, or that the same images can't be shown to; align their classes.

    What most of them agree on is taken to be right, so that it is the odd one out that has the problem.
    """
    ingredients = [one.ingredient for one in verdicts if one.ingredient]
    problems = find_differences(ingredients)
    processors = find_processor_differences({one.id: one.processor for one in ingredients if one.id not in problems})
    problems |= {name: _other_pixels(found) for name, found in processors.items() if found.is_same is False}
    aligned = align([one for one in ingredients if one.id not in problems])
    for one in verdicts:
        if one.ingredient is None:
            yield one
        elif problem := problems.get(one.id) or aligned[one.id].problem:
            yield replace(one, problem=problem, ingredient=None)
        else:
            labels, order, note = aligned[one.id].labels, aligned[one.id].order, aligned[one.id].note
            notes = (*one.notes, note) if note else one.notes
            if one.id in processors:
                notes += (_same_pixels(processors[one.id]),)
            yield replace(one, ingredient=replace(one.ingredient, labels=labels, order=order), notes=notes)


def _other_pixels(difference: ProcessorDifference) -> str:
    size = " Of images that have the models' own size already they make the same." if difference.only_resizes else ""
    return (
        f"{difference.text}. The two make other pixels of the same image.{size} Leave it out, or take one image "
        "processor for all with image_processor=... (--image-processor ID)."
    )


def _same_pixels(difference: ProcessorDifference) -> str:
    if difference.is_same is None:
        return f"{difference.text}. Whether they make the same pixels is tried on images of the split."
    return f"{difference.text}. They make the same pixels of the images that both were tried with."
