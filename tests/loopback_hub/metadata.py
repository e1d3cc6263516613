"""What the Hub finds wrong with the metadata at the head of a card."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "other", "unknown"}
RELATIONS = {"adapter", "finetune", "merge", "quantized"}


def problems(content: str) -> list[str]:
    """The reasons why a card is refused; empty if it isn't."""
    if not content.startswith("---"):
        return []
    if "\n---" not in content:
        return ["The metadata block is not closed"]
    try:
        data = yaml.safe_load(content[3:].split("\n---", 1)[0])
    except yaml.YAMLError as error:
        return [f"not YAML: {' '.join(str(error).split())}"]
    if data is None:
        return []
    if not isinstance(data, dict):
        return ["the metadata are no mapping"]
    return [*_of_fields(data), *_of_results(data.get("model-index"))]


def _of_fields(data: dict[str, Any]) -> Iterator[str]:
    license = data.get("license")
    if license is not None and not {*_listed(license)} <= LICENSES:
        yield f'"license" must be one of {sorted(LICENSES)}'
    for name in ("base_model", "datasets"):
        if not all(isinstance(repo_id, str) and ID.fullmatch(repo_id) for repo_id in _listed(data.get(name))):
            yield f'"{name}" with value {data[name]!r} is not valid: use ids of repositories'
    for name in ("tags", "metrics"):
        if not all(isinstance(text, str) and text for text in _listed(data.get(name))):
            yield f'"{name}" must be strings'
    if data.get("base_model_relation", "merge") not in RELATIONS:
        yield f'"base_model_relation" must be one of {sorted(RELATIONS)}'


def _of_results(index: Any) -> Iterator[str]:
    for model in _listed(index):
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not model.get("results"):
            yield '"model-index" needs a name and results'
            continue
        for result in model["results"]:
            dataset = result.get("dataset") or {}
            names = ((result.get("task") or {}).get("type"), dataset.get("type"), dataset.get("name"))
            if not all(isinstance(name, str) and name for name in names) or not result.get("metrics"):
                yield '"model-index[0].results" need a task.type, a dataset.type, a dataset.name and metrics'
            elif not all(isinstance(metric.get("type"), str) and "value" in metric for metric in result["metrics"]):
                yield '"model-index[0].results[0].metrics" need a type and a value'


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
