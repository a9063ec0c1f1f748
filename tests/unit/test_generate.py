"""Text of a teacher: prompts, greedy and drawn answers, ends, interruption, and the corpus that comes of it."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LogitsProcessorList

from stages import distill, evaluate, generate, inspect
from stages.artifacts.schemas import EXAMPLES, GENERATIONS, SCORES
from stages.artifacts.tables import identity_of, read_table
from stages.core import artifact
from stages.core.errors import UserError
from stages.corpora.cutting import Turn
from stages.generation import sampling as sampler
from stages.generation.prompts import Prompt, answer_of, answered_rows, encode_prompts, prompts_of
from stages.planning import expand, plan, run, sources
from stages.tokenization import ByteView

from . import tiny
from .test_config import changed
from .test_distill import MODEL, SFT, TRAIN

SAMPLING = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12}
DRAWN = SAMPLING | {"do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.95}
SPEC = {"model": MODEL, "dtype": "auto", "prompt_bytes": 40, "drop_truncated": False, "batch_tokens": 100}
SPEC |= {"max_bytes": 2048, "seed": 5, "sampling": SAMPLING}

CHAT = [
    {"role": "system", "text": "Be brief.", "loss": False},
    {"role": "user", "text": "naïve café?", "loss": False},
    {"role": "assistant", "text": "Yes.", "loss": True},
    {"role": "user", "text": "日本語?", "loss": False},
    {"role": "assistant", "text": "No.", "loss": True},
]


class World:
    """A results folder with a corpus, a tokenizer and a teacher that has seen a little of the corpus."""

    def __init__(self, root):
        self.root = root
        self.corpus = tiny.corpus_artifact(root, "text")
        self.tokenizer = tiny.tokenizer_artifact(root, "big", 400)
        folder = root.parent / "weights"
        self.view = ByteView.load((root / self.tokenizer).parent)
        model = self.taught(tiny.llama(folder, 408, 1))  # 8 padding rows
        with torch.no_grad():
            model.get_output_embeddings().weight[400:] *= 100  # would win, were they not cut
        model.save_pretrained(folder)
        self.teacher = "models/teacher/manifest.json"
        tiny.publish(root / self.teacher, "pretrain", {path.name: path for path in folder.iterdir()})
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def taught(self, model):
        """The model after some steps on short texts that end."""
        texts = [[{"role": "text", "text": tiny.text(number, 16), "loss": True}] for number in range(16)]
        batch = self.view.encode_examples(texts, [True] * 16)
        rows = [torch.tensor(batch.ids[a:b]).long() for a, b in zip(batch.offsets, batch.offsets[1:], strict=False)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, -100)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model(input_ids=ids.clamp(min=0), labels=ids).loss.backward()
            optimizer.step()
        return model

    def run(self, name, corpus=None, **changes):
        inputs = {"corpus": corpus or self.corpus, "tokenizer": self.tokenizer, "model": self.teacher}
        spec = SPEC | changes | {"inputs": {key: tiny.entry(value) for key, value in inputs.items()}}
        generate.main(tiny.argv(self.root, f"corpora/{name}/manifest.json", spec))
        return artifact.read_manifest(self.root / f"corpora/{name}/manifest.json")

    def rows(self, name, file="generations", schema=GENERATIONS):
        return read_table(self.root / f"corpora/{name}/{file}.parquet", schema).to_pylist()

    def chats(self, name, slots=CHAT):
        row = {"example_id": "c:0", "document_id": "c", "slots": slots, "starts_document": True}
        row |= {"ends_document": True, "bytes": sum(len(slot["text"].encode()) for slot in slots)}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([row], schema=EXAMPLES), sink)
        content = sink.getvalue().to_pybytes()
        tiny.publish(self.root / f"corpora/{name}/manifest.json", "corpus", {f"{s}.parquet": content for s in SPLITS})
        return f"corpora/{name}/manifest.json"

    def continued(self, ids, steps):
        """Greedy search without cache, padding or transformers' loop."""
        ids = list(ids)
        for _ in range(steps):
            with torch.no_grad():
                logits = self.model(torch.tensor([ids])).logits[0, -1, : self.view.vocab_size]
            ids.append(int(logits.argmax()))
            if ids[-1] in self.view.special_ids:
                break
        return ids


SPLITS = ("train", "heldout")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("generate") / "results")


