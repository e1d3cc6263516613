"""Images of the Hub, one by one or by their addresses, are those of a folder; a Hub that fails is no dataset."""

import io

import datasets
import pytest
from shared.other_hubs import alter, alter_json, refusal
from shared.training import NAMES, digit_images

import hf_radin
from hf_radin.images.decode import Source, decode, example_images
from hf_radin.images.digests import image_digest, split_digests, token_for
from hf_radin.images.split import DataSource, Split, open_split

# Seven images in folders of their classes.
IMAGES, LABELS = digit_images(slice(700, 707))


@pytest.fixture
def files(hub) -> dict[str, bytes]:
    """The files of a dataset on the Hub, by their names there."""
    files = {}
    for number, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files[f"validation/{NAMES[label]}/{number}.png"] = buffer.getvalue()
    hub.add_repo("org/pictures", files, "dataset")
    return files


def test_images_that_lie_one_by_one_are_those_of_a_folder(files, runs, tmp_path):
    for name, content in files.items():
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(content)
    gathered = hf_radin.gather(f"{runs}/ft-[01]")
    banks = [
        hf_radin.compute_logits(gathered, name, cache_dir=tmp_path) for name in ("org/pictures", tmp_path / "pictures")
    ]
    assert [bank.labels.tolist() for bank in banks] == [
        [NAMES.index(name.split("/")[1]) for name in sorted(files)]
    ] * 2
    assert (banks[0].logits(0) == banks[1].logits(0)).all()
    assert (banks[0].digests == banks[1].digests).all()  # of the files as they are


def test_a_broken_one_among_them_is_named_or_left_out(files, hub, runs, tmp_path):
    name = sorted(files)[2]
    hub.add_commit("org/pictures", {name: files[name][:50]}, "dataset")
    gathered = hf_radin.gather(f"{runs}/ft-[01]")
    with pytest.raises(
        ValueError, match=rf"Sample 2 of org/pictures.*{name}.*the image can't be read: .*--on-error skip"
    ):
        hf_radin.compute_logits(gathered, "org/pictures", cache_dir=tmp_path)
    bank = hf_radin.compute_logits(gathered, "org/pictures", cache_dir=tmp_path, on_error="skip")
    assert bank.ids.tolist() == [0, 1, 3, 4, 5, 6] and bank.manifest.skipped == (2,)


def test_those_of_a_private_dataset_are_fetched_with_the_token(hub, files, runs, tmp_path, monkeypatch):
    hub.add_repo("org/secret", files, "dataset", private=True)
    monkeypatch.delenv("HF_TOKEN")
    gathered = hf_radin.gather(f"{runs}/ft-[01]")
    bank = hf_radin.compute_logits(gathered, "org/secret", cache_dir=tmp_path, token=hub.token)
    assert len(bank) == len(files)


@pytest.mark.parametrize("token", [None, True, "hf_secret"])
def test_no_other_host_is_given_the_token(hub, token):
    for address in ("hf://datasets/org/pictures@main/3.png", f"{hub.url}/datasets/org/pictures/resolve/main/3.png"):
        assert token_for(address, token) == token
    for address in ("https://example.org/3.png", f"{hub.url}@example.org/3.png", f"{hub.url}.example.org/3.png"):
        assert token_for(address, token) is False


@pytest.fixture
def addressed(hub, files) -> Split:
    """A split that names its images by their addresses."""
    addresses = [f"{hub.url}/datasets/org/pictures/resolve/main/{name}" for name in files]
    rows = datasets.Dataset.from_dict({"image": addresses, "label": LABELS}).cast_column("image", datasets.Image())
    return open_split(DataSource(rows, "train", label_column="label"))


def test_images_that_are_named_by_their_addresses_are_fetched(files, addressed, tmp_path):
    assert [image.size for image in example_images(addressed).values()] == [(8, 8)]
    digests = [image_digest({"bytes": content}).encode() for content in files.values()]
    assert split_digests(addressed, tmp_path).tolist() == digests


def test_an_image_that_can_not_be_fetched_is_no_broken_image(hub, addressed):
    """Also where broken ones may be left out."""
    for method in ("GET", "HEAD"):
        alter(hub, method, "/3.png", refusal(404))
    source = Source(addressed, lambda image: {}, int, "skip", 10)
    with pytest.raises(OSError, match=r"3\.png"):
        example_images(addressed)
    with pytest.raises(OSError, match=r"3\.png"):
        decode(source, (0, 0), list(addressed.rows)[3:])


@pytest.mark.parametrize("sha", [None, 3])
def test_a_hub_that_names_no_commit_of_a_dataset(hub, files, sha):
    alter_json(hub, "GET", "/api/datasets/org/pictures", lambda info: info | {"sha": sha})
    with pytest.raises(ValueError, match="The dataset org/pictures: the Hub does not say at which commit it is"):
        open_split(DataSource("org/pictures"))


def test_a_hub_that_lists_no_files_refuses(hub, files):
    alter(hub, "GET", "/tree/", refusal(403, {"error": "not today"}))
    alter(hub, "POST", "/paths-info/", refusal(403, {"error": "not today"}))
    with pytest.raises(ValueError, match=r"The dataset org/pictures: the Hub refuses: .*not today"):
        open_split(DataSource("org/pictures"))


def test_a_dataset_without_files_is_none_that_can_be_read(hub):
    hub.add_repo("org/empty", {"README.md": b"# nothing"}, "dataset")
    with pytest.raises(ValueError, match="The dataset org/empty can't be read: "):
        open_split(DataSource("org/empty"))
