"""Models that have modules in common give what each of them gives alone, and run these modules once."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from shared.models import calls_of, is_linear

from hf_radin.sharing.digests import TensorDigests
from hf_radin.sharing.memory import count_together, held_once, sizes_of
from hf_radin.sharing.replay import SharedModules

DEPTH = 6


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor]:
        return (torch.tanh(self.linear(hidden)) * scale,)


class Net(torch.nn.Module):
    """Layers in a list; between them the net does something of its own."""

    def __init__(self, between: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(DEPTH))
        self.classifier = torch.nn.Linear(8, 3)
        self.between = between

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = self.between(hidden, layer(hidden, scale=0.5)[0])
        return self.classifier(hidden)


def tuned(net: torch.nn.Module, seed: int, first: int) -> torch.nn.Module:
    """A fine-tune whose first layers, so many, are frozen."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(net)
    with torch.no_grad():
        for part in (*model.layers[first:], model.classifier):
            for parameter in part.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
    return model


def share(models: Sequence[torch.nn.Module]) -> SharedModules:
    digests = [TensorDigests.of(model) for model in models]
    return SharedModules([*held_once(models, digests)], digests)


def learn(shared: SharedModules, batch: torch.Tensor) -> bool:
    """Whether models that are shown a batch, and another one, share anything."""
    return shared.learn(lambda model: model(batch.clone()), lambda model: model(1 - batch))


def keep(hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return output


def new_tensor(hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return (output + hidden).flip(-1)


def change_output(hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return output.add_(1)


def change_input(hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return hidden.add_(output)


@pytest.fixture(params=[keep, new_tensor, change_output, change_input])
def models(request) -> list[torch.nn.Module]:
    """Five fine-tunes: 0 to 3 have four layers in common, of these 0 and 1 five; 4 has none with any."""
    torch.manual_seed(0)
    net = Net(request.param).eval()
    return [tuned(net, 1, 5), tuned(net, 2, 5), tuned(net, 3, 4), tuned(net, 4, 4), tuned(net, 5, 0)]


@torch.no_grad()
def test_a_tree_of_models_gives_what_each_gives_alone_and_runs_each_layer_once(models):
    images = [torch.randn(batch, 8) for batch in (2, 7, 7, 3)]
    # in a net that changes its input in place, the batch is another for each
    alone = [[model(batch.clone()) for model in models] for batch in images]
    shared = share(models)
    assert shared.may_save and learn(shared, images[0])
    for batch, expected in zip(images, alone, strict=True):
        with calls_of(is_linear) as calls:
            logits = shared.run(models, lambda model, batch=batch: model(batch.clone()))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(logits, expected, strict=True))
        layers = DEPTH + 1 + 2 + 2 + DEPTH  # all of 0, the last one of 1, the last two of 2 and of 3, all of 4
        assert len(calls) == layers + len(models)


@torch.no_grad()
@pytest.mark.parametrize("subset", [[1, 2], [2, 3], [3], [4, 0], [3, 1, 0]])
def test_any_of_the_models_in_any_order_give_what_they_give_alone(models, subset):
    batch = torch.randn(4, 8)
    alone = [models[place](batch.clone()) for place in subset]
    shared = share(models)
    learn(shared, batch)
    logits = shared.run([models[place] for place in subset], lambda model: model(batch.clone()))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(logits, alone, strict=True))


@torch.no_grad()
def test_models_with_nothing_in_common_are_left_alone():
    torch.manual_seed(0)
    net = Net(keep).eval()
    models = [tuned(net, seed, 0) for seed in range(3)]
    assert not share(models).may_save
    assert all("forward" not in vars(module) for model in models for module in model.modules())


@torch.no_grad()
def test_last_layers_in_common_save_nothing():
    torch.manual_seed(0)
    net = Net(keep).eval()
    models = [copy.deepcopy(net) for _ in range(3)]
    for model in models:
        torch.nn.init.normal_(model.layers[0].linear.weight)
    shared = share(models)
    assert shared.may_save and not learn(shared, torch.ones(2, 8))
    assert shared.names == set()
    assert all("forward" not in vars(module) for model in models for module in model.modules())


@torch.no_grad()
def test_what_was_recorded_of_a_batch_that_failed_is_forgotten(models):
    shared, batches = share(models), [torch.randn(3, 8), torch.randn(3, 8)]
    learn(shared, batches[0])

    def fail(model: torch.nn.Module) -> torch.Tensor:
        if model is models[2]:
            raise RuntimeError("out of memory")
        return model(batches[0].clone())

    with pytest.raises(RuntimeError, match="out of memory"):
        shared.run(models, fail)
    alone = [copy.deepcopy(model)(batches[1].clone()) for model in models]
    logits = shared.run(models, lambda model: model(batches[1].clone()))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(logits, alone, strict=True))


@torch.no_grad()
def test_options_of_a_call_count():
    torch.manual_seed(0)

    class Scaled(Net):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.layers[0](hidden, scale=float(self.classifier.bias[0] > 0))[0])

    net = Scaled(keep).eval()
    models = [tuned(net, seed, DEPTH) for seed in range(4)]
    for number, model in enumerate(models):
        model.classifier.bias[0] = number % 2 - 0.5
    batch = torch.randn(4, 8)
    alone = [model(batch) for model in models]
    shared = share(models)
    assert learn(shared, batch)
    with calls_of(is_linear) as calls:
        logits = shared.run(models, lambda model: model(batch))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(logits, alone, strict=True))
    assert len(calls) == 2 + 4


