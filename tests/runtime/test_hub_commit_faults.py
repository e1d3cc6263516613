"""A push happens as a whole or not at all, whatever goes wrong on the way."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from loopback_hub.wire import Fault
from shared.pushed import OLD, contents, folder, held, quick

import hf_radin
from hf_radin.runtime.hub_commit import PushOptions, check_target, commit_files
from hf_radin.soup import push as pushing

__all__ = ["folder", "quick"]  # fixtures


def test_two_pushes_at_once_leave_one_of_them_whole(hub, folder, bank, tmp_path):
    """The second is refused, whichever that is; run again with overwrite, it finishes."""
    hf_radin.best_single(bank).save_pretrained(tmp_path / "other")
    folders, errors = [folder, tmp_path / "other"], {}
    ready = threading.Barrier(2)

    def push(soup: Path) -> None:
        ready.wait()
        try:
            pushing.push_folder(soup, "org/soup", PushOptions(commit_message=soup.name))
        except ValueError as error:
            errors[soup] = str(error)

    threads = [threading.Thread(target=push, args=(soup,)) for soup in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1 and "holds something else" in next(iter(errors.values()))
    (lost,) = errors
    (won,) = (soup for soup in folders if soup != lost)
    assert held(hub, "org/soup") == contents(won)
    pushing.push_folder(lost, "org/soup", PushOptions(overwrite=True, commit_message="again"))
    assert held(hub, "org/soup") == contents(lost)


# The requests of a push, in turn: the method and a part of the path.
REQUESTS = [
    ("GET", "/api/models/org/soup"),
    ("POST", "/api/repos/create"),
    ("POST", "/api/validate-yaml"),
    ("POST", "/preupload/"),
    ("POST", "/info/lfs/objects/batch"),
    ("PUT", "/storage/"),
    ("POST", "/verify"),
    ("POST", "/commit/"),
    ("HEAD", "/resolve/"),
    ("GET", "/resolve/"),
]


FAULTS = {
    "401": {"status": 401},
    "403": {"status": 403},
    "404": {"status": 404},
    "409": {"status": 409},
    "429 with Retry-After": {"status": 429, "headers": {"Retry-After": "0"}},
    "500": {"status": 500},
    "503": {"status": 503},
    "reset": {"status": None},
    "answer lost": {"status": None, "answered": True},
    "slow": {"status": 200, "delay": 0.3},
}


# The faults that are over at the next attempt.
PASSING = FAULTS.keys() - {"401", "403", "404"}


def test_the_faults_are_tried_at_each_request_of_a_push(hub, folder):
    pushing.push_folder(folder, "org/soup", PushOptions())
    for request in hub.requests:
        assert any(request.method == method and part in request.path for method, part in REQUESTS), request
    for method, part in REQUESTS:
        assert hub.logged(method, part), (method, part)


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("times", [1, 99], ids=["once", "always"])
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_goes_wrong_the_repository_holds_the_old_or_the_new(hub, folder, fault, times, existing, capsys):
    """In success after another try, or in an error that names the repository; and the same again finishes the job."""
    new, rows = contents(folder), []
    for number, (method, part) in enumerate(REQUESTS):
        repo_id = f"org/soup-{number}"
        if existing:
            hub.add_repo(repo_id, OLD)
        hub.faults.append(Fault(method, part.replace("org/soup", repo_id), times=times, **FAULTS[fault]))
        try:
            pushing.push_folder(folder, repo_id, PushOptions(overwrite=existing, verify=False))
            outcome = "pushed"
        except ValueError as error:
            outcome = "refused"
            assert str(error).count(f"{repo_id}: the Hub refuses") <= 1 and len(str(error).splitlines()) == 1
            assert repo_id in str(error)
            assert hub.token not in str(error)
        if times == 1 and fault in PASSING and (fault, part) != ("409", "/api/repos/create"):  # which says: it exists
            assert outcome == "pushed", (method, part)
        hub.faults.clear()
        expected = new | ({"notes.txt": OLD["notes.txt"]} if existing else {})
        try:
            files = held(hub, repo_id)
        except KeyError:
            files = {}
        assert files == expected or (outcome == "refused" and files in ({}, OLD)), (method, part, files.keys())
        assert contents(folder) == new
        pushing.push_folder(folder, repo_id, PushOptions(overwrite=existing, verify=False))
        assert held(hub, repo_id) == expected
        rows.append((f"{method} {part}", outcome))
    with capsys.disabled():
        where = "a repository that is there" if existing else "a new repository"
        print(f"\n{fault}, {'once' if times == 1 else 'always'}, {where}: ", end="")
        print(", ".join(f"{request} {outcome}" for request, outcome in rows))


def test_a_drop_in_the_middle_of_an_upload(hub, folder):
    """The Hub receives half of the weights; what it has in the end is whole."""
    hub.faults.append(Fault("PUT", "/storage/", status=None, halfway=True))
    pushing.push_folder(folder, "org/soup", PushOptions())
    assert held(hub, "org/soup") == contents(folder)
    (half,) = [request for request in hub.logged("PUT", "/storage/") if request.status == 0]
    (whole,) = [request for request in hub.logged("PUT", half.path) if request.status == 200]
    assert 0 < half.received < whole.received


def test_a_token_that_expires_during_the_upload(hub, folder):
    """The weights are uploaded, the commit is refused: nobody sees anything of it, and another token continues."""
    hub.faults.append(Fault("POST", "/commit/", status=401, times=99))
    with pytest.raises(ValueError, match="org/soup"):
        pushing.push_folder(folder, "org/soup", PushOptions())
    assert held(hub, "org/soup") == {}
    hub.faults.clear()
    sent = len(hub.logged("PUT", "/storage/"))
    pushing.push_folder(folder, "org/soup", PushOptions())
    assert held(hub, "org/soup") == contents(folder)
    assert len(hub.logged("PUT", "/storage/")) == sent  # what the Hub has is not sent again


def test_nothing_that_a_push_writes_or_says_has_the_token(hub, folder, tmp_path):
    """With debug logging, in a process of its own, when the push succeeds and when it is refused."""
    code = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG, stream=sys.stderr); "
        "from hf_radin.cli.main import main; logging.getLogger().setLevel(logging.DEBUG); sys.exit(main(sys.argv[1:]))"
    )
    for repo_id, status in (("org/soup", 0), ("someone/soup", 2)):
        run = subprocess.Popen(
            [sys.executable, "-c", code, "push", str(folder), repo_id],
            cwd=tmp_path,
            env=hub.environ(tmp_path / "home") | {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        line = Path(f"/proc/{run.pid}/cmdline")
        arguments = line.read_bytes() if line.exists() else b""
        out, err = run.communicate()
        assert run.returncode == status, err.decode()
        for text in (arguments, out, err):
            assert hub.token.encode() not in text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any(hub.token.encode() in path.read_bytes() for path in written)
    assert not any(hub.token.encode() in data for data in held(hub, "org/soup").values())


def test_a_change_of_somebody_else_is_never_overwritten_unseen(hub, folder):
    """The answer of the commit is lost, and before it is tried again a colleague edits the card."""
    hub.add_repo("org/soup", OLD)
    hub.faults.append(Fault("POST", "/commit/", status=None, answered=True))
    answer = hub.answer

    def edited(call):
        reply = answer(call)
        if "/commit/" in call.path:
            hub.add_commit("org/soup", {"README.md": b"# a colleague's"})
        return reply

    hub.answer = edited
    with pytest.raises(ValueError, match="org/soup has changed while it was pushed to: look at it, and push again"):
        pushing.push_folder(folder, "org/soup", PushOptions(overwrite=True))
    assert held(hub, "org/soup")["README.md"] == b"# a colleague's" and len(hub.commits("org/soup")) == 3


def test_what_changes_while_it_is_pushed_is_not_pushed(hub, folder):
    """It is hashed before the repository is made, and changes then; a small file is read just once."""
    answer = hub.answer

    def change_config(call):
        if call.path == "/api/repos/create":
            (folder / "config.json").write_text("{}")
        return answer(call)

    hub.answer = change_config
    with pytest.raises(ValueError, match=r"org/soup: config\.json has changed meanwhile"):
        commit_files("org/soup", pushing.saved_files(folder), PushOptions(), small=0)
    assert held(hub, "org/soup") == {}


def test_a_pull_request_whose_answer_is_lost_is_told(hub, folder):
    hub.add_repo("org/soup", OLD)
    hub.faults.append(Fault("POST", "/commit/", status=None, answered=True))
    with pytest.raises(ValueError, match="A pull request may be open: look at org/soup before you push again"):
        pushing.push_folder(folder, "org/soup", PushOptions(create_pr=True))


def test_a_file_that_is_gone_is_named_before_the_hub_is_asked(hub, tmp_path):
    with pytest.raises(ValueError, match=r"^org/soup: what is to be pushed can't be read: .*gone\.txt"):
        commit_files("org/soup", {"gone.txt": tmp_path / "gone.txt"}, PushOptions())
    assert not hub.requests


def test_a_pull_request_needs_a_repository(hub):
    with pytest.raises(ValueError, match=r"^There is no repository org/soup to open a pull request in"):
        check_target("org/soup", PushOptions(create_pr=True))
    assert not hub.logged("POST")


def test_whoever_asks_with_a_token_has_to_have_it(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"^org/soup: log in with `hf auth login`, or pass a token"):
        check_target("org/soup", PushOptions(token=True))
