"""Names of what is private are told before they are public, or left out."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, snapshot_download
from shared.pushed import contents, folder, held, quick

import hf_radin
from hf_radin.cli.main import main
from hf_radin.ingredients.card_metadata import BaseEntry, IngredientEntry
from hf_radin.logits.manifest import DataRecord
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.hub_commit import PushOptions
from hf_radin.soup import redact
from hf_radin.soup.card import MARKS
from hf_radin.soup.push import CardOptions, push_folder
from hf_radin.soup.report import SearchReport

__all__ = ["folder", "quick"]  # fixtures


HIDDEN = CardOptions(hide_private=True)


def entry_of(name: str, **values) -> IngredientEntry:
    return IngredientEntry(**{"id": name, "repo_id": None, "revision": "r", **values})


def report_of(*entries: IngredientEntry, data: DataRecord | None = None, **values) -> SearchReport:
    recipe = Recipe.uniform([entry.id for entry in entries])
    return SearchReport(recipe=recipe, processor={}, ingredients=entries, data=data, **values)


@pytest.fixture
def secret(hub, runs, digits, tmp_path):
    """A soup of what is on the Hub: two public ingredients, a private one, and a private dataset."""
    for number in range(3):
        hub.add_repo(f"org/ft-{number}", contents(runs / f"ft-{number}"), private=number == 1)
    images = {f"data/{path.name}": path.read_bytes() for path in (digits / "data").iterdir()}
    hub.add_repo("org/digits", images, "dataset", private=True)
    bank = hf_radin.compute_logits(hf_radin.gather("org/ft-*"), "org/digits", cache_dir=tmp_path / "cache")
    return hf_radin.uniform(bank)


def test_names_of_what_is_private_are_told_before_they_are_public(hub, secret, caplog):
    secret.push_to_hub("org/soup")
    assert (
        "name what is private, and everybody can read them: org/digits, org/ft-1. Push with hide_private"
        in caplog.text
    )
    caplog.clear()
    secret.push_to_hub("org/quiet", private=True)
    assert "private" not in caplog.text


@pytest.mark.parametrize(("options", "is_told"), [([], True), (["--hide-private"], False), (["--private"], False)])
def test_private_names_are_told_before_anything_is_computed(hub, secret, tmp_path, capsys, caplog, options, is_told):
    """What is computed is written into the cache, and here is none."""
    (tmp_path / "file").touch()
    command = ["soup", "--models", "org/ft-*", "--dataset", "org/digits", "--push-to", "org/soup"]
    places = ["--output", str(tmp_path / "soup"), "--cache-dir", str(tmp_path / "file")]
    assert main([*command, *places, *options]) == 2
    assert f"The cache can't be kept in {tmp_path / 'file'}" in capsys.readouterr().err
    assert ("name what is private, and everybody can read them: org/digits, org/ft-1" in caplog.text) is is_told


def test_no_path_of_the_machine_is_pushed(hub, bank, runs, tmp_path):
    hf_radin.uniform(bank).save_pretrained(tmp_path / "soup")
    push_folder(tmp_path / "soup", "org/soup", PushOptions())
    pushed = hub.files("org/soup")
    assert {"README.md", "recipe.json", "model.safetensors"} <= pushed.keys()
    assert not any(str(runs.parent).encode() in data for data in pushed.values())
    ids = [entry["id"] for entry in json.loads(pushed["recipe.json"])["ingredients"]]
    assert ids == [f"{runs.name}/ft-{number}" for number in range(5)]
    assert str(runs) in (tmp_path / "soup" / "recipe.json").read_text()  # where they are found again
    again = hf_radin.Soup.from_pretrained("org/soup")
    assert list(again.recipe.used) == ids
    recipe = snapshot_download("org/soup") + "/recipe.json"
    command = ["average", "--recipe", recipe, "--output", str(tmp_path / "made"), "--models", f"{runs}/ft-*"]
    assert main(command) == 0
    assert (tmp_path / "made" / "model.safetensors").read_bytes() == pushed["model.safetensors"]


def test_paths_that_end_alike_keep_what_tells_them_apart():
    names = [
        "/home/me/a/runs/ft-1",
        "/home/me/b/runs/ft-1",
        "/home/me/b/runs/ft-10",
        "/x",
        "org/ft",
        "runs/ft-1",
        "org/x",
    ]
    report = report_of(
        *map(entry_of, names),
        data=DataRecord("/home/me/data", "validation"),
        classes=("/m/0abc",),
        remarks=(("/home/me/other", "is a copy of /home/me/b/runs/ft-10."),),
    )
    short = redact.without_paths(report)
    ids = ["a/runs/ft-1", "b/runs/ft-1", "runs/ft-10", "x", "org/ft", "runs/ft-1", "org/x"]
    assert [entry.id for entry in short.ingredients] == list(short.recipe.ingredients) == ids
    assert short.data.name == "me/data" and short.classes == ("/m/0abc",)
    assert short.remarks == (("me/other", "is a copy of runs/ft-10."),)


def test_of_what_a_card_was_made_of_no_path_is_left_and_none_becomes_an_id():
    entry = entry_of(
        "/home/me/runs/ft-1",
        base_model="/home/me/start",
        dataset="/home/me/pets",
        hyperparameters={"output_dir": "/home/me/runs/out", "seed": "1"},
    )
    data = DataRecord("org/pets", "validation", revision="r")
    report = report_of(entry, data=data, image_processor="/home/me/proc@1")
    short = redact.without_paths(report)
    assert "/home" not in short.text
    expected = entry_of("runs/ft-1", hyperparameters={"output_dir": "runs/out", "seed": "1"})
    assert short.ingredients == (expected,) and short.image_processor == "proc@1" and short.data == data
    assert report.ingredients[0].base_model == "/home/me/start"


@pytest.mark.parametrize(
    "names", [["/a/b/org/ft", "org/ft"], ["/org/ft", "org/ft"], ["/x/org/ft", "/y/org/ft", "x/org/ft"]]
)
def test_a_shortened_path_is_no_other_name(names):
    short = redact.without_paths(report_of(*map(entry_of, names), data=DataRecord("org/data", "validation")))
    ids = [entry.id for entry in short.ingredients]
    assert len({*ids}) == len(names) and ids[-1] == names[-1] and not any(name.startswith("/") for name in ids)


def test_a_folder_is_no_private_repository(hub, bank, runs, tmp_path, caplog):
    soup = hf_radin.uniform(bank)
    soup.save_pretrained(tmp_path / "soup")
    path = tmp_path / "soup" / "recipe.json"
    report = SearchReport.read(path)
    paths = {"base_model": str(runs / "start"), "dataset": str(runs / "digits")}
    entries = tuple(replace(entry, **paths) for entry in report.ingredients)
    path.write_text(replace(report, ingredients=entries, image_processor=f"{runs}/processor@sha").text)
    push_folder(tmp_path / "soup", "org/soup", PushOptions(), HIDDEN)
    assert "private" not in caplog.text and b"private-" not in hub.files("org/soup")["recipe.json"]
    requests = hub.logged("GET", "/api/")
    assert requests and all("org/soup" in request.path for request in requests)


def test_a_gated_ingredient_may_be_named(hub, runs, digits, tmp_path, caplog):
    """Its page is there for everybody, but for its files."""
    for number in range(2):
        hub.add_repo(f"org/ft-{number}", contents(runs / f"ft-{number}"), gated=number == 1)
    hub.grant("org/ft-1")
    bank = hf_radin.compute_logits(hf_radin.gather("org/ft-*"), digits, cache_dir=tmp_path / "cache")
    hf_radin.uniform(bank).push_to_hub("org/soup", hide_private=True)
    assert "private" not in caplog.text
    data = ModelCard(held(hub, "org/soup")["README.md"].decode()).data
    assert data.base_model == ["org/ft-0", "org/ft-1"] and data.to_dict()["base_model_relation"] == "merge"


def test_names_of_what_is_private_are_told_before_a_bank_is_public(hub, secret, tmp_path, caplog):
    bank = hf_radin.compute_logits(hf_radin.gather("org/ft-*"), "org/digits", cache_dir=tmp_path / "cache")
    bank.push_to_hub("org/logits")
    assert "The bank names what is private, and everybody can read it: org/digits, org/ft-1." in caplog.text
    caplog.clear()
    bank.push_to_hub("org/quiet", private=True)
    assert "private" not in caplog.text


def test_names_of_what_is_private_are_left_out(hub, secret, tmp_path, capsys):
    secret.push_to_hub("org/soup", hide_private=True, license="mit")
    pushed = held(hub, "org/soup")
    assert not any(name in data for name in (b"org/ft-1", b"org/digits") for data in pushed.values())
    fields = json.loads(pushed["recipe.json"])
    assert [entry["repo_id"] for entry in fields["ingredients"]] == ["org/ft-0", None, "org/ft-2"]
    assert hub.commits("org/ft-1")[0].sha.encode() not in pushed["recipe.json"]
    assert b"private-" in pushed["README.md"] and b"license: mit" in pushed["README.md"]
    again = hf_radin.Soup.from_pretrained("org/soup")
    assert again.recipe.weights == secret.recipe.weights and len(again.measurements) == len(secret.measurements)
    secret.save_pretrained(tmp_path / "soup")
    assert main(["push", str(tmp_path / "soup"), "org/other", "--hide-private"]) == 0
    assert held(hub, "org/other")["recipe.json"] == pushed["recipe.json"]


def test_every_repository_that_a_recipe_names_is_asked_for(hub):
    hub.add_repo("org/ft-public", {"a": b""})
    hub.add_repo("org/ft", {"a": b""}, "dataset")  # a public dataset of that name is no public model
    hub.add_repo("org/open", {"a": b""}, "dataset")
    private = entry_of("org/ft", repo_id="org/ft", revision="abc", subfolder="", base_model="org/secret")
    public = entry_of("org/ft-public", repo_id="org/ft-public", revision="def", dataset="org/images")
    folder = entry_of("private-1", revision="ghi")
    report = replace(
        report_of(private, public, folder, data=DataRecord("org/open", "validation", revision="r")),
        recipe=Recipe(("org/ft", "org/ft-public", "private-1"), (0.5, 0.25, 0.25)),
        bank="org/logits@sha",
        remarks=(("org/ft@abc:inner", "is a stranger"),),
        image_processor="org/processor@main",
    )
    names = redact.private_names(report)
    assert sorted(names) == ["org/ft", "org/images", "org/logits", "org/processor", "org/secret"]
    renamed = redact.without_names(report, names)
    assert not any(f'"{name}{end}' in renamed.text for name in names for end in '"@:')
    assert "inner" not in renamed.text and "abc" not in renamed.text
    hidden = renamed.ingredients[0]
    assert renamed.ingredients == (
        entry_of(hidden.id, revision="hidden", subfolder=None),
        replace(public, dataset=None),
        folder,
    )
    assert hidden.id.startswith("private-") and hidden.id != "private-1"
    assert renamed.recipe == Recipe((hidden.id, "org/ft-public", "private-1"), (0.5, 0.25, 0.25))
    assert renamed.data == report.data and renamed.bank is None
    assert renamed.remarks == ((hidden.id, "is a stranger"),)


def test_the_base_of_an_adapter_is_hidden_with_its_name(hub):
    hub.add_repo("org/ft", {"a": b""})
    base = BaseEntry("org/base", "org/base", "abc")
    report = report_of(entry_of("org/ft", repo_id="org/ft", revision="def", base=base))
    assert redact.private_names(report) == ["org/base"]
    (entry,) = redact.without_names(report, ["org/base"]).ingredients
    assert (entry.id, entry.repo_id, entry.revision) == ("org/ft", "org/ft", "def")
    assert (entry.base.repo_id, entry.base.revision) == (None, "hidden") and "org/base" not in str(entry)


def test_a_private_name_in_another_file_is_refused(hub, secret, tmp_path):
    secret.save_pretrained(tmp_path / "soup")
    config = json.loads((tmp_path / "soup" / "config.json").read_text())
    (tmp_path / "soup" / "config.json").write_text(json.dumps({**config, "note": "made of org/ft-1"}))
    assert main(["card", str(tmp_path / "soup"), "--accept-changes"]) == 0
    with pytest.raises(ValueError, match=r"config\.json names org/ft-1, which is private: take it out by hand"):
        push_folder(tmp_path / "soup", "org/soup", PushOptions(), HIDDEN)


def test_a_private_name_is_found_in_addresses_paths_and_large_letters(hub, secret, tmp_path, monkeypatch):
    values = {
        "start": "https://huggingface.co/org/ft-1/tree/main",
        "resumed": "org/ft-1/checkpoint-5",
        "note": "ORG/Ft-1",
        "other": "org/ft-10 myorg/ft-1",
    }
    first, *others = secret.report.ingredients
    report = replace(secret.report, ingredients=(replace(first, hyperparameters=values), *others))
    (tmp_path / "org" / "ft-1").mkdir(parents=True)  # a copy of it lies here, too
    monkeypatch.chdir(tmp_path)
    names = redact.private_names(report)
    assert names == ["org/digits", "org/ft-1"]
    assert redact.without_names(report, names).ingredients[0].hyperparameters == {
        "start": "https://huggingface.co/private-2",
        "resumed": "private-2",
        "note": "private-2",
        "other": "org/ft-10 myorg/ft-1",
    }
    secret.save_pretrained(tmp_path / "soup")
    readme = tmp_path / "soup" / "README.md"
    readme.write_text(readme.read_text().replace(MARKS[0], f"{MARKS[0]}\nsee https://hf.co/org/ft-1"))
    with pytest.raises(ValueError, match=r"README\.md names org/ft-1, which is private: take it out by hand"):
        push_folder(tmp_path / "soup", "org/soup", PushOptions(), HIDDEN)


def test_a_public_name_that_begins_as_a_private_one_may_stay(hub, runs, digits, tmp_path):
    names = ["org/ft", "org/ft-public", "org/ft.2"]
    for number, name in enumerate(names):
        hub.add_repo(name, contents(runs / f"ft-{number}"), private=name == "org/ft")
    bank = hf_radin.compute_logits(hf_radin.gather(names), digits, cache_dir=tmp_path / "cache")
    soup = hf_radin.uniform(bank)
    soup.push_to_hub("org/soup", hide_private=True)
    text = held(hub, "org/soup")["README.md"].decode()
    assert "[org/ft-public](http" in text and "[org/ft.2](http" in text and "org/ft\n" not in text


@pytest.mark.parametrize(("name", "value"), [("measurements", None), ("results", "none"), ("remarks", 3)])
def test_a_broken_recipe_is_named(hub, folder, capsys, name, value):
    path = folder / "recipe.json"
    fields = json.loads(path.read_text())
    del fields[name]
    path.write_text(json.dumps(fields if value is None else {**fields, name: value}))
    assert main(["push", str(folder), "org/soup", "--hide-private"]) == 2
    assert f"{path} is not a complete recipe" in capsys.readouterr().err
    with pytest.raises(KeyError):
        hub.files("org/soup")
