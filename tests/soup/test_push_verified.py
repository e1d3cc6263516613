"""What was pushed is loaded once from what the Hub has, and predicts what it predicted here."""

import json
import re
import shutil

import pytest
from loopback_hub.store import make_blobs
from loopback_hub.wire import Fault
from safetensors.torch import load_file, save_file
from shared.models import watched
from shared.pushed import folder, quick

import hf_radin
from hf_radin.cli.main import main
from hf_radin.runtime.hub_commit import PushOptions
from hf_radin.soup.push import push_folder

__all__ = ["folder", "quick"]  # fixtures


def adding(hub, files):
    """A Hub that puts more files into each commit than it was sent."""
    answer = hub.answer

    def add(call):
        reply = answer(call)
        if "/commit/" in call.path:
            hub.repos["model", "org/soup"].resolve("main").files.update(make_blobs(files))
        return reply

    return add


def other_processor(folder) -> bytes:
    """A configuration of an image processor that makes other pixels."""
    fields = json.loads((folder / "preprocessor_config.json").read_text())
    return json.dumps({"image_processor": {**fields, "image_mean": [0.1, 0.2, 0.3]}}).encode()


def test_the_model_here_and_that_of_the_hub_predict_three_images(hub, folder):
    calls = []
    with watched(calls.append):
        push_folder(folder, "org/soup", PushOptions())
    assert calls == [1] * 6
    weights = [request.path for request in hub.logged("GET", "/resolve/") if request.path.endswith(".safetensors")]
    assert len(weights) == 1  # what was read back is what is loaded
    with watched(calls.append):
        push_folder(folder, "org/soup", PushOptions(verify=False))
    assert len(calls) == 6


@pytest.mark.parametrize("way", ["folder", "command", "soup", "soup command"])
def test_another_image_processor_on_the_hub_is_told_with_the_commit(
    hub, folder, bank, runs, digits, cache, tmp_path, capsys, way
):
    hub.answer = adding(hub, {"processor_config.json": other_processor(folder)})
    options = [
        "--models",
        f"{runs}/ft-[01]",
        "--dataset",
        str(digits),
        "--cache-dir",
        str(cache),
        "--method",
        "uniform",
    ]
    commands = {
        "command": ["push", str(folder), "org/soup"],
        "soup command": ["soup", *options, "--output", str(tmp_path / "out"), "--push-to", "org/soup"],
    }
    if way in commands:
        assert main(commands[way]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert main([*commands[way], "--no-verify", "--overwrite"]) == 0
    else:
        with pytest.raises(ValueError, match="was pushed, but is not the model of") as caught:
            push_folder(folder, "org/soup", PushOptions()) if way == "folder" else hf_radin.uniform(bank).push_to_hub(
                "org/soup"
            )
        error = str(caught.value)
    commits = [commit.sha for commit in hub.commits("org/soup")]
    named = re.search(r"org/soup at commit (\w{40}) was pushed, but is not the model of .*the largest logit of", error)
    assert named and named[1] in commits and "\n" not in error


def test_what_transformers_can_not_load_is_not_pushed(hub, folder):
    """Its recipe records no hashes, as those of earlier versions, and its weights fit no such model."""
    fields = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps({**fields, "files": {}}))
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"num_hidden_layers": 3}, "transformers reports missing_keys for"),
        ({"intermediate_size": 60}, "transformers reports mismatched_keys for"),
        ({"model_type": "none"}, "can't be loaded by transformers"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message) as error:
            push_folder(folder, "org/soup", PushOptions())
        assert len(str(error.value).splitlines()) == 1
        assert not hub.logged("POST")


@pytest.mark.parametrize(("method", "part"), [("GET", "/resolve/"), ("HEAD", "/resolve/"), ("GET", "/tree/")])
def test_a_commit_that_is_not_there_at_once_is_waited_for_and_named(hub, folder, method, part):
    hub.faults.append(Fault(method, part, status=404, times=2))
    push_folder(folder, "org/soup", PushOptions())
    hub.faults.append(Fault(method, part, status=404, times=99))
    with pytest.raises(ValueError, match=r"org/other.* commit \w{40}"):
        push_folder(folder, "org/other", PushOptions())
    assert len(hub.commits("org/other")) == 2


def test_a_model_with_code_of_its_own_is_not_run(hub, folder, tmp_path):
    fields = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps({**fields, "files": {}}))
    config = json.loads((folder / "config.json").read_text())
    code = {"auto_map": {"AutoModelForImageClassification": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps({**config, **code}))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    push_folder(folder, "org/soup", PushOptions())
    assert "mine.py" in hub.files("org/soup") and not (tmp_path / "run").exists()


def test_a_soup_of_an_earlier_version_is_compared_too(hub, folder):
    """It records no hashes of its files."""
    fields = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps({**fields, "files": {}}))
    push_folder(folder, "org/first", PushOptions())
    hub.answer = adding(hub, {"processor_config.json": other_processor(folder)})
    with pytest.raises(ValueError, match="was pushed, but is not the model of"):
        push_folder(folder, "org/soup", PushOptions())


def test_a_model_that_takes_images_of_one_size_is_loaded_and_said_not_to_be_run(hub, start, tmp_path, caplog):
    for name in ("ft-0", "ft-1"):
        shutil.copytree(start, tmp_path / name)
        path = tmp_path / name / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "do_resize": False}))
    tensors = load_file(tmp_path / "ft-1" / "model.safetensors")
    tensors["classifier.bias"] += 1
    save_file(tensors, tmp_path / "ft-1" / "model.safetensors", {"format": "pt"})
    ingredients = hf_radin.gather(f"{tmp_path}/ft-*")
    hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids), output=tmp_path / "soup")
    push_folder(tmp_path / "soup", "org/first", PushOptions())
    assert "takes no made-up images, and is only loaded: " in caplog.text
    fields = json.loads((tmp_path / "soup" / "preprocessor_config.json").read_text())
    resized = json.dumps(
        {"image_processor": {**fields, "do_resize": True, "size": {"height": 8, "width": 8}}}
    ).encode()
    hub.answer = adding(hub, {"processor_config.json": resized})
    with pytest.raises(ValueError, match=r"it takes 3 of three images where it was 0\."):
        push_folder(tmp_path / "soup", "org/soup", PushOptions())