def test_greedy_answers_are_the_likeliest_tokens(world):
    made = world.run("greedy")
    rows = world.rows("greedy")
    corpus = {row["example_id"]: row for row in world.rows("text", "train", EXAMPLES)}
    assert len(rows) == len(corpus) == made["metrics"]["finish_length"] + made["metrics"]["finish_stop"]
    for row in rows:
        text = corpus[row["source_id"]]["slots"][0]["text"]
        prompt = prompts_of(corpus[row["source_id"]], SPEC["prompt_bytes"])[0]
        assert text.startswith(prompt.turns[0].text) and 20 <= len(prompt.turns[0].text.encode()) <= 40
        ids = [world.view.start_id, *world.view.encode_texts([prompt.turns[0].text])[0].ids]
        assert row["prompt_tokens"] == len(ids)
        assert [*ids, *row["output_ids"]] == world.continued(ids, SAMPLING["max_new_tokens"])
        assert all(i < world.view.vocab_size for i in row["output_ids"])
    # Batches of other sizes give the same.
    world.run("single", batch_tokens=1)
    assert world.rows("single") == rows


def test_train_and_heldout(world):
    world.run("greedy")
    rows = {row["document_id"]: row for row in world.rows("greedy")}
    train = world.rows("greedy", "train", EXAMPLES)
    assert {row["document_id"] for row in train} == {key for key, row in rows.items() if row["answer"]}
    for row in train:
        (start, answer), made = row["slots"], rows[row["document_id"]]
        assert (start["role"], start["loss"]) == ("text", False) and (answer["role"], answer["loss"]) == ("text", True)
        assert answer["text"] == made["answer"] and row["ends_document"] == (made["finish_reason"] == "stop")
        assert row["example_id"] == f"{row['document_id']}:0"
        # What the student sees: the same bytes, the prompt not trained on, one start token and no second dummy space.
        batch = world.view.encode_examples([row["slots"]], [row["ends_document"]])
        assert batch.exact.all() and world.view.join(batch.ids) == (start["text"] + answer["text"]).encode()
        assert world.view.join(batch.ids[batch.loss]) == answer["text"].encode()
    assert world.rows("greedy", "heldout", EXAMPLES) == world.rows("text", "heldout", EXAMPLES)
    assert identity_of(world.root / "corpora/greedy/train.parquet")["stage"] == "generate"


def test_draws_depend_on_the_prompt_and_the_seed_alone(world):
    world.run("drawn", sampling=DRAWN)
    world.run("single", sampling=DRAWN, batch_tokens=1)
    assert world.rows("drawn") == world.rows("single")
    world.run("other", sampling=DRAWN, seed=6)
    answers = [[row["answer"] for row in world.rows(name)] for name in ("drawn", "other", "greedy")]
    assert answers[0] != answers[1] and answers[0] != answers[2]
    assert len(set(answers[0])) > len(answers[0]) // 2


