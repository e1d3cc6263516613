"""Images and labels reach the models as they would through transformers' own pipeline, or not at all."""

import io
import json
import shutil
import tarfile
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shared.training import NAMES, PARTS, digit_images, image_dataset
from transformers import ViTImageProcessor, pipeline

import hf_radin
from hf_radin.images.cache import block_size
from hf_radin.images.split import DataSource, Split, listing_hash, open_split
from hf_radin.ingredients.labels import match_labels


def as_file(image: Image.Image, **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **options})
    return {"bytes": buffer.getvalue(), "path": None}


def gradient(mode: str) -> Image.Image:
    """An image of a mode that has something to lose: not square, colourful, see-through in places."""
    rows, columns = np.mgrid[0:20, 0:14]
    rgba = np.stack([rows * 12, columns * 18, (rows + columns) * 7, rows * 6 + 100], axis=-1).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray((rows * 3000).astype(np.uint16))
    return Image.fromarray(rgba, "RGBA").convert("RGB").convert(mode) if mode != "RGBA" else Image.fromarray(rgba)


def turned() -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    return as_file(gradient("RGB"), exif=exif)


FILES = {
    **{mode: as_file(gradient(mode)) for mode in ("L", "LA", "P", "RGBA", "RGB", "1", "I;16")},
    "CMYK": as_file(gradient("CMYK"), format="JPEG"),
    "turned": turned(),
}


@pytest.fixture(scope="module")
def gathered(runs):
    return hf_radin.gather([str(runs / "ft-0"), str(runs / "ft-1")])


def compute(gathered, tmp_path, images, labels=None, **options):
    dataset = image_dataset(images, labels if labels is not None else [0] * len(images))
    return hf_radin.compute_logits(
        gathered, datasets.DatasetDict(validation=dataset), cache_dir=tmp_path / "cache", **options
    )


def test_images_of_any_mode_are_read_as_the_pipeline_reads_them(gathered, tmp_path):
    bank = compute(gathered, tmp_path, list(FILES.values()))
    for index, ingredient in enumerate(gathered):
        classify = pipeline("image-classification", model=str(ingredient.folder), device="cpu")
        for sample, (name, file) in enumerate(FILES.items()):
            image = Image.open(io.BytesIO(file["bytes"]))
            scores = {row["label"]: row["score"] for row in classify(image, top_k=10, function_to_apply="none")}
            expected = [scores[label] for label in NAMES]
            np.testing.assert_allclose(bank.logits(index)[sample], expected, atol=1e-4, err_msg=name)


def test_labels_are_matched_by_name(gathered, digits, tmp_path):
    images, labels = digit_images(slice(700, 760))
    shuffled = NAMES[3:] + NAMES[:3]
    moved = image_dataset(images, [shuffled.index(NAMES[label]) for label in labels], shuffled)
    bank = hf_radin.compute_logits(gathered, {"validation": moved}, cache_dir=tmp_path)
    assert bank.labels.tolist() == labels and bank.classes == tuple(NAMES)


def test_a_dataset_may_have_fewer_classes_than_the_models(gathered, tmp_path):
    images, _ = digit_images(slice(700, 703))
    few = image_dataset(images, [0, 1, 0], ["seven", "three"])
    assert hf_radin.compute_logits(gathered, {"validation": few}, cache_dir=tmp_path).labels.tolist() == [7, 3, 7]


def test_numbers_without_names_are_matched_by_index(gathered, tmp_path):
    images, labels = digit_images(slice(700, 710))
    plain = image_dataset(images, labels, names=None)
    assert hf_radin.compute_logits(gathered, {"validation": plain}, cache_dir=tmp_path).labels.tolist() == labels


def test_strings_are_matched_by_name(gathered, tmp_path):
    images, labels = digit_images(slice(700, 710))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    named = datasets.Dataset.from_dict({"image": images, "label": [NAMES[label] for label in labels]}, features)
    assert hf_radin.compute_logits(gathered, {"validation": named}, cache_dir=tmp_path).labels.tolist() == labels


