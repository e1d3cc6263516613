"""A soup without data: the average that was asked for, whole or not at all, of which nothing is claimed."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from shared.logs import warned
from transformers import AutoModelForImageClassification, ViTForImageClassification

import hf_radin
from hf_radin.averaging.agreement import open_agreeing
from hf_radin.averaging.unmeasured import average_unmeasured, normalised
from hf_radin.cli.main import main
from hf_radin.ingredients.resolve import find_places
from hf_radin.soup.report import RECIPE, SearchReport

WEIGHTS = "model.safetensors"


@pytest.fixture
def three(runs, tmp_path) -> list[Path]:
    """Copies of three fine-tunes, to be spoilt."""
    return [Path(shutil.copytree(runs / f"ft-{number}", tmp_path / f"ft-{number}")) for number in range(3)]


@pytest.fixture
def run(three, tmp_path) -> Path:
    """A Trainer's run, whose steps have other numbers of digits."""
    for step, folder in zip((5, 10, 100), three, strict=True):
        shutil.move(folder, tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def agree(folders) -> bool:
    """Whether folders are averaged as files, without a model."""
    with open_agreeing(find_places([str(folder) for folder in folders])) as agreement:
        return agreement is not None


def averaged(folders, output, *options) -> dict[str, torch.Tensor]:
    """The weights that the command writes."""
    assert main(["average", *map(str, folders), "--output", str(output), *map(str, options)]) == 0
    return load_file(output / WEIGHTS)


def loop(folders, weights) -> dict[str, torch.Tensor]:
    """A plain loop over state dicts."""
    states = [load_file(folder / WEIGHTS) for folder in folders]
    parts = list(zip(weights, states, strict=True))
    return {name: sum(weight * state[name] for weight, state in parts) for name in states[0]}


def are_equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def refused(capsys, *options) -> str:
    """What the command says where it refuses these options, and writes nothing."""
    assert main(["average", *map(str, options)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("weights", [None, (0.5, 0.3, 0.2)])
def test_it_is_that_of_a_plain_loop_and_of_python_to_rounding(three, tmp_path, weights):
    made = averaged(three, tmp_path / "out", *(["--weights", *weights] if weights else []))
    ingredients = hf_radin.gather(three)
    recipe = hf_radin.Recipe(ingredients.ids, weights) if weights else hf_radin.Recipe.uniform(ingredients.ids)
    hf_radin.average(ingredients, recipe, output=tmp_path / "python")
    for expected in (loop(three, weights or (1 / 3,) * 3), load_file(tmp_path / "python" / WEIGHTS)):
        assert made.keys() == expected.keys()
        for name, tensor in made.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    assert hf_radin.Soup.from_pretrained(tmp_path / "out").recipe == recipe


def test_it_says_of_its_ingredients_what_gather_says(three, tmp_path):
    averaged(three, tmp_path / "out")
    entries = hf_radin.Soup.from_pretrained(tmp_path / "out").report.ingredients
    gathered = hf_radin.gather(three)
    assert [(entry.id, entry.revision, entry.stamp) for entry in entries] == [
        (ingredient.id, ingredient.revision, ingredient.stamp) for ingredient in gathered
    ]


def test_models_that_are_gathered_give_the_same(three, tmp_path):
    as_files = averaged(three, tmp_path / "files")
    as_models = averaged(three, tmp_path / "models", "--classes", "common")  # which takes what `gather` knows
    for name, tensor in as_files.items():
        torch.testing.assert_close(tensor, as_models[name], rtol=1e-6, atol=1e-7)
    files, models = ((tmp_path / name / "README.md").read_text() for name in ("files", "models"))
    assert files == models.replace("\n(torchvision backend)", "").replace("\n(pil backend)", "")


def test_files_that_agree_need_neither_torch_nor_transformers(three, tmp_path):
    assert agree(three)
    code = (
        "import sys; from hf_radin.cli.main import main; assert main(sys.argv[1:]) == 0;"
        "print(*{'torch', 'transformers', 'datasets', 'matplotlib'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, "average", *map(str, three), "--output", str(tmp_path / "out")]
    assert subprocess.check_output(command, text=True).splitlines()[-1] == ""


def test_names_and_their_order_change_no_bit(three, tmp_path):
    first = averaged(three, tmp_path / "first", "--weights", 0.5, 0.3, 0.2, "--dtype", "bfloat16")
    shutil.copytree(three[0], tmp_path / "z")
    others = [three[2], tmp_path / "z", three[1]]
    assert are_equal(first, averaged(others, tmp_path / "out", "--weights", 0.2, 0.5, 0.3, "--dtype", "bfloat16"))


def test_the_average_of_equal_models_is_that_model(three, tmp_path):
    tensors = load_file(three[0] / WEIGHTS)
    for folder in three:  # other files, the same weights: else the copies would be one ingredient
        save_file(tensors, folder / WEIGHTS, {"format": "pt", "copy": folder.name})
    assert are_equal(averaged(three, tmp_path / "out", "--weights", 0.7, 0.2, 0.1), tensors)


def test_with_all_weight_on_the_first_it_is_the_first(three, tmp_path):
    assert are_equal(averaged(three, tmp_path / "out", "--weights", 1, 0, 0), load_file(three[0] / WEIGHTS))
    assert "# Copy of a checkpoint" in (tmp_path / "out" / "README.md").read_text()


def test_the_recipe_cooks_it_again_bit_for_bit(three, tmp_path):
    made = averaged(three, tmp_path / "out", "--weights", 0.5, 0.3, 0.2)
    assert are_equal(made, averaged([], tmp_path / "again", "--recipe", tmp_path / "out"))
    for folder in three:
        folder.rename(folder.with_name(f"moved-{folder.name}"))
    moved = sorted(tmp_path.glob("moved-*"))
    assert are_equal(made, averaged(moved, tmp_path / "moved", "--recipe", tmp_path / "out"))


def test_shards_and_tensors_in_another_order_are_hashed_too(three, tmp_path):
    model = ViTForImageClassification.from_pretrained(three[1])
    (three[1] / WEIGHTS).unlink()
    model.save_pretrained(three[1], max_shard_size="20KB")
    reverse(three[2] / WEIGHTS)
    assert agree(three)
    made = averaged(three, tmp_path / "out", "--max-shard-size", "1GB")
    entries = hf_radin.Soup.from_pretrained(tmp_path / "out").report.ingredients
    assert [entry.revision for entry in entries] == [ingredient.revision for ingredient in hf_radin.gather(three)]
    whole = [AutoModelForImageClassification.from_pretrained(folder).state_dict() for folder in three]
    soup = AutoModelForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.allclose(soup[name], sum(state[name] for state in whole) / 3, atol=1e-6) for name in soup)
    assert len(made) == len(soup)


def reverse(path: Path) -> None:
    """Write a file of weights with its tensors the other way round."""
    tensors, fields, content = load_file(path), {}, b""
    for name in sorted(tensors, reverse=True):
        part = tensors[name].numpy().tobytes()
        fields[name] = {"dtype": "F32", "shape": [*tensors[name].shape]}
        fields[name]["data_offsets"] = [len(content), len(content) + len(part)]
        content += part
    header = json.dumps(fields).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)


def test_the_card_claims_nothing_and_names_the_command_that_measures(three, digits, cache, tmp_path, capsys):
    averaged(three, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "**Nothing was measured of this model.**" in text and "%" not in text.partition("## Cite")[0]
    assert "No accuracy is claimed: it may be worse than each of its ingredients." in text
    printed = capsys.readouterr().out
    assert "Nothing was measured of it" in printed and "may be worse than each" in printed
    command = printed.partition("measures it: hf-radin ")[2].split()
    assert f"hf-radin {' '.join(command[:3])}" in text
    command[command.index("DATA")], command[-1] = str(digits), str(tmp_path / "measured")
    assert main([*command, "--cache-dir", str(cache)]) == 0
    measured = hf_radin.Soup.from_pretrained(tmp_path / "measured")
    assert measured.accuracy("soup", "validation") > 0 and measured.report.is_uniform


def test_weights_that_were_given_are_measured_as_they_are(three, digits, cache, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    averaged(three, Path("out"), "--weights", 0.5, 0.3, 0.2)
    command = capsys.readouterr().out.partition("measures it: hf-radin ")[2].split()
    command[command.index("DATA")] = str(digits)
    assert main([*command, "--cache-dir", str(cache)]) == 0
    measured = hf_radin.Soup.from_pretrained("measured").measurements
    assert "out" in {entry.recipe.ingredients[0] for entry in measured if entry.proposal == "single"}


def test_other_commands_take_it_or_say_why_not(three, tmp_path, capsys):
    averaged(three, tmp_path / "out")
    before = (tmp_path / "out" / "README.md").read_text()
    assert main(["card", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "README.md").read_text() == before
    assert main(["distill", str(tmp_path / "out"), "--output", str(tmp_path / "distilled")]) == 2
    assert "The soup was not measured, so that nothing can be better" in capsys.readouterr().err


def test_averaged_statistics_are_said(nets, tmp_path, caplog):
    folders = sorted(nets.glob("ft-*"))
    assert agree(folders)
    averaged(folders, tmp_path / "files")
    assert "They are not the statistics of the averaged weights" in "".join(warned(caplog))
    for folder in ("files", "again", "models"):
        if folder == "again":  # cooked from the recipe
            averaged([], tmp_path / folder, "--recipe", tmp_path / "files")
        if folder == "models":  # from Python
            ingredients = hf_radin.gather(folders)
            hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids), output=tmp_path / folder)
        text = (tmp_path / folder / "README.md").read_text()
        assert "**Its BatchNorm statistics are the average" in text and "--method uniform" in text


def test_statistics_that_all_share_are_no_matter(nets, tmp_path, caplog):
    folders = [Path(shutil.copytree(nets / name, tmp_path / name)) for name in ("ft-0", "ft-1")]
    shared = load_file(folders[0] / WEIGHTS)
    tensors = load_file(folders[1] / WEIGHTS)
    frozen = {name: tensor for name, tensor in shared.items() if "running_" in name}
    save_file(tensors | frozen, folders[1] / WEIGHTS, {"format": "pt"})
    averaged(folders, tmp_path / "out")
    assert not [text for text in warned(caplog) if "BatchNorm" in text]
    assert "BatchNorm" not in (tmp_path / "out" / "README.md").read_text()


def test_classes_in_another_order_are_brought_into_one(three, tmp_path):
    expected = averaged(three, tmp_path / "expected")
    order, tensors = torch.arange(9, -1, -1), load_file(three[2] / WEIGHTS)
    tensors |= {name: tensors[name][order].clone() for name in ("classifier.weight", "classifier.bias")}
    save_file(tensors, three[2] / WEIGHTS, {"format": "pt"})
    config = json.loads((three[2] / "config.json").read_text())
    names = [config["id2label"][str(number)] for number in order.tolist()]
    config["id2label"] = {str(number): name for number, name in enumerate(names)}
    config["label2id"] = {name: number for number, name in enumerate(names)}
    (three[2] / "config.json").write_text(json.dumps(config))
    assert not agree(three)
    made = averaged(three, tmp_path / "out")
    assert all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in made.items())


def test_several_classes_an_image_are_said(three, tmp_path):
    for folder in three:
        config = json.loads((folder / "config.json").read_text())
        problem = {"problem_type": "multi_label_classification"}
        (folder / "config.json").write_text(json.dumps(config | problem))
    assert agree(three)
    averaged(three, tmp_path / "out")
    assert hf_radin.Soup.from_pretrained(tmp_path / "out").report.multi_label is True
    assert "says of each of 10 classes by itself" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["ViTModel"]},
        {"problem_type": "regression"},
        {"id2label": {"0": "one"}},
        {"auto_map": {"AutoConfig": "code.Config"}},
        {"transformers_weights": "other.safetensors"},
    ],
)
def test_what_is_not_usual_is_left_to_gather(three, change):
    assert agree(three)
    for folder in three:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    assert not agree(three)


