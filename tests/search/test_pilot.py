"""Logits of a part of the split say which others tell recipes apart; soups are measured on all of it."""

import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from shared.banks import as_kind
from shared.training import PARTS, digit_images, image_dataset
from shared.zoo import LEADING, zoo, zoo_bank, zoo_pilot

import hf_radin
from hf_radin.cli import tables
from hf_radin.images.sample import Pilot
from hf_radin.logits.bank_files import LogitsRecord
from hf_radin.logits.compute import NOT_FINITE
from hf_radin.logits.manifest import BankManifest
from hf_radin.recipes.pruning import MOST, Pruned, TooMuchLeftError
from hf_radin.runtime.schema import write_arrays
from hf_radin.search.pilot import clear_margin, complete

__all__ = ["zoo", "zoo_bank", "zoo_pilot"]  # fixtures


@pytest.fixture(scope="module")
def pilot(bank, digits, cache):
    """Of five ingredients, which are few: all see all images in the end."""
    return hf_radin.compute_logits(bank.ingredients, digits, cache_dir=cache, pilot=0.25)


@pytest.fixture(scope="module")
def untouched(zoo, digits, tmp_path_factory):
    """A pilot in a cache where no other logits are, so that nobody completes it without running a model."""
    return hf_radin.compute_logits(zoo, digits, cache_dir=tmp_path_factory.mktemp("untouched"), pilot=0.25)


def banks_in(cache: Path) -> dict[Path, BankManifest]:
    """The manifests of the banks in a cache, by folder."""
    return {path.parent: BankManifest.read(path.parent) for path in cache.glob("banks/*/bank.json")}


def test_its_logits_are_those_of_the_images_that_were_drawn(pilot, bank):
    assert len(pilot) == pytest.approx(150, abs=10) and pilot.samples == 600 and pilot.is_pilot
    assert (pilot.labels == bank.labels[pilot.places]).all() and (pilot.ids == bank.ids[pilot.places]).all()
    for index in range(5):
        np.testing.assert_allclose(pilot.logits(index), bank.logits(index)[pilot.places], atol=1e-4)
    assert pilot.folder != bank.folder and pilot.images.folder == bank.images.folder


def test_it_is_the_same_for_any_blocks_size_of_groups_and_opened_again(pilot, bank, digits, tmp_path):
    again = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path, pilot=0.25, models_in_memory=2)
    opened = hf_radin.LogitBank.open(again.folder)
    for other in (again, opened):
        assert (other.places == pilot.places).all()
        assert all((other.logits(index) == pilot.logits(index)).all() for index in range(5))
    assert hf_radin.radin(opened, budget=2).measurements == hf_radin.radin(pilot, budget=2).measurements


def test_most_see_only_the_images_that_tell_recipes_apart(zoo_pilot):
    bank, report = complete(zoo_pilot)
    assert not bank.is_pilot and len(bank) == 600 and bank.ingredients.ids == zoo_pilot.ingredients.ids
    unseen, whole = bank.partial.unseen, bank.partial.complete
    drawn = len(zoo_pilot)
    assert 0 < len(unseen) < 600 - drawn and not {*unseen} & {*zoo_pilot.places}
    assert (report.share, report.seed, report.given, report.leading, report.whole) == (0.25, 0, 6, LEADING, whole)
    assert report.shown == 600 - len(unseen) and report.margin > 0 and report.drawn == drawn
    further = len(whole) - LEADING  # the best single model may be none of those that lead
    expected = 6 * drawn + 3 * 600 + 3 * (600 - drawn - len(unseen)) + further * len(unseen)
    assert report.passes == pytest.approx(expected / 600)


