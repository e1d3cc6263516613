"""Checkpoints on Hubs that others wrote: what a listing or a header's answer lacks costs nobody a wrong verdict."""

import pytest
from loopback_hub.wire import Reply, json_reply
from shared.other_hubs import alter, alter_json, without

import hf_radin
from hf_radin.cli.main import main
from hf_radin.ingredients import resolve


@pytest.fixture
def zoo(hub, runs):
    """Two fine-tunes."""
    for name in ("ft-0", "ft-1"):
        hub.add_repo(f"org/{name}", {path.name: path.read_bytes() for path in (runs / name).iterdir()})
    return hub


def whole_file(hub):
    """A server, or a proxy before one, that knows no ranges."""

    def change(call, reply):
        if reply.status != 206:
            return reply
        _, repo, name, _, revision, *_ = call.path.split("/")
        content = hub.files(f"{repo}/{name}", revision)[call.path.rpartition("/")[2]]
        return Reply(content, 200, {key: value for key, value in reply.headers.items() if key != "Content-Range"})

    alter(hub, "GET", "/resolve/", change)


def test_a_server_that_knows_no_ranges_is_read_as_any(zoo):
    expected = [ingredient.key for ingredient in hf_radin.gather("org/ft-*")]
    whole_file(zoo)
    assert [ingredient.key for ingredient in hf_radin.gather("org/ft-*")] == expected
    assert {request.status for request in zoo.logged("GET", "model.safetensors")} >= {206, 200}


@pytest.mark.parametrize("names", [("blobId",), ("lfs",), ("blobId", "lfs", "size"), ("siblings",)])
def test_what_a_hub_does_not_say_of_files_stands_in_its_tree(zoo, names):
    """Two checkpoints of which it says nothing are no copies of each other."""
    alter_json(zoo, "GET", "/revision/", without(*names))
    assert len(hf_radin.gather("org/ft-*")) == 2
    zoo.add_repo("org/ft-2", dict(zoo.files("org/ft-1")))
    verdicts = hf_radin.ingredients.gather.inspect("org/ft-*")
    if "lfs" not in names or "blobId" in names:  # else the one hash that is known is of a pointer
        assert "is the same checkpoint as org/ft-1" in verdicts[2].notes[-1]


@pytest.mark.parametrize("sha", [None, 3, {}])
def test_a_hub_that_names_no_commit_is_named(zoo, capsys, sha):
    alter_json(zoo, "GET", "/revision/", lambda info: info | {"sha": sha})
    assert main(["inspect", "--models", "org/ft-*"]) == 2
    output = capsys.readouterr()
    assert "the Hub's answer is invalid" in output.out + output.err


@pytest.mark.parametrize(("page", "is_said"), [(resolve.PAGE, True), (2 * resolve.PAGE, True), (49, False)])
def test_a_listing_that_ends_at_a_round_number_is_said(zoo, caplog, page, is_said):
    """A server without pages cuts its listing off, and says nothing of what follows."""
    listed = [{"id": "org/ft-0"}, {"id": "org/ft-1"}, *({"id": f"org/x-{number}"} for number in range(page - 2))]
    alter(zoo, "GET", "/api/models", lambda call, reply: json_reply(listed) if call.option("author") else reply)
    assert len(hf_radin.gather("org/ft-*")) == 2
    assert (f"The Hub lists {page} models of org: there may be more" in caplog.text) == is_said


@pytest.mark.parametrize("value", [None, 3, ["x"], {}])
@pytest.mark.parametrize(
    ("fragment", "field", "models"),
    [("/api/models", "id", "org/ft-*"), ("/api/collections", "items", "collections/org/fts-0123")],
)
def test_a_listing_of_no_names_is_told_in_one_line(zoo, capsys, fragment, field, models, value):
    zoo.add_collection("org/fts-0123", [("model", "org/ft-0"), ("model", "org/ft-1")])
    spoilt = {field: value}
    alter_json(
        zoo,
        "GET",
        fragment,
        lambda answer: [entry | spoilt for entry in answer] if isinstance(answer, list) else answer | spoilt,
    )
    assert main(["inspect", "--models", models]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-radin: ")]) == 1


def test_a_server_that_sends_less_than_was_asked_for_gives_no_header(zoo):
    alter(
        zoo,
        "GET",
        "/resolve/",
        lambda call, reply: Reply(reply.body[:100], 206, reply.headers) if reply.status == 206 else reply,
    )
    with pytest.raises(ValueError, match=r"org/ft-0: model\.safetensors is not a whole file of weights"):
        hf_radin.gather("org/ft-*")


def test_weights_that_a_hub_lists_no_longer_are_named(zoo):
    ingredients = hf_radin.gather("org/ft-*")
    alter_json(zoo, "GET", "/api/models/org/ft-0", lambda listed: [] if isinstance(listed, list) else listed)
    with pytest.raises(ValueError, match=r"org/ft-0: no weights"):
        ingredients[0].download()