def test_a_class_that_the_models_do_not_know_is_named_before_an_image_is_read(gathered, tmp_path):
    images, _ = digit_images(slice(700, 703))
    odd = image_dataset(images, [0, 1, 2], ["zero", "two", "dog"])
    with pytest.raises(ValueError, match=r"classes that the models don't know: dog\. The models know zero, one"):
        hf_radin.compute_logits(gathered, {"validation": odd}, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("label", [-1, 10, None])
def test_a_label_that_is_none_is_named_with_its_sample(gathered, tmp_path, label):
    images, labels = digit_images(slice(700, 705))
    plain = image_dataset(images, [*labels[:3], label, *labels[4:]], names=None)
    with pytest.raises(ValueError, match=f"Sample 3 of .* has the label {label}, which the models don't know"):
        hf_radin.compute_logits(gathered, {"validation": plain}, cache_dir=tmp_path)


def test_an_unreadable_image_is_named(gathered, tmp_path):
    files = [*FILES.values()][:3]
    broken = {"bytes": files[1]["bytes"][:40], "path": "holiday.png"}
    with pytest.raises(ValueError, match=r"Sample 1 of .*\(holiday.png\): the image can't be read.*on_error='skip'"):
        compute(gathered, tmp_path, [files[0], broken, files[2]])


def test_or_left_out_and_counted(gathered, tmp_path, caplog):
    files = [*FILES.values()][:3]
    broken = {"bytes": b"no image", "path": None}
    bank = compute(gathered, tmp_path, [files[0], broken, files[2]], [4, 5, 6], on_error="skip")
    assert (len(bank), bank.ids.tolist(), bank.labels.tolist()) == (2, [0, 2], [4, 6])
    assert bank.manifest.skipped == (1,) and "1 of 3 images can't be read" in caplog.text


def test_a_split_with_no_usable_image_is_refused(gathered, tmp_path):
    with pytest.raises(ValueError, match="no image to use; 1 were skipped"):
        compute(gathered, tmp_path, [{"bytes": b"no image", "path": None}], on_error="skip")
    with pytest.raises(ValueError, match="no image to use; 0 were skipped"):
        compute(gathered, tmp_path, [])


def test_a_block_may_be_skipped_whole(gathered, tmp_path):
    size = block_size(200)
    broken = {"bytes": b"no image", "path": None}
    files = [*FILES.values()]
    bank = compute(gathered, tmp_path, [files[0], *[broken] * (2 * size - 1), files[1]], on_error="skip")
    assert bank.ids.tolist() == [0, 2 * size] and bank.logits(0).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "has no split 'dev'; it has 'train', 'validation', 'test'"),
        (
            {"image_column": "picture"},
            r"no image column 'picture'; its columns are image \(Image\), label \(ClassLabel\)",
        ),
        ({"label_column": "kind"}, r"no label column 'kind'; its columns are image \(Image\), label \(ClassLabel\)"),
        ({"image_column": "label"}, "no image column 'label'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "big"}, "batch_size='big'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
    ],
)
def test_what_is_not_there_is_refused_and_what_is_there_named(gathered, digits, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path, **options)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": None},
            r"has 0 columns of class labels; its columns are image \(Image\)\. Name one with label_column",
        ),
        ({"label": None}, r"has 0 image columns; its columns are label \(ClassLabel\)"),
        ({"image": None, "other": None, "label": None}, "has 2 image columns; .* Name one with image_column"),
    ],
)
def test_columns_that_can_not_be_told_are_asked_for(gathered, tmp_path, columns, message):
    images, labels = digit_images(slice(0, 3))
    label = datasets.ClassLabel(names=NAMES)
    values = {"image": (images, datasets.Image()), "other": (images, datasets.Image()), "label": (labels, label)}
    dataset = datasets.Dataset.from_dict(
        {name: values[name][0] for name in columns},
        features=datasets.Features({name: values[name][1] for name in columns}),
    )
    with pytest.raises(ValueError, match=message):
        hf_radin.compute_logits(gathered, {"validation": dataset}, cache_dir=tmp_path)


def test_a_dataset_that_is_nowhere_is_refused(gathered, tmp_path):
    (tmp_path / "empty").mkdir()
    for dataset in (tmp_path / "empty", 3, ["a"]):
        with pytest.raises(ValueError):
            hf_radin.compute_logits(gathered, dataset, cache_dir=tmp_path / "cache")


