"""Pushes to Hubs that others wrote: what they leave out is not believed, and what they say is passed on."""

import json
import random
import re

import pytest
from huggingface_hub.errors import HfHubHTTPError
from loopback_hub.wire import Reply, json_reply
from shared.other_hubs import alter, alter_json, refusal, without
from shared.pushed import contents, folder, held, quick

from hf_radin.cli.main import main
from hf_radin.runtime.hub_commit import PushOptions, check_target, commit_files, hidden_repositories, hub_address
from hf_radin.runtime.hub_errors import asking_the_hub
from hf_radin.soup import push as pushing

__all__ = ["folder", "quick"]  # fixtures

FILES = {"bank.json": b"{}", "logits/a.npy": b"logits"}


def make_public(hub, repo_type: str):
    """A Hub that knows no `visibility`: it makes what everybody can read."""

    def change(call, reply):
        hub.repos[repo_type, "org/soup"].private = False
        return reply

    alter(hub, "POST", "/repos/create", change)


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
@pytest.mark.parametrize(
    ("alteration", "message"),
    [
        (make_public, "everybody can read it, so nothing is pushed there"),
        (lambda hub, _: alter_json(hub, "GET", "org/soup", without("private")), "does not say whether it is private"),
        (
            lambda hub, _: alter_json(hub, "GET", "org/soup", lambda info: info | {"private": "yes"}),
            "does not say whether it is private",
        ),
    ],
    ids=["no visibility", "no word of it", "no truth value"],
)
def test_what_is_to_be_private_goes_nowhere_else(hub, repo_type, alteration, message):
    """A soup or a bank: not one byte goes up."""
    alteration(hub, repo_type)
    with pytest.raises(ValueError, match=f"^org/soup.*{message}"):
        commit_files("org/soup", FILES, PushOptions(private=True, repo_type=repo_type))
    assert set(hub.files("org/soup", repo_type=repo_type)) == {".gitattributes"}
    assert not hub.logged("POST", "/preupload/") and not hub.logged("PUT")


def test_what_somebody_makes_public_in_between_is_not_pushed_to(hub, folder, capsys):
    """It is private when the push begins, and public when the files would go up."""
    hub.add_repo("org/soup", {}, private=True)

    def publish(call, reply):
        hub.repos["model", "org/soup"].private = False
        return reply

    alter(hub, "GET", "/whoami", publish)
    alter(hub, "GET", "/api/models/org/soup", publish)
    assert main(["push", str(folder), "org/soup", "--private"]) == 2
    assert "everybody can read it" in capsys.readouterr().err and not hub.files("org/soup")


def test_a_private_repository_takes_a_private_push(hub, folder):
    pushing.push_folder(folder, "org/soup", PushOptions(private=True))
    assert held(hub, "org/soup") == contents(folder) and hub.repos["model", "org/soup"].private


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_a_hub_that_says_nothing_of_contents_is_asked_for_its_tree(hub, repo_type):
    """The same again is no commit, and a commit whose answer was lost is recognised."""
    alter_json(hub, "GET", "/api/", lambda info: without("blobId")(info) if "siblings" in info else info)
    options = PushOptions(repo_type=repo_type)
    drop_once(hub, "/commit/")
    commit = commit_files("org/soup", FILES, options)
    assert commit_files("org/soup", FILES, options).oid == commit.oid
    assert len(hub.logged("POST", "/commit/")) == 1


def drop_once(hub, fragment: str) -> None:
    """Lose the answer to the first of these requests."""
    answers = iter([Reply(breaks_off_after=-1)])
    alter(hub, "POST", fragment, lambda call, reply: next(answers, reply))


def test_ids_of_commits_may_be_as_long_as_sha256(hub, folder):
    """Git has two lengths of ids; the client takes the shorter one alone."""
    hub.add_repo("org/soup", {})
    alter_json(hub, "GET", "/api/models/org/soup", lambda info: lengthened(info) if "sha" in info else info)
    pushing.push_folder(folder, "org/soup", PushOptions())
    assert held(hub, "org/soup") == contents(folder)


def lengthened(info: dict) -> dict:
    return info | {"sha": info["sha"] + "0" * 24}


def has_files(info: dict | list) -> bool:
    """Whether an answer is a list of files, or of a repository with some."""
    return isinstance(info, list) or bool(info.get("siblings"))


