"""The package itself: what importing it costs, and who imports whom."""

import ast
import subprocess
import sys
import time
from operator import attrgetter
from pathlib import Path

import pytest

import hf_radin
from tools import house

PACKAGE = Path(hf_radin.__file__).parent
ROOT = PACKAGE.parent
MODULES = house.read_modules(PACKAGE)

# From the ground up: each room imports only those before it.
ROOMS = [
    *("runtime", "recipes", "metrics", "images", "sharing", "checkpoints", "ingredients", "tail"),
    *("weights", "adapters", "logits", "layers", "soup", "search", "averaging", "training", "cli"),
]


def test_importing_loads_neither_torch_nor_transformers_and_is_fast():
    code = (
        "import sys, time; start = time.perf_counter(); import hf_radin; spent = time.perf_counter() - start;"
        "print(spent, *sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    runs = [subprocess.check_output([sys.executable, "-c", code], text=True).split() for _ in range(3)]
    assert all(len(run) == 1 for run in runs), f"loaded: {runs}"
    assert min(float(run[0]) for run in runs) < 0.3


def test_the_help_of_the_command_line_is_there_within_two_seconds():
    start = time.perf_counter()
    subprocess.check_output([sys.executable, "-m", "hf_radin", "soup", "--help"])
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name", hf_radin.__all__)
def test_every_public_name_is_there_twice_over(name):
    # the second look must not find a module of the same name
    for _ in range(2):
        assert callable(getattr(hf_radin, name)) and not isinstance(getattr(hf_radin, name), type(sys))
        assert getattr(hf_radin, name).__doc__


def test_public_names_are_listed():
    assert {*hf_radin.__all__} <= {*dir(hf_radin)}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'soup_of_the_day'"):
        attrgetter("soup_of_the_day")(hf_radin)


def test_rooms_import_one_way():
    """What a room imports lies below it, function-level imports included."""
    names = {module.name for module in MODULES}
    upward = [
        f"{module.name} imports {target}"
        for module in MODULES
        if module.room in ROOMS
        for target, _ in module.imports(names)
        if ROOMS.index(target.partition(".")[0]) > ROOMS.index(module.room)
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle():
    assert house.circles(house.import_graph(MODULES)) == []


def test_a_room_is_as_large_as_can_be_looked_over():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {module.room for module in MODULES} - {"__main__"} == {*ROOMS}
    assert max(len([*(PACKAGE / room).glob("*.py")]) for room in ROOMS) <= 9


SCRIPTS = [
    path for folder in ("hf_radin", "examples", "benchmarks", "model_cards") for path in (ROOT / folder).rglob("*.py")
]


def test_no_parser_takes_shortened_options():
    """`--metric` is no `--metrics`: an option that is not there is refused, whatever others begin with it."""
    calls = [
        node for script in SCRIPTS for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)
    ]
    parsers = [call for call in calls if ast.unparse(call.func).endswith("ArgumentParser")]
    assert len(parsers) > 10
    for parser in parsers:
        exact = [ast.literal_eval(option.value) for option in parser.keywords if option.arg == "allow_abbrev"]
        assert exact == [False], ast.unparse(parser)
