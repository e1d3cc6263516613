"""The command line: the whole road in one command, and one line for what is wrong."""

import argparse
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import packaged_modules
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from shared.models import interrupted
from shared.training import PARTS, digit_images, image_dataset

import hf_radin
from hf_radin.cli.commands import pilot_share, run_options
from hf_radin.cli.main import command_parser, main
from hf_radin.images.split import DataSource
from hf_radin.ingredients.card_metadata import LOADERS
from hf_radin.logits.manifest import RunOptions
from hf_radin.runtime.processes import Processes
from hf_radin.soup.report import SearchReport


def card(folder, *, dataset, split="validation", config=None, datasets=None):
    """What an ingredient's own card says of the data that it was evaluated on."""
    result = EvalResult(
        task_type="image-classification",
        dataset_type=str(dataset),
        dataset_name="digits",
        dataset_split=split,
        dataset_config=config,
        metric_type="accuracy",
        metric_value=0.9,
    )
    data = ModelCardData(model_name=folder.name, eval_results=[result], datasets=datasets)
    ModelCard(f"---\n{data.to_yaml()}\n---\n# {folder.name}").save(folder / "README.md")


@pytest.fixture
def cwd(tmp_path, monkeypatch) -> Path:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


def soup(*options) -> int:
    return main(["soup", *map(str, options)])


def test_the_whole_road(runs, digits, cache, cwd, capsys):
    options = ["--dataset", digits, "--cache-dir", cache, "--budget", 2, "--test-split", "test", "--output", "out"]
    assert soup("--models", f"{runs}/ft-*", *options) == 0
    saved = hf_radin.Soup.from_pretrained("out")
    printed = capsys.readouterr().out
    for name in ("soup", "best single", "uniform", "ensemble"):
        for split in ("validation", "test"):
            assert f"{100 * saved.accuracy(name, split):.2f}%" in printed
    assert f"Spent in all: 5 passes over validation for logits, {saved.report.passes.soups:.3g} for soups" in printed


def test_the_shell_may_expand_the_pattern(runs, digits, cache, cwd):
    assert soup("--models", runs / "ft-0", runs / "ft-1", "--dataset", digits, "--cache-dir", cache) == 0
    assert len(hf_radin.Soup.from_pretrained("soup").report.ingredients) == 2


@pytest.mark.parametrize("method", ["greedy", "uniform", "best_single"])
def test_the_other_methods(runs, digits, cache, cwd, method):
    assert soup("--models", f"{runs}/ft-*", "--dataset", digits, "--cache-dir", cache, "--method", method) == 0
    assert hf_radin.Soup.from_pretrained("soup").report.method == method


def test_without_a_dataset_the_cards_say_it(two, digits, cache, cwd, capsys):
    for folder in two.iterdir():
        card(folder, dataset=digits, split="test")
    assert soup("--models", f"{two}/*", "--cache-dir", cache) == 0
    assert f"The models' cards agree on the dataset {digits}, split test." in capsys.readouterr().out
    assert json.loads(Path("soup/recipe.json").read_text())["data"]["split"] == "test"


def test_an_option_goes_before_the_cards(two, digits, cache, cwd):
    for folder in two.iterdir():
        card(folder, dataset="org/gone", split="test")
    options = ["--dataset", digits, "--split", "validation", "--cache-dir", cache]
    assert soup("--models", f"{two}/*", *options) == 0
    assert json.loads(Path("soup/recipe.json").read_text())["data"]["split"] == "validation"


def test_the_card_of_a_run_speaks_for_its_checkpoints(runs, digits, cache, cwd, tmp_path):
    for name in ("ft-0", "ft-1"):
        shutil.copytree(runs / name, tmp_path / "trainer" / name / "checkpoint-10")
        card(tmp_path / "trainer" / name, dataset=digits)
    assert soup("--models", f"{tmp_path}/trainer/*/checkpoint-*", "--cache-dir", cache) == 0


def test_cards_that_say_nothing_are_told_apart_from_those_that_disagree(two, digits, cwd, capsys):
    assert soup("--models", f"{two}/*") == 2
    errors = capsys.readouterr().err
    assert f"{two}/ft-0: no dataset, no configuration, no split" in errors
    assert errors.startswith("hf-radin: Name the dataset with --dataset")
    card(two / "ft-0", dataset="org/pets")
    card(two / "ft-1", dataset="org/birds", config="small")
    assert soup("--models", f"{two}/*") == 2
    errors = capsys.readouterr().err
    assert "ft-0: dataset 'org/pets', no configuration, split 'validation'" in errors
    assert "ft-1: dataset 'org/birds', configuration 'small', split 'validation'" in errors


