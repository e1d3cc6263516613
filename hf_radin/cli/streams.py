"""Streams that last: a reader that is gone or a disk that is full is no reason to lose what can still be saved."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any


def make_streams_last() -> None:
    """Let no error of sys.stdout or sys.stderr, and no name that they can't show, end the work of this process."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # else a file of ours comes where a shell has closed one
        pass
    os.close(number)
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def lost_output() -> str:
    """Why not all that was printed is where it should be; empty if it is, or if its reader wanted no more."""
    sys.stdout.flush()
    error = sys.stdout.error if isinstance(sys.stdout, LastingStream) else None
    return "" if error is None or error.errno == errno.EPIPE else error.strerror or str(error)


class LastingStream(io.TextIOWrapper):
    """A stream that writes to where another one does, for as long as that takes it.

    Args:
        stream: the other one.
    """

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream  # which closes its file when nobody has it
        self._outlet = _Outlet(getattr(stream.buffer, "raw", stream.buffer))  # of `python -u` the buffer is the file
        super().__init__(
            io.BufferedWriter(self._outlet),
            stream.encoding,
            "backslashreplace",
            line_buffering=stream.line_buffering or stream.write_through,
        )

    @property
    def error(self) -> OSError | None:
        """Why writing failed; None if it did not."""
        return self._outlet.error


class _Outlet(io.RawIOBase):
    """A file that is written to until that fails: then /dev/null comes in its place, whoever writes there."""

    def __init__(self, file: Any):
        self.error: OSError | None = None
        self.name = file.name
        self._file = file

    def write(self, text: Any) -> int:
        try:
            while (count := self._file.write(text)) is None:  # another program has made it one that doesn't wait
                select.select([], [self._file], [])
            return int(count)
        except OSError as error:
            self.error = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._file.fileno())

    def isatty(self) -> bool:
        return bool(self._file.isatty())


def _lasting(stream: Any) -> Any:
    """A stream that lasts; what a notebook has made of it stays as it is."""
    if stream is None:  # its descriptor was closed
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    return LastingStream(stream) if isinstance(stream, io.TextIOWrapper) else stream
