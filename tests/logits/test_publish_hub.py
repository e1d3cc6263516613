"""A bank on the Hub: searched without images and without checkpoints, and measured where both are there."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.test_main_hub import card, files
from huggingface_hub import DatasetCard, HfApi
from shared.classes import digits_of, with_classes
from shared.training import NAMES

import hf_radin
from hf_radin.cli.main import main
from hf_radin.logits import publish
from hf_radin.soup.report import SearchReport


@pytest.fixture
def zoo(hub, runs, digits):
    """Three fine-tunes and the digits, on the Hub.

    The ensembles of these three are better than each of them, by more than ten images.
    """
    for number in range(3):
        hub.add_repo(f"org/ft-{number}", files(runs / f"ft-{number + 1}", README_md=card("org/digits")))
    data = {f"data/{path.name}": path.read_bytes() for path in (digits / "data").iterdir()}
    hub.add_repo("org/digits", data, "dataset")
    return hub


@pytest.fixture
def pushed(zoo, tmp_path):
    """A bank of what is on the Hub, pushed there, and as it was computed."""
    bank = hf_radin.compute_logits(hf_radin.gather("org/ft-*"), "org/digits", cache_dir=tmp_path / "mine")
    bank.push_to_hub("org/bank")
    return bank


def forget_downloads() -> None:
    """As on a machine that never saw the models and the images."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for folder in (*Path(HF_HUB_CACHE).glob("models--*"), *Path(HF_HUB_CACHE).glob("datasets--*")):
        shutil.rmtree(folder)


def test_it_is_the_same_bank_in_one_commit_without_a_path(pushed, zoo, tmp_path):
    created, upload = reversed(zoo.commits("org/bank", repo_type="dataset"))
    assert created.title == "initial commit" and upload.title == publish.COMMIT_MESSAGE
    contents = zoo.files("org/bank", repo_type="dataset").values()
    assert len(contents) > 10
    assert not any(str(tmp_path).encode() in content for content in contents)
    assert not any(zoo.token.encode() in content for content in contents)
    bank = hf_radin.LogitBank.from_hub("org/bank", cache_dir=tmp_path / "yours")
    assert bank.ingredients.ids == pushed.ingredients.ids and bank.ingredients.keys == pushed.ingredients.keys
    assert all((bank.logits(position) == pushed.logits(position)).all() for position in range(3))
    assert (bank.labels == pushed.labels).all() and (bank.ids == pushed.ids).all() and bank.classes == pushed.classes
    sha = HfApi().dataset_info("org/bank").sha
    assert bank.manifest.origin == f"org/bank@{sha}" and str(tmp_path / "yours" / "banks") in str(bank.folder)
    assert hf_radin.LogitBank.open(bank.folder).ingredients == bank.ingredients


def test_a_bank_of_selected_classes_is_searched_elsewhere(zoo, runs, tmp_path):
    """What was left out of each checkpoint travels with it, and a soup can be cooked from the recipe."""
    for number, names in enumerate((NAMES[:8], NAMES[:1:-1])):
        folder = with_classes(runs / f"ft-{number}", tmp_path / f"ft-{number}", names)
        zoo.add_repo(f"org/some-{number}", files(folder))
    data = digits_of(tmp_path / "data", NAMES[2:8])
    bank = hf_radin.compute_logits(hf_radin.gather("org/some-*", classes="common"), data, cache_dir=tmp_path / "mine")
    bank.push_to_hub("org/selected")
    forget_downloads()
    yours = hf_radin.LogitBank.from_hub("org/selected", cache_dir=tmp_path / "yours")
    assert [ingredient.left_out for ingredient in yours.ingredients] == [2, 2]
    assert [ingredient.order for ingredient in yours.ingredients] == [each.order for each in bank.ingredients]
    soup = hf_radin.radin(yours, budget=0, unmeasured=True)
    mine = hf_radin.average(bank.ingredients, soup.recipe)
    assert all(torch.equal(mine[name], tensor) for name, tensor in soup.model.state_dict().items())


def test_its_card_says_what_it_is(pushed, zoo):
    text = zoo.files("org/bank", repo_type="dataset")["README.md"].decode()
    data = DatasetCard(text).data
    assert data.tags == ["model-soup", "logits", "hf-radin", "arxiv:2401.17790"]
    for score, name in zip(pushed.score(np.eye(3)), pushed.ingredients.ids, strict=True):
        assert f"| [{name}]({zoo.url}/{name}) | `" in text and f"| {100 * score:.2f}% |" in text
    assert "600 images in 10 classes" in text and "split validation" in text and 'from_hub("org/bank")' in text
    assert data.source_datasets == ["org/digits"]