def test_adapters_are_merged(start, tmp_path):
    for seed in range(2):
        torch.manual_seed(seed)
        model = ViTForImageClassification.from_pretrained(start)
        options = {"target_modules": ["q_proj"], "modules_to_save": ["classifier"], "init_lora_weights": False}
        get_peft_model(model, LoraConfig(r=2, **options)).save_pretrained(tmp_path / f"lora-{seed}")
        shutil.copy(start / "preprocessor_config.json", tmp_path / f"lora-{seed}")
    folders = sorted(tmp_path.glob("lora-*"))
    made = averaged(folders, tmp_path / "out", "--base-model", start, "--save-adapter")
    ingredients = hf_radin.gather(folders, base_model=start)
    reloaded = PeftModel.from_pretrained(
        ViTForImageClassification.from_pretrained(start), tmp_path / "out" / "adapter"
    )
    merged, images = ViTForImageClassification.from_pretrained(tmp_path / "out"), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(reloaded(images).logits, merged(images).logits)
    hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids), output=tmp_path / "python")
    assert are_equal(made, load_file(tmp_path / "python" / WEIGHTS))


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        (("nan", 1, 1), "--weights nan: a weight is a number of at least 0"),
        (("inf", 1, 1), "--weights inf"),
        ((-0.5, 1, 0.5), "--weights -0.5"),
        ((0, 0, 0), "--weights 0 0 0: no weight is above 0"),
        ((0.5, 0.5), "2 are given, and the names stand for 3 different models"),
    ],
)
def test_weights_that_are_none_are_refused(three, tmp_path, capsys, weights, error):
    assert error in refused(capsys, *three, "--output", tmp_path / "out", "--weights", *weights)
    assert not (tmp_path / "out").exists()