def folder_of_images(folder, images, labels):
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / "validation" / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:03}.png")
    return folder


@pytest.mark.parametrize("kind", ["parquet", "images", "on disk", "object", "stream", "generator"])
def test_every_kind_of_dataset_gives_the_same_accuracy(gathered, digits, tmp_path, kind):
    images, labels = digit_images(PARTS["validation"])
    images, labels = images[:300], labels[:300]  # more than a block
    dataset = image_dataset(images, labels)
    if kind == "parquet":
        dataset.to_parquet(tmp_path / "data" / "validation.parquet")
        source = tmp_path / "data"
    elif kind == "images":
        source = folder_of_images(tmp_path / "data", images, labels)
    elif kind == "on disk":
        datasets.DatasetDict(validation=dataset).save_to_disk(tmp_path / "data")
        source = tmp_path / "data"
    elif kind == "object":
        source = dataset
    elif kind == "stream":
        source = dataset.to_iterable_dataset(num_shards=3)
    else:
        rows = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
        source = datasets.IterableDataset.from_generator(lambda: iter(rows))
    bank = hf_radin.compute_logits(gathered, source, cache_dir=tmp_path / "cache")
    assert len(bank) == 300 and bank.ids.tolist() == list(range(300))
    reference = hf_radin.compute_logits(gathered, dataset, cache_dir=tmp_path / "reference")
    assert bank.score(np.eye(2)).tolist() == reference.score(np.eye(2)).tolist()


def test_the_pil_backend_is_told_apart_and_works(gathered, digits, tmp_path, monkeypatch):
    from transformers import AutoImageProcessor

    from hf_radin.checkpoints import model

    with_torchvision = hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path)
    monkeypatch.setattr(
        model, "load_processor", lambda folder, **_: AutoImageProcessor.from_pretrained(folder, backend="pil")
    )
    with_pil = hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path)
    assert (with_torchvision.manifest.run.processor["backend"], with_pil.manifest.run.processor["backend"]) == (
        "torchvision",
        "pil",
    )
    assert with_pil.folder != with_torchvision.folder
    # the digits have the processor's size already, so that nothing is left to interpolate differently
    np.testing.assert_allclose(with_pil.logits(0), with_torchvision.logits(0), atol=1e-4)


def test_images_that_are_not_of_one_size_are_refused(two, tmp_path):
    for folder in two.iterdir():
        ViTImageProcessor(do_resize=False).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"pixel_values of different shapes: \(3, 20, 14\) of sample 0, \(3, 8, 8\)"):
        compute(hf_radin.gather(f"{two}/*"), tmp_path, [gradient("RGB"), Image.new("RGB", (8, 8))])
    assert not list(tmp_path.rglob("*.npy"))  # no pass began


def test_a_saved_split_has_no_other(gathered, digits, tmp_path):
    split = datasets.load_dataset(str(digits), split="validation")
    split.save_to_disk(tmp_path / "named")
    datasets.Dataset.from_dict(split[:], features=split.features).save_to_disk(tmp_path / "nameless")
    with pytest.raises(ValueError, match="has no split 'test'; it has 'validation'"):
        hf_radin.compute_logits(gathered, tmp_path / "named", split="test", cache_dir=tmp_path / "cache")
    bank = hf_radin.compute_logits(gathered, tmp_path / "nameless", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="another one has to prove it"):
        hf_radin.uniform(bank, test_split="test")


def test_images_named_by_their_paths_are_looked_at_again_when_they_change(gathered, tmp_path):
    images, labels = digit_images(slice(700, 704))
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    split = datasets.Dataset.from_dict({"image": paths, "label": labels}).cast_column("image", datasets.Image())
    before = hf_radin.compute_logits(gathered, split, cache_dir=tmp_path / "cache")
    images[0].rotate(90).save(paths[3])
    after = hf_radin.compute_logits(gathered, split, cache_dir=tmp_path / "cache")
    assert (before.logits(0)[:3] == after.logits(0)[:3]).all() and (before.logits(0)[3] != after.logits(0)[3]).any()


