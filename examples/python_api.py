"""The package from Python, one step after the other: `python python_api.py 'runs/ft-*' DATASET`."""

import sys

import hf_radin

models, dataset = sys.argv[1:3]

# Vetted from their small files; nothing large is downloaded yet.
ingredients = hf_radin.gather(models)

# Each ingredient runs once; logits are cached, so running this again costs nothing.
bank = hf_radin.compute_logits(ingredients, dataset, split="validation")

# The ensemble of any recipe is scored from the logits, without a forward pass.
n = len(ingredients)
print("estimate of the uniform soup:", bank.score([[1 / n] * n])[0])

# The best soup within a budget of eight passes, proved on a split that took no part in the choice.
soup = hf_radin.radin(bank, budget=8, test_split="test")
print(soup)
for row in soup.results:
    print(f"{row.split:12}{row.name:14}{row.metrics['accuracy']:.4f}")

# An ordinary transformers checkpoint, with recipe.json and a model card.
soup.save_pretrained("soup", overwrite=True)
# hf_radin.push_soup_to_hub(soup, "org/soup")
