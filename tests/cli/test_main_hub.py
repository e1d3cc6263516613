"""The road through the Hub: ingredients and images come from it, the soup goes to it, in as few steps as can be."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from shared.pushed import contents, held
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

import hf_radin
from hf_radin.cli import tables
from hf_radin.cli.main import main

ROOT = Path(__file__).parents[2]


def files(folder: Path, **texts: str) -> dict[str, bytes]:
    """The files of a folder, and further ones: `README_md="..."`."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    return contents | {name.replace("_md", ".md"): text.encode() for name, text in texts.items()}


def card(dataset: str, license: str = "mit", split: str = "validation") -> str:
    return (
        f"---\nlicense: {license}\ndatasets:\n- {dataset}\nmodel-index:\n- name: ft\n  results:\n"
        "  - task:\n      type: image-classification\n"
        f"    dataset:\n      name: digits\n      type: {dataset}\n      config: default\n      split: {split}\n"
        "    metrics:\n    - type: accuracy\n      value: 0.9\n---\n# ft\n"
    )


def headers_only(hub) -> bool:
    """Whether of all weights only the beginning was asked for."""
    return {request.status for request in hub.logged("GET", "safetensors")} <= {206}


@pytest.fixture
def zoo(hub, runs, digits):
    """Three fine-tunes with cards, a model of another name, and the digits, on the Hub."""
    for number in range(3):
        hub.add_repo(f"org/ft-{number}", files(runs / f"ft-{number}", README_md=card("org/digits")))
    hub.add_repo("org/other", {"README.md": b"# nothing"})
    hub.add_repo(
        "org/digits", {f"data/{path.name}": path.read_bytes() for path in (digits / "data").iterdir()}, "dataset"
    )
    return hub


def test_a_pattern_lists_the_authors_models_and_no_weights_are_downloaded(zoo):
    ingredients = hf_radin.gather("org/ft-*")
    assert ingredients.ids == ("org/ft-0", "org/ft-1", "org/ft-2")
    assert [ingredient.revision for ingredient in ingredients] == [zoo.commits(id)[0].sha for id in ingredients.ids]
    assert headers_only(zoo) and zoo.logged("GET", "safetensors")


def test_a_revision_is_kept(zoo, runs):
    first = zoo.commits("org/ft-0")[0].sha
    zoo.add_commit("org/ft-0", {"model.safetensors": (runs / "ft-4" / "model.safetensors").read_bytes()})
    for models in (f"org/ft-0@{first}", "org/ft-1"), ("org/ft-0", "org/ft-1"):
        ingredients = hf_radin.gather(models)
        old = ingredients[0].id != "org/ft-0"
        assert (ingredients[0].revision == first) == old == (models[0] != "org/ft-0")
        soup = hf_radin.average(ingredients, hf_radin.Recipe.uniform([ingredients.ids[0]]))
        expected = AutoModelForImageClassification.from_pretrained(runs / ("ft-0" if old else "ft-4"))
        assert torch.equal(soup["classifier.weight"], expected.classifier.weight)


def test_a_dataset_that_was_a_folder_of_somebody_elses_is_asked_for(zoo, runs, capsys):
    for number in range(3):
        zoo.add_commit(f"org/ft-{number}", {"README.md": card("/scratch/me/digits").encode()})
    assert main(["soup", "--models", "org/ft-*"]) == 2
    error = capsys.readouterr().err
    assert "Name the dataset with --dataset" in error and "'/scratch/me/digits', a folder on another machine" in error