def accuracies(bank, subsets) -> list[float]:
    """Of the ensembles in which so many models, by position, have equal parts."""
    logits = [np.mean([bank.logits(position).astype(float) for position in subset], axis=0) for subset in subsets]
    return [float((ensemble.argmax(axis=1) == bank.labels).mean()) for ensemble in logits]


def test_others_search_it_without_images_and_without_checkpoints(pushed, zoo, tmp_path, model_calls, decoded):
    forget_downloads()
    before = len(zoo.requests)
    bank = hf_radin.LogitBank.from_hub("org/bank", cache_dir=tmp_path / "yours")
    soup = hf_radin.radin(bank, budget=0, unmeasured=True)
    paths = [request.path for request in zoo.requests[before:]]
    assert [path for path in paths if "org/bank" in path]
    assert not [path for path in paths if "ft-" in path or "digits" in path]
    assert model_calls == decoded == [] and not (tmp_path / "yours" / "pixels").exists()
    singles = accuracies(pushed, [[0], [1], [2]])
    ensembles = accuracies(pushed, [[0, 1], [0, 2], [1, 2], [0, 1, 2]])
    assert len(soup.recipe.used) > 1 and soup.report.measured is False and soup.report.passes.soups == 0
    (estimated,) = (entry for entry in soup.measurements if entry.measured is None)
    assert estimated.recipe == soup.recipe and estimated.images == 0
    assert estimated.estimate >= max(ensembles)
    assert {result.name for result in soup.results} == {"best single", "ensemble"}
    known = {entry.recipe.ingredients: entry.known for entry in soup.measurements if entry.proposal == "single"}
    assert known == {(name,): score for name, score in zip(pushed.ingredients.ids, singles, strict=True)}


@pytest.fixture
def estimated(pushed, tmp_path):
    """A soup that is estimated to be better than any single model, from a machine that never saw the models."""
    forget_downloads()
    bank = hf_radin.LogitBank.from_hub("org/bank", cache_dir=tmp_path / "yours")
    return hf_radin.radin(bank, budget=0, unmeasured=True)


def test_a_soup_that_was_not_measured_says_so(estimated, tmp_path, pushed):
    assert estimated.report.measured is False and len(estimated.recipe.used) > 1
    estimated.save_pretrained(tmp_path / "soup", license="mit")
    text = (tmp_path / "soup" / "README.md").read_text()
    assert "**Estimated, not measured** is how good it is" in text and "| not measured |" in text
    assert f"dataset `{estimated.report.bank}`" in text
    fields = json.loads((tmp_path / "soup" / "recipe.json").read_text())
    assert fields["measured"] is False and fields["measurements"][-1]["measured"] is None
    again = hf_radin.Soup.from_pretrained(tmp_path / "soup")
    assert again.measurements == estimated.measurements and again.report.measured is False
    from huggingface_hub import metadata_load

    results = metadata_load(tmp_path / "soup" / "README.md").get("model-index")
    assert not results or not results[0]["results"]
    expected, weights = hf_radin.average(pushed.ingredients, estimated.recipe), again.model.state_dict()
    assert expected.keys() == weights.keys()
    assert all((value == expected[name]).all() for name, value in weights.items())


def test_where_all_is_on_the_hub_soups_can_be_measured(pushed, zoo, tmp_path):
    forget_downloads()
    bank = hf_radin.LogitBank.from_hub("org/bank", cache_dir=tmp_path / "yours")
    yours, mine = (hf_radin.radin(searched, budget=2, test_split="test") for searched in (bank, pushed))
    assert yours.measurements == mine.measurements and yours.results == mine.results
    assert len([entry for entry in yours.measurements if entry.passes]) >= 2
    assert yours.report.bank == bank.manifest.origin and mine.report.bank is None