def test_what_is_known_is_what_all_logits_say_and_elsewhere_what_the_leading_agree_on(zoo_pilot, zoo_bank):
    bank, report = complete(zoo_pilot)
    unseen = bank.partial.unseen
    shown = np.setdiff1d(np.arange(600), unseen)
    recipes = np.random.default_rng(0).dirichlet(np.ones(6), size=50)
    for row in recipes:
        assert (bank.predict(row)[shown] == zoo_bank.predict(row)[shown]).all()
    leading = report.whole[:LEADING]
    agreed, *others = [zoo_bank.predict(zoo_bank.row(hf_radin.Recipe.uniform([name]))) for name in leading]
    assert len(unseen) and all((agreed[unseen] == other[unseen]).all() for other in others)
    assert all((bank.predict(row)[unseen] == agreed[unseen]).all() for row in recipes)
    for name in report.whole:
        row = zoo_bank.row(hf_radin.Recipe.uniform([name]))
        assert (bank.predict(row) == zoo_bank.predict(row)).all()
    logits = np.stack([np.asarray(zoo_bank.logits(name))[unseen] for name in leading])
    ahead = np.diff(np.sort(logits, axis=2)[:, :, -2:], axis=2)
    assert ahead.min() >= report.margin - 1e-4


def test_where_all_images_tell_recipes_apart_it_is_the_search_with_all_logits(runs, digits, tmp_path):
    """Half of the ingredients are the others with the sign of the head turned round: any two of them disagree."""
    for name in ("ft-0", "ft-1", "ft-2"):
        shutil.copytree(runs / name, tmp_path / "runs" / name)
        spoilt = shutil.copytree(runs / name, tmp_path / "runs" / f"{name}-spoilt") / "model.safetensors"
        tensors = load_file(spoilt).items()
        save_file({key: -value if "classifier" in key else value for key, value in tensors}, spoilt, {"format": "pt"})
    ingredients, options = hf_radin.gather(f"{tmp_path}/runs/*"), {"cache_dir": tmp_path, "strangers": "keep"}
    pilot = hf_radin.compute_logits(ingredients, digits, pilot=0.25, **options)
    soup = hf_radin.radin(pilot, budget=3, seed=2, head="average")
    other = hf_radin.radin(hf_radin.compute_logits(ingredients, digits, **options), budget=3, seed=2, head="average")
    assert soup.report.pilot.margin is None and soup.report.pilot.shown == 600
    assert len(soup.report.pilot.whole) == LEADING
    assert soup.recipe == other.recipe and soup.results == other.results
    assert soup.measurements == other.measurements
    assert soup.report.passes.logits == pytest.approx(6 + LEADING * len(pilot) / 600)


def test_few_ingredients_all_see_all_images(pilot, bank):
    soup, other = (hf_radin.radin(known, budget=3, seed=2, head="average") for known in (pilot, bank))
    assert soup.report.pilot.whole == bank.ingredients.ids
    assert (soup.recipe, soup.measurements, soup.results) == (other.recipe, other.measurements, other.results)
    assert soup.report.passes.logits == pytest.approx(5 + 5 * len(pilot) / 600)


def test_the_figures_are_of_the_whole_split_and_a_held_out_one_takes_few_logits(zoo, digits, tmp_path):
    pilot = hf_radin.compute_logits(zoo, digits, cache_dir=tmp_path, pilot=0.25)
    soup = hf_radin.radin(pilot, budget=3, test_split="test")
    rows = {(row.name, row.split): row.images for row in soup.results}
    assert rows["soup", "validation"] == rows["best single", "validation"] == 600
    assert rows["ensemble", "validation"] == soup.report.pilot.shown < 600
    assert rows["soup", "test"] == rows["best single", "test"] == 497 and ("ensemble", "test") not in rows
    whole = soup.report.pilot.whole
    (proving,) = (folder for folder, manifest in banks_in(tmp_path).items() if manifest.data.split == "test")
    assert {path.stem for path in proving.glob("logits/*.json")} == {*zoo.select(whole).keys}
    assert soup.report.held_out_logits == len(whole) < 6
    singles = {entry.recipe.ingredients[0]: entry.images for entry in soup.report.singles}
    assert len(singles) == 6 and all((images == 600) == (name in whole) for name, images in singles.items())
    (chosen,) = (entry for entry in soup.measurements if entry.recipe == soup.recipe)
    assert chosen.images == 600


