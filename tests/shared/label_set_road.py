"""The road of an architecture that is multi-label: inspect, run, average, save, load, and answer with a sigmoid."""

import json
from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel, pipeline

import hf_radin
from hf_radin.ingredients.gather import inspect
from shared.architectures import CLASSES, pictures
from shared.banks import plain_inputs

PROBLEM = "multi_label_classification"

# What images have: both classes that are looked at, one of them, none.
LABELS = ([0, 1], [0], [1], [])


def broken_laws(folder: Path, classes: tuple[str, ...] = CLASSES) -> list[str]:
    """What should hold of the soup of two checkpoints, `ft-0` and `ft-1` in a folder, and does not.

    They are made multi-label: that is said in a configuration, and changes no weight.
    """
    names = [str(folder / name) for name in ("ft-0", "ft-1")]
    for name in names:
        _say_multi_label(Path(name) / "config.json")
    verdicts = inspect(names)
    ingredients = hf_radin.gather(names)
    bank = hf_radin.compute_logits(ingredients, _dataset(classes), cache_dir=folder / "label-sets")
    hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids), output=folder / "multi-label")
    soup, report = AutoModelForImageClassification.from_pretrained(folder / "multi-label", output_loading_info=True)
    inputs = plain_inputs(bank)[0]
    singles = [_logits(AutoModelForImageClassification.from_pretrained(name).eval(), inputs) for name in names]
    logits = _logits(soup.eval(), inputs)
    # transformers' pipeline finds no logits where a model calls them otherwise, whatever it is trained for
    answers = _answered(soup, folder / "multi-label", classes) if "logits" in _output(soup, inputs) else None
    laws = {
        "both are fit to be ingredients": not any(verdict.problem for verdict in verdicts),
        "the bank has label sets": bank.is_multi_label and bank.labels.shape == (len(LABELS), len(classes)),
        "the bank's logits are those of the ingredients": all(
            np.allclose(bank.logits(place), single, atol=1e-5) for place, single in enumerate(singles)
        ),
        "each weight of the soup has its place": not any(report.values()),
        "the soup is multi-label": soup.config.problem_type == PROBLEM,
        "the soup has the classes": list(soup.config.id2label.values()) == list(classes),
        "the soup is none of its ingredients, so that the test can fail": all(
            np.abs(logits - single).max() >= 1e-4 for single in singles
        ),
        "a pipeline answers with the sigmoid of the soup's logits": answers is None
        or np.allclose(answers, 1 / (1 + np.exp(-logits)), atol=1e-4),
    }
    return [law for law, holds in laws.items() if not holds]


def _say_multi_label(path: Path) -> None:
    fields = json.loads(path.read_text(encoding="utf-8")) | {"problem_type": PROBLEM}
    path.write_text(json.dumps(fields), encoding="utf-8")


def _dataset(classes: tuple[str, ...]) -> datasets.DatasetDict:
    feature = datasets.Sequence(datasets.ClassLabel(names=list(classes)))
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    labels = [[number for number in row if number < len(classes)] for row in LABELS]
    split = datasets.Dataset.from_dict({"image": pictures(len(LABELS)), "label": labels}, features=features)
    return datasets.DatasetDict(validation=split)


def _output(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    with torch.inference_mode():
        return model(**inputs)


def _logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    output = _output(model, inputs)
    return (output.logits if "logits" in output else output.last_hidden_state).double().numpy()


def _answered(model: PreTrainedModel, folder: Path, classes: tuple[str, ...]) -> np.ndarray:
    """What transformers' pipeline says of each image and class: `(images, classes)`."""
    ask = pipeline("image-classification", model=model, image_processor=AutoImageProcessor.from_pretrained(folder))
    answers = ask(pictures(len(LABELS)), top_k=len(classes))
    scores = [{answer["label"]: answer["score"] for answer in of_image} for of_image in answers]
    return np.array([[of_image[name] for name in classes] for of_image in scores])