@pytest.mark.parametrize("beside", [None, ["imagefolder"], ["Image_Folder", "parquet"]])
def test_a_loader_is_no_dataset_though_a_folder_of_its_name_is_here(two, cwd, capsys, beside):
    """As a Trainer writes it of somebody's own folder: `datasets: imagefolder`, `split: train`."""
    (cwd / "imagefolder").mkdir()
    image_dataset(*digit_images(PARTS["validation"])).to_parquet(cwd / "imagefolder" / "train.parquet")
    for folder in two.iterdir():
        card(folder, dataset="imagefolder", split="train", config="default", datasets=beside)
    capsys.readouterr()
    assert soup("--models", f"{two}/*") == 2
    errors = capsys.readouterr().err
    assert errors.startswith(
        "hf-radin: Name the dataset with --dataset (a Hub id or a folder), and its split with --split"
    )
    assert "no dataset, configuration 'default', split 'train'" in errors


def test_a_trainers_card_names_the_dataset_beside_the_loader(two, digits, cache, cwd):
    for folder in two.iterdir():
        card(folder, dataset="imagefolder", datasets=[str(digits)])
    assert soup("--models", f"{two}/*", "--cache-dir", cache) == 0


def test_all_loaders_of_datasets_are_known():
    installed = {re.sub("_", "", module.name) for module in pkgutil.iter_modules(packaged_modules.__path__)}
    assert installed <= LOADERS


@pytest.mark.parametrize(
    "split", ["train", "Train", "training", "train[:10%]", "train+validation", "test+train_small"]
)
def test_images_that_models_learnt_from_do_not_choose_by_themselves(two, digits, cwd, capsys, split):
    for folder in two.iterdir():
        card(folder, dataset=digits, split=split)
    assert soup("--models", f"{two}/*") == 2
    errors = capsys.readouterr().err
    assert errors.startswith(
        f"hf-radin: Name the split to choose with, by --split: the models' cards agree on {split!r}"
    )


def test_a_split_that_is_named_goes_before_those_in_cards(two, digits, cache, cwd):
    """Also where only the splits of the cards differ."""
    for folder, split, config in zip(sorted(two.iterdir()), ("train", "test"), ("default", None), strict=True):
        card(folder, dataset=digits, split=split, config=config)
    assert soup("--models", f"{two}/*") == 2
    assert soup("--models", f"{two}/*", "--split", "validation", "--cache-dir", cache) == 0
    assert json.loads(Path("soup/recipe.json").read_text())["data"]["split"] == "validation"


def test_a_folder_that_goes_before_the_hub_is_said_to_be_one(two, digits, cache, cwd, capsys):
    shutil.copytree(digits, cwd / "org" / "digits")
    for folder in two.iterdir():
        card(folder, dataset="org/digits")
    assert soup("--models", f"{two}/*", "--cache-dir", cache) == 0
    assert "agree on the dataset org/digits (the folder here), split validation." in capsys.readouterr().out


def test_a_broken_card_is_as_good_as_none(two, cwd, capsys, caplog):
    (two / "ft-0" / "README.md").write_text("---\na: [\n---\n")
    (two / "ft-1" / "README.md").write_text("---\nmodel-index: 7\ndatasets: {a: b}\n---\n")
    assert soup("--models", f"{two}/*") == 2
    assert "the models' cards name none" in capsys.readouterr().err and "can't be read" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "-2"], "budget='-2'"),
        (["--output", "full"], "The output folder full is not empty"),
        (["--test-split", "validation"], "this split chooses the soup; another one has to prove it"),
        (["--test-split", "dev"], "has no split 'dev'"),
        (["--split", "dev"], "has no split 'dev'"),
        (["--metrics", "accuracy,./no-such-metric"], "The metric './no-such-metric' is none of accuracy"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--candidates", "0"], "candidates=0"),
        (["--proposals", "subsets", "--budget", "-1"], "budget='-1'"),
        (["--dataset", "./nowhere"], "./nowhere is neither a folder here nor a Hub id"),
        (["--models", "nothing-*"], "matches no folder"),
        (["--push-to", "a/b/c"], "a/b/c is not a Hub id"),
    ],
)
def test_what_is_wrong_is_one_line_before_any_model_runs(runs, digits, cwd, tmp_path, capsys, options, message):
    (cwd / "full").mkdir()
    (cwd / "full" / "mine.txt").write_text("mine")
    cache = tmp_path / "cache"
    assert soup("--models", f"{runs}/ft-[01]", "--dataset", digits, "--cache-dir", cache, *options) == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors
    assert not list(cache.glob("banks/*/logits/*"))
    assert not (cwd / "soup").exists()


