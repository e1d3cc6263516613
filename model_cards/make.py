"""Make the cards in this folder again, by the runs that they describe.

    python model_cards/make.py --folder zoos            # all three; the zoos of Fashion-MNIST take half an hour
    python model_cards/make.py digits --folder zoos

`digits`: 16 ViTs of examples/digits.py. `fashion-mnist-resnets` and `fashion-mnist-vits`: the zoos of
benchmarks/budget.py; the first with BatchNorm and a pilot, the second of models with widely spread learning rates.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # before the other, which has a digits.py, too
import budget
import digits

import hf_radin
from hf_radin.soup.card import card_files
from hf_radin.soup.report import SearchReport

HERE = Path(__file__).parent


def of_digits(folder: Path) -> hf_radin.Soup:
    data = digits.make_dataset(folder / "digits" / "scikit-learn-digits")
    start = digits.make_start(folder / "digits" / "start", data)
    digits.make_fine_tunes(start, data, folder / "digits" / "runs", count=16)
    return search(f"{folder}/digits/runs/ft-*", data, folder)


def of_resnets(folder: Path) -> hf_radin.Soup:
    runs = budget.make_zoo(folder, "alike", seed=0)
    return search(f"{runs}/ft-*", folder / "fashion-mnist", folder, pilot=0.1)


def of_vits(folder: Path) -> hf_radin.Soup:
    runs = budget.make_zoo(folder, "spread", seed=0)
    return search(f"{runs}/ft-*", folder / "fashion-mnist", folder)


def search(models: str, data: Path, folder: Path, *, pilot: float | None = None) -> hf_radin.Soup:
    bank = hf_radin.compute_logits(hf_radin.gather(models), str(data), pilot=pilot, cache_dir=folder / "cache")
    return hf_radin.radin(bank, budget=8, test_split="test")


RUNS = {"digits": of_digits, "fashion-mnist-resnets": of_resnets, "fashion-mnist-vits": of_vits}


def make(name: str, folder: Path, output: Path) -> None:
    """Write one card and its pictures."""
    output.mkdir(parents=True, exist_ok=True)
    report = SearchReport.from_fields(RUNS[name](folder).to_dict())
    for file, content in card_files(report).items():
        (output / file).write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}; all by default")
    parser.add_argument("--folder", type=Path, help="where models are made, and found again")
    args = parser.parse_args()
    if unknown := set(args.names) - RUNS.keys():
        parser.error(f"there is no card {unknown.pop()!r}, but {', '.join(RUNS)}")
    logging.basicConfig(format="%(message)s")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        for name in args.names or RUNS:
            make(name, folder, HERE / name)


if __name__ == "__main__":
    main()
