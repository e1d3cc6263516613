"""The soup at the end of a training: of the run's checkpoints, and without a trace in the training."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from safetensors import SafetensorError
from shared.launching import EXAMPLE, launch
from shared.training import PARTS, digit_images, image_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

import hf_radin

STEPS = 8


@pytest.fixture(scope="module")
def images() -> datasets.DatasetDict:
    """Some of the digits, with which a run takes a second."""
    counts = {"train": 64, "validation": 120, "test": 120}
    splits = {split: image_dataset(*digit_images(part)) for split, part in PARTS.items()}
    return datasets.DatasetDict({split: rows.select(range(counts[split])) for split, rows in splits.items()})


class Stop(TrainerCallback):
    """Ends a training after a step, as a kill would whose checkpoint is whole."""

    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **trained):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Untrained(Trainer):
    """One that fails if it takes a step."""

    def training_step(self, *args: Any, **options: Any):
        pytest.fail("a step was taken")


class Forgetful(Trainer):
    """One that does not load what it is resumed from, as that of transformers 5.24 does not load a ViT."""

    def _load_from_checkpoint(self, *args: Any, **options: Any) -> None:
        pass


@pytest.fixture
def training(start, images, tmp_path, monkeypatch) -> Callable[..., Trainer]:
    """Makes a Trainer of the start with callbacks; options are those of `TrainingArguments`."""
    monkeypatch.chdir(tmp_path)
    processor = AutoImageProcessor.from_pretrained(start)

    def prepare(batch: dict[str, list]) -> dict[str, Any]:
        pixels = processor([image.convert("RGB") for image in batch["image"]], return_tensors="pt")
        return {**pixels, "labels": batch["label"]}

    def make(
        *callbacks: TrainerCallback,
        model: Any = None,
        processing_class: Any = processor,
        kind: type[Trainer] = Trainer,
        **options: Any,
    ) -> Trainer:
        options = {"output_dir": "run", "max_steps": STEPS, "save_steps": 2, "save_strategy": "steps", **options}
        arguments = TrainingArguments(
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        transformers.set_seed(0)
        return kind(
            model or AutoModelForImageClassification.from_pretrained(start),
            arguments,
            train_dataset=images["train"].with_transform(prepare),
            eval_dataset=images["validation"].with_transform(prepare),
            processing_class=processing_class,
            callbacks=list(callbacks),
        )

    return make


@pytest.fixture
def callback(images, cache) -> Callable[..., hf_radin.SoupCallback]:
    """Makes a callback with the evaluation set as the Trainer has it: under a transform."""

    def make(dataset: Any = None, **options: Any) -> hf_radin.SoupCallback:
        hidden = images["validation"].with_transform(lambda batch: {"pixel_values": [0] * len(batch["image"])})
        options = {"budget": 0, "cache_dir": cache, **options}
        return hf_radin.SoupCallback(hidden if dataset is None else dataset, **options)

    return make


def made_afterwards(places: str, images, cache) -> hf_radin.Soup:
    """The soup of checkpoints as a user makes it without the callback."""
    ingredients = hf_radin.gather(places)
    bank = hf_radin.compute_logits(ingredients, images["validation"], cache_dir=cache)
    soup = hf_radin.radin(bank, budget=2)
    soup.save_pretrained("afterwards")
    return soup


def resume(training: Callable[..., Trainer], *callbacks: TrainerCallback, step: int = 4, **options: Any) -> None:
    """Resume a run from a checkpoint; transformers 5.24 loads one of a ViT so only."""
    checkpoint = f"run/checkpoint-{step}"
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    training(*callbacks, model=model, **options).train(resume_from_checkpoint=checkpoint)


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def test_the_soup_is_that_of_the_same_checkpoints_afterwards_bit_for_bit(training, callback, images, cache):
    made = callback(budget=2)
    training(made).train()
    assert made.soup.ingredients.ids == tuple(f"run/checkpoint-{step}" for step in (2, 4, 6, 8))
    soup = made_afterwards("run/checkpoint-*", images, cache)
    assert soup.recipe == made.soup.recipe and soup.results == made.soup.results
    assert weights("afterwards") == weights("run/soup")
    assert {"README.md", "recipe.json", "config.json"} <= {path.name for path in Path("run/soup").iterdir()}
    assert AutoModelForImageClassification.from_pretrained("run/soup").config.id2label[3] == "three"


@pytest.mark.parametrize("options", [{}, {"decay": 0.9}])
def test_the_training_is_what_it_is_without_the_callback(training, callback, options):
    """Weights, optimizer, random numbers and the Trainer's state of the last checkpoint, and the model in the end."""

    def after(output: str, *callbacks: TrainerCallback) -> tuple[dict[str, Any], torch.Tensor]:
        trainer = training(*callbacks, output_dir=output, gradient_accumulation_steps=2)
        trainer.train()
        return trainer.model.state_dict(), torch.rand(3)  # which follows from the state of the random numbers

    made = callback(**options, budget=1)
    (plain, number), (watched, same) = after("plain"), after("watched", made)
    assert made.soup is not None
    assert number.equal(same) and all(watched[name].equal(tensor) for name, tensor in plain.items())
    last = f"checkpoint-{STEPS}"
    assert {path.name for path in Path("plain", last).iterdir()} == {
        path.name for path in Path("watched", last).iterdir()
    }
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "config.json"):
        assert Path("plain", last, name).read_bytes() == Path("watched", last, name).read_bytes(), name
    states = [json.loads(Path(run, last, "trainer_state.json").read_text()) for run in ("plain", "watched")]
    assert states[0]["stateful_callbacks"] == states[1]["stateful_callbacks"]


