"""A loaded model as lm-eval asks it: its own model class, with every request checked by task and document."""

from collections import Counter
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedTokenizerBase

from stages.core.errors import UserError
from stages.models.description import Description

CUT = "prompts did not fit the model's {limit} tokens together with their answers and lost their beginning"
JOINED = "answers share a token with the end of their prompt and are scored in tokens of their own"
ANCHORS = ("\n", "!", "a")


class AskedModel(HFLM):
    """lm-eval's model class; where that fails on a request, a UserError names task, document and what was asked.

    An answer that shares a token with its prompt, on which lm-eval fails, is scored in tokens of its own. `notes`
    counts (task, sentence) of what changes numbers.
    """

    def __init__(self, described: Description, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UserError(
                "The tokenizer has neither a bos nor an eos token, and lm-eval sets one of them before a text: add one."
            )
        super().__init__(
            pretrained=described.model, tokenizer=tokenizer, batch_size=batch_size, max_length=described.positions
        )
        self.described = described
        self.notes: Counter[tuple[str, str]] = Counter()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy search would write it) of each request's answer after its prompt."""
        encoded = [(request.args, *self._encoded(request)) for request in requests]
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each request's whole text."""
        for request in requests:
            _texts(request, request.args)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each request's prompt; UserError when there is no room for one."""
        for request in requests:
            prompt, settings = request.args
            _texts(request, (prompt,))
            asked = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            if asked >= self.max_length:
                raise UserError(
                    f"Task {request.task_name} asks for {asked} new tokens but the model has {self.max_length} "
                    "positions for prompt and answer together: set a smaller `max_gen_toks` under the task's "
                    "generation_kwargs, or leave the task out."
                )
            if len(self.tok_encode(prompt)) > self.max_length - asked:
                self.notes[request.task_name, CUT.format(limit=self.max_length)] += 1
        if not self.described.generates_in_batches(self.tokenizer.pad_token_id):
            self.batch_size_per_gpu = 1
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _encoded(self, request: Instance) -> tuple[list[int], list[int]]:
        """Return (ids that are given, ids that are scored) of a request, as lm-eval splits it."""
        prompt, answer = _texts(request, request.args)
        if prompt:
            given, scored = self._encode_pair(prompt, answer)
        else:
            given, scored = [self.prefix_token_id], self.tok_encode(answer, add_special_tokens=False)
            if scored[:1] == given:
                scored = scored[1:]
        if not scored and answer and prompt:
            kept = prompt.rstrip()
            scored = self._alone(prompt[len(kept) :] + answer)
            self.notes[request.task_name, JOINED] += 1
        if not scored:
            raise UserError(f"{place(request)}: the answer {answer!r} has no token that could be scored; correct it.")
        if len(scored) > self.max_length:
            raise UserError(
                f"{place(request)}: the answer has {len(scored)} tokens but the model takes at most "
                f"{self.max_length}; shorten it, or leave the task out."
            )
        given = given or [self.prefix_token_id]
        if len(given) + len(scored) > self.max_length + 1:
            self.notes[request.task_name, CUT.format(limit=self.max_length)] += 1
        return given, scored

    def _alone(self, text: str) -> list[int]:
        """Return the ids of a text that goes on from another, without what a tokenizer sets before a text's start."""
        for anchor in ANCHORS:
            before, whole = (self.tok_encode(part, add_special_tokens=False) for part in (anchor, anchor + text))
            if whole[: len(before)] == before:
                return whole[len(before) :]
        return []


def place(request: Instance) -> str:
    """Return "Task t, document 3" of a request."""
    return f"Task {request.task_name}, document {request.doc_id}"


def _texts(request: Instance, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a request, which must be texts."""
    for value in arguments:
        if not isinstance(value, str):
            raise UserError(
                f"{place(request)}: what is asked or scored must be text, found {type(value).__name__} {value!r}; "
                "correct doc_to_text, doc_to_target or doc_to_choice."
            )
    return arguments
