"""What to choose by, from the command line: the metric and the floors, refused before a model is looked at."""

import pytest

import hf_radin
from hf_radin.cli.commands import split_names
from hf_radin.cli.main import main


@pytest.fixture
def command(runs, digits, cache, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["soup", "--models", f"{runs}/ft-*", "--dataset", str(digits), "--cache-dir", str(cache), "--budget", "2"]


def test_a_soup_is_chosen_by_a_metric_with_floors(command, capsys):
    floors = ["--keep", "accuracy >= best single - 0.5", "--keep", "recall[three] >= 0.1"]
    options = ["--metric", "log_loss", *floors, "--metrics", "f1", "--head", "average"]
    assert main([*command, *options]) == 0
    text = capsys.readouterr().out
    assert "validation log_loss" in text and "validation f1" in text and "validation recall[three]" in text
    assert "Chosen to keep accuracy >= best single - 0.5, recall[three] >= 0.1." in text
    report = hf_radin.Soup.from_pretrained("soup").report
    is_compared = "of log_loss, of which less is better, on validation" in text
    assert is_compared == (report.verdict.kind != "single")
    assert report.metric == "log_loss" and len(report.keep) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "los_loss"], "Did you mean 'log_loss'"),
        (["--metric", "recall[thre]"], "'recall[thre]' is of a class that is not there. Did you mean 'three'"),
        (["--keep", "accuracy"], "keep='accuracy' can't be read"),
        (["--keep", "f1 <= 0.5"], "of f1 more is better"),
        (["--metric", "f1", "--pilot", "0.2"], "soups are chosen by accuracy after a pilot"),
    ],
)
def test_what_is_no_metric_is_refused_before_anything_is_computed(command, capsys, model_calls, options, message):
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err and not model_calls


def test_a_comma_in_the_name_of_a_class_parts_no_metrics():
    names = "accuracy, recall[tench, Tinca tinca],f1[a [b, c] d],,mcc"
    assert split_names(names) == ("accuracy", "recall[tench, Tinca tinca]", "f1[a [b, c] d]", "mcc")
