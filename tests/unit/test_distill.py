"""The training programs end to end: pretrain, teacher_signals, teacher_index, distill."""

import json

import numpy as np
import pytest

from stages import distill, pretrain, teacher_index, teacher_signals
from stages.core import artifact
from stages.core.errors import UserError

from . import tiny

MODEL = {"name": "teacher", "path": None, "revision": None, "digest": None, "dtype": "auto"}
LOSS = {
    "alm_mode": "merge_by_space_prob+append_space",
    "alm_diff_fn": "binary_ce",
    "binarization_temp": 5.0,
    "renyi_alpha": 0.5,
    "merge_threshold": 0.1,
    "distill_main_path_numerator": "chunk_count",
    "distill_main_path_denominator": "chunk_count",
    "space_mask_mode": "space+tab+newline+special",
}
TRAIN = {
    "steps": 4,
    "batch_size": 4,
    "max_tokens": 256,
    "learning_rate": 1e-3,
    "train_model_mode": "full",
    "log_interval": 1,
}
ALM = {"name": "alm_unconstrained", "module": "stages.losses.alm", "chunks": "unconstrained", "weight": 1.0}
SFT = {"name": "sft", "module": "stages.losses.sft", "chunks": None, "weight": 0.5}


class World:
    """A results folder with a corpus, two tokenizers, a teacher and a student, and runners of the programs."""

    def __init__(self, root):
        self.root = root
        self.corpus = self.named(tiny.corpus_artifact(root, "text"))
        self.teacher_tokenizer = self.named(tiny.tokenizer_artifact(root, "big", 400))
        self.tokenizer = self.named(tiny.tokenizer_artifact(root, "small", 300))
        self.teacher = self.model("teacher", 400, 1)
        self.student = self.model("student", 300, 2)

    def named(self, manifest):
        """Publish an artifact of `tiny` again with its name among its settings: another name, another lineage."""
        made = artifact.read_manifest(self.root / manifest)
        files = {name: (self.root / manifest).parent / name for name in made["data"]}
        tiny.publish(self.root / manifest, made["stage"], files, {"inputs": {}, "name": manifest})
        return manifest

    def model(self, name, vocab, seed, **options):
        folder = self.root.parent / f"weights-{name}"
        tiny.llama(folder, vocab, seed, **options)
        manifest = f"models/{name}/manifest.json"
        tiny.publish(self.root / manifest, "pretrain", {path.name: path for path in folder.iterdir()})
        return self.named(manifest)

    def entry(self, manifest):
        return {"manifest": manifest, "lineage": artifact.read_manifest(self.root / manifest)["lineage"]}

    def run(self, main, manifest, spec, **inputs):
        entries = {
            name: [self.entry(item) for item in value] if isinstance(value, list) else self.entry(value)
            for name, value in inputs.items()
            if value is not None
        }
        main(tiny.argv(self.root, manifest, spec | {"inputs": entries}))
        return artifact.read_manifest(self.root / manifest)

    def signals(
        self, name="teacher", shards=2, top_k=0, corpus=None, tokenizer=None, mode=LOSS["space_mask_mode"], model=None
    ):
        spec = {"model": MODEL, "needs": {"boundary": True, "eos": True, "top_k": top_k}, "space_mask_mode": mode}
        spec |= {"shards": shards, "dtype": "auto", "batch_tokens": 200}
        inputs = {"corpus": corpus or self.corpus, "tokenizer": tokenizer or self.teacher_tokenizer}
        inputs["model"] = model or self.teacher
        parts = []
        for shard in range(shards):
            parts.append(f"teachers/{name}/part-{shard:04d}.manifest.json")
            self.run(teacher_signals.main, parts[-1], spec | {"shard": shard}, **inputs)
        self.run(teacher_index.main, f"teachers/{name}/manifest.json", {}, shards=parts)
        return f"teachers/{name}/manifest.json"

    def distill(
        self,
        name,
        losses=(ALM,),
        train=None,
        loss=None,
        teacher="cached",
        signals=None,
        seed=3,
        init=None,
        teacher_artifact=None,
        **changes,
    ):
        spec = {
            "model": MODEL | {"name": "student"},
            "losses": list(losses),
            "train": TRAIN | (train or {}),
            "seed": seed,
        }
        spec |= {"loss": LOSS | (loss or {}), "teacher": teacher, "teacher_model": MODEL}
        spec["code_modules"] = sorted({entry["module"] for entry in losses})
        inputs = {"corpus": self.corpus, "tokenizer": self.tokenizer, "init": init or self.student}
        inputs["signals"] = signals
        inputs["teacher_tokenizer"] = self.teacher_tokenizer
        folder = changes.get("spec", {}).get("teacher_model", {}).get("path")
        inputs["teacher"] = (teacher_artifact or self.teacher) if teacher == "online" and not folder else None
        return self.run(
            distill.main, f"students/{name}/manifest.json", spec | changes.pop("spec", {}), **inputs | changes
        )

    def metrics(self, name):
        return [json.loads(line) for line in (self.root / f"students/{name}/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("distill") / "results")


@pytest.fixture(scope="module")
def signals(world):
    return world.signals()


def test_cached_and_online_agree_and_repeat(world, signals):
    world.distill("cached", [ALM, SFT], signals=signals)
    world.distill("online", [ALM, SFT], teacher="online")
    cached, online = world.metrics("cached"), world.metrics("online")
    assert [line["step"] for line in cached] == [1, 2, 3, 4]
    for one, other in zip(cached, online, strict=True):
        for key in one:
            assert one[key] == pytest.approx(other[key], rel=1e-4), key
    assert cached[0]["loss"] == pytest.approx(cached[0]["alm_unconstrained"] + 0.5 * cached[0]["sft"], rel=1e-6)
    first = artifact.read_manifest(world.root / "students/cached/manifest.json")["data"]
    assert world.distill("cached", [ALM, SFT], signals=signals)["data"] == first
    assert not list((world.root / ".checkpoints").glob("*/step-*"))


def test_online_teacher_may_be_a_folder(world):
    world.distill("artifact", [ALM], teacher="online")
    given = MODEL | {"path": str(world.root.parent / "weights-teacher")}
    made = world.distill("folder", [ALM], teacher="online", spec={"teacher_model": given})
    assert "teacher" not in made["inputs"] and world.metrics("folder") == world.metrics("artifact")


@pytest.mark.parametrize("kind", ["unconstrained", "space", "greedy"])
def test_same_tokenizer(world, kind):
    """With one tokenizer for both, a student that is the teacher has nothing to learn."""
    same = {"tokenizer": world.tokenizer, "teacher_tokenizer": world.tokenizer}
    made = world.signals("same", shards=1, tokenizer=world.tokenizer, model=world.student)
    loss = {"alm_diff_fn": "abs", "alm_mode": "append_space"}
    world.distill("same", [ALM | {"chunks": kind}], loss=loss, signals=made, train={"steps": 2}, **same)
    assert world.metrics("same")[0]["alm_unconstrained"] < 1e-5
    other = world.model("other", 300, 9)
    world.distill("differs", [ALM | {"chunks": kind}], loss=loss, signals=made, init=other, **same)
    assert world.metrics("differs")[0]["alm_unconstrained"] > 1e-3


def test_micro_batches_change_nothing(world, signals):
    world.distill("whole", [ALM, SFT], signals=signals, train={"max_tokens": 10**6, "steps": 1, "batch_size": 8})
    world.distill("split", [ALM, SFT], signals=signals, train={"max_tokens": 16, "steps": 1, "batch_size": 8})
    for key, value in world.metrics("whole")[0].items():
        assert world.metrics("split")[0][key] == pytest.approx(value, rel=1e-5), key


def test_model_opens_with_transformers(world, signals):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train = {
        "train_model_mode": "lora",
        "model_lora_rank": 2,
        "train_embeddings": False,
        "gradient_checkpointing": True,
    }
    world.distill("lora", signals=signals, train=train)
    folder = world.root / "students/lora"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size == 300
    before = load_file(world.root / "models/student/model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("proj" in name for name in changed)
    world.distill("embeddings", [ALM], signals=signals, train={"train_model_mode": "embeddings"})
    after = load_file(world.root / "students/embeddings/model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize(("mode", "trains"), [("lora", "proj"), ("embeddings", "embed_tokens"), ("full", "")])
def test_tied_models_stay_tied(world, mode, trains):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    init = world.model("tied", 300, 2, kind="qwen2", tied=True)
    train = {"train_model_mode": mode, "train_embeddings": mode != "lora", "model_lora_rank": 2, "steps": 2}
    made = world.distill("tied", [SFT], init=init, train=train)
    model = AutoModelForCausalLM.from_pretrained(made["path"].parent)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = load_file((world.root / init).parent / "model.safetensors")
    after = load_file(made["path"].parent / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all(trains in name for name in changed)


def test_stored_type_is_kept(world, signals):
    half = world.model("half", 300, 2, dtype="bfloat16")
    manifest = world.distill("half", signals=signals, init=half, train={"steps": 1})
    assert manifest["data"]["model.safetensors"]["dtype"] == "bfloat16"


def test_signals_of_something_else_are_refused(world, signals):
    other_corpus = world.named(tiny.corpus_artifact(world.root, "other"))
    others = {
        "another corpus": {"corpus": other_corpus},
        "another tokenizer": {"tokenizer": world.tokenizer, "model": world.student},
        "as boundary tokens": {"mode": "space"},
    }
    for number, (sentence, change) in enumerate(others.items()):
        made = world.signals(f"other{number}", shards=1, **change)
        with pytest.raises(UserError, match=sentence):
            world.distill("refused", signals=made)
    with pytest.raises(UserError, match="another teacher"):
        world.distill("refused", signals=signals, spec={"teacher_model": MODEL | {"name": "somebody"}})
    index = artifact.read_manifest(world.root / signals)
    (world.root / "teachers/teacher/part-0001.parquet").rename(world.root / "away")
    with pytest.raises(UserError, match=r"part-0001.parquet is missing"):
        world.distill("refused", signals=signals)
    (world.root / "away").rename(index["path"].parent / "part-0001.parquet")
    assert not (world.root / "students/refused").exists()


def test_wrong_settings_are_refused(world, signals):
    for change, sentence in (
        ({"loss": {"alm_mode": "append_spaces"}}, "flag 'append_spaces'"),
        ({"loss": {"alm_diff_fn": "kl"}}, "alm_diff_fn is 'kl'"),
        ({"train": {"stepz": 1}}, "unknown key 'stepz'"),
        ({"train": {"train_model_mode": "some"}}, "train_model_mode is 'some'"),
        ({"tokenizer": world.teacher_tokenizer}, "300 embedding rows but tokenizer .* 400 ids"),
    ):
        with pytest.raises(UserError, match=sentence):
            world.distill("refused", signals=signals, **change)
    for module in ("os.path", "stages.losses.nothing"):
        with pytest.raises(UserError, match=module):
            distill.import_losses({"losses": [ALM | {"module": module}], "loss": LOSS})


def test_pretrain(world):
    from transformers import AutoModelForCausalLM

    architecture = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    spec = {
        "architecture": architecture
        | {"max_position_embeddings": 512, "tie_word_embeddings": True, "model_type": "llama"}
    }
    spec |= {"train": TRAIN | {"steps": 30, "learning_rate": 1e-2}, "seed": 1}
    manifest = world.run(
        pretrain.main, "models/new/manifest.json", spec, corpus=world.corpus, tokenizer=world.tokenizer
    )
    lines = [json.loads(line) for line in (world.root / "models/new/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["sft"] < 0.8 * lines[0]["sft"] and lines[0]["sft"] == pytest.approx(np.log(300), rel=0.1)
    assert manifest["metrics"]["tokens"] == lines[-1]["tokens_seen"]
    spec["train"]["steps"] = 0
    assert world.run(pretrain.main, "models/zero/manifest.json", spec, corpus=world.corpus, tokenizer=world.tokenizer)
    model = AutoModelForCausalLM.from_pretrained(world.root / "models/zero")
    # Drawn like the others, though transformers would make it zeros.
    assert model.get_input_embeddings().weight[model.config.pad_token_id].norm() > 0
