"""lm-eval through its seam: its own numbers for every kind of task, and a sentence for whatever fails."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from stages.core.errors import UserError
from stages.evaluation.aggregation import FORMULAS
from tests.conftest import SHARED
from tests.unit import lm_tasks, tiny
from tests.unit.lm_tasks import ACC, ANSWER, CHOICE, NEXT, ROLLING, Functions

CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<s>assistant: {% endif %}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = lm_tasks.World(tmp_path_factory.mktemp("lm-eval"))
    source = world.folder / "tokenizer"
    tiny.bpe(source, 300)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    world.tokenizer(source)
    tiny.llama(world.folder / "model", 300, positions=160)
    every = ["acc", "acc_norm", "acc_bytes", "mcc", "brier_score", "acc_mutual_info", "exact_match"]
    world.task("choices", CHOICE | {"metric_list": [{"metric": name} for name in every]})
    world.task(
        "choice", CHOICE | {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}], "fewshot_split": "train"}
    )
    world.task("rolling", ROLLING)
    world.task("next", NEXT)
    texts = [{"metric": name} for name in ("exact_match", "bleu", "chrf", "ter")]
    world.task("write", ANSWER | {"metric_list": texts, "fewshot_split": "train"})
    length = {"metric": Functions("answer_length"), "aggregation": "mean", "higher_is_better": False}
    both = {"metric": Functions("two_lengths"), "aggregation": "mean", "higher_is_better": True}
    world.task("lengths", ANSWER | {"metric_list": [length, both]})
    first, most = {"function": "take_first"}, {"function": "majority_vote"}
    drawn = ANSWER["generation_kwargs"] | {"do_sample": True, "temperature": 1.0}
    filters = [{"name": "most", "filter": [most, first]}, {"name": "first", "filter": [first]}]
    world.task("repeated", ANSWER | {"generation_kwargs": drawn, "repeats": 3, "filter_list": filters})
    world.task("scalars", CHOICE | {"process_results": Functions("scalars")})
    world.task("middle", CHOICE | {"metric_list": [ACC[0] | {"aggregation": Functions("middle")}]})
    world.task("large", CHOICE | {"tag": "sizes"}, lm_tasks.items(8))
    world.task("small", CHOICE | {"tag": "sizes"}, lm_tasks.items(11)[8:])
    acc = {"metric": "acc", "weight_by_size": True}
    world.file("group", {"group": "group", "task": ["large", "small"], "aggregate_metric_list": [acc]})
    alike = {"group": "alike", "task": ["large", "small"], "aggregate_metric_list": [acc | {"weight_by_size": False}]}
    world.file("alike", alike)
    world.file("outer", {"group": "outer", "task": ["group", "choice"], "aggregate_metric_list": [acc]})
    world.file("folder", {"group": "folder", "task": ["large", "small"]})
    return world


def lm_evals_own(world, tasks, **settings):
    """What lm-eval finds with its own model class, without any of this project."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = AutoTokenizer.from_pretrained(world.root / "tokenizers/t")
    model = HFLM(AutoModelForCausalLM.from_pretrained(world.folder / "model"), tokenizer=tokenizer, batch_size=4)
    manager = TaskManager(include_path=str(world.tasks), include_defaults=False)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 0)
    options = {"model": model, "tasks": tasks, "task_manager": manager, "bootstrap_iters": 1000}
    return lm_eval.simple_evaluate(**options, **seeds, **settings)


SUITES = {
    "every output type": (["choices", "rolling", "next", "write", "lengths", "scalars", "middle"], {}),
    "drawn answers": (["repeated"], {}),
    "group": (["group"], {}),
    "tasks alike": (["alike"], {}),
    "nested": (["outer"], {}),
    "group without figures": (["folder"], {}),
    "tag": (["sizes"], {}),
    "few-shot": (["choice", "write"], {"num_fewshot": 1, "limit": 4}),
    "chat": (["choice", "write"], {"num_fewshot": 1, "limit": 4, "apply_chat_template": True}),
    "one turn": (
        ["choice"],
        {"num_fewshot": 1, "limit": 4, "apply_chat_template": True, "fewshot_as_multiturn": False},
    ),
}


