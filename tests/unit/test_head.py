"""Head statistics against plain autograd, and against the logits of real model classes."""

import itertools

import pytest
import torch

from stages.vocabulary.statistics import head_statistics

CASES = list(itertools.product([None, 5.0], [False, True], [1.0, 0.3], [True, False]))


def naive(hidden, weight, targets, mask, eos, vocab, bias, softcap, scale):
    logits = (hidden @ weight.T + (0 if bias is None else bias)).float()[:, :vocab] * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits, -1)
    return {
        "observed_logprob": logprobs.gather(1, targets[:, None])[:, 0],
        "boundary_logprob": logprobs[:, mask].logsumexp(-1),
        "eos_logprob": logprobs[:, eos],
    }


def tensors(dtype=torch.float32, spread=1.0, with_bias=False):
    source = torch.Generator().manual_seed(5)
    draw = lambda *size: torch.randn(*size, generator=source)  # noqa: E731
    hidden = (draw(37, 8) * spread).to(dtype).requires_grad_()
    weight = draw(29, 8).to(dtype).requires_grad_()
    bias = draw(29).to(dtype).requires_grad_() if with_bias else None
    targets = torch.randint(0, 23, (37,), generator=source)
    mask = torch.zeros(23, dtype=torch.bool)
    mask[[1, 4, 7, 20]] = True
    outer = [draw(37) for _ in range(3)]
    return hidden, weight, bias, targets, mask, outer


def compare(actual, expected, leaves, outer, rtol, atol):
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=rtol, atol=atol)
    grads = []
    for statistics in (actual, expected):
        total = sum((value * weight).sum() for value, weight in zip(statistics.values(), outer, strict=True))
        grads.append(torch.autograd.grad(total, leaves, retain_graph=True))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("softcap,with_bias,scale,small_blocks", CASES)
def test_equals_autograd(softcap, with_bias, scale, small_blocks):
    hidden, weight, bias, targets, mask, outer = tensors(with_bias=with_bias)
    actual = head_statistics(hidden, weight, targets, mask, 3, 23, bias, softcap, scale, 5 if small_blocks else None)
    expected = naive(hidden, weight, targets, mask, 3, 23, bias, softcap, scale)
    leaves = [hidden, weight] + ([bias] if with_bias else [])
    compare(actual, expected, leaves, outer, 1e-4, 1e-5)
    assert torch.autograd.grad(actual["observed_logprob"].sum(), weight)[0][23:].abs().max() == 0  # padding rows


def test_bfloat16_and_autocast():
    hidden, weight, _, targets, mask, outer = tensors(torch.bfloat16)
    actual = head_statistics(hidden, weight, targets, mask, 3, 23, block=5)
    expected = naive(hidden, weight, targets, mask, 3, 23, None, None, 1.0)
    compare(actual, expected, [hidden, weight], outer, 3e-2, 3e-2)
    hidden, weight, _, targets, mask, outer = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = head_statistics(hidden, weight, targets, mask, 3, 23, block=5)
    assert actual["observed_logprob"].dtype == torch.float32
    exact = naive(hidden, weight, targets, mask, 3, 23, None, None, 1.0)
    compare(actual, exact, [hidden, weight], outer, 5e-2, 1e-1)


def test_only_what_is_asked():
    hidden, weight, _, targets, mask, _ = tensors()
    assert list(head_statistics(hidden, weight, targets, vocab=23)) == ["observed_logprob"]
    statistics = head_statistics(hidden, weight.detach(), targets, mask, vocab=23)
    statistics["boundary_logprob"].sum().backward()
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_extreme_logits_stay_finite():
    hidden, weight, _, targets, mask, outer = tensors(spread=200.0)
    actual = head_statistics(hidden, weight, targets, mask, 3, 23)
    expected = naive(hidden.double(), weight.double(), targets, mask, 3, 23, None, None, 1.0)
    assert actual["boundary_logprob"].min() < -100
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value.float(), rtol=1e-4, atol=1e-2)
    total = sum((value * weight).sum() for value, weight in zip(actual.values(), outer, strict=True))
    exact = sum((value * weight).sum() for value, weight in zip(expected.values(), outer, strict=True))
    gradients = (torch.autograd.grad(value, [hidden, weight]) for value in (total, exact))
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-1)


def tiny(kind, vocab=41, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": vocab, "head_dim": 8}
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": vocab}
    config = AutoConfig.for_model(kind, **sizes, **options)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "kind,options",
    [
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("granite", {"logits_scaling": 8.0}),
        ("phi", {}),
        ("gpt2", {}),
    ],
)
def test_head_of_model_classes(kind, options):
    from stages.models.body import body_of
    from stages.models.description import describe

    model = tiny(kind, **options)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    head = describe(model, "teacher", 37, "small").head  # four padding columns
    ids = torch.arange(9)[None]
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :, :37].float(), -1)
    hidden = body_of(model)(input_ids=ids).last_hidden_state[0]
    got = head.statistics(hidden, torch.full((9,), 5), None, 7)
    torch.testing.assert_close(got["observed_logprob"], logprobs[:, 5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["eos_logprob"], logprobs[:, 7], rtol=1e-4, atol=1e-5)


def test_refused_models():
    from stages.core.errors import UserError
    from stages.models.description import describe

    model = tiny("llama")
    with pytest.raises(UserError, match="'teacher' has 41 embedding rows but tokenizer 'big' has 50 ids"):
        describe(model, "teacher", 50, "big")
    with pytest.raises(UserError, match=r"at most 64: cut the corpus shorter, with max_bytes: \d+"):
        describe(model, "teacher", 41, "small").check_length(100, 300, "d0:0")
    forward = model.forward
    model.forward = lambda **inputs: type("Output", (), {"logits": forward(**inputs).logits ** 2})()
    with pytest.raises(UserError, match="in a way that this code does not know"):
        describe(model, "teacher", 41, "small")
