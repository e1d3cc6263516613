"""Teach the tail of a model what an ensemble says of images, from what the tail is given of them.

The tail learns probabilities by cross-entropy: those of the ensemble, with a share of the labels if these are to have
a part (knowledge distillation, Hinton et al., arXiv 1503.02531). Multi-label they are those of each class by itself,
the sigmoids of its logits, and the cross-entropies add up: so an image teaches most where its classes are undecided,
which squared errors of logits would not tell from where all are sure. Logits are not centred there: a number that is
added to all of them changes no softmax, but all sigmoids. All else of the model stays as it is, statistics of
BatchNorm too, so that what the tail is given of an image is computed once.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hf_radin.metrics.cross_entropy import compared, probabilities, taught_probabilities
from hf_radin.tail.cut import Cut

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Images that are looked at together.
CHUNK = 4096

# Images in a step; steps at least; and epochs at least, which are more where there are few images.
BATCH, STEPS, LEAST_EPOCHS = 32, 400, 4

# Devices on which torch takes a step of Adam at once, which on a CPU is four times as quick.
FUSED = ("cpu", "cuda")

# Passes that a step takes: forth, and twice as much back.
THERE_AND_BACK = 3

# Steps by which time is measured, after a first one.
TIMED = 3

# Probabilities that differ by less are the same, but for rounding errors.
SAME = 1e-5

Run = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Course:
    """How a tail learns.

    Args:
        epochs: how often it is shown each image.
        rate: of learning, at the start; it falls to zero with a cosine.
        batch_size: images in a step.
        share: that labels have in the probabilities that are taught; the teacher has the rest.
        seed: of the order in which images are shown.
        seconds: that it may take at most; epochs are left out, but for one.
    """

    epochs: int = LEAST_EPOCHS
    rate: float = 1e-3
    batch_size: int = BATCH
    share: float = 0.0
    seed: int = 0
    seconds: float = math.inf

    def steps_in_an_epoch(self, images: int) -> int:
        """How many steps so many images take: those that don't fill a batch are left out."""
        return images // self.batch_size

    def passes(self, cut: Cut, *, halves: bool) -> float:
        """What it takes, in passes of the model over the images that teach, by the number of multiplications.

        Args:
            halves: whether each half of the images teaches a tail of its own, too.
        """
        return (2 if halves else 1) * THERE_AND_BACK * self.epochs * cut.share

    def within(self, seconds: float) -> Course:
        """The same with as many epochs as there is time for.

        Args:
            seconds: that an epoch takes.
        """
        return replace(self, epochs=max(1, min(self.epochs, int(self.seconds / max(seconds, 1e-9)))))


def usual_epochs(images: int) -> int:
    """How many epochs so many images teach a tail in by default: few images take more of them, to as many steps."""
    return max(LEAST_EPOCHS, round(STEPS * BATCH / images))


