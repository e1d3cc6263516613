"""Every architecture that transformers can classify images with goes the whole road, to the Hub and back."""

import datasets
import numpy as np
import pytest
import torch
from architectures import CLASSES, EXCEPTIONS, MODEL_TYPES, TINY, save_fine_tunes
from PIL import Image
from transformers import AutoModelForImageClassification

import hf_radin


@pytest.fixture(scope="module")
def images() -> datasets.DatasetDict:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    split = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 2] * 2}, features=features)
    return datasets.DatasetDict(validation=split)


def logits_of(model, inputs) -> np.ndarray:
    with torch.inference_mode():
        output = model(**inputs)
    return (output.logits if "logits" in output else output.last_hidden_state).numpy()


@pytest.mark.parametrize("model_type", [one for one in MODEL_TYPES if one not in EXCEPTIONS])
def test_the_whole_road(hub, images, tmp_path, model_type):
    assert model_type in TINY, "a new architecture: give it a tiny configuration, or a reason why it can't work"
    save_fine_tunes(model_type, tmp_path)
    ingredients = hf_radin.gather(f"{tmp_path}/ft-*")
    bank = hf_radin.compute_logits(ingredients, images, cache_dir=tmp_path / "cache")
    models = [AutoModelForImageClassification.from_pretrained(one.folder).eval() for one in ingredients]
    inputs = bank.prepared.read(0)[2]
    for index, model in enumerate(models):
        np.testing.assert_allclose(bank.logits(index), logits_of(model, inputs), atol=1e-5)

    recipe = hf_radin.Recipe(ingredients.ids, (0.5, 0.3, 0.2))
    by_hand = {
        name: sum(
            weight * model.state_dict()[name].double() for weight, model in zip(recipe.weights, models, strict=True)
        )
        if tensor.is_floating_point()
        else tensor
        for name, tensor in models[0].state_dict().items()
    }
    hf_radin.average(ingredients, recipe, output=tmp_path / "soup")
    soup, report = AutoModelForImageClassification.from_pretrained(tmp_path / "soup", output_loading_info=True)
    assert not any(report.values()) and type(soup) is type(models[0])
    for name, tensor in soup.state_dict().items():
        torch.testing.assert_close(tensor, by_hand[name].to(tensor.dtype), rtol=1e-6, atol=1e-7)
    models[0].load_state_dict({name: tensor.to(soup.state_dict()[name].dtype) for name, tensor in by_hand.items()})
    np.testing.assert_allclose(logits_of(soup.eval(), inputs), logits_of(models[0], inputs), atol=1e-5)

    found = hf_radin.uniform(bank)
    found.push_to_hub("org/soup")
    pulled, report = AutoModelForImageClassification.from_pretrained("org/soup", output_loading_info=True)
    assert not any(report.values())
    assert all(
        torch.equal(a, b) for a, b in zip(pulled.state_dict().values(), found.model.state_dict().values(), strict=True)
    )


def test_few_architectures_are_excepted():
    assert len(EXCEPTIONS) <= 2 and set(EXCEPTIONS) <= set(MODEL_TYPES)
