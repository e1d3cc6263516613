"""The house as CONTRIBUTING.md describes it: what `tools/house.py` counts stays within its limits."""

import re
from pathlib import Path

import hf_radin
from tools import draw_rooms, house

PACKAGE = Path(hf_radin.__file__).parent
ROOT = PACKAGE.parent
TESTS = ROOT / "tests"
MODULES = house.read_modules(PACKAGE)

# Room by room, what may stand in `tests` beside the rooms.
SHARED = {"loopback_hub", "shared", "torture"}


def test_functions_are_short_and_have_few_parameters():
    assert house.long_functions(MODULES) == []
    assert house.crowded_functions(MODULES, house.public_names(PACKAGE)) == []


def test_functions_import_nothing_of_the_package():
    names = {module.name for module in MODULES}
    assert not [module.name for module in MODULES for _, is_inner in module.imports(names) if is_inner]


def test_names_say_what_they_hold():
    folders = (TESTS, ROOT / "tools", ROOT / "examples", ROOT / "benchmarks", ROOT / "model_cards")
    scripts = [house.Module(path, str(path.relative_to(ROOT))) for folder in folders for path in folder.rglob("*.py")]
    assert len(scripts) > 80
    assert not {name: count for name, count in house.vague_names(MODULES + scripts).items() if count}


def test_what_travels_is_no_dictionary():
    assert sum(house.string_lookups(MODULES).values()) < 120


def test_tests_replace_little_and_nothing_private():
    patches, private = house.count_patches(TESTS)
    assert patches < 30 and private == 0


def test_tests_mirror_the_rooms():
    folders = {path for path in TESTS.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    rooms = {path for path in folders if path.name not in SHARED}
    assert {path.name for path in rooms} <= {module.room for module in MODULES}
    for room in rooms:
        modules = {path.stem for path in (PACKAGE / room.name).glob("*.py")}
        for path in room.glob("*.py"):
            name = path.stem.removeprefix("test_")
            assert path.stem == "__init__" or any(name == stem or name.startswith(f"{stem}_") for stem in modules)


def test_the_picture_of_the_rooms_is_that_of_the_imports():
    assert draw_rooms.PICTURE.read_text() == draw_rooms.draw(PACKAGE)


def test_the_glossary_is_short():
    words = (ROOT / "CONTRIBUTING.md").read_text().partition("## Words")[2].partition("\n## ")[0]
    assert 10 < len(re.findall(r"^\| (?!word|---)", words, re.MULTILINE)) <= 30


def test_the_two_roads_are_made_of_functions_that_are_there():
    """Each step of CONTRIBUTING.md names a module and functions of it, and no room comes back on a road."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Two roads")[2].partition("\n## ")[0]
    for road in text.split("\n**")[1:]:
        steps = re.findall(r"^- (.*)$", road, re.MULTILINE)
        places = re.findall(r"`(\w+)/(\w+): ", road)
        assert len(steps) >= 8 and len(places) >= len(steps)
        rooms = [room for at, (room, _) in enumerate(places) if at == 0 or places[at - 1][0] != room]
        assert len(rooms) == len({*rooms}), rooms
        for step in steps:
            for room, module, name in re.findall(r"`(\w+)/(\w+): (\w+)", step):
                source = (PACKAGE / room / f"{module}.py").read_text()
                assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), (room, module, name)