@dataclass(frozen=True, eq=False)
class TailLesson:
    """What a tail is taught.

    Args:
        given: what it is given of images, float32 `(images, width)`; may be memory-mapped.
        teacher: logits of the images, `(images, classes)`; may be memory-mapped.
        labels: of the images, `(images,)`, multi-label bool `(images, classes)`; None if they have no part.
        multi_label: whether an image may have any number of classes.
    """

    given: np.ndarray
    teacher: np.ndarray
    labels: np.ndarray | None = None
    multi_label: bool = False

    def wanted(self, rows: np.ndarray, share: float) -> torch.Tensor:
        """The probabilities that are taught, of images by their rows, float32 `(rows, classes)`."""
        import torch

        teacher = torch.from_numpy(np.asarray(self.teacher[rows], np.float32))
        labels = None if self.labels is None else self.labels[rows]
        return taught_probabilities(teacher, labels, share, multi_label=self.multi_label)

    def loss(self, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """How far logits `(images, classes)` are from wanted probabilities: the mean of their cross-entropies."""
        entropies, _ = compared(logits, wanted, multi_label=self.multi_label)
        return entropies.sum(1).mean()

    def is_known(self, logits: np.ndarray, share: float) -> bool:
        """Whether logits `(images, classes)` say already what is taught; steps along rounding errors lead nowhere."""
        import torch

        def is_same(rows: np.ndarray) -> bool:
            says = probabilities(torch.from_numpy(logits[rows]), multi_label=self.multi_label)
            return bool((says - self.wanted(rows, share)).abs().max() <= SAME)

        return all(map(is_same, np.array_split(np.arange(len(logits)), max(1, len(logits) // CHUNK))))


def teach(
    model: PreTrainedModel,
    run: Run,
    cut: Cut,
    lesson: TailLesson,
    rows: np.ndarray,
    course: Course,
    *,
    on_step: Callable[[], object] = lambda: None,
) -> None:
    """Teach the tail of a model some images, in place.

    Args:
        run: the tail (`cut.open_tail`), for batches of `course.batch_size` images.
        rows: of the images in the lesson, at least as many as a batch has.
        on_step: is called after each step.
    """
    import torch

    parameters = [parameter for name, parameter in model.named_parameters() if name in {*cut.tensors}]
    device, generator = parameters[0].device, torch.Generator().manual_seed(course.seed)
    optimizer = torch.optim.Adam(parameters, lr=course.rate, fused=device.type in FUSED)
    steps = course.epochs * course.steps_in_an_epoch(len(rows))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    with _learning(model, parameters):
        for _ in range(course.epochs):
            shuffled = rows[torch.randperm(len(rows), generator=generator).numpy()]
            for batch in _batches(shuffled, course.batch_size):
                wanted = lesson.wanted(batch, course.share).to(device)
                loss = lesson.loss(run(_given(lesson, cut, batch, device)), wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                on_step()


def seconds_of_a_step(
    model: PreTrainedModel, run: Run, cut: Cut, lesson: TailLesson, rows: np.ndarray, course: Course
) -> float:
    """How long a step takes: a few are made, in place; for the arguments see `teach`."""
    begun: list[float] = []

    def note() -> None:
        TaughtTail.of(model, cut)  # waits for the device
        begun.append(time.perf_counter())

    few = rows[: course.batch_size]
    teach(model, run, cut, lesson, few, replace(course, epochs=1 + TIMED), on_step=note)
    return (begun[-1] - begun[0]) / TIMED


def tail_logits(
    run: Run, cut: Cut, lesson: TailLesson, rows: np.ndarray, *, batch_size: int, device: str
) -> np.ndarray:
    """The logits of a tail for some images, float32 `(rows, classes)`.

    Args:
        batch_size: that `run` takes.
    """
    import torch

    logits = np.zeros((len(rows), lesson.teacher.shape[1]), np.float32)
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            filled = np.concatenate([batch, np.repeat(batch[:1], batch_size - len(batch))])
            answers = run(_given(lesson, cut, filled, torch.device(device)))
            logits[start : start + len(batch)] = answers[: len(batch)].cpu().numpy()
    return logits


@dataclass(frozen=True, eq=False)
class TaughtTail:
    """The parameters of a tail that was taught, which take the place of the averaged ones.

    Args:
        tensors: by name, on the CPU.
    """

    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel, cut: Cut) -> TaughtTail:
        """A copy of those that a model has behind a cut."""
        named = dict(model.named_parameters())
        return cls({name: named[name].detach().cpu().clone() for name in cut.tensors})

    @property
    def sha256(self) -> str:
        """The hash of its numbers, in float32."""
        content = hashlib.sha256()
        for name in sorted(self.tensors):
            content.update(f"{name} {tuple(self.tensors[name].shape)} ".encode())
            content.update(np.ascontiguousarray(self.tensors[name].float().numpy(), "<f4").tobytes())
        return content.hexdigest()

    def put_into(self, model: PreTrainedModel) -> None:
        """Give a model these parameters, in place; dtype and device stay, and so does all else.

        Raises:
            ValueError: if the model has no parameter of a name and shape.
        """
        import torch

        named = dict(model.named_parameters())
        for name, tensor in self.tensors.items():
            if name not in named or named[name].shape != tensor.shape:
                has = f"one of {tuple(named[name].shape)}" if name in named else "none"
                raise ValueError(f"{name}: a tensor of {tuple(tensor.shape)} was taught, and the model has {has}.")
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                named[name].copy_(tensor)


@contextmanager
def _learning(model: PreTrainedModel, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """These parameters of a model take gradients meanwhile, and no others."""
    import torch

    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        model.requires_grad_(True)


def _given(lesson: TailLesson, cut: Cut, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    import torch

    given = torch.from_numpy(np.asarray(lesson.given[rows], np.float32))
    return given.reshape(len(rows), *cut.shape).to(device)


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Batches of this size; rows that don't fill one are left out."""
    return (rows[start : start + size] for start in range(0, len(rows) - size + 1, size))
