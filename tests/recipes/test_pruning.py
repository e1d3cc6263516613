"""What is pruned and scored fast predicts what the dense computation does, image by image, ties and all."""

import numpy as np
import pytest

from hf_radin.recipes import ensemble, pruning, scoring
from hf_radin.recipes.pruning import prune


def recipes_of_all_kinds(models: int, count: int, seed: int = 0) -> np.ndarray:
    """Vertices, edges, equal parts of subsets, sparse and dense recipes: `(recipes, models)`."""
    generator = np.random.default_rng(seed)
    part = count // 4
    edges = np.zeros((part, models))
    for row in edges:
        start, end = generator.choice(models, 2) if models > 1 else (0, 0)
        share = generator.choice([0.5, 0.25, 1 / 3, generator.random(), 1e-9, 1e-300])
        row[start] += share
        row[end] += 1 - share
    members = generator.random((part, models)) < 0.5
    members[~members.any(axis=1), 0] = True
    sparse = generator.dirichlet(np.full(models, 0.1), size=part)
    dense = generator.dirichlet(np.ones(models), size=count - 3 * part)
    equal = members / members.sum(axis=1, keepdims=True)
    return np.abs(np.concatenate([np.eye(models), edges, equal, sparse, dense])[:count])


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def related(models: int, samples: int, classes: int, noise: float = 0.3) -> np.ndarray:
    """Logits of models that agree but for some noise."""
    return 3 * normal(0, samples, classes) + noise * normal(1, models, samples, classes)


def one_step_apart() -> np.ndarray:
    """Classes that differ by one unit in the last place, in some models one way, in some the other."""
    base = related(5, 300, 1, noise=0.01).astype(np.float32)
    steps = np.random.default_rng(2).integers(-1, 2, size=(5, 300, 6))
    return np.where(steps > 0, np.nextafter(base, np.float32(9)), np.where(steps < 0, np.nextafter(base, -9), base))


def equal_columns() -> np.ndarray:
    return related(4, 300, 8)[:, :, [3, 1, 0, 3, 1, 3, 2, 0]]


def signed_zeros() -> np.ndarray:
    zeros = np.random.default_rng(3).choice([0.0, -0.0], size=(4, 300, 5))
    return np.where(normal(4, 1, 300, 5) > 1, -(normal(5, 4, 300, 5) ** 2), zeros)


BANKS = {
    "related": related(6, 300, 20),
    "unrelated": normal(6, 6, 300, 12),  # hardly any image is decided
    "agreeing": related(6, 300, 20, noise=0.0),  # all are
    "integers": np.random.default_rng(7).integers(-2, 3, size=(5, 300, 9)),
    "few integers": np.random.default_rng(8).integers(0, 2, size=(3, 300, 5)),
    "equal columns": equal_columns(),
    "all equal": np.ones((3, 50, 5)),
    "one step apart": one_step_apart(),
    "signed zeros": signed_zeros(),
    "one class": normal(9, 4, 40, 1),
    "two classes": normal(10, 4, 300, 2),
    "one model": np.random.default_rng(11).integers(0, 4, size=(1, 300, 6)),
    "one sample": normal(12, 6, 1, 9),
    "no sample": np.zeros((3, 0, 5)),
    "shifted": related(5, 300, 12) + 1000 * normal(13, 5, 1, 1),  # what models add to all classes
    "huge": 3e4 * np.sign(normal(14, 4, 300, 6)) * (1 + np.abs(normal(15, 4, 300, 6)).clip(0, 1)),
    "tiny": 1e-7 * normal(16, 4, 300, 6),
    "cancelling": np.concatenate([related(1, 300, 6), -related(1, 300, 6), related(1, 300, 6, 1e-6)]),
}


@pytest.fixture(params=BANKS)
def name(request):
    return request.param


@pytest.fixture(params=["float16", "float32"])
def logits(name, request) -> np.ndarray:
    return BANKS[name].astype(request.param)


def dense(logits: np.ndarray, recipes: np.ndarray) -> np.ndarray:
    """Predictions `(recipes, samples)`, written out: the argmax of sums in float64, model after model."""
    mixed = np.zeros((len(recipes), *logits.shape[1:]))
    for weights, values in zip(recipes.T, logits, strict=True):
        mixed += weights[:, None, None] * values.astype(np.float64)
    return mixed.argmax(axis=-1)


