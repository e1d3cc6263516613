"""A soup of models that are no checkpoints of transformers: five fine-tunes of a torch MLP, on scikit-learn's digits.

Beside their logits, hf_radin is given a function from a recipe to the logits of averaged weights.
"""

import torch
from sklearn.datasets import load_digits

import hf_radin

digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
torch.manual_seed(0)
start_part, tuning, validation, test = torch.randperm(len(images)).split([300, 500, 500, len(images) - 1300])


def make_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


def train(state: dict[str, torch.Tensor], part: torch.Tensor, rate: float, seed: int) -> dict[str, torch.Tensor]:
    """The state dict of a model that goes on from another one, on noisy copies of a part of the images."""
    torch.manual_seed(seed)
    model = make_model()
    model.load_state_dict(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(15):
        for batch in part[torch.randperm(len(part))].split(32):
            optimizer.zero_grad()
            logits = model(images[batch] + 0.3 * torch.randn(len(batch), 64))
            torch.nn.functional.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
    return model.state_dict()


@torch.no_grad()
def logits_of(state: dict[str, torch.Tensor], part: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(make_model(), state, (images[part],))


start = train(make_model().state_dict(), start_part, rate=1e-3, seed=0)
states = {f"mlp-{seed}": train(start, tuning[seed::2], rate=(1e-3, 3e-3)[seed % 2], seed=seed) for seed in range(1, 6)}


def bank_of(part: torch.Tensor, split: str) -> hf_radin.LogitBank:
    """The bank of a part of the images, which can also measure soups of the five."""

    def evaluate(recipe: hf_radin.Recipe) -> torch.Tensor:
        mixed = {key: sum(weight * states[name][key] for name, weight in recipe.used.items()) for key in start}
        return logits_of(mixed, part)

    logits, ids = {name: logits_of(state, part).numpy() for name, state in states.items()}, part.numpy()
    return hf_radin.LogitBank.from_arrays(logits, labels[part].numpy(), evaluate=evaluate, ids=ids, split=split)


soup = hf_radin.radin(bank_of(validation, "validation"), budget=4, test_split=bank_of(test, "test"))
for row in soup.results:
    print(f"{row.split:12}{row.name:14}{row.metrics['accuracy']:.4f}")
print(soup.recipe.to_json())
