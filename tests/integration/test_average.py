"""The average of the weights is what the formula says, whatever files they lie in."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTForImageClassification

import hf_radin
from hf_radin import Recipe


@pytest.fixture(scope="module")
def three(runs):
    return hf_radin.gather(f"{runs}/ft-[012]")


def states(ingredients) -> list[dict[str, torch.Tensor]]:
    return [ViTForImageClassification.from_pretrained(one.folder).state_dict() for one in ingredients]


def test_it_is_the_weighted_sum(three):
    weights = (0.5, 0.2, 0.3)
    found = hf_radin.average(three, Recipe(three.ids, weights))
    parts = states(three)
    assert found.keys() == parts[0].keys()
    for name, tensor in found.items():
        expected = sum(weight * part[name].double() for weight, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(tensor, expected.float(), rtol=0, atol=0)


def test_the_average_of_equal_models_is_that_model(runs, tmp_path):
    for name in ("a", "b", "c"):
        shutil.copytree(runs / "ft-0", tmp_path / name)
        # another file, the same weights: else the copies would be one ingredient
        tensors = load_file(tmp_path / name / "model.safetensors")
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt", "copy": name})
    found = hf_radin.gather(f"{tmp_path}/*")
    original = states(found)[0]
    for weights in [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.2, 0.1), (0.123, 0.456, 0.421)]:
        soup = hf_radin.average(found, Recipe(found.ids, weights))
        assert all(torch.equal(soup[name], original[name]) for name in original)


def test_a_single_ingredient_stays_as_it_is(three):
    soup = hf_radin.average(three, Recipe.uniform([three.ids[1]]))
    assert all(torch.equal(tensor, soup[name]) for name, tensor in states(three)[1].items())


def test_a_weight_of_zero_is_as_good_as_absent(three):
    with_zero = hf_radin.average(three, Recipe(three.ids, (0.5, 0.0, 0.5)))
    without = hf_radin.average(three, Recipe((three.ids[0], three.ids[2]), (0.5, 0.5)))
    assert all(torch.equal(with_zero[name], without[name]) for name in without)


def rename_as_module(folder):
    """The names that the modules have, in place of those that transformers writes: another version's layout."""
    state = ViTForImageClassification.from_pretrained(folder).state_dict()
    on_disk = load_file(folder / "model.safetensors")
    assert state.keys() != on_disk.keys()
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_files_that_name_their_tensors_differently_give_the_same_soup(two):
    found = hf_radin.gather(f"{two}/*")
    recipe = Recipe(found.ids, (0.3, 0.7))
    expected = hf_radin.average(found, recipe)
    rename_as_module(two / "ft-1")
    mixed = hf_radin.average(hf_radin.gather(f"{two}/*"), recipe)
    assert expected.keys() == mixed.keys()
    assert all(torch.equal(expected[name], mixed[name]) for name in expected)


def test_shards_give_the_same_soup(two):
    found = hf_radin.gather(f"{two}/*")
    recipe = Recipe(found.ids, (0.3, 0.7))
    expected = hf_radin.average(found, recipe)
    model = ViTForImageClassification.from_pretrained(two / "ft-1")
    (two / "ft-1" / "model.safetensors").unlink()
    model.save_pretrained(two / "ft-1", max_shard_size="20KB")
    assert len(list((two / "ft-1").glob("model-*.safetensors"))) > 2
    mixed = hf_radin.average(hf_radin.gather(f"{two}/*"), recipe)
    assert all(torch.equal(expected[name], mixed[name]) for name in expected)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("bfloat16", "bfloat16"), torch.bfloat16),
        (("float16", "float32"), torch.float32),
        (("float16", "bfloat16"), torch.float32),
    ],
)
def test_the_soup_has_the_widest_dtype_and_is_rounded_once(two, dtypes, expected):
    for name, dtype in zip(("ft-0", "ft-1"), dtypes, strict=True):
        model = ViTForImageClassification.from_pretrained(two / name, dtype=getattr(torch, dtype))
        model.save_pretrained(two / name)
    found = hf_radin.gather(f"{two}/*")
    parts = [load_file(one.folder / "model.safetensors")["classifier.weight"].double() for one in found]
    soup = hf_radin.average(found, Recipe(found.ids, (0.25, 0.75)))["classifier.weight"]
    assert soup.dtype == expected
    assert torch.equal(soup, (0.25 * parts[0] + 0.75 * parts[1]).to(expected))


def test_the_user_may_choose_the_dtype(three):
    assert (
        hf_radin.average(three, Recipe.uniform(three.ids), dtype="float16")["classifier.weight"].dtype == torch.float16
    )
    with pytest.raises(ValueError, match="dtype='int4'"):
        hf_radin.average(three, Recipe.uniform(three.ids), dtype="int4")


def test_a_written_average_is_an_ordinary_checkpoint(three, tmp_path):
    expected = hf_radin.average(three, Recipe.uniform(three.ids), output=tmp_path / "out")
    loaded, report = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_an_ingredient_that_is_not_there_is_named(three):
    with pytest.raises(ValueError, match="No ingredient 'other'"):
        hf_radin.average(three, Recipe.uniform([three.ids[0], "other"]))


def test_integers_are_not_averaged(tmp_path):
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    for seed in range(2):
        torch.manual_seed(seed)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        model = ResNetForImageClassification(config)
        model.resnet.embedder.embedder.normalization.num_batches_tracked.fill_(10 + seed)
        model.save_pretrained(tmp_path / str(seed))
        ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path / str(seed))
    found = hf_radin.gather(f"{tmp_path}/*")
    soup = hf_radin.average(found, Recipe.uniform(found.ids))
    counters = [tensor for name, tensor in soup.items() if name.endswith("num_batches_tracked")]
    assert counters and counters[0].dtype == torch.int64 and counters[0] == 10
