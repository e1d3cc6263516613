"""The loopback Hub, as the client libraries see it."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_safetensors_metadata,
    get_session,
    hf_hub_download,
    list_models,
    model_info,
    snapshot_download,
    whoami,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

CONFIG = json.dumps({"architectures": ["ViTForImageClassification"], "model_type": "vit"}).encode()
CARD = b"---\nlicense: mit\nbase_model:\n- org/a\n- org/b\ntags: [merge, model-soup]\n---\n# Soup\n"


def write_model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in {"README.md": CARD, "config.json": CONFIG, "model.safetensors": weights}.items():
        (folder / name).write_bytes(content)
    return folder


# -- the fixture ------------------------------------------------------------------------------------------------------


def test_the_process_knows_no_other_hub(hub):
    assert constants.ENDPOINT == HfApi().endpoint == hub.url
    assert whoami()["name"] == "tester"
    assert [org["name"] for org in whoami()["orgs"]] == ["org"]


@pytest.fixture(scope="module")
def known_before() -> tuple[str, str]:
    """The Hub and the cache of the libraries when they were imported; its scope is wider, so `hub` comes after it."""
    for library in ("transformers.dynamic_module_utils", "datasets.load", "evaluate.inspect"):
        pytest.importorskip(library)
    importlib.import_module("transformers.utils.hub").hf_api()  # made when first used, and kept
    return constants.ENDPOINT, constants.HF_HOME


def test_no_copy_of_another_hub_or_cache_is_left(known_before, hub):
    """A new release of a library may keep a new copy of the endpoint or of a cache's path: this finds it."""
    endpoint, home = known_before
    named_after_it = ("_HF_DEFAULT_ENDPOINT", "HUGGINGFACE_CO_URL_HOME")  # constants whatever the environment says

    def is_stray(thing: object) -> bool:
        if not isinstance(thing, (str, Path, HfApi)):
            return False
        value = thing.endpoint if isinstance(thing, HfApi) else str(thing)
        is_template = value.startswith(f"{endpoint}/") and "{" in value
        return value.rstrip("/") == endpoint or is_template or value.startswith(home)

    strays = [
        f"{module}.{name}"
        for module in list(sys.modules)
        if module.split(".")[0] in ("huggingface_hub", "transformers", "datasets", "evaluate")
        for name, value in list(vars(sys.modules[module]).items())
        if is_stray(value) and name not in named_after_it
    ]
    assert strays == []


def test_a_process_of_its_own_knows_the_hub_as_well(hub, tmp_path):
    sha = hub.add_repo("org/model", {"config.json": CONFIG})
    code = "import huggingface_hub as h; print(h.whoami()['name'], h.model_info('org/model').sha)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=hub.environ(tmp_path), capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["tester", sha]


def test_a_process_that_is_not_logged_in(hub, tmp_path):
    code = "import huggingface_hub as h; print(h.get_token())"
    env = hub.environ(tmp_path, token=None)
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["None"]


def test_a_stopped_hub_answers_nobody_and_the_cache_still_does(hub):
    hub.add_repo("org/model", {"config.json": CONFIG})
    file = hf_hub_download("org/model", "config.json")
    hub.stop()
    with pytest.raises(Exception, match="refused"):
        model_info("org/model")
    assert hf_hub_download("org/model", "config.json") == file


# -- uploads ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_one_commit_and_weights_go_through_lfs(hub, tmp_path):
    api = HfApi()
    api.create_repo("org/soup")
    api.upload_folder(repo_id="org/soup", folder_path=write_model(tmp_path), commit_message="Add a soup")
    assert [commit.title for commit in hub.commits("org/soup")] == ["Add a soup", "initial commit"]
    assert hub.files("org/soup")["model.safetensors"] == b"weights"
    assert [request.received for request in hub.logged("PUT", "/lfs/")] == [len(b"weights")]
    info = api.model_info("org/soup", files_metadata=True)
    assert {sibling.rfilename: sibling.size for sibling in info.siblings if sibling.lfs} == {"model.safetensors": 7}


