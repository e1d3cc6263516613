"""The average of models in memory has the bits of that of their files, which are read no more."""

from functools import partial

import pytest
import torch
from shared.calls import counted
from transformers import AutoModelForImageClassification

import hf_radin
from hf_radin import Recipe
from hf_radin.checkpoints.files import load_tensors, read_layout
from hf_radin.weights.average import Residents, average_model

CPU = torch.device("cpu")


def halved(ingredients, folder, dtype: str):
    """Ingredients whose files have another dtype."""
    for number, ingredient in enumerate(ingredients):
        model = AutoModelForImageClassification.from_pretrained(ingredient.folder, dtype=getattr(torch, dtype))
        model.save_pretrained(folder / f"ft-{number}")
        ingredient.processor.save_pretrained(folder / f"ft-{number}")
    return hf_radin.gather(f"{folder}/*")


@pytest.fixture(params=["runs", "nets"])
def three(request):
    return hf_radin.gather(f"{request.getfixturevalue(request.param)}/ft-[012]")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_has_the_bits_of_the_average_of_files(three, tmp_path, dtype):
    ingredients, residents = halved(three, tmp_path, dtype), Residents()
    resident = partial(residents.soup, device=CPU)
    ids = ingredients.ids
    recipes = [Recipe(ids, (0.5, 0.2, 0.3)), Recipe.uniform(ids), Recipe(ids, (0.9, 0, 0.1)), Recipe.uniform(ids[:1])]
    for recipe in recipes:
        expected = average_model(ingredients, recipe)
        model = average_model(ingredients, recipe, resident=resident)
        assert model.state_dict().keys() == expected.state_dict().keys() and not model.training
        for name, tensor in expected.state_dict().items():
            assert model.state_dict()[name].dtype == tensor.dtype
            assert torch.equal(model.state_dict()[name], tensor)
        size = getattr(model.config, "image_size", 16)
        pixels = torch.randn(2, model.config.num_channels, size, size, dtype=model.dtype)
        with torch.inference_mode():
            assert torch.equal(model(pixels).logits, expected(pixels).logits)


def test_from_the_second_soup_on_no_file_is_read_again(three):
    soup = partial(average_model, three, resident=partial(Residents().soup, device=CPU))
    read = []
    for weights in ((0.5, 0.2, 0.3), (0.2, 0.5, 0.3), (0.1, 0.1, 0.8)):
        with counted(read_layout, load_tensors) as calls:
            soup(Recipe(three.ids, weights))
        read.append(dict(calls))
    assert read == [{"read_layout": 3}, {"read_layout": 3, "load_tensors": 3}, {}]  # of its files; to be loaded; none


def test_soups_share_nothing_with_each_other_and_with_their_ingredients(three):
    residents = Residents()
    soup = partial(residents.soup, three.by_content, Recipe.uniform(three.ids), device=CPU)
    assert soup() is None
    first, second = soup(), soup()
    with torch.no_grad():
        for tensor in first.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(tensor, soup().state_dict()[name]) for name, tensor in second.state_dict().items())


def test_where_memory_is_short_the_files_are_averaged(three):
    residents = Residents(share=1e-9)
    for _ in range(3):
        assert residents.soup(three.by_content, Recipe.uniform(three.ids), device=CPU) is None


def test_of_several_dtypes_the_files_are_averaged(three, tmp_path):
    mixed = hf_radin.gather([str(halved(three, tmp_path, "float16")[0].folder), str(three[1].folder)])
    residents = Residents()
    for _ in range(3):
        assert residents.soup(mixed.by_content, Recipe.uniform(mixed.ids), device=CPU) is None


def test_a_number_that_is_none_is_named(three, tmp_path):
    ingredients = halved(three, tmp_path, "float32")
    resident = partial(Residents().soup, device=CPU)
    average_model(ingredients, Recipe.uniform(ingredients.ids), resident=resident)
    model = ingredients[1].load_model(torch.float32)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")
    model.save_pretrained(ingredients[1].folder)
    changed = hf_radin.gather(f"{tmp_path}/*")
    with pytest.raises(ValueError, match="nan"):
        average_model(changed, Recipe.uniform(changed.ids), resident=resident)
