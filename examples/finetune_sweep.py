"""Make ingredients for a soup: many fine-tunes of one start on one image dataset.

    python finetune_sweep.py --model google/vit-base-patch16-224-in21k --dataset org/pets --output runs

Fine-tunes can only be averaged if they share their start, the classifier head included. If the start has no head for
the dataset's classes, a linear probe therefore first trains one (`OUTPUT/start`). The fine-tunes `OUTPUT/ft-00`,
`OUTPUT/ft-01`, ... differ in learning rate, weight decay, augmentation, label smoothing, seed and (`--fraction`) in
the images they see. A sweep that was stopped continues where it stopped, and a larger `--count` adds to it.
"""

import copy
import json
import logging
import math
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor

logger = logging.getLogger("finetune_sweep")

PROBE_IMAGES = 20_000  # their features are held in memory, and more would hardly move a linear head
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]"


@dataclass(frozen=True)
class Settings:
    """One sweep; these are also the options of the command line."""

    model: str = field(metadata={"help": "the start: a folder or an id on the Hub"})
    dataset: str = field(metadata={"help": "a folder or an id on the Hub"})
    output: str = field(default="runs", metadata={"help": "folder for the fine-tunes, ft-00 and on"})
    count: int = field(default=12, metadata={"help": "how many fine-tunes"})
    config_name: str | None = field(default=None, metadata={"help": "configuration of the dataset"})
    train_split: str = field(default="train", metadata={"help": "what they are trained on"})
    eval_split: str = field(default="validation", metadata={"help": "what their accuracy is told of"})
    image_column: str | None = field(default=None, metadata={"help": "default: the only column of images"})
    label_column: str | None = field(default=None, metadata={"help": "default: the only column of class labels"})
    epochs: float = field(default=4.0, metadata={"help": "passes over the training images"})
    batch_size: int = field(default=32, metadata={"help": "images in a step"})
    learning_rates: list[float] = field(default_factory=lambda: [1e-5, 1e-4], metadata={"help": "lowest and highest"})
    fraction: float = field(default=1.0, metadata={"help": "share of the training images that each fine-tune sees"})
    seed: int = field(default=0, metadata={"help": "of all that is drawn"})
    workers: int = field(default=0, metadata={"help": "processes that prepare images"})


@dataclass(frozen=True)
class Hyperparameters:
    """What one fine-tune is made with."""

    learning_rate: float
    weight_decay: float
    augmentation: int  # magnitude of RandAugment: 0 is none, 30 the strongest
    label_smoothing: float
    fraction: float  # of the training images, drawn with the seed
    seed: int
    epochs: float
    batch_size: int


def sweep(settings: Settings) -> list[Path]:
    """Make the fine-tunes that are not there yet and return the folders of all.

    Raises ValueError if the output folder holds a sweep made with other settings.
    """
    output = Path(settings.output)
    record = output / "sweep.json"
    check_same_sweep(record, settings)
    folders = [output / f"ft-{index:02d}" for index in range(settings.count)]
    todo = [index for index, folder in enumerate(folders) if not folder.exists()]
    if not todo:
        return folders
    train, evaluation = load_split(settings, settings.train_split), load_split(settings, settings.eval_split)
    start, processor = load_start(settings, train)
    output.mkdir(parents=True, exist_ok=True)
    record.write_text(
        json.dumps(what_defines(settings), indent=2) + "\n", "utf-8"
    )  # only now: settings that fail bind nobody
    with tqdm(total=len(folders), initial=len(folders) - len(todo), desc="fine-tunes", bar_format=BAR) as bar:
        for index in todo:
            run, folder = draw(settings, index), folders[index]
            with finished_or_absent(folder) as part:
                trainer = make_trainer(copy.deepcopy(start), processor, run, train, evaluation, part, settings.workers)
                # shares of a step add up to a little more than the whole
                trainer.add_callback(Advance(lambda share: bar.update(min(share, bar.total - bar.n))))
                trainer.train()
                accuracy = trainer.evaluate()["eval_accuracy"]
                trainer.state.trial_params = asdict(run)
                trainer.save_state()
                save(part, trainer.model, processor)
                write_card(part, folder.name, settings, table(run), accuracy)
            logger.info("%s: accuracy %.4f, %s", folder.name, accuracy, run)
    return folders


