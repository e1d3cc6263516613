"""Train with transformers' Trainer, and make a soup of the run's checkpoints at the end, which takes two lines more:

    python train_and_soup.py --output run
    python train_and_soup.py --model google/vit-base-patch16-224-in21k --dataset org/pets --output run

By default it trains a small ViT on scikit-learn's digits, without a network. The dataset has the splits train,
validation, which chooses the soup, and test, which proves it, with the columns image and label. `accelerate launch`
spreads training and soup over any number of processes.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from digits import make_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessor,
)

import hf_radin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="a folder or an id on the Hub (default: a small ViT that knows nothing)")
    parser.add_argument("--dataset", help="a folder or an id on the Hub (default: scikit-learn's digits)")
    parser.add_argument("--output", type=Path, default=Path("run"))
    parser.add_argument("--epochs", type=float, default=24)
    parser.add_argument("--learning-rate", type=float, help="(default: 5e-5, of the small ViT 3e-3)")
    parser.add_argument("--cache-dir", type=Path, help="where logits are cached (default: hf_radin in HF_HOME)")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")

    training = TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate or (5e-5 if args.model else 3e-3),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        lr_scheduler_type="constant",  # checkpoints that are apart: the soup is what brings them to rest
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        remove_unused_columns=False,  # the transform needs the images
        report_to="none",
    )
    with training.main_process_first():
        images = datasets.load_dataset(args.dataset or str(make_dataset(args.output / "data")))
    model, processor = load_start(args.model, images["train"].features["label"].names)

    def prepare(batch: dict[str, list]) -> dict[str, Any]:
        pixels = processor([image.convert("RGB") for image in batch["image"]], return_tensors="pt")
        return {**pixels, "labels": batch["label"]}

    trainer = Trainer(
        model,
        training,
        train_dataset=images["train"].with_transform(prepare),
        eval_dataset=images["validation"].with_transform(prepare),
        processing_class=processor,
        compute_metrics=accuracy,
    )
    callback = hf_radin.SoupCallback(images, last=10, test_split="test", cache_dir=args.cache_dir)  # the first line
    trainer.add_callback(callback)  # the second line
    trainer.train()
    if callback.soup and trainer.is_world_process_zero():
        print(callback.soup)
        for row in callback.soup.results:
            print(f"{row.split:12}{row.name:14}{row.metrics['accuracy']:.4f}")


def load_start(name: str | None, labels: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A model with these classes, and its image processor."""
    id2label = dict(enumerate(labels))
    label2id = {label: index for index, label in id2label.items()}
    if name:
        model = AutoModelForImageClassification.from_pretrained(
            name, id2label=id2label, label2id=label2id, ignore_mismatched_sizes=True
        )
        return model, AutoImageProcessor.from_pretrained(name)
    transformers.set_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label=id2label,
        label2id=label2id,
    )
    model = AutoModelForImageClassification.from_config(config)
    return model, ViTImageProcessor(size={"height": 8, "width": 8})


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """The share of images whose class is right."""
    right = torch.tensor(prediction.predictions).argmax(-1) == torch.tensor(prediction.label_ids)
    return {"accuracy": float(right.float().mean())}


if __name__ == "__main__":
    main()