def test_weights_are_divided_by_their_sum_and_it_is_said(caplog):
    assert normalised([2, 1, 1]) == (0.5, 0.25, 0.25)
    assert warned(caplog) == ["The weights add up to 4, not to 1, and are divided by that: 0.5 0.25 0.25."]
    caplog.clear()
    assert normalised([0.7, 0.2, 0.1]) == (0.7, 0.2, 0.1) and warned(caplog) == []
    assert normalised([1e308, 1e308]) == (0.5, 0.5)


def test_the_last_are_those_with_the_greatest_steps(run, tmp_path):
    expected = loop([run / "checkpoint-10", run / "checkpoint-100"], (0.25, 0.75))
    for output, name in (("of-run", run), ("of-pattern", run / "checkpoint-*")):
        made = averaged([name], tmp_path / output, "--last", 2, "--weights", 0.25, 0.75)
        assert all(torch.allclose(tensor, expected[key], atol=1e-6) for key, tensor in made.items())


def test_the_last_of_what_is_no_run_are_refused(run, runs, tmp_path, capsys):
    output = ["--output", tmp_path / "out"]
    assert "has 3 checkpoints" in refused(capsys, run, *output, "--last", 4)
    assert "at least two checkpoints" in refused(capsys, run, *output, "--last", 1)
    assert "ft-0 is no checkpoint of a run" in refused(capsys, runs / "ft-0", run, *output, "--last", 2)
    shutil.copytree(run, tmp_path / "other")
    assert "checkpoints of 2 runs" in refused(capsys, run, tmp_path / "other", *output, "--last", 2)


