"""Write a model folder that AutoModelForCausalLM and AutoTokenizer open to exactly this model and tokenizer."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from stages.core.artifact import data_path
from stages.models.configuration import set_tied
from stages.models.description import is_tied
from stages.tokenization.byte_functions import PROBES

TOKENIZER_ONLY = ("tokens.parquet", "byte_view.json")  # files of a tokenizer artifact that transformers does not read

# A module of the folder, as `auto_map` wants it named; read only by who sets trust_remote_code.
_PLAIN_MODULE = "plain_tokenizer"
_PLAIN_SOURCE = '''"""Opens tokenizer.json as it is written, whatever tokenizer its model type came with."""

from transformers import PreTrainedTokenizerFast


class PlainTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer with nothing of its own."""
'''


def save_model(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype], folder: Path) -> dict[str, Any]:
    """Write `config.json`, `generation_config.json` and one `model.safetensors`; return facts on the weights.

    `dtypes`: the type that each tensor of the state is stored in, by its name.
    """
    model = model.to("cpu")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])
    set_tied(model, is_tied(model))
    generation, model.generation_config = model.generation_config, GenerationConfig()
    try:
        # Its generation settings are written as they are: transformers refuses those that have no effect.
        model.save_pretrained(folder, max_shard_size="100TB")
    finally:
        model.generation_config = generation
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json", use_diff=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embedding = list(model.get_input_embeddings().weight.shape)
    return {"parameters": parameters, "dtype": str(model.dtype).removeprefix("torch."), "embedding": embedding}


def copy_tokenizer(manifest: dict[str, Any], folder: Path) -> bool:
    """Copy a tokenizer artifact's files into a model's folder (whose config.json is there already).

    Returns whether AutoTokenizer opens the folder as that tokenizer. For some model types (qwen2, phi3 and more of
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS in transformers 5) it ignores `tokenizer_class` and splits text as the
    type's own tokenizer does. An "auto_map" is the one entry that makes it follow the file; its entry names a
    module that exists, since transformers 4, and 5 with trust_remote_code, would otherwise fail.
    """
    for name in manifest["data"]:
        if name not in TOKENIZER_ONLY:
            shutil.copyfile(data_path(manifest, name), folder / name)
    if _opens_as_written(folder):
        return True
    path = folder / "tokenizer_config.json"
    named = {"auto_map": {"AutoTokenizer": [None, f"{_PLAIN_MODULE}.PlainTokenizer"]}}
    config = json.loads(path.read_text(encoding="utf-8")) | named
    path.write_text(json.dumps(config, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (folder / f"{_PLAIN_MODULE}.py").write_text(_PLAIN_SOURCE, encoding="utf-8")
    return _opens_as_written(folder)


def _opens_as_written(folder: Path) -> bool:
    written, opened = PreTrainedTokenizerFast.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return len(written) == len(opened) and written(list(PROBES)).input_ids == opened(list(PROBES)).input_ids