def test_linked_folders_are_looked_into_and_links_may_run_in_circles(gathered, digits, tmp_path):
    (tmp_path / "real").mkdir()
    for path in (digits / "data").iterdir():
        (tmp_path / "real" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "data").symlink_to(tmp_path / "real")
    before = listing_hash(tmp_path / "linked")
    (tmp_path / "real" / "validation-00000-of-00001.parquet").write_bytes(b"other")
    assert listing_hash(tmp_path / "linked") != before
    (tmp_path / "real" / "circle").symlink_to(tmp_path / "linked")
    assert listing_hash(tmp_path / "linked")


def test_classes_that_are_numbers_in_another_order_are_matched_by_number():
    split = Split([], "d", None, "s", None, "k", "image", "label", None, label_dtype="int64")
    to_class = match_labels(split, ("1", "0", "2"))
    assert [to_class(label) for label in (0, 1, 2)] == [1, 0, 2]


def test_what_is_not_the_images_fault_is_not_skipped(gathered, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr(datasets.Image, "decode_example", fail)
    with pytest.raises(MemoryError):
        compute(gathered, tmp_path, list(FILES.values()), on_error="skip")


def test_a_format_of_the_users_does_not_matter(gathered, digits, tmp_path):
    split = datasets.load_dataset(str(digits), split="validation").select(range(20))
    bank = hf_radin.compute_logits(gathered, split.with_format("torch", columns=["label"]), cache_dir=tmp_path)
    assert bank.labels.tolist() == split["label"]


def test_a_broken_file_of_data_is_named(gathered, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "validation.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="data can't be read as a dataset"):
        hf_radin.compute_logits(gathered, tmp_path / "data", cache_dir=tmp_path / "cache")


def test_a_folder_is_looked_through_once_until_it_changes(digits, tmp_path, monkeypatch):
    shutil.copytree(digits, tmp_path / "digits")
    looked, load = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: looked.append(1) or load(*args, **options))
    source = DataSource(tmp_path / "digits")
    opened = [open_split(source.at(name)) for name in ("train", "validation", "validation")]
    streams = [iter(split.rows) for split in opened[1:]]
    next(streams[0])
    labels = [[row["label"] for row in stream] for stream in streams]  # neither goes on where the other stopped
    assert len(looked) == 1 and [*map(len, labels)] == [599, 600] and labels[0] == labels[1][1:]
    shutil.copy(
        digits / "data" / "test-00000-of-00001.parquet",
        tmp_path / "digits" / "data" / "validation-00000-of-00001.parquet",
    )
    again = open_split(source)
    assert len(looked) == 2 and sum(1 for _ in again.rows) == 497


def bytes_of(part: slice) -> list[bytes]:
    return [as_file(image)["bytes"] for image in digit_images(part)[0]]


def structs(kind: pa.DataType, paths: pa.DataType | None) -> pa.Array:
    files = bytes_of(slice(0, 4))
    fields = {"bytes": pa.array(files, kind)} | ({} if paths is None else {"path": pa.array([None] * 4, paths)})
    return pa.StructArray.from_arrays(list(fields.values()), list(fields))


STRUCTS = {  # as pandas, polars and pyarrow write what looks like an image to datasets, without its metadata
    "pandas": (pa.binary(), pa.null()),
    "polars": (pa.large_binary(), pa.null()),
    "large": (pa.large_binary(), pa.large_string()),
    "views": (pa.binary_view(), pa.string_view()),
    "bytes alone": (pa.binary(), None),
}
COLUMNS = {"binary": pa.binary(), "large_binary": pa.large_binary()}


def write_parquet(folder, images: pa.Array, **others: pa.Array):
    folder.mkdir()
    columns = {"image": images, "label": pa.array([NAMES[label] for label in digit_images(slice(0, 4))[1]])}
    pq.write_table(pa.table({**columns, **others}), folder / "validation.parquet")
    return folder


def is_as_plain(bank, gathered, tmp_path) -> bool:
    plain = hf_radin.compute_logits(gathered, image_dataset(*digit_images(slice(0, 4))), cache_dir=tmp_path / "plain")
    return np.array_equal(bank.logits(0), plain.logits(0)) and bank.labels.tolist() == plain.labels.tolist()


@pytest.mark.parametrize("kind", STRUCTS)
def test_image_bytes_without_the_metadata_of_datasets_are_taken_and_that_is_said(gathered, tmp_path, caplog, kind):
    """datasets#7765, #4692."""
    folder = write_parquet(tmp_path / "data", structs(*STRUCTS[kind]))
    bank = hf_radin.compute_logits(gathered, folder, cache_dir=tmp_path / "cache")
    assert is_as_plain(bank, gathered, tmp_path)
    assert caplog.text.count("are taken from the bytes in its column 'image'") == 1


@pytest.mark.parametrize("kind", [*COLUMNS, "paths"])
def test_bytes_and_paths_alone_are_images_where_their_column_is_named(gathered, tmp_path, kind):
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path, content in zip(paths, bytes_of(slice(0, 4)), strict=True):
        path.write_bytes(content)
    images = pa.array(list(map(str, paths)) if kind == "paths" else bytes_of(slice(0, 4)), COLUMNS.get(kind))
    folder = write_parquet(tmp_path / "data", images)
    with pytest.raises(ValueError, match=r"0 image columns; .*Name one with image_column \(--image-column\)"):
        hf_radin.compute_logits(gathered, folder, cache_dir=tmp_path / "cache")
    bank = hf_radin.compute_logits(gathered, folder, image_column="image", cache_dir=tmp_path / "cache")
    assert is_as_plain(bank, gathered, tmp_path)


def test_of_two_columns_of_bytes_one_is_named(gathered, tmp_path):
    other = structs(*STRUCTS["polars"]).take(pa.array([3, 2, 1, 0]))
    folder = write_parquet(tmp_path / "data", structs(*STRUCTS["pandas"]), thumbnail=other)
    with pytest.raises(ValueError, match=r"0 image columns; .*thumbnail \(dict\)"):
        hf_radin.compute_logits(gathered, folder, cache_dir=tmp_path / "cache")
    bank = hf_radin.compute_logits(gathered, folder, image_column="image", cache_dir=tmp_path / "cache")
    assert is_as_plain(bank, gathered, tmp_path)


def test_what_datasets_would_take_for_pixels_is_refused(gathered, tmp_path):
    numbers = pa.array([list(content) for content in bytes_of(slice(0, 4))], pa.list_(pa.uint8()))
    folder = write_parquet(tmp_path / "data", numbers)
    with pytest.raises(ValueError, match=r"no image column 'image'; its columns are image \(List\).*write what else"):
        hf_radin.compute_logits(gathered, folder, image_column="image", cache_dir=tmp_path / "cache")


def pack(path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    elif ".tar" in path.suffixes:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    else:
        path.write_bytes(b"of a kind that datasets can't unpack")


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tgz", "7z", "rar"])
def test_archives_of_class_folders_are_to_be_unpacked(gathered, tmp_path, suffix):
    """datasets#8419."""
    files = {f"{NAMES[number % 2]}/{number}.png": content for number, content in enumerate(bytes_of(slice(0, 4)))}
    for name in ("train", "validation"):
        pack(tmp_path / "data" / f"{name}.{suffix}", files)
    with pytest.raises(ValueError, match=rf"{tmp_path}/data .*npack its archives \(train\.{suffix}, validation"):
        hf_radin.compute_logits(gathered, tmp_path / "data", cache_dir=tmp_path / "cache")


def test_tars_of_webdataset_are_read(gathered, tmp_path):
    images, labels = bytes_of(slice(0, 4)), digit_images(slice(0, 4))[1]
    files = {f"{number:04}.png": content for number, content in enumerate(images)}
    files |= {f"{number:04}.cls": str(label).encode() for number, label in enumerate(labels)}
    files |= {f"{number:04}.json": json.dumps({"label": label}).encode() for number, label in enumerate(labels)}
    pack(tmp_path / "data" / "validation-0000.tar", dict(sorted(files.items())))
    with pytest.raises(ValueError, match="0 columns of class labels"):
        hf_radin.compute_logits(gathered, tmp_path / "data", cache_dir=tmp_path / "cache")
    bank = hf_radin.compute_logits(gathered, tmp_path / "data", label_column="cls", cache_dir=tmp_path / "cache")
    assert is_as_plain(bank, gathered, tmp_path)
