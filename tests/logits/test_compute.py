"""A bank holds what the models say, computes nothing twice, and survives being killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared.making import make_bank
from shared.timeless import contents, without_times
from shared.training import digit_images, image_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_radin
from hf_radin.search import held_out


def test_logits_are_those_of_the_models(bank, runs, digits):
    import datasets

    rows = datasets.load_dataset(str(digits), split="validation")
    processor = AutoImageProcessor.from_pretrained(runs / "ft-2")
    model = AutoModelForImageClassification.from_pretrained(runs / "ft-2")
    with torch.inference_mode():
        expected = model(**processor([row["image"].convert("RGB") for row in rows], return_tensors="pt")).logits
    np.testing.assert_allclose(bank.logits(2), expected, atol=1e-4)
    assert bank.labels.tolist() == rows["label"]


def test_logits_are_memory_mapped_and_found_by_id(bank):
    assert isinstance(bank.logits(1), np.memmap) and bank.logits(1).shape == (600, 10)
    assert (bank.logits(bank.ingredients.ids[1]) == bank.logits(1)).all()


def test_score_equals_a_dense_computation(bank):
    recipes = np.concatenate([np.eye(5), np.random.default_rng(0).dirichlet(np.ones(5), size=50)])
    logits = np.stack([bank.logits(index) for index in range(5)]).astype(np.float64)
    hits = np.einsum("rm,msc->rsc", recipes, logits).argmax(axis=-1) == bank.labels
    assert (bank.score(recipes) == hits.mean(axis=1)).all()


def test_the_models_learnt_something_and_differ(bank):
    singles = bank.score(np.eye(5))
    assert singles.min() > 0.6 and len(set(singles)) > 2


def test_an_unknown_metric_is_refused(bank):
    with pytest.raises(ValueError, match="The metric 'loss' is none of accuracy"):
        bank.score(np.eye(5), metric="loss")


def test_a_bank_can_be_opened_again(runs, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[034]"), digits, cache_dir=tmp_path)
    again = hf_radin.LogitBank.open(bank.folder)
    assert again.ingredients == bank.ingredients and again.classes == bank.classes
    assert (again.logits(bank.ingredients.ids[2]) == bank.logits(2)).all()
    for path in (bank.folder.parent, "nowhere"):
        with pytest.raises(ValueError, match="is not a logit bank"):
            hf_radin.LogitBank.open(path)


def test_nothing_is_computed_twice_and_new_ingredients_are_added(runs, digits, tmp_path, model_calls, decoded):
    def compute(pattern):
        model_calls.clear(), decoded.clear()
        bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/{pattern}"), digits, cache_dir=tmp_path)
        return bank, sorted(model_calls), len(decoded)

    # a model is tried with an image and shown ten blocks; eight copies of an image show what one takes
    shown = [1, 24, *[64] * 9]
    two, calls, images = compute("ft-[01]")
    assert (calls, images) == (sorted([*shown, *shown, 8]), 1 + 600)
    again, calls, images = compute("ft-[01]")
    assert (calls, images) == ([], 0) and (again.logits(0) == two.logits(0)).all()
    three, calls, images = compute("ft-[012]")
    assert (calls, images) == (sorted([*shown, 8]), 0) and len(three.ingredients) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"split": "test"},
        {"dtype": "bfloat16"},
        {"logits_dtype": "float16"},
        {"on_error": "skip"},
        {"label_column": "label"},
    ],
)
def test_what_changes_the_outcome_changes_the_bank(runs, digits, cache, bank, change):
    other = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=cache, **change)
    assert (other.folder == bank.folder) == (change == {"label_column": "label"})


def test_a_dataset_that_changed_is_not_mixed_with_the_old(runs, digits, tmp_path):
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    ingredients = hf_radin.gather(f"{runs}/ft-[01]")
    before = hf_radin.compute_logits(ingredients, copy, cache_dir=tmp_path / "cache")
    shutil.copy(digits / "data" / "test-00000-of-00001.parquet", copy / "data" / "validation-00000-of-00001.parquet")
    after = hf_radin.compute_logits(ingredients, copy, cache_dir=tmp_path / "cache")
    assert (len(before), len(after)) == (600, 497)


def test_bfloat16_is_near_float32_and_stored_as_float32(bank, digits, cache):
    low = hf_radin.compute_logits(bank.ingredients, digits, dtype="bfloat16", cache_dir=cache)
    assert low.logits(0).dtype == np.float32
    difference = np.abs(low.logits(0) - bank.logits(0)).max()
    assert 0 < difference < 0.5


def test_logits_stored_in_float16_are_those_of_float32_rounded(bank, digits, cache):
    half = hf_radin.compute_logits(bank.ingredients, digits, logits_dtype="float16", cache_dir=cache)
    exact = [bank.logits(index) for index in range(5)]
    assert all((half.logits(index) == exact[index].astype(np.float16)).all() for index in range(5))
    assert half.logits(0).dtype == np.float16 and half.logits(0).nbytes == exact[0].nbytes / 2
    recipes = np.random.default_rng(0).dirichlet(np.ones(5), size=50)
    assert np.abs(half.score(recipes) - bank.score(recipes)).max() < 3 / 600
    single = hf_radin.best_single(half)
    assert hf_radin.LogitBank.open(half.folder).options.logits_dtype == "float16"
    assert single.accuracy("soup", "validation") == half.score(np.eye(5)).max()


def test_what_float16_can_not_hold_is_no_logit(runs, two, digits, tmp_path, caplog):
    shutil.copytree(runs / "ft-2", two / "ft-2")
    spoil(two / "ft-1", lambda tensors: tensors["classifier.bias"][:1].fill_(1e5))
    bank = hf_radin.compute_logits(hf_radin.gather(f"{two}/*"), digits, logits_dtype="float16", cache_dir=tmp_path)
    assert [Path(name).name for name in bank.ingredients.ids] == ["ft-0", "ft-2"]
    assert "ft-1 give NaN or infinite logits: left out" in caplog.text


@pytest.mark.parametrize("kind", ["bfloat16", "float64", None])
def test_other_kinds_of_logits_are_refused(bank, digits, tmp_path, kind):
    with pytest.raises(ValueError, match="it is 'float32' or 'float16'"):
        hf_radin.compute_logits(bank.ingredients, digits, logits_dtype=kind, cache_dir=tmp_path)


@pytest.mark.parametrize("knob", ["channels_last", "torch_compile"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_what_switches_nothing_on_or_off_is_refused(bank, digits, tmp_path, model_calls, knob, value):
    with pytest.raises(ValueError, match=f"{knob}={value!r}: it is 'auto', True or False"):
        hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path, **{knob: value})
    assert not model_calls


def spoil(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_nan_logits_leave_the_ingredient_out_with_a_warning(runs, two, digits, tmp_path, caplog):
    shutil.copytree(runs / "ft-2", two / "ft-2")
    spoil(two / "ft-1", lambda tensors: tensors["vit.layernorm.weight"].fill_(3e38))  # the logits overflow
    bank = hf_radin.compute_logits(hf_radin.gather(f"{two}/*"), digits, cache_dir=tmp_path)
    assert [Path(name).name for name in bank.ingredients.ids] == ["ft-0", "ft-2"]
    assert "ft-1 give NaN or infinite logits: left out" in caplog.text
    assert len(hf_radin.LogitBank.open(bank.folder).ingredients) == 2


def test_what_overflows_in_half_precision_is_a_number_in_float32(runs, two, digits, tmp_path):
    shutil.copytree(runs / "ft-2", two / "ft-2")
    spoil(two / "ft-1", lambda tensors: tensors["classifier.bias"][:1].fill_(1e5))
    ingredients = hf_radin.gather(f"{two}/*")
    banks = [
        hf_radin.compute_logits(ingredients, digits, dtype=dtype, cache_dir=tmp_path) for dtype in ("float16", None)
    ]
    assert [len(bank.ingredients) for bank in banks] == [2, 3]


def test_a_sample_of_weights_that_is_broken_is_taken_anew(two, digits, tmp_path):
    ingredients = hf_radin.gather(f"{two}/*")
    hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path)
    first, second = sorted((tmp_path / "weights").iterdir())
    first.write_bytes(b"broken")
    second.unlink()
    assert len(hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path)) == 600
    assert first.stat().st_size > 1000 and second.stat().st_size > 1000


def test_recipes_are_scored_as_they_are(bank):
    recipes = [hf_radin.Recipe.uniform(bank.ingredients.ids[:2]), hf_radin.Recipe.uniform(bank.ingredients.ids)]
    rows = np.stack([bank.row(recipe) for recipe in recipes])
    assert bank.score(recipes).tolist() == bank.score(rows).tolist()
    assert bank.score(recipes[0]).tolist() == bank.score(rows[:1]).tolist()
    with pytest.raises(ValueError, match="No ingredient 'other'"):
        bank.score(hf_radin.Recipe.uniform(["other"]))


def test_a_bank_that_was_never_finished_is_not_opened(two, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{two}/*"), digits, cache_dir=tmp_path)
    (bank.folder / "latest.json").unlink()
    with pytest.raises(ValueError, match=r"no computation of it was finished"):
        hf_radin.LogitBank.open(bank.folder)
    (bank.folder / "latest.json").write_text("null")
    with pytest.raises(ValueError, match="is not a complete logit bank"):
        hf_radin.LogitBank.open(bank.folder)


def test_and_an_error_if_fewer_than_two_remain(two, digits, tmp_path):
    spoil(two / "ft-1", lambda tensors: tensors["vit.layernorm.weight"].fill_(3e38))
    with pytest.raises(ValueError, match=r"ft-1 give NaN or infinite logits, .*: 1 of 2 are left"):
        hf_radin.compute_logits(hf_radin.gather(f"{two}/*"), digits, cache_dir=tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("classifier.weight"),
        lambda tensors: tensors.update({"classifier.weight": torch.zeros(9, 32)}),
    ],
)
def test_a_missing_or_misshapen_head_is_refused_before_an_image_is_read(two, digits, tmp_path, change):
    spoil(two / "ft-1", change)
    with pytest.raises(ValueError, match=r"ft-1: no weights for classifier\.weight"):
        hf_radin.compute_logits(hf_radin.gather(f"{two}/*"), digits, cache_dir=tmp_path)
    assert not list(tmp_path.glob("pixels/**/*.safetensors"))


SCRIPT = """
import sys
import hf_radin
from shared.making import make_bank
bank = make_bank(sys.argv[1] + "/ft-*", sys.argv[2], sys.argv[3], block_size=16)
soup = hf_radin.radin(bank, budget=6)
soup.save_pretrained(sys.argv[4], overwrite=True)
"""

# Starts the same run again and again, each in a process of its own that has all imports behind it, and kills it at
# random moments. Says how often it killed, and how long an undisturbed run lasts. Each finished block is logged.
KILLING = """
import os, random, signal, sys, time
from pathlib import Path
import datasets, hf_radin.search.radin, transformers
from hf_radin.runtime import schema
from shared.making import make_bank