class Keeping(Layer):
    """A layer that keeps what it computed for whoever asks."""

    def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor]:
        self.kept = super().forward(hidden)[0]
        return (self.kept * scale,)


@torch.no_grad()
@pytest.mark.parametrize("ask", [lambda layer: layer.kept, lambda layer: layer.__dict__.pop("kept")])
def test_a_module_that_leaves_something_behind_for_others_runs_for_each(ask):
    class Asking(Net):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            output = self.layers[0](hidden)[0]
            return self.classifier(output + ask(self.layers[0]))

    torch.manual_seed(0)
    net = Asking(keep)
    net.layers[0] = Keeping()
    models, batch = [tuned(net, seed, DEPTH) for seed in range(3)], torch.randn(4, 8)
    alone = [model(batch) for model in models]
    shared = share(models)
    assert shared.may_save and not learn(shared, torch.randn(4, 8)) and shared.names == set()
    logits = shared.run(models, lambda model: model(batch))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(logits, alone, strict=True))
    assert all("forward" not in vars(module) for model in models for module in model.modules())


@torch.no_grad()
def test_what_a_module_gives_twice_are_two_tensors():
    class Twice(Net):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            first, second = (self.layers[0](hidden)[0] for _ in range(2))
            if len(hidden) == 1:  # as no batch did from which it was learnt what is changed in place
                first.add_(1)
            return self.classifier(first + second)

    torch.manual_seed(0)
    net = Twice(keep)
    models, batches = [tuned(net, seed, DEPTH) for seed in range(3)], [torch.randn(images, 8) for images in (3, 1)]
    expected = [[model(batch) for model in models] for batch in batches]
    shared = share(models)
    assert learn(shared, torch.randn(4, 8))
    for batch, alone in zip(batches, expected, strict=True):
        logits = shared.run(models, lambda model, batch=batch: model(batch))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(logits, alone, strict=True))


def test_tensors_in_common_are_held_once(models):
    values = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    alone = sum(sizes_of(models[0]).values())
    digests = [TensorDigests.of(model) for model in models]
    models = [*held_once(models, digests)]
    for model, before in zip(models, values, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    held = {tensor.data_ptr(): tensor.nbytes for model in models for tensor in model.parameters()}
    layer, head = sizes_of(Layer()), 4 * (8 * 3 + 3)
    layers = 5 + 1 + 1 + 2 + 2 + DEPTH  # in common, the last of 0 and of 1, the two of 2 and of 3, all of 4
    assert sum(held.values()) == layers * sum(layer.values()) + 5 * head
    assert count_together(digests, sizes_of(models[0]), room=sum(held.values())) == 5
    assert count_together(digests, sizes_of(models[0]), room=sum(held.values()) - 1) == 4
    assert count_together(digests, sizes_of(models[0]), room=0) == 1 and alone == DEPTH * sum(layer.values()) + head


@torch.no_grad()
def test_what_is_kept_for_models_to_come_is_counted_once():
    torch.manual_seed(0)
    net, batch = Net(keep).eval(), torch.randn(4, 8)
    models = [tuned(net, 1, 5), tuned(net, 2, 5), tuned(net, 3, 4)]
    shared = share(models)
    # the batch, and what five layers give: the output of one is the input of the next
    assert learn(shared, batch) and 5 * batch.nbytes < shared.held <= (6 + len(models) - 1) * batch.nbytes
    before = shared.held
    shared.run(models, lambda model: model(batch))
    assert shared.held == before
    shared.run(models, lambda model: model(torch.cat([batch, batch])))
    assert shared.held > before
    shared.forget()
    assert shared.held == 0 == len(shared.names)
    assert all("forward" not in vars(layer) for model in models for layer in model.layers)


def test_a_tensor_of_two_names_is_held_once_and_counted_once():
    tied = Net(keep)
    tied.layers[1].linear.weight = tied.layers[0].linear.weight
    models = [tied, copy.deepcopy(tied)]
    sizes = sizes_of(tied)
    assert sizes["layers.0.linear.weight"] and not sizes["layers.1.linear.weight"]
    models = [*held_once(models, [TensorDigests.of(model) for model in models])]
    weights = {model.layers[place].linear.weight for model in models for place in (0, 1)}
    assert len(weights) == 1
