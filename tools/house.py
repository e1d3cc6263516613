"""What the code looks like from above, in numbers: `python tools/house.py [CHECKOUT ...]`, one column a checkout."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# Names that say nothing of what they hold.
VAGUE = {"one", "some", "found", "told", "said", "kept", "these", "there", "asked", "rest", "own", "more"}

# Lines of a function without its docstring.
LONG = 60

# Parameters of a function that is not public.
MANY = 8

PATCHES = ("setattr", "setitem", "delattr", "delitem")


@dataclass(frozen=True)
class Module:
    """A module of the package.

    Args:
        path: of its file.
        name: inside the package, as in `logits.bank`; of a room's `__init__`, the room.
    """

    path: Path
    name: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @property
    def room(self) -> str:
        """The first part of its name."""
        return self.name.partition(".")[0]

    @cached_property
    def typing_nodes(self) -> set[ast.AST]:
        """What stands under `if TYPE_CHECKING`."""
        blocks = [
            node
            for node in ast.walk(self.tree)
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        ]
        return {inner for block in blocks for inner in ast.walk(block)}

    def imports(self, names: set[str]) -> Iterator[tuple[str, bool]]:
        """The package's modules that it imports when it runs, and whether a function does so.

        Args:
            names: of all modules.
        """
        top = set(self.tree.body)
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.ImportFrom) or node in self.typing_nodes:
                continue
            parts = (node.module or "").split(".")
            if parts[0] != "hf_radin":
                continue
            base = ".".join(parts[1:])
            targets = {f"{base}.{alias.name}".strip(".") for alias in node.names} & names or {base} & names
            for target in targets:
                yield target, node not in top


def read_modules(package: Path) -> list[Module]:
    """All modules below a package's folder."""
    modules = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            modules.append(Module(path, name))
    return modules


def import_graph(modules: list[Module]) -> dict[str, set[str]]:
    """Whom each module imports when it runs."""
    names = {module.name for module in modules}
    return {module.name: {target for target, _ in module.imports(names)} - {module.name} for module in modules}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in graph[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            place = stack.index(name)
            group, stack[place:] = stack[place:], []
            if len(group) > 1:
                groups.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return groups


def count_levels(graph: dict[str, set[str]]) -> int:
    """The length of the longest chain of imports; modules of a circle count once."""
    group_of = {name: names[0] for names in circles(graph) for name in names}
    joined: dict[str, set[str]] = {}
    for name, targets in graph.items():
        group = group_of.get(name, name)
        joined.setdefault(group, set()).update({group_of.get(target, target) for target in targets} - {group})
    depths: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in depths:
            depths[name] = 1 + max((depth(target) for target in joined[name]), default=0)
        return depths[name]

    return max(map(depth, joined), default=0)


def long_functions(modules: list[Module]) -> list[tuple[str, int]]:
    """Functions that are too long, with their lines but those of the docstring."""
    lengths = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
                if lines > LONG:
                    lengths.append((f"{module.name}.{node.name}", lines))
    return sorted(lengths, key=lambda pair: -pair[1])


def crowded_functions(modules: list[Module], public: set[str]) -> list[tuple[str, int]]:
    """Functions with too many parameters that no user calls."""
    crowded = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in public:
                names = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
                count = len([name for name in names if name not in ("self", "cls")])
                if count > MANY:
                    crowded.append((f"{module.name}.{node.name}", count))
    return crowded


def string_lookups(modules: list[Module]) -> dict[str, int]:
    """How often each module looks a value up by a string: `fields["name"]` and `fields.get("name")`."""
    counts = {}
    for module in modules:
        count = 0
        for node in ast.walk(module.tree):
            if node in module.typing_nodes:
                continue
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and _is_text(node.slice):
                count += 1
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                count += bool(node.args) and _is_text(node.args[0])
        counts[module.name] = count
    return counts


def vague_names(modules: list[Module]) -> dict[str, int]:
    """How often each module binds a name that says nothing."""
    counts = {}
    for module in modules:
        count = 0
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                count += node.id in VAGUE
            elif isinstance(node, ast.arg):
                count += node.arg in VAGUE
        counts[module.name] = count
    return counts


def count_patches(tests: Path) -> tuple[int, int]:
    """How often tests replace something, and how often that is a private name."""
    total = private = 0
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in PATCHES and getattr(node.func.value, "id", "") in ("monkeypatch", "patch"):
                total += 1
                texts = [part.value for part in node.args[:2] if isinstance(part, ast.Constant)]
                private += any(str(text).rpartition(".")[2].startswith("_") for text in texts)
    return total, private


def count_tests(tests: Path) -> int:
    """How many test functions there are."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in tests.rglob("test_*.py"))
    functions = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return sum(function.name.startswith("test_") for function in functions)


def public_names(package: Path) -> set[str]:
    """What users call: the functions in `hf_radin.__all__`, and methods of the same names."""
    for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)}
    return set()


def describe(checkout: Path) -> dict[str, int]:
    """The figures of a checkout, by what they are called."""
    package, tests = checkout / "hf_radin", checkout / "tests"
    modules = read_modules(package)
    files = [module for module in modules if module.path.name not in ("__init__.py", "__main__.py")]
    names = {module.name for module in modules}
    graph = import_graph(modules)
    patches, private = count_patches(tests)
    rooms = [path for path in package.iterdir() if (path / "__init__.py").is_file()]
    return {
        "modules": len(files),
        "rooms": len(rooms),
        "files in the largest room": max((len([*room.glob("*.py")]) for room in rooms), default=0),
        "modules on top": len([*package.glob("*.py")]) - 1,
        "levels of imports": count_levels(graph),
        "circles": len(circles(graph)),
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.py")),
        f"functions over {LONG} lines": len(long_functions(modules)),
        f"functions with over {MANY} parameters": len(crowded_functions(modules, public_names(package))),
        "lookups by string": sum(string_lookups(modules).values()),
        "imports in functions": sum(inner for module in modules for _, inner in module.imports(names)),
        "vague names": sum(vague_names(modules).values()),
        "vague names in tests": sum(vague_names([Module(path, str(path)) for path in tests.rglob("*.py")]).values()),
        "patches in tests": patches,
        "patches of private names": private,
        "test functions": count_tests(tests),
        "lines of tests": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in tests.rglob("*.py")),
    }


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def main() -> None:
    """Print a row a figure, a column a checkout."""
    checkouts = [Path(name) for name in sys.argv[1:]] or [Path(__file__).resolve().parent.parent]
    columns = [describe(checkout) for checkout in checkouts]
    width = max(map(len, columns[0]))
    for title in columns[0]:
        print(f"{title:{width}}" + "".join(f"{column[title]:10,}" for column in columns))
    if len(columns) == 1:
        modules = read_modules(checkouts[0] / "hf_radin")
        for title, length in long_functions(modules):
            print(f"  long: {title} {length}")
        for title, count in crowded_functions(modules, public_names(checkouts[0] / "hf_radin")):
            print(f"  crowded: {title} {count}")
        for title, counts in (("lookups", string_lookups(modules)), ("vague", vague_names(modules))):
            top = sorted(counts.items(), key=lambda pair: -pair[1])[:25]
            print(f"  {title}: {', '.join(f'{name} {count}' for name, count in top if count)}")
        print("  circles:", circles(import_graph(modules)))


if __name__ == "__main__":
    main()