@pytest.mark.parametrize(
    ("soup", "trained"),
    [
        ({}, {}),
        ({"last": 2}, {"save_total_limit": 1}),
        ({"decay": 0.5, "last": 3}, {"save_total_limit": 2}),
    ],
)
def test_a_resumed_training_gives_the_soup_of_an_uninterrupted_one(training, callback, soup, trained):
    soup = {**soup, "budget": 0, "unmeasured": True}  # which is an average
    training(callback(**soup, output="whole"), **trained).train()
    shutil.rmtree("run")
    with pytest.raises(KeyboardInterrupt):
        training(callback(**soup, output="resumed"), Stop(4), **trained).train()
    resume(training, callback(**soup, output="resumed"), **trained)
    assert weights("resumed") == weights("whole")
    recipes = [json.loads(Path(name, "recipe.json").read_text())["recipe"] for name in ("whole", "resumed")]
    assert recipes[0] == recipes[1]


def test_two_processes_train_and_make_the_soup_of_the_same_checkpoints(digits, tmp_path, monkeypatch):
    """Bit for bit that which one process makes of them afterwards; the main process alone writes."""
    monkeypatch.setenv("PYTHONPATH", f"{EXAMPLE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    options = ["--dataset", str(digits), "--output", "run", "--epochs", "2"]
    run = launch(tmp_path, 2, *options, script=EXAMPLE.with_name("train_and_soup.py"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Soup(radin") == 1
    monkeypatch.chdir(tmp_path)
    ingredients = hf_radin.gather("run/_soup_ingredients/checkpoint-*")
    assert len(ingredients) == 2
    soup = hf_radin.radin(hf_radin.compute_logits(ingredients, digits, cache_dir="another"), test_split="test")
    soup.save_pretrained("afterwards")
    assert weights("afterwards") == weights("run/soup")


def test_checkpoints_that_the_trainer_removes_stay_as_further_names_of_their_files(
    training, callback, images, cache, caplog
):
    made = callback(budget=2)
    training(made, save_total_limit=1).train()
    assert [path.name for path in Path("run").glob("checkpoint-*")] == ["checkpoint-8"]
    places = [f"run/_soup_ingredients/checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert made.soup.ingredients.ids == tuple(places)
    last = [Path(folder, "model.safetensors").stat().st_ino for folder in ("run/checkpoint-8", places[-1])]
    assert last[0] == last[1]  # which takes no room
    assert "stay in run/_soup_ingredients, as ingredients of the soup (save_total_limit=1 removes them)" in caplog.text
    made_afterwards("run/_soup_ingredients/checkpoint-*", images, cache)
    assert weights("afterwards") == weights("run/soup")
    assert hf_radin.gather("run/_soup_ingredients", checkpoint="all").ids == tuple(places)


def test_the_last_ones_only(training, callback):
    made = callback(last=2)
    training(made, save_total_limit=1).train()
    assert made.soup.ingredients.ids == tuple(f"run/_soup_ingredients/checkpoint-{step}" for step in (6, 8))
    assert len([*Path("run/_soup_ingredients").glob("checkpoint-*")]) == 2


def test_an_average_is_that_of_the_weights_after_each_step(training, callback, start):
    """Against the sum, written out in float64, of what the training went through."""
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **trained):
            seen.append({name: tensor.double() for name, tensor in model.state_dict().items()})

    made = callback(decay=0.3)
    training(made, Watch()).train()
    model = AutoModelForImageClassification.from_pretrained(start)
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for step, tensors in enumerate(seen[:4], 1):
        left = min(0.3, (1 + step) / (10 + step))
        expected = {name: left * tensor + (1 - left) * tensors[name] for name, tensor in expected.items()}
    average = AutoModelForImageClassification.from_pretrained("run/_soup_ingredients/checkpoint-4").state_dict()
    raw = AutoModelForImageClassification.from_pretrained("run/checkpoint-4").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(average[name].double(), tensor, rtol=0, atol=1e-6)
    assert any(not average[name].equal(raw[name]) for name in raw)
    assert made.soup.ingredients.ids[1] == "run/_soup_ingredients/checkpoint-4"


def test_averaged_and_raw_weights_are_not_mixed_on_resume(training, callback):
    """A resumed training goes on with its own weights, beside an average that goes on with its own."""
    begun: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **trained):
            begun.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    with pytest.raises(KeyboardInterrupt):
        training(callback(decay=0.9), Stop(4)).train()
    for decay in (None, 0.8):
        with pytest.raises(ValueError, match=rf"begun with decay=0.9 and is resumed with decay={decay}: averaged and"):
            resume(training, callback(decay=decay))
    made = callback(decay=0.9)
    resume(training, made, Watch())
    raw = AutoModelForImageClassification.from_pretrained("run/checkpoint-4").state_dict()
    assert all(begun[0][name].equal(tensor) for name, tensor in raw.items())
    assert all("_soup_ingredients" in name for name in made.soup.ingredients.ids)


def test_a_training_that_goes_on_with_other_weights_than_those_of_its_checkpoint_is_refused(training, callback):
    with pytest.raises(KeyboardInterrupt):
        training(Stop(4)).train()
    with pytest.raises(
        ValueError, match=r"resumed from run/checkpoint-4, and \d+ of \d+ tensors of the model are not"
    ):
        training(callback(), kind=Forgetful).train(resume_from_checkpoint=True)
    resume(training, callback())


def test_a_run_that_was_begun_without_averages_is_not_resumed_with_them(training, callback):
    with pytest.raises(KeyboardInterrupt):
        training(Stop(4)).train()
    with pytest.raises(ValueError, match=r"begun with decay=None and is resumed with decay=0.9"):
        resume(training, callback(decay=0.9))
    made = callback()  # of the checkpoints that are there, it makes a soup
    resume(training, made)
    assert made.soup.ingredients.ids == tuple(f"run/checkpoint-{step}" for step in (2, 4, 6, 8))


def test_a_run_that_was_killed_before_its_average_was_written_says_from_where_it_can_go_on(training, callback):
    with pytest.raises(KeyboardInterrupt):
        training(Stop(4), callback(decay=0.9)).train()
    with pytest.raises(
        ValueError, match=r"checkpoint-4 is not there, which is the average .* resume from checkpoint-2"
    ):
        resume(training, callback(decay=0.9))
    made = callback(decay=0.9)
    resume(training, made, step=2)
    assert len(made.soup.ingredients) == 4


def test_checkpoints_of_an_earlier_run_are_not_in_the_soup(training, callback):
    training(max_steps=6, save_steps=3).train()
    made = callback()
    training(made).train()
    assert made.soup.ingredients.ids == tuple(f"run/checkpoint-{step}" for step in (2, 4, 6, 8))
    with pytest.raises(ValueError, match=r"The output folder run/soup is not empty"):
        training(callback()).train()
    training(callback(output="other"), output_dir="short", save_total_limit=1).train()
    with pytest.raises(ValueError, match=r"short/_soup_ingredients keeps ingredients of an earlier run, checkpoint-2"):
        training(callback(output="third"), output_dir="short", save_total_limit=1).train()


@pytest.mark.parametrize(
    ("soup", "trained", "message"),
    [
        ({}, {"save_strategy": "no"}, "save_strategy='no' saves no checkpoints"),
        ({}, {"save_steps": 100}, "save_steps=100 of 8 steps save 1 checkpoint, and a soup needs two"),
        ({}, {"processing_class": None}, "the Trainer has none: pass it to the Trainer as processing_class"),
        ({}, {"save_strategy": "epoch", "max_steps": 7}, "num_train_epochs=1 of 7 steps save 1 checkpoint"),
        ({"image_processor": "/no/such"}, {}, "image processor /no/such"),
        ({"output": "run"}, {}, "the output run is the run's own folder"),
        ({"budget": "soon"}, {}, "soon"),
        ({"metric": "recall[eleven]"}, {}, "eleven"),
        ({"keep": "accuracy > nothing"}, {}, "nothing"),
        ({"head": "bald"}, {}, "head='bald'"),
        ({"hold_out": 2.0}, {}, "hold_out=2.0: it is a share"),
        ({"unmeasured": True, "budget": 2}, {}, "unmeasured=True: soups are measured with a budget of 2"),
        ({"label_column": "digit"}, {}, "no label column 'digit'"),
        ({"test_split": "test"}, {}, "the split 'validation' chooses the soup, and 'test' has to be another one"),
    ],
)
def test_what_would_end_in_no_soup_is_refused_before_the_first_step(training, callback, soup, trained, message):
    with pytest.raises(ValueError, match=message):
        training(callback(**soup), kind=Untrained, **trained).train()


def test_images_that_were_turned_into_tensors_are_refused_before_the_first_step(training, callback, images):
    mapped = images["validation"].map(lambda row: {"pixel_values": [[0.0]]}, remove_columns="image")
    with pytest.raises(
        ValueError, match=r"SoupCallback\(dataset=...\): .* pixel_values .* as it was before they were"
    ):
        training(callback(mapped), kind=Untrained).train()
    with pytest.raises(ValueError, match=r"SoupCallback\(dataset=...\): A dataset is a Hub id, a folder"):
        training(callback([1, 2]), kind=Untrained).train()


def test_images_of_other_classes_are_refused_before_the_first_step(training, callback, images):
    names = datasets.ClassLabel(names=[f"digit {number}" for number in range(10)])
    with pytest.raises(ValueError, match=r"digit 0"):
        training(callback(images["validation"].cast_column("label", names)), kind=Untrained).train()


def test_splits_that_share_images_are_refused_before_the_first_step(training, callback, images):
    both = datasets.DatasetDict({"validation": images["validation"], "test": images["validation"].select(range(50))})
    with pytest.raises(ValueError, match="50 of the 50 images of the split 'test' are in the split 'validation'"):
        training(callback(both, test_split="test"), kind=Untrained).train()


def test_a_model_that_is_no_image_classifier_is_refused_before_the_first_step(training, callback):
    model = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(
        ValueError, match="the Trainer trains a ViTModel, and soups are made of transformers' image cl"
    ):
        training(callback(), model=model, kind=Untrained).train()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budgets": 4}, TypeError, "takes no 'budgets'"),
        ({"accelerator": None}, TypeError, "takes no 'accelerator'"),
        ({"last": 1}, ValueError, "last=1: a soup is made of the last two"),
        ({"decay": 1}, ValueError, "decay=1: it is what is left"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
    ],
)
def test_options_that_can_not_be_are_refused_at_once(callback, options, error, message):
    with pytest.raises(error, match=message):
        callback(**options)


def test_a_training_ends_as_it_would_if_no_soup_can_be_made(training, callback, caplog):
    """All checkpoints are the same one, which nobody can know before."""
    made = callback()
    trainer = training(made, lr_scheduler_type="constant")
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    assert trainer.train().global_step == STEPS
    assert made.soup is None
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "No soup was made of the checkpoints in run: A soup needs at least two different" in record.getMessage()
    assert "hf-radin soup --models run --checkpoint all" in record.getMessage()


@pytest.mark.parametrize("error", [RuntimeError("the GPU is full"), KeyError("class")])
def test_a_training_ends_as_it_would_whatever_goes_wrong_with_the_soup(training, callback, caplog, error):
    def metric(logits, labels) -> float:
        if Path("run", f"checkpoint-{STEPS}").exists():  # not when it is tried, before the first step
            raise error
        return 0.5

    made = callback(metric=metric)
    assert training(made).train().global_step == STEPS
    assert made.soup is None
    assert f"No soup was made of the checkpoints in run: {type(error).__name__}: {error}. You can make" in caplog.text


def test_a_checkpoint_that_can_not_be_kept_ends_no_training(training, callback, caplog, monkeypatch):
    def write(*args: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("hf_radin.training.average.RunningAverage.write", write)
    assert training(callback(decay=0.9)).train().global_step == STEPS
    assert "The checkpoint of step 2 will not be in the soup: No space left on device" in caplog.text


def test_a_callback_can_be_used_again(training, callback):
    """Each training has its own soup, in its own folder."""
    made = callback(overwrite=True)
    for run in ("first", "second"):
        training(made, output_dir=run).train()
        assert made.soup.ingredients.ids[0] == f"{run}/checkpoint-2"
    for run in ("first", "second"):
        assert all(name.startswith(run) for name in hf_radin.Soup.from_pretrained(f"{run}/soup").recipe.used)


def test_two_callbacks_would_take_each_others_ingredients(training, callback):
    both = [callback(), callback(decay=0.9, output="averages")]
    with pytest.raises(ValueError, match=r"the Trainer has two of them, .* remove one \(trainer.pop_callback\)"):
        training(*both, kind=Untrained).train()
    trainer = training(*both)
    trainer.remove_callback(both[1])
    trainer.train()
    assert both[0].soup.ingredients.ids[0] == "run/checkpoint-2"


def test_classes_that_are_numbered_with_text_are_the_same(training, callback, start):
    """As transformers' own script numbers them, until they are saved."""
    model = AutoModelForImageClassification.from_pretrained(start)
    model.config.id2label = {str(number): name for number, name in model.config.id2label.items()}
    made = callback()
    training(made, model=model, max_steps=4).train()
    assert len(made.soup.ingredients) == 2


def test_a_split_that_took_no_part_proves_the_soup(training, callback, images):
    made = callback(images, test_split="test")
    training(made).train()
    assert {result.split for result in made.soup.results} == {"validation", "test"}


def test_adapters_make_a_soup_too_and_no_averages(training, callback, start):
    peft = pytest.importorskip("peft")

    def adapted():
        model = AutoModelForImageClassification.from_pretrained(start)
        targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
        return peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))

    made = callback()
    training(made, model=adapted(), max_steps=4, save_total_limit=1).train()
    places = [f"run/_soup_ingredients/checkpoint-{step}" for step in (2, 4)]
    assert made.soup.ingredients.ids == tuple(places)
    assert (Path(places[0]) / "adapter_model.safetensors").is_file()
    with pytest.raises(
        ValueError, match=r"decay=0.9\): averages of an adapter's factors make no average of the models"
    ):
        training(callback(decay=0.9, output="other"), model=adapted(), output_dir="again").train()


def test_an_adapter_of_which_no_soup_can_be_made_is_refused_before_the_first_step(training, callback, start):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])

    def refusal(name: str, options: Any, *, model: Any = None) -> str:
        adapted = peft.get_peft_model(
            model or AutoModelForImageClassification.from_pretrained(start), options, adapter_name=name
        )
        with pytest.raises(ValueError, match="SoupCallback: the model") as refused:
            training(callback(), model=adapted, kind=Untrained).train()
        return str(refused.value)

    scales = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    assert "the model: an adapter of the kind 'IA3'" in refusal("default", scales)
    assert "has the adapters mine, and soups are made of one that is called 'default'" in refusal("mine", lora)
    config = AutoModelForImageClassification.from_pretrained(start).config
    config.name_or_path = ""
    of_nothing = AutoModelForImageClassification.from_config(config)
    assert "names no base model" in refusal("default", lora, model=of_nothing)


def test_adapters_keep_the_names_of_the_classes_that_they_were_trained_with(training, callback, start, images):
    """Which peft does not save: those of the base may be others, and the dataset may number its own otherwise."""
    peft = pytest.importorskip("peft")
    model = AutoModelForImageClassification.from_pretrained(start)
    names = model.config.id2label
    model.config.id2label = {number: f"LABEL_{number}" for number in names}
    model.save_pretrained("base")
    rows = images["validation"]
    numbers = [9 - number for number in rows["label"]]
    backwards = rows.remove_columns("label").add_column("label", numbers)
    backwards = backwards.cast_column("label", datasets.ClassLabel(names=rows.features["label"].names[::-1]))
    figures = []
    for number, dataset in enumerate((rows, backwards)):
        transformers.set_seed(0)
        model = AutoModelForImageClassification.from_pretrained("base", id2label=names)
        targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
        made = callback(dataset, output=f"soup-{number}", overwrite=True)
        training(made, model=peft.get_peft_model(model, peft.LoraConfig(r=2, **targets)), max_steps=4).train()
        figures.append([result.metrics for result in made.soup.results])
        assert AutoModelForImageClassification.from_pretrained(f"soup-{number}").config.id2label == names
    assert figures[0] == figures[1]
