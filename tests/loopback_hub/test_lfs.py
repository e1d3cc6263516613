"""Large files are uploaded in parts, and what the Hub keeps is what was announced."""

from dataclasses import replace

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, get_session, lfs
from huggingface_hub.errors import HfHubHTTPError
from shared.pushed import contents, folder, held, quick

from hf_radin.runtime.hub_commit import PushOptions
from hf_radin.soup import push
from loopback_hub.wire import Fault

__all__ = ["folder", "quick"]  # fixtures

WEIGHTS = bytes(range(256)) * 10


@pytest.fixture
def parts(hub):
    """A repository, and a Hub that wants objects of more than 1000 bytes in parts."""
    hub.add_repo("org/soup", {})
    hub.part_size = 1000
    return hub


def announced(data: bytes) -> tuple[str, dict]:
    """The object's name, and what the Hub answers to its announcement."""
    info = lfs.UploadInfo.from_bytes(data)
    (action,), _, transfer = lfs.post_lfs_batch_info([info], token=None, repo_type="model", repo_id="org/soup")
    assert transfer == "multipart"
    return action["oid"], action["actions"]["upload"]


def test_what_is_larger_than_a_part_comes_in_parts(parts):
    operations = [CommitOperationAdd("model.safetensors", WEIGHTS), CommitOperationAdd("small.bin", WEIGHTS[:1000])]
    HfApi().create_commit("org/soup", operations, commit_message="words")
    assert parts.files("org/soup") == {"model.safetensors": WEIGHTS, "small.bin": WEIGHTS[:1000]}
    assert sorted(request.received for request in parts.logged("PUT")) == [560, 1000, 1000, 1000]
    assert len(parts.logged("POST", "/complete")) == 1


def test_a_part_that_is_lost_is_sent_again(parts):
    parts.faults += [Fault("PUT", "/2", 503), Fault("PUT", "/3", None, halfway=True), Fault("POST", "/complete", 503)]
    HfApi().upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id="org/soup")
    assert parts.files("org/soup") == {"model.safetensors": WEIGHTS}
    assert [request.status for request in parts.logged("PUT")] == [200, 503, 200, 0, 200]


def test_parts_of_something_else_are_refused(parts):
    operation = CommitOperationAdd("model.safetensors", WEIGHTS)
    operation.path_or_fileobj = WEIGHTS[::-1]
    with pytest.raises(RuntimeError, match="uploading") as refusal:
        HfApi().create_commit("org/soup", [operation], commit_message="Lie")
    assert isinstance(refusal.value.__cause__, HfHubHTTPError) and "2560 bytes" in str(refusal.value.__cause__)
    assert parts.files("org/soup") == {}


@pytest.mark.parametrize(
    ("completed", "status"),
    [
        (lambda tags: list(enumerate(tags, 1)), 200),
        (lambda tags: list(enumerate(tags[:2], 1)), 400),
        (lambda tags: list(enumerate(tags, 1))[::-1], 400),
        (lambda tags: list(enumerate(tags[::-1], 1)), 400),
        (lambda tags: list(enumerate([*tags, tags[0]], 1)), 400),
    ],
    ids=["all", "too few", "in another order", "of other tags", "too many"],
)
def test_the_completion_must_be_of_the_parts_received(parts, completed, status):
    oid, upload = announced(WEIGHTS)
    header = upload["header"]
    assert header.pop("chunk_size") == "1000" and len(header) == 3
    urls = [url for _, url in sorted(header.items())]
    sent = [get_session().put(url, content=WEIGHTS[i * 1000 :][:1000]) for i, url in enumerate(urls)]
    numbered = completed([response.headers["etag"] for response in sent])
    completion = {"oid": oid, "parts": [{"partNumber": number, "etag": tag} for number, tag in numbered]}
    assert get_session().post(upload["href"], json=completion).status_code == status
    assert (oid in parts.repos["model", "org/soup"].objects) == (status == 200)


def test_a_part_that_never_came_is_missed(parts):
    oid, upload = announced(WEIGHTS)
    tag = get_session().put(upload["header"]["00001"], content=WEIGHTS[:1000]).headers["etag"]
    completion = {"oid": oid, "parts": [{"partNumber": 1, "etag": tag}]}
    assert get_session().post(upload["href"], json=completion).status_code == 400


def test_a_part_of_what_was_not_announced_is_refused(parts):
    _, upload = announced(WEIGHTS)
    url = upload["header"]["00001"].replace("/lfs/", f"/lfs/{'0' * 64}/").rsplit("/", 2)
    assert get_session().put(f"{url[0]}/1", content=b"").status_code == 400


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("PUT", "/2", None), None),
        (Fault("PUT", "/2", None, answered=True), None),
        (Fault("PUT", "/2", 403), "403"),
        (Fault("POST", "/complete", None), None),
        (Fault("POST", "/complete", None, answered=True), "404"),  # there is no such upload any more
        (Fault("POST", "/complete", 403), "403"),
    ],
    ids=lambda value: f"{value.method} {value.status} {value.answered}" if isinstance(value, Fault) else str(value),
)
def test_a_push_in_parts_happens_whole_or_not_at_all(hub, folder, fault, message):
    hub.part_size = (folder / "model.safetensors").stat().st_size // 3
    hub.faults.append(replace(fault))
    if message:
        with pytest.raises(ValueError, match=rf"^org/soup: .*{message}"):
            push.push_folder(folder, "org/soup", PushOptions(), push.CardOptions())
        assert held(hub, "org/soup") == {}
    push.push_folder(folder, "org/soup", PushOptions(), push.CardOptions())
    assert held(hub, "org/soup") == contents(folder) and len(hub.commits("org/soup")) == 2
    assert not hub.faults and len(hub.logged("PUT")) >= 4
