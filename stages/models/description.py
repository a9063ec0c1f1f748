"""What the rest of the program may assume of a causal language model: asked or tried here, and nowhere else.

A description lives as long as its model and is made anew for each job: what it says can hang on the device, the type
and the attention kernel that the job runs with, and trying it takes a few passes over a dozen tokens.
"""

import logging
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.core.errors import UserError
from stages.models import configuration, probes
from stages.models.body import body_of
from stages.models.output import find_head
from stages.vocabulary.head import Head, Side

if TYPE_CHECKING:
    from stages.tokenization import ByteView

LOG = logging.getLogger(__name__)
T = TypeVar("T")


class Description:
    """A causal language model and what is known of it; made by `describe`.

    name: as the config calls it; vocab: ids in use, the rows of its embeddings and columns of its logits beyond them
    are padding; body; embed, which makes vectors [n, d] of ids [n]; head. `dtypes`: the type of every tensor as it was
    loaded, in which it is exported.
    """

    def __init__(self, model: PreTrainedModel, name: str, vocab: int) -> None:
        self.model, self.name, self.vocab = model, name, vocab
        self.embed: nn.Module = model.get_input_embeddings()
        self._batches: dict[int, bool] = {}
        self.dtypes = {key: tensor.dtype for key, tensor in model.state_dict().items()}
        self.body = body_of(model)
        self.head: Head = self._tried(self._find)

    @property
    def kind(self) -> str:
        """The class of the model."""
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:
        """The device that token ids go to."""
        return self.embed.weight.device

    @property
    def side(self) -> Side:
        """The model as losses see it."""
        return Side(self.head, self.embed)

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding, by the weights: a configuration may say what is not so."""
        return is_tied(self.model)

    @property
    def positions(self) -> int | None:
        """How many tokens a sequence may have, None where nothing limits it."""
        return configuration.positions(self.model)

    @cached_property
    def packs(self) -> bool:
        """Whether examples packed in one row are as if alone; where not, each has a row of its own."""
        found = self._tried(probes.packs)
        if not found:
            LOG.info("Model %r (%s): examples in one row would see each other, so each has its own.", *self._who)
        return found

    def generates_in_batches(self, pad_id: int) -> bool:
        """Return whether prompts padded on the left are continued as they are alone; where not, one at a time."""
        if pad_id not in self._batches:
            self._batches[pad_id] = self._tried(lambda *tried: probes.generates_in_batches(*tried, pad_id))
            if not self._batches[pad_id]:
                LOG.info("Model %r (%s): a batch would change its answers, so prompts come one at a time.", *self._who)
        return self._batches[pad_id]

    @property
    def parameters(self) -> dict[str, int]:
        """How many parameters there are, in all, outside the embeddings, and in the head; tied ones count once."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        inputs, head = self.embed.weight.numel(), self.head.weight.numel()
        rest = total - inputs - (0 if self.tied else head)
        return {"parameters": total, "non_embedding_parameters": rest, "head_parameters": head}

    def check_length(self, longest: int, longest_bytes: int, example: str) -> None:
        """Refuse an example of `longest` tokens that the model has no positions for."""
        if self.positions and longest > self.positions:
            fits = max(16, int(longest_bytes * self.positions / longest * 0.9))
            raise UserError(
                f"Example {example} has {longest} tokens but model {self.name!r} takes at most {self.positions}: "
                f"cut the corpus shorter, with max_bytes: {fits}."
            )

    def cut_padding(self) -> None:
        """Make the model itself give logits of the ids in use alone, so that padding takes no part in any softmax."""
        if self.head.weight.shape[0] > self.vocab:
            self.head.layer.register_forward_hook(lambda _module, _inputs, logits: logits[..., : self.vocab])

    def checkpoint_gradients(self) -> None:
        """Make training recompute activations; UserError for a model that cannot."""
        try:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise UserError(
                f"Model {self.name!r} ({self.kind}) cannot recompute activations ({error}): "
                "set train.gradient_checkpointing to false."
            ) from None

    def _find(self, model: PreTrainedModel, vocab: int) -> Head:
        """Return the output layer of a model that is causal."""
        self._forget_between_passes()
        head = find_head(model, vocab, self.name)
        if probes.sees_later_tokens(model, vocab):
            raise UserError(
                f"Model {self.name!r} ({self.kind}) is no causal language model: what it says at a token depends on "
                "the tokens after it; choose another model, or set is_decoder in its config.json if it was trained so."
            )
        return head

    def _forget_between_passes(self) -> None:
        """Make a body that keeps states in its modules begin every pass without a cache as it was made."""
        kept = probes.kept_states(self.model, self.vocab)

        def forget(_body: nn.Module, _inputs: Any, options: dict[str, Any]) -> None:
            if options.get("use_cache") is False:
                for module, key, value in kept:
                    setattr(module, key, value)

        if kept:
            self.body.register_forward_pre_hook(forget, with_kwargs=True)

    @property
    def _who(self) -> tuple[str, str]:
        return self.name, self.kind

    def _tried(self, probe: Callable[[PreTrainedModel, int], T]) -> T:
        """Return what a probe finds of the model in evaluation; UserError when the model cannot be run at all."""
        training = self.model.training
        self.model.eval()
        try:
            return probe(self.model, self.vocab)
        except UserError:
            raise
        except Exception as error:  # whatever the code of a model type raises
            reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
            raise UserError(
                f"Model {self.name!r} ({self.kind}) cannot be run on a few tokens ({type(error).__name__}: {reason}): "
                "choose another model, or mend its config.json."
            ) from error
        finally:
            self.model.train(training)


def describe(model: PreTrainedModel, name: str, vocab: int, tokenizer: str) -> Description:
    """Return the description of `model`, called `name`, for a tokenizer of `vocab` ids.

    UserError when it has fewer rows than ids, when it is not causal, or when its logits are no linear layer of its
    last hidden states with a factor and a soft cap.
    """
    if rows_of(model) < vocab:
        raise UserError(
            f"Model {name!r} has {rows_of(model)} embedding rows but tokenizer {tokenizer!r} has {vocab} ids: "
            "give the model the tokenizer it was trained with, or initialize it for this one."
        )
    found = Description(model, name, vocab)
    LOG.info(
        "Model %r (%s): %d parameters, %d rows for %d ids, %s output layer, %s.", *found._who,
        found.parameters["parameters"], found.head.weight.shape[0], vocab, "tied" if found.tied else "untied",
        f"{found.positions} positions" if found.positions else "no limit of positions",
    )  # fmt: skip
    return found


def last_block_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the last of the blocks that the body is made of, None where it has none."""
    wanted = configuration.layers(model)
    lists = [module for module in body_of(model).modules() if isinstance(module, nn.ModuleList) and len(module)]
    lists.sort(key=lambda module: (len(module) != wanted, -len(module)))
    return lists[0][-1] if lists else None


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether input and output embeddings are one tensor."""
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    return output is not None and getattr(inputs, "weight", None) is output.weight


def rows_of(model: PreTrainedModel) -> int:
    """Return how many ids a model has embeddings and logits for."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [weight for layer in layers if (weight := getattr(layer, "weight", None)) is not None]
    return min(weight.shape[0] for weight in weights)


def usable(view: "ByteView", model: PreTrainedModel, name: str) -> "ByteView":
    """Return a tokenizer without the ids that `model` has no row for; UserError when text or template need one."""
    return view.limited(rows_of(model), name)
