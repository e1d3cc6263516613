"""Banks that are made with options which users don't have: small blocks, short pauses."""

from pathlib import Path
from typing import Any

import hf_radin
from hf_radin.images.sample import Pilot
from hf_radin.images.split import DataSource
from hf_radin.logits import compute
from hf_radin.logits.manifest import RunOptions
from hf_radin.runtime.processes import Processes


def make_bank(models: Any, data: Any, folder: Path, **options: Any) -> hf_radin.LogitBank:
    """The bank of some checkpoints on the split `validation`.

    Args:
        models, data: what `gather` and `compute_logits` take.
        folder: of the cache.
        options: of `RunOptions`, those that `compute_logits` does not have included, and `pilot`.
    """
    pilot = Pilot.of(options.pop("pilot", None))
    columns = {name: options.pop(name) for name in ("image_column", "label_column") if name in options}
    ingredients = models if isinstance(models, hf_radin.Ingredients) else hf_radin.gather(models)
    source = DataSource(data, **columns)
    return compute.make_bank(ingredients, source, RunOptions(cache_dir=folder, **options), Processes(), pilot=pilot)
