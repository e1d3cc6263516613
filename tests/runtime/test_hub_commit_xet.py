"""Files that go by Xet arrive as they were, or not at all."""

import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, lfs
from huggingface_hub.utils._xet import abort_xet_session
from loopback_hub.fixtures import reread_environment
from loopback_hub.wire import Fault, Reply
from shared.pushed import OLD, contents, folder, held, quick

from hf_radin.cli.main import main
from hf_radin.runtime import hub_errors
from hf_radin.runtime.hub_commit import PushOptions, commit_files
from hf_radin.soup import push

__all__ = ["folder", "quick"]  # fixtures

NOISE = random.Random(0).randbytes(1_500_000)
FLOATS = np.random.default_rng(0).normal(size=300_001).astype("<f4").tobytes() + b"odd"  # no multiple of four bytes
TEXT = "\n".join(str(number / 7) for number in range(100_000)).encode()


def upload(*files: bytes) -> None:
    added = [CommitOperationAdd(f"{number}.bin", file) for number, file in enumerate(files)]
    HfApi().create_commit("org/soup", added, commit_message="words")


def schemes(xorb: bytes) -> set[int]:
    """How its chunks are packed."""
    packings, at = set(), 0
    while at < len(xorb):
        packings.add(xorb[at + 4])
        at += 8 + int.from_bytes(xorb[at + 1 : at + 4], "little")
    return packings


def test_files_of_every_kind_arrive_in_one_commit(xet_hub, tmp_path):
    xet_hub.add_repo("org/soup", {})
    files = {"noise.bin": NOISE, "floats.bin": FLOATS, "text.bin": TEXT, "small.bin": b"\0", "README.md": b"# words"}
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    (tmp_path / "file").write_bytes(NOISE[::-1])
    operations.append(CommitOperationAdd("path.bin", tmp_path / "file"))
    xorbs, answer = [], xet_hub.xet.answer
    xet_hub.xet.answer = lambda call: (xorbs.append(call.body) if "/xorbs/" in call.path else None) or answer(call)
    HfApi().create_commit("org/soup", operations, commit_message="words")
    assert xet_hub.files("org/soup") == files | {"path.bin": NOISE[::-1]}
    assert len(xet_hub.commits("org/soup")) == 2
    assert not xet_hub.logged("PUT") and not xet_hub.logged("POST", "/lfs/")
    assert set.union(*map(schemes, xorbs)) == {0, 1, 2}


def test_a_dataset_and_a_pull_request(xet_hub):
    xet_hub.add_repo("stranger/data", {}, "dataset")
    where = {"repo_id": "stranger/data", "repo_type": "dataset", "create_pr": True}
    HfApi().upload_file(path_or_fileobj=TEXT, path_in_repo="a.bin", **where)
    assert xet_hub.files("stranger/data", "refs/pr/1", "dataset") == {"a.bin": TEXT}


def test_chunks_that_are_known_are_not_sent_again(xet_hub):
    for repo_id in ("org/soup", "org/other"):
        xet_hub.add_repo(repo_id, {})
        HfApi().upload_file(path_or_fileobj=NOISE, path_in_repo="a.bin", repo_id=repo_id)
        assert xet_hub.files(repo_id) == {"a.bin": NOISE}
    assert len(xet_hub.logged("POST", "/v1/xorbs/")) == 1 and len(xet_hub.logged("POST", "/shards")) == 2


def test_clients_that_know_but_the_first_version_of_shards(xet_hub, monkeypatch):
    monkeypatch.setenv("HF_XET_CLIENT_SHARD_API_VERSION", "1")
    abort_xet_session()
    xet_hub.add_repo("org/soup", {})
    upload(TEXT)
    assert xet_hub.files("org/soup") == {"0.bin": TEXT} and xet_hub.logged("POST", "/v1/shards")


def test_a_client_that_asks_first_is_told_to_use_xet(xet_hub):
    xet_hub.add_repo("org/soup", {})
    request = {"upload_infos": [lfs.UploadInfo.from_bytes(b"weights")], "token": None}
    where = {"repo_type": "model", "repo_id": "org/soup"}
    for transfers, chosen in ((["basic", "multipart", "xet"], "xet"), (["basic", "multipart"], "basic")):
        assert lfs.post_lfs_batch_info(**request, **where, transfers=transfers)[2] == chosen


