"""Batches of text from a causal language model, by transformers' `generate`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stages.models.configuration import padding_id
from stages.models.description import Description


class Draw(LogitsProcessor):
    """Leaves one token of each row's distribution, so that greedy search draws it.

    The token is where the distribution function passes the row's number in [0, 1) for this step, `uniforms` float64
    [rows, steps]. So what a row gets depends on its own numbers, and not on the rows beside it.
    """

    def __init__(self, uniforms: np.ndarray, warpers: LogitsProcessorList, prompt_length: int) -> None:
        self.uniforms, self.warpers, self.prompt_length = torch.from_numpy(uniforms), warpers, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores [rows, vocab]: 0 for the token drawn and -inf for all others."""
        probability = torch.softmax(self.warpers(input_ids, scores).double(), -1)
        edges = probability.cumsum(-1)
        here = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None].to(edges.device)
        drawn = (edges <= here * edges[:, -1:]).sum(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def warpers(sampling: dict[str, Any]) -> LogitsProcessorList:
    """Return what shapes a distribution before a draw, in the order of transformers: temperature, top_k, top_p."""
    chosen = LogitsProcessorList()
    if sampling["temperature"] != 1.0:
        chosen.append(TemperatureLogitsWarper(sampling["temperature"]))
    if sampling["top_k"]:
        chosen.append(TopKLogitsWarper(sampling["top_k"]))
    if sampling["top_p"] < 1.0:
        chosen.append(TopPLogitsWarper(sampling["top_p"]))
    return chosen


def generate_batch(
    teacher: Description, prompts: Sequence[np.ndarray], sampling: dict[str, Any], uniforms: np.ndarray | None
) -> np.ndarray:
    """Return int64 [rows, steps]: the tokens after each prompt (int arrays), padding after an ending token.

    A model that would give other answers in a batch gets one prompt at a time. `uniforms` float64 [rows,
    max_new_tokens] in [0, 1) for draws, None for the likeliest token at every step. `set_generation` of
    `stages.models.configuration` comes first.
    """
    pad = padding_id(teacher.model)
    if len(prompts) == 1 or teacher.generates_in_batches(pad):
        return _generate_together(teacher.model, prompts, sampling, uniforms)
    places = range(len(prompts))
    drawn = [None if uniforms is None else uniforms[place : place + 1] for place in places]
    rows = [_generate_together(teacher.model, [prompts[i]], sampling, drawn[i])[0] for i in places]
    found = np.full((len(rows), max(map(len, rows))), pad, np.int64)
    for place, row in enumerate(rows):
        found[place, : len(row)] = row
    return found


@torch.inference_mode()
def _generate_together(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], sampling: dict[str, Any], uniforms: np.ndarray | None
) -> np.ndarray:
    """Return what `generate_batch` does, of prompts padded on the left to one batch."""
    width = max(len(ids) for ids in prompts)
    within = np.arange(width)[None, :] >= width - np.array([len(ids) for ids in prompts])[:, None]
    padded = np.full(within.shape, padding_id(model), np.int64)
    padded[within] = np.concatenate(prompts)
    processors = LogitsProcessorList() if uniforms is None else [Draw(uniforms, warpers(sampling), width)]
    found = model.generate(
        input_ids=torch.from_numpy(padded).to(model.device),
        attention_mask=torch.from_numpy(within).long().to(model.device),
        logits_processor=LogitsProcessorList(processors),
    )
    return found[:, width:].cpu().numpy()