@pytest.mark.parametrize("name", SUITES)
def test_the_numbers_are_lm_evals_own(world, name, monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    tasks, settings = SUITES[name]
    folder = world.evaluate("model", tasks, suite=name.replace(" ", "-"), **settings)
    rows = json.loads((folder / "results.json").read_text())["results"]
    own = lm_evals_own(world, tasks, **settings)
    found = {(row["task"], f"{row['metric']},{row['filter']}"): row for row in rows}
    numbers = {
        (task, key): value
        for task, values in own["results"].items()
        for key, value in values.items()
        if "," in key and "_stderr," not in key
    }
    assert found.keys() == numbers.keys()
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    for (task, key), row in found.items():
        metric, kind = key.split(",")
        assert row["value"] == pytest.approx(float(numbers[task, key]), rel=1e-6), key
        error = own["results"][task].get(f"{metric}_stderr,{kind}")
        assert row["stderr"] == (None if error == "N/A" else pytest.approx(error, rel=1e-5)), key
        assert row["higher_is_better"] == own["higher_is_better"][task].get(metric)
        mine = [one for one in samples if (one["task"], one["metric"], one["filter"]) == (task, metric, kind)]
        owners = {(one["subtask"], one["doc_id"]) for one in mine}
        assert row["n"] == len(mine) == len(owners)
        inside = own["group_subtasks"].get(task)
        assert {subtask for subtask, _ in owners} == {task} or inside
        if row["aggregation"]:
            values, weights = (np.array([one[key] for one in mine]) for key in ("value", "weight"))
            again = FORMULAS[row["aggregation"]](values.sum() / weights.sum())
            assert again == pytest.approx(row["value"], rel=1e-9), key


def test_an_aggregation_is_known_by_what_it_computes(world):
    tasks = ["choices", "rolling", "next", "lengths", "middle"]
    rows = world.results("model", tasks)["results"]
    known = {(row["task"], row["metric"]): row["aggregation"] for row in rows}
    assert known["choices", "acc"] == known["choices", "brier_score"] == known["lengths", "words"] == "mean"
    assert known["rolling", "word_perplexity"] == known["next", "perplexity"] == "perplexity"
    assert known["rolling", "bits_per_byte"] == "bits_per_byte"
    assert known["middle", "acc"] is None and known["choices", "mcc"] is None
    leading = [(row["task"], row["metric"]) for row in rows if row["leads"]]
    assert [task for task, _ in leading] == tasks
    assert leading[:3] == [("choices", "acc"), ("rolling", "word_perplexity"), ("next", "perplexity")]


def test_a_group_speaks_for_its_tasks_and_is_made_of_their_documents(world):
    leading = {"group": ["group"], "alike": ["alike"], "outer": ["outer"], "folder": ["large", "small"]}
    for name, tasks in leading.items():
        rows = world.results("model", [name])["results"]
        assert [row["task"] for row in rows if row["leads"]] == tasks
        assert all(row["aggregation"] == "mean" for row in rows if row["metric"] == "acc")


def scored_by(function):
    return CHOICE | {"process_results": Functions(function)}


def aggregated_by(function):
    return CHOICE | {"metric_list": [ACC[0] | {"aggregation": Functions(function)}]}


SHAPES = {"acc": 1.0, "text": None, "mapping": None, "list": None, "nothing": None}
FAULTY = {
    "nothing_finite": (scored_by("nothing_finite"), {"acc": None, "acc_norm": 0.5}),
    "one_infinite": (scored_by("one_infinite"), {"acc": None, "fine": 1.0}),
    "shapes": (scored_by("shapes"), SHAPES),
    "huge": (scored_by("huge"), {"huge": pytest.approx(1e200), "acc": 1.0}),
    "no_number": (aggregated_by("mapping"), {"acc": None}),
    "breaks": (aggregated_by("breaks"), {"acc": None}),
    "needs_two": (aggregated_by("needs_two"), {"acc": 7.0}),
    "empty": (scored_by("no_metric"), {}),
}


@pytest.mark.parametrize("name", FAULTY)
def test_one_metric_without_a_number_loses_no_other(world, name):
    settings, expected = FAULTY[name]
    world.task(name, settings)
    results = world.results("model", [name, "choice"])
    assert {row["metric"]: row["value"] for row in results["results"] if row["task"] == name} == expected
    assert all(row["value"] is not None for row in results["results"] if row["task"] == "choice")
    noted = any(note["task"] == name and "no aggregation" not in note["note"] for note in results["notes"])
    assert noted == (None in expected.values() or not expected)
    for row in results["results"]:
        assert row["aggregation"] is None or row["value"] is not None


def test_a_perplexity_that_overflows_is_left_empty(world):
    world.task(
        "long", NEXT | {"doc_to_text": "a", "doc_to_target": " {{context}}"}, [{"context": "é" * 70, "word": "a"}] * 3
    )
    rows = {row["metric"]: row["value"] for row in world.results("model", ["long"])["results"]}
    assert rows == {"perplexity": None, "acc": 0.0}


BAD_FILTER = [{"name": "x", "filter": [{"function": "regex", "regex_pattern": "(["}]}]
SENTENCES = {
    "fails": (scored_by("fails"), "Task fails, document 2: process_results failed with KeyError: 'gone'"),
    "no_mapping": (scored_by("no_mapping"), "document 0: process_results failed with TypeError: found list"),
    "cannot_ask": (CHOICE | {"doc_to_text": Functions("cannot_ask")}, "Task cannot_ask, document 1: .*no question"),
    "bad_filter": (ANSWER | {"filter_list": BAD_FILTER}, "Task bad_filter failed in its filters"),
    "none_left": (CHOICE | {"process_docs": Functions("none_left")}, "cannot load task 'none_left' or its data"),
    "no_such_metric": (CHOICE | {"metric_list": [{"metric": "nonsense"}]}, "'no_such_metric' .*nonsense"),
    "unsafe": (CHOICE | {"unsafe_code": True}, "lm-eval failed in unsafe: .*marked as unsafe"),
    "number": (NEXT | {"doc_to_target": "label"}, "Task number, document 0: .* must be text, found int"),
    "no_answer": (NEXT | {"doc_to_target": ""}, "Task no_answer, document 0: the answer '' has no token"),
    "long_answer": (
        NEXT | {"doc_to_target": "{{context * 9}}"},
        r"Task long_answer, document \d+: the answer has \d+ tokens but the model takes at most 160",
    ),
    "much": (
        ANSWER | {"generation_kwargs": {"until": ["x"], "max_gen_toks": 160}},
        "Task much asks for 160 new tokens but the model has 160 positions",
    ),
    "by_default": (ANSWER | {"generation_kwargs": {"until": ["x"]}}, "Task by_default asks for 256 new tokens"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_what_fails_is_one_sentence_with_task_and_document(world, name):
    settings, message = SENTENCES[name]
    world.task(name, settings)
    with pytest.raises(UserError, match=message) as caught:
        world.evaluate("model", [name])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_missing_data_and_two_tasks_of_one_name_are_one_sentence(world):
    world.task("gone", CHOICE)
    (world.tasks / "gone.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot load task 'gone' or its data: FileNotFoundError"):
        world.evaluate("model", ["gone"])
    with pytest.raises(UserError, match=r"do not go together: ValueError: Duplicate task 'large'"):
        world.evaluate("model", ["group", "large"])


def test_a_tokenizer_without_bos_and_eos_is_one_sentence(world):
    files = {"tokenizer.json": world.folder / "tokenizer/tokenizer.json"}
    files["tokenizer_config.json"] = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}).encode()
    tiny.publish(world.root / "tokenizers/bare/manifest.json", "tokenizer", files)
    with pytest.raises(UserError, match="neither a bos nor an eos token"):
        world.evaluate("model", ["next"], tokenizer="bare")


def test_what_changes_numbers_is_noted(world, capfd):
    long = [item | {"context": " ".join([item["context"]] * (1 + item["n"]))} for item in lm_tasks.items(10)]
    world.task("cut", CHOICE | {"num_fewshot": 0}, long)
    world.task("cut_writing", ANSWER | {"num_fewshot": 0}, long)
    labels = lm_tasks.items(2) + [item | {"label": 5} for item in lm_tasks.items(3)]
    world.task("labels", CHOICE | {"num_fewshot": 0}, labels)
    world.task("partly", scored_by("one_infinite"))
    results = world.results("model", ["cut", "cut_writing", "labels", "partly"], num_fewshot=1)
    notes = {}
    for note in results["notes"]:
        notes.setdefault(note["task"], []).append(note["note"])
    tokenizer = AutoTokenizer.from_pretrained(world.root / "tokenizers/t")
    size = {text: len(tokenizer(text)["input_ids"]) for item in long for text in (item["context"], *both(item))}
    expected = {
        "cut": sum(size[text] > 161 for item in long for text in both(item)),
        "cut_writing": sum(size[item["context"]] > 160 - 8 for item in long),
    }
    for task, count in expected.items():
        (note,) = [note for note in notes[task] if "lost their beginning" in note]
        assert note.startswith(f"{count} prompts did not fit the model's 160 tokens") and 0 < count < 20
    assert "with 0 examples, as its file says, and not with 1" in " ".join(notes["labels"])
    assert any("Label index was not in within range" in note and "(3 times)" in note for note in notes[""])
    assert any("fine has no aggregation in the task" in note for note in notes["partly"])
    log = capfd.readouterr().err
    assert "note: cut: " in log and "Label index was not in within range" in log


def both(item):
    """The texts of a question with each of its answers."""
    return [f"{item['context']} {choice}" for choice in item["choices"]]


def test_join(world, tokenizers_dir):
    """One token spans prompt and answer: the answer's own tokens are scored after the prompt's."""
    cases = SHARED / "cases" / "eval-join"
    if not cases.is_dir():
        pytest.skip(f"no cases: {cases} does not exist")
    world.cases(cases)
    world.task(
        "spaces",
        CHOICE,
        [{"context": "hello  ", "choices": ["  x", "y"], "label": 0}] * 2
        + [{"context": " ", "choices": ["a", "b"], "label": 0}],
    )
    for name in ("gpt2", "llama2"):
        world.tokenizer(tokenizers_dir / name, name)
        tokenizer = AutoTokenizer.from_pretrained(world.root / f"tokenizers/{name}")
        model = tiny.llama(world.folder / name, max(tokenizer.get_vocab().values()) + 1, seed=3).eval()
        results = world.results(name, ["join_task", "spaces"], suite="join", tokenizer=name)
        (note,) = [note["note"] for note in results["notes"] if note["task"] == "join_task"]
        assert "share a token with the end of their prompt" in note
        assert {row["n"] for row in results["results"]} == {3}
        right = []
        for line in (cases / "join.jsonl").read_text().splitlines():
            item = json.loads(line)
            scores = [own_score(model, tokenizer, item["ctx"], choice) for choice in item["choices"]]
            right.append(float(np.argmax(scores) == 0))
        samples = pq.read_table(world.root / f"evaluations/{name}/join/samples.parquet").to_pylist()
        assert [row["value"] for row in samples if row["task"] == "join_task"] == right


def own_score(model, tokenizer, prompt, answer):
    """log p(answer | prompt) by a forward pass over the prompt's tokens and then the answer's own."""
    given = tokenizer.encode(prompt) if prompt else [tokenizer.bos_token_id]
    whole = tokenizer.encode(prompt + answer)
    if prompt and len(whole) > len(given):
        scored = whole[len(given) :]
    elif prompt:
        scored = tokenizer.encode("!" + answer, add_special_tokens=False)
        scored = scored[len(tokenizer.encode("!", add_special_tokens=False)) :]
        assert tokenizer.decode(scored).strip() == answer.strip()
    else:
        scored = tokenizer.encode(answer, add_special_tokens=False)
    with torch.no_grad():
        log_p = model(torch.tensor([given + scored])).logits[0].double().log_softmax(-1)
    return sum(log_p[len(given) - 1 + i, token].item() for i, token in enumerate(scored))


@pytest.fixture
def given_cases(world):
    folder = SHARED / "cases" / "lm-tasks"
    if not folder.is_dir():
        pytest.skip(f"no cases: {folder} does not exist")
    world.cases(folder)
    tiny.llama(world.folder / "short", 300, positions=128)
    return world


def test_given_cases(given_cases):
    filters = {row["filter"]: row["n"] for row in given_cases.results("short", ["t_two"])["results"]}
    assert filters == {"strict-match": 16, "flexible-extract": 16}
    rows = {row["metric"]: row for row in given_cases.results("short", ["t_nan"])["results"]}
    assert rows["acc"]["value"] is None and rows["acc_norm"]["value"] == 1
    assert rows["acc"]["higher_is_better"] is True and rows["acc_norm"]["higher_is_better"] is None
    with pytest.raises(UserError, match="Task t_gen asks for 256 new tokens but the model has 128 positions"):
        given_cases.evaluate("short", ["t_gen"])
    results = given_cases.results("short", ["t_roll", "t_ppl"])
    assert results["suite"] == "lm_eval"
    assert {row["metric"]: row["aggregation"] for row in results["results"]} == {
        "word_perplexity": "perplexity", "byte_perplexity": "perplexity", "bits_per_byte": "bits_per_byte",
        "perplexity": "perplexity", "acc": "mean",
    }  # fmt: skip