def test_a_bad_option_is_argparses_to_refuse(capsys):
    with pytest.raises(SystemExit) as error:
        soup("--models", "a", "--method", "magic")
    assert error.value.code == 2 and "invalid choice: 'magic'" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(runs, digits, cwd, capsys):
    with interrupted(calls=2):  # the first shows what a model takes, the second is of a block
        assert soup("--models", f"{runs}/ft-[01]", "--dataset", digits, "--cache-dir", cwd / "cache") == 130
    assert "run the same command again" in capsys.readouterr().err
    assert len(list(cwd.glob("cache/banks/*/logits/*.parts/*"))) == 1


def test_the_console_script_is_installed():
    script = Path(sys.executable).parent / "hf-radin"
    assert "average" in subprocess.check_output([script, "--help"], text=True)


def test_the_example_reads_like_the_paper_in_80_lines():
    assert len((Path(__file__).parents[2] / "examples" / "soup.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize(
    "options",
    [["--models", "rnus/ft-*"], ["--models", "org/a", "org/b"], ["--dataset", "digtis"], ["--push-to", "org/soup"]],
)
def test_a_typo_without_a_network_is_one_line(runs, digits, cwd, go_offline, capsys, options):
    go_offline()
    assert soup("--models", f"{runs}/ft-[01]", "--dataset", digits, *options) == 2
    errors = capsys.readouterr().err
    assert ("the Hub can't be asked" in errors or "HF_HUB_OFFLINE is set" in errors) and "Traceback" not in errors


@pytest.mark.parametrize("option", ["--output", "--cache-dir"])
def test_a_place_that_can_not_be_written_is_one_line(runs, digits, cwd, capsys, option):
    (cwd / "file").write_text("mine")
    assert soup("--models", f"{runs}/ft-[01]", "--dataset", digits, option, cwd / "file" / "soup") == 2
    assert "file" in capsys.readouterr().err


def test_a_test_split_without_labels_is_refused_before_any_model_runs(runs, cwd, capsys):
    images, labels = digit_images(slice(700, 720))
    image_dataset(images, labels).to_parquet("data/validation.parquet")
    image_dataset(images, [-1] * 20).to_parquet("data/test.parquet")
    options = ["--dataset", "data", "--test-split", "test", "--cache-dir", "cache"]
    assert soup("--models", f"{runs}/ft-[01]", *options) == 2
    errors = capsys.readouterr().err
    assert "Sample 0 of data, split 'test', has the label" in errors and not list(cwd.glob("cache/banks/*/logits/*"))


def test_an_odd_card_of_an_ingredient_does_no_harm(two, digits, cache, cwd):
    odd = "---\nlicense: {a: b}\nmodel-index: [{results: [{dataset: {type: [a, b], split: {c: d}}}]}]\n---\n"
    for folder in two.iterdir():
        (folder / "README.md").write_text(odd)
    assert soup("--models", f"{two}/*", "--dataset", digits, "--cache-dir", cache) == 0


def test_an_estimate_may_be_proved_on_another_split(runs, digits, tmp_path, cwd, capsys):
    options = ["--dataset", digits, "--cache-dir", tmp_path / "cache", "--test-split", "test"]
    assert soup("--models", f"{runs}/ft-*", *options, "--budget", "0", "--unmeasured") == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("soup "))
    # the ensembles of these are better than the best single model, which would be known
    assert "Estimated, not measured" in printed and "not measured" in row and row.count("%") == 1
    assert "ensemble of 5" in printed


@pytest.mark.parametrize("method", ["greedy", "uniform", "best_single"])
def test_a_budget_that_nobody_keeps_to_is_refused(runs, digits, cwd, capsys, method):
    assert soup("--models", f"{runs}/ft-*", "--dataset", digits, "--method", method, "--budget", "0") == 2
    assert f"--budget 0: only radin has a budget; {method} measures" in capsys.readouterr().err


def test_a_log_without_a_terminal_says_how_it_goes(runs, digits, tmp_path, cwd, caplog):
    """How many predictions were made, it says every minute: see `test_passes`."""
    assert soup("--models", f"{runs}/ft-[012]", "--dataset", digits, "--cache-dir", tmp_path, "--budget", "1") == 0
    assert "Logits of 3 checkpoints on the split 'validation' of" in caplog.text
    assert "3 to compute, on cpu" in caplog.text and "Soup of " in caplog.text


