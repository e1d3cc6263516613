"""What the search's budget buys: two zoos of fine-tunes of Fashion-MNIST, and the greedy soup to be reached.

    python benchmarks/budget.py --folder zoo

Zoo "alike": 32 ViTs of one start that differ in seed, augmentation and the quarter of the images that they saw;
there soups help. Zoo "spread": 16 ResNets with BatchNorm and learning rates spread over a factor of 30; there the best
single model is hard to beat. Both are made with `examples/finetune_sweep.py`. Each seed of the search draws its
candidates and samples anew. A pass is as many images through one model as the validation split has.
"""

import subprocess
import sys
from pathlib import Path

from zoo import fashion

ROOT = Path(__file__).parent.parent
VALIDATION = 10_000
TRAIN = 40_000

# name: architecture, how many fine-tunes, lowest and highest learning rate
ZOOS = {"alike": ("vit", 32, 5e-4, 5e-4), "spread": ("resnet", 16, 1e-4, 3e-3)}


def make_zoo(folder: Path, name: str, seed: int) -> Path:
    """The fine-tunes `ft-*` of a zoo; what is there already is not made again."""
    architecture, count, low, high = ZOOS[name]
    data = fashion.make_data(folder / "data", train=TRAIN, validation=VALIDATION)
    start = (fashion.Run("start", None, 1, epochs=8, images=10_000),)
    fashion.make(folder / f"start-{architecture}", data, start, architecture, seed)
    command = [ROOT / "examples" / "finetune_sweep.py", "--model", folder / f"start-{architecture}" / "start"]
    command += ["--dataset", data, "--output", folder / name, "--count", count, "--learning_rates", low, high]
    command += ["--epochs", 2, "--fraction", 0.25, "--seed", seed]
    subprocess.run([sys.executable, *map(str, command)], check=True)
    return folder / name
