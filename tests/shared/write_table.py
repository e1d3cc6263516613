"""Write docs/architectures.md: what each architecture shows on the whole road, here and now. `make architectures`."""

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from loopback_hub.loopback import LoopbackHub

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
COLUMNS = (
    "model type",
    "class",
    "parameters",
    "BatchNorm modules",
    "other names on disk",
    "weights",
    "logits",
    "batch",
    "outcome",
)
WHOLE_ROAD = "whole road"

HEAD = """# Architectures

Every class with which transformers classifies images (those of `AutoModelForImageClassification`), tested as a tiny
model with random weights. Three checkpoints near one start go the whole road: they are gathered, run on six images,
averaged, saved and loaded. Their uniform soup is pushed to a Hub on this machine, and pulled. `make architectures`
wrote this page with transformers {transformers}, torch {torch} and timm {timm};
`tests/checkpoints/test_model_architectures.py` checks the classes against it whenever the tests run. The table
has the largest of three kinds of differences. *weights*: of the saved soup from the average by hand in float64,
relative to the largest number in the tensor. *logits*: of the saved soup from a model set by hand. *batch*: of the
logits of six images together from those of each image alone, in float64.

The tests say of two of the checkpoints that they are multi-label, too: they are inspected, run, averaged, saved and
loaded, and the pipeline of transformers answers with the sigmoid of the soup's logits.
"""


def read_table() -> tuple[dict[str, str], list[dict[str, str]]]:
    """The versions that wrote the table, and its rows."""
    text = TABLE.read_text(encoding="utf-8")
    versions = dict(re.findall(r"\b(transformers|torch|timm)\s+(\d[\w.]*\w)", text))
    lines = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*", text, re.M)]
    return versions, [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def main() -> None:
    # Before the libraries are imported: they read the environment then.
    with LoopbackHub() as hub, TemporaryDirectory() as home:
        os.environ |= {**hub.environ(home), "OMP_NUM_THREADS": "1"}
        _write(Path(home))


def _write(folder: Path) -> None:
    import timm
    import torch
    import transformers

    from shared.architectures import EXCEPTIONS, INSTALLED
    from shared.whole_road import broken_laws, walk

    transformers.utils.logging.disable_progress_bar()
    rows = [COLUMNS, ["---", "---", *["---:"] * 6, "---"]]
    for architecture in INSTALLED:
        names = [f"`{architecture.model_type}`", f"`{architecture}`"]
        if architecture.model_type in EXCEPTIONS:
            rows.append([*names, *[""] * 6, EXCEPTIONS[architecture.model_type]])
            continue
        findings = walk(architecture, folder / str(architecture))
        counts = [f"{findings.parameters:,}", str(findings.batch_norms), "yes" if findings.keys_differ else "no"]
        differences = [_rounded(difference) for difference in (findings.average, findings.logits, findings.batch)]
        outcome = "; ".join(f"not so: {law}" for law in broken_laws(architecture, findings)) or WHOLE_ROAD
        rows.append([*names, *counts, *differences, outcome])
        print(*rows[-1], sep="  ", flush=True)
    head = HEAD.format(transformers=transformers.__version__, torch=torch.__version__, timm=timm.__version__)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join([head, *(f"| {' | '.join(row)} |" for row in rows), ""]), encoding="utf-8")


def _rounded(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


if __name__ == "__main__":
    main()
