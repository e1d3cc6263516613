"""One better image classifier from many fine-tunes, on any number of processes:

    accelerate launch examples/soup.py --models 'runs/ft-*' --dataset DATA --budget 8 --test-split test

Run each checkpoint once on a validation split and store its logits; score candidate recipes by their ensembles;
average and measure only as many as the budget allows; return the best (RADIN, arXiv 2401.17790). This is the command
`hf-radin soup` as a script for launchers; `examples/python_api.py` has the same steps from Python.
"""

import sys

from hf_radin.__main__ import run

if __name__ == "__main__":
    run(["soup", *sys.argv[1:]])
