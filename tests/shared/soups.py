"""A soup of the digits with averaged heads, and the folder that it was saved to."""

import pytest

import hf_radin


@pytest.fixture(scope="module")
def soup(bank):
    return hf_radin.radin(bank, budget=4, head="average", test_split="test")


@pytest.fixture(scope="module")
def saved(soup, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "soup"
    soup.save_pretrained(folder)
    return folder
