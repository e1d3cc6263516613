"""Repositories are renamed with all that they hold."""

import pytest
from huggingface_hub import HfApi, get_collection, get_session, hf_hub_download, model_info
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError


def test_a_moved_repository_keeps_everything(hub):
    hub.add_repo("org/soup", {"config.json": b"{}", "model.safetensors": b"weights"})
    hub.add_commit("org/soup", {"config.json": b"[]"})
    hub.add_collection("org/soups-1", [("model", "org/soup")])
    before, commits = hub.files("org/soup"), hub.commits("org/soup")
    HfApi().move_repo("org/soup", "tester/broth")
    assert hub.files("tester/broth") == before and hub.commits("tester/broth") == commits
    assert model_info("tester/broth").id == "tester/broth"
    assert [item.item_id for item in get_collection("org/soups-1").items] == ["tester/broth"]


def test_the_old_name_leads_to_the_new_one_until_it_is_taken(hub):
    hub.add_repo("org/soup", {"a.txt": b"old"})
    HfApi().move_repo("org/soup", "org/broth")
    HfApi().move_repo("org/broth", "org/stock")
    assert model_info("org/soup", expand=["sha"]).id == "org/stock"
    with open(hf_hub_download("org/soup", "a.txt")) as file:
        assert file.read() == "old"
    hub.add_repo("org/soup", {"a.txt": b"new"})
    assert model_info("org/soup").id == "org/soup"


def test_an_old_name_does_not_tell_of_what_is_private(hub):
    hub.add_repo("org/soup", {}, private=True)
    HfApi().move_repo("org/soup", "org/secret")
    with pytest.raises(RepositoryNotFoundError):
        model_info("org/soup", token=False)
    assert not get_session().get(f"{hub.url}/api/models/org/soup", follow_redirects=False).has_redirect_location


@pytest.mark.parametrize(
    ("old", "new", "token", "status"),
    [
        ("org/soup", "org/other", None, 409),
        ("org/soup", "stranger/soup", None, 403),
        ("stranger/model", "org/model", None, 403),
        ("org/none", "org/some", None, 404),
        ("org/soup", "org/broth", False, 401),
    ],
)
def test_a_move_that_is_refused_changes_nothing(hub, old, new, token, status):
    for repo_id in ("org/soup", "org/other", "stranger/model"):
        hub.add_repo(repo_id, {"a.txt": repo_id.encode()})
    with pytest.raises(HfHubHTTPError) as refusal:
        HfApi().move_repo(old, new, token=token)
    assert refusal.value.response.status_code == status
    for repo_id in ("org/soup", "org/other", "stranger/model"):
        assert hub.files(repo_id) == {"a.txt": repo_id.encode()}
