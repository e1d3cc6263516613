"""The package itself: what importing it costs, and who imports whom."""

import ast
import subprocess
import sys
import time
from operator import attrgetter
from pathlib import Path

import pytest

import hf_radin

PACKAGE = Path(hf_radin.__file__).parent
ROOT = PACKAGE.parent
GROUND_FLOOR = {
    "checkpoint",
    "fields",
    "modeling",
    "lora",
    "earlier_names",
    "kinship",
    "recipe",
    "ensemble",
    "propose",
    "seek",
    "files",
    "line",
    "compare",
    "strata",
    "budget",
}
GROUND_FLOOR |= {"pruning", "scoring", "gap", "tensors", "recipe_file"}


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
    subprocess.check_output([sys.executable, "-m", "hf_radin.cli", "soup", "--help"])
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name", hf_radin.__all__)
def test_every_public_name_is_there_twice_over(name):
    # the second look must not find a module of the same name
    for _ in range(2):
        assert callable(getattr(hf_radin, name)) and not isinstance(getattr(hf_radin, name), type(sys))
        assert getattr(hf_radin, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'soup_of_the_day'"):
        attrgetter("soup_of_the_day")(hf_radin)


def imports(module: Path) -> set[str]:
    """Modules of the package that a module imports when it runs; imports for types alone don't count."""
    tree = ast.parse(module.read_text())
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in typing and (node.module or "").startswith("hf_radin"):
            found |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
    return {name for name in found if (PACKAGE / f"{name}.py").exists()}


def test_imports_go_one_way():
    graph = {module.stem: imports(module) for module in PACKAGE.glob("*.py") if module.stem != "__init__"}
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph, f"these import each other in a circle: {graph}"


def test_the_ground_floor_stands_on_itself():
    for name in GROUND_FLOOR:
        assert imports(PACKAGE / f"{name}.py") <= GROUND_FLOOR


SCRIPTS = [
    path for folder in ("hf_radin", "examples", "benchmarks", "model_cards") for path in (ROOT / folder).glob("*.py")
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_parser_takes_shortened_options(script):
    """`--metric` is no `--metrics`: an option that is not there is refused, whatever others begin with it."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    for call in calls:
        if ast.unparse(call.func).split(".")[-1] in ("ArgumentParser", "HfArgumentParser"):
            exact = [ast.literal_eval(one.value) for one in call.keywords if one.arg == "allow_abbrev"]
            assert exact == [False], ast.unparse(call)