@pytest.mark.parametrize("sha", [None, 3, ["x"]])
def test_a_hub_that_names_no_commit(hub, folder, capsys, sha):
    """A repository without a commit takes the first one; of one with files nobody knows what is replaced."""
    hub.add_repo("org/soup", {})
    alter_json(hub, "GET", "/api/models/org/soup", lambda info: info if has_files(info) else info | {"sha": sha})
    pushing.push_folder(folder, "org/soup", PushOptions())
    assert held(hub, "org/soup") == contents(folder)
    alter_json(hub, "GET", "/api/models/org/soup", lambda info: info | {"sha": sha})
    assert main(["push", str(folder), "org/soup"]) == 2
    assert "org/soup: the Hub does not say at which commit it is" in capsys.readouterr().err


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_hub_that_can_not_be_asked_for_a_right_refuses_nothing(hub, status):
    hub.add_repo("org/soup", {})
    alter(hub, "GET", "/auth-check/write", refusal(status))
    check_target("org/soup", PushOptions())
    assert hub.logged("GET", "/auth-check/write")


def test_a_right_that_is_refused_is_refused(hub):
    hub.add_repo("org/soup", {})
    alter(hub, "GET", "/auth-check/write", refusal(403, {"error": "not you"}))
    with pytest.raises(ValueError, match=r"^org/soup: the Hub refuses: .*not you"):
        check_target("org/soup", PushOptions())


ACCOUNTS = {
    "no organisations": ({"orgs": None}, True),
    "organisations without a name": ({"orgs": [{"roleInOrg": "admin"}, None, {"name": None}, {"name": "org"}]}, True),
    "no list": ({"orgs": "org"}, True),
    "no token": ({"auth": {"accessToken": None}}, True),
    "no role": ({"auth": {"accessToken": {"role": None}}}, True),
    "no login": ({"auth": None}, True),
    "may only read": ({"auth": {"accessToken": {"role": "read"}}}, False),
    "another organisation": ({"orgs": [{"name": "other"}]}, False),
    "may only read there": ({"orgs": [{"name": "org", "roleInOrg": "read"}]}, False),
    "no name": ({"name": None}, False),
}


@pytest.mark.parametrize("kind", ACCOUNTS)
def test_an_account_is_read_as_far_as_it_goes(hub, kind):
    """What is unknown is not refused: the Hub will say. What is known not to be allowed is refused in time."""
    fields, passes = ACCOUNTS[kind]
    alter_json(hub, "GET", "/whoami", lambda account: account | fields)
    if passes:
        return check_target("org/soup", PushOptions())
    with pytest.raises(ValueError, match=r"org/soup|whose token it is"):
        check_target("org/soup", PushOptions())


@pytest.mark.parametrize(
    "change",
    [
        without("commitUrl"),
        without("commitOid"),
        lambda answer: None,
        lambda answer: answer | {"commitUrl": "/org/soup/commit/main"},
        lambda answer: answer | {"commitUrl": "https://huggingface.co/org/soup/commit/main"},
        lambda answer: answer | {"commitUrl": "http://10.0.0.1:8080"},
    ],
)
def test_a_commit_that_arrived_has_an_address_that_opens(hub, change):
    """Whatever the answer says of it."""
    alter_json(hub, "POST", "/commit/", change)
    commit = commit_files("org/soup", FILES, PushOptions())
    assert commit.commit_url == f"{hub.url}/org/soup/commit/{hub.commits('org/soup')[0].sha}"
    assert len(hub.logged("POST", "/commit/")) == 1


def test_the_address_of_a_dataset_and_of_a_pull_request(hub):
    hub.add_repo("org/soup", {}, "dataset")
    commit = commit_files("org/soup", FILES, PushOptions(repo_type="dataset", create_pr=True))
    assert commit.pr_url == f"{hub.url}/datasets/org/soup/discussions/1"
    assert hub_address("org/soup") == f"{hub.url}/org/soup"


@pytest.mark.parametrize("change", [without("url"), lambda answer: None, lambda answer: {"url": "soup"}])
def test_a_repository_that_was_made_is_pushed_to_whatever_the_answer_says(hub, change):
    alter_json(hub, "POST", "/repos/create", change)
    commit_files("org/soup", FILES, PushOptions())
    assert hub.files("org/soup").items() >= FILES.items()


def test_a_hub_that_does_not_know_its_last_commit_yet_is_asked_again(hub):
    """Another of its machines may answer; if it never knows, the error names the commit."""
    left = iter(range(2))
    alter(hub, "HEAD", "/resolve/", lambda call, reply: Reply(status=404) if next(left, None) is not None else reply)
    commit_files("org/soup", FILES, PushOptions())
    alter(hub, "HEAD", "/resolve/", refusal(404))
    with pytest.raises(ValueError) as error:
        commit_files("org/other", FILES, PushOptions())
    commit = hub.commits("org/other")[0].sha
    assert f"org/other: commit {commit} was made, and bank.json can't be read there" in str(error.value)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_readme_that_came_with_the_repository_is_replaced(hub, folder, overwrite):
    """The Hub made it, with the repository that the push made."""

    def change(call, reply):
        hub.add_commit("org/soup", {"README.md": b"# a repository"})
        return reply

    alter(hub, "POST", "/repos/create", change)
    pushing.push_folder(folder, "org/soup", PushOptions(overwrite=overwrite))
    assert held(hub, "org/soup") == contents(folder)