def test_predictions_equal_the_dense_ones_image_by_image(logits):
    recipes = recipes_of_all_kinds(len(logits), 2000)
    expected = dense(logits, recipes)
    assert (scoring.predict(prune(logits), recipes) == expected).all()
    for rows, samples, predictions in ensemble.mixed_predictions(logits, recipes):
        assert (predictions == expected[rows, samples]).all()


def test_hits_are_those_of_the_predictions(logits):
    recipes = recipes_of_all_kinds(len(logits), 500)
    labels = np.random.default_rng(1).integers(0, logits.shape[2], size=logits.shape[1])
    expected = (dense(logits, recipes) == labels).sum(axis=1)
    assert (scoring.count_hits(prune(logits), labels, recipes) == expected).all()
    assert (ensemble.count_hits(logits, labels, recipes) == expected).all()


@pytest.mark.parametrize("top", [2, 5])
def test_the_best_few_are_the_dense_ones(logits, top):
    recipes = recipes_of_all_kinds(len(logits), 200)
    labels = np.random.default_rng(1).integers(0, logits.shape[2], size=logits.shape[1])
    mixed = np.zeros((len(recipes), *logits.shape[1:]))
    for weights, values in zip(recipes.T, logits, strict=True):
        mixed += weights[:, None, None] * values.astype(np.float64)
    best = np.argsort(-mixed, axis=-1, kind="stable")[..., :top]  # the lower class of equals goes first
    expected = (best == labels[:, None]).any(axis=-1).sum(axis=1)
    assert (scoring.count_hits(prune(logits, top=top), labels, recipes) == expected).all()


@pytest.mark.parametrize("top", [1, 5])
def test_what_is_dropped_is_beaten_and_what_is_left_is_not(logits, top):
    """Against all pairs, written out."""
    pruned = prune(logits, top=top)
    samples, classes = logits.shape[1:]
    left = np.zeros((samples, classes), dtype=bool)
    for bucket in pruned.buckets():
        left[bucket.images, bucket.classes] = True
        assert (np.diff(bucket.classes, axis=0) > 0).all()
        if len(bucket.logits):
            assert (bucket.logits == logits[:, bucket.images, bucket.classes]).all()
    strong, weak = logits[:, :, :, None], logits[:, :, None, :]
    lower = np.tri(classes, k=-1, dtype=bool).T  # the class that beats is the lower one
    beats = np.where(lower, (strong >= weak).all(axis=0), (strong > weak).all(axis=0)) & ~np.eye(classes, dtype=bool)
    assert (left == (beats.sum(axis=1) < top)).all()
    assert (pruned.decided == np.flatnonzero(left.sum(axis=1) <= top)).all()


@pytest.mark.parametrize("at_once", [1, 100, 5000])
@pytest.mark.parametrize("kind", ["related", "integers", "unrelated"])
def test_any_block_size_and_any_number_of_threads_gives_the_same(kind, at_once):
    logits = BANKS[kind].astype(np.float16)
    recipes = recipes_of_all_kinds(len(logits), 60)
    labels = np.random.default_rng(1).integers(0, logits.shape[2], size=logits.shape[1])
    expected, whole = dense(logits, recipes), prune(logits)
    for threads in (1, 3):
        counts = []
        pruned = prune(logits, threads=threads, on_block=counts.append, read_at_once=at_once)
        assert all((getattr(pruned, name) == getattr(whole, name)).all() for name in pruning.ARRAYS)
        assert sum(counts) == logits.shape[1]
    assert (scoring.predict(pruned, recipes, mixed_at_once=at_once) == expected).all()
    hits = scoring.count_hits(pruned, labels, recipes, mixed_at_once=at_once)
    assert (hits == (expected == labels).sum(axis=1)).all()


def test_to_compare_with_fewer_classes_is_as_right():
    logits = BANKS["unrelated"].astype(np.float32)
    whole = prune(logits)
    partly = prune(logits, rounds=1)
    assert len(partly.classes) > len(whole.classes)
    recipes = recipes_of_all_kinds(len(logits), 100)
    assert (scoring.predict(partly, recipes) == dense(logits, recipes)).all()


