"""Model folders: what is refused on opening, and that what the stages export opens elsewhere to the same thing."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages import evaluate, initialize, tokenizer
from stages.core import code
from stages.core.errors import UserError
from stages.models.description import describe
from stages.models.loading import load_model
from stages.tokenization import ByteView

from . import tiny
from . import tokenizers_zoo as zoo
from .test_distill import ALM, MODEL, SFT, World

TEXTS = ["don't split 12345 this  way\n\n naïve 日本語", " lead", "e\u0301 ﬁ \u00a0x", "Hello world", "trail \n"]
SHORT = {"steps": 1, "batch_size": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("models") / "results")
    source = zoo.save(zoo.legacy_llama(), bos_token="<s>", eos_token="</s>")
    specs = {
        "byte_level": {"train": {"kind": "byte_bpe", "vocab_size": 330}},
        "sentencepiece": {"train": {"kind": "sentencepiece_bpe", "vocab_size": 420}},
        "legacy": {"tokenizer": str(source), "revision": None, "digest": None},
    }
    for name, spec in specs.items():
        inputs = {"corpus": world.corpus} if "train" in spec else {}
        world.run(tokenizer.main, f"tokenizers/{name}/manifest.json", spec, **inputs)
    return world


def model_spec(path, **more):
    return MODEL | {"name": "given", "path": str(path)} | more


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "legacy"])
def test_exported_folders_open_to_the_same_tokenizer(world, kind, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, target = f"initialized/{kind}-{name}/manifest.json", f"tokenizers/{name}/manifest.json"
    base = world.model(f"base-{kind}", 300, 1, kind=kind)
    spec = {"model": MODEL | {"name": kind}, "method": "fvt", "output_embeddings_mode": "preserve", "seed": 1}
    world.run(initialize.main, place, spec, model=base, source_tokenizer=world.tokenizer, tokenizer=target)
    made = world.distill(
        f"{kind}-{name}", [SFT], train=SHORT, init=place, tokenizer=target, teacher_tokenizer=None, teacher=None
    )
    view = ByteView.load(world.root / f"tokenizers/{name}")
    for folder in ((world.root / place).parent, made["path"].parent):
        opened = AutoTokenizer.from_pretrained(folder)
        for text, tokens in zip(TEXTS, view.encode_texts(TEXTS), strict=True):
            assert opened(text, add_special_tokens=False).input_ids == tokens.ids.tolist()
        assert (len(opened), opened.eos_token_id) == (view.vocab_size, view.eos_id)
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert model.config.model_type == kind and model.config.vocab_size == view.vocab_size
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert made["metrics"]["auto_tokenizer"]


def damaged(folder, how):
    tiny.llama(folder, 300)
    weights = folder / "model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "garbage":
        weights.write_bytes(b"no weights at all")
    elif how == "pickle":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "nothing":
        weights.unlink()
    elif how == "config":
        (folder / "config.json").unlink()
    elif how == "json":
        (folder / "config.json").write_text("{")
    elif how == "heads":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    elif how == "lacking":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif how == "shape":
        tensors = load_file(weights)
        tensors["model.norm.weight"] = torch.ones(7)
        save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("cut", "its weights are damaged or cut off"),
        ("garbage", "its weights are damaged or cut off"),
        ("pickle", r"its weights are pickles \(pytorch_model.bin\), which are never opened"),
        ("nothing", "it has no weights"),
        ("config", "there is no config.json"),
        ("json", "config.json"),
        ("heads", r"hidden size \(32\) is not a multiple of the number of attention heads"),
        ("lacking", r"lack model\.layers\.1\.mlp\.up_proj\.weight"),
        ("shape", r"model.norm.weight is \(7,\) where config.json says \(32,\)"),
    ],
)
def test_damaged_folders_are_one_sentence(world, tmp_path, how, sentence):
    damaged(tmp_path / "model", how)
    spec = {"model": model_spec(tmp_path / "model"), "method": "fvt", "seed": 1}
    inputs = {"source_tokenizer": world.tokenizer, "tokenizer": world.tokenizer}
    with pytest.raises(UserError, match=f"Model 'given'.*{sentence}") as caught:
        world.run(initialize.main, f"initialized/{how}/manifest.json", spec, **inputs)
    assert "\n" not in str(caught.value)
    assert not (world.root / f"initialized/{how}/manifest.json").exists()


def test_places_without_a_model_are_one_sentence(tmp_path):
    for path, sentence in ((tmp_path / "none", "there is no such folder"), ("", "neither a path nor an artifact")):
        with pytest.raises(UserError, match=f"Model 'given'.*{sentence}"):
            load_model(model_spec(path), None)


def test_code_of_a_model_runs_only_where_the_spec_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    tiny.llama(tmp_path / "model", 300)
    config = json.loads((tmp_path / "model/config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (tmp_path / "model/own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(mark)!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'strange'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(UserError, match="custom code"):
        load_model(model_spec(tmp_path / "model"), None)
    assert not mark.exists()
    load_model(model_spec(tmp_path / "model", trust_remote_code=True), None)
    assert mark.exists()


def padded(world, name, value):
    """A student for 300 ids with 12 more rows of `value`."""
    manifest = world.model(name, 312, 2)
    weights = (world.root / manifest).parent / "model.safetensors"
    tensors = load_file(weights)
    for layer in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[layer][300:] = value
    folder = world.root.parent / f"padded-{name}"
    shutil.copytree(weights.parent, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    files = {path.name: path for path in folder.iterdir() if "manifest" not in path.name and path.name != "run.json"}
    tiny.publish(world.root / manifest, "pretrain", files, {"inputs": {}, "name": name})
    return manifest


def test_padding_rows_take_no_part(world):
    pytest.importorskip("lm_eval")
    from stages import cloze_task

    task = {"name": "next", "items": 6, "context_bytes": 80, "continuation_bytes": 24, "seed": 3}
    world.run(cloze_task.main, "tasks/next/manifest.json", task, corpus=world.corpus)
    signals = world.signals("padding", shards=1)
    suites = {
        "bits": ({"kind": "bits_per_byte", "limit": None}, {"corpus": world.corpus}),
        "tasks": ({"kind": "lm_eval", "tasks": [], "batch_size": 4}, {"tasks": ["tasks/next/manifest.json"]}),
    }
    found = []
    for value in (0.0, 3.0):
        name = f"padding-{value}"
        init = padded(world, name, value)
        made = world.distill(name, [ALM, SFT], signals=signals, init=init, train={"steps": 2})
        tensors = load_file(made["path"].parent / "model.safetensors")
        for layer in ("lm_head.weight", "model.embed_tokens.weight"):
            assert tensors[layer].shape[0] == 312 and (tensors.pop(layer)[300:] == value).all()
        results = []
        for suite, (settings, inputs) in suites.items():
            place = f"evaluations/{name}/{suite}/manifest.json"
            spec = {"model": MODEL | {"name": name}, "suite": settings, "seed": 0}
            inputs = inputs | {"tokenizer": world.tokenizer, "model": f"students/{name}/manifest.json"}
            world.run(evaluate.main, place, spec, **inputs)
            results.append(pq.read_table(world.root / place.replace("manifest.json", "samples.parquet")).to_pylist())
        found.append((world.metrics(name), tensors, results))
    (metrics, tensors, results), other = found
    assert metrics == other[0] and results == other[2]
    assert all(torch.equal(tensors[key], other[1][key]) for key in tensors)


def test_padding_columns_are_cut_from_logits(world, tmp_path):
    model = tiny.llama(tmp_path / "model", 312, kind="gemma2", tied=True)
    ids = torch.arange(9)[None]
    before = model(input_ids=ids).logits
    describe(model, "m", 312, "t").cut_padding()
    assert torch.equal(model(input_ids=ids).logits, before)
    describe(model, "m", 300, "t").cut_padding()
    assert torch.equal(model(input_ids=ids).logits, before[..., :300])


def test_fewer_rows_than_tokens_are_refused_by_lm_eval(world):
    pytest.importorskip("lm_eval")
    spec = {"model": MODEL | {"name": "student"}, "suite": {"kind": "lm_eval", "tasks": []}, "seed": 0}
    inputs = {"tokenizer": world.teacher_tokenizer, "model": world.student}
    with pytest.raises(UserError, match=r"300 embedding rows but tokenizer '.*big' has 400 ids"):
        world.run(evaluate.main, "evaluations/few/manifest.json", spec, **inputs)


def test_stages_use_only_the_code_they_need():
    """A change in the embeddings must not train again, one in the trainer must not initialize again."""
    uses = {name: code._closure((f"stages.{name}",), code.ROOT) for name in ("distill", "initialize", "evaluate")}
    uses["teacher_signals"] = code._closure(("stages.teacher_signals",), code.ROOT)
    for name, forbidden in {
        "distill": ("stages.embeddings", "stages.evaluation"),
        "initialize": ("stages.training", "stages.losses", "stages.signals"),
        "evaluate": ("stages.embeddings", "stages.losses", "stages.training.trainer", "stages.training.data"),
        "teacher_signals": ("stages.embeddings", "stages.losses", "stages.training.data", "stages.evaluation"),
    }.items():
        assert not [module for module in uses[name] if module.startswith(forbidden)], name
