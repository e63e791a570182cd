"""Where an evaluation's results go."""

from __future__ import annotations

from pathlib import Path

from minillm.log import UserError


def make_room(output: Path, *companions: str) -> None:
    """Make the folder of a JSON file, before the long work. `companions`: the suffixes of files named after it.

    Raises:
        UserError: the name is a companion's, or the folder cannot be made.
    """
    if output.suffix in companions:
        raise UserError(
            f"--output {output}: give the JSON file, {output.with_suffix('.json')}; "
            f"{' and '.join(companions)} are named after it"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: the folder cannot be made ({error.strerror})") from error