def led_by_the_worst(pilot: hf_radin.LogitBank, whole: hf_radin.LogitBank) -> hf_radin.LogitBank:
    """A pilot that takes the models that are worst on the whole split for the best."""
    hits = [whole.predict(row) == whole.labels for row in np.eye(len(whole.ingredients))]
    known = dict(zip(whole.ingredients.ids, np.mean(hits, axis=1), strict=True))

    class Worst(hf_radin.LogitBank):
        def score(self, recipes, **options):
            return -np.asarray(recipes) @ [known[name] for name in self.ingredients.ids]

    return as_kind(pilot, Worst)


def test_the_best_single_model_is_known_on_all_images(zoo_pilot, zoo_bank):
    """Whichever lead: here those that are worst."""
    bank, report = complete(led_by_the_worst(zoo_pilot, zoo_bank))
    singles = [(zoo_bank.predict(row) == zoo_bank.labels).mean() for row in np.eye(6)]
    best = zoo_bank.ingredients.ids[int(np.argmax(singles))]
    assert best in report.whole[LEADING:]
    row = zoo_bank.row(hf_radin.Recipe.uniform([best]))
    assert (bank.predict(row) == zoo_bank.predict(row)).all()


def test_of_images_that_nobody_was_shown_some_things_are_not_known(zoo_pilot):
    bank, _ = complete(zoo_pilot)
    with pytest.raises(ValueError, match="After a pilot only the best class of these images is known"):
        bank.pruned(5)
    with pytest.raises(ValueError, match="After a pilot the logits of these images are not all known"):
        bank.score(np.eye(6), "log_loss")


def test_without_measuring_recipes_are_estimated(pilot):
    soup = hf_radin.radin(pilot, budget=0, unmeasured=True)
    assert soup.measurements[-1].measured is None and soup.report.measured is False


def test_what_was_not_computed_is_estimated_without_a_bias(zoo_bank, digits, cache):
    """By the images of the pilot on which the leading agree as clearly: over pilots, the errors are on both sides."""
    true = [float((zoo_bank.predict(row) == zoo_bank.labels).mean()) for row in np.eye(6)]
    errors, assumed, inside = [], [], []
    for seed in range(12):
        pilot = hf_radin.compute_logits(zoo_bank.ingredients, digits, cache_dir=cache, pilot=Pilot(0.25, seed))
        bank, _ = complete(pilot)
        for place, name in enumerate(zoo_bank.ingredients.ids):
            if name not in bank.partial.complete:
                hits = bank.predict(np.eye(6)[place]) == zoo_bank.labels
                value, (low, high) = bank.partial.estimate(hits)
                errors.append(value - true[place])
                assumed.append(float(hits.mean()) - true[place])
                inside.append(low <= true[place] <= high)
    assert len(errors) > 20 and np.mean(inside) > 0.9
    assert abs(np.mean(errors)) < 0.005 < np.mean(assumed)  # taking what the leading say for theirs is too good


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1, True, "0.2", float("nan")])
def test_a_share_that_is_none_is_refused(bank, digits, tmp_path, share):
    with pytest.raises(ValueError, match="it is the share of the split that logits are computed of"):
        hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path, pilot=share)
    assert not list(tmp_path.iterdir())


def test_what_takes_all_logits_says_so(pilot):
    for method in (hf_radin.greedy, hf_radin.uniform, hf_radin.best_single):
        with pytest.raises(ValueError, match="compute them without pilot, or use radin"):
            method(pilot)
    with pytest.raises(ValueError, match=r"hold_out=0\.2: the images of a pilot say which others are looked at"):
        hf_radin.radin(pilot, hold_out=0.2)
    with pytest.raises(ValueError, match=r"a part of the split \(pilot\) can't be published"):
        pilot.push_to_hub("org/bank")


class Poor(hf_radin.LogitBank):
    """Gives all ensembles a low score."""

    def score(self, recipes, *args, **options):
        return np.full(len(super().score(recipes, *args, **options)), 0.01)


