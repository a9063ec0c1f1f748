"""A tiny random model of every causal architecture of transformers that can be built small."""

from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 320

# Sizes under every name that configurations have for them; each gets those that it knows.
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "n_embd": 32, "n_head": 4, "n_layer": 2,
    "n_positions": 128, "n_inner": 48, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "ffn_dim": 48,
    "word_embed_proj_dim": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "rotary_dim": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1,
    "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "topk_group": 1, "first_k_dense_replace": 1, "linear_num_value_heads": 2, "lru_width": 32,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_d_ssm": 32,
    "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 1, "n_groups": 1,
    "state_size": 8, "num_heads": 4, "expand": 2, "attention_hidden_size": 32, "sliding_window": 16, "d_ff": 48,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_layers": 2, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "attention_window_size": 16, "hidden_dim": 32, "embedding_size": 32, "conv_kernel": 4,
    "ffn_hidden_size": 48, "time_step_rank": 4, "num_layers": 2, "d_kv": 8, "linear_head_dim": 8, "linear_num_heads": 4,
    "num_experts_per_token": 2, "num_shared_experts": 1, "num_expert_group": 1, "moe_topk": 2,
}  # fmt: skip
# MLA: as many key and value heads as heads, of the size that is rotated.
LATENT = {"head_dim": 4, "num_key_value_heads": 4}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
OTHERWISE = {
    "bailing_hybrid": LATENT | {"num_hidden_layers": 4, "layer_group_size": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "lfm3": {"num_hidden_layers": 4},
    "axk1": LATENT,
    "axk2": LATENT,
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT | {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 8},
    "falcon": {"head_dim": None, "ffn_hidden_size": None},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": LATENT,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minicpm3": LATENT,
    "nemotron_h": {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8},
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "qwen3_next": HYBRID,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zaya": {"num_experts_per_tok": 1},
}

FAMILIES = (
    "afmoe", "apertus", "arcee", "aria_text", "bailing_hybrid", "bamba", "beam", "biogpt", "bitnet", "bloom", "codegen",
    "cohere", "cohere2", "cohere2_moe", "ctrl", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1",
    "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "flint",
    "gemma", "gemma2", "gemma3_text", "gemma3n_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt-sw3", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa",
    "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jamba", "jetmoe", "laguna", "lfm2",
    "lfm2_moe", "lfm3", "llama", "llama4_text", "longcat_flash", "mamba", "mamba2", "mellum", "mimo_v2_flash",
    "minicpm3", "minimax", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "mpt", "nanochat", "nemotron",
    "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next",
    "recurrent_gemma", "rwkv", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm",
)  # fmt: skip


def tiny(kind: str, **options) -> PreTrainedModel:
    """A random float32 model of this type, ready to evaluate; the same every time."""
    settings = _sizes(kind) | OTHERWISE.get(kind, {}) | options
    settings = {key: value for key, value in settings.items() if value is not None}
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # biases and norms too, which start alike
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@cache
def _sizes(kind: str) -> dict:
    known = AutoConfig.for_model(kind)
    return {key: value for key, value in SMALL.items() if hasattr(known, key)}
