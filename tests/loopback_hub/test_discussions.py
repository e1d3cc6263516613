"""A pull request is found, looked at, closed and merged."""

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError


@pytest.fixture
def opened(hub):
    """A pull request that changes a file, adds one and deletes one."""
    hub.add_repo("org/soup", {"a.txt": b"a", "b.txt": b"b", "c.txt": b"c"})
    operations = [
        CommitOperationAdd("a.txt", b"new"),
        CommitOperationAdd("d.txt", b"d"),
        CommitOperationDelete("c.txt"),
    ]
    return HfApi().create_commit(
        "org/soup", operations, commit_message="A change", commit_description="and why", create_pr=True
    )


def test_it_is_listed_by_what_became_of_it(hub, opened):
    api = HfApi()
    hub.page_size = 2
    for name in "ef":
        api.upload_file(path_or_fileobj=b"", path_in_repo=name, repo_id="org/soup", create_pr=True)
    assert [discussion.num for discussion in api.get_repo_discussions("org/soup")] == [3, 2, 1]
    api.change_discussion_status("org/soup", 2, "closed")
    api.merge_pull_request("org/soup", 3)
    assert [discussion.num for discussion in api.get_repo_discussions("org/soup", discussion_status="open")] == [1]
    closed = api.get_repo_discussions("org/soup", discussion_status="closed", discussion_type="pull_request")
    assert [(discussion.num, discussion.status) for discussion in closed] == [(3, "merged"), (2, "closed")]
    assert not list(api.get_repo_discussions("org/soup", discussion_type="discussion"))
    assert not list(api.get_repo_discussions("org/soup", author="stranger"))


def test_it_is_looked_at(hub, opened):
    api = HfApi()
    second = api.upload_file(path_or_fileobj=b"e", path_in_repo="e", repo_id="org/soup", revision="refs/pr/1")
    discussion = api.get_discussion_details("org/soup", opened.pr_num)
    assert (discussion.title, discussion.status, discussion.author) == ("A change", "open", "tester")
    assert (discussion.git_reference, discussion.target_branch, discussion.url) == (
        "refs/pr/1",
        "refs/heads/main",
        opened.pr_url,
    )
    assert [event.type for event in discussion.events] == ["comment", "commit", "commit"]
    assert discussion.events[0].content == "and why"
    assert [event.oid for event in discussion.events[1:]] == [opened.oid, second.oid]


def test_merging_it_is_one_commit_that_keeps_what_others_did_meanwhile(hub, opened):
    api = HfApi()
    hub.add_commit("org/soup", {"b.txt": b"a colleague's"})
    api.merge_pull_request("org/soup", 1)
    assert hub.files("org/soup") == {"a.txt": b"new", "b.txt": b"a colleague's", "d.txt": b"d"}
    assert [commit.title for commit in hub.commits("org/soup")] == ["A change (#1)", "update", "initial commit"]
    discussion = api.get_discussion_details("org/soup", 1)
    assert (discussion.status, discussion.merge_commit_oid) == ("merged", hub.commits("org/soup")[0].sha)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.merge_pull_request("org/soup", 1)


def test_conflicts_are_told_and_nothing_is_merged(hub, opened):
    api = HfApi()
    hub.add_commit("org/soup", {"a.txt": b"a colleague's", "c.txt": b"too"})
    assert api.get_discussion_details("org/soup", 1).conflicting_files == ["a.txt", "c.txt"]
    before = hub.files("org/soup")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.merge_pull_request("org/soup", 1)
    assert hub.files("org/soup") == before


def test_what_is_closed_is_merged_once_it_is_open_again(hub, opened):
    api = HfApi()
    assert api.change_discussion_status("org/soup", 1, "closed").new_status == "closed"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.merge_pull_request("org/soup", 1)
    api.change_discussion_status("org/soup", 1, "open")
    api.merge_pull_request("org/soup", 1)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.change_discussion_status("org/soup", 1, "closed")


def test_a_pull_request_against_a_branch_is_merged_there(hub, opened):
    api = HfApi()
    api.create_branch("org/soup", branch="next")
    where = {"repo_id": "org/soup", "revision": "next", "create_pr": True}
    made = api.upload_file(path_or_fileobj=b"e", path_in_repo="e.txt", **where)
    api.merge_pull_request("org/soup", made.pr_num)
    assert "e.txt" in hub.files("org/soup", "next") and "e.txt" not in hub.files("org/soup")


def test_only_who_may_write_merges(hub):
    api = HfApi()
    hub.add_repo("stranger/soup", {"a.txt": b"a"})
    api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="stranger/soup", create_pr=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.merge_pull_request("stranger/soup", 1)
    with pytest.raises(HfHubHTTPError, match="404"):
        api.get_discussion_details("stranger/soup", 2)
    assert hub.files("stranger/soup") == {"a.txt": b"a"}
