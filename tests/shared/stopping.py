"""A run that is stopped at a known place: an interrupt or a kill, raised where processes meet."""

from typing import Any

from accelerate import Accelerator


class Stopping(Accelerator):
    """An accelerator that raises an error at the beginning of one call of a method, and otherwise works as any.

    Args:
        method: `log`, which hears of each block of logits and of each soup that was measured, or `reduce`, in which
            the classes that a soup predicts are added up before they are written.
        number: of the call, from 1.
        error: that is raised.
    """

    def __init__(self, method: str, number: int, error: type[BaseException] = KeyboardInterrupt):
        super().__init__()
        self._method, self._number, self._error, self._calls = method, number, error, 0

    def log(self, values: dict, step: int | None = None, log_kwargs: dict | None = None) -> None:
        self._count("log")
        super().log(values, step=step, log_kwargs=log_kwargs or {})

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        self._count("reduce")
        return super().reduce(tensor, reduction, scale)

    def _count(self, method: str) -> None:
        self._calls += method == self._method
        if method == self._method and self._calls == self._number:
            raise self._error