def test_draws_follow_the_distribution():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -50.0]])
    places = (np.arange(2000) + 0.5) / 2000
    for change in ({}, {"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.7}):
        chosen = sampler.warpers(SAMPLING | change)
        draw = sampler.Draw(places[:, None], chosen, 3)
        found = draw(torch.zeros(2000, 3, dtype=torch.int64), scores.expand(2000, -1)).argmax(-1)
        expected = torch.softmax(chosen(torch.zeros(1, 3, dtype=torch.int64), scores), -1)[0]
        np.testing.assert_allclose(np.bincount(found, minlength=5) / 2000, expected, atol=1e-3)
    ends = sampler.Draw(np.array([[0.0], [np.nextafter(1, 0)]]), LogitsProcessorList(), 1)
    extremes = ends(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 2))
    assert extremes.argmax(-1).tolist() == [1, 1]


def test_killed_job_goes_on_and_gives_the_same_bytes(world, monkeypatch):
    expected = world.run("whole", sampling=DRAWN)
    original, asked = sampler.generate_batch, []

    def interrupted(model, prompts, *rest):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return original(model, prompts, *rest)

    monkeypatch.setattr(sampler, "generate_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.run("whole", sampling=DRAWN, drop_truncated=False, seed=5, batch_tokens=101)
    kept = list((world.root / ".checkpoints").glob("*/batch-*.parquet"))
    assert len(kept) == 3
    (kept[0].parent / "batch-000003.partial").write_bytes(b"cut")
    done = sum(asked)

    def counted(model, prompts, *rest):
        asked.append(len(prompts))
        return original(model, prompts, *rest)

    monkeypatch.setattr(sampler, "generate_batch", counted)
    again = world.run("whole", sampling=DRAWN, drop_truncated=False, seed=5, batch_tokens=101)
    assert sum(asked) == again["metrics"]["train_documents"] + again["metrics"]["empty"] and done < sum(asked)
    straight = world.run("whole", sampling=DRAWN, batch_tokens=101)
    assert again["data"] == straight["data"]
    assert not list((world.root / ".checkpoints").glob("*/batch-*")) and expected["data"].keys() == again["data"].keys()


def test_chats(world):
    corpus = world.chats("chat")
    world.run("answers", corpus)
    rows = world.rows("answers")
    assert [row["document_id"] for row in rows] == ["c:0:2", "c:0:4"]
    train = {row["document_id"]: row for row in world.rows("answers", "train", EXAMPLES)}
    for row, before in zip(rows, (2, 4), strict=True):
        turns = [dict(slot, loss=False) for slot in CHAT[:before]]
        header = world.view.encode_examples([[*turns, {"role": "assistant", "text": "x", "loss": True}]])
        ids = header.ids[: int(np.flatnonzero(header.loss)[0])]
        assert [*ids, *row["output_ids"]] == world.continued(ids, SAMPLING["max_new_tokens"])
        if row["answer"]:
            slots = train[row["document_id"]]["slots"]
            assert [(slot["role"], slot["text"]) for slot in slots[:-1]] == [
                (slot["role"], slot["text"]) for slot in CHAT[:before]
            ]
            assert slots[-1] == {"role": "assistant", "text": row["answer"], "loss": True, "extra": None}
            assert not any(slot["loss"] for slot in slots[:-1])


def test_what_has_no_prompt():
    row = {"example_id": "x:0", "starts_document": True}
    assert prompts_of(row | {"slots": [{"role": "text", "text": "short", "loss": True}]}, 40) == []
    assert prompts_of(row | {"slots": [{"role": "assistant", "text": "first", "loss": True}]}, 40) == []
    untrained = [dict(slot, loss=False) for slot in CHAT]
    assert prompts_of(row | {"slots": untrained}, 40) == []
    assert [prompt.slot for prompt in prompts_of(row | {"slots": CHAT}, 40)] == [2, 4]


def test_ends_of_answers(world):
    view = world.view
    word, accent = (view.encode_texts([text])[0].ids.tolist() for text in (" the", "é"))
    bytes_of = {content: i for i, content in enumerate(view.token_bytes) if content}
    half = [bytes_of[b"\xc3"]]
    end, other = view.eos_id, next(i for i in sorted(view.special_ids) if view.role_of[i] == "pad")
    endings = frozenset({end})
    assert answer_of(view, [*word, end], endings, ("", "")) == (" the", "stop")
    assert answer_of(view, [*word, end], endings, (" ", "")) == ("the", "stop")
    assert answer_of(view, [*word, *accent], endings, ("", "")) == (" theé", "length")
    assert answer_of(view, [*word, *half], endings, ("", "")) == (" the", "length")  # a character that is cut off
    assert answer_of(view, [*word, *half, end], endings, ("", "")) == (" the", "invalid")
    assert answer_of(view, [*word, *half, *word], endings, ("", "")) == (" the", "invalid")
    assert answer_of(view, [*word, other, *word], endings, ("", "")) == (" the", "invalid")
    assert answer_of(view, [end], endings, ("", "")) == ("", "stop")
    assert answer_of(view, [], endings, ("", "")) == ("", "length")


def test_truncated_answers_are_left_out(world):
    made = world.run("strict", drop_truncated=True, sampling=DRAWN)
    rows = world.rows("strict")
    kept = [row for row in rows if row["finish_reason"] == "stop" and row["answer"]]
    assert 0 < len(kept) < len(rows) and made["metrics"]["kept"] == len(kept)
    train = world.rows("strict", "train", EXAMPLES)
    assert {row["document_id"] for row in train} == {row["document_id"] for row in kept}
    assert made["spec"]["sampling"]["max_new_tokens"] == 12 and made["spec"]["seed"] == 5
    with pytest.raises(UserError, match=r"of 12 answers \d+ reach max_new_tokens \(1\).*drop_truncated: false"):
        world.run("nothing", drop_truncated=True, sampling=SAMPLING | {"max_new_tokens": 1})


def test_wrong_input_is_one_sentence(world):
    with pytest.raises(UserError, match=r"has no prompts: .* longer than prompt_bytes \(100000\)"):
        world.run("refused", prompt_bytes=100000)
    with pytest.raises(UserError, match=r"max_new_tokens 510 more it is longer than the 512 .* or prompt_bytes\."):
        world.run("refused", sampling=SAMPLING | {"max_new_tokens": 510})
    small = world.root.parent / "small"
    tiny.llama(small, 300, 1)
    with pytest.raises(UserError, match="300 embedding rows but tokenizer"):
        inputs = {"corpus": tiny.entry(world.corpus), "tokenizer": tiny.entry(world.tokenizer)}
        spec = SPEC | {"model": MODEL | {"path": str(small)}, "inputs": inputs}
        generate.main(tiny.argv(world.root, "corpora/refused/manifest.json", spec))
    broken = AutoModelForCausalLM.from_pretrained(world.root.parent / "weights")
    with torch.no_grad():
        broken.get_output_embeddings().weight[7] = float("nan")
    broken.save_pretrained(world.root.parent / "broken")
    with pytest.raises(UserError, match="logits that are not finite"):
        spec["model"] = MODEL | {"path": str(world.root.parent / "broken")}
        generate.main(tiny.argv(world.root, "corpora/refused/manifest.json", spec))
    assert not (world.root / "corpora/refused/manifest.json").exists()


def test_inspect_shows_answers(world, capsys):
    world.run("greedy")
    inspect.main([str(world.root / "corpora/greedy")])
    shown = capsys.readouterr().out
    assert "generations.parquet" in shown and "finish" in shown and "max_new_tokens" in shown


def test_sft_and_evaluation_take_the_corpus(world):
    world.run("greedy")
    spec = {"model": MODEL | {"name": "student"}, "losses": [SFT], "train": TRAIN | {"steps": 2}, "seed": 1}
    names = {"corpus": "corpora/greedy/manifest.json", "tokenizer": world.tokenizer}
    inputs = {name: tiny.entry(manifest) for name, manifest in (names | {"init": world.teacher}).items()}
    spec |= {"code_modules": ["stages.losses.sft"], "inputs": inputs}
    distill.main(tiny.argv(world.root, "students/seqkd/manifest.json", spec))
    lines = (world.root / "students/seqkd/metrics.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(lines[-1])["sft"])
    inputs = {name: tiny.entry(manifest) for name, manifest in (names | {"model": world.teacher}).items()}
    spec = {"model": MODEL, "suite": {"kind": "bits_per_byte", "limit": None}, "seed": 1, "inputs": inputs}
    evaluate.main(tiny.argv(world.root, "evaluations/teacher/heldout/manifest.json", spec))
    of_text = {"corpus": world.corpus, "tokenizer": world.tokenizer, "model": world.teacher}
    spec["inputs"] = {name: tiny.entry(manifest) for name, manifest in of_text.items()}
    evaluate.main(tiny.argv(world.root, "evaluations/teacher/text/manifest.json", spec))
    places = [world.root / f"evaluations/teacher/{name}/samples.parquet" for name in ("heldout", "text")]
    of_answers, of_text = (read_table(place, SCORES) for place in places)
    assert of_answers.equals(of_text) and len(of_text)


TEXT = st.text(st.sampled_from("ab é🎉\n"), min_size=1, max_size=60)


@given(TEXT, TEXT, st.integers(16, 40))
def test_nothing_is_lost_when_answers_are_cut(start, rest, max_bytes):
    plain = Prompt("d:0", 1, (Turn("text", start),), True)
    rows = answered_rows(plain, rest, True, max_bytes)
    slots = [slot for row in rows for slot in row["slots"]]
    assert "".join(slot["text"] for slot in slots if slot["loss"]) == rest
    assert all(row["bytes"] <= max_bytes and row["slots"][-1]["loss"] for row in rows)
    assert rows[-1]["ends_document"] and [row["ends_document"] for row in rows[:-1]] == [False] * (len(rows) - 1)
    chat = Prompt("d:0", 1, (Turn("user", start, False),), True)
    rows = answered_rows(chat, rest, True, max_bytes)
    assert "".join(slot["text"] for row in rows for slot in row["slots"] if slot["loss"]) == rest
    assert all(row["bytes"] <= max_bytes for row in rows)


def test_prompts_of_real_tokenizers(tokenizers_dir):
    """A prompt is what the template puts before an answer; what follows it are the answer's own tokens."""
    prompt = Prompt("c:0", 2, tuple(Turn(slot["role"], slot["text"]) for slot in CHAT[1:2]), True)
    for name in ("gpt2", "llama2", "qwen1.5"):
        view = ByteView.load(tokenizers_dir / name)
        encoded = encode_prompts(view, [prompt])
        whole = view.encode_examples([[CHAT[1], {"role": "assistant", "text": "Hello there.", "loss": True}]])
        size = len(encoded.ids[0])
        assert np.array_equal(whole.ids[:size], encoded.ids[0]), name
        end = np.flatnonzero(whole.loss)[-1] + 1
        endings = frozenset(view.special_ids)
        assert answer_of(view, whole.ids[size:end].tolist(), endings, encoded.leads[0])[0].strip() == "Hello there."


GENERATED = {"kind": "generated", "teacher": "big", "prompts": "docs"}


@pytest.fixture
def schema(repository):
    return yaml.safe_load((repository / run.SCHEMA).read_text())


def planned(config, schema, tmp_path):
    return plan.build(expand.expand(config, schema), sources.Digests(tmp_path / "digests.json"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"teacher": "bigg"}, "corpora.answers.teacher.*did you mean `big`"),
        ({"prompts": "dosc"}, "corpora.answers.prompts.*did you mean `docs`"),
        ({"prompts": "answers"}, "corpora.answers. is made from itself"),
        ({"prompt_bytes": 2048}, "corpora.answers.prompt_bytes. is 2048, which leaves no room"),
        ({"sampling": {"top_p": 0}}, "corpora.answers.sampling.top_p.*more than 0"),
        ({"sampling": {"temperature": 0}}, "corpora.answers.sampling.temperature.*more than 0"),
        ({"sampling": {"max_tokens": 5}}, "corpora.answers.sampling.max_tokens.*max_new_tokens"),
    ],
)
def test_faults_of_a_config(schema, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        planned(changed("corpora/answers", GENERATED | change), schema, tmp_path)


def test_a_teacher_trained_on_its_own_answers_is_refused(schema, tmp_path):
    config = changed("corpora/answers", GENERATED)
    architecture = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config["models"]["big"] = {"tokenizer": "a", "pretrain": {"corpus": "answers", "architecture": architecture}}
    with pytest.raises(UserError, match=r"made from itself \(answers from answers\)"):
        planned(config, schema, tmp_path)


def test_plan_of_text_distillation(schema, tmp_path):
    """Answers are a corpus; sft on them needs nothing else, and its control is sft on the text of the prompts."""
    config = changed("corpora/answers", GENERATED)
    config["experiments"] = {
        "seqkd": {"student": "small", "teacher": "big", "corpus": "answers", "losses": ["sft"]},
        "sft": {"student": "small", "teacher": "big", "corpus": "docs", "losses": ["sft"]},
        "alm": {"student": "small", "teacher": "big", "corpus": "docs", "losses": ["alm_unconstrained"]},
    }
    nodes = planned(config, schema, tmp_path)
    made = nodes["corpora/answers/manifest.json"]
    assert made.stage == "generate" and set(made.spec["inputs"]) == {"corpus", "tokenizer"}
    assert made.spec["sampling"] == {"do_sample": False, "max_new_tokens": 512} and "seed" not in made.spec
    assert set(nodes["students/seqkd/manifest.json"].spec["inputs"]) == {"corpus", "tokenizer"}
    controls = {entry["name"]: entry["control"] for entry in nodes["summary/manifest.json"].spec["experiments"]}
    assert controls == {"seqkd": "sft", "sft": None, "alm": "sft"}
    # What greedy search does not read makes nothing new; what draws read does.
    config["corpora"]["answers"] = GENERATED | {"sampling": {"top_p": 0.5}, "seed": 9}
    assert planned(config, schema, tmp_path) == nodes
    config["corpora"]["answers"] = GENERATED | {"sampling": {"do_sample": True}}
    drawn = planned(config, schema, tmp_path)["corpora/answers/manifest.json"]
    assert drawn.spec["seed"] == 1234 and drawn.spec["sampling"]["top_p"] == 1.0 and drawn.lineage != made.lineage
