"""Adapters in, an adapter out, from the command line to the Hub and back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from shared.logs import warned
from shared.lora import logits, reloaded, save_trained
from shared.pushed import held, quick
from shared.training import PARTS, digit_images, image_dataset
from transformers import AutoConfig, AutoModelForImageClassification

import hf_radin
from hf_radin.cli.main import main
from hf_radin.soup.report import SearchReport

__all__ = ["quick"]  # fixtures

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def adapters(start, tmp_path) -> Path:
    """A folder with three adapters of a base that lies beside it."""
    shutil.copytree(start, tmp_path / "base")
    for seed in range(3):
        save_trained(tmp_path / "base", tmp_path / "adapters" / f"ft-{seed}", seed, target_modules=["q_proj"])
    return tmp_path / "adapters"


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """A dataset of sixty images."""
    folder = tmp_path_factory.mktemp("few")
    pixels, labels = digit_images(PARTS["validation"])
    image_dataset(pixels[:60], labels[:60]).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture
def command(adapters, few, tmp_path) -> list[str]:
    places = ["--dataset", str(few), "--cache-dir", str(tmp_path / "cache"), "--output", str(tmp_path / "soup")]
    return ["soup", "--models", f"{adapters}/*", *places]


def assert_is_the_soup(folder: Path) -> None:
    soup = AutoModelForImageClassification.from_pretrained(folder).eval()
    again = reloaded(folder.parent / "base", folder / "adapter")
    torch.testing.assert_close(logits(again, IMAGES), logits(soup, IMAGES), rtol=1e-4, atol=1e-5)


def test_a_soup_is_saved_as_an_adapter_too_and_so_it_is_cooked(command, tmp_path, capsys):
    assert main([*command, "--method", "uniform", "--save-adapter"]) == 0
    assert "adapter of" in (text := capsys.readouterr().out) and "factors up to rank 12 in 2 layers" in text
    assert "classifier is saved whole. The two are equal to rounding." in text
    assert_is_the_soup(tmp_path / "soup")
    assert hf_radin.Soup.from_pretrained(tmp_path / "soup").report.adapter.rank == 12
    cook = ["average", "--recipe", str(tmp_path / "soup"), "--output"]
    assert main([*cook, str(tmp_path / "again"), "--save-adapter"]) == 0
    assert main([*cook, str(tmp_path / "cut"), "--save-adapter", "2"]) == 0
    assert "It was cut to rank 2, which lost " in capsys.readouterr().out
    assert main([*cook, str(tmp_path / "without")]) == 0
    reports = [SearchReport.read(tmp_path / name / "recipe.json") for name in ("soup", "again", "cut", "without")]
    first, again, cut, without = (report.adapter for report in reports)
    assert again == first and cut.limit == 2 and cut.lost > 0 and without is None
    assert not (tmp_path / "without" / "adapter").exists()


def test_last_layers_that_were_taught_are_in_it(command, tmp_path):
    assert main([*command, "--head", "refit", "--save-adapter", "--budget", "2"]) == 0
    assert_is_the_soup(tmp_path / "soup")


def test_it_is_refused_before_anything_is_computed(command, runs, model_calls, adapters, tmp_path, capsys):
    whole = ["soup", "--models", f"{runs}/ft-[01]", *command[3:]]
    assert main([*whole, "--save-adapter"]) == 2
    assert "ft-1 is a LoRA adapter. Leave save_adapter (--save-adapter) out" in capsys.readouterr().err
    mixed = ["soup", "--models", f"{adapters}/*", str(runs / "ft-0"), *command[3:]]
    assert main([*mixed, "--save-adapter", "4"]) == 2
    assert "ft-0 is a whole checkpoint, and no adapter of" in capsys.readouterr().err
    save_trained(tmp_path / "base", adapters / "dora", 7, target_modules=["q_proj"], use_dora=True)
    assert main([*command, "--save-adapter"]) == 2
    assert "dora: it has use_dora, and only plain LoRA" in capsys.readouterr().err
    shutil.rmtree(adapters / "dora")
    start = ["--start", str(runs / "ft-0"), "--proposals", "wise-ft", "--save-adapter"]
    assert main([*command, *start]) == 2
    assert "is no adapter of" in capsys.readouterr().err
    assert not (tmp_path / "soup").exists() and not model_calls


@pytest.mark.parametrize("rank", ["0", "x", "-1", "1.5"])
def test_what_is_no_rank_is_no_option(command, rank, capsys):
    with pytest.raises(SystemExit):
        main([*command, f"--save-adapter={rank}"])
    assert f"{rank!r} is no rank; name one above 0" in capsys.readouterr().err


def test_a_search_that_ends_at_the_base_is_not_lost(command, tmp_path, caplog):
    """The base learnt the digits, and the adapter has its head turned round: the best single model is none."""
    path = tmp_path / "adapters" / "ft-0" / "adapter_model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    command[2:3] = [f"{tmp_path}/adapters/ft-0", str(tmp_path / "base")]
    assert main([*command, "--method", "best_single", "--save-adapter"]) == 0
    assert any("No adapter is saved: " in line and "The soup is saved as it is." in line for line in warned(caplog))
    assert SearchReport.read(tmp_path / "soup" / "recipe.json").adapter is None


def test_a_soup_is_overwritten_with_its_adapter(command, adapters, tmp_path, capsys):
    options = [*command, "--method", "uniform", "--overwrite"]
    assert main([*options, "--save-adapter"]) == 0
    assert main([*options, "--save-adapter", "1"]) == 0
    assert SearchReport.read(tmp_path / "soup" / "recipe.json").adapter.rank == 1
    (tmp_path / "soup" / "adapter" / "notes.txt").write_text("mine")
    assert main(options) == 2 and "and so would 'notes.txt': move it" in capsys.readouterr().err
    (tmp_path / "soup" / "adapter" / "notes.txt").unlink()
    assert main(options) == 0 and not (tmp_path / "soup" / "adapter").exists()


def test_an_adapter_that_is_another_one_is_named(command, tmp_path, capsys):
    assert main([*command, "--method", "uniform", "--save-adapter"]) == 0
    path = tmp_path / "soup" / "adapter" / "adapter_config.json"
    text = path.read_text()
    path.write_text(text.replace('"lora_alpha": 12', '"lora_alpha": 24'))
    assert main(["card", str(tmp_path / "soup")]) == 2
    assert "adapter_config.json is not what was saved" in capsys.readouterr().err
    path.unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json is gone, and recipe\.json records it"):
        hf_radin.Soup.from_pretrained(tmp_path / "soup")
    path.write_text(text)
    soup = hf_radin.Soup.from_pretrained(tmp_path / "soup")
    with pytest.raises(ValueError, match=r"is read as it was saved\. `hf-radin average --recipe .* --save-adapter"):
        soup.save_pretrained(tmp_path / "copy", save_adapter=True)
    soup.save_pretrained(tmp_path / "copy")
    assert_is_the_soup(tmp_path / "copy")


def test_a_push_takes_it_along_and_the_next_one_takes_it_away(hub, quick, command, tmp_path):
    """Without the path of the base, which is of this machine."""
    assert main([*command, "--method", "uniform", "--save-adapter", "--push-to", "org/soup"]) == 0
    files = held(hub, "org/soup")
    options = json.loads(files["adapter/adapter_config.json"])
    assert options["base_model_name_or_path"] == f"{tmp_path.name}/base"
    assert str(tmp_path).encode() not in b"".join(files.values())
    assert b'soup = "org/soup"' in files["README.md"]
    config = AutoConfig.from_pretrained("org/soup")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base", config=config)
    again = PeftModel.from_pretrained(base, "org/soup", subfolder="adapter").eval()
    soup = AutoModelForImageClassification.from_pretrained("org/soup").eval()
    torch.testing.assert_close(logits(again, IMAGES), logits(soup, IMAGES), rtol=1e-4, atol=1e-5)
    assert main(["push", str(tmp_path / "soup"), "org/again"]) == 0
    assert held(hub, "org/again").keys() == files.keys()
    assert main([*command, "--method", "uniform", "--overwrite", "--push-to", "org/soup"]) == 0
    assert not [name for name in held(hub, "org/soup") if name.startswith("adapter/")]