runs, digits, folder, kills, seed = sys.argv[1:]
generator = random.Random(int(seed))

def run(name):
    write = schema.write_to_cache
    log = os.open(f"{folder}/{name}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    def logged(path, fill, **options):
        write(path, fill, **options)
        os.write(log, f"{path}\\n".encode())
    schema.write_to_cache = logged
    bank = make_bank(runs + "/ft-*", digits, f"{folder}/{name}", block_size=16)
    hf_radin.radin(bank, budget=6).save_pretrained(f"{folder}/{name}-soup", overwrite=True)

def start(name, seconds):
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            run(name)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    while time.monotonic() - begun < seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, status
            return None
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return time.monotonic() - begun

begun = time.monotonic()
start("whole", 600)
lasts = time.monotonic() - begun
killed = finished = 0
while killed < int(kills):
    if start(f"killed-{finished}", generator.uniform(0, lasts / 3)) is None:
        finished += 1
    else:
        killed += 1
start(f"killed-{finished}", 600)
"""


# So that scripts find what tests share.
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))}


def test_a_run_that_is_killed_and_resumed_ends_as_one_that_was_not(runs, digits, tmp_path):
    arguments = [sys.executable, "-W", "ignore", "-c", KILLING, runs, digits, tmp_path, 20, 0]
    run = subprocess.run(map(str, arguments), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 0, run.stderr
    expected = contents(tmp_path / "whole")
    blocks = blocks_written(tmp_path / "whole.log")
    assert len(blocks) == 6 * 38  # all that there are: of the models, and the features of the soup
    caches = [path for path in tmp_path.glob("killed-*") if path.name.removeprefix("killed-").isdigit()]
    assert caches
    for cache in caches:
        files = contents(cache)  # a killed writer leaves a dot file
        assert {name: file for name, file in files.items() if not Path(name).name.startswith(".")} == expected
        recipes = [without_times(tmp_path / f"{name}-soup" / "recipe.json") for name in ("whole", cache.name)]
        assert recipes[0] == recipes[1]
        lines = blocks_written(tmp_path / f"{cache.name}.log")
        assert len(lines) == len(set(lines)) >= len(blocks) - 20  # none twice; a kill may come before the log


def blocks_written(log: Path) -> list[str]:
    """The files of blocks of logits that a log names."""
    return [line for line in log.read_text().splitlines() if ".parts/" in line]


@pytest.mark.parametrize("opened", [False, True])
def test_pixels_that_are_gone_are_prepared_anew_where_a_soup_needs_them(runs, digits, tmp_path, opened):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01]"), digits, cache_dir=tmp_path)
    before = contents(tmp_path / "pixels")
    shutil.rmtree(tmp_path / "pixels")
    hf_radin.uniform(hf_radin.LogitBank.open(bank.folder) if opened else bank)
    assert contents(tmp_path / "pixels") == before


def test_pixels_of_an_object_can_only_be_prepared_anew_while_it_is_there(runs, digits, tmp_path):
    import datasets

    rows = datasets.load_dataset(str(digits), split="validation")
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01]"), rows, cache_dir=tmp_path)
    shutil.rmtree(tmp_path / "pixels")
    with pytest.raises(ValueError, match=r"is gone, or parts of it; run compute_logits again"):
        hf_radin.uniform(hf_radin.LogitBank.open(bank.folder))
    hf_radin.uniform(bank)


def test_a_dataset_that_changed_does_not_pass_for_the_one_that_is_gone(runs, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "digits")
    cache = tmp_path / "cache"
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01]"), tmp_path / "digits", cache_dir=cache)
    shutil.rmtree(cache / "pixels")
    (tmp_path / "digits" / "more.txt").touch()
    with pytest.raises(ValueError, match=r"digits has changed since the logits in .* compute them again"):
        hf_radin.uniform(hf_radin.LogitBank.open(bank.folder))


def test_blocks_do_not_change_the_logits(digits, bank, tmp_path):
    small = make_bank(bank.ingredients.select(bank.ingredients.ids[:2]), digits, tmp_path, block_size=7)
    assert len(small.blocks) == 86 and len(bank.blocks) == 10
    np.testing.assert_allclose(small.logits(1), bank.logits(1), atol=1e-5)
    assert small.ids.tolist() == bank.ids.tolist()


def test_an_opened_bank_is_computed_for_another_split_under_the_same_settings(bank):
    again = hf_radin.LogitBank.open(bank.folder)
    test = held_out.bank_of_split(again, "test")
    assert len(test) == 497 and test.folder.parent == bank.folder.parent
    assert test.manifest.run == bank.manifest.run and test.manifest.batch_size == bank.manifest.batch_size


def test_a_block_of_pixels_that_is_gone_is_prepared_again(runs, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01]"), digits, cache_dir=tmp_path)
    block = next(tmp_path.glob("pixels/*/block-00000-000001.safetensors"))
    before = block.read_bytes()
    block.unlink()
    hf_radin.uniform(bank)
    assert block.read_bytes() == before


def test_a_model_that_does_not_take_what_the_processor_makes_is_named_first(two, digits, tmp_path):
    for name in ("ft-0", "ft-1"):
        path = two / name / "preprocessor_config.json"
        path.write_text(path.read_text().replace("8", "16"))
    with pytest.raises(ValueError, match=r"ft-[01]: its model can't be run .*16\*16"):
        hf_radin.compute_logits(hf_radin.gather(f"{two}/*"), digits, cache_dir=tmp_path)
    assert not list(tmp_path.glob("pixels/*/*"))


def test_two_runs_at_once_end_as_one(runs, digits, tmp_path):
    arguments = [sys.executable, "-c", SCRIPT, runs, digits, tmp_path / "cache"]
    both = [
        subprocess.Popen(map(str, [*arguments, tmp_path / name]), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    errors = [run.communicate()[1] for run in both]
    assert [run.returncode for run in both] == [0, 0], errors
    assert without_times(tmp_path / "a" / "recipe.json") == without_times(tmp_path / "b" / "recipe.json")
    assert not list(tmp_path.glob("cache/banks/*/logits/*.parts"))


@pytest.mark.parametrize("given", [0, 1])
def test_one_ingredient_is_refused_before_anything_runs(bank, digits, tmp_path, given):
    with pytest.raises(ValueError, match=f"at least two ingredients; {given} were given"):
        hf_radin.compute_logits(bank.ingredients[:given], digits, cache_dir=tmp_path)


def test_a_folder_is_the_same_by_any_name(bank, digits, cache, monkeypatch):
    monkeypatch.chdir(digits.parent)
    assert hf_radin.compute_logits(bank.ingredients, f"./{digits.name}", cache_dir=cache).folder == bank.folder


def test_a_bank_does_not_follow_the_process_to_another_folder(runs, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(digits.parent)
    bank = hf_radin.compute_logits(
        hf_radin.gather(f"{runs}/ft-[01]"), digits.name, cache_dir=os.path.relpath(tmp_path / "cache")
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for opened in (bank, hf_radin.LogitBank.open(bank.folder)):
        assert len(held_out.bank_of_split(opened, "test")) == 497


def test_checkpoints_that_moved_are_found_again_and_lost_ones_left_out(runs, two, digits, tmp_path, caplog):
    shutil.copytree(runs / "ft-2", two / "ft-2")
    hf_radin.compute_logits(hf_radin.gather(f"{two}/*"), digits, cache_dir=tmp_path / "cache")
    two.rename(tmp_path / "moved")
    bank = hf_radin.compute_logits(hf_radin.gather(f"{tmp_path}/moved/*"), digits, cache_dir=tmp_path / "cache")
    shutil.rmtree(tmp_path / "moved" / "ft-1")
    again = hf_radin.LogitBank.open(bank.folder)
    assert [Path(name).name for name in again.ingredients.ids] == ["ft-0", "ft-2"]
    assert "ft-1 is left out of the bank" in caplog.text
    assert hf_radin.radin(again, budget=1)
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(ValueError, match=rf"None of the checkpoints of the bank {bank.folder} is where and what"):
        hf_radin.LogitBank.open(bank.folder)


def test_a_pilot_of_no_image_is_refused(bank, tmp_path):
    few = image_dataset(*digit_images(slice(700, 705)))
    with pytest.raises(ValueError, match=r"^pilot=0\.001: that is none of 5 images\.$"):
        hf_radin.compute_logits(bank.ingredients, few, cache_dir=tmp_path, pilot=0.001)


WIDE = """
import torch
from transformers import ViTForImageClassification

class WideModel(ViTForImageClassification):
    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = torch.cat([output.logits] * 2, dim=1)
        return output
"""


def test_a_model_of_more_logits_than_classes_is_refused(two, digits, tmp_path):
    """Its code is its own."""
    for folder in two.iterdir():
        (folder / "wide.py").write_text(WIDE)
        fields = {"architectures": ["WideModel"], "auto_map": {"AutoModelForImageClassification": "wide.WideModel"}}
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    gathered = hf_radin.gather(f"{two}/*", trust_remote_code=True)
    with pytest.raises(ValueError, match=r"ft-[01] gives 20 logits, but its id2label names 10\."):
        hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path)
