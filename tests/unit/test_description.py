"""What is assumed of a model is asked of it: ties, types, positions, packing, causality, what adapters reach."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages import distill, evaluate
from stages.core.errors import UserError
from stages.embeddings import fvt
from stages.embeddings.replacement import replace_embeddings
from stages.generation.sampling import generate_batch
from stages.models.adapters import add_adapters, merged
from stages.models.configuration import positions, set_generation, set_special_ids
from stages.models.description import describe
from stages.models.export import save_model
from stages.models.loading import load_model
from stages.tokenization import ByteView
from stages.training.modes import DEFAULTS, prepare_mode

from .families import VOCAB
from .families import tiny as tiny_model
from .test_distill import SFT, World
from .tiny import publish


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("description") / "results")


def described(model, name="m"):
    return describe(model, name, VOCAB, "own")


def loaded(folder, **settings):
    return load_model({"name": "m", "path": str(folder)} | settings, None)


# ---- ties: the weights decide, whatever the configuration says


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_a_head_of_its_own_is_kept_though_the_configuration_says_tied(kind, tmp_path):
    model = tiny_model(kind, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    found = described(loaded(tmp_path / "model"))
    assert not found.tied
    head = found.head.weight.detach().clone()
    replace_embeddings(found, fvt.identity_plan(VOCAB), VOCAB, 0, False)
    save_model(found.model, found.dtypes, tmp_path / "moved")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    torch.testing.assert_close(opened.get_output_embeddings().weight, head, rtol=0, atol=0)
    assert not opened.config.tie_word_embeddings
    assert not torch.equal(opened.get_input_embeddings().weight, head)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_tied_weights_stay_tied(kind, tmp_path):
    found = described(tiny_model(kind, tie_word_embeddings=True))
    replace_embeddings(found, fvt.identity_plan(VOCAB), VOCAB, 0, False)
    save_model(found.model, found.dtypes, tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight


# ---- types: what came in float32 goes out in float32


def test_a_buffer_in_float32_stays_so(tmp_path):
    """DeepSeek V3's correction bias decides which experts work: bfloat16 would choose others."""
    model = tiny_model("deepseek_v3").to(torch.bfloat16)
    buffer = next(b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    buffer.data = torch.full_like(buffer, 0.9877, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    found = described(loaded(tmp_path / "model"))
    outer, _ = prepare_mode(found, DEFAULTS | {"train_model_mode": "full"}, 0)
    save_model(merged(outer), found.dtypes, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert {name: value.dtype for name, value in before.items()} == {name: value.dtype for name, value in after.items()}
    (name,) = [name for name in after if name.endswith("e_score_correction_bias")]
    assert after[name].dtype == torch.float32
    torch.testing.assert_close(after[name], torch.full_like(after[name], 0.9877), rtol=0, atol=0)


@pytest.mark.parametrize("stored,setting,written", [
    ("bfloat16", "float32", torch.float32), ("bfloat16", "auto", torch.bfloat16),
    ("float32", "bfloat16", torch.bfloat16), ("float16", "auto", torch.float16),
])  # fmt: skip
def test_a_student_is_written_in_the_type_that_its_setting_names(world, tmp_path, stored, setting, written):
    model = world.model(f"student-{stored}-{setting}", 300, 2, dtype=stored)
    place = f"students/{stored}-{setting}/manifest.json"
    spec = {"model": {"name": "student", "path": None, "dtype": setting}, "losses": [SFT], "seed": 0, "teacher": None}
    spec |= {"train": {"steps": 1, "batch_size": 2, "train_model_mode": "full"}}
    world.run(distill.main, place, spec, corpus=world.corpus, tokenizer=world.tokenizer, init=model)
    weights = load_file(world.root / place.replace("manifest.json", "model.safetensors"))
    assert {value.dtype for value in weights.values()} == {written}


# ---- generation settings


@pytest.mark.parametrize("settings", [
    {"do_sample": False, "temperature": 0.6}, {"do_sample": False, "top_p": 0.9, "top_k": 20},
    {"num_beams": 1, "early_stopping": True},
])  # fmt: skip
def test_generation_settings_that_have_no_effect_are_saved_as_they_are(settings, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    found = described(loaded(tmp_path / "model"))
    replace_embeddings(found, fvt.identity_plan(VOCAB), VOCAB, 0, False)
    save_model(found.model, found.dtypes, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings.items() <= written.items() | {("num_beams", 1)}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_generation_ends_at_the_end_of_a_turn_too(tokenizers_dir):
    view = ByteView.load(tokenizers_dir / "qwen1.5")
    model = tiny_model("llama")
    model.generation_config.suppress_tokens = [5]
    set_special_ids(model, view.roles, view.start_id, view.pad_id)
    ends = [view.special_named(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert model.generation_config.eos_token_id == ends == [151643, 151645]
    assert model.config.eos_token_id == ends[0] and model.generation_config.suppress_tokens is None


# ---- positions, under the names that configurations have for them


@pytest.mark.parametrize("kind,key", [
    ("llama", "max_position_embeddings"), ("gpt2", "n_positions"), ("mpt", "max_seq_len"), ("ctrl", "n_positions"),
    ("rwkv", "context_length"),
])  # fmt: skip
def test_positions(kind, key):
    model = tiny_model(kind, **{"max_position_embeddings": None, key: 48})
    assert positions(model) == 48
    with pytest.raises(UserError, match=r"d0:0 has 50 tokens but model 'm' takes at most 48: cut .* max_bytes: "):
        described(model).check_length(50, 200, "d0:0")


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "bloom"])
def test_no_limit(kind):
    found = described(tiny_model(kind))
    assert found.positions is None
    found.check_length(10**6, 10**7, "d0:0")


# ---- packing, batches, causality


@pytest.mark.parametrize("kind", [
    "gpt_oss", "falcon_mamba", "mamba2", "falcon_h1", "granitemoehybrid", "qwen3_next", "lfm2", "bloom", "opt", "mpt",
    "rwkv", "jamba",
])  # fmt: skip
def test_models_in_which_packed_examples_would_see_each_other(kind, caplog):
    with caplog.at_level(logging.INFO, "stages"):
        assert not described(tiny_model(kind)).packs
    assert "examples in one row would see each other" in caplog.text


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3", "mixtral", "olmo2"])
def test_models_that_pack(kind):
    assert described(tiny_model(kind)).packs


def test_a_model_that_answers_otherwise_in_a_batch_gets_one_prompt_at_a_time(caplog):
    found = described(tiny_model("rwkv"))
    set_generation(found.model, 4, [1], 2)
    with caplog.at_level(logging.INFO, "stages"):
        generate_batch(found, [np.arange(3, 9), np.arange(3, 6)], {}, None)
    assert "prompts come one at a time" in caplog.text


@pytest.mark.parametrize("error", [AssertionError, AttributeError, KeyError, NotImplementedError, TypeError])
def test_a_model_that_fails_in_other_than_plain_batches_gets_plain_ones(error):
    model = tiny_model("llama")

    def plain(_module, _inputs, options):
        mask, places = options.get("attention_mask"), options.get("position_ids")
        if (mask is not None and not mask.all()) or (places is not None and places.diff().lt(0).any()):
            raise error("only plain batches")

    model.model.register_forward_pre_hook(plain, with_kwargs=True)
    found = described(model)
    assert not found.packs and not found.generates_in_batches(0)


@pytest.mark.parametrize("kind", ["bert-generation", "xlm"])
def test_models_that_see_later_tokens_are_refused(kind):
    with pytest.raises(
        UserError, match=r"Model 'm' \(\w+\) is no causal language model: .*depends on the tokens after"
    ):
        described(tiny_model(kind))


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert-decoder"])
def test_models_whose_output_layer_is_more_than_a_matrix_are_refused(kind):
    with pytest.raises(UserError, match=r"Model 'm' \(\w+\) makes its logits in a way that this code does not know"):
        described(tiny_model(kind))


@pytest.mark.parametrize("kind,options", [("xmod", {}), ("longcat_flash", {"head_dim": 6})])
def test_a_model_that_cannot_be_run_is_one_sentence(kind, options):
    with pytest.raises(
        UserError, match=r"^Model 'm' \(\w+\) cannot be run on a few tokens \(\w+: .+\): choose another"
    ):
        described(tiny_model(kind, **options))


# ---- adapters


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral", "gpt_oss", "granitemoe", "olmoe"])
def test_adapters_reach_experts_and_routers(kind, caplog):
    model = tiny_model(kind)
    with caplog.at_level(logging.INFO, "stages"):
        outer, _ = add_adapters(model, "m", 2, 2, 0)
    stacks = {
        name.partition(".lora_B")[0].replace(".base_layer", "")
        for name, _ in model.named_parameters()
        if "lora_B" in name
    }
    assert any(name.endswith("experts") for name in stacks)
    assert any("gate" in name.rpartition(".")[2] or "router" in name.rpartition(".")[2] for name in stacks)
    assert "adapters on" in caplog.text and "% of the weights of its body" in caplog.text
    before = {name: value.clone() for name, value in tiny_model(kind).named_parameters()}
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data += 1
    after = dict(merged(outer).named_parameters())
    experts = [name for name in before if "experts" in name and "bias" not in name]
    assert experts and all(not torch.equal(before[name], after[name]) for name in experts)


def test_layers_that_cannot_take_an_adapter_are_left_out(caplog):
    with caplog.at_level(logging.INFO, "stages"):
        outer, reached = add_adapters(tiny_model("mamba"), "m", 2, 2, 0)
    assert "layers cannot take one" in caplog.text and "dt_proj" in caplog.text and reached > 0
    assert not any("dt_proj.lora" in name for name, _ in outer.named_parameters())


def test_a_model_whose_main_part_would_stay_frozen_is_refused():
    model = tiny_model("llama")
    extra = torch.nn.Conv1d(64, 64, 32)  # no adapter for a convolution
    model.base_model.register_module("extra", extra)
    with pytest.raises(
        UserError, match=r"adapters would reach \d+ % of the weights of its body alone .* full or embed"
    ):
        add_adapters(model, "m", 2, 2, 0)


# ---- evaluation


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "mpt", "falcon_h1"])
def test_bits_per_byte_of_models_without_attention_heads(world, kind, tmp_path):
    length = {"mpt": "max_seq_len"}.get(kind, "max_position_embeddings")
    tiny_model(kind, vocab_size=300, **{length: 512}).save_pretrained(tmp_path)
    spec = {"model": {"name": kind, "path": str(tmp_path)}, "suite": {"kind": "bits_per_byte", "limit": 2}, "seed": 0}
    place = f"evaluations/{kind}/manifest.json"
    manifest = world.run(evaluate.main, place, spec, corpus=world.corpus, tokenizer=world.tokenizer)
    assert manifest["metrics"]["results"][0]["value"] > 0 and manifest["metrics"]["forward_flops_per_byte"] > 0


def test_logits_that_no_factor_explains_are_refused():
    """A factor that no configuration names is measured, other ways are not guessed."""
    model = tiny_model("llama")
    forward = model.forward
    model.forward = lambda **inputs: type("Output", (), {"logits": 3 * forward(**inputs).logits})()
    assert described(model).head.shape.scale == pytest.approx(3, rel=1e-3)
    model.forward = lambda **inputs: type("Output", (), {"logits": forward(**inputs).logits.flip(-1)})()
    with pytest.raises(UserError, match="makes its logits in a way"):
        described(model)


# ---- ids that a model has no row for


def with_added(world, name, content, special):
    """The artifact of the world's tokenizer with one more token, whose id the world's student has no row for."""
    source = (world.root / world.tokenizer).parent
    files = {path.name: path.read_bytes() for path in source.iterdir() if path.name in TOKENIZER_FILES}
    definition = json.loads(files["tokenizer.json"])
    token = {"id": 300, "content": content, "special": special}
    definition["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False))
    files["tokenizer.json"] = json.dumps(definition).encode()
    publish(world.root / f"tokenizers/{name}/manifest.json", "tokenizer", files)
    return f"tokenizers/{name}/manifest.json"


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def test_an_id_without_a_row_that_nothing_needs_is_never_used(world):
    """As in gemma-3-1b-it, whose tokenizer has one id more than the model has rows."""
    tokenizer = with_added(world, "image", "<image>", special=True)
    assert ByteView.load(world.root / "tokenizers/image").vocab_size == 301
    spec = {"model": {"name": "student", "path": None, "dtype": "auto"}, "losses": [SFT], "seed": 0, "teacher": None}
    spec |= {"train": {"steps": 2, "batch_size": 2, "train_model_mode": "full"}}
    found = []
    for name in (tokenizer, world.tokenizer):
        place = f"students/rows-{name.split('/')[1]}/manifest.json"
        world.run(distill.main, place, spec, corpus=world.corpus, tokenizer=name, init=world.student)
        suite = {"model": {"name": "student", "path": None}, "suite": {"kind": "bits_per_byte", "limit": 2}, "seed": 0}
        scored = place.replace("students", "evaluations")
        made = world.run(evaluate.main, scored, suite, corpus=world.corpus, tokenizer=name, model=place)
        found.append(made["metrics"]["results"][0]["value"])
    assert found[0] == found[1]


@pytest.mark.parametrize("content,special", [("wort", False), ("</s2>", True)])
def test_an_id_without_a_row_that_a_text_or_a_role_needs_is_refused(world, content, special):
    tokenizer = with_added(world, f"needed-{special}".lower(), content, special)
    folder = (world.root / tokenizer).parent
    if special:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": content}))
    with pytest.raises(UserError, match=r"'m' has 300 embedding rows but tokenizer '.*' has 301 ids, of which 300 \('"):
        ByteView.load(folder).limited(300, "m")