def test_what_is_unchanged_is_neither_uploaded_nor_committed_again(hub, tmp_path):
    api = HfApi()
    api.create_repo("org/soup")
    first = api.upload_folder(repo_id="org/soup", folder_path=write_model(tmp_path))
    again = api.upload_folder(repo_id="org/soup", folder_path=write_model(tmp_path))
    assert again.oid == first.oid
    assert len(hub.commits("org/soup")) == 2
    assert len(hub.logged("PUT")) == 1


def test_large_files_go_through_lfs_and_text_does_not(hub):
    api = HfApi()
    api.create_repo("org/soup")
    for name, content in {"big.txt": b"x" * (2 << 20), "small.txt": b"x", "empty.safetensors": b""}.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="org/soup")
    assert [request.received for request in hub.logged("PUT")] == [2 << 20]


def test_one_commit_adds_and_deletes(hub):
    hub.add_repo("org/soup", {"old/a.txt": b"a", "old/b.txt": b"b", "gone.txt": b"c"})
    operations = [
        CommitOperationAdd("new.bin", b"\0new"),
        CommitOperationDelete("old/"),
        CommitOperationDelete("gone.txt"),
    ]
    commit = HfApi().create_commit("org/soup", operations, commit_message="Replace", commit_description="all of it")
    assert hub.files("org/soup") == {"new.bin": b"\0new"}
    assert (hub.commits("org/soup")[0].sha, hub.commits("org/soup")[0].description) == (commit.oid, "all of it")


def test_a_commit_that_fails_changes_nothing(hub):
    hub.add_repo("org/soup", {"a.txt": b"a"})
    operations = [CommitOperationAdd("b.txt", b"b"), CommitOperationDelete("missing.txt")]
    with pytest.raises(EntryNotFoundError):
        HfApi().create_commit("org/soup", operations, commit_message="Break")
    assert hub.files("org/soup") == {"a.txt": b"a"}
    assert len(hub.commits("org/soup")) == 1


def test_a_commit_on_an_outdated_parent_is_refused(hub):
    parent = hub.add_repo("org/soup", {"a.txt": b"a"})
    hub.add_commit("org/soup", {"a.txt": b"b"})
    operations = [CommitOperationAdd("b.txt", b"b")]
    with pytest.raises(HfHubHTTPError, match="412"):
        HfApi().create_commit("org/soup", operations, commit_message="Late", parent_commit=parent)


def test_lfs_content_that_is_not_what_was_announced_is_refused(hub):
    hub.add_repo("org/soup", {})
    operation = CommitOperationAdd("model.safetensors", b"weights")
    operation.upload_info.sha256 = bytes(32)
    with pytest.raises(RuntimeError, match="uploading"):
        HfApi().create_commit("org/soup", [operation], commit_message="Lie")
    assert hub.files("org/soup") == {}