def test_a_run_that_is_named_twice_has_its_checkpoints_once(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "has 3 checkpoints" in refused(capsys, "run", run / "checkpoint-*", "--output", "out", "--last", 4)
    averaged(["run", run], tmp_path / "out", "--last", 2)
    ingredients = SearchReport.read(tmp_path / "out" / RECIPE).recipe.ingredients
    assert ingredients == ("run/checkpoint-10", "run/checkpoint-100")
    averaged(["ru*"], tmp_path / "of-pattern", "--last", 3)


def test_the_last_of_two_trainings_are_told(run, tmp_path, caplog):
    for step, loss in ((5, 0.5), (10, 0.4), (100, 0.3)):
        state = {"log_history": [{"step": 1, "loss": loss}]}
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    averaged([run / "checkpoint-*"], tmp_path / "out", "--last", 2)
    assert "checkpoint-10 and checkpoint-100 are of different trainings" in "".join(warned(caplog))


def test_copies_count_once(three, tmp_path, capsys):
    shutil.copytree(three[0], tmp_path / "copy")
    names = [three[0], tmp_path / "copy"]
    assert "at least two different checkpoints" in refused(capsys, *names, "--output", tmp_path / "out")
    options = ["--output", tmp_path / "out", "--weights", 0.5, 0.3, 0.2]
    assert "the names stand for 2 different models" in refused(capsys, *names, three[1], *options)


def test_options_of_a_recipe_and_of_names_are_told_apart(three, tmp_path, capsys):
    output = ["--output", tmp_path / "out"]
    assert "Nothing is named" in refused(capsys, *output)
    assert "--start x: it belongs to a recipe" in refused(capsys, *three, *output, "--start", "x")
    assert "--weights 1.0 2.0: the recipe says" in refused(capsys, "--recipe", "r", *output, "--weights", 1, 2)


def test_an_output_that_would_be_lost_is_refused(three, tmp_path, capsys):
    before = (three[0] / WEIGHTS).read_bytes()
    assert "is not empty" in refused(capsys, *three, "--output", three[0])
    assert "is the ingredient" in refused(capsys, *three, "--output", three[0], "--overwrite")
    assert (three[0] / WEIGHTS).read_bytes() == before


def test_a_checkpoint_that_is_still_written_is_named(run, tmp_path, capsys):
    path = run / "checkpoint-100" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    error = refused(capsys, run, "--output", tmp_path / "out", "--last", 2)
    assert "checkpoint-100" in error and "not a whole file of weights" in error
    path.unlink()
    error = refused(capsys, run, "--output", tmp_path / "out", "--last", 2)
    assert "checkpoint-100 has no weights: it is still being written" in error and not (tmp_path / "out").exists()


def test_models_of_different_architectures_are_refused(three, nets, tmp_path, capsys):
    shutil.copytree(nets / "ft-0", tmp_path / "ft-9")
    error = refused(capsys, tmp_path / "ft-*", "--output", tmp_path / "out")
    assert "architecture: 'ResNetForImageClassification' against 'ViTForImageClassification'" in error
    assert not (tmp_path / "out").exists()


def test_a_number_that_is_none_leaves_nothing_behind(three, tmp_path, capsys):
    tensors = load_file(three[1] / WEIGHTS)
    tensors["classifier.bias"][3] = torch.nan
    save_file(tensors, three[1] / WEIGHTS, {"format": "pt"})
    assert agree(three)
    error = refused(capsys, *three, "--output", tmp_path / "out")
    assert "ft-1: classifier.bias has nan at 3" in error
    assert {path.name for path in tmp_path.iterdir()} == {"ft-0", "ft-1", "ft-2"}


def test_whoever_is_killed_leaves_no_half_checkpoint(three, tmp_path):
    command = [sys.executable, "-m", "hf_radin", "average", *map(str, three), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not [*tmp_path.glob(".hf_radin.*/new")]:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "out").exists():  # it was faster
        hf_radin.Soup.from_pretrained(tmp_path / "out")
    averaged(three, tmp_path / "out", "--overwrite")
    hf_radin.Soup.from_pretrained(tmp_path / "out")


def test_from_python_it_is_a_recipe(three, tmp_path):
    recipe = average_unmeasured([str(folder) for folder in three], tmp_path / "out", weights=[1, 1, 2])
    assert recipe.weights == (0.25, 0.25, 0.5)


def test_of_runs_it_is_said_what_is_taken(run, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    assert main(["average", str(run), "--checkpoint", "all", "--last", "2", "--output", str(tmp_path / "out")]) == 2
    assert "--checkpoint all and --last 2 both say what is taken of a run" in capsys.readouterr().err
    assert main(["average", str(run), "--checkpoint", "all", "--output", str(tmp_path / "out")]) == 0
    options = ["--checkpoint", "all", "--classes", "common"]  # for which all are gathered
    assert main(["average", str(run), *options, "--output", str(tmp_path / "gathered")]) == 0
    assert "checkpoint=..." not in caplog.text  # which takes what the user said already
    checkpoints = [path.as_posix() for path in run.glob("checkpoint-*")]
    assert sorted(SearchReport.read(tmp_path / "out" / RECIPE).recipe.ingredients) == sorted(checkpoints)