def draw(settings: Settings, index: int) -> Hyperparameters:
    """One point of the random search; it does not depend on how many are drawn."""
    rng = np.random.default_rng([settings.seed, index])
    low, high = map(math.log, settings.learning_rates)
    return Hyperparameters(
        learning_rate=float(f"{math.exp(rng.uniform(low, high)):.3g}"),
        weight_decay=float(f"{10 ** rng.uniform(-4, -1):.3g}"),
        augmentation=int(rng.integers(0, 11)),
        label_smoothing=float(rng.choice([0.0, 0.05, 0.1])),
        seed=int(rng.integers(2**31)),
        fraction=settings.fraction,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
    )


# --- data: a dataset in, pixels out ---


def load_split(settings: Settings, split: str) -> datasets.Dataset:
    """A split with two columns, `image` and `label`; they are found by their features where they are not named."""
    loaded = datasets.load_dataset(settings.dataset, settings.config_name, split=split)
    image = settings.image_column or only_column(loaded.features, datasets.Image)
    label = settings.label_column or only_column(loaded.features, datasets.ClassLabel)
    if not isinstance(loaded.features[label], datasets.ClassLabel):
        raise ValueError(f"{settings.dataset}: column {label!r} has no class names; use class_encode_column first")
    return loaded.select_columns([image, label]).rename_columns({image: "image", label: "label"})


def only_column(features: datasets.Features, kind: type) -> str:
    """The one column of this kind, e.g. `datasets.Image`."""
    columns = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(columns) != 1:
        raise ValueError(f"{len(columns)} {kind.__name__} columns among {list(features)}: name image and label column")
    return columns[0]


def pixels(split: datasets.Dataset, processor: BaseImageProcessor, augmentation: int = 0) -> datasets.Dataset:
    """The split as the model's inputs, prepared by the start's own processor whenever rows are read."""
    augment = v2.RandAugment(magnitude=augmentation, interpolation=v2.InterpolationMode.BILINEAR)

    def prepare(batch: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch["image"]]
        images = [augment(image) for image in images] if augmentation else images
        return {**processor(images, return_tensors="pt"), "labels": batch["label"]}

    return split.with_transform(prepare)


# --- the start: one head for all ---


def load_start(settings: Settings, train: datasets.Dataset) -> tuple[nn.Module, BaseImageProcessor]:
    """The start and its processor. One without a head for these classes is given it and saved, once."""
    folder = Path(settings.output, "start")
    source = str(folder) if folder.exists() else settings.model
    config = AutoConfig.from_pretrained(source)
    labels = dict(enumerate(train.features["label"].names))
    same_labels = config.id2label == labels
    config.num_labels = len(labels)  # first: it overwrites the names below, and for pvt it is a field of its own
    config.id2label, config.label2id = labels, {label: index for index, label in labels.items()}
    if config.model_type == "timm_wrapper":
        config.label_names = list(labels.values())  # it writes these, and those of the start if it had any
    config.problem_type = "single_label_classification"  # left alone, runs with label smoothing would not set it
    transformers.set_seed(settings.seed)
    model, report = AutoModelForImageClassification.from_pretrained(
        source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
    )
    processor = AutoImageProcessor.from_pretrained(source)
    if not same_labels or report["missing_keys"] or report["mismatched_keys"]:
        probe(model, processor, train.shuffle(seed=settings.seed).take(min(PROBE_IMAGES, len(train))))
        with finished_or_absent(folder) as part:
            save(part, model, processor)
            write_card(part, folder.name, settings, "A start for fine-tunes: its head was fitted on frozen features.")
    return model, processor


