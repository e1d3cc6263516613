"""Checkpoints on the Hub are vetted from their first bytes, many at a time, and as users name them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load as read
from safetensors.torch import load_file, save
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import hf_radin
from hf_radin import Recipe
from hf_radin.cli.main import main
from hf_radin.soup.cook import find_ingredients

LIMIT = 110_000  # bytes a checkpoint


def files(folder: Path, inside: str = "") -> dict[str, bytes]:
    return {f"{inside}{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> list[dict[str, bytes]]:
    """Four checkpoints of 3 MB: random weights, which nothing here runs; the last in shards."""
    checkpoints = []
    for seed in range(4):
        torch.manual_seed(seed)
        config = ViTConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=512)
        folder = tmp_path_factory.mktemp("large")
        model = ViTForImageClassification(config)
        model.save_pretrained(folder, **({"max_shard_size": "1MB"} if seed == 3 else {}))
        ViTImageProcessor().save_pretrained(folder)
        checkpoints.append(files(folder))
    return checkpoints


def served(hub, name: str) -> int:
    return sum(
        request.served for request in hub.requests if f"/{name}/" in request.path or request.path.endswith(name)
    )


def assert_no_weights_were_served(hub) -> None:
    """Of files of weights parts were asked for, and none of them whole."""
    statuses = [request.status for request in hub.logged("GET", ".safetensors")]
    assert 206 in statuses and 200 not in statuses


def test_a_checkpoint_costs_its_first_bytes(hub, large):
    for number, content in enumerate(large[:3]):
        hub.add_repo(f"org/ft-{number}", {**content, "README.md": b"---\nlicense: mit\n---\n# ft\n"})
    ingredients = hf_radin.gather("org/ft-*")
    assert len(ingredients) == 3 and sum(map(len, large[0].values())) > 20 * LIMIT
    for ingredient in ingredients:
        assert 0 < served(hub, ingredient.id) <= LIMIT
    before = len(hub.requests)
    weights = [ingredient.folder / "model.safetensors" for ingredient in ingredients]
    assert not any(path.exists() for path in weights)
    ingredients[0].download()
    assert hub.requests[before:] and weights[0].exists()


def test_shards_are_vetted_by_their_headers(hub, large):
    hub.add_repo("org/ft-0", large[0])
    hub.add_repo("org/ft-1", large[3])
    assert len([name for name in large[3] if name.endswith(".safetensors")]) > 1
    ingredients = hf_radin.gather("org/ft-*")
    statuses = [request.status for request in hub.logged("GET", ".safetensors") if "index" not in request.path]
    assert statuses and set(statuses) == {206}
    soup = hf_radin.average(ingredients, Recipe(ingredients.ids, (0.0, 1.0)))
    parts = [part for name, part in large[3].items() if name.endswith(".safetensors")]
    expected = {name: tensor for part in parts for name, tensor in read(part).items()}
    assert torch.equal(soup["classifier.weight"], expected["classifier.weight"])
    lost = dict(large[3])
    del lost[next(name for name in lost if name.startswith("model-00002"))]
    hub.add_repo("org/ft-2", lost)
    with pytest.raises(ValueError, match=r"org/ft-2: model.safetensors.index.json names 'model-00002.*not there"):
        hf_radin.gather("org/ft-*")


def spoilt(content: dict[str, bytes], **changes) -> dict[str, bytes]:
    """With tensors changed, or (as None) removed."""
    tensors = read(content["model.safetensors"])
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return {**content, "model.safetensors": save(tensors, {"format": "pt"})}


BAD = {
    "no head": (lambda content: spoilt(content, classifier__weight=None), "no weights for classifier.weight"),
    "a shape off by one": (
        lambda content: spoilt(content, classifier__weight=torch.zeros(2, 129)),
        r"no weights for classifier.weight \(it has \(2, 129\) for \(2, 128\)\)",
    ),
    "truncated": (
        lambda content: {**content, "model.safetensors": content["model.safetensors"][: 1 << 20]},
        r"model.safetensors is not a whole file of weights \(its tensors take \d+ bytes, and it has \d+\)",
    ),
    "no safetensors": (
        lambda content: {**content, "model.safetensors": b"x" * 1000},
        "is not a whole file of weights",
    ),
    "nothing in it": (lambda content: {**content, "model.safetensors": b""}, "is not a whole file of weights"),
    "header of no bytes": (
        lambda content: {**content, "model.safetensors": bytes(8) + b"weights"},
        "is not a whole file of weights",
    ),
    "header cut off": (
        lambda content: {**content, "model.safetensors": (50_000).to_bytes(8, "little") + b'{"a": 1'},
        "is not a whole file of weights",
    ),
}


def headed(content: dict[str, bytes], text: str, data: bytes = b"") -> dict[str, bytes]:
    """With a file of weights that begins like this."""
    header = text.encode()
    return {**content, "model.safetensors": len(header).to_bytes(8, "little") + header + data}


def tensor(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0, 8]") -> str:
    return f'"a": {{"dtype": {dtype}, "shape": {shape}, "data_offsets": {offsets}}}'


HEADERS = {
    "negative shape": "{" + tensor(shape="[-2]") + "}",
    "enormous shape": "{" + tensor(shape=f"[{2**62}, 8]") + "}",
    "more than any number": "{" + tensor(shape=f"[{10**30}]") + "}",
    "infinite shape": "{" + tensor(shape="[Infinity]") + "}",
    "shape of truths": "{" + tensor(shape="[true, true]") + "}",
    "offsets of text": "{" + tensor(offsets='["0", "8"]') + "}",
    "negative offsets": "{" + tensor(offsets="[-8, 0]") + "}",
    "a hole before it": "{" + tensor(offsets="[4, 12]") + "}",
    "shape that does not fit": "{" + tensor(shape="[3]") + "}",
    "dtype of nobody": "{" + tensor(dtype='"ZZ"') + "}",
    "dtype of nothing": "{" + tensor(dtype="null") + "}",
    "a name that stands twice": "{" + tensor() + ", " + tensor(offsets="[8, 16]") + "}",
    "no object": "[]",
    "no bottom": "[" * 100_000,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_is_held_to_its_file_and_costs_nobody_else_a_verdict(hub, large, kind):
    hub.add_repo("org/ft-0", large[0])
    hub.add_repo("org/ft-1", headed(large[1], HEADERS[kind], bytes(8)))
    good, bad = hf_radin.inspect("org/ft-*")
    assert good.ingredient and "org/ft-1: model.safetensors is not a whole file of weights" in bad.problem
    assert "\n" not in bad.problem


def test_a_header_beyond_its_file_is_not_read(hub, large):
    hub.add_repo("org/ft-0", {**large[0], "model.safetensors": (1 << 40).to_bytes(8, "little") + bytes(1000)})
    (verdict,) = hf_radin.inspect("org/ft-0")
    assert "is not a whole file of weights" in verdict.problem
    assert sum(request.served for request in hub.logged("GET", ".safetensors")) == 8


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_seen_before_the_weights_are_there(hub, large, kind):
    spoil, message = BAD[kind]
    hub.add_repo("org/ft-0", large[0])
    hub.add_repo("org/ft-1", spoil(large[1]))
    with pytest.raises(ValueError, match=f"org/ft-1: .*{message}"):
        hf_radin.gather("org/ft-*")
    assert_no_weights_were_served(hub)


def test_copies_are_known_by_their_hashes(hub, large, caplog):
    for name in ("ft-0", "ft-copy"):
        hub.add_repo(f"org/{name}", {**large[0], "README.md": name.encode()})
    hub.add_repo("org/ft-1", large[1])
    assert hf_radin.gather("org/ft-*").ids == ("org/ft-0", "org/ft-1")
    assert "org/ft-copy is the same checkpoint as org/ft-0: kept once." in caplog.text


def test_a_copy_on_disk_and_one_on_the_hub_are_the_same(hub, large, tmp_path):
    hub.add_repo("org/ft-0", large[0])
    for name, content in large[0].items():
        (tmp_path / name).write_bytes(content)
    first, second = hf_radin.inspect([tmp_path, "org/ft-0"])
    assert first.ingredient and not second.ingredient and "is the same checkpoint as" in second.notes[0]


def test_subfolders(hub, runs, digits, tmp_path):
    content = files(runs / "ft-0", "checkpoint-1/") | files(runs / "ft-1", "checkpoint-2/")
    hub.add_repo("org/run", {**content, "README.md": b"---\nlicense: mit\n---\n"})
    named = hf_radin.gather(["org/run:checkpoint-1", "org/run@main:checkpoint-2"])
    assert named.ids == ("org/run:checkpoint-1", "org/run@main:checkpoint-2")
    ingredients = hf_radin.gather("org/run:checkpoint-*")
    assert ingredients.ids == ("org/run:checkpoint-1", "org/run:checkpoint-2") and ingredients.keys == named.keys
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")
    local = hf_radin.compute_logits(
        hf_radin.gather([runs / "ft-0", runs / "ft-1"]), digits, cache_dir=tmp_path / "cache"
    )
    assert np.array_equal(bank.logits(1), local.logits(1)) and not np.array_equal(bank.logits(0), local.logits(1))
    soup = hf_radin.uniform(bank)
    soup.save_pretrained(tmp_path / "soup")
    assert soup.report.ingredients[1].license == "mit"
    cooked = hf_radin.average(*find_ingredients(tmp_path / "soup"))
    assert all(torch.equal(cooked[name], tensor) for name, tensor in soup.model.state_dict().items())
    with pytest.raises(ValueError, match=r"org/run: no config.json.* name one as org/run:checkpoint-1"):
        hf_radin.gather(["org/run", "org/run:checkpoint-1"])
    with pytest.raises(ValueError, match=r"no folder of org/run with a checkpoint matches 'best-.'"):
        hf_radin.gather("org/run:best-*")


def test_a_repository_with_a_model_at_its_top_and_folders_with_brackets(hub, runs):
    content = files(runs / "ft-0") | files(runs / "ft-1", "checkpoint[1]/") | files(runs / "ft-2", "checkpoint-2/")
    hub.add_repo("org/run", content)
    assert hf_radin.gather("org/run:*").ids == ("org/run:checkpoint-2", "org/run:checkpoint[1]")
    ingredients = hf_radin.gather(["org/run", "org/run:checkpoint[1]"])
    soup = hf_radin.average(ingredients, Recipe(ingredients.ids, (0.0, 1.0)))
    expected = load_file(runs / "ft-1" / "model.safetensors")["classifier.weight"]
    assert torch.equal(soup["classifier.weight"], expected)


def test_collections(hub, runs):
    for number in range(3):
        hub.add_repo(f"org/ft-{number}", files(runs / f"ft-{number}"))
    hub.add_repo("org/data", {"README.md": b"# data"}, "dataset")
    slug = "org/fine-tunes-0123456789abcdef01234567"
    hub.add_collection(slug, [("model", "org/ft-0"), ("dataset", "org/data"), ("model", "org/ft-2")])
    for name in (f"https://huggingface.co/collections/{slug}", f"collections/{slug}", f"{hub.url}/collections/{slug}"):
        assert hf_radin.gather(name).ids == ("org/ft-0", "org/ft-2")
    with pytest.raises(ValueError, match="There is no collection 'collections/org/none-0"):
        hf_radin.gather("collections/org/none-0123456789abcdef01234567")


def test_adapters_and_their_base_on_the_hub(hub, start, runs, tmp_path, digits):
    from peft import LoraConfig, get_peft_model

    hub.add_repo("org/base", files(start))
    for seed in range(2):
        torch.manual_seed(seed)
        model = ViTForImageClassification.from_pretrained("org/base")
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"], revision="main")
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / f"{seed}")
        hub.add_repo(
            f"org/ft-{seed}",
            files(tmp_path / f"{seed}") | {"preprocessor_config.json": files(start)["preprocessor_config.json"]},
        )
    sha = hub.commits("org/base")[0].sha
    config = json.loads((tmp_path / "1" / "adapter_config.json").read_text())
    other = hub.add_commit("org/base", {"model.safetensors": (runs / "ft-2" / "model.safetensors").read_bytes()})
    moved = {**files(tmp_path / "1"), "adapter_config.json": json.dumps({**config, "revision": sha}).encode()}
    hub.add_repo("org/moved", moved | {"preprocessor_config.json": files(start)["preprocessor_config.json"]})
    with pytest.raises(
        ValueError, match=rf"in base model: 'org/base at {sha[:19]}' against 'org/base at {other[:19]}'"
    ):
        hf_radin.gather(["org/ft-0", "org/moved"])
    sha = other
    ingredients = hf_radin.gather("org/ft-*")
    assert [ingredient.base.revision for ingredient in ingredients] == [sha, sha]
    soup = hf_radin.uniform(hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache"))
    soup.save_pretrained(tmp_path / "soup")
    # the base moves on; the recipe's base does not
    hub.add_commit("org/base", {"model.safetensors": (runs / "ft-1" / "model.safetensors").read_bytes()})
    cooked = hf_radin.average(*find_ingredients(tmp_path / "soup"))
    assert all(torch.equal(cooked[name], tensor) for name, tensor in soup.model.state_dict().items())


def test_an_image_processor_of_the_hub(hub, runs):
    for number in range(2):
        content = files(runs / f"ft-{number}")
        del content["preprocessor_config.json"]
        hub.add_repo(f"org/ft-{number}", content)
    hub.add_repo("org/start", files(runs / "ft-0"))
    with pytest.raises(ValueError, match=r"org/ft-0.*no usable image processor.*--image-processor ID"):
        hf_radin.gather("org/ft-*")
    ingredients = hf_radin.gather("org/ft-*", image_processor="org/start")
    assert ingredients[0].image_processor == f"org/start@{hub.commits('org/start')[0].sha}"
    assert ingredients[0].processor.size == {"height": 8, "width": 8}
    with pytest.raises(ValueError, match="The image processor org/none"):
        hf_radin.gather("org/ft-*", image_processor="org/none")


def test_pickles_that_do_not_fit_are_named_when_they_are_loaded(hub, runs, tmp_path, caplog):
    for number in range(2):
        tensors = load_file(runs / f"ft-{number}" / "model.safetensors")
        tensors["classifier.bias"] = torch.zeros(10 - number)
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        content = files(runs / f"ft-{number}") | {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
        del content["model.safetensors"]
        hub.add_repo(f"org/ft-{number}", content)
    ingredients = hf_radin.gather("org/ft-*", allow_pickle=True)
    assert "org/ft-0: its weights are pickled; whether they fit is known when they are loaded." in caplog.text
    assert "The same holds for org/ft-1." in caplog.text
    with pytest.raises(ValueError, match=r"classifier\.bias has the shape .* in org/ft-[01] and .* in org/ft-[01]"):
        hf_radin.average(ingredients, Recipe.uniform(ingredients.ids))


def test_inspect_prints_a_verdict_for_each_and_fails_if_one_is_bad(hub, large, capsys, tmp_path):
    for number in range(2):
        hub.add_repo(f"org/ft-{number}", large[number])
    hub.add_repo("org/ft-copy", {**large[0], "README.md": b"copy"})
    assert main(["inspect", "--models", "org/ft-*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["checkpoint", "architecture", "classes", "parameters", "dtype", "size", "verdict"]
    numbers = sum(tensor.numel() for tensor in read(large[0]["model.safetensors"]).values())  # it has no buffers
    assert lines[1].split()[:5] == ["org/ft-0", "ViTForImageClassification", "2", f"{numbers:,}", "F32"]
    assert lines[3].endswith("copy") and "a soup can be made of these 2 ingredients" in lines[-1]
    hub.add_repo("org/ft-gated", large[2], gated=True)
    hub.add_repo("org/ft-none", {"README.md": b"# none"})
    assert main(["inspect", "--models", "org/ft-*"]) == 2
    printed = capsys.readouterr()
    assert "- org/ft-gated is gated: ask for access" in printed.out and "- org/ft-none: no config.json" in printed.out
    assert "No soup can be made of these: 2 of 5 must be mended or left out" in printed.err
    assert main(["inspect", "--models", "org/ft-0", "org/ft-copy"]) == 2
    assert "at least two different checkpoints; here is 1" in capsys.readouterr().err
    assert_no_weights_were_served(hub)


def test_a_token_is_used_and_not_kept(hub, large, monkeypatch):
    for number in range(2):
        hub.add_repo(f"org/ft-{number}", large[number], private=True)
    token = HfApi().token or hub.token
    monkeypatch.setenv("HF_TOKEN", "")
    ingredients = hf_radin.gather(["org/ft-0", "org/ft-1"], token=token)
    assert len(ingredients) == 2 and token not in repr(ingredients) and token not in json.dumps(ingredients.keys)


def test_shards_of_any_name_are_downloaded_as_they_are_vetted(hub, large):
    """What is downloaded is what an index names, not what such files are usually called."""
    hub.add_repo("org/ft-0", large[0])
    renamed = {
        name.replace("model-", "part-"): content.replace(b'"model-', b'"part-') if name.endswith(".json") else content
        for name, content in large[3].items()
    }
    hub.add_repo("org/ft-1", renamed)
    gathered = hf_radin.gather("org/ft-*")
    soup = hf_radin.average(gathered, Recipe(gathered.ids, (0.0, 1.0)))
    assert len(soup) > 10 and gathered[1].is_here


def test_weights_that_were_redirected_are_refused_before_a_header_is_read(hub, large):
    config = json.loads(large[0]["config.json"])
    redirected = json.dumps({**config, "transformers_weights": "other.safetensors"}).encode()
    hub.add_repo("org/ft-0", large[0])
    hub.add_repo("org/ft-1", {**large[1], "config.json": redirected, "other.safetensors": b"none"})
    with pytest.raises(ValueError, match=r"org/ft-1: config.json names 'other.safetensors' as its weights"):
        hf_radin.gather("org/ft-*")
    paths = [request.path for request in hub.logged("GET", ".safetensors")]
    assert any("/ft-0/" in path for path in paths) and not any("/ft-1/" in path for path in paths)


def test_a_pickle_that_is_here_does_not_stand_for_the_safetensors_that_are_not(hub, runs, tmp_path):
    """Vetted, named and hashed were the safetensors: the pickle beside them may hold something else."""
    torch.save(load_file(runs / "ft-4" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    for number in range(2):
        pickled = {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
        hub.add_repo(f"org/ft-{number}", files(runs / f"ft-{number}") | pickled)
    gathered = hf_radin.gather("org/ft-*", allow_pickle=True)
    snapshot_download("org/ft-0", allow_patterns=["pytorch_model.bin"])  # as another tool may have done
    assert (gathered[0].folder / "pytorch_model.bin").is_file()
    soup = hf_radin.average(gathered, Recipe(gathered.ids, (1.0, 0.0)))
    expected = ViTForImageClassification.from_pretrained(runs / "ft-0").state_dict()
    assert all(torch.equal(soup[name], tensor) for name, tensor in expected.items())


def test_wrapped_names_on_the_hub_are_read_without(hub, runs, caplog):
    content = [files(runs / f"ft-{number}") for number in range(2)]
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in read(content[1]["model.safetensors"]).items()}
    hub.add_repo("org/ft-0", content[0])
    hub.add_repo("org/ft-1", {**content[1], "model.safetensors": save(wrapped, {"format": "pt"})})
    gathered = hf_radin.gather("org/ft-*")
    assert "org/ft-1: it was saved as torch.compile or DistributedDataParallel wrapped it" in caplog.text
    soup = hf_radin.average(gathered, Recipe(gathered.ids, (0.0, 1.0)))
    expected = ViTForImageClassification.from_pretrained(runs / "ft-1").state_dict()
    assert all(torch.equal(soup[name], tensor) for name, tensor in expected.items())


def test_an_adapter_on_the_hub_may_name_layers_as_they_were(hub, start, tmp_path):
    from peft import LoraConfig, get_peft_model

    hub.add_repo("org/base", files(start))
    model = ViTForImageClassification.from_pretrained("org/base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        tmp_path
    )
    now = {**files(tmp_path), "preprocessor_config.json": files(start)["preprocessor_config.json"]}
    tensors = {
        name.replace("vit.layers", "vit.encoder.layer").replace("q_proj", "attention.query"): tensor
        for name, tensor in read(now["adapter_model.safetensors"]).items()
    }
    config = json.loads(now["adapter_config.json"]) | {"target_modules": ["query"]}
    earlier = {"adapter_model.safetensors": save(tensors), "adapter_config.json": json.dumps(config).encode()}
    hub.add_repo("org/ft-now", now)
    hub.add_repo("org/ft-then", now | earlier)
    ingredients = hf_radin.gather("org/ft-*")
    assert not any(ingredient.is_here for ingredient in ingredients)  # the headers told
    first, second = (ingredient.load_model(torch.float32).state_dict() for ingredient in ingredients)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


CODE = b"""
from transformers import ViTForImageClassification

class OwnModel(ViTForImageClassification):
    pass
"""


def test_code_of_its_own_is_fetched_with_a_checkpoint_and_that_of_elsewhere_is_said(hub, runs):
    """The code of another repository is read as it is then, whatever the checkpoint's revision."""
    hub.add_repo("org/code", {"own.py": CODE})
    for name, place in (("org/ft-0", "own.OwnModel"), ("org/ft-1", "org/code--own.OwnModel")):
        content = files(runs / name.removeprefix("org/"))
        config = json.loads(content["config.json"])
        fields = {"architectures": ["OwnModel"], "auto_map": {"AutoModelForImageClassification": place}}
        content["config.json"] = json.dumps(config | fields).encode()
        hub.add_repo(name, content | ({"own.py": CODE} if "--" not in place else {}))
    inside, elsewhere = hf_radin.inspect("org/ft-*", trust_remote_code=True)
    assert (inside.ingredient.architecture, inside.notes) == ("OwnModel", ())
    assert inside.ingredient.load_model(torch.float32).classifier.out_features == 10
    assert (
        "org/ft-1: its code is not in the checkpoint: it is the current code of org/code on the Hub."
        in elsewhere.notes
    )
