"""Every family of causal models: one table, one test for each thing that the program does with a model."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from stages import initialize
from stages.alignment.pair import Pair
from stages.artifacts.schemas import EXAMPLES
from stages.core.errors import UserError
from stages.embeddings import fvt
from stages.embeddings.replacement import replace_embeddings
from stages.evaluation.asked import AskedModel
from stages.evaluation.scoring import token_bits
from stages.generation.sampling import generate_batch
from stages.losses import Loss, alm, sft
from stages.models.adapters import merged
from stages.models.body import hidden_states
from stages.models.configuration import set_generation, set_special_ids
from stages.models.description import describe
from stages.models.export import save_model
from stages.tokenization import ByteView
from stages.training.data import Collator
from stages.training.modes import DEFAULTS, prepare_mode
from stages.training.student import Student
from stages.training.trainer import Run, train
from stages.vocabulary.head import Sides

from . import tiny
from .families import FAMILIES, VOCAB
from .families import tiny as tiny_model

# Families with embeddings of tokens in every layer, which cannot be given another tokenizer.
FIXED = ("gemma3n_text",)
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """(a tokenizer, the same with its ids permuted, the new id of each old one, another tokenizer)."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.bpe(folder / "own", VOCAB)
    tiny.bpe(folder / "other", 280)
    definition = json.loads((folder / "own" / "tokenizer.json").read_text())
    new = np.random.default_rng(0).permutation(VOCAB)
    vocabulary = definition["model"]["vocab"]
    definition["model"]["vocab"] = {token: int(new[i]) for token, i in vocabulary.items()}
    for token in definition["added_tokens"]:
        token["id"] = int(new[token["id"]])
    (folder / "permuted").mkdir()
    (folder / "permuted" / "tokenizer.json").write_text(json.dumps(definition))
    config = (folder / "own" / "tokenizer_config.json").read_text()
    (folder / "permuted" / "tokenizer_config.json").write_text(config)
    own, permuted, other = (ByteView.load(folder / name) for name in ("own", "permuted", "other"))
    return own, permuted, new, other


@pytest.fixture(scope="module")
def table():
    rows = []
    for number, words in enumerate((14, 5, 6, 4)):
        text = tiny.text(number, words)
        slots = [{"role": "text", "text": text, "loss": True}]
        example = {"example_id": f"d{number}:0", "document_id": f"d{number}", "slots": slots}
        rows.append(example | {"starts_document": True, "ends_document": True, "bytes": len(text.encode())})
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


def described(kind, **options):
    return describe(tiny_model(kind, **options), kind, VOCAB, "own")


def micro_batches(found, view, pair, table):
    collate = Collator(table, view, pair, None, None, batch_size=4, max_tokens=128, seed=0, packs=found.packs)
    return collate, collate(0).micro_batches


@pytest.mark.parametrize("kind", FAMILIES)
def test_packed_equals_alone(kind, views, table):
    """Hidden states of examples as training packs them, and their log-probabilities, against each alone."""
    found = described(kind)
    _, batches = micro_batches(found, views[0], None, table)
    assert sum(len(batch.input_ids) for batch in batches) < 4 or not found.packs
    for batch in batches:
        positions = None if batch.positions is None else torch.from_numpy(batch.positions)
        with torch.no_grad():
            hidden = hidden_states(
                found.body, torch.from_numpy(batch.input_ids), positions, torch.from_numpy(batch.index)
            )
        student = batch.examples.student
        targets = torch.from_numpy(np.roll(student.ids, -1)).long()
        observed = found.head.statistics(hidden, targets, None, None)["observed_logprob"].detach()
        for start, end in zip(student.offsets, student.offsets[1:], strict=False):
            ids = torch.from_numpy(student.ids[start:end]).long()[None]
            with torch.no_grad():
                logprob = torch.log_softmax(found.model(input_ids=ids).logits[0].float(), -1)
            expected = logprob[:-1].gather(1, ids[0, 1:, None])[:, 0]
            torch.testing.assert_close(observed[start : end - 1], expected, **CLOSE)


@pytest.mark.parametrize("kind", FAMILIES)
def test_generated_in_a_batch_equals_alone(kind, views):
    found = described(kind)
    prompts = [np.arange(length, dtype=np.int32) * 5 % 300 + 3 for length in (11, 3, 7)]
    set_generation(found.model, 6, [1], 2)
    together = generate_batch(found, prompts, {}, None)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate_batch(found, [prompt], {}, None)[0]
        np.testing.assert_array_equal(row[: len(alone)], alone)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in FIXED])
