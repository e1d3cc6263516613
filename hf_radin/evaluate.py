"""Measure averaged weights on a split, and report metrics by their names in the evaluate library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.bank import LogitBank
from hf_radin.files import digest, write_atomically
from hf_radin.machines import share
from hf_radin.passes import as_computed
from hf_radin.processes import on_main_process, the_accelerator
from hf_radin.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# evaluate's own defaults are for two classes; averaged over classes these mean something for any number of them.
_OPTIONS = {name: {"average": "macro"} for name in ("f1", "precision", "recall")}


def measure(
    bank: LogitBank,
    recipe: Recipe,
    make_model: Callable[[], PreTrainedModel],
    *,
    on_block: Callable[[int], object] = lambda samples: None,
) -> np.ndarray:
    """Classes that a soup predicts for the images of a bank: `(samples,)`, -1 where a logit is not finite.

    Each process takes its blocks; one sum of integers brings them together. What was measured once is kept beside the
    bank and not measured again.

    Args:
        recipe: names what is measured.
        make_model: averages the weights; only called if they were not measured before.
        on_block: hears how many images of all processes went by.

    Raises:
        ValueError: if this run's mixed precision is not that of the bank.
    """
    import torch

    parts = [[one.key, recipe.used[one.id]] for one in bank.ingredients.select(recipe.used)]
    anew = [bank.statistics.about["key"]] if bank.statistics else []
    path = bank.folder / "soups" / f"{digest(parts, *anew)}.npy"
    known = on_main_process(lambda: _measured_before(path, len(bank)))
    if known is not None:
        on_block(len(bank))
        return known
    accelerator = the_accelerator()
    if accelerator.mixed_precision != bank.about["mixed_precision"]:
        raise ValueError(
            f"The logits in {bank.folder} were computed with mixed precision {bank.about['mixed_precision']!r}, this "
            f"run has {accelerator.mixed_precision!r}; a soup is compared with its ingredients under the same one."
        )
    passes = as_computed(bank, accelerator)
    model = passes.running.ready(make_model())
    # one entry a sample, filled by the process that has its block, and a last one that counts them
    found = torch.zeros(len(bank) + 1, dtype=torch.int64)
    places = bank.blocks
    for block, inputs in passes.stream(bank.images):
        if inputs:
            (logits,) = passes.running.logits([model], inputs)
            logits = logits.astype(bank.about["logits_dtype"])  # as those that it is compared with are kept
            classes = np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)
            found[places[block]] = torch.from_numpy(classes)
            found[-1] += len(classes)
            on_block(len(classes) * accelerator.num_processes)
    accelerator.wait_for_everyone()
    share(bank.images.folder, "*.json")
    on_main_process(bank.images.check_order)
    found = accelerator.reduce(found.to(accelerator.device), reduction="sum").cpu()
    if found[-1] != len(bank):
        raise RuntimeError(f"{found[-1]} images were measured where the split has {len(bank)}; this is a bug.")
    predictions = found[:-1].numpy()
    if accelerator.is_main_process:
        write_atomically(path, partial(np.save, arr=predictions))
    return predictions


def _measured_before(path: Path, samples: int) -> np.ndarray | None:
    """The classes that a soup was found to predict `(samples,)`; None if that is not known, or the file is broken."""
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (samples,) else None


def load_metrics(names: Iterable[str]) -> dict[str, Any]:
    """Metric modules of the evaluate library by name; `accuracy` comes with this package and needs no network.

    Raises:
        ValueError: if one can't be loaded.
    """
    import evaluate

    loaded = {}
    if not names:
        raise ValueError("No metric is named; `accuracy` is one.")
    for name in [names] if isinstance(names, str) else names:
        path = str(Path(__file__).parent / "metrics" / "accuracy") if name == "accuracy" else name
        try:
            loaded[name] = evaluate.load(path, keep_in_memory=True)
        except Exception as error:  # a script from outside may fail in any way
            said = str(error).rstrip(".")
            raise ValueError(
                f"The metric {name!r} can't be loaded by evaluate: {said}. Its script comes from the Hub; offline, "
                "give the path of a folder that holds one. 'accuracy' needs none."
            ) from error
        try:
            compute_metrics({name: loaded[name]}, np.array([0, 1, 2]), np.array([0, 1, 1]))
        except Exception as error:
            raise ValueError(f"The metric {name!r} can't be computed from predicted classes alone: {error}") from error
    return loaded


def compute_metrics(metrics: dict[str, Any], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores of predicted classes `(samples,)` against the true ones."""
    scores: dict[str, float] = {}
    for name, metric in metrics.items():
        options = _OPTIONS.get(Path(name).name, {})
        found = metric.compute(predictions=predictions, references=np.asarray(labels), **options)
        scores.update({key: float(value) for key, value in found.items() if np.ndim(value) == 0})
    return scores
