"""The campaign: `python -m torture [--promise NAME ...] [--attempts N] [--number N] [--seed S] [--minutes M]`."""

import os
import tempfile

# Read when the libraries are imported: no attempt may touch the user's caches, and tiny models want one thread.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_radin-torture-home-")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"  # attempts that need a Hub have one of their own
os.environ["HF_RADIN_SILENCE"] = "8"  # seconds after which a process counts as stopped; nobody waits for five minutes
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import shutil
import sys
import time
from pathlib import Path

from torture import world
from torture.campaign import PROMISES, Campaign, table


def main() -> int:
    """Run the campaign and print what came of it; 1 if a promise did not hold, or was tried too seldom."""
    options = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    add = options.add_argument
    add("--promise", nargs="+", choices=[promise.name for promise in PROMISES], help="by default all")
    add("--attempts", type=int, help="at each promise (default: what the table of the campaign wants)")
    add("--short", action="store_true", help="a few attempts at each promise, for the tests")
    add("--number", type=int, help="make this attempt alone, of one promise")
    add("--seed", type=int, default=0)
    add("--minutes", type=float, default=30.0, help="begin no attempt later than that")
    add("--jobs", type=int, default=2, help="attempts at a time")
    add("--keep", action="store_true", help="leave the folder where everything was, and say where it is")
    args = options.parse_args()
    began = time.monotonic()
    memory = Path("/dev/shm")  # thousands of small files are forced to the disk
    place = memory if os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="hf_radin-torture-", dir=place))
    try:
        promises = [promise for promise in PROMISES if not args.promise or promise.name in args.promise]
        shared_world = world.make(folder)
        print(f"Made what all attempts share in {time.monotonic() - began:.0f} s.", flush=True)
        campaign = Campaign(shared_world, promises, args.seed, args.jobs, began + 60 * args.minutes)
        wanted = {
            promise.name: args.attempts or (promise.few if args.short else promise.least) for promise in promises
        }
        tries = campaign.run(wanted, args.number)
        print(table(promises, tries, time.monotonic() - began))
        enough = args.number is not None or all(
            sum(attempt.promise == name for attempt in tries) >= count for name, count in wanted.items()
        )
        return 0 if enough and all(attempt.is_held for attempt in tries) else 1
    finally:
        if args.keep:
            print(f"Everything is in {folder}.")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
