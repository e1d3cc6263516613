"""A script that `launch` runs: a bank in blocks of 32 images, which users don't have."""

import sys

import hf_radin
from hf_radin.images.split import DataSource
from hf_radin.logits.compute import make_bank
from hf_radin.logits.manifest import RunOptions
from hf_radin.runtime.processes import Processes

if __name__ == "__main__":
    models, data, _, cache = sys.argv[1:]
    options = RunOptions(cache_dir=cache, block_size=32)
    make_bank(hf_radin.gather(models), DataSource(data), options, Processes())
