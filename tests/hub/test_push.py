"""A push happens whole or not at all, whatever goes wrong on the way, and says what to do."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

import hf_radin
from hf_radin import access, cli, commit, private
from hf_radin import hub as pushing

from .wire import Fault

OLD = {
    "README.md": b"# A soup of last week",
    "recipe.json": b"{}",
    "model.safetensors": b"old weights",
    "notes.txt": b"mine",
}


@pytest.fixture
def folder(bank, tmp_path):
    """A soup as it was saved."""
    hf_radin.uniform(bank).save_pretrained(tmp_path / "soup")
    return tmp_path / "soup"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting for what is over at once: neither here nor in the client, whose pauses are seconds."""
    monkeypatch.setattr(access, "PAUSES", (0.01, 0.01, 0.01))
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def held(hub, repo_id: str) -> dict[str, bytes]:
    return {name: bytes(data) for name, data in hub.files(repo_id).items() if name != ".gitattributes"}


def test_what_was_pushed_is_read_back(hub, folder):
    made = pushing.push_folder(folder, "org/soup", commit_message="words")
    asked = [one.path for one in hub.asked("GET", "/resolve/")]
    assert all(any(f"/resolve/{made.oid}/{name}" in path for path in asked) for name in contents(folder))


def test_what_arrives_otherwise_is_told(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(folder / "config.json"))
    with pytest.raises(ValueError, match=r"org/soup: README\.md at commit \w+ is not what was pushed"):
        pushing.push_folder(folder, "org/soup", commit_message="words")


def test_the_same_again_is_no_commit(hub, folder):
    first = pushing.push_folder(folder, "org/soup", commit_message="words")
    again = pushing.push_folder(folder, "org/soup", commit_message="words")
    assert again.oid == first.oid and len(hub.commits("org/soup")) == 2


def test_a_repository_that_holds_something_else_is_refused(hub, folder, capsys):
    hub.add_repo("org/soup", OLD)
    before = held(hub, "org/soup")
    with pytest.raises(ValueError, match=r"org/soup holds something else \(README\.md, model\.safetensors, notes"):
        pushing.push_folder(folder, "org/soup", commit_message="words")
    assert cli.main(["push", str(folder), "org/soup"]) == 2 and "--overwrite" in capsys.readouterr().err
    assert held(hub, "org/soup") == before


def test_a_pull_request_is_allowed_and_leaves_it_alone(hub, folder):
    hub.add_repo("org/soup", OLD)
    made = pushing.push_folder(folder, "org/soup", create_pr=True, commit_message="words")
    assert made.pr_num == 1 and held(hub, "org/soup") == OLD
    with pytest.raises(ValueError, match="There is no repository org/other to open a pull request in"):
        pushing.push_folder(folder, "org/other", create_pr=True, commit_message="words")


def test_overwriting_removes_what_made_a_model_of_the_old_and_keeps_the_rest(hub, folder):
    shards = {f"model-0000{number}-of-00002.safetensors": b"old" for number in (1, 2)}
    more = {"model.safetensors.index.json": b"{}", "adapter_config.json": b"{}", "train.log": b"mine"}
    hub.add_repo("org/soup", OLD | shards | more)
    pushing.push_folder(folder, "org/soup", overwrite=True, commit_message="words")
    assert held(hub, "org/soup") == contents(folder) | {"notes.txt": b"mine", "train.log": b"mine"}
    assert len(hub.commits("org/soup")) == 2


