"""Rows in which the model itself has written the answers: on-policy distillation.

B batch, L length. A row may hold several packed conversations (segments); each keeps its prompt, up to its first
answer, and its place in the row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from minillm.families.base import Family, Noise, Sampling, TokenBatch
from minillm.models.transformer import LanguageModel

MOST_PROMPTS = 64  # written at once


class Place(NamedTuple):
    """Where an answer is to be written."""

    row: int
    start: int  # column of its first token
    room: int  # tokens at most: what the conversation had behind its prompt
    prompt: list[int]
    seed: int  # of its row and column: other rows of the batch do not matter


class OwnAnswers:
    """Replaces the answers of rows by ones that the model writes, at temperature 1. An answer is cut where the
    conversation ended: rows keep their shape. What followed the first answer is gone."""

    def __init__(self, family: Family, *, end_of_turn: int, end_of_text: int, pad: int) -> None:
        self.family, self.end, self.pad = family, end_of_turn, pad
        self.stop_ids = (end_of_turn, end_of_text)

    def __call__(self, model: LanguageModel, rows: TokenBatch, noise: Noise) -> TokenBatch:
        """The rows with new tokens, loss mask, positions and segments; padding where an answer is shorter."""
        length = rows.tokens.shape[1]
        tokens, mask = rows.tokens.clone(), torch.zeros_like(rows.loss_mask)
        segments = torch.zeros_like(tokens) if rows.segments is None else rows.segments.clone()
        positions = rows.positions
        if positions is None:
            positions = torch.arange(length, device=tokens.device).expand(len(tokens), length)
        positions = positions.clone()
        places = _places(rows, noise)
        answers = self._written(model, places)
        for place, answer in zip(places, answers):
            ended = len(answer) < place.room
            new = [*answer, self.end] if ended else answer[: place.room]
            begin, end = place.start, place.start + len(new)
            after = slice(end, place.start + place.room)
            tokens[place.row, begin:end] = torch.tensor(new, dtype=tokens.dtype, device=tokens.device)
            mask[place.row, begin:end] = True
            tokens[place.row, after], segments[place.row, after], positions[place.row, after] = self.pad, -1, 0
        return TokenBatch(tokens, mask, positions, segments, rows.sample_ids)

    def _written(self, model: LanguageModel, places: list[Place]) -> list[list[int]]:
        """The answer to each prompt, without the stop token. Short ones are written together."""
        order = sorted(range(len(places)), key=lambda index: places[index].room)
        answers: list[list[int]] = [[] for _ in places]
        training = model.training
        model.eval()
        device = model.head_weight.device.type
        # The cache is of the weights' type; and every length would be compiled anew.
        with torch.autocast(device, enabled=False), torch.compiler.set_stance("force_eager"):
            for start, group in self._groups([places[index] for index in order], model):
                sampling = Sampling(
                    max_new_tokens=max(place.room for place in group),
                    stop_ids=self.stop_ids,
                    seeds=tuple(place.seed for place in group),
                )
                found = self.family.generate(model, [place.prompt for place in group], sampling)
                for index, answer in zip(order[start : start + len(group)], found):
                    answers[index] = answer
        model.train(training)
        return answers

    def _groups(self, places: list[Place], model: LanguageModel) -> list[tuple[int, list[Place]]]:
        """(index of the first, places) of what fits into the model's positions together."""
        limit = model.config.max_position_embeddings
        groups: list[tuple[int, list[Place]]] = []
        for index, place in enumerate(places):
            group = groups[-1][1] if groups else []
            longest = max([len(place.prompt), *(len(other.prompt) for other in group)])
            if not group or len(group) == MOST_PROMPTS or longest + place.room > limit:
                groups.append((index, [place]))
            else:
                group.append(place)
        return groups


def _places(rows: TokenBatch, noise: Noise) -> list[Place]:
    """The prompts of all conversations that have an answer."""
    found = []
    seeds = noise.seeds.tolist()
    segments = rows.segments.tolist() if rows.segments is not None else [[0] * rows.tokens.shape[1]] * len(rows.tokens)
    for row, (tokens, trained, parts) in enumerate(zip(rows.tokens.tolist(), rows.loss_mask.tolist(), segments)):
        begin = 0
        while begin < len(parts):
            end = begin
            while end < len(parts) and parts[end] == parts[begin]:
                end += 1
            first = next((column for column in range(begin, end) if trained[column]), None)
            if parts[begin] >= 0 and first is not None and first > begin:
                found.append(Place(row, first, end - first, tokens[begin:first], seeds[row] + first))
            begin = end
    return found