@pytest.mark.parametrize(
    ("part", "spoil"),
    [
        ("/xorbs/", lambda call: {"body": call.body[:8] + b"?" + call.body[9:]}),
        ("/xorbs/", lambda call: {"body": call.body[:-1]}),
        ("/xorbs/", lambda call: {"path": call.path.replace(call.path[-9:], "012345678")}),
        ("/shards", lambda call: {"body": call.body[:132] + bytes(4) + call.body[136:]}),
        ("/shards", lambda call: {"body": call.body[:150]}),
    ],
    ids=["a byte of a chunk", "the end of a xorb", "the name of a xorb", "the size of a term", "the end of a shard"],
)
def test_what_is_spoilt_on_the_way_is_refused(xet_hub, part, spoil):
    xet_hub.add_repo("org/soup", {})
    answer = xet_hub.xet.answer
    xet_hub.xet.answer = lambda call: answer(replace(call, **spoil(call)) if part in call.path else call)
    with pytest.raises(ConnectionError, match="400 Bad Request"):
        upload(NOISE)
    assert xet_hub.files("org/soup") == {} and not xet_hub.repos["model", "org/soup"].objects


def test_the_storage_wants_the_token_that_the_hub_gave_for_it(xet_hub):
    xet_hub.add_repo("org/soup", {})
    xet_hub.add_repo("stranger/soup", {})

    def token(place: str, sent: str = xet_hub.token) -> str:
        answer = get_session().get(f"{xet_hub.url}/api/models/{place}", headers={"Authorization": f"Bearer {sent}"})
        return answer.json().get("accessToken", answer.status_code)

    def status(sent: str) -> int:
        xorb = f"{xet_hub.xet.url}/v1/xorbs/default/{'0' * 64}"
        return get_session().post(xorb, headers={"Authorization": f"Bearer {sent}"}).status_code

    assert token("stranger/soup/xet-write-token/main") == 403
    assert token("org/none/xet-read-token/main") == 404
    assert status(xet_hub.token) == 401
    assert status(token("org/soup/xet-read-token/main")) == 403
    assert status(token("org/soup/xet-write-token/main")) == 200


# -- pushes -----------------------------------------------------------------------------------------------------------


def test_a_push_of_a_soup(xet_hub, folder):
    made = push.push_folder(folder, "org/soup", PushOptions())
    assert held(xet_hub, "org/soup") == contents(folder)
    assert [commit.title for commit in xet_hub.commits("org/soup")] == [push.COMMIT_MESSAGE, "initial commit"]
    assert xet_hub.commits("org/soup")[0].sha == made.oid
    assert len(xet_hub.logged("POST", "/v1/xorbs/")) == 1 and not xet_hub.logged("PUT")


