"""Collections of the loopback Hub, as the client sees them."""

import pytest
from huggingface_hub import HfApi, get_collection
from huggingface_hub.errors import HfHubHTTPError

SLUG = "org/digits-soups-64f9a55bb3115b4f513ec026"


def test_a_collection_lists_its_items_in_order(hub):
    hub.add_repo("org/ft-2", {})
    hub.add_repo("stranger/ft-1", {})
    hub.add_repo("org/digits", {}, "dataset")
    items = [("model", "org/ft-2"), ("paper", "2203.05482"), ("dataset", "org/digits"), ("model", "stranger/ft-1")]
    hub.add_collection(SLUG, [*items, ("collection", "org/more-64f9a55bb3115b4f513ec027")])
    collection = get_collection(SLUG)
    *listed, nested = collection.items
    assert [(item.item_type, item.item_id) for item in listed] == items
    assert (nested.item_type, nested.item_id) == ("collection", "org/more-64f9a55bb3115b4f513ec027")
    assert [item.position for item in collection.items] == [0, 1, 2, 3, 4]
    assert len({item.item_object_id for item in collection.items}) == 5
    assert (collection.slug, collection.title, collection.url) == (
        SLUG,
        "Digits soups",
        f"{hub.url}/collections/{SLUG}",
    )
    assert collection.owner["name"] == "org" and not collection.private


def test_a_collection_hides_what_the_caller_may_not_see(hub):
    for name in ("org/open", "org/secret", "stranger/secret", "org/gone"):
        hub.add_repo(name, {}, private=name.endswith("secret"))
    names = ["org/open", "org/secret", "stranger/secret", "org/gone"]
    hub.add_collection(SLUG, [("model", name) for name in names])
    HfApi().delete_repo("org/gone")
    assert [item.item_id for item in get_collection(SLUG).items] == ["org/open", "org/secret"]
    assert [item.item_id for item in get_collection(SLUG, token=False).items] == ["org/open"]


def test_an_item_is_of_its_type(hub):
    hub.add_repo("org/digits", {}, "dataset")
    hub.add_collection(SLUG, [("model", "org/digits"), ("dataset", "org/digits")])
    assert [item.item_type for item in get_collection(SLUG).items] == ["dataset"]


@pytest.mark.parametrize("slug", ["org/digits-soups", "org/none-64f9a55bb3115b4f513ec026"])
def test_a_collection_that_does_not_exist(hub, slug):
    hub.add_collection(SLUG, [])
    assert get_collection(SLUG).items == []
    with pytest.raises(HfHubHTTPError, match="Collection not found") as refusal:
        get_collection(slug)
    assert refusal.value.response.status_code == 404
