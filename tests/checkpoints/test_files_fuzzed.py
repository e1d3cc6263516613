"""Headers of weights are read as strictly as safetensors reads them."""

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from safetensors import SafetensorError, safe_open
from shared.fuzzing import SETTINGS, cases, files, outcome

from hf_radin.checkpoints.files import Header, read_layout


def strict_header(path: Path) -> Header | None:
    """What safetensors itself reads; None if it refuses the file."""
    try:
        with safe_open(path, "np") as file:
            names = file.keys()  # what is opened is no mapping
            parts = {name: file.get_slice(name) for name in names}
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OverflowError):
        return None


def check(path: Path, content: bytes) -> bool:
    """Hold the reader to the strict one; returns whether the file is read."""
    path.write_bytes(content)
    layouts = []
    refusal = outcome(lambda: layouts.append(read_layout(io.BytesIO(content), len(content))))
    strict = strict_header(path)
    # beyond the strict parser, names that stand twice, other fields and the numbers in them are refused
    assert strict is not None or refusal
    assert not refusal or strict is None or any(text in refusal for text in ("is in it twice", "more of", "no count"))
    assert refusal or layouts[0].header == strict
    return not refusal


@settings(SETTINGS, max_examples=300)
@given(content=files("weights"))
def test_what_the_strict_parser_refuses_is_refused(tmp_path_factory, content):
    check(tmp_path_factory.getbasetemp() / "model.safetensors", content)


def test_many_headers_are_read_and_many_refused(tmp_path):
    read = [check(tmp_path / "model.safetensors", content) for _, content in cases("weights", 1, 600)]
    assert 100 < sum(read) < 500


@pytest.mark.parametrize(
    "text",
    [
        '{"__metadata__": {"a": 1}}',
        '{"__metadata__": []}',
        '{"__metadata__": {"\\ud800": "a"}}',
        '{"__metadata__": {"a": "\\ud800"}}',
        '{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": {"dtype": "F32", "shape": [0], '
        '"data_offsets": [0, 0]}}',
        '{"a": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}',
        '{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 0]}}',
        '{"\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
        f'{{"a": {{"dtype": "F32", "shape": [{"9" * 18},{"9" * 18}, 0], "data_offsets": [0, 0]}}}}',
        f'{{"a": {{"dtype": "F32", "shape": [{"9," * 300_000} 9], "data_offsets": [0, 0]}}}}',
        "[]",
        '\ufeff{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_header_that_only_a_lenient_reader_takes_is_refused(text, encoding):
    content = text.encode(encoding, "surrogatepass")
    content = len(content).to_bytes(8, "little") + content
    assert outcome(lambda: read_layout(io.BytesIO(content), len(content))).startswith("its header")
