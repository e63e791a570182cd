"""The process in which one side is measured: commands as JSON lines on stdin, an answer to each on stdout.

    worker.py MODULE:CLASS

A command {"do": NAME, ...} calls the method NAME of one object of the class. The process ends when its input ends.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module


def main() -> None:
    # Libraries print to stdout; the answers keep it to themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    module, name = sys.argv[1].split(":")
    session = getattr(import_module(module), name)()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(session, command.pop("do"))(**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    session.close()


if __name__ == "__main__":
    main()
