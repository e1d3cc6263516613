"""What soups are chosen by: a metric, and floors that are read from text."""

import numpy as np
import pytest

from hf_radin.metrics.named import Answers, load_metrics
from hf_radin.metrics.objective import BEHIND, Floor, Objective, score_recipes
from hf_radin.recipes.ensemble import mix
from hf_radin.recipes.pruning import keep_all, prune
from hf_radin.recipes.recipe import Measurement, Recipe
from hf_radin.recipes.scoring import mean_losses

CLASSES = ("cat", "melanoma", "a b", "<=50K", "a [b]")


@pytest.mark.parametrize(
    ("text", "name", "bound", "is_relative"),
    [
        ("accuracy >= 0.9", "accuracy", 0.9, False),
        ("accuracy >= best single - 0.002", "accuracy", -0.002, True),
        ("Accuracy>=best_single+.01", "accuracy", 0.01, True),
        ("f1 >= best single", "f1", 0.0, True),
        ("recall[melanoma] >= 9e-1", "recall[melanoma]", 0.9, False),
        ("precision[a b] >= 0.5", "precision[a b]", 0.5, False),
        ("recall[<=50K] >= 0.5", "recall[<=50K]", 0.5, False),
        ("f1[a [b]] >= best single", "f1[a [b]]", 0.0, True),
        ("log_loss <= 0.3", "log_loss", 0.3, False),
        ("log_loss <= best single + 2", "log_loss", 2.0, True),
        ("accuracy >= 1", "accuracy", 1.0, False),
        ("mcc >= -0.1", "mcc", -0.1, False),
    ],
)
def test_floors_are_read(text, name, bound, is_relative):
    floor = Floor.of(text, CLASSES)
    assert (floor.metric.name, floor.bound, floor.is_relative) == (name, bound, is_relative)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accuracy", "can't be read: write it as in"),
        ("accuracy > 0.9", "can't be read"),
        ("accuracy >= 75%", "Shares are written as numbers: 0.75 for 75%"),
        ("accuracy >= ", "can't be read"),
        ("accuracy >= best", "can't be read"),
        ("accuracy >= nan", "can't be read"),
        (">= 0.9", "can't be read"),
        (0.9, "can't be read"),
        (None, "can't be read"),
        ("accuracy >= 0.5, f1 >= 0.5", "can't be read"),
        ("accuracy >= 90", "accuracy is a share of 1, and 90 is more than it can be or change.*: write 0.9"),
        ("f1 >= best single - 1", "f1 is a share of 1, and -1 is .*: write -0.01"),
        ("acuracy >= 0.9", "Did you mean 'accuracy'"),
        ("recall[melanom] >= 0.9", "of a class that is not there. Did you mean 'melanoma'"),
        ("log_loss >= 0.3", "of log_loss less is better, so that its bound goes with <="),
        ("f1 <= 0.3", "of f1 more is better, so that its bound goes with >="),
    ],
)
def test_what_is_no_floor_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Floor.of(text, CLASSES)


def test_one_metric_chooses():
    with pytest.raises(ValueError, match="metric=f1, mcc: soups are chosen by one metric; others may have a floor"):
        Objective.of(("f1", "mcc"))
    for other in (3, [3]):
        with pytest.raises(ValueError, match="A metric is a name or a function of logits and labels, not 3"):
            Objective.of(other)
    for keep in (None, 0.9):
        with pytest.raises(ValueError, match=f"keep={keep} can't be read"):
            Objective.of("f1", keep)


def answers(seed: int = 0) -> Answers:
    generator = np.random.default_rng(seed)
    labels = generator.integers(3, size=200)
    logits = generator.standard_normal((200, 3)) + np.eye(3)[labels]
    return Answers(logits.argmax(axis=1), labels, 3, logits)


def test_a_floor_is_kept_or_broken_by_what_is_measured():
    best = answers()
    accuracy = float((best.predictions == best.labels).mean())
    objective = Objective.of("f1", "accuracy >= best single - 0.01", CLASSES)
    assert not objective.broken(best)  # relative to what is not said yet
    fixed = objective.measured_by(best)
    assert fixed.floors[0].bound == accuracy - 0.01 and not fixed.floors[0].is_relative and not fixed.broken(best)
    worse = Answers(np.where(np.arange(200) < 6, (best.labels + 1) % 3, best.predictions), best.labels, 3)
    assert [floor.text for floor in fixed.broken(worse)] == ["accuracy >= best single - 0.01"]


def test_who_breaks_a_floor_is_behind_all_others():
    objective = Objective.of("log_loss", "accuracy >= 0.8")
    scores = {"log_loss": np.array([0.1, 0.2, 0.3, 0.05]), "accuracy": np.array([0.79, 0.8, 0.9, 0.5])}
    assert list(np.argsort(-objective.ranks(scores))) == [1, 2, 0, 3]

    def measured(value: float, keeps: bool | None) -> Measurement:
        return Measurement(Recipe.uniform(["a"]), "own", value, value, 9, keeps=keeps)

    assert objective.rank(measured(0.4, True)) > objective.rank(measured(0.1, False))
    assert objective.rank(measured(0.1, True)) > objective.rank(measured(0.4, True))
    assert objective.rank(measured(0.1, None)) == -0.1 > -BEHIND


@pytest.mark.parametrize(
    "name", ["accuracy", "f1", "worst_recall", "log_loss", "brier_score", "top2_accuracy", "roc_auc"]
)
def test_many_recipes_are_scored_as_one_is(name):
    generator = np.random.default_rng(3)
    labels = generator.integers(3, size=150)
    logits = [(generator.standard_normal((150, 3)) + np.eye(3)[labels]).astype(np.float32) for _ in range(4)]
    rows = generator.dirichlet(np.ones(4), size=9)
    (metric,) = load_metrics(name)
    pruned = keep_all(logits) if metric.needs_logits else prune(logits)
    scores = score_recipes(metric, pruned, labels, 3, rows)
    mixed = [mix(logits, row) for row in rows]
    expected = [metric.compute(Answers(each.argmax(axis=1), labels, 3, each))[name] for each in mixed]
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["log_loss", "brier_score"])
@pytest.mark.parametrize("are_multi_label", [False, True], ids=["one class", "label sets"])
def test_means_over_images_are_the_same_in_blocks_of_any_size(name, are_multi_label):
    """A recipe that is no recipe, as predicted soups are, and a last block of fewer images, too."""
    generator = np.random.default_rng(4)
    labels = generator.random((70, 5)) < 0.3 if are_multi_label else generator.integers(5, size=70)
    logits = [(3 * generator.standard_normal((70, 5))).astype(np.float32) for _ in range(3)]
    rows = np.concatenate([generator.dirichlet(np.ones(3), size=7), [[1.5, -0.7, 0.4]]])
    (metric,) = load_metrics(name, of_label_sets=are_multi_label)
    seen: list[int] = []
    scores = [
        mean_losses(keep_all(logits), labels, rows, metric.of_logits, on_block=seen.append, mixed_at_once=size)
        for size in (1, 15 * 16, 1 << 18)
    ]
    mixed = [sum(weight * each.astype(np.float64) for weight, each in zip(row, logits, strict=True)) for row in rows]
    expected = [metric.compute(Answers(labels, labels, 5, each))[name] for each in mixed]
    for each in scores:
        np.testing.assert_allclose(each, expected, rtol=1e-5)
    assert sum(seen) == 3 * len(rows) * 70 and len(seen) == 70 + 5 + 1