def test_statistics_of_batchnorm_are_estimated_from_the_hub_too(hub, nets, digits, tmp_path):
    for number in range(3):
        hub.add_repo(f"org/net-{number}", files(nets / f"ft-{number}"))
    data = {f"data/{path.name}": path.read_bytes() for path in (digits / "data").iterdir()}
    hub.add_repo("org/digits", data, "dataset")
    ingredients = hf_radin.gather("org/net-*")
    mine = hf_radin.compute_logits(ingredients, "org/digits", cache_dir=tmp_path / "mine", batchnorm_images=128)
    mine.push_to_hub("org/bank")
    yours = hf_radin.LogitBank.from_hub("org/bank", cache_dir=tmp_path / "yours")
    assert yours.statistics.record == mine.statistics.record
    recipe = hf_radin.Recipe.uniform(ingredients.ids)
    first, second = (hf_radin.average(bank.ingredients, recipe, statistics=bank.statistics) for bank in (mine, yours))
    assert first.keys() == second.keys() and any("running_mean" in name for name in first)
    assert all((first[name] == second[name]).all() for name in first)


def test_checkpoints_of_somebody_elses_folders_can_be_searched_and_cooked_where_they_are(
    hub, runs, digits, tmp_path, caplog, capsys, monkeypatch
):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[123]"), digits, cache_dir=tmp_path / "mine")
    bank.push_to_hub("org/bank", private=True)
    assert "3 of 3 checkpoints are not on the Hub" in caplog.text
    contents = hub.files("org/bank", repo_type="dataset").values()
    assert len(contents) > 10
    assert not any(str(place).encode() in content for place in (tmp_path, runs, digits) for content in contents)
    monkeypatch.chdir(tmp_path)
    estimate = ["search", "org/bank", "--cache-dir", "yours", "--budget", "0", "--unmeasured"]
    assert main([*estimate, "--output", "found"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"Estimated, not measured: \d\d\.\d\d% on validation", printed)
    assert "The recipe is in found/recipe.json" in printed
    assert [path.name for path in Path("found").iterdir()] == ["recipe.json"]
    assert main(["push", "found", "org/new"]) == 2
    assert "found holds the recipe alone, and no model: cook it where its" in capsys.readouterr().err
    shutil.copytree(runs / "ft-0", "earlier")  # a model stays beside no recipe that is not its own
    assert main([*estimate, "--output", "earlier", "--overwrite"]) == 0
    assert [path.name for path in Path("earlier").iterdir()] == ["recipe.json"]
    command = ["average", "--recipe", "found/recipe.json", "--models", f"{runs}/ft-*", "--output", "soup"]
    assert main(command) == 0
    text = Path("soup/README.md").read_text()
    assert "**Estimated, not measured**" in text and "measured so" not in text
    assert main(["push", "soup", "org/cooked"]) == 0
    assert hub.files("org/cooked").keys() >= {"README.md", "recipe.json", "model.safetensors"}
    assert main(["search", "org/bank", "--output", "other", "--cache-dir", "yours"]) == 2
    assert "with budget=0" in capsys.readouterr().err
    before = len(hub.requests)
    assert main([*estimate, "--output", "third", "--push-to", "org/new"]) == 2
    assert "--push-to org/new: no soup can be made here" in capsys.readouterr().err
    assert not [request for request in hub.requests[before:] if request.method == "POST"]
    yours = hf_radin.LogitBank.from_hub("org/bank", cache_dir="yours")
    soup = hf_radin.radin(yours, budget=0, unmeasured=True)
    with pytest.raises(ValueError, match=r"No model can be made here: .* is a folder on another machine"):
        soup.save_pretrained("none")
    soup.save_recipe("alone.json")
    assert not Path("none").exists() and SearchReport.read(Path("alone.json")).recipe == soup.recipe
    with pytest.raises(ValueError, match=r"images of the bank org/bank@.* are not on the Hub, and its split 'test'"):
        hf_radin.radin(yours, budget=0, unmeasured=True, test_split="test")
    with pytest.raises(ValueError, match=r"The images of the bank org/bank@.* are not on the Hub"):
        next(hf_radin.LogitBank.from_hub("org/bank", cache_dir="yours").images.stream(0, 1))


def test_the_command_line_computes_pushes_and_searches(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["logits", "--models", "org/ft-*", "--dataset", "org/digits", "--logits-dtype", "float16"]
    assert main([*command, "--cache-dir", "cache", "--push-to", "org/bank"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("The logits of 3 checkpoints on 600 images are in ") and second.startswith("Pushed: ")
    folder = first.rpartition(" ")[2]
    for bank, name in ((folder, "here"), ("org/bank", "hub")):
        assert main(["search", bank, "--budget", "2", "--output", name, "--cache-dir", "cache"]) == 0
    here, hub = (hf_radin.Soup.from_pretrained(name) for name in ("here", "hub"))
    assert here.measurements == hub.measurements and here.recipe == hub.recipe


def test_what_can_not_be_is_refused_and_nothing_of_it_stays(pushed, zoo, tmp_path):
    names = zoo.files("org/bank", repo_type="dataset")
    place = next(name for name in names if name.startswith("logits/") and name.endswith(".npy"))
    np.save(tmp_path / "columns.npy", np.asfortranarray(pushed.logits(0)))
    zoo.add_commit("org/bank", {place: (tmp_path / "columns.npy").read_bytes()}, "dataset")
    with pytest.raises(ValueError, match=r"org/bank@.* is not a logit bank: .* is stored by columns"):
        hf_radin.LogitBank.from_hub("org/bank", cache_dir=tmp_path / "yours")
    assert not list((tmp_path / "yours").glob("banks/*/bank.json"))


def test_the_place_of_an_image_processor_is_nobodys_business(runs, digits, hub, tmp_path):
    for number in range(2):
        shutil.copytree(runs / f"ft-{number}", tmp_path / f"ft-{number}")
        path = tmp_path / f"ft-{number}" / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "name_or_path": "/home/alice/secret"}))
    bank = hf_radin.compute_logits(hf_radin.gather(f"{tmp_path}/ft-*"), digits, cache_dir=tmp_path / "cache")
    bank.push_to_hub("org/bank")
    contents = hub.files("org/bank", repo_type="dataset").values()
    assert len(contents) > 5 and not any(b"alice" in content for content in contents)


@pytest.mark.parametrize("name", ["org/nothing", "org/ft-0", "no id"])
def test_a_repository_that_is_not_there_is_named(zoo, tmp_path, name):
    with pytest.raises(
        ValueError, match=f"There is no folder '{name}' here and no such dataset on the Hub|nor a Hub id"
    ):
        hf_radin.LogitBank.from_hub(name, cache_dir=tmp_path)


def test_a_dataset_that_is_no_bank_is_named(zoo, tmp_path):
    with pytest.raises(ValueError, match=r"org/digits is not a logit bank: it has no bank\.json"):
        hf_radin.LogitBank.from_hub("org/digits", cache_dir=tmp_path)


def test_where_the_hub_can_not_be_asked_nobody_says_that_there_is_no_bank(go_offline, tmp_path):
    go_offline()
    with pytest.raises(ValueError, match=r"There is no folder 'org/bank' here, and the Hub can't be asked"):
        hf_radin.LogitBank.from_hub("org/bank", cache_dir=tmp_path)


def test_a_download_that_is_broken_is_named_with_the_way_out(pushed, tmp_path):
    """In the Hub's cache, which others may write: before a bank is made of it, and after that."""
    bank = hf_radin.LogitBank.from_hub("org/bank", cache_dir=tmp_path / "yours")
    path = (bank.folder / "logits" / f"{bank.ingredients.keys[0]}.npy").resolve()
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # the last bit of a logit
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is not the logits/.*\.npy that was published as org/bank@.*Remove"):
        hf_radin.LogitBank.from_hub("org/bank", cache_dir=tmp_path / "again")
    way_out = rf"Remove {path} and the folder {bank.folder}: then the bank is downloaded again"
    with pytest.raises(ValueError, match=way_out):
        hf_radin.LogitBank.from_hub("org/bank", cache_dir=tmp_path / "yours")
    with pytest.raises(ValueError, match=way_out):
        hf_radin.LogitBank.open(bank.folder)


def test_a_bank_writes_nothing_outside_of_the_cache(pushed, zoo, tmp_path):
    manifest = json.loads(zoo.files("org/bank", repo_type="dataset")["bank.json"])
    manifest |= {"pixels": "../../../../outside", "dataset": "/etc"}
    zoo.add_commit("org/bank", {"bank.json": json.dumps(manifest).encode()}, "dataset")
    bank = hf_radin.LogitBank.from_hub("org/bank", cache_dir=tmp_path / "a" / "yours")
    hf_radin.uniform(bank)
    assert not (tmp_path / "outside").exists() and bank.images.folder.resolve().parent == tmp_path / "a/yours/pixels"
    assert bank.source.dataset == "org/digits"


def test_several_that_download_one_bank_at_the_same_time_all_have_it(pushed, tmp_path):
    def fetch(number):
        return publish.fetch_bank("org/bank", tmp_path / "yours", revision=None, token=None)

    for _ in range(3):
        with ThreadPoolExecutor(4) as threads:
            (folder,) = {*threads.map(fetch, range(4))}
        shutil.rmtree(folder)
