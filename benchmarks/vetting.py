"""Bytes and seconds for vetting 72 checkpoints on a Hub, against downloading them.

    python benchmarks/vetting.py [--checkpoints 72] [--rounds 3]

The Hub is that of the tests, on this machine. Bytes are therefore exact, and the download is faster than over any
network. The checkpoints have the size of ViT-Ti/16, a thousand classes and random weights; they are never run. Each
round starts a process with empty caches, which gathers all checkpoints and then downloads them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from loopback_hub.loopback import LoopbackHub

CLIENT = """
import json, time
import hf_radin, torch, transformers.models.vit
from transformers import AutoImageProcessor, AutoModelForImageClassification
started = time.perf_counter()
ingredients = hf_radin.gather("org/ft-*")
vetted = time.perf_counter()
print(json.dumps({"checkpoints": len(ingredients), "vet": vetted - started}), flush=True)
input()
vetted = time.perf_counter()
for ingredient in ingredients:
    ingredient.download()
print(json.dumps({"download": time.perf_counter() - vetted}), flush=True)
"""


def make_checkpoints(hub: LoopbackHub, count: int) -> int:
    """Put them on the Hub; returns the bytes of one checkpoint."""
    config = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=1000)
    with tempfile.TemporaryDirectory() as folder:
        model = ViTForImageClassification(config)
        model.save_pretrained(folder)
        ViTImageProcessor().save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    weights = files["model.safetensors"]
    for number in range(count):
        files["model.safetensors"] = weights[:-8] + number.to_bytes(8, "little")  # the end of the last tensor
        files["README.md"] = f"---\nlicense: mit\n---\n# Fine-tune {number}\n".encode()
        hub.add_repo(f"org/ft-{number}", files)
    return sum(map(len, files.values()))


def run_round(hub: LoopbackHub, count: int) -> dict[str, float]:
    """One process with empty caches: bytes served and seconds of vetting and of downloading."""
    with tempfile.TemporaryDirectory() as home:
        before = len(hub.requests)
        environ = os.environ | hub.environ(Path(home)) | {"OMP_NUM_THREADS": "1"}
        client = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CLIENT],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        assert client.stdin and client.stdout
        vetted = json.loads(client.stdout.readline())
        assert vetted["checkpoints"] == count, vetted
        middle = len(hub.requests)
        client.stdin.write("\n")
        client.stdin.flush()
        downloaded = json.loads(client.stdout.readline())
        client.communicate()
    vetting, downloading = hub.requests[before:middle], hub.requests[middle:]
    return {
        "vet, seconds": vetted["vet"],
        "vet, bytes": sum(request.served for request in vetting),
        "vet, requests": len(vetting),
        "download, seconds": downloaded["download"],
        "download, bytes": sum(request.served for request in downloading),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--checkpoints", type=int, default=72)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    with LoopbackHub() as hub:
        size = make_checkpoints(hub, args.checkpoints)
        rounds = [run_round(hub, args.checkpoints) for _ in range(args.rounds)]
    median = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    print(f"{args.checkpoints} checkpoints of {size / 1e6:.1f} MB, medians of {args.rounds} rounds\n")
    print("| | bytes | bytes a checkpoint | seconds |\n|---|---:|---:|---:|")
    for what in ("vet", "download"):
        total = median[f"{what}, bytes"]
        seconds = median[f"{what}, seconds"]
        print(f"| {what} | {total / 1e6:,.1f} MB | {total / args.checkpoints / 1e3:,.1f} kB | {seconds:.1f} |")
    ratios = [figures["vet, bytes"] / figures["download, bytes"] for figures in rounds]
    slower = [figures["vet, seconds"] / figures["download, seconds"] for figures in rounds]
    print(
        f"\nvetting against downloading: {statistics.median(ratios):.4f} of the bytes, "
        f"{statistics.median(slower):.2f} of the seconds ({min(slower):.2f} to {max(slower):.2f}); "
        f"{median['vet, requests'] / args.checkpoints:.0f} requests a checkpoint"
    )


if __name__ == "__main__":
    main()
