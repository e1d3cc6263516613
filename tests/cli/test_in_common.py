"""`hf-radin inspect` says what checkpoints have in common, of those whose weights are here."""

import shutil

from safetensors.torch import load_file, save_file

from hf_radin.cli.in_common import InCommon
from hf_radin.cli.main import main
from hf_radin.ingredients.gather import gather


def copies(source, folder, counts: dict[str, list[str]]):
    """Copies of a checkpoint in which tensors whose names begin so are other ones."""
    for number, (name, changed) in enumerate(counts.items()):
        shutil.copytree(source, folder / name)
        path = folder / name / "model.safetensors"
        tensors = load_file(path)
        for key in (key for key in tensors if key.startswith(tuple(changed))):
            tensors[key] += (number + 1) / 1000
        save_file(tensors, path, {"format": "pt"})
    return folder


def test_linear_probes_share_all_but_their_heads(heads, capsys):
    assert main(["inspect", "--models", f"{heads}/*"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("All 3 share")]
    assert "of the weights: only classifier.bias and classifier.weight differ, the head: soups are exact" in line
    assert "take no pass" in line and "up to" not in line


def test_fine_tunes_of_everything_share_nothing(runs, capsys):
    assert main(["inspect", "--models", f"{runs}/*"]) == 0
    assert "All 5 share 0 of 40 tensors, 0.0% of the weights.\n" in capsys.readouterr().out


def test_branches_are_groups(start, tmp_path):
    last, both = (
        ["vit.encoder.layer.1", "classifier", "vit.layers.1"],
        ["vit.encoder.layer", "classifier", "vit.layers"],
    )
    folder = copies(start, tmp_path, {"a": ["classifier"], "b": ["classifier"], "c": last, "d": both})
    in_common = InCommon.of(gather(f"{folder}/*"))
    everything, *branches = in_common.groups
    assert not in_common.is_exact and everything.models == (0, 1, 2, 3) and in_common.cut.endswith(".0")
    assert [common.models for common in branches] == [(0, 1), (0, 1, 2)]
    assert everything.share < branches[1].share < branches[0].share < 1
    assert [line.split(" share ")[0].count("/") > 0 for line in in_common.lines] == [False, True, True]


def test_the_module_up_to_which_all_are_the_same_is_named(start, tmp_path):
    last = ["vit.encoder.layer.1", "vit.layers.1", "classifier"]
    folder = copies(start, tmp_path, {"a": last, "b": last})
    (line,) = InCommon.of(gather(f"{folder}/*")).lines
    names = {
        f"{line.partition(', and are')[0]}, and are the same up to vit.{layers}.1."
        for layers in ("layers", "encoder.layer")
    }
    assert line in names


def test_a_tensor_beside_the_head_is_named_and_makes_it_no_head(start, tmp_path):
    folder = copies(start, tmp_path, {"a": ["vit.layernorm.bias"], "b": ["vit.layernorm.bias"]})
    (line,) = InCommon.of(gather(f"{folder}/*")).lines
    assert line.endswith("the same up to vit.layernorm: only vit.layernorm.bias differs.") and "exact" not in line


def test_what_is_not_here_is_not_downloaded_and_said(heads, tmp_path, hub):
    for path in heads.iterdir():
        hub.add_repo(f"org/{path.name}", {file.name: file.read_bytes() for file in path.iterdir()})
    away = gather([f"org/{path.name}" for path in sorted(heads.iterdir())])
    in_common = InCommon.of(away)
    assert not in_common.groups and not away[0].is_here
    assert in_common.lines == [
        "What 3 checkpoints share with others is not known: the weights are not here, or can't be read."
    ]


def test_weights_that_cannot_be_read_end_nothing(heads, tmp_path, capsys):
    shutil.copytree(heads, tmp_path / "heads")
    ingredients = gather(f"{tmp_path}/heads/*")
    path = tmp_path / "heads" / "ft-1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    in_common = InCommon.of(ingredients)
    assert in_common.unknown == 1 and in_common.is_exact and in_common.lines[0].startswith("All 2 share")