def probe(model: nn.Module, processor: BaseImageProcessor, images: datasets.Dataset) -> None:
    """Fit the head to frozen features: one pass collects what goes into it, the rest is a logistic regression."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    labels = torch.tensor(images["label"], device=device)
    inputs: dict[nn.Module, list] = {model.get_submodule(name): [] for name in head_names(model.config)}
    hooks = [head.register_forward_pre_hook(lambda head, args: inputs[head].append(args[0])) for head in inputs]
    loader = DataLoader(pixels(images, processor), batch_size=64, collate_fn=transformers.default_data_collator)
    model.to(device).eval()
    with torch.no_grad():
        for batch in loader:
            model(**{name: tensor.to(device) for name, tensor in batch.items()})
    for hook in hooks:
        hook.remove()
    for head, features in inputs.items():
        fit(head, torch.cat(features), labels)
    model.cpu()


def head_names(config: transformers.PretrainedConfig) -> set[str]:
    """The modules whose shape depends on the number of classes, whatever the architecture calls them."""

    def shapes(classes: int) -> dict[str, torch.Size]:
        other = copy.deepcopy(config)
        other.num_labels = classes
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(other)
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    two, three = shapes(2), shapes(3)
    return {name.rpartition(".")[0] for name in two if two[name] != three[name]}


def fit(head: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> None:
    """Logistic regression with a penalty of half the squared weights: convex, so it may begin at zero."""
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = sum(parameter.square().sum() for parameter in head.parameters()) / 2
        value = nn.functional.cross_entropy(head(features), labels) + penalty / len(labels)
        value.backward()
        return value

    optimizer.step(loss)


# --- one fine-tune ---


def make_trainer(
    model: nn.Module,
    processor: BaseImageProcessor,
    run: Hyperparameters,
    train: datasets.Dataset,
    evaluation: datasets.Dataset,
    folder: Path,
    workers: int,
) -> transformers.Trainer:
    """A `Trainer` that measures accuracy, prints nothing and leaves no pickles."""
    seen = train.shuffle(seed=run.seed).take(max(1, round(run.fraction * len(train))))
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        learning_rate=run.learning_rate,
        weight_decay=run.weight_decay,
        label_smoothing_factor=run.label_smoothing,
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.batch_size,
        dataloader_num_workers=workers,
        dataloader_pin_memory=torch.accelerator.is_available(),  # its default warns where there is none
        seed=run.seed,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # a share of all steps
        logging_strategy="epoch",
        save_strategy="no",  # its checkpoints hold training_args.bin and the optimizer
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # `pixels` reads columns that the model does not know
    )
    trainer = transformers.Trainer(
        model,
        args,
        train_dataset=pixels(seen, processor, run.augmentation),
        eval_dataset=pixels(evaluation, processor),
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()},
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class Advance(transformers.TrainerCallback):
    """Moves the bar of the whole sweep by one step's share of a fine-tune."""

    def __init__(self, advance: Callable[[float], Any]) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: transformers.TrainerState, control: Any, **_: Any) -> None:
        self.advance(1 / state.max_steps)


# --- what is written ---


def save(folder: Path, model: nn.Module, processor: BaseImageProcessor) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_card(folder: Path, name: str, settings: Settings, body: str, accuracy: float | None = None) -> None:
    """A card from which a soup's maker finds parent, dataset, configuration, evaluation split and accuracy."""
    measured = EvalResult(
        task_type="image-classification",
        # of a folder all of its path: the card may be read from anywhere on this machine
        dataset_type=str(Path(settings.dataset).resolve()) if Path(settings.dataset).exists() else settings.dataset,
        dataset_name=Path(settings.dataset).name,
        dataset_config=settings.config_name,
        dataset_split=settings.eval_split,
        metric_type="accuracy",
        metric_value=accuracy,
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=None if Path(settings.model).exists() else settings.model,  # only what the Hub knows
        datasets=None if Path(settings.dataset).exists() else settings.dataset,
        model_name=name,
        eval_results=None if accuracy is None else [measured],
        **license_of(settings.model),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{body}\n").save(folder / "README.md")


def license_of(name: str) -> dict[str, str]:
    """The licence that the start's card declares, or nothing: never a guess."""
    try:
        data = ModelCard.load(Path(name, "README.md") if Path(name).exists() else name).data
    except (EntryNotFoundError, ValueError):  # no card, or none with readable metadata
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def table(run: Hyperparameters) -> str:
    rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in asdict(run).items()]
    return "\n".join(["One fine-tune of a sweep.\n", "| hyperparameter | |", "|---|---|", *rows])


@contextmanager
def finished_or_absent(folder: Path) -> Iterator[Path]:
    """A folder to write in that gets its name only when complete, so what was cut off is made anew."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.rename(folder)


def what_defines(settings: Settings) -> dict[str, Any]:
    """The settings on which a fine-tune depends."""
    return {name: value for name, value in asdict(settings).items() if name not in ("output", "count", "workers")}


def check_same_sweep(record: Path, settings: Settings) -> None:
    """Fine-tunes of two different starts or datasets must not meet in one folder."""
    now = what_defines(settings)
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else now
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
    if changed:
        raise ValueError(f"{record.parent} holds another sweep ({', '.join(changed)}): choose another output")


def main() -> None:
    parser = transformers.HfArgumentParser(
        Settings, description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    (settings,) = parser.parse_args_into_dataclasses()
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()  # it would show one for every load and save
    with logging_redirect_tqdm():
        sweep(settings)
    models = shlex.quote(f"{settings.output}/ft-*")
    logger.info("Make a soup: hf-radin soup --models %s --dataset %s", models, shlex.quote(settings.dataset))


if __name__ == "__main__":
    main()
