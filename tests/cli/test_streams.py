"""A stream that lasts gives its reader all that it takes, and never raises what becomes of the rest."""

import errno
import io
import os
import threading

import pytest

from hf_radin.cli.streams import LastingStream


def lasting(number: int, *, encoding: str = "utf-8", buffered: bool = True) -> LastingStream:
    """A stream to a descriptor, as Python makes its own; unbuffered as with `python -u`."""
    file = io.FileIO(number, "w", closefd=False)
    return LastingStream(io.TextIOWrapper(io.BufferedWriter(file) if buffered else file, encoding, write_through=True))


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_went_away_is_noted_and_nothing_is_raised(buffered):
    reader, writer = os.pipe()
    os.close(reader)
    stream = lasting(writer, buffered=buffered)
    for _ in range(3):
        print("x" * 100_000, file=stream, flush=True)
    assert stream.error is not None and stream.error.errno == errno.EPIPE
    assert os.path.samestat(os.fstat(writer), os.stat(os.devnull))  # for whoever else writes there
    os.close(writer)


def test_a_full_disk_is_noted():
    writer = os.open("/dev/full", os.O_WRONLY)
    stream = lasting(writer)
    print("x", file=stream, flush=True)
    print("y", file=stream, flush=True)
    assert stream.error is not None and stream.error.errno == errno.ENOSPC
    os.close(writer)


def test_a_pipe_that_does_not_wait_loses_nothing():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    received = []
    with open(reader, "rb") as file:
        thread = threading.Thread(target=lambda: received.append(file.read()))
        stream = lasting(writer)
        thread.start()
        stream.write("x" * 1_000_000)
        stream.flush()
        os.close(writer)
        thread.join()
    assert received == [b"x" * 1_000_000] and stream.error is None


def test_what_an_encoding_lacks_is_escaped():
    reader, writer = os.pipe()
    print("caf\u00e9 \udce9", file=lasting(writer, encoding="ascii"), flush=True)
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read() == rb"caf\xe9 \udce9" + b"\n"
