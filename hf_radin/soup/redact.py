"""Names that not everybody may see: places on a machine, and private repositories; and reports without them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from hf_radin.ingredients.card_metadata import IngredientEntry
from hf_radin.logits.manifest import DataRecord
from hf_radin.runtime.hub_commit import hidden_repositories, is_repo_id
from hf_radin.soup.report import SearchReport

# A commit, a subfolder or more of an address that may follow the name of a repository.
_SUFFIX = r"(/[\w./-]*)?(@[\w./-]+)?(:[\w./-]+)?"


def without_paths(report: SearchReport) -> SearchReport:
    """A report with the last two folders of each absolute path.

    More says something of a machine and of who works there, and nothing of a model; where two paths would become the
    same, they keep more. A path that an ingredient's card names as its base model or dataset is left out.
    """
    processor = report.image_processor
    if _is_path(processor):
        processor = PurePath(str(processor)).name
    ingredients = tuple(_without_card_paths(entry) for entry in report.ingredients)
    start = report.pulled_to and _without_card_paths(report.pulled_to)
    report = replace(report, ingredients=ingredients, pulled_to=start, image_processor=processor)
    short = _short_paths(list(_names_in(report)))
    if not short:
        return report
    paths = "|".join(map(re.escape, sorted(short, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w.-])({paths})(?![\w-])")
    return _with_texts(report, lambda text: pattern.sub(lambda match: short[match[1]], text))


def private_names(report: SearchReport, token: str | bool | None = None) -> list[str]:
    """The repositories in a report that somebody who is not logged in does not find.

    Args:
        token: of somebody who may see more of them.

    Raises:
        ValueError: if the Hub can't be asked.
    """
    return hidden_repositories(set(_repositories(report)), token)


def without_names(report: SearchReport, names: Sequence[str]) -> SearchReport:
    """A report with others in place of these names: nobody can cook it, everybody can read it."""
    taken = {entry.id for entry in report.ingredients}
    free = (alias for number in range(1, 10**6) if (alias := f"private-{number}") not in taken)
    aliases = dict(zip(names, free, strict=False))
    lower = {name.lower(): alias for name, alias in aliases.items()}
    pattern = _pattern(names)
    renamed = _with_texts(report, lambda text: pattern.sub(lambda match: lower[match[1].lower()], text))
    entries = zip(renamed.ingredients, report.ingredients, strict=True)
    hidden = tuple(_without_repository(entry, original, aliases) for entry, original in entries)
    start = renamed.pulled_to
    if start and report.pulled_to:
        start = _without_repository(start, report.pulled_to, aliases)
    data = renamed.data
    if data is not None and report.data is not None and report.data.name in aliases:
        data = replace(data, revision=None)
    bank = None if str(report.bank or "").split("@")[0] in aliases else renamed.bank
    head = renamed.head
    if head and head.source and report.head and report.head.source and report.head.source.name in aliases:
        head = replace(head, source=replace(head.source, revision=None))
    return replace(renamed, ingredients=hidden, pulled_to=start, data=data, bank=bank, head=head)


def find_name(files: Mapping[str, Path | bytes], names: Sequence[str]) -> tuple[str, str] | None:
    """A file that holds one of these names, and which: written by hand, or because a configuration has it."""
    pattern = _pattern(names)
    for file, content in files.items():
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")
        if match := pattern.search(text):
            return file, match[1]
    return None


def _is_path(name: Any) -> bool:
    return isinstance(name, str) and PurePath(name).is_absolute()


def _without_card_paths(entry: IngredientEntry) -> IngredientEntry:
    """An entry without the paths that its card names."""
    base_model = None if _is_path(entry.base_model) else entry.base_model
    return replace(entry, base_model=base_model, dataset=None if _is_path(entry.dataset) else entry.dataset)


def _described(report: SearchReport) -> list[IngredientEntry]:
    """All checkpoints that a report describes."""
    return [*report.ingredients, *([report.pulled_to] if report.pulled_to else [])]


def _data(report: SearchReport) -> list[DataRecord]:
    """All images that a report names."""
    return [data for data in (report.data, report.head and report.head.source) if data]


def _names_in(report: SearchReport) -> Iterator[str]:
    """All names that may be paths."""
    if report.start:
        yield report.start
    for entry in _described(report):
        yield entry.id
        if entry.base:
            yield entry.base.id
        yield from entry.hyperparameters.values()
    yield from (data.name for data in _data(report))
    yield from (name for name, _ in report.remarks)


def _short_paths(names: Sequence[str]) -> dict[str, str]:
    """For each absolute path its last two folders, or as many as tell it from all other names."""
    folders = {name: PurePath(name).parts[1:] for name in names if _is_path(name)}
    others = {name for name in names if name not in folders}
    short = {path: parts[-2:] for path, parts in folders.items() if parts}
    for depth in range(3, max(map(len, folders.values()), default=0) + 1):
        counts = Counter(short.values())
        alike = [path for path, parts in short.items() if counts[parts] > 1 or "/".join(parts) in others]
        short |= {path: folders[path][-depth:] for path in alike}
    texts = {path: "/".join(parts) for path, parts in short.items()}
    return {path: f"./{text}" if text in others else text for path, text in texts.items()}


def _repositories(report: SearchReport) -> Iterator[tuple[str, str]]:
    """All repositories that a report names, with their types."""
    for name, kind in _named_repositories(report):
        if name and is_repo_id(name):
            yield name, kind
    for name, kind in _possible_repositories(report):
        if name and is_repo_id(name) and not Path(name).exists():  # else it is a folder here
            yield name, kind


def _named_repositories(report: SearchReport) -> Iterable[tuple[str | None, str]]:
    """Names that are known to be repositories."""
    for entry in _described(report):
        yield entry.repo_id, "model"
        yield entry.base_model_repo_id, "model"
        if entry.base:
            yield entry.base.repo_id, "model"
    yield from ((data.name, "dataset") for data in _data(report) if data.revision)
    yield str(report.bank or "").partition("@")[0], "dataset"


def _possible_repositories(report: SearchReport) -> Iterable[tuple[str | None, str]]:
    """Names that may be repositories or folders."""
    for entry in _described(report):
        yield entry.base_model, "model"
        yield entry.dataset, "dataset"
    if any(entry.repo_id for entry in report.ingredients):  # those that were left out may be on the Hub, too
        names = [name for name, _ in report.remarks]
        if report.start and report.start not in {entry.id for entry in report.ingredients}:
            names.append(report.start)
        yield from ((name.partition("@")[0].partition(":")[0], "model") for name in names)
    processor, at, _ = str(report.image_processor or "").partition("@")
    yield (processor if at else None), "model"  # a folder has no commit


def _without_repository(
    entry: IngredientEntry, original: IngredientEntry, aliases: Mapping[str, str]
) -> IngredientEntry:
    """An entry that was renamed, without what would lead to a hidden repository."""
    if original.repo_id in aliases:
        entry = replace(entry, repo_id=None, revision="hidden", subfolder=None, stamp=None)
    if entry.base and original.base and original.base.repo_id in aliases:
        entry = replace(entry, base=replace(entry.base, repo_id=None, revision="hidden"))
    return replace(
        entry,
        dataset=None if original.dataset in aliases else entry.dataset,
        base_model=None if original.base_model in aliases else entry.base_model,
        base_model_repo_id=None if original.base_model_repo_id in aliases else entry.base_model_repo_id,
    )


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Finds these repositories in a text, with what may follow them, and none whose name only begins so.

    In addresses and paths too; the Hub takes large letters for small ones.
    """
    longest = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<![\w.-])({'|'.join(map(re.escape, longest))})(?![\w-]|\.\w){_SUFFIX}", re.IGNORECASE)


def _with_texts(report: SearchReport, change: Callable[[str], str]) -> SearchReport:
    """A report with all its strings changed."""
    return SearchReport.from_fields(_changed(report.to_fields(), change))


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """JSON with all its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(entry, change) for entry in value]
    if isinstance(value, dict):
        return {change(name): _changed(entry, change) for name, entry in value.items()}
    return value