def test_another_tokenizer_permutes_the_logits(kind, views):
    own, permuted, new, _ = views
    found = described(kind)
    ids = torch.arange(3, 40)[None] * 7 % VOCAB
    with torch.no_grad():
        before = found.model(input_ids=ids).logits
    replace_embeddings(found, initialize.make_plan("fvt", permuted, own, VOCAB), VOCAB, 0, False)
    set_special_ids(found.model, permuted.roles, permuted.start_id, permuted.pad_id)
    with torch.no_grad():
        after = found.model(input_ids=torch.from_numpy(new)[ids]).logits
    torch.testing.assert_close(after[..., torch.from_numpy(new)], before)
    assert found.model.generation_config.eos_token_id == permuted.eos_id == new[1]


@pytest.mark.parametrize("kind", FIXED)
def test_another_tokenizer_is_refused(kind):
    with pytest.raises(UserError, match="keeps more embeddings of its tokens than those of its input"):
        replace_embeddings(described(kind), fvt.identity_plan(VOCAB), VOCAB, 0, False)


@pytest.mark.parametrize("mode", ["full", "lora", "embeddings"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_changes_the_share_that_is_said(kind, mode, views, table, tmp_path):
    own, _, _, other = views
    found = described(kind)
    before = {name: value.clone() for name, value in found.model.named_parameters()}
    settings = DEFAULTS | {"steps": 1, "train_model_mode": mode, "model_lora_rank": 2, "learning_rate": 1e-2}
    outer, trained = prepare_mode(found, settings, 0)
    losses = [Loss("sft", sft, {"name": "sft"}, 1.0), Loss("alm", alm, {"name": "alm", "kind": "unconstrained"}, 1.0)]
    student = Student(found.model, Sides(found.side), alm.needs({}).student, own.boundary_mask(), own.eos_id)
    collate, _ = micro_batches(found, own, Pair(other, own), table)

    def ask(examples):
        count = len(examples.teacher.ids)
        examples.signals = {"observed_logprob": np.full(count, -3, np.float32)}
        examples.signals["boundary_logprob"] = np.full(count, -1, np.float32)

    result = train(Run(student, losses, collate, settings, 0, tmp_path, ask))
    assert np.isfinite(result["metrics"][0]["loss"])
    after = dict(merged(outer).named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    sizes = {name: value.numel() for name, value in before.items()}
    assert sum(sizes[name] for name in changed) / sum(sizes.values()) == pytest.approx(trained["share"], abs=0.005)


@pytest.mark.parametrize("kind", FAMILIES)
def test_exported_and_opened_again(kind, tmp_path):
    found = describe(tiny_model(kind).to(torch.bfloat16), kind, VOCAB, "own")
    norm = next(name for name in reversed(found.dtypes) if found.dtypes[name] == torch.bfloat16)
    found.dtypes[norm] = torch.float32
    state = {name: value.clone() for name, value in found.model.float().state_dict().items()}
    facts = save_model(found.model, found.dtypes, tmp_path)
    assert facts["parameters"] == found.parameters["parameters"]
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in opened.state_dict().items():
        torch.testing.assert_close(value.float(), state[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_bits(kind, views, table):
    found, batch = described(kind), views[0].encode_examples(table["slots"].to_pylist())
    scored = np.ones(len(batch.ids), bool)
    scored[batch.offsets[:-1]] = False
    bits = token_bits(found, batch.ids, batch.offsets, scored, 10**6)
    for start, end in zip(batch.offsets, batch.offsets[1:], strict=False):
        ids = torch.from_numpy(batch.ids[start:end]).long()[None]
        with torch.no_grad():
            logprob = torch.log_softmax(found.model(input_ids=ids).logits[0].double(), -1)
        expected = -logprob[:-1].gather(1, ids[0, 1:, None])[:, 0] / np.log(2)
        np.testing.assert_allclose(bits[start + 1 : end], expected, rtol=1e-3)


@pytest.mark.parametrize("kind", FAMILIES)
def test_asked_by_lm_eval(kind, views):
    """Log-likelihoods that lm-eval's own class finds in a batch, and what it lets the model write."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(views[0].folder)
    found = described(kind)
    asked = AskedModel(found, tokenizer, 4)
    pairs = [("the model reads", " text"), ("a", " list holds items"), ("strings are", " sequences of code points and")]
    requests = [Instance("loglikelihood", {}, pair, n, ("task", n, 1)) for n, pair in enumerate(pairs)]
    for (before, after), (value, _) in zip(pairs, asked.loglikelihood(requests, disable_tqdm=True), strict=True):
        given, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in (before, before + after))
        with torch.no_grad():
            logprob = torch.log_softmax(found.model(input_ids=torch.tensor([whole])).logits[0].double(), -1)
        places = range(len(given), len(whole))
        assert value == pytest.approx(sum(float(logprob[p - 1, whole[p]]) for p in places), rel=1e-3)
    settings = {"until": ["zzz"], "max_gen_toks": 4, "do_sample": False}
    asks = [Instance("generate_until", {}, (pair[0], settings), n, ("task", n, 1)) for n, pair in enumerate(pairs)]
    together = asked.generate_until(asks, disable_tqdm=True)
    assert together == [asked.generate_until([ask], disable_tqdm=True)[0] for ask in asks]
