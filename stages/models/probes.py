"""What a causal language model really does, tried on a few tokens: no configuration says it of every model type."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from stages.models.body import body_of
from stages.models.output import check_ids, close

CUT = 5  # tokens of the first of the two examples that a model is tried with
NEW_TOKENS = 4


def sees_later_tokens(model: PreTrainedModel, vocab: int) -> bool:
    """Return whether the state at a token depends on a token after it, as in models that fill in masks."""
    ids = check_ids(vocab, model.device)
    return _depends(model, ids, {}, slice(0, CUT), slice(CUT, None))


def packs(model: PreTrainedModel, vocab: int) -> bool:
    """Return whether two examples in one row, told apart by position ids that restart, are each as if alone."""
    ids = check_ids(vocab, model.device)
    positions = {"position_ids": torch.cat([torch.arange(CUT), torch.arange(ids.shape[1] - CUT)])[None].to(ids.device)}
    try:
        if _depends(model, ids, positions, slice(CUT, None), slice(0, CUT)):
            return False
        with torch.no_grad():
            body = body_of(model)
            alone = body(input_ids=ids[:, CUT:], use_cache=False).last_hidden_state
            packed = body(input_ids=ids, use_cache=False, **positions).last_hidden_state[:, CUT:]
    except Exception:  # whatever the code of a body that takes no position ids does with them
        return False
    return close(packed, alone, model.dtype)


def generates_in_batches(model: PreTrainedModel, vocab: int, pad_id: int) -> bool:
    """Return whether prompts of two lengths, padded on the left, are continued in one batch as each is alone."""
    ids = check_ids(vocab, model.device)
    prompts = [ids[0], ids[0, CUT:]]
    alone = [generated_logits(model, [prompt], pad_id)[0] for prompt in prompts]
    try:
        together = generated_logits(model, prompts, pad_id)
    except Exception:  # whatever the code of a model that takes no padding on the left does with it
        return False
    return all(close(batch, single, model.dtype) for batch, single in zip(together, alone, strict=True))


@torch.no_grad()
def generated_logits(model: PreTrainedModel, prompts: list[torch.Tensor], pad_id: int) -> torch.Tensor:
    """Return the logits [rows, NEW_TOKENS * vocab] of the tokens that follow each prompt, one after another.

    The tokens that follow a prompt are its own first ones, so that rows stay comparable whatever is likeliest.
    """
    width = max(map(len, prompts))
    within = torch.arange(width) >= width - torch.tensor([len(prompt) for prompt in prompts])[:, None]
    padded = torch.full(within.shape, pad_id)
    padded[within] = torch.cat([prompt.cpu() for prompt in prompts])
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=pad_id, eos_token_id=None, use_cache=True,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    # Set on the model: settings that are handed over are completed by the model's own, an ending token among them.
    own, model.generation_config = model.generation_config, settings
    try:
        found = model.generate(
            input_ids=padded.to(model.device),
            attention_mask=within.long().to(model.device),
            logits_processor=[_Forced(prompts, width)],
        )
    finally:
        model.generation_config = own
    return torch.stack(found.logits, 1).flatten(1).float()


class _Forced:
    """A logits processor that leaves one token: the prompt's own, from its beginning."""

    def __init__(self, prompts: list[torch.Tensor], width: int) -> None:
        self.prompts, self.width = prompts, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.width
        chosen = torch.stack([prompt[step % len(prompt)] for prompt in self.prompts]).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def tried_layers(model: PreTrainedModel, layers: list[str]) -> tuple[set[str], set[str]]:
    """Return (names of `layers` whose weight the body reads without calling them, of those that return no tensor)."""
    called: dict[str, bool] = {}

    def note(name: str) -> Any:
        return lambda _module, _inputs, output: called.update({name: isinstance(output, torch.Tensor)})

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in layers]
    ids = check_ids(model.get_input_embeddings().weight.shape[0], model.device)
    try:
        with torch.no_grad():
            body_of(model)(input_ids=ids, use_cache=False)
        weights = {name: model.get_submodule(name).weight for name in layers if name not in called}
        read = _have_gradients(model, ids, list(weights.values()))
    finally:
        for hook in hooks:
            hook.remove()
    passed = {name for name, found in zip(weights, read, strict=True) if found}
    return passed, {name for name, tensor in called.items() if not tensor}


def _have_gradients(model: PreTrainedModel, ids: torch.Tensor, weights: list[torch.Tensor]) -> list[bool]:
    """Return whether the states of the body depend on each of `weights`."""
    asked = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    with torch.enable_grad():
        states = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state.float() if weights else None
    found = torch.autograd.grad(states.square().sum(), weights, allow_unused=True) if states is not None else []
    for weight, before in zip(weights, asked, strict=True):
        weight.requires_grad_(before)
    return [gradient is not None for gradient in found]


def looked_up(model: PreTrainedModel, vocab: int) -> list[nn.Module]:
    """Return the layers that look up the token ids themselves: the input embeddings, and whatever else does."""
    ids, found = check_ids(vocab, model.device), []

    def note(module: nn.Module, inputs: Any) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor) and torch.equal(inputs[0], ids):
            found.append(module)

    layers = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            body_of(model)(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(found))


def kept_states(model: PreTrainedModel, vocab: int) -> list[tuple[nn.Module, str, Any]]:
    """Return (module, attribute, value before) of what a pass of the body leaves in its modules."""
    body = body_of(model)
    before = {id(module): dict(vars(module)) for module in body.modules()}
    with torch.no_grad():
        body(input_ids=check_ids(vocab, model.device), use_cache=False)
    return [
        (module, key, before[id(module)].get(key))
        for module in body.modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and before[id(module)].get(key) is not value
    ]


def _depends(model: PreTrainedModel, ids: torch.Tensor, options: dict[str, Any], read: slice, seen: slice) -> bool:
    """Return whether states at the places `read` depend on the embeddings at the places `seen`: by the gradient.

    A masked weight is exactly 0, and so is its gradient; a difference of states would drown in rounding.
    """
    embedded: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # which a model may write on

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            states = body_of(model)(input_ids=ids, use_cache=False, **options).last_hidden_state[:, read].float()
            weights = torch.from_numpy(np.random.Generator(np.random.Philox(0)).normal(size=states.shape))
            (gradient,) = torch.autograd.grad((states * weights.to(states)).sum(), embedded[0])
    finally:
        hook.remove()
    return bool(gradient[:, seen].any())
