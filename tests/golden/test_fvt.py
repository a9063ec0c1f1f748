"""FVT against tokenkit (exact rows, and decompositions of real vocabularies) and against its first authors' code.

Four families of reference values are not ours, on purpose; each is checked for what it should be instead:
- Bytes that are no UTF-8: the reference draws at random, we average the fewest source tokens that spell them.
- Sources whose encoder does not give the bytes back (of llama2 it puts SentencePiece's dummy space before every token:
  "20" becomes " ", "2", "0"): ours spell the token.
- Specials. The reference has no key for eos, so that an eos that is also pad (or bos) takes the source's pad; it makes
  template pieces that are ordinary tokens of specials and the other way round (Qwen's newline of Llama 3's
  `<|end_header_id|>`); and it spells a special without a counterpart as text, where ours takes a stand-in.
- LeonidasY's code strips a leading space mark and tokenises the byte-level string as text. `plain_text` below does
  the same, and then every row agrees.
"""

import json
from functools import cache

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from stages.embeddings import fvt
from stages.embeddings.rows import assemble
from stages.initialize import vocabulary
from stages.tokenization import ByteView
from tests.conftest import golden_file
from tests.golden.compare import model_kinds, values
from tests.golden.test_alignment import view_of_kind

RULES = {"average": "mean"}


def cases(golden, name):
    return json.loads(golden_file(golden, f"{name}.json").read_text(encoding="utf-8"))


def spells(vocabulary_, ids):
    return b"".join(vocabulary_.token_bytes[i] or b"\xff" for i in ids)


def test_fvt_tokenkit(golden):
    arrays = np.load(golden_file(golden, "fvt_tokenkit.npz"))
    view = cache(lambda name: vocabulary(ByteView.load(golden_file(golden, f"small_tokenizers/{name}"))))
    for case in cases(golden, "fvt_tokenkit"):
        key, rows = case["id"], case["source_embedding_rows"]
        source, target = view(case["source_tokenizer"]), view(case["target_tokenizer"])
        plan = fvt.plan(target, source, rows=rows, exact=case["allow_exact_match"])
        embedding = torch.from_numpy(arrays[f"source_embeddings_{key}"])
        made = assemble(embedding, plan, rows, seed=0, name=key).numpy()
        expected = arrays[f"new_embeddings_{key}"].copy()
        given = arrays[f"source_embeddings_{key}"]
        drawn = arrays[f"random_fallback_indices_{key}"].tolist()
        averaged = set(arrays[f"diff_indices_{key}"].tolist()) - set(drawn)
        for index in averaged & target.special_texts.keys():  # spelled as text by the reference
            if plan.rules[index] == "special":
                expected[index] = given[plan.sources[index][0]]
        compared = np.setdiff1d(np.arange(len(expected)), drawn)
        values(made[compared], expected[compared], key)
        copied = [index for index in range(len(expected)) if index not in averaged and index not in drawn]
        assert all(plan.rules[index] in ("copy", "special") for index in copied), key
        np.testing.assert_array_equal(made[copied], expected[copied], err_msg=key)
        for index in drawn:
            if plan.rules[index] == "mean":
                assert spells(source, plan.sources[index]) == target.token_bytes[index] or rows < len(
                    source.token_bytes
                )
                values(made[index], given[plan.sources[index]].mean(0))
            else:
                assert rows < len(source.token_bytes), f"{key}: row {index} is drawn although its bytes can be spelled"


@pytest.fixture(scope="module")
def opened(golden, tokenizers_dir):
    """A function from a real tokenizer's name to its vocabulary, by the model kind that the golden files give it."""
    kinds = model_kinds(golden)

    @cache
    def open_vocabulary(name):
        return vocabulary(view_of_kind(tokenizers_dir / name, kinds.get(name)))

    return open_vocabulary


def test_fvt_real_decompositions(golden, tokenizers_dir, opened):
    checked = 0
    for case in cases(golden, "fvt_real_decompositions"):
        pair = case["source"], case["target"]
        if not all((tokenizers_dir / name).is_dir() for name in pair):
            continue
        checked += 1
        source, target = map(opened, pair)
        plan = fvt.plan(target, source, rows=len(source.token_bytes))
        for index, token, category, ids in case["rows"]:
            where = f"{pair} {index} {token!r}"
            made = (plan.rules[index], plan.sources[index])
            if index in target.special_texts:
                check_special(target, source, index, category, ids, made, where)
            elif category == "special" or spells(source, ids) != target.token_bytes[index]:
                if category == "random_fallback":
                    with pytest.raises(UnicodeDecodeError):
                        target.token_bytes[index].decode()
                assert made[0] in ("mean", "copy") and spells(source, made[1]) == target.token_bytes[index], where
            else:
                assert made == (RULES.get(category, category), ids), where
    if not checked:
        pytest.skip(f"{tokenizers_dir} has no pair of tokenizers of fvt_real_decompositions.json")


def check_special(target, source, index, category, ids, made, where):
    """Compare with the reference's source, but where ours is the source's eos, a special's text or a stand-in."""
    roles = [role for role, special in target.roles.items() if special == index]
    if "eos" in roles and "end_of_turn" not in roles and "eos" in source.roles:
        assert made == ("special", [source.roles["eos"]]), where
    elif category == "special" and ids[0] in source.special_texts:
        assert made == ("special", ids), where
    elif made[0] == "special":
        assert made[1][0] in source.special_texts and category != "special", where
    else:
        assert spells(source, made[1]) == target.special_texts[index].encode(), where


def test_fvt_leonidas(golden):
    arrays = np.load(golden_file(golden, "fvt_leonidas.npz"))
    for case in cases(golden, "fvt_leonidas"):
        key = case["id"]
        names = case["source_tokenizer"], case["target_tokenizer"]
        source, target = (
            Tokenizer.from_file(str(golden_file(golden, f"small_tokenizers/{name}/tokenizer.json"))) for name in names
        )
        strings = [target.id_to_token(index) for index in range(target.get_vocab_size())]
        plan = plain_text(strings, source)
        for index, row in enumerate(arrays[f"mapping_{key}"].tolist()):
            assert plan.sources[index] == [i for i in row if i >= 0], f"{key} {index} {strings[index]!r}"
        embedding = torch.from_numpy(arrays[f"source_embeddings_{key}"])
        made = assemble(embedding, plan, len(embedding), seed=0, name=key).numpy()
        expected = arrays[f"new_embeddings_{key}"]
        spelled = [bool(ids) for ids in plan.sources]  # the mean of no rows is NaN there
        values(made[spelled], expected[spelled], key)
        assert len(expected) - sum(spelled) == case["n_nan_rows"]


def plain_text(strings, source):
    """The decomposition of LeonidasY/fast-vocabulary-transfer: vocabulary strings as ordinary text."""
    sources = []
    for string in strings:
        same = source.token_to_id(string)
        stripped = next((string[len(mark) :] for mark in ("##", "Ġ", "▁") if string.startswith(mark)), string)
        sources.append([same] if same is not None else source.encode(stripped, add_special_tokens=False).ids)
    return fvt.Plan(["mean" if ids else "random" for ids in sources], sources)
