"""Open a causal language model and give it the embeddings of another vocabulary."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from stages.core.artifact import data_path
from stages.core.errors import UserError
from stages.embeddings.fvt import Plan
from stages.embeddings.rows import assemble
from stages.tokenization.byte_functions import PROBES
from stages.training import models

NOT_OF_TRANSFORMERS = ("tokens.parquet", "byte_view.json")


def load_model(model: dict[str, Any], inputs: dict[str, Any], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load the model a spec describes: the input artifact "model" where there is one, else Hub id or folder.

    `dtype` None keeps the stored one. UserError when it is not there, cannot be read, or lacks weights.
    """
    artifact = inputs.get("model")
    try:
        loaded = models.load_model(model, artifact, dtype)
    except SafetensorError as error:
        place = artifact["path"].parent if artifact else model["path"]
        raise UserError(
            f"Model {model['name']!r} cannot be loaded from {place}: {error}; fetch or build it again."
        ) from None
    loaded.config.use_cache = True
    return loaded.eval()


def source_rows(model: PreTrainedModel, tokenizer_size: int, name: str) -> int:
    """Return how many embedding rows belong to tokens; UserError when the model has fewer than its tokenizer."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < tokenizer_size:
        raise UserError(
            f"Model {name!r} has {rows} embedding rows but its tokenizer has {tokenizer_size} tokens: "
            "give the tokenizer that this model was trained with as the source tokenizer."
        )
    return tokenizer_size


def replace_embeddings(model: PreTrainedModel, plan: Plan, rows: int, seed: int, untie: bool) -> torch.Tensor:
    """Give `model` the embeddings of `plan` in place; return the new input embedding [target, hidden].

    Its input and output embeddings, tied or not, and a bias of the head become exactly as long as the plan.
    `rows` is the number of source rows that belong to tokens. `untie` gives tied models a head of their own.
    """
    config = model.config.get_text_config()
    tied = bool(config.tie_word_embeddings)
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not hasattr(inputs, "num_embeddings") or head is None or getattr(config, "vocab_size_per_layer_input", None):
        raise UserError(f"Models of type {config.model_type} keep embeddings in a form that cannot be replaced.")
    fresh = assemble(inputs.weight, plan, rows, seed, "input embeddings")
    if tied:
        output = fresh.clone() if untie else fresh
    else:
        output = assemble(head.weight, plan, rows, seed, "output embeddings")
    if not (torch.isfinite(fresh).all() and torch.isfinite(output).all()):
        raise UserError("The source embeddings hold values that are not finite: the weights of this model are damaged.")
    if getattr(head, "bias", None) is not None:
        head.bias = torch.nn.Parameter(assemble(head.bias, plan, rows, seed, "output bias"))
    inputs.weight, inputs.num_embeddings, inputs.padding_idx = torch.nn.Parameter(fresh), len(fresh), None
    head.weight, head.out_features = torch.nn.Parameter(output), len(output)
    for part in {id(item): item for item in (model.config, config)}.values():
        part.vocab_size = len(fresh)
        part.tie_word_embeddings = tied and not untie
    if tied and not untie:
        model.tie_weights()
    return fresh


def set_special_ids(model: PreTrainedModel, start: int | None, eos: int | None, pad: int | None) -> None:
    """Write the special token ids of the target tokenizer into the model's configurations."""
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = start, eos, pad


def save_model(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Write `config.json`, `generation_config.json` and one `model.safetensors`; return facts on the weights."""
    model.save_pretrained(folder, max_shard_size="100TB")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embedding = list(model.get_input_embeddings().weight.shape)
    return {"parameters": parameters, "dtype": str(model.dtype).removeprefix("torch."), "embedding": embedding}


def copy_tokenizer(manifest: dict[str, Any], folder: Path) -> bool:
    """Copy a tokenizer artifact's files into a model's folder (whose config.json is there already).

    Returns whether AutoTokenizer opens the folder as that tokenizer. transformers 5 takes the class of some model types
    (qwen2 among them) from the model instead of tokenizer_config.json and then splits text as that model's own
    tokenizer does; an empty "auto_map" makes it read the file.
    """
    for name in manifest["data"]:
        if name not in NOT_OF_TRANSFORMERS:
            shutil.copyfile(data_path(manifest, name), folder / name)
    if _opens_as_written(folder):
        return True
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": {"AutoTokenizer": [None, None]}}
    path.write_text(json.dumps(config, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return _opens_as_written(folder)


def _opens_as_written(folder: Path) -> bool:
    written, opened = PreTrainedTokenizerFast.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return len(written) == len(opened) and written(list(PROBES)).input_ids == opened(list(PROBES)).input_ids
