"""On the Hub an estimate asks for headers and the first images, and says what there is to download."""

import pytest
from shared.training import digit_images, image_dataset

import hf_radin

SAYS = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype: int64
  splits:
  - name: validation
    num_examples: 40
---
"""


@pytest.mark.parametrize("card", [SAYS, ""])
def test_nothing_large_is_downloaded(hub, runs, tmp_path, card):
    for number in range(2):
        content = {path.name: path.read_bytes() for path in (runs / f"ft-{number}").iterdir()}
        hub.add_repo(f"org/ft-{number}", content)
    image_dataset(*digit_images(slice(700, 740)), names=None).to_parquet(tmp_path / "rows.parquet")
    files = {"data/validation-00000-of-00001.parquet": (tmp_path / "rows.parquet").read_bytes()}
    hub.add_repo("org/digits", files | ({"README.md": card.encode()} if card else {}), "dataset")
    ingredients = hf_radin.gather("org/ft-*")
    if not card:
        with pytest.raises(ValueError, match=r"org/digits, split 'validation', does not say how many.*--images N"):
            hf_radin.estimate(ingredients, "org/digits", cache_dir=tmp_path / "cache")
        return
    job = hf_radin.estimate(ingredients, "org/digits", cache_dir=tmp_path / "cache")
    weights = sum((runs / f"ft-{number}" / "model.safetensors").stat().st_size for number in range(2))
    assert (job.images, job.download_bytes) == (40, weights)
    assert {request.status for request in hub.logged("GET", "model.safetensors")} == {206}  # parts of files
    assert not any(ingredient.is_here for ingredient in ingredients)
    ingredients[0].download()
    assert hf_radin.estimate(ingredients, "org/digits", cache_dir=tmp_path / "cache").download_bytes == weights // 2
