"""The loopback Hub, as transformers, datasets and evaluate see it."""

import io

import pytest

from loopback_hub.loopback import LoopbackHub

METRIC = b"""import datasets
import evaluate


class Hits(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"hits": sum(a == b for a, b in zip(predictions, references))}
"""


@pytest.fixture(scope="module")
def image():
    pil = pytest.importorskip("PIL.Image")
    return pil.new("RGB", (8, 8), "red")


@pytest.fixture
def pets(hub: LoopbackHub, image) -> str:
    """A dataset of four images in parquet, with named classes."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict({"image": [image] * 4, "label": [0, 1, 1, 0]}, features=features)
    file = io.BytesIO()
    data.to_parquet(file)
    hub.add_repo("org/pets", {"data/validation-00000-of-00001.parquet": file.getvalue()}, "dataset")
    return "org/pets"


def test_transformers_loads_a_model_and_its_processor(hub, vit, image):
    transformers = pytest.importorskip("transformers")
    sha = hub.add_repo("org/vit", vit)
    model = transformers.AutoModelForImageClassification.from_pretrained("org/vit", revision=sha)
    processor = transformers.AutoImageProcessor.from_pretrained("org/vit")
    logits = model(**processor(image, return_tensors="pt")).logits  # (images, classes)
    assert logits.shape == (1, 2)


def test_transformers_pushes_what_a_pipeline_loads(hub, vit, image):
    transformers = pytest.importorskip("transformers")
    hub.add_repo("org/vit", vit)
    model = transformers.AutoModelForImageClassification.from_pretrained("org/vit")
    model.push_to_hub("org/copy")
    transformers.AutoImageProcessor.from_pretrained("org/vit").push_to_hub("org/copy")
    assert len(hub.commits("org/copy")) == 3
    answers = transformers.pipeline("image-classification", "org/copy")(image)
    assert {answer["label"] for answer in answers} == {"cat", "dog"}


def test_datasets_streams_a_split(hub, pets):
    datasets = pytest.importorskip("datasets")
    stream = datasets.load_dataset(pets, split="validation", streaming=True)
    assert stream.features["label"].names == ["cat", "dog"]
    rows = list(stream)
    assert [row["label"] for row in rows] == [0, 1, 1, 0]
    assert rows[0]["image"].size == (8, 8)
    assert {request.status for request in hub.logged("GET", ".parquet")} == {206}


def test_datasets_knows_configurations_and_splits(hub, pets):
    datasets = pytest.importorskip("datasets")
    assert datasets.get_dataset_config_names(pets) == ["default"]
    assert datasets.get_dataset_split_names(pets) == ["validation"]


def test_datasets_pushes_what_it_loads_by_revision(hub, pets):
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset(pets, split="validation")
    data.select([0]).push_to_hub(pets, split="test")
    assert datasets.load_dataset(pets, split="test").num_rows == 1
    with pytest.raises(ValueError, match="test"):
        datasets.load_dataset(pets, split="test", revision=hub.commits(pets, repo_type="dataset")[-1].sha)


@pytest.mark.parametrize("line", ["", "# another Hub, another script of the same name"])
def test_evaluate_fetches_a_metric(hub, line):
    evaluate = pytest.importorskip("evaluate")
    hub.add_repo("evaluate-metric/hits", {"hits.py": METRIC + line.encode()}, "space")
    metric = evaluate.load("hits")
    assert metric.compute(predictions=[0, 1, 1], references=[0, 1, 0]) == {"hits": 2}
    # The tag of evaluate's own version first, then main.
    assert [request.status for request in hub.logged("HEAD", "/spaces/evaluate-metric/hits/resolve/")] == [
        404,
        200,
    ]