def test_two_revisions_of_one_model_are_two_ingredients(zoo, runs):
    first = zoo.commits("org/ft-0")[0].sha
    zoo.add_commit("org/ft-0", {"model.safetensors": (runs / "ft-4" / "model.safetensors").read_bytes()})
    assert len(hf_radin.gather([f"org/ft-0@{first}", "org/ft-0"])) == 2
    with pytest.raises(ValueError, match="at least two different checkpoints"):
        hf_radin.gather(["org/ft-1", "org/ft-1@main"])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("org/nothing-*", r"matches no folder here and none of the 4 models of 'org'"),
        ("nobody/ft-*", "none of the 0 models of 'nobody'"),
        (["org/ft-0", "org/gone"], "There is no folder 'org/gone' here and no such model on the Hub"),
        (["org/ft-0", "org/ft-1@gone"], "org/ft-1 has no revision 'gone'"),
        (["org/ft-0", "org/other"], "org/other: no config.json"),
        (
            ["org/ft-0", "org/pickled"],
            "It has pytorch_model.bin: only safetensors are read, unless you pass allow_pickle=True",
        ),
        (["org/ft-0", "org/gated"], "org/gated is gated: ask for access"),
        (["org/ft-0", "someone/private"], "no such model on the Hub .or it is private: log in or pass a token"),
        (["org/ft-0", "not an id"], "not an id is neither a folder here nor a Hub id"),
    ],
)
def test_what_can_not_be_had_is_named(zoo, runs, models, message):
    small = {name: data for name, data in files(runs / "ft-1").items() if name != "model.safetensors"}
    zoo.add_repo("org/pickled", {**small, "pytorch_model.bin": b"pickle"})
    # not named like the others, so that it is in no pattern
    zoo.add_repo("org/gated", files(runs / "ft-1"), gated=True) if "org/gated" in models else None
    zoo.add_repo("someone/private", files(runs / "ft-1"), private=True)
    message = message.replace("the 4", "the 5")
    with pytest.raises(ValueError, match=message):
        hf_radin.gather(models)


def test_what_is_cached_works_offline(zoo, go_offline):
    online = hf_radin.gather(["org/ft-0", "org/ft-1"])
    for ingredient in online:
        ingredient.download()
    before = len(zoo.requests)
    go_offline()
    offline = hf_radin.gather(["org/ft-0", "org/ft-1"])
    assert [ingredient.revision for ingredient in offline] == [ingredient.revision for ingredient in online]
    assert hf_radin.average(offline, hf_radin.Recipe.uniform(offline.ids))
    assert len(zoo.requests) == before