def test_what_is_close_beyond_float32_is_told_apart():
    """In float32 the two classes' mixed logits are equal, or in the wrong order, for most of these recipes."""
    logits = np.ones((3, 2000, 2), dtype=np.float32)
    logits[..., 1] += np.random.default_rng(0).integers(-2, 3, size=(3, 2000)) * np.float32(2**-23)
    recipes = recipes_of_all_kinds(3, 200)
    expected = dense(logits, recipes)
    single = np.einsum("rm,msc->rsc", recipes.astype(np.float32), logits).argmax(axis=-1)
    assert (single != expected).mean() > 0.05
    assert (scoring.predict(prune(logits), recipes) == expected).all()


def test_logits_as_stored_give_the_same(tmp_path):
    for dtype in (np.float16, np.float32):
        stored = []
        for model, logits in enumerate(BANKS["related"].astype(dtype)):
            np.save(tmp_path / f"{model}.npy", logits)
            stored.append(ensemble.Stored.of(np.load(tmp_path / f"{model}.npy", mmap_mode="r")))
        pruned, expected = prune(stored, threads=2), prune(BANKS["related"].astype(dtype))
        assert all((getattr(pruned, name) == getattr(expected, name)).all() for name in pruning.ARRAYS)
        assert pruned.logits.dtype == dtype


def test_a_file_that_is_cut_short_is_named(tmp_path):
    np.save(tmp_path / "one.npy", np.ones((100, 10), dtype=np.float32))
    stored = ensemble.Stored.of(np.load(tmp_path / "one.npy", mmap_mode="r"))
    with (tmp_path / "one.npy").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(OSError, match=r"one\.npy ends before sample 99 of 100"):
        prune([stored])


def test_what_is_no_logit_is_refused():
    with pytest.raises(ValueError, match="got float64"):
        prune(np.ones((2, 3, 4)))
    with pytest.raises(ValueError, match="got float16, float32"):
        prune([np.ones((3, 4), dtype) for dtype in (np.float16, np.float32)])
    for value in (np.nan, np.inf):
        spoilt = BANKS["related"].astype(np.float16)
        spoilt[2, 17, 5] = value
        with pytest.raises(ValueError, match=f"Model 2 has the logit {value} for class 5"):
            prune(spoilt)


def test_what_is_cached_is_read_again_and_made_anew_where_it_must(tmp_path, caplog):
    path, made = tmp_path / "pruned" / "one.npz", []

    def load(subject: str = "these logits") -> pruning.Pruned:
        def make() -> pruning.Pruned:
            made.append(subject)
            return prune(BANKS["related"].astype(np.float16))

        return pruning.load_or_make(path, subject, make, top=1)

    first, again = load(), load()
    assert len(made) == 1 and again.top == first.top == 1
    for name in pruning.ARRAYS:
        written, read = getattr(first, name), getattr(again, name)
        assert (written == read).all() and written.dtype == read.dtype
    load("other logits")
    assert made[1:] == ["other logits"] and f"{path} can't be read: its seal does not fit" in caplog.text
    load()
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "classes": arrays["classes"][::-1]})
    exchanged = path.read_bytes()
    spoilt = [b"", b"no archive", whole[:500], whole[: len(whole) // 2], whole[:3000] + b"?" + whole[3001:], exchanged]
    for broken in spoilt:
        path.write_bytes(broken)
        count = len(made)
        caplog.clear()
        assert (load().logits == first.logits).all()
        assert len(made) == count + 1 and len(caplog.messages) == 1
    assert path.read_bytes() == whole and not list(path.parent.glob(".*"))


def test_a_folder_that_can_not_be_written_to_costs_only_time(tmp_path, caplog):
    (tmp_path / "pruned").write_text("a file where the folder should be")
    path = tmp_path / "pruned" / "one.npz"
    logits = BANKS["related"].astype(np.float16)
    pruned = pruning.load_or_make(path, "", lambda: prune(logits), top=1)
    assert len(pruned.images) == 300 and "can't be cached" in caplog.text


@pytest.mark.parametrize("top", [1, 2])
def test_what_is_left_of_parts_is_put_together_to_what_is_left_of_all(top):
    logits = list(related(4, 300, 7).astype(np.float32))
    order = np.random.default_rng(3).permutation(300)
    places = [np.sort(order[:90]), np.sort(order[90:91]), np.sort(order[91:])]
    joined = pruning.join([(prune([values[part] for values in logits], top=top), part) for part in places])
    whole = prune(logits, top=top)
    for name in pruning.ARRAYS:
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    assert joined.top == top
