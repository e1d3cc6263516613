"""One run of fine-tuning a ViT on Fashion-MNIST, with a checkpoint after each epoch and an exponential average.

    one_run(folder / "constant-0", "constant", seed=0)

The folder holds the images (`fashion-mnist`), the pre-trained body (`backbone`), the checkpoints of the run
(`checkpoint-156`, `checkpoint-312`, ...), and in `average` the exponential average of the weights after each step, as
EMA of training scripts keeps it. Training is by transformers' `Trainer`, and reads only the training split.
"""

import sys
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTImageProcessor

from hf_radin.runtime.files import write_folder

from . import fashion
from .pretrained import VALIDATION, make_backbone

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import finetune_sweep
from finetune_sweep import Hyperparameters

Schedule = Literal["constant", "cosine"]

EPOCHS, IMAGES, BATCH_SIZE, RATE = 10, 5_000, 32, 2e-3

# Of the average after each step: as much weight as of the last 100 steps of the 156 that an epoch has.
DECAY = 0.99


class _Keep(transformers.TrainerCallback):
    """Keeps the average after each step, and saves the model after each epoch."""

    def __init__(self, folder: Path, model: PreTrainedModel, processor: ViTImageProcessor) -> None:
        self.folder, self.model, self.processor = folder, model, processor
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def on_step_end(self, args: Any, state: transformers.TrainerState, control: Any, **_: Any) -> None:
        self.average.update_parameters(self.model)

    def on_epoch_end(self, args: Any, state: transformers.TrainerState, control: Any, **_: Any) -> None:
        finetune_sweep.save(self.folder / f"checkpoint-{state.global_step}", self.model, self.processor)

    def on_train_end(self, args: Any, state: transformers.TrainerState, control: Any, **_: Any) -> None:
        finetune_sweep.save(self.folder / "average", self.average.module, self.processor)


def one_run(folder: Path, schedule: Schedule, *, seed: int = 0) -> list[Path]:
    """The checkpoints in the order of training, and last the exponential average.

    Args:
        schedule: of the learning rate: as it is to the end, or along a cosine down to nothing.
        seed: of images, backbone, head and batches.
    """
    data = fashion.make_data(folder / "fashion-mnist", validation=VALIDATION, seed=seed)
    if not (folder / "run").exists():
        train = datasets.load_dataset(str(data), split="train")
        processor = ViTImageProcessor(size={"height": 28, "width": 28})
        backbone = make_backbone(folder / "backbone", train, processor, seed)
        torch.set_num_threads(1)  # a model so small gains nothing from more, and figures shall not depend on cores
        transformers.set_seed(seed)  # draws the head
        model = AutoModelForImageClassification.from_pretrained(
            backbone, ignore_mismatched_sizes=True, **fashion.label_maps(fashion.CLASSES)
        )
        write_folder(folder / "run", lambda new: _train(new, model, processor, train, schedule, seed))
    places = [*(folder / "run").glob("checkpoint-*")]
    return [*sorted(places, key=lambda place: int(place.name.split("-")[1])), folder / "run" / "average"]


def _train(
    folder: Path,
    model: PreTrainedModel,
    processor: ViTImageProcessor,
    train: datasets.Dataset,
    schedule: Schedule,
    seed: int,
) -> None:
    run = Hyperparameters(
        learning_rate=RATE,
        weight_decay=0.01,
        augmentation=0,
        label_smoothing=0.0,
        fraction=IMAGES / len(train),
        seed=seed,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
    )
    trainer = finetune_sweep.make_trainer(model, processor, run, train, train, folder / "trainer", workers=0)
    trainer.args.lr_scheduler_type = transformers.SchedulerType(
        "constant_with_warmup" if schedule == "constant" else schedule
    )
    trainer.add_callback(_Keep(folder, model, processor))
    trainer.train()