def test_a_branch(hub, folder, capsys):
    hub.add_repo("org/soup", OLD)
    HfApi().create_branch("org/soup", branch="next")
    assert cli.main(["push", str(folder), "org/soup", "--revision", "next", "--overwrite"]) == 0
    assert held(hub, "org/soup") == OLD
    assert {name: bytes(hub.files("org/soup", "next")[name]) for name in contents(folder)} == contents(folder)
    assert cli.main(["push", str(folder), "org/soup", "--revision", "nosuch"]) == 2
    assert "org/soup has no revision 'nosuch'" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_uploaded_and_does_nothing(hub, folder, capsys):
    assert cli.main(["push", str(folder), "org/soup", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "org/soup would be made." in said and all(name in said for name in contents(folder))
    with pytest.raises(KeyError):
        hub.files("org/soup")
    hub.add_repo(
        "org/soup", OLD | {"adapter_config.json": b"{}", "config.json": (folder / "config.json").read_bytes()}
    )
    assert cli.main(["push", str(folder), "org/soup", "--dry-run", "--overwrite"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"config\.json +[\d.]+ k?B  is there already", said)
    assert re.search(r"README\.md +[\d.]+ k?B  replaces what is there", said)
    assert re.search(r"adapter_config\.json +would be removed", said) and "notes.txt" not in said
    assert len(hub.commits("org/soup")) == 1
    pushing.push_folder(folder, "org/soup", overwrite=True, commit_message="words")
    assert cli.main(["push", str(folder), "org/soup", "--dry-run"]) == 0
    assert "holds just that already: nothing would be pushed" in capsys.readouterr().out


def test_offline_it_is_refused_and_said_how_to_go_on(hub, folder, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["push", str(folder), "org/soup"]) == 2
    assert "HF_HUB_OFFLINE is set. Save the soup, and push it later with `hf-radin push" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("someone/soup", "tester may not write under 'someone', only under tester, org"),
        ("org/full", r"org/full holds something else \(README.md\)"),
        ("a/b/c", "a/b/c is not a Hub id"),
    ],
)
def test_a_target_is_looked_at_before_anything_is_computed(
    hub, bank, runs, digits, tmp_path, monkeypatch, capsys, target, message
):
    hub.add_repo("org/full", {"README.md": b"# somebody's"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_radin.gather", lambda *_, **__: pytest.fail("it was begun"))
    assert cli.main(["soup", "--models", f"{runs}/ft-*", "--dataset", str(digits), "--push-to", target]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_target_that_will_be_made_is_not_made_before(hub):
    commit.check_target("org/soup")
    commit.check_target("soup")
    assert not hub.asked("POST")


def test_an_id_without_a_namespace_is_ones_own(hub, folder):
    pushing.push_folder(folder, "soup", commit_message="words")
    assert held(hub, "tester/soup") == contents(folder)


def test_two_pushes_at_once_leave_one_of_them_whole(hub, folder, bank, tmp_path):
    """The second is told, whichever that is; run again with overwrite, it finishes."""
    hf_radin.best_single(bank).save_pretrained(tmp_path / "other")
    folders, told = [folder, tmp_path / "other"], {}
    ready = threading.Barrier(2)

    def push(one: Path) -> None:
        ready.wait()
        try:
            pushing.push_folder(one, "org/soup", commit_message=one.name)
        except ValueError as error:
            told[one] = str(error)

    threads = [threading.Thread(target=push, args=(one,)) for one in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 1 and "holds something else" in next(iter(told.values()))
    (lost,) = told
    (won,) = (one for one in folders if one != lost)
    assert held(hub, "org/soup") == contents(won)
    pushing.push_folder(lost, "org/soup", overwrite=True, commit_message="again")
    assert held(hub, "org/soup") == contents(lost)


@pytest.fixture
def secret(hub, runs, digits, tmp_path):
    """A soup of what is on the Hub: two public ingredients, a private one, and a private dataset."""
    for number in range(3):
        hub.add_repo(f"org/ft-{number}", contents(runs / f"ft-{number}"), private=number == 1)
    images = {f"data/{path.name}": path.read_bytes() for path in (digits / "data").iterdir()}
    hub.add_repo("org/digits", images, "dataset", private=True)
    bank = hf_radin.compute_logits(hf_radin.gather("org/ft-*"), "org/digits", cache_dir=tmp_path / "cache")
    return hf_radin.uniform(bank)


def test_names_of_what_is_private_are_told_before_they_are_public(hub, secret, caplog):
    secret.push_to_hub("org/soup")
    assert (
        "name what is private, and everybody can read them: org/digits, org/ft-1. Push with hide_private"
        in caplog.text
    )
    caplog.clear()
    secret.push_to_hub("org/quiet", private=True)
    assert "private" not in caplog.text


def test_names_of_what_is_private_are_told_before_a_bank_is_public(hub, secret, tmp_path, caplog):
    bank = hf_radin.compute_logits(hf_radin.gather("org/ft-*"), "org/digits", cache_dir=tmp_path / "cache")
    bank.push_to_hub("org/logits")
    assert "The bank names what is private, and everybody can read it: org/digits, org/ft-1." in caplog.text
    caplog.clear()
    bank.push_to_hub("org/quiet", private=True)
    assert "private" not in caplog.text


def test_names_of_what_is_private_are_left_out(hub, secret, tmp_path, capsys):
    secret.push_to_hub("org/soup", hide_private=True, license="mit")
    pushed = held(hub, "org/soup")
    assert not any(name in data for name in (b"org/ft-1", b"org/digits") for data in pushed.values())
    fields = json.loads(pushed["recipe.json"])
    assert [one["repo_id"] for one in fields["ingredients"]] == ["org/ft-0", None, "org/ft-2"]
    assert hub.commits("org/ft-1")[0].sha.encode() not in pushed["recipe.json"]
    assert b"private-" in pushed["README.md"] and b"license: mit" in pushed["README.md"]
    again = hf_radin.Soup.from_pretrained("org/soup")
    assert again.recipe.weights == secret.recipe.weights and len(again.measurements) == len(secret.measurements)
    secret.save_pretrained(tmp_path / "soup")
    assert cli.main(["push", str(tmp_path / "soup"), "org/other", "--hide-private"]) == 0
    assert held(hub, "org/other")["recipe.json"] == pushed["recipe.json"]


# What a push asks, in turn: the method and what its path has.
ASKED = [
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


def test_the_faults_are_tried_at_each_request_of_a_push(hub, folder):
    pushing.push_folder(folder, "org/soup", commit_message="words")
    for request in hub.requests:
        assert any(request.method == method and part in request.path for method, part in ASKED), request
    for method, part in ASKED:
        assert hub.asked(method, part), (method, part)


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("times", [1, 99], ids=["once", "always"])
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_goes_wrong_the_repository_holds_the_old_or_the_new(hub, folder, fault, times, existing, capsys):
    """In success after another try, or in an error that names the repository; and the same again finishes the job."""
    new, rows = contents(folder), []
    for number, (method, part) in enumerate(ASKED):
        repo_id = f"org/soup-{number}"
        if existing:
            hub.add_repo(repo_id, OLD)
        hub.faults.append(Fault(method, part.replace("org/soup", repo_id), times=times, **FAULTS[fault]))
        try:
            pushing.push_folder(folder, repo_id, overwrite=existing, commit_message="words")
            outcome = "pushed"
        except ValueError as error:
            outcome = "refused"
            assert repo_id in str(error) and len(str(error).splitlines()) == 1
            assert hub.token not in str(error)
        hub.faults.clear()
        expected = new | ({"notes.txt": OLD["notes.txt"]} if existing else {})
        try:
            found = held(hub, repo_id)
        except KeyError:
            found = {}
        assert found == expected or (outcome == "refused" and found in ({}, OLD)), (method, part, found.keys())
        assert contents(folder) == new
        pushing.push_folder(folder, repo_id, overwrite=existing, commit_message="words")
        assert held(hub, repo_id) == expected
        rows.append((f"{method} {part}", outcome))
    with capsys.disabled():
        where = "a repository that is there" if existing else "a new repository"
        print(f"\n{fault}, {'once' if times == 1 else 'always'}, {where}: ", end="")
        print(", ".join(f"{request} {outcome}" for request, outcome in rows))


def test_a_drop_in_the_middle_of_an_upload(hub, folder):
    """The Hub hears half of the weights; what it gets at last is whole."""
    hub.faults.append(Fault("PUT", "/storage/", status=None, halfway=True))
    pushing.push_folder(folder, "org/soup", commit_message="words")
    assert held(hub, "org/soup") == contents(folder)
    (half,) = [one for one in hub.asked("PUT", "/storage/") if one.status == 0]
    (whole,) = [one for one in hub.asked("PUT", half.path) if one.status == 200]
    assert 0 < half.received < whole.received


def test_a_token_that_expires_during_the_upload(hub, folder, monkeypatch):
    """The weights are there, the commit is refused: nothing is seen of it, and with another token it goes on."""
    hub.faults.append(Fault("POST", "/commit/", status=401, times=99))
    with pytest.raises(ValueError, match="org/soup"):
        pushing.push_folder(folder, "org/soup", commit_message="words")
    assert held(hub, "org/soup") == {}
    hub.faults.clear()
    sent = len(hub.asked("PUT", "/storage/"))
    pushing.push_folder(folder, "org/soup", commit_message="words")
    assert held(hub, "org/soup") == contents(folder)
    assert len(hub.asked("PUT", "/storage/")) == sent  # what the Hub has it is not sent again


def test_nothing_that_a_push_writes_or_says_has_the_token(hub, folder, tmp_path):
    """At the level of debugging, in a process of its own, when all goes well and when it is refused."""
    code = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG, stream=sys.stderr); "
        "from hf_radin import cli; logging.getLogger().setLevel(logging.DEBUG); sys.exit(cli.main(sys.argv[1:]))"
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


def test_only_what_a_soup_is_made_of_is_uploaded(hub, folder):
    for name in ("train.py", "wandb_config.json", "kitten.png", "model.safetensors.bak", ".0123456789ab.config.json"):
        (folder / name).write_text("mine")
    pushing.push_folder(folder, "org/soup", commit_message="words")
    assert not any(data == b"mine" for data in held(hub, "org/soup").values())
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no whole soup: there is no config\.json"):
        pushing.push_folder(folder, "org/other", commit_message="words")


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
        pushing.push_folder(folder, "org/soup", overwrite=True, commit_message="words")
    assert held(hub, "org/soup")["README.md"] == b"# a colleague's" and len(hub.commits("org/soup")) == 3


def test_what_changes_while_it_is_pushed_is_not_pushed(hub, folder, monkeypatch):
    monkeypatch.setattr(commit, "SMALL", 0)  # all files are read in blocks
    plan = commit.plan

    def change(*args, **options):
        (folder / "recipe.json").write_text("{}")
        return plan(*args, **options)

    monkeypatch.setattr(commit, "plan", change)
    with pytest.raises(ValueError, match=r"org/soup: recipe\.json has changed meanwhile"):
        pushing.push_folder(folder, "org/soup", commit_message="words")
    assert held(hub, "org/soup") == {}


def test_a_pull_request_whose_answer_is_lost_is_told(hub, folder):
    hub.add_repo("org/soup", OLD)
    hub.faults.append(Fault("POST", "/commit/", status=None, answered=True))
    with pytest.raises(ValueError, match="A pull request may be open: look at org/soup before you push again"):
        pushing.push_folder(folder, "org/soup", create_pr=True, commit_message="words")


def test_a_token_that_may_only_read_is_told_before(hub, monkeypatch):
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "tester", "auth": {"accessToken": {"role": "read"}}})
    with pytest.raises(ValueError, match="org/soup: the token may only read"):
        commit.check_target("org/soup")


def test_a_branch_of_a_repository_that_is_not_there_is_refused_before_it_is_made(hub, folder):
    with pytest.raises(ValueError, match="no repository org/new yet, and so no branch 'next'"):
        pushing.push_folder(folder, "org/new", revision="next", commit_message="words")
    with pytest.raises(KeyError):
        hub.files("org/new")


FIELDS = {
    "recipe": {"ingredients": ["org/ft", "org/ft-public", "private-1"], "weights": [0.5, 0.25, 0.25]},
    "ingredients": [
        {"id": "org/ft", "repo_id": "org/ft", "revision": "abc", "subfolder": "", "base_model": "org/secret"},
        {"id": "org/ft-public", "repo_id": "org/ft-public", "revision": "def", "dataset": "org/images"},
        {"id": "private-1", "repo_id": None, "revision": "ghi"},
    ],
    "data": {"name": "org/open", "revision": "r"},
    "bank": "org/logits@sha",
    "remarks": [["org/ft@abc:inner", "is a stranger"]],
    "image_processor": "org/processor@main",
}


def test_every_repository_that_a_recipe_names_is_asked_for(hub):
    hub.add_repo("org/ft-public", {"a": b""})
    hub.add_repo("org/ft", {"a": b""}, "dataset")  # a public dataset of that name is no public model
    hub.add_repo("org/open", {"a": b""}, "dataset")
    names = private.private_names(FIELDS)
    assert sorted(names) == ["org/ft", "org/images", "org/logits", "org/processor", "org/secret"]
    hidden = json.dumps(private.without(FIELDS, names))
    assert not any(f'"{name}{end}' in hidden for name in names for end in '"@:') and "inner" not in hidden
    assert "abc" not in hidden
    found = json.loads(hidden)
    assert found["ingredients"][1]["repo_id"] == "org/ft-public" and found["data"]["name"] == "org/open"
    ids = [one["id"] for one in found["ingredients"]]
    assert len({*ids}) == 3 and ids[1:] == ["org/ft-public", "private-1"] and found["recipe"]["ingredients"] == ids


def test_a_private_name_in_another_file_is_refused(hub, secret, tmp_path):
    secret.save_pretrained(tmp_path / "soup")
    config = json.loads((tmp_path / "soup" / "config.json").read_text())
    (tmp_path / "soup" / "config.json").write_text(json.dumps({**config, "note": "made of org/ft-1"}))
    with pytest.raises(ValueError, match=r"config\.json names org/ft-1, which is private: take it out by hand"):
        pushing.push_folder(tmp_path / "soup", "org/soup", hide_private=True, commit_message="words")


def test_a_public_name_that_begins_as_a_private_one_may_stay(hub, runs, digits, tmp_path):
    for name, private_one in (("org/ft", True), ("org/ft-public", False), ("org/ft.2", False)):
        hub.add_repo(name, contents(runs / f"ft-{len(name) % 3}"), private=private_one)
    found = hf_radin.gather(["org/ft", "org/ft-public", "org/ft.2"])
    soup = hf_radin.uniform(hf_radin.compute_logits(found, digits, cache_dir=tmp_path / "cache"))
    soup.push_to_hub("org/soup", hide_private=True)
    card = held(hub, "org/soup")["README.md"].decode()
    assert "[org/ft-public](https" in card and "[org/ft.2](https" in card and "org/ft\n" not in card


def test_a_broken_recipe_is_named(hub, secret, tmp_path, capsys):
    secret.save_pretrained(tmp_path / "soup")
    fields = json.loads((tmp_path / "soup" / "recipe.json").read_text())
    for name, value in (("measurements", None), ("results", "none"), ("remarks", 3)):
        broken = {**fields, name: value} if value is not None else {k: v for k, v in fields.items() if k != name}
        (tmp_path / "soup" / "recipe.json").write_text(json.dumps(broken))
        assert cli.main(["push", str(tmp_path / "soup"), "org/soup", "--hide-private"]) == 2
        assert "recipe.json" in capsys.readouterr().err


def test_of_two_processes_one_pushes_a_saved_soup(hub, folder, tmp_path):
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    run = subprocess.run(
        [sys.executable, *launch.split(), "--module", "hf_radin.cli", "push", str(folder), "org/soup"],
        cwd=tmp_path,
        env=hub.environ(tmp_path / "home") | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert len(hub.asked("POST", "/commit/")) == 1 and run.stdout.count("/commit/") == 1


def test_a_result_for_a_leaderboard_is_written_where_the_user_names_the_task(hub, bank, tmp_path, capsys):
    from huggingface_hub import parse_eval_result_entries

    soup = hf_radin.uniform(bank, test_split="test")
    soup.push_to_hub("org/soup", eval_task="org/bench:default")
    (entry,) = parse_eval_result_entries(yaml.safe_load(held(hub, "org/soup")[".eval_results/hf_radin.yaml"]))
    assert (entry.dataset_id, entry.task_id) == ("org/bench", "default")
    assert entry.value == soup.accuracy("soup", "test") and entry.notes == "split test"
    soup.push_to_hub("org/other")
    assert not any(name.startswith(".eval") for name in held(hub, "org/other"))
    with pytest.raises(ValueError, match="'org/bench' names no task of a benchmark"):
        soup.push_to_hub("org/third", eval_task="org/bench")
    hf_radin.uniform(bank).save_pretrained(tmp_path / "soup")  # measured on nothing but the split that chose
    assert cli.main(["push", str(tmp_path / "soup"), "org/third", "--eval-task", "org/bench:default"]) == 2
    assert "needs an accuracy on a split that took no part in the choice" in capsys.readouterr().err