def test_a_commit_cannot_point_to_an_object_that_was_not_uploaded(hub):
    hub.add_repo("org/soup", {})
    pointer = {"path": "model.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 7}
    lines = [{"key": "header", "value": {"summary": "Hope"}}, {"key": "lfsFile", "value": pointer}]
    response = get_session().post(
        f"{hub.url}/api/models/org/soup/commit/main",
        content="\n".join(map(json.dumps, lines)).encode(),
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert response.status_code == 400 and "not uploaded" in response.text
    assert hub.files("org/soup") == {}


def test_a_pull_request_leaves_main_alone(hub, tmp_path):
    hub.add_repo("stranger/soup", {"a.txt": b"a"})
    api = HfApi()
    commit = api.upload_folder(repo_id="stranger/soup", folder_path=write_model(tmp_path), create_pr=True)
    assert commit.pr_revision == "refs/pr/1"
    assert set(hub.files("stranger/soup")) == {"a.txt"}
    assert set(hub.files("stranger/soup", "refs/pr/1")) == {"a.txt", "README.md", "config.json", "model.safetensors"}
    refs = api.list_repo_refs("stranger/soup", include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    assert Path(hf_hub_download("stranger/soup", "README.md", revision="refs/pr/1")).read_bytes() == CARD


def test_a_card_is_validated_and_pushed(hub):
    hub.add_repo("org/soup", {})
    ModelCard(CARD.decode()).push_to_hub("org/soup")
    assert ModelCard.load("org/soup").data.tags == ["merge", "model-soup"]
    with pytest.raises(ValueError, match="not closed"):
        HfApi().upload_file(path_or_fileobj=b"---\nlicense: mit\n", path_in_repo="README.md", repo_id="org/soup")


def test_repositories_are_created_once_and_deleted(hub):
    api = HfApi()
    assert api.create_repo("soup", private=True).repo_id == "tester/soup"
    assert api.create_repo("soup", exist_ok=True).repo_id == "tester/soup"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("soup")
    assert api.model_info("tester/soup").private
    api.delete_repo("tester/soup")
    assert not api.repo_exists("tester/soup")


# -- downloads --------------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once(hub):
    hub.add_repo("org/model", {"config.json": CONFIG, "model.safetensors": b"weights"})
    for _ in range(2):
        assert Path(hf_hub_download("org/model", "model.safetensors")).read_bytes() == b"weights"
    assert [request.served for request in hub.logged("GET", "model.safetensors")] == [7]
    assert len(hub.logged("HEAD", "model.safetensors")) == 2


def test_a_snapshot(hub):
    sha = hub.add_repo(
        "org/model", {"config.json": CONFIG, "sub/model.safetensors": b"weights", "odd name é.txt": b""}
    )
    folder = Path(snapshot_download("org/model"))
    assert folder.name == sha
    assert (folder / "sub/model.safetensors").read_bytes() == b"weights"
    assert (folder / "odd name é.txt").read_bytes() == b""


def test_every_name_of_a_revision(hub):
    old = hub.add_repo("org/model", {"a.txt": b"old"})
    new = hub.add_commit("org/model", {"a.txt": b"new"})
    api = HfApi()
    api.create_tag("org/model", tag="v1", revision=old)
    api.create_branch("org/model", branch="dev/x", revision=old)
    hub.add_commit("org/model", {"a.txt": b"dev"}, revision="dev/x")
    contents = {"main": b"new", old: b"old", "v1": b"old", "dev/x": b"dev", new[:8]: b"new"}
    for revision, content in contents.items():
        assert Path(hf_hub_download("org/model", "a.txt", revision=revision)).read_bytes() == content
    assert model_info("org/model").sha == new
    assert model_info("org/model", revision="v1").sha == old
    assert [commit.commit_id for commit in api.list_repo_commits("org/model")] == [new, old]


def test_the_tree_page_by_page(hub):
    hub.page_size = 2
    hub.add_repo("org/model", {f"sub/{i}.txt": b"x" for i in range(5)} | {"top.txt": b"x"})
    api = HfApi()
    assert [entry.path for entry in api.list_repo_tree("org/model")] == ["sub", "top.txt"]
    files = [entry for entry in api.list_repo_tree("org/model", recursive=True) if isinstance(entry, RepoFile)]
    assert len(files) == 6
    assert [entry.path for entry in api.get_paths_info("org/model", ["sub", "top.txt", "none"])] == ["sub", "top.txt"]


def test_headers_of_safetensors_are_read_by_range(hub, vit):
    padding = {"model.safetensors": vit["model.safetensors"] + bytes(300_000)}
    hub.add_repo("org/model", vit | padding)
    metadata = get_safetensors_metadata("org/model")
    assert "classifier.weight" in metadata.weight_map
    assert [(request.status, request.served) for request in hub.logged("GET", "model.safetensors")] == [(206, 100_001)]


@pytest.mark.parametrize(
    ("requested", "status", "content"),
    [
        ("bytes=2-4", 206, b"234"),
        ("bytes=8-", 206, b"89"),
        ("bytes=-3", 206, b"789"),
        ("bytes=5-99", 206, b"56789"),
        ("bytes=10-", 416, None),
        ("bytes=0-1,4-5", 200, b"0123456789"),
    ],
)
def test_ranges(hub, requested, status, content):
    hub.add_repo("org/model", {"digits.txt": b"0123456789"})
    response = get_session().get(f"{hub.url}/org/model/resolve/main/digits.txt", headers={"Range": requested})
    assert response.status_code == status
    assert content is None or response.content == content


# -- listings ---------------------------------------------------------------------------------------------------------


def test_models_are_found_by_author_name_and_tag(hub):
    for name in ("org/ft-1", "org/ft-2", "org/other", "stranger/ft-3"):
        hub.add_repo(name, {"config.json": CONFIG})
    hub.add_repo("org/soup", {"README.md": CARD})
    hub.add_repo("org/pets", {}, "dataset")
    assert [model.id for model in list_models(author="org", search="ft-")] == ["org/ft-1", "org/ft-2"]
    assert [model.id for model in list_models(filter=["merge", "base_model:org/a"])] == ["org/soup"]
    assert len(list(list_models(filter="image-classification"))) == 4
    assert len(list(list_models(limit=3))) == 3
    assert [data.id for data in HfApi().list_datasets()] == ["org/pets"]


def test_listings_come_in_pages(hub):
    hub.page_size = 2
    for i in range(5):
        hub.add_repo(f"org/ft-{i}", {"config.json": CONFIG})
    assert len(list(list_models(author="org"))) == 5
    assert len(hub.logged("GET", "/api/models?")) == 3


def test_what_is_known_of_a_model(hub):
    sha = hub.add_repo("org/soup", {"README.md": CARD, "config.json": CONFIG})
    info = model_info("org/soup")
    facts = [getattr(info, name) for name in ("sha", "pipeline_tag", "library_name")]
    assert facts == [sha, "image-classification", "transformers"]
    assert info.card_data.base_model == ["org/a", "org/b"]
    assert {"merge", "model-soup", "base_model:org/b", "license:mit", "vit"} <= set(info.tags)
    assert [sibling.rfilename for sibling in info.siblings] == ["README.md", "config.json"]
    assert model_info("org/soup", expand=["config"]).config["model_type"] == "vit"
    [listed] = list_models(expand=["sha", "lastModified"])
    assert (listed.sha, listed.last_modified) == (sha, info.last_modified)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_does_not_exist(hub):
    hub.add_repo("org/model", {"config.json": CONFIG})
    with pytest.raises(RepositoryNotFoundError):
        model_info("org/none")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("org/none", "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/model", "config.json", revision="none")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download("org/model", revision="none")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/model", "none é\n.json")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/none")


def test_a_private_repository_exists_for_its_members_only(hub):
    hub.add_repo("org/secret", {"config.json": CONFIG}, private=True)
    hub.add_repo("stranger/secret", {"config.json": CONFIG}, private=True)
    assert model_info("org/secret").private
    assert [model.id for model in list_models()] == ["org/secret"]
    assert list(list_models(token=False)) == []
    for repo, token in {"org/secret": False, "stranger/secret": None}.items():
        with pytest.raises(RepositoryNotFoundError):
            model_info(repo, token=token)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(repo, "config.json", token=token)


def test_a_gated_repository_shows_its_facts_and_keeps_its_files(hub):
    hub.add_repo("org/gated", {"config.json": CONFIG}, gated="manual")
    assert model_info("org/gated", token=False).gated == "manual"
    for token, status in {False: 401, None: 403}.items():
        with pytest.raises(GatedRepoError) as refusal:
            hf_hub_download("org/gated", "config.json", token=token)
        assert refusal.value.response.status_code == status
    with pytest.raises(GatedRepoError):
        HfApi().auth_check("org/gated")
    hub.grant("org/gated")
    HfApi().auth_check("org/gated")
    assert Path(hf_hub_download("org/gated", "config.json")).read_bytes() == CONFIG


def test_writing_takes_a_token_and_the_right_to_the_namespace(hub):
    hub.add_repo("stranger/model", {})
    for arguments, status in [({"repo_id": "org/new", "token": False}, 401), ({"repo_id": "stranger/new"}, 403)]:
        with pytest.raises(HfHubHTTPError) as refusal:
            HfApi().create_repo(**arguments)
        assert refusal.value.response.status_code == status
    for token, status in {False: 401, None: 403}.items():
        with pytest.raises(HfHubHTTPError) as refusal:
            HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="stranger/model", token=token)
        assert refusal.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        whoami(token="hf_wrong")