def test_a_duration_is_for_logits_and_soups(runs, start, digits, cwd, capsys, tmp_path):
    options = ["--models", f"{runs}/ft-*", start, "--cache-dir", tmp_path / "cache"]
    assert soup(*options, "--dataset", digits, "--budget", "10m", "--output", "long") == 0
    printed = capsys.readouterr().out
    assert "of the split are computed" not in printed and "Spent in all: 6 passes" in printed
    assert soup(*options, "--dataset", digits, "--budget", "0.01s", "--output", "few") == 0
    assert "of the split are computed" not in capsys.readouterr().out  # of 600 images, a part is no sample
    images, labels = digit_images(PARTS["validation"])
    image_dataset(images * 17, labels * 17).to_parquet(cwd / "large" / "validation.parquet")
    assert soup(*options, "--dataset", "large", "--budget", "0.01s", "--output", "short") == 0
    printed = capsys.readouterr().out
    assert "Logits of 5% of the split are computed, then of images on which 3 of 6 disagree" in printed
    report = SearchReport.read(cwd / "short" / "recipe.json")
    assert (report.pilot.share, report.pilot.given, report.pilot.leading) == (0.05, 6, 3)
    assert len(report.pilot.whole) < 6 and report.pilot.shown < report.images == 10_200
    assert report.measured is True and report.budget == "0.01s"
    source, alone = DataSource("large"), Processes()
    assert (
        pilot_share(hf_radin.gather(f"{runs}/ft-*"), source, RunOptions(), 1e6, alone) is None
    )  # there is time for all
    assert (
        pilot_share(hf_radin.gather(f"{runs}/ft-[01]"), source, RunOptions(), 0.01, alone) is None
    )  # both would lead


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pilot", "1.5"], "pilot=1.5: it is the share of the split"),
        (["--pilot", "0.2", "--method", "greedy"], "--pilot 0.2: greedy takes the logits of all images"),
        (["--pilot", "0.2", "--hold-out", "0.2"], "--pilot 0.2: --hold-out takes the logits of all images"),
        (["--hold-out", "0.2", "--test-split", "test"], "--hold-out 0.2: the split test proves the soup already"),
        (["--measure", "full", "--method", "greedy"], "--measure full: greedy has no candidates"),
        (["--hold-out", "0.2", "--method", "uniform"], "--hold-out 0.2: only radin holds images out"),
        (["--hold-out", "1.5"], "--hold-out 1.5: it is a share of the split"),
        (["--hold-out", "nan"], "--hold-out nan: it is a share of the split"),
        (["--budget", "15 days"], "budget='15 days'"),
        (["--budget", "0.3"], "budget='0.3'"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_a_model_is_looked_at(cwd, capsys, options, message):
    assert soup("--models", "nowhere/*", "--dataset", "nowhere", *options) == 2
    assert message in capsys.readouterr().err


def test_logits_of_a_part_are_not_published(cwd, capsys):
    options = ["--models", "nowhere/*", "--dataset", "nowhere", "--push-to", "org/bank", "--pilot", "0.2"]
    assert main(["logits", *options]) == 2
    assert "--push-to org/bank: logits of a part of the split (--pilot) can't be published" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["estimate", "--budget", "15m"], "'15m' is no number of passes over the split; how long they take is what"),
        (["soup", "--max-image-pixels", "0"], "'0' is no number of pixels"),
        (["soup", "--max-image-pixels", "many"], "'many' is no number of pixels"),
    ],
)
def test_an_option_that_is_a_number_takes_nothing_else(capsys, command, message):
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--models", "nowhere/*", "--dataset", "nowhere"])
    assert message in capsys.readouterr().err


def commands() -> dict[str, argparse.ArgumentParser]:
    (actions,) = (action for action in command_parser()._actions if isinstance(action.choices, dict))
    return dict(actions.choices)


@pytest.mark.parametrize("name", commands())
def test_a_shortened_option_is_refused_by_every_command(name):
    """`--metric f1` would be read as `--metrics f1`."""
    options = [option for option in commands()[name]._option_string_actions if option.startswith("--")]
    for option in options:
        shortened = option[:-1]
        if shortened in options:
            continue
        parser = commands()[name]
        for action in parser._actions:
            action.required = False
        _, unknown = parser.parse_known_args([f"{shortened}=1"])
        assert unknown == [f"{shortened}=1"], option


def test_a_shortened_option_is_named(runs, capsys):
    with pytest.raises(SystemExit, match="2"):
        soup("--models", f"{runs}/ft-*", "--proposal", "line")
    assert "unrecognized arguments: --proposal line" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--channels-last", "--torch-compile"])
def test_what_is_switched_is_on_off_or_left_to_the_machine(option, capsys):
    command = ["logits", "--models", "m"]

    def value(*words: str) -> bool | str:
        args = command_parser().parse_args([*command, *words])
        return getattr(run_options(args), option.strip("-").replace("-", "_"))

    assert value() == value(option, "auto") == "auto"
    assert value(option) is value(option, "on") is True and value(option, "off") is False
    with pytest.raises(SystemExit, match="2"):
        value(option, "maybe")
    assert "'maybe' is not auto, on or off" in capsys.readouterr().err
