"""A soup knows the files of its model: whatever reads it refuses others, and says what to do."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from shared.pushed import quick
from shared.soups import saved, soup
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_radin
from hf_radin.cli.main import main
from hf_radin.runtime.files import write_folder
from hf_radin.runtime.hub_commit import PushOptions
from hf_radin.soup import push
from hf_radin.soup.push import push_folder
from hf_radin.soup.report import SearchReport

__all__ = ["quick", "saved", "soup"]  # fixtures

MODEL = ("config.json", "model.safetensors", "preprocessor_config.json")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A saved soup, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "soup"))


def cut(path: Path) -> None:
    """What is left of a file after a disk was full."""
    path.write_bytes(path.read_bytes()[:1000])


def turn_bit(path: Path) -> None:
    """A file with another bit in its last number."""
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def empty(path: Path) -> None:
    """An object without a field."""
    path.write_text("{}")


def make_folder(path: Path) -> None:
    """A folder where there was a file."""
    path.unlink()
    path.mkdir()


SPOILT = [
    ("model.safetensors", cut),
    ("model.safetensors", turn_bit),
    ("model.safetensors", Path.unlink),
    ("model.safetensors", make_folder),
    ("config.json", empty),
    ("config.json", Path.unlink),
    ("preprocessor_config.json", empty),
    ("preprocessor_config.json", Path.unlink),
    ("processor_config.json", empty),
    ("generation_config.json", empty),
    ("model.safetensors.index.json", empty),
    ("adapter_config.json", empty),
    ("adapter_model.safetensors", empty),
]


@pytest.mark.parametrize(("name", "spoil"), SPOILT)
def test_other_files_than_were_saved_are_refused_by_all_readers(hub, folder, capsys, name, spoil):
    spoil(folder / name)
    with pytest.raises(
        ValueError, match=rf"{folder}/{name} (is gone|is not what was saved|makes another model)"
    ) as error:
        hf_radin.Soup.from_pretrained(folder)
    assert f"hf-radin average --recipe {folder}/recipe.json" in str(error.value)
    for command in (
        ["card", str(folder)],
        ["push", str(folder), "org/soup"],
        ["push", str(folder), "org/soup", "--dry-run"],
    ):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert name in line and line.startswith("hf-radin: ")
    assert not hub.logged("POST") and not hub.logged("PUT")  # nothing is made there, nothing is uploaded


def test_the_weights_of_another_model_are_refused_with_both_hashes(hub, folder, runs):
    shutil.copyfile(runs / "ft-0" / "model.safetensors", folder / "model.safetensors")
    other = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    recorded = json.loads((folder / "recipe.json").read_text())["files"]["model.safetensors"]
    with pytest.raises(ValueError, match=rf"SHA-256 {other[:12]}\.\.\., recipe\.json says {recorded[:12]}\.\.\."):
        push_folder(folder, "org/soup", PushOptions())


@pytest.mark.parametrize("how", ["saved", "cooked from files", "cooked from models", "averaged", "in shards", "again"])
def test_whatever_writes_a_soup_records_what_it_wrote(saved, soup, runs, tmp_path, how):
    output = tmp_path / "soup"
    cook = ["average", "--recipe", str(saved), "--output", str(output)]
    if how == "saved":
        soup.save_pretrained(output)
    elif how == "again":
        hf_radin.Soup.from_pretrained(saved).save_pretrained(output)
    elif how == "averaged":
        hf_radin.average(soup.ingredients, soup.recipe, output=output)
    else:
        options = {"cooked from models": ["--models", f"{runs}/ft-*"], "in shards": ["--max-shard-size", "60KB"]}
        assert main([*cook, *options.get(how, [])]) == 0
    files = SearchReport.read(output / "recipe.json").files
    shards = ("model.safetensors.index.json", *(path.name for path in output.glob("model-*-of-*.safetensors")))
    expected = (*shards, "config.json", "preprocessor_config.json") if how == "in shards" else MODEL
    assert files == {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in sorted(expected)}
    assert len(files) > 4 or how != "in shards"
    assert hf_radin.Soup.from_pretrained(output).recipe == soup.recipe


def test_a_card_is_the_users_to_edit(hub, folder):
    (folder / "README.md").write_text((folder / "README.md").read_text() + "mine\n")
    (folder / "notes.txt").write_text("mine")
    push_folder(folder, "org/soup", PushOptions())
    assert hf_radin.Soup.from_pretrained("org/soup").model and b"mine" in hub.files("org/soup")["README.md"]


def test_classes_that_were_renamed_on_purpose_are_accepted_and_weights_never(folder, capsys, runs):
    fields = json.loads((folder / "config.json").read_text())
    fields["id2label"]["0"] = "nought"
    (folder / "config.json").write_text(json.dumps(fields))
    assert main(["card", str(folder)]) == 2
    assert f"say so with `hf-radin card {folder} --accept-changes`" in capsys.readouterr().err
    assert main(["card", str(folder), "--accept-changes"]) == 0
    assert hf_radin.Soup.from_pretrained(folder).model.config.id2label[0] == "nought"
    assert main(["card", str(folder)]) == 0
    shutil.copyfile(runs / "ft-0" / "model.safetensors", folder / "model.safetensors")
    recipe = (folder / "recipe.json").read_bytes()
    assert main(["card", str(folder), "--accept-changes"]) == 2
    assert "model.safetensors is not what was saved" in capsys.readouterr().err
    assert (folder / "recipe.json").read_bytes() == recipe


def test_a_processor_that_transformers_saved_again_is_accepted(folder):
    processor = AutoImageProcessor.from_pretrained(folder)
    processor.image_mean = [0.4, 0.4, 0.4]
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is not what was saved"):
        hf_radin.Soup.from_pretrained(folder)
    assert main(["card", str(folder), "--accept-changes"]) == 0
    assert hf_radin.Soup.from_pretrained(folder).processor.image_mean == (0.4, 0.4, 0.4)


@pytest.mark.parametrize("version", [1, 2])
def test_a_soup_of_an_earlier_version_is_taken_as_it_is_and_that_is_said_once(folder, capsys, caplog, version):
    fields = json.loads((folder / "recipe.json").read_text())
    del fields["files"], fields["format_version"]
    (folder / "recipe.json").write_text(
        json.dumps({**fields, "format" if version == 1 else "format_version": version})
    )
    with caplog.at_level(logging.WARNING):
        assert hf_radin.Soup.from_pretrained(folder).model
    assert caplog.text.count("records no hashes of the model beside it") == 1
    caplog.clear()
    assert main(["card", str(folder)]) == 0
    assert caplog.text.count("records no hashes of the model beside it") == 1


def test_a_recipe_alone_records_no_files(saved, tmp_path, caplog):
    hf_radin.Soup.from_pretrained(saved).save_recipe(tmp_path / "recipe.json")
    assert not SearchReport.read(tmp_path / "recipe.json").files
    assert main(["card", str(tmp_path)]) == 0
    assert "hashes" not in caplog.text


@pytest.mark.parametrize("name", ["../other/config.json", "/etc/hostname", "", "..", "a/b"])
def test_a_recipe_that_names_files_elsewhere_is_refused(folder, name):
    fields = json.loads((folder / "recipe.json").read_text())
    fields["files"][name] = "0" * 64
    (folder / "recipe.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"recipe\.json is not a complete recipe: its 'files' name"):
        hf_radin.Soup.from_pretrained(folder)


def test_a_soup_that_was_changed_on_the_hub_or_in_the_cache_is_refused(hub, folder, runs):
    push_folder(folder, "org/soup", PushOptions())
    weights = Path(snapshot_download("org/soup")) / "model.safetensors"
    assert hf_radin.Soup.from_pretrained("org/soup").model
    turn_bit(weights)
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was saved .* to have it downloaded again"):
        hf_radin.Soup.from_pretrained("org/soup")
    pushed = hub.commits("org/soup")[0].sha
    weights.resolve().unlink()
    assert hf_radin.Soup.from_pretrained("org/soup").model
    hub.add_commit("org/soup", {"model.safetensors": (runs / "ft-0" / "model.safetensors").read_bytes()})
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was saved"):
        hf_radin.Soup.from_pretrained("org/soup")
    soup = hf_radin.Soup.from_pretrained("org/soup", revision=pushed)  # the commit that was pushed is what it was
    assert soup.model and AutoModelForImageClassification.from_pretrained("org/soup")


@pytest.mark.parametrize("reader", ["card", "push", "from_pretrained"])
def test_after_a_killed_overwrite_readers_too_find_the_old_soup(hub, saved, folder, reader):
    """Its files are put back, in place of advice for somebody who has edited them."""
    (folder / "notes.txt").write_text("mine")  # files are replaced one by one
    child = os.fork()
    if not child:
        replace, moved = Path.replace, []

        def stop(self, target):
            moved.append(self)
            return os._exit(9) if len(moved) == 4 else replace(self, target)

        Path.replace = stop
        write_folder(folder, lambda new: shutil.copytree(saved, new, dirs_exist_ok=True), overwrite=True)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (folder / "config.json").exists()
    if reader == "from_pretrained":
        assert hf_radin.Soup.from_pretrained(folder).model
    else:
        assert main([reader, str(folder), *(["org/soup"] if reader == "push" else [])]) == 0
    assert {path.name for path in folder.iterdir()} == {"notes.txt", *(path.name for path in saved.iterdir())}


def test_a_soup_that_is_overwritten_while_it_is_pushed_is_not_pushed_in_silence(hub, folder, runs, monkeypatch):
    """Between the look at its files and their upload, the Hub may be asked for minutes."""

    def overwrite(*arguments):
        shutil.copyfile(runs / "ft-0" / "model.safetensors", folder / "model.safetensors")
        return []

    monkeypatch.setattr(push, "private_names", overwrite)
    with pytest.raises(ValueError, match=r"was pushed, but is not .*model\.safetensors is not what was saved"):
        push_folder(folder, "org/soup", PushOptions())
