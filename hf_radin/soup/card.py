"""The model card: what the soup is made of and what was measured, nothing else."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.images.sample import ENOUGH
from hf_radin.runtime.text import between, code, escape, percent, show_metric
from hf_radin.soup import pictures
from hf_radin.soup.card_text import compared, costs, images_left, in_common, is_uniform, sentence
from hf_radin.soup.recipe_file import RECIPE
from hf_radin.soup.redact import without_paths

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

logger = logging.getLogger(__name__)

SETTINGS = ("budget", "measure", "ended", "hold_out", "proposals", "start", "candidates", "seed", "accept")
# What a user writes between these lines stays when the card is made anew.
MARKS = ("<!-- yours: what stands from here on is kept when the card is made anew -->", "<!-- end of yours -->")
# What the card says to load until a push writes the repository's name there.
PLACE = "path/or/id/of/this/model"
# Where a leaderboard looks for what the soup reached.
EVAL_RESULTS = ".eval_results/hf_radin.yaml"
# Rows of a table that may be long; recipe.json has all.
MOST = 10
HOW = {
    "radin": "chosen by [RADIN](https://arxiv.org/abs/2401.17790) among {} checkpoints",
    "greedy": "put together from {} checkpoints by [greedy selection](https://arxiv.org/abs/2203.05482)",
    "uniform": "made of {} checkpoints in equal parts",
    "best_single": "the best of {} checkpoints",
    "average": "put together from weights that were given",
}
TEMPLATE = Path(__file__).parent / "model_card_template.md"


def render(fields: dict[str, Any], *, license: str | None = None, drawn: Collection[str] = ()) -> str:
    """The card as text, from the contents of `recipe.json`.

    Args:
        license: what the user says; by default that of the ingredients used, if they all have the same one.
        drawn: names of the pictures that lie beside it.
    """
    from huggingface_hub import ModelCard

    fields = without_paths(fields)
    # recipes of the first version have no intervals
    fields["measurements"] = [
        {"interval": None, "about": _about(fields, one), **one} for one in fields["measurements"]
    ]
    fields["results"] = [{"interval": None, "about": _about(fields, one), **one} for one in fields["results"]]
    recipe = dict(zip(fields["recipe"]["ingredients"], fields["recipe"]["weights"], strict=True))
    singles = [one for one in fields["measurements"] if one["proposal"] == "single"]
    alone = {one["ingredients"][0]: one["about"] + percent(one["measured"]) for one in singles}
    used = [
        {**one, "weight": recipe[one["id"]], "alone": alone.get(one["id"], ""), "repo_id": _hub_id(one["repo_id"])}
        for one in fields["ingredients"]
        if one["id"] in recipe
    ]
    data = fields["data"] if fields["results"] else None
    parents = [one["repo_id"] for one in used if one["repo_id"]]
    varying, shared = _hyperparameters(used)
    soups = [
        {**one, "chosen": dict(zip(one["ingredients"], one["weights"], strict=True)) == recipe}
        for one in fields["measurements"]
        if one["proposal"] != "single"
    ]
    given = (fields.get("pilot") or {}).get("given", len(fields["ingredients"]))

    def last(one: dict[str, Any]) -> bool:
        return bool(one["split"] != fields.get("held_out"))  # what proves comes first

    shown_all = all(one["images"] == fields.get("images") for one in soups if one["measured"] is not None)
    card = ModelCard.from_template(
        _metadata(fields, used, license),
        template_path=str(TEMPLATE),
        used=used,
        md=escape,
        code=code,
        data=data,
        dataset=data and _dataset(data),
        percent=percent,
        show_metric=show_metric,
        soups=sorted(soups, key=lambda one: (not one["chosen"], _known(one))),
        singles=sorted(singles, key=_known),
        classes=fields.get("classes") or [],
        linked=parents,
        marks=MARKS,
        drawn=drawn,
        by_class=fields.get("by_class"),
        varying=varying,
        shared=shared,
        ancestor=_agreed(used, "base_model"),
        ancestor_id=_ancestor(used),
        metrics=sorted({name for one in fields["results"] for name in one["metrics"]}),
        results=_rows(fields, sorted(fields["results"], key=last)),
        **{name: fields.get(name) for name in ("passes", "method", "images", "skipped", "held_out")},
        predictions=any(one.get("predicted") is not None for one in soups),
        partly=not shown_all,
        sentence=sentence(fields),
        bank=fields.get("bank"),
        pilot=fields.get("pilot"),
        given=given,
        made=HOW[fields["method"]].format(escape(given)),
        place=PLACE,
        most=MOST,
        count="{:,}".format,
        costs=costs(fields) if data else [],
        devices=(fields.get("time") or {}).get("devices"),
        enough=ENOUGH,
        architecture=fields.get("architecture"),
        hidden=any(one["revision"] == "hidden" for one in fields["ingredients"]),
        approximate=any(one["about"] for one in (*fields["results"], *fields["measurements"])),
        reordered=[one for one in used if one.get("order")],
        logits_dtype=fields.get("logits_dtype"),
        settings={name: fields[name] for name in SETTINGS if fields.get(name) is not None},
        hold_out=fields.get("hold_out"),
        overlap=fields.get("overlap"),
        in_common=in_common(fields),
        unseen=images_left(fields),
        comparisons=[compared(one) for one in sorted(fields.get("against_best_single", []), key=last)],
        between=between,
        considered=fields["ingredients"],
        remarks=fields.get("remarks", []),
        batchnorm=fields.get("batchnorm") if len(used) > 1 else None,
        versions=fields["versions"],
        processor=fields["processor"],
        saved_dtype=fields["saved_dtype"],
        measured_dtype=fields.get("measured_dtype"),
        dtype=fields.get("dtype"),
        mixed_precision=fields.get("mixed_precision"),
    )
    text = re.sub(r"(?<=\|)  (?=\|)", " ", f"{str(card).rstrip()}\n")  # an empty cell has one space
    return re.sub(r"\n{3,}", "\n\n", text)


def _dataset(data: dict[str, Any]) -> str:
    """What the card calls a dataset."""
    return str(data["name"] if data["revision"] else Path(data["name"]).name)


def _metadata(fields: dict[str, Any], used: list[dict[str, Any]], license: str | None) -> ModelCardData:
    """The head of the card."""
    from huggingface_hub import ModelCardData

    data = fields["data"] if fields["results"] else None
    soup_results = [one for one in fields["results"] if one["name"] == "soup"]
    parents = [one["repo_id"] for one in used if one["repo_id"]]
    ancestor = _ancestor(used)
    relation = "merge" if len(used) > 1 and parents else "finetune" if ancestor and not parents else None
    return ModelCardData(
        base_model=list(dict.fromkeys([*parents, *([ancestor] if ancestor else [])])) or None,
        base_model_relation=relation,
        datasets=[data["name"]] if data and data["revision"] else None,
        library_name="transformers",
        license=_license(used, license),
        metrics=sorted({name for one in soup_results for name in one["metrics"]}) or None,
        model_name=("Model soup" if len(used) > 1 else "Best single model") if soup_results else None,
        pipeline_tag="image-classification",
        tags=(["model-soup", "merge"] if len(used) > 1 else []) + ["hf-radin", "arxiv:2401.17790"],
        eval_results=_eval_results(data, soup_results) if data else None,
    )


def _eval_results(data: dict[str, Any], results: list[dict[str, Any]]) -> list[EvalResult] | None:
    """What the head of the card says of the soup's own results; None if there are none."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="image-classification",
            # no id on the Hub begins so; readers take what has no such beginning for one
            dataset_type=data["name"] if data["revision"] else f"./{_dataset(data)}",
            dataset_name=_dataset(data),
            dataset_config=data["config_name"],
            dataset_split=result["split"],
            metric_type=name,
            metric_value=value,
        )
        for result in results
        for name, value in result["metrics"].items()
    ] or None


