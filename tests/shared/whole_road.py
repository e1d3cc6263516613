"""The whole road of one architecture: gather, run, average, save, load, push, pull; and what is found there.

The Hub is that of the environment, as the fixture `hub` or `write_table` have set it.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForImageClassification, PreTrainedModel

import hf_radin
from shared.architectures import CLASSES, Architecture, BatchNorm, pictures, save_fine_tunes
from shared.averages import average_loaded
from shared.banks import plain_inputs

WEIGHTS = (0.5, 0.3, 0.2)

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Findings:
    """Facts about an architecture's tiny model, and the largest differences that its soup showed.

    Args:
        class_name: of the soup, as transformers loads it.
        tensors, parameters: in its `state_dict()`; numbers that are trained.
        batch_norms: modules.
        integers: tensors that count or index, and are not averaged.
        keys_differ: whether tensors have other names on disk than in the modules.
        misfits: what transformers reports when it loads the saved and the pulled soup: names missing, unexpected, ...
        average: between the saved soup and the average by hand, relative to the largest number in the ingredients'
            tensor.
        ways: tensors of the saved soup, made of files where these are alike, that differ in a bit from an average of
            loaded models.
        logits: between those of the saved soup and of a model set by hand.
        bank: between the bank's logits and those of the ingredients as transformers loads them.
        pulled: between the soup that was pushed and the one that was pulled.
        batch: between logits of all images in one batch and of one at a time, in float64: in float32, rounding can
            look like it.
        images: between the logits of different images; where it is small, `batch` says little.
        ingredients: between the soup's logits and those of the ingredient that is nearest; likewise for `logits`.
    """

    class_name: str
    tensors: int
    parameters: int
    batch_norms: int
    integers: int
    keys_differ: bool
    misfits: tuple[str, ...]
    average: float
    ways: int
    logits: float
    bank: float
    pulled: float
    batch: float
    images: float
    ingredients: float


def broken_laws(architecture: Architecture, findings: Findings) -> list[str]:
    """What should hold and does not; NaN breaks any law."""
    laws = {
        f"the soup is a {architecture.class_name}": findings.class_name == architecture.class_name,
        "each weight of a soup on disk has its place in the model": not findings.misfits,
        "the soup is the average, rounded to float32": findings.average <= 2**-24,
        "files and loaded models give the same bits": findings.ways == 0,
        "its logits are those of a model set by hand": findings.logits <= 1e-5,
        "the bank's logits are those of the ingredients": findings.bank <= 1e-5,
        "what was pushed is pulled bit by bit": findings.pulled == 0,
        "an image's logits do not depend on its neighbours in the batch": findings.batch <= 1e-9,
        "the model tells images apart, so that the test can fail": findings.images >= 1e-4,
        "the soup is none of its ingredients, so that the test can fail": findings.ingredients >= 1e-3,
    }
    return [law for law, holds in laws.items() if not holds]


def walk(architecture: Architecture, folder: Path) -> Findings:
    """Go the whole road in an empty folder. Of what it finds wrong nothing is raised, if it gets to the end."""
    save_fine_tunes(architecture, folder)
    ingredients = hf_radin.gather(f"{folder}/ft-*")
    bank = hf_radin.compute_logits(ingredients, _dataset(), cache_dir=folder / "cache")
    inputs = plain_inputs(bank)[0]
    models = [_load(ingredient.folder)[0] for ingredient in ingredients]
    set_by_hand = copy.deepcopy(models[0])  # before it has run: levit keeps what it made of its weights
    logits = [_logits(model, inputs) for model in models]

    recipe = hf_radin.Recipe(ingredients.ids, WEIGHTS)
    hf_radin.average(ingredients, recipe, output=folder / "soup")
    soup, report = _load(folder / "soup")
    of_models = average_loaded(ingredients, recipe)
    by_content = sorted(range(len(models)), key=lambda index: ingredients[index].content)
    weights = [models[index].state_dict() for index in by_content]
    by_hand = _average(weights, [WEIGHTS[index] for index in by_content])
    set_by_hand.load_state_dict(by_hand)
    batch = _dependence_on_batch(copy.deepcopy(soup).double(), inputs)
    soup_logits = _logits(soup, inputs)

    cooked = hf_radin.uniform(bank)
    repo = f"org/{architecture.class_name}{architecture.net or ''}"
    cooked.push_to_hub(repo)
    pulled, pulled_report = _load(repo)

    tensors, pushed = soup.state_dict(), cooked.model.state_dict()
    with safe_open(folder / "ft-0" / "model.safetensors", "pt") as file:
        on_disk = set(file.keys())
    return Findings(
        class_name=type(soup).__name__,
        tensors=len(tensors),
        parameters=sum(parameter.numel() for parameter in soup.parameters()),
        batch_norms=sum(isinstance(module, BatchNorm) for module in soup.modules()),
        integers=sum(not tensor.is_floating_point() for tensor in tensors.values()),
        keys_differ=on_disk != tensors.keys(),
        misfits=(*report, *pulled_report),
        average=_relative_difference(tensors, by_hand, weights),
        ways=sum(not torch.equal(tensor, of_models[name]) for name, tensor in tensors.items()),
        logits=_difference(soup_logits, _logits(set_by_hand, inputs)),
        bank=_largest(_difference(torch.tensor(bank.logits(index)), rows) for index, rows in enumerate(logits)),
        pulled=_largest(_difference(tensor, pushed[name]) for name, tensor in pulled.state_dict().items()),
        batch=batch,
        images=float(torch.max(soup_logits.amax(0) - soup_logits.amin(0))),
        ingredients=min(_difference(soup_logits, rows) for rows in logits),
    )


def _dataset() -> datasets.DatasetDict:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    split = datasets.Dataset.from_dict({"image": pictures(6), "label": [0, 1, 2] * 2}, features=features)
    return datasets.DatasetDict(validation=split)


def _load(place: Path | str) -> tuple[PreTrainedModel, list[str]]:
    """A model in evaluation mode, and what transformers found amiss."""
    model, report = AutoModelForImageClassification.from_pretrained(place, output_loading_info=True)
    return model.eval(), [f"{what}: {names}" for what, names in report.items() if names]


def _logits(model: PreTrainedModel, inputs: Tensors) -> torch.Tensor:
    with torch.inference_mode():
        output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state  # pp_lcnet calls them otherwise


def _average(weights: list[Tensors], shares: list[float]) -> dict[str, torch.Tensor]:
    """In the names of the modules, in float64; integers are those of the first ingredient by content."""
    return {
        name: sum(share * tensors[name].double() for share, tensors in zip(shares, weights, strict=True))
        if first.is_floating_point()
        else first
        for name, first in weights[0].items()
    }


def _relative_difference(tensors: Tensors, wanted: Tensors, weights: list[Tensors]) -> float:
    scale = {name: max(float(state[name].abs().max()) for state in weights) for name in wanted}
    return _largest(_difference(tensors[name], wanted[name]) / (scale[name] or 1) for name in wanted)


def _dependence_on_batch(model: PreTrainedModel, inputs: Tensors) -> float:
    inputs = {
        name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()
    }
    together = _logits(model, inputs)
    parts = [{name: tensor[k : k + 1] for name, tensor in inputs.items()} for k in range(len(together))]
    return _difference(together, torch.cat([_logits(model, part) for part in parts]))


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.double() - second.double()).abs().max())


def _largest(values: Iterable[float]) -> float:
    return float(np.max(list(values)))  # unlike max(), it gives NaN if there is one
