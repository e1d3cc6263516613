"""A push does what it is asked, refuses what would hurt, and says what to do."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import (
    HfApi,
    ModelCard,
    metadata_load,
    metadata_save,
    parse_eval_result_entries,
    snapshot_download,
)
from loopback_hub.fixtures import reread_environment
from loopback_hub.wire import Reply, json_reply
from peft import LoraConfig, get_peft_model
from shared.pushed import OLD, UNNAMED, contents, folder, held, line_to_load, quick
from transformers import ViTForImageClassification

import hf_radin
from hf_radin.cli.main import main
from hf_radin.runtime.hub_commit import PushOptions, check_target
from hf_radin.soup.card import MARKS
from hf_radin.soup.push import CardOptions, files_to_push, push_folder

__all__ = ["folder", "quick"]  # fixtures


def test_what_was_pushed_is_read_back(hub, folder):
    made = push_folder(folder, "org/soup", PushOptions())
    paths = [request.path for request in hub.logged("GET", "/resolve/")]
    names = contents(folder).keys()
    assert len(names) == 6
    assert all(any(f"/resolve/{made.oid}/{name}" in path for path in paths) for name in names)


def test_what_arrives_otherwise_is_told(hub, folder):
    answer = hub.answer

    def spoil_card(call):
        reply = answer(call)
        if call.method == "GET" and "/resolve/" in call.path and call.path.endswith("README.md"):
            reply.body = reply.body.replace(b"soup", b"soap")
        return reply

    hub.answer = spoil_card
    with pytest.raises(ValueError, match=r"org/soup: README\.md at commit \w+ is not what was pushed"):
        push_folder(folder, "org/soup", PushOptions())


def test_the_same_again_is_no_commit(hub, folder):
    first = push_folder(folder, "org/soup", PushOptions())
    again = push_folder(folder, "org/soup", PushOptions())
    assert again.oid == first.oid and len(hub.commits("org/soup")) == 2


def test_a_repository_that_holds_something_else_is_refused(hub, folder, capsys):
    hub.add_repo("org/soup", OLD)
    before = held(hub, "org/soup")
    with pytest.raises(ValueError, match=r"org/soup holds something else \(README\.md, model\.safetensors, notes"):
        push_folder(folder, "org/soup", PushOptions())
    assert main(["push", str(folder), "org/soup"]) == 2 and "--overwrite" in capsys.readouterr().err
    assert held(hub, "org/soup") == before


def test_a_pull_request_is_allowed_and_leaves_it_alone(hub, folder):
    hub.add_repo("org/soup", OLD)
    made = push_folder(folder, "org/soup", PushOptions(create_pr=True))
    assert made.pr_num == 1 and held(hub, "org/soup") == OLD
    with pytest.raises(ValueError, match="There is no repository org/other to open a pull request in"):
        push_folder(folder, "org/other", PushOptions(create_pr=True))


def test_overwriting_removes_what_made_a_model_of_the_old_and_keeps_the_rest(hub, folder):
    shards = {f"model-0000{number}-of-00002.safetensors": b"old" for number in (1, 2)}
    others = {"model.safetensors.index.json": b"{}", "adapter_config.json": b"{}", "train.log": b"mine"}
    hub.add_repo("org/soup", OLD | shards | others)
    push_folder(folder, "org/soup", PushOptions(overwrite=True))
    assert held(hub, "org/soup") == contents(folder) | {"notes.txt": b"mine", "train.log": b"mine"}
    assert len(hub.commits("org/soup")) == 2


def test_a_branch(hub, folder, capsys):
    hub.add_repo("org/soup", OLD)
    HfApi().create_branch("org/soup", branch="next")
    assert main(["push", str(folder), "org/soup", "--revision", "next", "--overwrite"]) == 0
    assert held(hub, "org/soup") == OLD
    expected = contents(folder)
    expected["README.md"] = expected["README.md"].replace(line_to_load(UNNAMED), line_to_load("org/soup"))
    assert {name: bytes(hub.files("org/soup", "next")[name]) for name in expected} == expected
    assert main(["push", str(folder), "org/soup", "--revision", "nosuch"]) == 2
    assert "org/soup has no revision 'nosuch'" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_uploaded_and_does_nothing(hub, folder, capsys):
    assert main(["push", str(folder), "org/soup", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "org/soup would be made." in printed and all(name in printed for name in contents(folder))
    with pytest.raises(KeyError):
        hub.files("org/soup")
    hub.add_repo(
        "org/soup", OLD | {"adapter_config.json": b"{}", "config.json": (folder / "config.json").read_bytes()}
    )
    assert main(["push", str(folder), "org/soup", "--dry-run", "--overwrite"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"config\.json +[\d.]+ k?B  is there already", printed)
    assert re.search(r"README\.md +[\d.]+ k?B  replaces what is there", printed)
    assert re.search(r"adapter_config\.json +would be removed", printed) and "notes.txt" not in printed
    assert len(hub.commits("org/soup")) == 1
    push_folder(folder, "org/soup", PushOptions(overwrite=True))
    assert main(["push", str(folder), "org/soup", "--dry-run"]) == 0
    assert "holds just that already: nothing would be pushed" in capsys.readouterr().out


def test_offline_it_is_refused_and_said_how_to_go_on(hub, folder, capsys):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        reread_environment()
        assert main(["push", str(folder), "org/soup"]) == 2
    reread_environment()
    assert "HF_HUB_OFFLINE is set. Save the soup, and push it later with `hf-radin push" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("someone/soup", "tester may not write under 'someone', only under tester, org"),
        ("org/full", r"org/full holds something else \(README.md\)"),
        ("a/b/c", "a/b/c is not a Hub id"),
        ("org/soup --eval-task org/b:x", "--eval-task org/b:x needs a split that takes no part in the choice"),
        ("org/soup --eval-task <b>:x --test-split test", "'<b>:x' names no task of a benchmark"),
        (
            "org/soup --eval-task org/b:x --test-split test --license none-of-them",
            "license='none-of-them': the Hub knows no such licence",
        ),
        ("org/public --private", "org/public is there and everybody can read it"),
        ("org/soup --license none-of-them", "license='none-of-them': the Hub knows no such licence"),
    ],
)
def test_a_target_is_looked_at_before_the_models_are(hub, digits, tmp_path, monkeypatch, capsys, target, message):
    """There are no such models, and nobody says so."""
    hub.add_repo("org/full", {"README.md": b"# somebody's"})
    hub.add_repo("org/public", {})
    monkeypatch.chdir(tmp_path)
    command = ["soup", "--models", "gone/ft-*", "--dataset", str(digits), "--push-to"]
    assert main([*command, *target.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "gone" not in error
    assert main([*command, "org/new"]) == 2 and "gone" in capsys.readouterr().err


def test_a_target_that_will_be_made_is_not_made_before(hub):
    check_target("org/soup", PushOptions())
    check_target("soup", PushOptions())
    assert not hub.logged("POST")


def test_an_id_without_a_namespace_is_ones_own(hub, folder):
    push_folder(folder, "soup", PushOptions())
    assert held(hub, "tester/soup") == contents(folder)


def test_the_card_says_what_to_load(hub, folder, tmp_path):
    """The repository that it is in, wherever it was pushed to before."""
    push_folder(folder, "org/soup", PushOptions())
    assert b'pipeline("image-classification", model="org/soup")' in hub.files("org/soup")["README.md"]
    assert line_to_load(UNNAMED) in (folder / "README.md").read_bytes()
    pulled = snapshot_download("org/soup", local_dir=tmp_path / "pulled")
    push_folder(Path(pulled), "soup", PushOptions())
    assert b'pipeline("image-classification", model="tester/soup")' in hub.files("tester/soup")["README.md"]


def test_only_what_a_soup_is_made_of_is_uploaded(hub, folder):
    expected = contents(folder)
    for name in ("train.py", "wandb_config.json", "kitten.png", "model.safetensors.bak", ".0123456789ab.config.json"):
        (folder / name).write_text("mine")
    push_folder(folder, "org/soup", PushOptions())
    assert held(hub, "org/soup") == expected
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no complete soup: there is no config\.json"):
        push_folder(folder, "org/other", PushOptions())


def test_a_token_that_may_only_read_is_told_before(hub):
    answer, reader = hub.answer, {"name": "tester", "auth": {"accessToken": {"role": "read"}}}
    hub.answer = lambda call: json_reply(reader) if call.path == "/api/whoami-v2" else answer(call)
    with pytest.raises(ValueError, match="org/soup: the token may only read"):
        check_target("org/soup", PushOptions())


def test_a_branch_of_a_repository_that_is_not_there_is_refused_before_it_is_made(hub, folder):
    with pytest.raises(ValueError, match="no repository org/new yet, and so no branch 'next'"):
        push_folder(folder, "org/new", PushOptions(revision="next"))
    with pytest.raises(KeyError):
        hub.files("org/new")


@pytest.mark.parametrize("status", [0, 2])
def test_of_two_processes_one_pushes_a_saved_soup_and_both_end_as_it_does(hub, folder, tmp_path, status):
    hub.add_repo("org/soup", OLD) if status else None
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    run = subprocess.run(
        [sys.executable, *launch.split(), "--module", "hf_radin", "push", str(folder), "org/soup"],
        cwd=tmp_path,
        env=hub.environ(tmp_path / "home") | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert bool(run.returncode) == bool(status), run.stderr  # the launcher has a status of its own
    codes = set(re.findall(r"exitcode *: (-?\d+)", run.stderr))
    assert codes <= {str(status), "-15"} and bool(codes) == bool(status)  # or it was told to end
    assert "terminate called" not in run.stderr
    assert len(hub.logged("POST", "/commit/")) == run.stdout.count("/commit/") == (status == 0)
    assert run.stderr.count("holds something else") == (status == 2)


def test_what_the_hub_does_not_take_at_the_head_of_a_card_is_told(hub, folder):
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("pipeline_tag:", "license: none-of-them\npipeline_tag:"))
    with pytest.raises(
        ValueError, match=r'^org/soup: the Hub refuses: Invalid metadata in README\.md\. - "license" must'
    ):
        push_folder(folder, "org/soup", PushOptions())
    assert held(hub, "org/soup") == {}


def test_the_head_of_a_card_is_what_a_hub_takes_and_comes_back_as_it_was(hub, folder, tmp_path):
    ModelCard.load(folder / "README.md").validate()
    data = metadata_load(folder / "README.md")
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-classification"
    metadata_save(tmp_path / "README.md", data)
    assert metadata_load(tmp_path / "README.md") == data
    (results,) = (entry["results"] for entry in data["model-index"])
    assert [result["dataset"]["split"] for result in results] == ["validation"]


def test_a_result_for_a_leaderboard_does_not_outlive_its_soup(hub, bank):
    hf_radin.uniform(bank, test_split="test").push_to_hub("org/soup", eval_task="org/bench:default")
    assert ".eval_results/hf_radin.yaml" in hub.files("org/soup")
    hf_radin.best_single(bank).push_to_hub("org/soup", overwrite=True)
    assert not any(name.startswith(".eval") for name in hub.files("org/soup"))


@pytest.mark.parametrize("token", ["hf_" + "secret" * 5 + "\n", "hf_" + "secret" * 5 + "\u201c", "a\0b"])
def test_a_token_that_is_none_is_told_and_not_said(hub, folder, token, caplog):
    with pytest.raises(ValueError, match=r"^org/soup: the token is malformed") as error:
        push_folder(folder, "org/soup", PushOptions(token=token))
    assert "secret" not in str(error.value) and "secret" not in caplog.text


@pytest.mark.parametrize("answer", [b"null", b"[]", b"3", b"<html>", b""])
def test_an_address_that_is_no_hub_is_told(hub, folder, answer, capsys):
    hub.answer = lambda call: Reply(answer)
    assert main(["push", str(folder), "org/soup"]) == 2
    assert "org/soup" in capsys.readouterr().err
    assert main(["push", str(folder), "soup"]) == 2
    error = capsys.readouterr().err
    assert "Hub" in error and len(error.strip().splitlines()) == 1


def test_what_the_user_wrote_is_pushed_as_it_is(hub, folder):
    mine = '\nCompare with:\n\nclassify = pipeline("image-classification", model="google/vit")\n'
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace(MARKS[0], MARKS[0] + mine))
    push_folder(folder, "org/soup", PushOptions())
    pushed = hub.files("org/soup")["README.md"].decode()
    assert MARKS[0] + mine in pushed and pushed.count('model="org/soup"') == 1


def test_a_licence_stands_in_the_head_of_the_card_that_is_pushed(hub, folder):
    before = (folder / "README.md").read_text()
    push_folder(folder, "org/soup", PushOptions(), CardOptions(license="mit"))
    pushed = held(hub, "org/soup")["README.md"].decode()
    assert ModelCard(pushed).data.license == "mit" and (folder / "README.md").read_text() == before
    assert pushed.split("---\n", 2)[2] == before.split("---\n", 2)[2]
    with pytest.raises(ValueError, match="license='mti': the Hub knows no such licence"):
        push_folder(folder, "org/other", PushOptions(), CardOptions(license="mti"))
    (folder / "README.md").write_text("---\na: [\n---\n# mine\n")
    with pytest.raises(ValueError, match=r"README\.md has no head that can be read, so that no licence can be set: "):
        push_folder(folder, "org/other", PushOptions(), CardOptions(license="mit"))


def test_a_soup_without_a_card_is_pushed_without(hub, folder):
    (folder / "README.md").unlink()
    push_folder(folder, "org/soup", PushOptions())
    assert held(hub, "org/soup") == contents(folder) and "README.md" not in hub.files("org/soup")


def test_what_everybody_can_read_is_not_made_private_by_a_push(hub, folder):
    hub.add_repo("org/soup", {})
    with pytest.raises(ValueError, match="org/soup is there and everybody can read it"):
        push_folder(folder, "org/soup", PushOptions(private=True))


def test_a_dry_run_of_a_pull_request_says_so(hub, folder, capsys):
    hub.add_repo("org/soup", OLD)
    assert main(["push", str(folder), "org/soup", "--dry-run", "--create-pr"]) == 0
    assert "A pull request would be opened, and nothing there changed." in capsys.readouterr().out


def test_a_picture_that_the_card_does_not_show_stays_here(hub, folder):
    assert b"](passes.png)" not in (folder / "README.md").read_bytes()  # there was one soup to measure
    (folder / "passes.png").write_bytes(b"of an earlier card")
    push_folder(folder, "org/soup", PushOptions())
    assert "passes.png" not in hub.files("org/soup") and "classes.png" in hub.files("org/soup")


def test_pictures_of_an_earlier_soup_go_with_it(hub, folder, tmp_path):
    hub.add_repo("org/soup", OLD | {"passes.png": b"old", "mine.png": b"mine"})
    (folder / "passes.png").unlink(missing_ok=True)
    push_folder(folder, "org/soup", PushOptions(overwrite=True))
    assert "passes.png" not in held(hub, "org/soup") and held(hub, "org/soup")["mine.png"] == b"mine"


def test_a_folder_where_a_file_should_be_is_told(hub, folder):
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    with pytest.raises(ValueError, match=r"README\.md is a folder where a file should be"):
        push_folder(folder, "org/soup", PushOptions())


def test_a_result_for_a_leaderboard_is_written_where_the_user_names_the_task(hub, bank, tmp_path, capsys):
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
    assert main(["push", str(tmp_path / "soup"), "org/third", "--eval-task", "org/bench:default"]) == 2
    assert "needs an accuracy on a split that took no part in the choice" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_average_writes_can_be_pushed(hub, bank, folder, tmp_path, capsys, dtype):
    """From Python, where nothing was measured, and cooked from the recipe of a soup, in another dtype too."""
    ingredients = bank.ingredients[:2]
    hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids), output=tmp_path / "mine", dtype=dtype)
    options = ["--dtype", dtype] if dtype else []
    cook = ["average", "--recipe", str(folder / "recipe.json"), "--output", str(tmp_path / "cooked"), *options]
    assert main(cook) == 0
    for name in ("mine", "cooked"):
        push = ["push", str(tmp_path / name), f"org/{name}"]
        assert main([*push, "--dry-run"]) == 0 and "recipe.json" in capsys.readouterr().out
        assert main(push) == 0
        assert held(hub, f"org/{name}").keys() >= {"README.md", "recipe.json", "config.json", "model.safetensors"}
        soup = hf_radin.Soup.from_pretrained(f"org/{name}")
        assert str(soup.model.dtype) == f"torch.{dtype or 'float32'}" and bool(soup.results) == (name == "cooked")
        soup.push_to_hub(f"org/{name}-again")
    text = held(hub, "org/cooked")["README.md"].decode()
    assert ("were not measured so" in text) == bool(dtype)
    with pytest.raises(ValueError, match="needs an accuracy on a split that took no part in the choice"):
        files_to_push(tmp_path / "mine", "org/mine", PushOptions(), CardOptions(eval_task="org/bench:default"))


def test_private_names_of_an_average_are_left_out(hub, runs, tmp_path, caplog):
    for number in range(2):
        hub.add_repo(f"org/ft-{number}", contents(runs / f"ft-{number}"), private=True)
    ingredients = hf_radin.gather("org/ft-*")
    hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids), output=tmp_path / "mine")
    push_folder(tmp_path / "mine", "org/mine", PushOptions(), CardOptions(hide_private=True))
    pushed = held(hub, "org/mine")
    assert not any(b"org/ft-" in pushed[name] for name in ("README.md", "recipe.json"))
    assert b"private-1" in pushed["README.md"] and "Left out" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"), [("org/base", "org/base"), ("start", None), ("./start", None), ("runs/a/start", None)]
)
def test_what_cards_on_the_hub_name_as_their_base(hub, runs, tmp_path, monkeypatch, name, expected):
    """A namespace says that it is there, too; unless a folder here is called so."""
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        readme = {"README.md": f"---\nbase_model: {name}\n---\n".encode()}
        hub.add_repo(f"org/ft-{number}", contents(runs / f"ft-{number}") | readme)
    ingredients = hf_radin.gather("org/ft-*")
    for output in ("before", "after"):
        hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids), output=output)
        text = Path(output, "README.md").read_text()
        named = expected if output == "before" else None
        assert ModelCard(text).data.base_model == ["org/ft-0", "org/ft-1", *([named] if named else [])]
        assert (f"]({hub.url}/org/base)" in text) == bool(named)
        Path("org/base").mkdir(parents=True, exist_ok=True)


def test_the_base_of_adapters_is_known_from_where_it_was_loaded(hub, start, tmp_path, monkeypatch):
    """Whatever their own cards say: peft writes the name that the base was loaded by."""
    monkeypatch.chdir(tmp_path)
    hub.add_repo("org/base", contents(start))
    for number in range(2):
        model = ViTForImageClassification.from_pretrained("org/base")
        config = LoraConfig(r=2 + number, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(f"ft-{number}")
    ingredients = hf_radin.gather("ft-*")
    hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids), output="hub")
    assert ModelCard.load("hub/README.md").data.base_model == ["org/base"]
    shutil.copytree(start, "here/base")
    ingredients = hf_radin.gather("ft-*", base_model="here/base")
    hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids), output="folder")
    assert ModelCard.load("folder/README.md").data.base_model is None
    assert "name the base model here/base." in Path("folder/README.md").read_text()
