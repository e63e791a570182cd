"""The results of `minillm evaluate-instructions` as Markdown: tables, and the worst and the best cases."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from minillm.eval.answers import FORM

SHOWN = 3  # cases at either end
BLANK = "–"
FORM_ROWS = {
    "ended": "ended by themselves",
    "clean": "no template tokens",
    "non_empty": "not empty",
    "loop_free": "no loop",
    "compliant": "all four",
}
LIKELIHOODS = {"exact": "exact", "upper_bound": "an upper bound", "none": "this family gives none"}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, numbers to the right."""
    lines = [header, ("---",) + ("---:",) * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None, digits: int) -> str:
    return BLANK if value is None else f"{value:.{digits}f}"


def tables(result: dict[str, Any]) -> str:
    """The numbers without the cases."""
    parts = []
    quality, constraints = result["quality"], result["instructions"]
    if quality:
        nats = f"likelihood of the references, nats per token ({LIKELIHOODS[quality['likelihood']]})"
        rows: list[Sequence[str]] = [
            ("answers", str(quality["samples"])),
            ("chrF (0 to 100)", _number(quality["chrf"], 1)),
            ("ROUGE-L F1 (0 to 1)", _number(quality["rouge_l"], 3)),
            (nats, _number(quality["reference_nats_per_token"], 3)),
        ]
        parts += ["## Against references", _table(("", ""), rows)]
    groups = {"all": constraints, **constraints["by_language"]}
    parts += [
        "## Following instructions",
        _table(
            ("prompts", "number", "all constraints met", "constraints met"),
            [
                (name, str(part["prompts"]), _percent(part["prompt_accuracy"]), _percent(part["constraint_accuracy"]))
                for name, part in groups.items()
            ],
        ),
        _table(
            ("constraint", "number", "met"),
            [
                (kind, str(part["constraints"]), _percent(part["accuracy"]))
                for kind, part in constraints["by_kind"].items()
            ],
        ),
    ]
    final = result["final_answers"]
    if final:
        accuracy = f"{_percent(final['accuracy'])} ± {100 * final['standard_error']:.1f}"
        rows = [
            ("prompts", str(final["samples"])),
            ("right", accuracy),
            ("in the format of tags", _percent(final["format"])),
        ]
        parts += ["## Final answers", _table(("", ""), rows)]
    forms = {"to the data": quality["form"]} if quality else {}
    forms["to constraints"] = constraints["form"]
    if final:
        forms["to be checked"] = final["form"]
    form_rows: list[Sequence[str]] = [
        (title, *(_percent(form[check]) for form in forms.values())) for check, title in FORM_ROWS.items()
    ]
    form_rows.append(("4-grams repeated", *(_percent(form["repetition"]) for form in forms.values())))
    form_rows.append(("tokens, mean", *(_number(form["tokens"]["mean"], 1) for form in forms.values())))
    parts += ["## Form of the answers", _table(("answers", *forms), form_rows)]
    return "\n\n".join(parts)


def markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    checkpoint, settings = result["checkpoint"], result["settings"]
    parts = [
        "# How the checkpoint answers",
        "\n".join(
            f"- {name}: {value}"
            for name, value in {**checkpoint, **settings}.items()
            if value not in ("", None)  # what the checkpoint does not tell, and flags that were not given
        ),
        tables(result),
    ]
    quality = sorted(result["cases"]["quality"], key=lambda case: case["chrf"])
    parts += _ends("Against references", quality[:SHOWN], quality[SHOWN:][-SHOWN:][::-1])
    constrained = sorted(result["cases"]["instructions"], key=_met)
    failed = [case for case in constrained if not case["all_met"]]
    met = [case for case in constrained if case["all_met"]]
    parts += _ends("Following instructions", failed[:SHOWN], met[:SHOWN])
    wrong, right = (
        [case for case in result["cases"]["final_answers"] if case["right"] is which] for which in (False, True)
    )
    parts += _ends("Final answers", wrong[:SHOWN], right[:SHOWN])
    return "\n\n".join(parts) + "\n"


def _met(case: dict[str, Any]) -> tuple[float, str]:
    """The share of constraints met; then the number in the name, so that languages take turns."""
    share = sum(each["met"] for each in case["constraints"]) / len(case["constraints"])
    return share, case["name"].split("-")[1]


def _ends(title: str, worst: Sequence[dict[str, Any]], best: Sequence[dict[str, Any]]) -> list[str]:
    parts = []
    for which, cases in (("worst", worst), ("best", best)):
        if cases:
            parts.append(f"## {title}: the {which}")
        for number, case in enumerate(cases, 1):
            parts += [f"### {number}. {_name(case)}", _scores(case)]
            parts += ["Prompt:", _verbatim("\n".join(f"{turn['role']}: {turn['content']}" for turn in case["prompt"]))]
            if "reference" in case:
                parts += ["Reference:", _verbatim(case["reference"])]
            if "expected" in case:
                parts += ["Final answer:", _verbatim(case["expected"])]
            parts += ["Answer:", _verbatim(case["answer"])]
    return parts


def _name(case: dict[str, Any]) -> str:
    return case["name"] if "name" in case else f"line {case['line']} of {case['file']}"


def _scores(case: dict[str, Any]) -> str:
    if "chrf" in case:
        lines = [f"- chrF {case['chrf']:.1f}, ROUGE-L {case['rouge_l']:.3f}"]
        lines.append(f"- reference: {_number(case['reference_nats_per_token'], 3)} nats per token")
    elif "right" in case:
        lines = [f"- {'right' if case['right'] else 'wrong'}: {case['found'] or 'no answer'}"]
    else:
        lines = []
        for each in case["constraints"]:
            wanted = ", ".join(f"{name} {value}" for name, value in each.items() if name not in ("kind", "met"))
            lines.append(f"- {'met' if each['met'] else 'NOT met'}: {each['kind']}{f' ({wanted})' if wanted else ''}")
    failed = [check for check in FORM if not case[check]]
    lines.append(f"- {case['tokens']} tokens; form: {'fails ' + ', '.join(failed) if failed else 'good'}")
    return "\n".join(lines)


def _verbatim(text: str) -> str:
    """An indented block: nothing inside it is Markdown."""
    return textwrap.indent(text, "    ", lambda line: True) if text.strip() else "    (nothing)"
