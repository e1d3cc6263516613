"""The outcome of a search in a sentence, and what it cost in rows, from the contents of `recipe.json`."""

from __future__ import annotations

from typing import Any

from hf_radin.runtime.text import clock, escape, percent, show_metric


def sentence(fields: dict[str, Any]) -> str:
    """The outcome in one sentence, soup against best single, on the split that proves most."""
    if not fields["results"]:
        what = "an average of checkpoints by weights" if len(fields["recipe"]["ingredients"]) > 1 else "a checkpoint"
        return (
            f"**Nothing was measured of this model.** It is {what} that somebody gave; how good it is was not asked."
        )
    split = fields["held_out"] or fields["data"]["split"]
    found = {one["name"]: one for one in fields["results"] if one["split"] == split}
    accuracy = {name: one["metrics"]["accuracy"] for name, one in found.items() if "accuracy" in one["metrics"]}
    if not fields.get("measured", True):
        return _estimated(fields, split, accuracy)
    if len(fields["recipe"]["ingredients"]) == 1:
        return _single(fields, split, accuracy)
    if "soup" not in accuracy:
        return _by_another_metric(fields, split)
    proof = next((one for one in fields.get("against_best_single", []) if one["split"] == split), None)
    gain = 100 * (accuracy["soup"] - accuracy["best single"])
    outcome = f"{abs(gain):.2f} points {'better' if gain > 0 else 'worse'} than" if gain else "as good as"
    between_them = ""
    if proof:
        low, high = (f"{100 * value:+.2f}" for value in proof["interval"])
        surely_not_equal = not proof["interval"][0] <= 0 <= proof["interval"][1]
        why = f" (p = {proof['p_value']:.2f} by the exact McNemar test)" if surely_not_equal else ""
        maybe = f", which may be chance{why}" if gain and not likely(proof) else ""
        between_them = f" (95%: {low} to {high} points{maybe})"
    return (
        f"On the split {escape(split)} the soup's accuracy is {percent(accuracy['soup'])}, {outcome} the best single "
        f"ingredient{between_them}.{_flatters(fields)}"
    )


def _flatters(fields: dict[str, Any]) -> str:
    if fields["method"] == "uniform":
        return " Nothing was chosen: all checkpoints are in it, in equal parts."
    shared = (fields.get("overlap") or {}).get("images")
    if fields["held_out"] and shared:
        return f" {shared:,} of its {fields['overlap']['of']:,} images chose it too, which flatters it."
    return "" if fields["held_out"] else " That split chose it too, which flatters it."


def in_common(fields: dict[str, Any]) -> str:
    """What images the split that proves has in common with others, in sentences; empty if it has none."""
    overlap = fields.get("overlap")
    if not overlap:
        return ""
    proves, chose = escape(fields["held_out"]), escape(fields["data"]["split"])
    sentences = []
    if overlap["images"] is None:
        sentences.append(f"Whether {proves} and {chose} have images in common can't be told.")
    elif overlap["images"]:
        part = "" if fields["method"] == "uniform" else ", and so had a part in the choice that they are to prove"
        number = f"{overlap['images']:,} of the {overlap['of']:,} images"
        sentences.append(f"**{number} of {proves} are in {chose} too**, byte for byte{part}.")
    if overlap["batchnorm"] and len(fields["recipe"]["ingredients"]) > 1:
        number = f"{overlap['batchnorm']:,} of the {overlap['of']:,} images"
        sentences.append(f"{number} of {proves} gave BatchNorm its statistics too, without their labels.")
    return " ".join(sentences)


def _single(fields: dict[str, Any], split: str, accuracy: dict[str, float]) -> str:
    """Why it is one of the checkpoints, and how good that is."""
    soups = [one for one in fields["measurements"] if one["proposal"] != "single"]
    reached = f" On the split {escape(split)} its accuracy is {percent(accuracy['soup'])}." if accuracy else ""
    if not soups:
        return f"The best of {len(fields['ingredients'])} checkpoints on the split that chose it.{reached}"
    better = "that was measured was" if all(one["measured"] is not None for one in soups) else "was estimated to be"
    return (
        f"No soup {better} better than the best single model on the split that chooses ({len(soups)} of them), so "
        f"this is that model.{reached}"
    )


def _by_another_metric(fields: dict[str, Any], split: str) -> str:
    """What is known where accuracy was not asked for."""
    scores = {one["name"]: one["metrics"] for one in fields["results"] if one["split"] == split}
    name = next((name for name in scores.get("soup", {}) if name in scores.get("best single", {})), None)
    if name is None:
        return (
            f"None of the metrics that were asked for has a meaning on the split {escape(split)}. "
            f"{'' if fields['method'] == 'uniform' else 'The soup was chosen by its accuracy.'}{_flatters(fields)}"
        ).strip()
    soup, single = (show_metric(name, scores[one][name]) for one in ("soup", "best single"))
    return (
        f"On the split {escape(split)} the soup's {escape(name)} is {soup}, and that of the best single ingredient "
        f"{single}.{'' if fields['method'] == 'uniform' else ' It was chosen by its accuracy.'}{_flatters(fields)}"
    )