def test_a_hub_without_xet_says_how_to_push_all_the_same(hub, folder, capsys):
    hub.add_repo("org/soup", OLD)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_DISABLE_XET", "0")
        reread_environment()
        assert main(["push", str(folder), "org/soup", "--overwrite"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Xet" in line]
    assert "org/soup: Xet fails" in line and "404" in line and "set HF_HUB_DISABLE_XET=1" in line
    assert held(hub, "org/soup") == OLD
    reread_environment()  # the fixture has set HF_HUB_DISABLE_XET=1
    assert main(["push", str(folder), "org/soup", "--overwrite"]) == 0
    assert held(hub, "org/soup") == contents(folder) | {"notes.txt": OLD["notes.txt"]}


def forget_chunks() -> None:
    """Otherwise only the first push would send them."""
    abort_xet_session()
    shutil.rmtree(constants.HF_XET_CACHE, ignore_errors=True)


# The further requests of a push by Xet, in turn.
REQUESTS = [
    ("GET", "/xet-write-token/"),
    ("GET", "/v1/chunks/"),
    ("POST", "/v1/xorb-grants/"),
    ("POST", "/v1/xorbs/"),
    ("POST", "/v2/shards"),
]


def test_the_faults_are_tried_at_each_request_to_xet(xet_hub, folder):
    push.push_folder(folder, "org/soup", PushOptions())
    others = ("/api/", "/resolve/")
    to_xet = [
        request
        for request in xet_hub.requests
        if "xet" in request.path or not any(part in request.path for part in others)
    ]
    for request in to_xet:
        assert any(request.method == method and part in request.path for method, part in REQUESTS), request
    for method, part in REQUESTS:
        assert xet_hub.logged(method, part), (method, part)


FAULTS = {
    "500 once": {"status": 500},
    "reset once": {"status": None},
    "answer lost once": {"status": None, "answered": True},
    "halfway once": {"status": None, "halfway": True},
    "403 always": {"status": 403, "times": 99},
    "500 always": {"status": 500, "times": 99},
}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_xet_does_the_repository_holds_the_old_or_the_new(xet_hub, folder, fault, existing):
    """hf_xet tries passing faults again; others end in an error of one line, and pushing again finishes the job."""
    before = OLD if existing else {}
    new = contents(folder) | ({"notes.txt": OLD["notes.txt"]} if existing else {})
    for number, (method, part) in enumerate(REQUESTS):
        repo_id = f"org/soup-{number}"
        if existing:
            xet_hub.add_repo(repo_id, OLD)
        forget_chunks()
        asked_before = len(xet_hub.logged(method, part))
        xet_hub.faults.append(Fault(method, part, **FAULTS[fault]))
        if "always" in fault and part != "/v1/chunks/":  # what others have it can do without
            with pytest.raises(ValueError, match=rf"^{repo_id}: Xet fails: .*HF_HUB_DISABLE_XET=1") as error:
                push.push_folder(folder, repo_id, PushOptions(overwrite=existing))
            assert len(str(error.value).splitlines()) == 1 and xet_hub.token not in str(error.value)
            assert held(xet_hub, repo_id) == before
            assert len(xet_hub.logged(method, part)) - asked_before < (2 if "403" in fault else 10)
            xet_hub.faults.clear()
        push.push_folder(folder, repo_id, PushOptions(overwrite=existing))
        assert held(xet_hub, repo_id) == new and len(xet_hub.commits(repo_id)) == 2
        assert "always" in fault or not xet_hub.faults
        xet_hub.faults.clear()


def test_an_answer_of_xet_that_is_none_is_told_in_a_line(xet_hub, folder):
    answer = xet_hub.xet.answer
    for body in (b'{"type": "error", "message": "full"}\n', b"<html>\n"):
        xet_hub.xet.answer = lambda call, body=body: Reply(body) if "/shards" in call.path else answer(call)
        with pytest.raises(ValueError, match=r"^org/soup: Xet fails: Internal error: .*HF_HUB_DISABLE_XET=1"):
            push.push_folder(folder, "org/soup", PushOptions())
        assert held(xet_hub, "org/soup") == {}


def test_a_file_that_is_gone_when_xet_reads_it_is_told_in_a_line(xet_hub, folder):
    answer = xet_hub.answer

    def remove_weights(call):
        if "/preupload/" in call.path:
            (folder / "model.safetensors").unlink()
        return answer(call)

    xet_hub.answer = remove_weights
    with pytest.raises(ValueError, match=r"^org/soup: Xet fails: I/O error: .*No such file"):
        commit_files("org/soup", push.saved_files(folder), PushOptions(), small=0)  # read when they are sent
    assert held(xet_hub, "org/soup") == {}


def test_errors_of_its_own_are_of_xet_and_bugs_are_not():
    hf_xet = pytest.importorskip("hf_xet")
    with (
        pytest.raises(ValueError, match="org/soup: Xet fails: expired") as error,
        hub_errors.asking_the_hub("org/soup"),
    ):
        raise hf_xet.XetAuthenticationError("expired")
    assert not hub_errors.is_passing(error.value)
    with pytest.raises(RuntimeError, match="a bug"), hub_errors.asking_the_hub("org/soup"):
        raise RuntimeError("a bug")