def test_estimates_of_a_pilot_are_compared_with_singles(pilot):
    assert len(hf_radin.radin(pilot, budget=0, unmeasured=True).recipe.used) > 1
    assert len(hf_radin.radin(as_kind(pilot, Poor), budget=0, unmeasured=True).recipe.used) == 1


def test_the_card_says_what_was_not_computed(zoo_pilot, tmp_path):
    soup = hf_radin.radin(zoo_pilot, budget=2, test_split="test")
    soup.save_pretrained(tmp_path / "soup")
    text = " ".join((tmp_path / "soup" / "README.md").read_text().split())
    shown, whole = soup.report.pilot.shown, len(soup.report.pilot.whole)
    assert (
        f"Each checkpoint was run on a random 25% of the 600 images of validation first, and {whole} of 6 then on all"
        in text
    )
    assert f"saw {shown} images. On the remaining {600 - shown} the best {LEADING} agree, so clearly" in text
    soups = 2 if len(soup.recipe.used) > 1 else 1
    assert f"| the figures on test, in passes over it | {whole + soups} | |" in text
    assert f"{whole} of 6 ingredients were run on all 600 images: what the others" in tables.soup_table(soup)
    hf_radin.radin(zoo_pilot, budget=0, unmeasured=True).save_pretrained(tmp_path / "estimated")
    assert "The images that chose are a random 25% of the split" in (tmp_path / "estimated" / "README.md").read_text()


def test_a_bank_that_was_opened_goes_on(bank, digits, tmp_path):
    """Of a folder by itself; of a Dataset object it needs the object."""
    made = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path, pilot=0.25)
    opened = hf_radin.LogitBank.open(made.folder)
    assert hf_radin.radin(opened, budget=1).measurements == hf_radin.radin(made, budget=1).measurements


class Overfull(hf_radin.LogitBank):
    """Too many classes can win."""

    def pruned(self, top: int = 1) -> Pruned:
        raise TooMuchLeftError


