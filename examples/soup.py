"""One better image classifier from many fine-tunes, on any number of processes:

    accelerate launch examples/soup.py --models 'runs/ft-*' --dataset DATA --budget 8 --test-split test

Run each checkpoint once on a validation split and keep its logits; score candidate recipes by their ensembles; really
average and measure only as many as the budget allows; keep the best (RADIN, arXiv 2401.17790).
"""

import argparse
import sys

import hf_radin
from hf_radin.cli import main as cli
from hf_radin.cli import options, tables


def main(args: argparse.Namespace) -> None:
    options.check(args)
    options.ready_to_push(args)

    # The ingredients: fine-tunes of one start, vetted from their small files.
    ingredients = hf_radin.gather(args.models, **options.model_options(args))
    search, data = options.search_options(args, ingredients), options.data_options(args, ingredients)
    options.tell_private(args, ingredients, data["dataset"])

    # Stage 1: every ingredient runs once on the split that chooses. Without --dataset, their cards say which.
    bank = hf_radin.compute_logits(ingredients, **data)

    # Stage 2: rank the candidates by their ensembles, measure the best, return the best measured.
    soup = getattr(hf_radin, args.method)(bank, **search)
    tables.say(tables.table(soup))

    # An ordinary checkpoint, with the recipe and a card.
    soup.save_pretrained(args.output, overwrite=args.overwrite, license=args.license)
    if args.push_to:
        hf_radin.push_soup_to_hub(soup, args.push_to, **options.push_options(args))


if __name__ == "__main__":
    parser = options.Parser(description="Find the best soup of some checkpoints.", parents=[options.soup_options()])
    sys.exit(cli.guarded(main, parser.parse_args()))
