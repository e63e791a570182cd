"""Model cards: what a model is, how it is loaded, and whether it was checked, with the metadata that the hub reads
(YAML between two lines of dashes). Only what is known stands in them, and no path of the machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.log import UserError

if TYPE_CHECKING:
    from minillm.checkpoint.model import OpenedCheckpoint
    from minillm.convert.export import ExportSettings

SAME_SETTINGS = """\
`generate` writes one token a step in blocks of 32, the surest first, as `minillm generate --temperature 0` does. With
the same max_new_tokens, steps, block_length, threshold, temperature and seed (`--top_p 1` there) both write the same
tokens. What `minillm generate` has besides (top_k, top_p, repetition penalty, order, remask) is left out. The code
is in `modeling_minillm.py`; it needs torch and transformers only.
"""


def write_card(opened: OpenedCheckpoint, settings: ExportSettings, folder: Path, *, checked: str) -> None:
    """README.md of the folder. `checked`: what the check found the same; empty says that there was none."""
    from minillm.convert.huggingface import auto_class, kind_of

    config = opened.model.config
    remote = opened.architecture != "ar"
    metadata = {
        "library_name": "peft" if settings.adapter_only else "transformers",
        "pipeline_tag": "text-classification" if config.value_head else "text-generation",
        "tags": ["minillm", *([opened.architecture] if remote else [])],
        **known_metadata(opened),
    }
    if settings.adapter_only and settings.base:
        metadata["base_model"] = settings.base
    rows = [
        *known_rows(opened),
        ("form", "LoRA adapter, not merged" if settings.adapter_only else kind_of(opened)),
        *([("weights", settings.quantize + ", by torchao")] if settings.quantize else []),
        ("checked", checked or "no: this export was made without its check (--no_check)"),
    ]
    lines = [f"# {title_of(opened.path)}", "", table(rows), "", "Trained with MiniLLM.", ""]
    trust = ", trust_remote_code=True" if remote else ""
    load = [
        f"from transformers import {auto_class(opened)}, AutoTokenizer",
        "",
        f"model = {auto_class(opened)}.from_pretrained({'BASE' if settings.adapter_only else 'FOLDER'!r}{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained('FOLDER'{trust})",
    ]
    if settings.adapter_only:
        load[0] = f"from peft import PeftModel\n{load[0]}"
        load.append("model = PeftModel.from_pretrained(model, 'FOLDER')")
    if not config.value_head:
        load += [
            'prompt = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))",
        ]
    lines += ["```python", *load, "```", ""]
    if remote:
        lines.append(SAME_SETTINGS)
    (folder / "README.md").write_text(with_metadata("\n".join(lines), metadata), encoding="utf-8")


def title_of(path: Path) -> str:
    """What a checkpoint is called: its run, where the file's own name says nothing."""
    return path.absolute().parent.name if path.stem in ("best_model", "last") or path.stem[:5] == "step_" else path.stem


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values as a table in Markdown."""
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"| | |\n|---|---|\n{lines}"


def known_rows(opened: OpenedCheckpoint) -> list[tuple[str, str]]:
    """What the checkpoint tells of itself. Files are named without their folders."""
    from minillm.models.transformer import count_parameters

    config, facts = opened.model.config, opened.facts
    rows = [
        ("family", opened.architecture),
        ("stage", opened.stage or "unknown"),
        ("parameters", f"{count_parameters(opened.model):,}"),
        ("steps", "unknown" if opened.step is None else str(opened.step)),
        ("positions", str(config.max_position_embeddings)),
    ]
    if data := facts.get("data_state", {}).get("description"):
        rows.append(("trained on", str(data)))
    if tokens := facts.get("training_stats", {}).get("tokens_seen"):
        rows.append(("tokens seen", f"{tokens:,}"))
    if (loss := facts.get("best_validation_loss")) is not None:
        rows.append(("lowest validation loss of the run", f"{loss:.4f}"))
    if parent := facts.get("parent"):
        digest = f" (SHA-256 {parent['sha256'][:12]})" if parent.get("sha256") else ""
        rows.append(("started from", f"{base_model_of(opened) or Path(str(parent.get('path', ''))).name}{digest}"))
    return rows


def known_metadata(opened: OpenedCheckpoint) -> dict[str, Any]:
    """What of the hub's metadata the checkpoint tells: where it came from, and how good it is."""
    metadata: dict[str, Any] = {}
    if base := base_model_of(opened):
        metadata["base_model"] = base
    if (loss := opened.facts.get("best_validation_loss")) is not None:
        what = f"lowest validation loss of the run (stage {opened.stage})"
        measured = {"name": what, "type": "loss", "value": round(loss, 4)}
        metadata["metrics"] = ["loss"]
        metadata["model-index"] = [
            {
                "name": title_of(opened.path),
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "what the run held out", "type": "validation"},
                        "metrics": [measured],
                    }
                ],
            }
        ]
    return metadata


def base_model_of(opened: OpenedCheckpoint) -> str:
    """The model on the hub that the checkpoint was imported from; empty where it is not known."""
    return str(opened.facts.get("imported", {}).get("repo_id") or "")


def with_metadata(card: str, values: Mapping[str, Any]) -> str:
    """The card with these values in its metadata, over those of the same names that it has.

    Raises:
        UserError: the card's metadata is not YAML.
    """
    import yaml

    known, body = split_card(card)
    known.update(values)
    head = yaml.safe_dump(known, sort_keys=False, allow_unicode=True) if known else ""
    return f"---\n{head}---\n\n{body}" if known else body


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card. Raises UserError where the metadata is not YAML."""
    import yaml

    if not card.startswith("---\n") or "\n---\n" not in card[3:]:
        return {}, card
    head, body = card[4:].split("\n---\n", 1) if not card.startswith("---\n---\n") else ("", card[8:])
    try:
        known = yaml.safe_load(head) or {}
    except yaml.YAMLError as error:
        raise UserError(f"README.md: the metadata at its beginning is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(known, dict):
        raise UserError("README.md: the metadata at its beginning is not a list of names and values")
    return known, body.lstrip("\n")
