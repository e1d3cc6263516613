"""Names of what is private are told before they are public, or left out."""

import json

import pytest
from huggingface_hub import ModelCard, snapshot_download
from shared.pushed import contents, folder, held, quick

import hf_radin
from hf_radin.cli.main import main
from hf_radin.runtime.hub_commit import PushOptions
from hf_radin.soup import card, push, redact

__all__ = ["folder", "quick"]  # fixtures


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


def test_private_names_are_told_before_anything_is_computed(hub, secret, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_radin.compute_logits", lambda *_, **__: (_ for _ in ()).throw(ValueError("begun")))
    command = ["soup", "--models", "org/ft-*", "--dataset", "org/digits", "--push-to", "org/soup"]
    for options, told in (([], True), (["--hide-private"], False), (["--private"], False)):
        caplog.clear()
        assert main([*command, *options]) == 2
        assert ("name what is private, and everybody can read them: org/digits, org/ft-1" in caplog.text) is told


def test_no_path_of_the_machine_is_pushed(hub, bank, runs, tmp_path):
    hf_radin.uniform(bank).save_pretrained(tmp_path / "soup")
    push.push_folder(tmp_path / "soup", "org/soup", PushOptions())
    pushed = hub.files("org/soup")
    assert not any(str(runs.parent).encode() in data for data in pushed.values())
    ids = [one["id"] for one in json.loads(pushed["recipe.json"])["ingredients"]]
    assert ids == [f"{runs.name}/ft-{number}" for number in range(5)]
    assert str(runs) in (tmp_path / "soup" / "recipe.json").read_text()  # where they are found again
    again = hf_radin.Soup.from_pretrained("org/soup")
    assert list(again.recipe.used) == ids
    command = [
        "average",
        "--recipe",
        snapshot_download("org/soup") + "/recipe.json",
        "--output",
        str(tmp_path / "made"),
    ]
    assert main([*command, "--models", f"{runs}/ft-*"]) == 0
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
    fields = {"ingredients": [{"id": name} for name in names], "data": {"name": "/home/me/data"}}
    fields |= {"classes": ["/m/0abc"], "remarks": [["/home/me/other", "is a copy of /home/me/b/runs/ft-10."]]}
    found = redact.without_paths(fields)
    ids = [one["id"] for one in found["ingredients"]]
    assert ids == ["a/runs/ft-1", "b/runs/ft-1", "runs/ft-10", "x", "org/ft", "runs/ft-1", "org/x"]
    assert found["data"]["name"] == "me/data" and found["classes"] == ["/m/0abc"]
    assert found["remarks"] == [["me/other", "is a copy of runs/ft-10."]]


def test_of_what_a_card_was_made_of_no_path_is_left_and_none_becomes_an_id():
    one = {"id": "/home/me/runs/ft-1", "base_model": "/home/me/start", "dataset": "/home/me/pets", "repo_id": None}
    one["hyperparameters"] = {"output_dir": "/home/me/runs/out", "seed": "1"}
    fields = {
        "ingredients": [one],
        "data": {"name": "org/pets", "revision": "r"},
        "image_processor": "/home/me/proc@1",
    }
    found = redact.without_paths(fields)
    assert "/home" not in json.dumps(found)
    assert found["ingredients"][0]["base_model"] is None and found["ingredients"][0]["dataset"] is None
    assert (
        found["image_processor"] == "proc@1" and found["ingredients"][0]["hyperparameters"]["output_dir"] == "runs/out"
    )
    assert fields["ingredients"][0]["base_model"] == "/home/me/start"


@pytest.mark.parametrize(
    "names", [["/a/b/org/ft", "org/ft"], ["/org/ft", "org/ft"], ["/x/org/ft", "/y/org/ft", "x/org/ft"]]
)
def test_a_shortened_path_is_no_other_name(names):
    fields = {"ingredients": [{"id": name} for name in names], "data": {"name": "org/data"}}
    ids = [one["id"] for one in redact.without_paths(fields)["ingredients"]]
    assert len({*ids}) == len(names) and ids[-1] == names[-1] and not any(one.startswith("/") for one in ids)


def test_a_folder_is_no_private_repository(hub, bank, runs, tmp_path, caplog):
    soup = hf_radin.uniform(bank)
    soup.save_pretrained(tmp_path / "soup")
    path = tmp_path / "soup" / "recipe.json"
    fields = json.loads(path.read_text())
    for one in fields["ingredients"]:
        one |= {"base_model": str(runs / "start"), "dataset": str(runs / "digits")}
    fields["image_processor"] = f"{runs}/processor@sha"
    path.write_text(json.dumps(fields))
    push.push_folder(tmp_path / "soup", "org/soup", PushOptions(), hide_private=True)
    assert "private" not in caplog.text and b"private-" not in hub.files("org/soup")["recipe.json"]
    assert not [one for one in hub.logged("GET", "/api/") if "org/soup" not in one.path]


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
    assert [one["repo_id"] for one in fields["ingredients"]] == ["org/ft-0", None, "org/ft-2"]
    assert hub.commits("org/ft-1")[0].sha.encode() not in pushed["recipe.json"]
    assert b"private-" in pushed["README.md"] and b"license: mit" in pushed["README.md"]
    again = hf_radin.Soup.from_pretrained("org/soup")
    assert again.recipe.weights == secret.recipe.weights and len(again.measurements) == len(secret.measurements)
    secret.save_pretrained(tmp_path / "soup")
    assert main(["push", str(tmp_path / "soup"), "org/other", "--hide-private"]) == 0
    assert held(hub, "org/other")["recipe.json"] == pushed["recipe.json"]


FIELDS = {
    "recipe": {"ingredients": ["org/ft", "org/ft-public", "private-1"], "weights": [0.5, 0.25, 0.25]},
    "ingredients": [
        {"id": "org/ft", "repo_id": "org/ft", "revision": "abc", "subfolder": "", "base_model": "org/secret"},
        {"id": "org/ft-public", "repo_id": "org/ft-public", "revision": "def", "dataset": "org/images"},
        {"id": "private-1", "repo_id": None, "revision": "ghi"},
    ],
    "data": {"name": "org/open", "revision": "r"},
    "bank": "org/logits@sha",
    "remarks": [["org/ft@abc:inner", "is a stranger"]],
    "image_processor": "org/processor@main",
}


def test_every_repository_that_a_recipe_names_is_asked_for(hub):
    hub.add_repo("org/ft-public", {"a": b""})
    hub.add_repo("org/ft", {"a": b""}, "dataset")  # a public dataset of that name is no public model
    hub.add_repo("org/open", {"a": b""}, "dataset")
    names = redact.private_names(FIELDS)
    assert sorted(names) == ["org/ft", "org/images", "org/logits", "org/processor", "org/secret"]
    hidden = json.dumps(redact.without(FIELDS, names))
    assert not any(f'"{name}{end}' in hidden for name in names for end in '"@:') and "inner" not in hidden
    assert "abc" not in hidden
    found = json.loads(hidden)
    assert found["ingredients"][1]["repo_id"] == "org/ft-public" and found["data"]["name"] == "org/open"
    ids = [one["id"] for one in found["ingredients"]]
    assert len({*ids}) == 3 and ids[1:] == ["org/ft-public", "private-1"] and found["recipe"]["ingredients"] == ids


def test_a_private_name_in_another_file_is_refused(hub, secret, tmp_path):
    secret.save_pretrained(tmp_path / "soup")
    config = json.loads((tmp_path / "soup" / "config.json").read_text())
    (tmp_path / "soup" / "config.json").write_text(json.dumps({**config, "note": "made of org/ft-1"}))
    with pytest.raises(ValueError, match=r"config\.json names org/ft-1, which is private: take it out by hand"):
        push.push_folder(tmp_path / "soup", "org/soup", PushOptions(), hide_private=True)


def test_a_private_name_is_found_in_addresses_paths_and_large_letters(hub, secret, tmp_path, monkeypatch):
    fields = secret.to_dict()
    fields["ingredients"][0]["hyperparameters"] = {
        "start": "https://huggingface.co/org/ft-1/tree/main",
        "resumed": "org/ft-1/checkpoint-5",
        "note": "ORG/Ft-1",
        "other": "org/ft-10 myorg/ft-1",
    }
    (tmp_path / "org" / "ft-1").mkdir(parents=True)  # a copy of it lies here, too
    monkeypatch.chdir(tmp_path)
    names = redact.private_names(fields)
    assert names == ["org/digits", "org/ft-1"]
    told = redact.without(fields, names)["ingredients"][0]["hyperparameters"]
    assert told == {
        "start": "https://huggingface.co/private-2",
        "resumed": "private-2",
        "note": "private-2",
        "other": "org/ft-10 myorg/ft-1",
    }
    secret.save_pretrained(tmp_path / "soup")
    readme = tmp_path / "soup" / "README.md"
    readme.write_text(readme.read_text().replace(card.MARKS[0], f"{card.MARKS[0]}\nsee https://hf.co/org/ft-1"))
    with pytest.raises(ValueError, match=r"README\.md names org/ft-1, which is private: take it out by hand"):
        push.push_folder(tmp_path / "soup", "org/soup", PushOptions(), hide_private=True)


def test_a_public_name_that_begins_as_a_private_one_may_stay(hub, runs, digits, tmp_path):
    for name, private_one in (("org/ft", True), ("org/ft-public", False), ("org/ft.2", False)):
        hub.add_repo(name, contents(runs / f"ft-{len(name) % 3}"), private=private_one)
    found = hf_radin.gather(["org/ft", "org/ft-public", "org/ft.2"])
    soup = hf_radin.uniform(hf_radin.compute_logits(found, digits, cache_dir=tmp_path / "cache"))
    soup.push_to_hub("org/soup", hide_private=True)
    text = held(hub, "org/soup")["README.md"].decode()
    assert "[org/ft-public](https" in text and "[org/ft.2](https" in text and "org/ft\n" not in text


def test_a_broken_recipe_is_named(hub, secret, tmp_path, capsys):
    secret.save_pretrained(tmp_path / "soup")
    fields = json.loads((tmp_path / "soup" / "recipe.json").read_text())
    for name, value in (("measurements", None), ("results", "none"), ("remarks", 3)):
        broken = {**fields, name: value} if value is not None else {k: v for k, v in fields.items() if k != name}
        (tmp_path / "soup" / "recipe.json").write_text(json.dumps(broken))
        assert main(["push", str(tmp_path / "soup"), "org/soup", "--hide-private"]) == 2
        assert "recipe.json" in capsys.readouterr().err