def test_a_readme_of_somebody_else_is_not(hub, folder):
    """It came with a repository that was there, or that somebody else made first."""
    hub.add_repo("org/soup", {"README.md": b"# mine"})
    with pytest.raises(ValueError, match="holds something else"):
        pushing.push_folder(folder, "org/soup", PushOptions())
    alter(hub, "POST", "/repos/create", lambda call, reply: json_reply({"error": "it exists"}, 409))
    first = iter([1])
    hide = refusal(404, {}, X_Error_Code="RepoNotFound")
    alter(hub, "GET", "/api/models/org/soup", lambda call, reply: hide(call, reply) if next(first, None) else reply)
    with pytest.raises(ValueError, match="holds something else"):
        commit_files("org/soup", {"README.md": b"# ours"}, PushOptions(overwrite=True))
    assert hub.files("org/soup") == {"README.md": b"# mine"}


REASONS = {
    "error": ({"error": "the quota is used up"}, "the quota is used up"),
    "list": ({"error": ["too large", "too many"]}, "too large; too many"),
    "detail": ({"detail": "the quota is used up"}, "the quota is used up"),
    "details": ({"detail": [{"loc": ["body", "files", 0], "msg": "too large"}]}, "body.files.0: too large"),
    "message": ({"message": "the quota is used up"}, "the quota is used up"),
    "errors": ({"errors": [{"message": "too large"}]}, "too large"),
    "control characters": ({"error": "no\x1b[2J\x07 room"}, r"no\x1b[2J\x07 room"),
    "lines": ({"error": "no\nhf-radin: all is well"}, "no hf-radin: all is well"),
    "long": ({"detail": "word " * 200 + "end"}, "word end"),
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_hubs_own_reason_comes_first_and_whole(hub, folder, capsys, kind):
    """In one line, with the address behind it, and without what would move a terminal's cursor."""
    body, reason = REASONS[kind]
    alter(hub, "POST", "/preupload/", refusal(403, body))
    assert main(["push", str(folder), "org/soup"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("hf-radin: org/soup: the Hub refuses: ") and line.isprintable()
    assert line.endswith(f"{reason} (403, {hub.url}/api/models/org/soup/preupload/main).")


def test_a_reason_that_repeats_the_token_does_not_show_it(hub, folder, capsys):
    alter(hub, "POST", "/preupload/", refusal(403, {"detail": f"{hub.token} may not write"}))
    assert main(["push", str(folder), "org/soup"]) == 2
    error = capsys.readouterr().err
    assert "... may not write" in error and hub.token not in error


# Hubs by what they answer to those who are not logged in, and to the user, and whether a name is hidden then.
NOT_FOUND = refusal(404, {}, X_Error_Code="RepoNotFound")
LOOKS = {
    "wants a login, public": (refusal(401), lambda call, reply: reply, False, False),
    "forbids, public": (refusal(403), lambda call, reply: reply, False, False),
    "wants a login, private": (refusal(401), lambda call, reply: reply, True, True),
    "not found, private": (NOT_FOUND, lambda call, reply: reply, True, True),
    "not found by anybody": (NOT_FOUND, NOT_FOUND, False, True),
    "disabled": (
        refusal(403, {}, X_Error_Message="Access to this resource is disabled."),
        lambda call, reply: reply,
        False,
        False,
    ),
    "gated": (refusal(401, {}, X_Error_Code="GatedRepo"), lambda call, reply: reply, False, False),
    "logs in for everybody, private": (lambda call, reply: json_reply({"id": "org/a", "private": True}),) * 2
    + (True, True),
    "says nothing to the user": (refusal(401), lambda call, reply: json_reply({"id": "org/a"}), False, True),
}


@pytest.mark.parametrize("kind", LOOKS)
def test_a_look_that_is_refused_does_not_make_a_name_private(hub, kind, caplog):
    anonymous, logged_in, private, hidden = LOOKS[kind]
    hub.add_repo("org/a", {}, private=private)
    alter(
        hub,
        "GET",
        "/api/models/org/a",
        lambda call, reply: (logged_in if call.headers.get("Authorization") else anonymous)(call, reply),
    )
    assert hidden_repositories([("org/a", "model")]) == (["org/a"] if hidden else [])
    assert ("does not say whether org/a is private" in caplog.text) == (kind == "says nothing to the user")


@pytest.mark.parametrize("who", ["everybody", "the user"])
def test_a_look_that_fails_otherwise_tells_nothing(hub, who):
    def change(call, reply):
        is_anonymous = not call.headers.get("Authorization")
        return json_reply({"error": "odd"}, 401 if is_anonymous and who == "the user" else 400)

    alter(hub, "GET", "/api/models/org/a", change)
    with pytest.raises(ValueError, match=r"^org/a: the Hub refuses: .*odd"):
        hidden_repositories([("org/a", "model")])


def test_a_licence_is_checked_with_the_users_token(hub):
    alter(
        hub,
        "POST",
        "/validate-yaml",
        lambda call, reply: reply if call.headers.get("Authorization") else json_reply({}, 401),
    )
    pushing.check_license("mit")
    with pytest.raises(ValueError, match="the Hub knows no such licence"):
        pushing.check_license("mti")
    alter(hub, "POST", "/validate-yaml", refusal(404))
    pushing.check_license("mit")  # nobody knows
    alter(hub, "POST", "/validate-yaml", refusal(403, {"error": "not you"}))
    with pytest.raises(ValueError, match=r"^license='mit': the Hub refuses: .*not you"):
        pushing.check_license("mit")


def test_cards_and_messages_lead_to_the_hub_that_is_asked(hub, runs, folder, monkeypatch, capsys):
    assert main(["push", str(folder), "org/soup"]) == 0
    assert capsys.readouterr().out.strip().startswith(f"{hub.url}/org/soup/commit/")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url.replace("//", "//me:password@"))
    assert hub_address("org/soup") == f"{hub.url}/org/soup"


VALUES = (None, 3, "x", [], {}, [None], True)


def test_no_answer_of_a_hub_ends_in_a_traceback(hub, folder, capsys):
    """Each field of each answer to a push is taken away or replaced; the push is made, or refused in one line."""
    answers, answer = {}, hub.answer

    def record(call):
        reply = answer(call)
        if reply.status == 200 and reply.headers.get("Content-Type") == "application/json":
            answers.setdefault((call.method, kind_of(call.path)), json.loads(reply.body))
        return reply

    hub.answer = record
    assert main(["push", str(folder), "org/soup"]) == 0
    changes = [
        (*request, path, value)
        for request, body in answers.items()
        for path in places(body)
        for value in (*VALUES, "missing")
    ]
    assert len(changes) > 150
    for method, kind, path, value in random.Random(0).sample(changes, 80):
        hub.repos.pop(("model", "org/soup"), None)
        hub.answer = answer
        alter(
            hub,
            method,
            "",
            lambda call, reply, kind=kind, path=path, value=value: (
                changed(reply, path, value) if kind_of(call.path) == kind else reply
            ),
        )
        status = main(["push", str(folder), "org/soup"])
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("hf-radin: ")]
        assert (status, len(errors)) in ((0, 0), (2, 1)), (method, kind, path, value)
        assert not errors or lines[-1] == errors[0]


def kind_of(path: str) -> str:
    """The path of a request without what differs between pushes."""
    return re.sub(r"[0-9a-f]{40,64}", "*", path)


def places(value: object, path: tuple = ()):
    """The paths to all fields of JSON, in lists to the first entry."""
    if isinstance(value, dict):
        for name, content in value.items():
            yield (*path, name)
            yield from places(content, (*path, name))
    elif isinstance(value, list) and value:
        yield (*path, 0)
        yield from places(value[0], (*path, 0))


def changed(reply: Reply, path: tuple, value: object) -> Reply:
    """An answer with a field replaced or taken away, if it has it."""
    try:
        body = part = json.loads(reply.body)
        for name in path[:-1]:
            part = part[name]
        if value == "missing":
            del part[path[-1]]
        else:
            part[path[-1]] = value
    except (ValueError, LookupError, TypeError):
        return reply
    return json_reply(body, reply.status, reply.headers)


def test_a_busy_hub_whose_reason_is_no_json_is_told(hub):
    with pytest.raises(ValueError, match=r"the Hub refuses: come back later \(503, "), asking_the_hub("org/soup"):
        raise_for(hub)


def raise_for(hub) -> None:
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status

    alter(hub, "GET", "/nothing", lambda call, reply: Reply(b"come back\nlater", 503, {"Content-Type": "text/plain"}))
    try:
        hf_raise_for_status(get_session().get(f"{hub.url}/nothing"))
    except HfHubHTTPError as error:
        assert error.response.status_code == 503
        raise