class Nearly(hf_radin.LogitBank):
    """Half of what memory may hold is left, of a quarter of the images: of all of them it will be twice that."""

    def pruned(self, top: int = 1) -> Pruned:
        return replace(super().pruned(top), logits=np.broadcast_to(np.float32(0), MOST // 8))


@pytest.mark.parametrize("kind", [Overfull, Nearly])
def test_where_too_many_classes_can_win_it_is_said_before_a_model_runs(untouched, predictions, kind):
    with pytest.raises(ValueError, match="too many classes that can win to say"):
        hf_radin.radin(as_kind(untouched, kind), budget=2)
    assert not predictions


@pytest.mark.parametrize(
    ("options", "message"),
    [({"test_split": "nosuch"}, "nosuch"), ({"metrics": ("nosuch",)}, "nosuch"), ({"test_split": None}, "pilot")],
)
def test_what_can_not_be_is_refused_before_further_logits(untouched, predictions, options, message):
    options = {"test_split": untouched} if "pilot" in message else options
    with pytest.raises(ValueError, match=message):
        hf_radin.radin(untouched, budget=2, **options)
    assert not predictions


def test_without_measuring_the_held_out_split_is_whole(pilot):
    soup = hf_radin.radin(pilot, budget=0, unmeasured=True, test_split="test")
    assert {row.images for row in soup.results if row.split == "test"} == {497}


@pytest.mark.parametrize(("leading", "count"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_ingredients_that_are_lost_on_further_images_are_named(zoo, digits, tmp_path, leading, count):
    """Their logits are numbers on the pilot, and on other images they are not: the records of these say so."""
    pilot = hf_radin.compute_logits(zoo, digits, cache_dir=tmp_path, pilot=0.1)
    whole = hf_radin.radin(pilot, budget=1).report.pilot.whole[:LEADING]
    lost = [name for name in zoo.ids if (name in whole) == leading][:count]
    (folder,) = (
        folder
        for folder, manifest in banks_in(tmp_path).items()
        if manifest.pilot is None and manifest.chosen != leading
    )
    for key in zoo.select(lost).keys:
        replace(LogitsRecord.read(folder, folder.name, key), finite=False).write(folder, folder.name, key)
    soup = hf_radin.radin(pilot, budget=1)
    assert len(lost) == count and {(name, NOT_FINITE) for name in lost} <= {*soup.report.remarks}
    assert soup.report.pilot.given == 6 and len(soup.report.ingredients) == 6 - count
    assert not {*lost} & {*soup.recipe.used}
    recipe = hf_radin.Recipe.uniform([lost[0], soup.report.ingredients[0].id])
    with pytest.raises(ValueError, match=r"which a recipe uses or is the start, gives NaN or infinite logits"):
        hf_radin.radin(pilot, budget=1, recipes=[recipe])


def lose(folder: Path, keys: tuple[str, ...]) -> None:
    """As if logits of these ingredients were no numbers."""
    for key in keys:
        replace(LogitsRecord.read(folder, folder.name, key), finite=False).write(folder, folder.name, key)


def test_where_nearly_all_are_lost_on_further_images_it_is_said_why(zoo, digits, tmp_path):
    pilot = hf_radin.compute_logits(zoo, digits, cache_dir=tmp_path, pilot=0.1)
    leading = zoo.select(hf_radin.radin(pilot, budget=1).report.pilot.whole[:LEADING]).keys
    others = tuple(key for key in zoo.keys if key not in leading)
    banks = banks_in(tmp_path)
    (first,) = (folder for folder, manifest in banks.items() if manifest.pilot is None and not manifest.chosen)
    lose(first, leading[1:])
    hf_radin.radin(pilot, budget=1)  # one is enough to tell which images the others have to see
    (further,) = banks_in(tmp_path).keys() - banks
    lose(further, others)
    with pytest.raises(ValueError, match=r"^A soup needs two ingredients; 1 are left: .*gives NaN or infinite logits"):
        hf_radin.radin(pilot, budget=1)
    lose(first, leading)
    with pytest.raises(ValueError, match=r"^The best of the ingredients can't be used: .*gives NaN or infinite log"):
        hf_radin.radin(pilot, budget=1)


def test_a_pilot_of_a_dataset_object_needs_the_object_again(bank, digits, tmp_path):
    data = datasets.load_dataset("parquet", data_dir=str(digits / "data"), split="validation")
    data = data.cast_column("image", datasets.Image()) if "image" in data.column_names else data
    made = hf_radin.compute_logits(bank.ingredients, data, cache_dir=tmp_path, pilot=0.25)
    with pytest.raises(ValueError, match="the other images take the object again"):
        hf_radin.radin(hf_radin.LogitBank.open(made.folder), budget=1)
    assert hf_radin.radin(made, budget=1).recipe


def test_a_pilot_that_saves_nothing_says_so(bank, digits, cache, caplog):
    hf_radin.compute_logits(bank.ingredients[:3], digits, cache_dir=cache, pilot=0.25)
    assert "pilot=0.25 saves nothing: the logits of 3 ingredients take 3.75 passes with it" in caplog.text


def test_images_that_a_pilot_chose_are_no_bank_of_their_own(zoo, digits, tmp_path):
    complete(hf_radin.compute_logits(zoo, digits, cache_dir=tmp_path, pilot=0.25))
    (folder,) = (folder for folder, manifest in banks_in(tmp_path).items() if manifest.chosen)
    with pytest.raises(ValueError, match="has logits of images that a pilot chose; open the folder of the pilot"):
        hf_radin.LogitBank.open(folder)


@pytest.mark.parametrize(
    ("margins", "astray", "least"),
    [
        ([3.0, 2.0, 1.0], [0, 0, 0], 1.0),
        ([3.0, 2.0, 1.0], [0, 0, 1], 2.0),
        ([3.0, 2.0, 2.0, 1.0], [0, 0, 1, 0], 3.0),  # equal margins stand or fall together
        ([3.0, 2.0, 1.0], [1, 1, 1], np.inf),
        ([3.0, 0.0], [0, 0], 3.0),  # 0: they don't agree
        ([], [], np.inf),
    ],
)
def test_the_least_margin_is_the_first_from_which_on_few_recipes_go_astray(margins, astray, least):
    assert clear_margin(np.array(margins), np.array(astray, dtype=float)) == least


def test_a_best_single_model_that_gives_no_numbers_on_further_images_is_left_out(zoo, zoo_bank, digits, tmp_path):
    """Nothing is known of it there until it turns out to be the best of all; here none of those that lead is."""
    pilot = led_by_the_worst(hf_radin.compute_logits(zoo, digits, cache_dir=tmp_path, pilot=0.25), zoo_bank)
    bank, report = complete(pilot)
    (best,) = report.whole[LEADING:]
    (path,) = bank.folder.glob("soups/*.npz")  # of the one model that was run on the unseen images
    write_arrays(path, {"array": np.full(600, -1)}, f"{bank.manifest.key} {path.name}")
    bank, report = complete(pilot)
    assert (best, NOT_FINITE) in bank.remarks and best not in bank.ingredients.ids
    assert report.given == 6 and len(bank.ingredients) == 5 and best not in report.whole
    leading = report.whole[:LEADING]
    assert leading == tuple(name for name in bank.ingredients.ids if name in leading)


def test_images_that_have_changed_since_are_refused_before_a_model_runs(bank, digits, tmp_path, predictions):
    shutil.copytree(digits, tmp_path / "data")
    made = hf_radin.compute_logits(bank.ingredients, tmp_path / "data", cache_dir=tmp_path / "cache", pilot=0.25)
    (path,) = (tmp_path / "data" / "data").glob("validation*.parquet")
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "hf"))
    rows.select(range(len(rows) - 1, -1, -1)).to_parquet(path)
    predictions.clear()
    for pilot in (made, hf_radin.LogitBank.open(made.folder)):
        with pytest.raises(ValueError, match=r"has changed since the logits in .* were computed; compute them again"):
            hf_radin.radin(pilot, budget=2)
    assert not predictions


def test_images_of_an_object_that_has_changed_are_refused(bank, tmp_path):
    """A stream may give other images each time."""
    split = image_dataset(*digit_images(PARTS["validation"]))
    rows = list(split)

    def read():
        yield from rows

    stream = datasets.IterableDataset.from_generator(read, features=split.features)
    pilot = hf_radin.compute_logits(bank.ingredients, stream, cache_dir=tmp_path, pilot=0.25)
    del rows[-1]
    with pytest.raises(ValueError, match="The images have changed since the logits of a part of them were computed"):
        hf_radin.radin(pilot, budget=2)


def test_another_precision_is_refused_before_a_model_runs(untouched, predictions, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    manifest = untouched.manifest
    other = replace(untouched, manifest=replace(manifest, run=replace(manifest.run, mixed_precision="bf16")))
    with pytest.raises(ValueError, match="computed with mixed precision 'bf16', this run has 'no'"):
        hf_radin.radin(other, budget=2)
    assert not predictions


def test_what_a_folder_was_last_for_stays(zoo, digits, tmp_path):
    whole = hf_radin.compute_logits(zoo, digits, cache_dir=tmp_path)
    hf_radin.radin(hf_radin.compute_logits(zoo, digits, cache_dir=tmp_path, pilot=0.25), budget=1)
    assert hf_radin.LogitBank.open(whole.folder).ingredients.ids == zoo.ids


def test_where_all_saw_all_images_the_card_says_so(pilot, tmp_path):
    hf_radin.radin(pilot, budget=1).save_pretrained(tmp_path / "soup")
    text = " ".join((tmp_path / "soup" / "README.md").read_text().split())
    assert "Each checkpoint was run on a random 25% of the 600 images of validation first, and then on all." in text
