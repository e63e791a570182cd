"""The results of `minillm evaluate` as Markdown. Likelihoods of different kinds never stand in one table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLANK = "–"
SHOWN = 3  # texts of each model
KINDS = {
    "exact": "exact likelihood",
    "upper_bound": "upper bounds on the negative log-likelihood",
    "none": "training losses that are no likelihood",
}
OTHER_TOKENIZERS = (
    "The models do not all have the same tokenizer: loss, perplexity and whatever else is counted in tokens cannot be "
    "compared between them; bits per byte can, and so can the judge's nats per token, which are over its own tokens."
)


def labels(models: Sequence[dict[str, Any]]) -> list[str]:
    """A short name for each model: the one it was given, else the file's, or the whole path where names meet."""
    if all("label" in model["checkpoint"] for model in models):
        return [model["checkpoint"]["label"] for model in models]
    paths = [model["checkpoint"]["path"] for model in models]
    stems = [Path(path).stem for path in paths]
    return stems if len(set(stems)) == len(stems) else paths


def by_kind(models: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """The places of the models with a loss, by kind of likelihood, the best bits per byte first. Where there are none
    (no likelihood, no bytes) they stay in the order they were given in."""
    found: dict[str, list[int]] = {}
    for kind in KINDS:
        places = [
            i for i, model in enumerate(models) if model["perplexity"] and model["perplexity"]["likelihood"] == kind
        ]
        if places:
            bits = [models[i]["perplexity"]["bits_per_byte"] for i in places]
            found[kind] = places if None in bits else [place for _, place in sorted(zip(bits, places))]
    return found


def one_tokenizer(models: Sequence[dict[str, Any]]) -> bool:
    return len({model["checkpoint"]["tokenizer"] for model in models}) == 1


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, numbers to the right."""
    lines = [header, ("---",) + ("---:",) * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """With commas, or a dash where there is none."""
    return BLANK if value is None else f"{value:,.{digits}f}"


def _with_error(value: float | None, error: float | None, digits: int = 4) -> str:
    return number(value, digits) + ("" if value is None or error is None else f" ± {error:,.{digits}f}")


def _percent(value: float | None) -> str:
    return BLANK if value is None else f"{100 * value:.1f} %"


def tables(result: dict[str, Any]) -> str:
    """All numbers."""
    models = result["models"]
    names = labels(models)
    parts = [_likelihood(models, names), _accuracy(models, names), _generation(result, names), _speed(models, names)]
    return "\n\n".join(part for part in parts if part)


def _likelihood(models: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    groups = by_kind(models)
    if not groups:
        return ""
    parts = ["## Perplexity"]
    for kind, places in groups.items():
        rows = []
        for place in places:
            found = models[place]["perplexity"]
            rows.append(
                (
                    names[place],
                    _with_error(found["bits_per_byte"], found["bits_per_byte_standard_error"]),
                    _with_error(found["loss"], found["loss_standard_error"]),
                    _with_error(found["perplexity"], found["perplexity_standard_error"], 2),
                    str(found["noise_samples"]) if found["noise_samples"] else BLANK,
                    f"{found['tokens']:,}",
                )
            )
        header = ("model", "bits per byte", "loss, nats a token", "perplexity", "noise samples", "tokens")
        parts += [f"### {KINDS[kind].capitalize()} (`{kind}`)", table(header, rows)]
    notes = ["± is one standard error, with rows as the sample."]
    if len(groups) > 1:
        notes.append(
            "Each table is a ranking of its own: a bound lies above the likelihood by an unknown amount, so no order "
            "between the tables follows from these numbers."
        )
    if not one_tokenizer(models):
        notes.append(OTHER_TOKENIZERS)
    return "\n\n".join([*parts, " ".join(notes)])


def _accuracy(models: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    next_rows, hidden_rows, header = [], [], []
    for name, model in zip(names, models):
        found = model["accuracy"]
        if not found:
            continue
        value = (
            _with_error(100 * found["accuracy"], found["standard_error"] and 100 * found["standard_error"], 2) + " %"
        )
        if found["predicts"] == "next":
            next_rows.append((name, value, f"{found['predicted']:,}"))
            continue
        header = [f"{level['hidden_from']:.0%}–{level['hidden_to']:.0%}" for level in found["by_level"]]
        levels = [_percent(level["accuracy"]) for level in found["by_level"]]
        hidden_rows.append((name, value, _percent(found["mean_over_levels"]), *levels))
    parts = []
    if next_rows:
        parts += ["### Of the next token", table(("model", "accuracy", "predictions"), next_rows)]
    if hidden_rows:
        parts += [
            "### Of hidden tokens, by the share that is hidden",
            table(("model", "all", "mean over levels", *header), hidden_rows),
        ]
    return "\n\n".join(["## Accuracy", *parts]) if parts else ""


def _generation(result: dict[str, Any], names: Sequence[str]) -> str:
    rows = []
    for name, model in zip(names, result["models"]):
        found = model["generation"]
        if found:
            rows.append((name, *_text_cells(found), number(found["self_bleu"], 1), _percent(found["ended"])))
            held_out = found["held_out"]
            rows.append((f"{name}: held-out text", *_text_cells(held_out), number(held_out["self_bleu"], 1), BLANK))
    if not rows:
        return ""
    header = (
        "model", "unigram entropy, nats", "judge, nats a token", "distinct-1", "distinct-2", "distinct-3",
        "4-grams repeated", "tokens, mean", "Self-BLEU", "ended",
    )  # fmt: skip
    note = "Texts with an entropy far below that of the held-out text are poor, however likely the judge finds them."
    if not one_tokenizer(result["models"]):
        note += " " + OTHER_TOKENIZERS
    return "\n\n".join(["## Generation", table(header, rows), note])


def _text_cells(found: dict[str, Any]) -> tuple[str, ...]:
    judge = found["judge"] or {"nats_per_token": None, "standard_error": None}
    return (
        number(found["unigram_entropy"]),
        _with_error(judge["nats_per_token"], judge["standard_error"], 3),
        *(number(found[f"distinct_{n}"]) for n in (1, 2, 3)),
        _percent(found["repetition"]),
        number(found["lengths"]["mean"], 1),
    )


def _speed(models: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    rows, curves = [], []
    for name, model in zip(names, models):
        found = model["speed"]
        if not found:
            continue
        full = found["saturated"]
        rows.append(
            (
                name,
                number(found["batch_1"]["tokens_per_second"], 1),
                f"{number(full['tokens_per_second'], 1)} (batch {full['batch']})",
                number(1000 * found["first_token_seconds"], 1),
                str(found["steps"]),
                number(found["batch_1"]["peak_memory_mb"], 0),
                number(full["peak_memory_mb"], 0),
            )
        )
        for point in found["quality_by_steps"]:
            judge = point["judge"] or {"nats_per_token": None, "standard_error": None}
            curves.append(
                (
                    name,
                    str(point["steps"]),
                    _with_error(judge["nats_per_token"], judge["standard_error"], 3),
                    number(point["unigram_entropy"]),
                    number(point["texts_per_second"], 2),
                )
            )
    if not rows:
        return ""
    header = (
        "model", "new tokens/s, batch 1", "saturated", "first token, ms", "steps", "peak MiB, batch 1",
        "peak MiB, saturated",
    )  # fmt: skip
    parts = ["## Speed", table(header, rows)]
    if curves:
        columns = ("model", "steps", "judge, nats a token", "unigram entropy, nats", "texts/s")
        parts += ["### Quality against steps", table(columns, curves)]
    return "\n\n".join(parts)


def markdown(result: dict[str, Any], picture: str) -> str:
    """The whole page. `picture`: the file name of the charts, or nothing."""
    models, names = result["models"], labels(result["models"])
    described: list[Sequence[str]] = []
    for name, model in zip(names, models):
        which = model["checkpoint"]
        step = BLANK if which["step"] is None else str(which["step"])
        described.append((name, which["architecture"], which["stage"] or BLANK, step, f"{which['parameters']:,}"))
    parts = ["# Models side by side", table(("model", "architecture", "stage", "step", "parameters"), described)]
    given = {name: value for name, value in result["settings"].items() if value != ""}
    if result["judge"]:
        given["judge"] = result["judge"]["path"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in given.items()))
    parts.append(tables(result))
    if picture:
        parts.append(f"![charts]({picture})")
    parts += texts(result)
    return "\n\n".join(parts) + "\n"


def texts(result: dict[str, Any]) -> list[str]:
    """A few texts of each model, with a heading."""
    models = result["models"]
    parts = []
    for name, model in zip(labels(models), models):
        found = model["generation"]
        for number, text in enumerate(found["texts"][:SHOWN] if found else [], 1):
            if number == 1:
                parts.append(f"## Texts of {name}")
            parts += [f"Prompt {number}:", _verbatim(text["prompt"]), "Written:", _verbatim(text["text"])]
    return parts


def _verbatim(text: str) -> str:
    """An indented block: nothing inside it is Markdown."""
    return textwrap.indent(text, "    ", lambda line: True) if text.strip() else "    (nothing)"
