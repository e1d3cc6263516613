"""Images that lie on the Hub one by one are read as those of a folder, and a Hub that fails is told from a dataset."""

import io

import pytest
from shared.other_hubs import alter, alter_json, refusal
from shared.training import NAMES, digit_images

import hf_radin
from hf_radin.images.decode import example_images
from hf_radin.images.digests import image_digest, with_bytes
from hf_radin.images.split import DataSource, open_split

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


def test_images_that_lie_one_by_one_are_fetched_and_identified_by_their_bytes(files, runs, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01]"), "org/pictures", cache_dir=tmp_path)
    names = sorted(files)
    assert sorted(LABELS) == sorted(bank.manifest.classes.index(name.split("/")[1]) for name in names)
    digests = {image_digest({"bytes": content}).encode() for content in files.values()}
    assert len(bank) == 7 and {*bank.digests.tolist()} == digests


def test_an_image_that_the_hub_does_not_give_is_no_broken_image(hub, files):
    """Also where broken ones may be left out."""
    split = open_split(DataSource("org/pictures"))
    rows = list(split.rows)
    alter(hub, "GET", "/6.png", refusal(404))
    alter(hub, "HEAD", "/6.png", refusal(404))
    with pytest.raises(OSError):
        example_images(split)
    with pytest.raises(OSError):
        [with_bytes(row[split.image_column]) for row in rows]


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
