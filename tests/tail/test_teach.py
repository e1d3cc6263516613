"""A tail learns what it is taught, from what it is given, and nothing where there is nothing to learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_radin.tail.choose import choose_cut
from hf_radin.tail.cut import open_tail
from hf_radin.tail.teach import Course, TailLesson, TaughtTail, seconds_of_a_step, tail_logits, teach, usual_epochs
from tail.test_cut import given_to, images, logits_of, vit

COUNT = 96
COURSE = Course(epochs=5, rate=1e-2, batch_size=32)


@pytest.fixture
def model():
    return vit()


@pytest.fixture
def cut(model):
    return choose_cut(model, {"pixel_values": images(1)["pixel_values"][0]}, "block")


@pytest.fixture
def lesson(model, cut) -> TailLesson:
    """What the tail is given of images, and the logits of another model."""
    batch = images(COUNT)
    given = given_to(model, cut.module, batch).reshape(COUNT, -1).numpy()
    teacher = vit()
    torch.nn.init.normal_(teacher.classifier.weight, generator=torch.Generator().manual_seed(2))
    return TailLesson(given, logits_of(teacher, batch).numpy())


def answers(model, cut, lesson: TailLesson, rows: np.ndarray | None = None) -> np.ndarray:
    with open_tail(model, cut, images(COURSE.batch_size)) as run:
        every = np.arange(COUNT) if rows is None else rows
        return tail_logits(run, cut, lesson, every, batch_size=COURSE.batch_size, device=torch.device("cpu"))


def taught(model, cut, lesson: TailLesson, course: Course = COURSE, rows: np.ndarray | None = None) -> int:
    """Teach, and count the steps."""
    steps = []
    with open_tail(model, cut, images(course.batch_size)) as run:
        every = np.arange(COUNT) if rows is None else rows
        teach(model, run, cut, lesson, every, course, on_step=lambda: steps.append(1))
    return len(steps)


def entropy(logits: np.ndarray, wanted: torch.Tensor) -> float:
    return float(-(wanted * torch.from_numpy(logits).log_softmax(1)).sum(1).mean())


def test_a_tail_gives_the_logits_of_the_model(model, cut, lesson):
    expected = logits_of(model, images(COUNT)).numpy()
    np.testing.assert_allclose(answers(model, cut, lesson), expected, atol=1e-5)
    rows = np.array([70, 3, 3])  # fewer than a batch, in any order
    np.testing.assert_allclose(answers(model, cut, lesson, rows), expected[rows], atol=1e-5)


def test_it_comes_nearer_to_its_teacher(model, cut, lesson):
    wanted = lesson.wanted(np.arange(COUNT), 0.0)
    before = entropy(answers(model, cut, lesson), wanted)
    assert taught(model, cut, lesson) == COURSE.epochs * COURSE.steps_in_an_epoch(COUNT) == 15
    floor = entropy(lesson.teacher, wanted)
    assert entropy(answers(model, cut, lesson), wanted) < floor + 0.5 * (before - floor)


def test_few_images_are_shown_more_often_to_as_many_steps():
    epochs = {count: usual_epochs(count) for count in (300, 1000, 3000, 50_000)}
    assert epochs == {300: 43, 1000: 13, 3000: 4, 50_000: 4}


def test_a_course_keeps_to_its_time():
    course = Course(epochs=10, seconds=12)
    assert [course.within(seconds).epochs for seconds in (0.0, 1.0, 5.0, 100.0)] == [10, 10, 2, 1]


def test_time_is_measured_and_images_that_do_not_teach_are_not_needed(model, cut, lesson):
    with open_tail(model, cut, images(COURSE.batch_size)) as run:
        rows = np.arange(COURSE.batch_size)
        assert 0 < seconds_of_a_step(model, run, cut, lesson, rows, COURSE) < 10


def test_labels_have_their_share(lesson):
    labels = np.arange(COUNT) % 3
    probabilities = torch.from_numpy(lesson.teacher).softmax(1).numpy()
    wanted = TailLesson(lesson.given, lesson.teacher, labels).wanted(np.array([4, 5]), 0.25).numpy()
    expected = 0.75 * probabilities[[4, 5]] + 0.25 * np.eye(3)[labels[[4, 5]]]
    np.testing.assert_allclose(wanted, expected, atol=1e-6)
    np.testing.assert_allclose(lesson.wanted(np.array([4]), 0.25).numpy(), probabilities[[4]], atol=1e-6)


def test_what_a_model_says_already_is_known(model, cut, lesson):
    logits, labels = logits_of(model, images(COUNT)).numpy(), np.zeros(COUNT, int)
    assert TailLesson(lesson.given, logits).is_known(answers(model, cut, lesson), 0.0)
    assert not lesson.is_known(answers(model, cut, lesson), 0.0)
    assert not TailLesson(lesson.given, logits, labels).is_known(answers(model, cut, lesson), 0.5)


def test_classes_by_themselves_come_nearer_to_their_teacher_each(model, cut, lesson):
    sets = replace(lesson, teacher=3 * lesson.teacher + [-1, 0, 1], multi_label=True)
    wanted = torch.from_numpy(sets.teacher).sigmoid()
    torch.testing.assert_close(sets.wanted(np.arange(COUNT), 0.0), wanted.float())

    def losses(logits: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(logits).double()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(given, wanted.double(), reduction="none")
        return entropy.mean(0).numpy()

    before, floor = losses(answers(model, cut, sets)), losses(sets.teacher)
    taught(model, cut, sets)
    assert (losses(answers(model, cut, sets)) < floor + 0.5 * (before - floor)).all()


def test_a_number_for_all_classes_is_known_to_softmax_and_not_to_sigmoids(lesson):
    shifted = (lesson.teacher + 1).astype(np.float32)
    for multi_label in (False, True):
        given = replace(lesson, multi_label=multi_label)
        assert given.is_known(given.teacher, 0.0) and given.is_known(shifted, 0.0) != multi_label


def test_the_front_and_the_statistics_stay(model, cut, lesson):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taught(model, cut, lesson)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and changed <= {*cut.tensors} and "classifier.weight" in changed
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_the_same_course_ends_with_the_same_bits(model, cut, lesson):
    start = TaughtTail.of(model, cut)
    hashes = []
    for seed in (0, 0, 1):
        start.put_into(model)
        taught(model, cut, lesson, Course(2, 1e-2, 32, seed=seed))
        hashes.append(TaughtTail.of(model, cut).sha256)
    assert hashes[0] == hashes[1] != hashes[2]
    start.put_into(model)
    assert TaughtTail.of(model, cut).sha256 == start.sha256 and start.tensors.keys() == {*cut.tensors}


def test_other_images_than_those_that_teach_change_nothing(model, cut, lesson):
    rows, others = np.arange(64), lesson.given.copy()
    others[64:] = 7
    start, hashes = TaughtTail.of(model, cut), []
    for given in (lesson.given, others):
        start.put_into(model)
        taught(model, cut, TailLesson(given, lesson.teacher), rows=rows)
        hashes.append(TaughtTail.of(model, cut).sha256)
    assert hashes[0] == hashes[1]


def test_a_model_that_it_does_not_fit_is_refused(model, cut):
    tail = TaughtTail.of(model, cut)
    other = vit()
    other.classifier = torch.nn.Linear(16, 5)
    with pytest.raises(
        ValueError, match=r"classifier.weight: a tensor of \(3, 16\) was taught, and .* one of \(5, 16\)"
    ):
        tail.put_into(other)
    with pytest.raises(ValueError, match="and the model has none"):
        TaughtTail({"no": torch.zeros(1)}).put_into(model)