def _about(fields: dict[str, Any], one: dict[str, Any]) -> str:
    """What stands before the score of one that was not shown all images of its split."""
    most = max(other["images"] for other in fields["results"] if other["split"] == one.get("split", other["split"]))
    pilot = fields.get("pilot") or {}
    is_part = pilot and "given" not in pilot and one.get("split", fields["data"]["split"]) == fields["data"]["split"]
    return "\u2248" if is_part or 0 < one["images"] < (fields["images"] if "proposal" in one else most) else ""


def _rows(fields: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results without those that are there twice: of a best single model, and of a uniform soup."""
    is_single = len(fields["recipe"]["ingredients"]) == 1
    twice = "best single" if is_single else "uniform" if is_uniform(fields) else None
    names = {"soup": "this model"} if is_single else {}
    return [{**one, "name": names.get(one["name"], one["name"])} for one in results if one["name"] != twice]


def files(fields: dict[str, Any], *, license: str | None = None) -> dict[str, bytes]:
    """The card and its pictures, by name, from the contents of `recipe.json`. Arguments as in `render`."""
    drawn = pictures.draw(fields)
    return {"README.md": render(fields, license=license, drawn=drawn).encode(), **drawn}


def contents(fields: dict[str, Any], where: Path, *, license: str | None = None) -> dict[str, bytes]:
    """`recipe.json` itself, the card and its pictures, by name. Arguments as in `render`.

    Args:
        where: the file or folder that the recipe came from or goes to.

    Raises:
        ValueError: if the recipe says too little for a card.
    """
    recipe = (json.dumps(fields, indent=2) + "\n").encode()
    try:
        return {RECIPE: recipe, **files(fields, license=license)}
    except Exception as error:  # a recipe that somebody edited may fail in any way
        raise ValueError(f"{where} says too little for a card ({error!r}).") from error


def eval_results(fields: dict[str, Any], task: str) -> bytes:
    """What `.eval_results/*.yaml` holds for a leaderboard: the soup's accuracy on the held-out split.

    Args:
        task: the benchmark's dataset and its task, as in `org/bench:default`: nobody can guess these.

    Raises:
        ValueError: if it names no task, or the soup was not measured on a held-out split.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    dataset, name = check_task(task)
    proven = [
        one["metrics"]["accuracy"]
        for one in fields["results"]
        if (one["name"], one["split"]) == ("soup", fields.get("held_out")) and "accuracy" in one["metrics"]
    ]
    if not proven:
        raise ValueError(f"{task} needs an accuracy on a split that took no part in the choice: name a test_split.")
    if shared := (fields.get("overlap") or {}).get("images"):
        raise ValueError(
            f"{task} needs an accuracy on images that took no part in the choice, and {shared} of those of the split "
            f"{fields['held_out']!r} did: leave them out."
        )
    entry = EvalResultEntry(dataset_id=dataset, task_id=name, value=proven[0], notes=f"split {fields['held_out']}")
    return str(yaml_dump(eval_result_entries_to_yaml([entry]))).encode()


def check_task(task: str) -> tuple[str, str]:
    """The dataset and the task of a benchmark. Raises a ValueError if it names none."""
    dataset, _, name = task.partition(":")
    if "/" not in (_hub_id(dataset) or "") or not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(
            f"{task!r} names no task of a benchmark: it is its dataset and the task, as in 'org/bench:default'."
        )
    return dataset, name


def anew(folder: Path, fields: dict[str, Any], *, license: str | None = None) -> dict[str, bytes]:
    """The card of a folder, and its pictures, made anew: its licence, and what stands in the marked lines, stay.

    Args:
        fields: the contents of `recipe.json`.
        license: in place of that in the card.

    Raises:
        ValueError: if the card has one of the marked lines without the other, or the recipe says too little for one.
    """
    path = folder / "README.md"
    try:
        old = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read, and so not kept what you wrote: {error}") from error
    found = contents(fields, folder / RECIPE, license=license or _license_of(old))
    text = with_notes(found["README.md"].decode(), old, path)
    return {name: content for name, content in found.items() if name != RECIPE} | {"README.md": text.encode()}


def licensed(card: bytes, license: str, where: Path) -> bytes:
    """A card with this licence in its head; all else stays.

    Raises:
        ValueError: if the head can't be read.
    """
    from huggingface_hub import ModelCard

    try:
        found = ModelCard(card.decode())
    except Exception as error:  # somebody's own YAML
        raise ValueError(f"{where} has no head that can be read, and so takes no licence: {error}") from error
    found.data.license = license
    return str(found).encode()


def naming(card: bytes, repo_id: str) -> bytes:
    """A card that says to load the model from this repository; what the user wrote stays."""
    before, first, rest = card.partition(MARKS[0].encode())
    place = rb'(?<=^classify = pipeline\("image-classification", model=")[^"\n]*'
    return re.sub(place, lambda _: repo_id.encode(), before, count=1, flags=re.MULTILINE) + first + rest


def with_notes(text: str, old: str, where: Path) -> str:
    """A card with what stands between the marked lines of an old one. Raises as `anew` does."""
    first, last = MARKS
    if (first in old) != (last in old) or old.find(first) > old.find(last):
        raise ValueError(f"{where} has lost one of its marked lines, {first!r} and {last!r}: put it back.")
    if first not in old:
        if old:
            raise ValueError(
                f"{where} has no lines {first!r} and {last!r}: put them around what shall stay, or take the file away."
            )
        return text
    notes = old.partition(first)[2].partition(last)[0]
    before, _, rest = text.partition(first)
    return f"{before}{first}{notes}{last}{rest.partition(last)[2]}"


def license_beside(recipe: Path) -> str | None:
    """The licence of the card that lies beside a `recipe.json`; None if there is none, or it names none."""
    card = recipe.parent / "README.md"
    return _license_of(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None


def _license_of(text: str) -> str | None:
    """What a card's metadata says; None if it says nothing, or can't be read."""
    from huggingface_hub import ModelCard

    try:
        found = ModelCard(text, ignore_metadata_errors=True).data.license
    except Exception:  # somebody's own YAML
        return None
    return found if isinstance(found, str) else None


def _ancestor(used: list[dict[str, Any]]) -> str | None:
    """The base model that all ingredients name, if it is known to be one on the Hub."""
    if all("base_model_repo_id" in ingredient for ingredient in used):
        return _hub_id(_agreed(used, "base_model_repo_id"))
    # a recipe of an earlier version does not say; what cards on the Hub name with a namespace is taken to be there
    named = _hub_id(_agreed(used, "base_model"))
    return named if named and "/" in named and all(ingredient["repo_id"] for ingredient in used) else None


def _agreed(used: list[dict[str, Any]], name: str) -> str | None:
    """What all ingredients say alike."""
    values = {ingredient.get(name) for ingredient in used}
    return values.pop() if len(values) == 1 else None


def _hub_id(name: Any) -> str | None:
    """What may be an id on the Hub, and so stand in links and metadata."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name, re.ASCII) else None


def _hyperparameters(used: list[dict[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """The names of those in which the ingredients differ, and what they share."""
    told = [one.get("hyperparameters") or {} for one in used]
    names = list(dict.fromkeys(name for one in told for name in one))
    shared = {name: told[0][name] for name in names if all(one.get(name) == told[0].get(name) for one in told)}
    return [name for name in names if name not in shared], shared


def _license(used: list[dict[str, Any]], said: str | None) -> str | None:
    if said:
        return said
    licenses = {one["id"]: one["license"] for one in used}
    if len(set(licenses.values())) == 1:
        return next(iter(licenses.values()))
    logger.warning(
        "The card names no licence, since the ingredients don't agree: %s. Pass license=... if you know it.",
        ", ".join(f"{name}: {value or 'none'}" for name, value in licenses.items()),
    )
    return None


def _known(measurement: dict[str, Any]) -> float:
    """To sort by: the best first."""
    measured = measurement["measured"]
    return -float(measurement["estimate"] if measured is None else measured)