def _estimated(fields: dict[str, Any], split: str, accuracy: dict[str, float]) -> str:
    """What is known of a soup that was not measured on the split that chose it."""
    soup = next(one for one in fields["measurements"] if one["measured"] is None)
    singles = [one["measured"] for one in fields["measurements"] if one["proposal"] == "single"]
    part = f"a random {percent(fields['pilot']['share'])} of " if fields.get("pilot") else ""
    said = ""
    if "soup" in accuracy:  # on the held-out split
        said = (
            f"On the split {escape(split)}, which did not choose it, the soup's accuracy is "
            f"{percent(accuracy['soup'])}, and that of the best single ingredient {percent(accuracy['best single'])}. "
        )
    return (
        f"{said}**Estimated, not measured** is how good it is on {part}the split {escape(fields['data']['split'])}, "
        f"which chose it: the ensemble of its ingredients, whose accuracy estimates that of the soup, has "
        f"{percent(soup['estimate'])} there, and the best single ingredient {percent(max(singles))}. Such estimates "
        "tend to be too high."
    )


def costs(fields: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What it took: for what, how many passes, and how long that was, as far as it is known."""
    passes, time = fields["passes"], fields.get("time") or {}
    given = (fields.get("pilot") or {}).get("given", len(fields["ingredients"]))
    took = {name: "" if not time.get(name) else clock(time[name]) for name in ("logits", "soups", "probabilities")}
    rows = [(f"logits of {given} checkpoints", f"{passes['logits']:.3g}", took["logits"])]
    if passes["soups"]:
        rows.append(("measuring soups", f"{passes['soups']:.3g}", took["soups"]))
    if passes.get("probabilities"):
        row = "running soups once more, for metrics of probabilities"
        rows.append((row, f"{passes['probabilities']:.3g}", took["probabilities"]))
    if passes.get("batchnorm"):
        rows.append(("images for their BatchNorm statistics, as passes", f"{passes['batchnorm']:.3g}", ""))
    if fields["held_out"]:
        known = fields.get("hold_out") is not None  # as logits of the same split
        logits = 0 if known else fields.get("held_out_logits", len(fields["ingredients"]))
        rows.append((f"the figures on {fields['held_out']}, in passes over it", str(logits + _proved(fields)), ""))
    return rows


def is_uniform(fields: dict[str, Any]) -> bool:
    """Whether all ingredients are in the soup, in equal parts."""
    recipe = fields["recipe"]
    return len({*recipe["ingredients"]}) == len(fields["ingredients"]) and len({*recipe["weights"]}) == 1


def _proved(fields: dict[str, Any]) -> int:
    """How many soups were run on the split that proves."""
    is_soup = len(fields["recipe"]["ingredients"]) > 1
    names = {"soup"} if is_uniform(fields) else {"uniform", "soup"} if is_soup else {"uniform"}
    return sum(one["split"] == fields["held_out"] and one["name"] in names for one in fields["results"])


def compared(one: dict[str, Any]) -> str:
    """How the soup stands to the best single model on a split, as far as the number of images tells."""
    gain, low, high = (f"{100 * value:+.2f}" for value in (one["gain"], *one["interval"]))
    p = f"{one['p_value']:.2f}" if one["p_value"] >= 0.01 else f"{one['p_value']:.1g}"
    return (
        f"{gain} points on {one['split']} (95% by the bootstrap: {low} to {high}; p = {p} by the exact McNemar test)"
    )


def likely(one: dict[str, Any]) -> bool:
    """Whether both tests say that the difference is no chance: the interval, and McNemar's."""
    low, high = one["interval"]
    return not low <= 0 <= high and one["p_value"] < 0.05


def spending(about: dict[str, Any]) -> str:
    """What a search took, in passes over the split."""
    passes, split = about["passes"], about["data"]["split"]
    text = f"{passes['logits']:.3g} passes over {split} for logits, {passes['soups']:.3g} for soups"
    if about.get("budget", "0") != "0":
        text += f" (a budget of {about['budget']}, baselines beside it)"
    if "probabilities" in passes:
        text += f", {passes['probabilities']:.3g} to run soups once more for metrics of probabilities"
    if "batchnorm" in passes:
        text += f", and as many images as {passes['batchnorm']:.3g} passes for their BatchNorm statistics"
    return text


def images_left(about: dict[str, Any]) -> int:
    """Of how many images of the split that chose most ingredients have no logits, after a pilot."""
    shown = (about.get("pilot") or {}).get("shown")
    return 0 if shown is None else int(about["images"] - shown)
