"""A GGUF file in llama.cpp (xllamacpp, its prebuilt wheel), in a process of its own: native code that crashes or hangs
takes nothing down with it, and what it prints does not reach the terminal.

Started as `python -m minillm.convert.llama_cpp REQUEST.json ANSWER.json`; nothing heavy is imported here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from minillm.log import UserError

MOST_SECONDS = 600.0
MODULE = "minillm.convert.llama_cpp"


def require() -> None:
    """UserError unless llama.cpp can be asked."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError(
            "the check of a GGUF file runs it in llama.cpp and needs xllamacpp: pip install 'minillm-trainer[export]' "
            "(--no_check exports without the check)"
        )


def ask(path: Path, request: dict[str, Any], *, seconds: float = MOST_SECONDS) -> dict[str, Any]:
    """What llama.cpp makes of a GGUF file.

    Args:
        request: context, how many positions to make room for; texts, each a string, or a list of messages that the
            file's own chat template renders as for an answer; prompts, lists of token ids; expected, the token ids that
            should follow each prompt; new_tokens, how many are asked for; likeliest, of how many tokens to tell the
            probability.

    Returns:
        ids, of each text, control tokens read as such and put before it what the tokenizer puts there; next, for each
        prompt, [[token id, natural logarithm of its probability], ..] of the likeliest next tokens; written, for each
        prompt, the greedy choice at every place. Where it is not the expected one, the expected one is put there and
        writing goes on behind it.

    Raises:
        UserError: llama.cpp refuses the file, crashes, or is not done in `seconds`.
    """
    # what this process can import, the other one can
    path_list = os.pathsep.join(each for each in sys.path if each)
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        question.write_text(json.dumps({**request, "model": str(path)}), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", MODULE, str(question), str(answer)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds,
                env={**os.environ, "PYTHONPATH": path_list},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UserError(f"llama.cpp was not done with {path.name} after {seconds:g} s and was ended") from None
        if done.returncode == 0 and answer.is_file():
            return dict(json.loads(answer.read_text(encoding="utf-8")))
        said = [line for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
        how = f"it was ended by signal {-done.returncode}" if done.returncode < 0 else "it failed"
        raise UserError(f"llama.cpp cannot run {path.name}: {how}; its last words: {' | '.join(said[-3:]) or 'none'}")


class _Server:
    """llama.cpp's own server, which listens on this machine only."""

    def __init__(self, model: str, context: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = model
        settings.n_ctx, settings.n_parallel = context, 1
        settings.n_gpu_layers = 0
        # Its threads wait for each other in loops, which on a busy machine takes longer than one thread's work.
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = max(1, (os.cpu_count() or 1) // 2)
        settings.warmup = settings.fit_params = False
        # Keys and values in 16 bits would hide what the file itself is like.
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.verbosity = 1  # errors
        self.server = xllamacpp.Server(settings)
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self.opener.open(request, timeout=MOST_SECONDS) as reply:
                return dict(json.load(reply))
        except urllib.error.HTTPError as error:  # a chat template that it cannot render, say
            raise SystemExit(f"{path}: {error.read().decode(errors='replace')}") from None

    def encode(self, text: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text, or of a conversation as it is rendered, with what the tokenizer puts before a text."""
        if not isinstance(text, str):  # rendered without the beginning that the tokenizer puts there
            text = str(self.post("/apply-template", {"messages": text})["prompt"])
        return list(self.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])

    def complete(self, prompt: list[int], new_tokens: int, likeliest: int = 0) -> dict[str, Any]:
        """Greedily."""
        return self.post("/completion", {
            "prompt": prompt, "n_predict": new_tokens, "temperature": 0, "samplers": ["temperature"],
            "n_probs": likeliest, "return_tokens": True, "cache_prompt": False,
        })  # fmt: skip

    def next(self, prompt: list[int], likeliest: int) -> list[tuple[int, float]]:
        """The likeliest next tokens; none where the first of them is no whole character, which the server tells not."""
        told = self.complete(prompt, 1, likeliest).get("completion_probabilities", [])
        return [(each["id"], each["logprob"]) for place in told for each in place["top_logprobs"]]

    def write(self, prompt: list[int], expected: list[int], new_tokens: int) -> list[int]:
        """The greedy choice after the prompt and what is expected up to there, for each place."""
        chosen: list[int] = []
        while len(chosen) < new_tokens:
            before = expected[: len(chosen)]
            if len(before) < len(chosen):  # an end was expected
                break
            tokens = self.complete(prompt + before, new_tokens - len(chosen))["tokens"]
            place = len(chosen)
            for token in tokens:
                chosen.append(token)
                if expected[place : place + 1] != [token]:
                    break
                place += 1
            if len(chosen) == len(before):
                break
        return chosen


def main(question: str, answer: str) -> None:
    """Answer a request, see `ask`."""
    request = json.loads(Path(question).read_text(encoding="utf-8"))
    server = _Server(request["model"], request["context"])
    reply = {
        "ids": [server.encode(text) for text in request["texts"]],
        "next": [server.next(prompt, request["likeliest"]) for prompt in request["prompts"]],
        "written": [
            server.write(prompt, expected, request["new_tokens"])
            for prompt, expected in zip(request["prompts"], request["expected"])
        ],
    }
    Path(answer).write_text(json.dumps(reply), encoding="utf-8")
    os._exit(0)  # the answer is there; native code that is slow or fails at the end does not matter


if __name__ == "__main__":
    main(*sys.argv[1:])