def test_a_dataset_on_the_hub_is_streamed_at_one_commit(zoo, digits, tmp_path):
    ingredients = hf_radin.gather("org/ft-*")
    bank = hf_radin.compute_logits(ingredients, "org/digits", cache_dir=tmp_path)
    sha = zoo.commits("org/digits", repo_type="dataset")[0].sha
    assert bank.manifest.data.revision == sha and len(bank) == 600
    local = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path)
    assert (bank.logits(0) == local.logits(0)).all() and bank.folder != local.folder
    assert not zoo.logged("GET", "test-00000")  # the other splits stay where they are
    before = len(zoo.logged("GET", "validation-00000"))
    again = hf_radin.compute_logits(ingredients, "org/digits", cache_dir=tmp_path)
    assert again.folder == bank.folder
    # what is computed is not streamed again: what is asked of the file now is its header
    assert len(zoo.logged("GET", "validation-00000")) <= 2 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "org/gone"}, "no folder 'org/gone' here and no such dataset on the Hub"),
        ({"dataset": "org/digits", "revision": "gone"}, "org/digits has no revision 'gone'"),
        ({"dataset": "org/digits", "split": "dev"}, "has no split 'dev'"),
        ({"dataset": "org/digits", "config_name": "large"}, "org/digits can't be read"),
    ],
)
def test_a_dataset_that_can_not_be_had_is_named(zoo, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        hf_radin.compute_logits(hf_radin.gather("org/ft-*"), cache_dir=tmp_path, **options)
    assert headers_only(zoo)


@pytest.fixture
def soup(bank):
    return hf_radin.radin(bank, budget=2)


def test_saved_equals_pushed_equals_loaded(hub, soup, tmp_path):
    soup.save_pretrained(tmp_path / "soup")
    commit = hf_radin.push_soup_to_hub(soup, "org/soup")
    assert len(hub.commits("org/soup")) == 2  # the empty one that makes the repository, and ours
    assert hub.commits("org/soup")[0].sha == commit.oid
    pushed = held(hub, "org/soup")
    assert pushed == contents(tmp_path / "soup")

    loaded, report = AutoModelForImageClassification.from_pretrained("org/soup", output_loading_info=True)
    assert not any(report.values())
    expected = soup.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert AutoImageProcessor.from_pretrained("org/soup").to_dict() == soup.processor.to_dict()
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    here = pipeline("image-classification", model=soup.model, image_processor=soup.processor)(image)
    loaded = pipeline("image-classification", model="org/soup")(image)
    assert [answer["label"] for answer in loaded] == [answer["label"] for answer in here]
    # where weights lie in memory decides on some processors how products are rounded
    assert [answer["score"] for answer in loaded] == pytest.approx([answer["score"] for answer in here], rel=1e-5)

    again = hf_radin.Soup.from_pretrained("org/soup")
    assert (again.recipe.weights, again.results) == (soup.recipe.weights, soup.results)
    shorter = [
        replace(entry, recipe=other.recipe, teacher=other.teacher)
        for entry, other in zip(soup.measurements, again.measurements, strict=True)
    ]
    assert list(again.measurements) == shorter  # of local folders the last two names
    assert again.recipe.ingredients == tuple("/".join(Path(name).parts[-2:]) for name in soup.recipe.ingredients)
    assert {*again.report.head.teacher.ingredients} == {entry.id for entry in again.report.ingredients}


def test_a_saved_folder_is_pushed_as_it_is(hub, soup, tmp_path, capsys):
    soup.save_pretrained(tmp_path / "soup")
    with (tmp_path / "soup" / "README.md").open("a") as file:
        file.write("What I have to say of it.")
    for name in (".notes", "secret.env", "secrets.json", "optimizer.pt", "screenshot.png"):
        (tmp_path / "soup" / name).write_text("mine")
    assert main(["push", str(tmp_path / "soup"), "org/mine"]) == 0
    assert hub.commits("org/mine")[0].sha in capsys.readouterr().out
    pushed = hub.files("org/mine")
    assert pushed["README.md"].endswith(b"What I have to say of it.")
    assert pushed.keys() - {".gitattributes"} == {
        "README.md",
        "classes.png",
        "config.json",
        "estimates.png",
        "model.safetensors",
        "passes.png",
        "preprocessor_config.json",
        "recipe.json",
    }
    (tmp_path / "soup" / "recipe.json").unlink()
    assert main(["push", str(tmp_path / "soup"), "org/mine"]) == 2
    assert "holds no soup" in capsys.readouterr().err


def test_options_of_the_push(hub, soup):
    soup.push_to_hub("org/private", private=True, commit_message="My words", license="mit")
    assert hub.commits("org/private")[0].title == "My words"
    assert b"license: mit" in hub.files("org/private")["README.md"]
    assert HfApi().model_info("org/private").private
    request = soup.push_to_hub("org/private", create_pr=True)
    assert request.pr_num == 1 and len(hub.commits("org/private")) == 2


@pytest.mark.parametrize("repo_id", ["a/b/c", "someone/soup"])
def test_a_repository_that_can_not_be_written_is_named(hub, soup, repo_id):
    with pytest.raises(ValueError, match=repo_id):
        hf_radin.push_soup_to_hub(soup, repo_id)


def test_the_licence_of_the_parents_is_kept_and_they_are_named(zoo, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather("org/ft-*"), "org/digits", cache_dir=tmp_path)
    hf_radin.uniform(bank).push_to_hub("org/soup")
    data = ModelCard.load("org/soup").data
    assert data.license == "mit" and data.base_model == ["org/ft-0", "org/ft-1", "org/ft-2"]
    assert data.to_dict()["base_model_relation"] == "merge" and data.datasets == ["org/digits"]


def test_a_pushed_recipe_cooks_the_same_bits_from_the_hub(zoo, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather("org/ft-*"), "org/digits", cache_dir=tmp_path / "cache")
    hf_radin.uniform(bank).save_pretrained(tmp_path / "soup")
    zoo.add_commit("org/ft-0", {"model.safetensors": b"changed since"})
    command = ["average", "--recipe", str(tmp_path / "soup" / "recipe.json"), "--output", str(tmp_path / "cooked")]
    assert main(command) == 0
    expected = (tmp_path / "soup" / "model.safetensors").read_bytes()
    assert (tmp_path / "cooked" / "model.safetensors").read_bytes() == expected


def test_the_bare_line_works_as_it_stands(zoo, tmp_path):
    """Without --dataset: what the cards agree on; to the Hub and back, in processes of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "examples" / "soup.py")]
    run = subprocess.run(
        [*command, "--models", "org/ft-*", "--push-to", "org/soup"],
        cwd=tmp_path,
        env=zoo.environ(tmp_path / "home") | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "The models' cards agree on the dataset org/digits, split validation." in run.stdout
    recipe = json.loads(zoo.files("org/soup")["recipe.json"])
    assert recipe["data"]["config_name"] == "default" and len(recipe["ingredients"]) == 3
    assert (tmp_path / "soup" / "model.safetensors").read_bytes() == bytes(zoo.files("org/soup")["model.safetensors"])
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(zoo.token.encode() in data for data in [*written, run.stdout.encode(), run.stderr.encode()])
    assert not any(zoo.token.encode() in bytes(data) for data in zoo.files("org/soup").values())


def test_two_processes_push_once(zoo, tmp_path):
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    run = subprocess.run(
        [
            sys.executable,
            *launch.split(),
            str(ROOT / "examples/soup.py"),
            "--models",
            "org/ft-*",
            "--push-to",
            "org/soup",
        ],
        cwd=tmp_path,
        env=zoo.environ(tmp_path / "home") | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert len(zoo.commits("org/soup")) == 2 and len(zoo.logged("POST", "/commit/")) == 1
    assert run.stdout.count("The models' cards agree") == 1


def test_a_target_that_can_not_be_written_is_refused_before_any_model_runs(zoo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["soup", "--models", "org/ft-*", "--push-to", "someone/soup"]) == 2
    assert "someone/soup can't be made: tester may not write under 'someone'" in capsys.readouterr().err
    assert headers_only(zoo) and not (tmp_path / "soup").exists()


def test_any_metric_of_evaluate_by_name(hub, bank):
    script = (
        "import datasets\nimport evaluate\nfrom sklearn.metrics import hamming_loss\n\n\n"
        "class Hamming(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        kinds = {'predictions': datasets.Value('int64'), 'references': datasets.Value('int64')}\n"
        "        return evaluate.MetricInfo('', '', datasets.Features(kinds))\n\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'hamming': float(hamming_loss(references, predictions))}\n"
    )
    hub.add_repo("evaluate-metric/hamming", {"hamming.py": script.encode()}, "space")
    soup = hf_radin.best_single(bank, metrics=("accuracy", "hamming"))
    from sklearn.metrics import hamming_loss

    weights = [soup.recipe.used.get(name, 0.0) for name in bank.ingredients.ids]
    expected = hamming_loss(bank.labels, bank.predict(weights))
    assert soup.results[0].metrics["hamming"] == pytest.approx(expected)
    assert f"{expected:.4f}" in tables.soup_table(soup)


def test_streams_of_the_hub_are_what_datasets_streams(zoo):
    assert isinstance(
        datasets.load_dataset("org/digits", split="validation", streaming=True), datasets.IterableDataset
    )


def test_statistics_of_batchnorm_come_from_a_stream_of_the_hub(hub, nets, digits, tmp_path):
    for number in range(2):
        hub.add_repo(f"org/net-{number}", files(nets / f"ft-{number}"))
    hub.add_repo(
        "org/digits", {f"data/{path.name}": path.read_bytes() for path in (digits / "data").iterdir()}, "dataset"
    )
    ingredients = hf_radin.gather("org/net-*")
    options = {"cache_dir": tmp_path / "cache", "batchnorm_images": 128}
    bank = hf_radin.compute_logits(ingredients, "org/digits", **options)
    assert bank.statistics.record.split == "train" and bank.statistics.record.used == 128
    hf_radin.uniform(bank).save_pretrained(tmp_path / "soup")
    first = len(hub.logged("GET", "train-00000"))
    hf_radin.compute_logits(ingredients, "org/digits", **options)
    assert len(hub.logged("GET", "train-00000")) - first < first  # opened, and not read: what was drawn is cached

    hub.add_commit("org/digits", {"README.md": b"# moved on"}, repo_type="dataset")
    again = tmp_path / "again"
    recipe = str(tmp_path / "soup" / "recipe.json")
    assert main(["average", "--recipe", recipe, "--output", str(again), "--cache-dir", str(tmp_path / "two")]) == 0
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "soup" / "model.safetensors").read_bytes()
