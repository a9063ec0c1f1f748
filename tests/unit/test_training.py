"""The trainer: packing, accumulation, processes, interruption, and what is trained."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from stages.artifacts.schemas import EXAMPLES
from stages.core.errors import UserError
from stages.losses import Loss, sft
from stages.models.body import body_of, hidden_states
from stages.models.description import describe
from stages.tokenization import ByteView
from stages.training import checkpoints
from stages.training.data import Collator, generator, pack_rows, step_examples
from stages.training.modes import DEFAULTS, prepare_mode, settings_of
from stages.training.student import Student
from stages.training.trainer import Run, _Trainer, learning_rate, prepare_losses, train
from stages.vocabulary.head import Sides

from . import tiny

SETTINGS = {
    "steps": 6,
    "batch_size": 6,
    "learning_rate": 1e-2,
    "train_model_mode": "full",
    "log_interval": 2,
    "warmup_steps": 2,
}


def tiny_model(kind, vocab=300, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": vocab, "head_dim": 8}
    config = AutoConfig.for_model(kind, **sizes, **options)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.bpe(folder, 300)
    return ByteView.load(folder)


def examples_table(number=17):
    rows = []
    for index in range(number):
        content = tiny.text(index, 8 + 5 * (index % 7))
        slot = {"role": "text", "text": content, "loss": True}
        row = {"example_id": f"d{index}:0", "document_id": f"d{index}", "slots": [slot], "starts_document": True}
        rows.append(row | {"ends_document": True, "bytes": len(content.encode())})
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


def make_run(view, folder, rank=0, ranks=1, max_tokens=64, train=None, seed=1, model_seed=0, dropout=0.1):
    settings = settings_of(SETTINGS | (train or {}))
    model = tiny_model("llama", seed=model_seed, attention_dropout=dropout)
    described = describe(model, "tiny", view.vocab_size, view.name)
    prepare_mode(described, settings, seed)
    losses = [Loss("sft", sft, {}, 1.0)]
    prepare = lambda examples: prepare_losses(losses, examples)  # noqa: E731
    sizes = {"batch_size": settings["batch_size"], "max_tokens": max_tokens, "seed": seed, "rank": rank, "ranks": ranks}
    collate = Collator(examples_table(), view, None, None, prepare, **sizes)
    student = Student(model, Sides(described.side), frozenset({"observed_logprob"}), None, None)
    return Run(student, losses, collate, settings, seed, folder)


def weights(run):
    return {name: value.detach().clone() for name, value in run.student.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_packed_equals_single(kind):
    options = {"sliding_window": 8, "final_logit_softcapping": 5.0} if kind == "gemma2" else {}
    model = tiny_model(kind, 97, **options)
    head = describe(model, "tiny", 90, "tiny").head
    source = np.random.default_rng(0)
    lengths = [7, 12, 3, 12, 9]
    ids = [source.integers(0, 90, length) for length in lengths]
    rows, width = [[0, 4], [1, 2], [3]], 16
    padded, positions = np.zeros((3, width), np.int64), np.zeros((3, width), np.int64)
    for row, members in enumerate(rows):
        place = 0
        for member in members:
            padded[row, place : place + lengths[member]] = ids[member]
            positions[row, place : place + lengths[member]] = np.arange(lengths[member])
            place += lengths[member]
    index = np.concatenate(
        [row * width + np.arange(sum(lengths[m] for m in members)) for row, members in enumerate(rows)]
    )
    with torch.no_grad():
        packed = hidden_states(body_of(model), torch.tensor(padded), torch.tensor(positions), torch.tensor(index))
        following = torch.zeros(len(index), dtype=torch.int64)
        got = head.statistics(packed, following, None, None)["observed_logprob"]
        want = []
        for member in (member for members in rows for member in members):
            logits = model(input_ids=torch.tensor(ids[member])[None]).logits[0, :, :90]
            want.append(torch.log_softmax(logits, -1)[:, 0])
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-5)


def test_packing_wastes_little_and_loses_nothing():
    lengths = np.random.default_rng(0).integers(1, 100, 60)
    packs = pack_rows(lengths, 400)
    assert sorted(place for rows in packs for row in rows for place in row) == list(range(60))
    width = lengths.max()
    for rows in packs:
        assert len(rows) * width <= 400 and all(lengths[row].sum() <= width for row in rows)
    assert sum(len(rows) for rows in packs) * width < 1.15 * lengths.sum()
    assert pack_rows([50, 3], 10) == [[[0]], [[1]]]


def test_order_is_a_permutation_of_each_epoch():
    seen = np.concatenate([step_examples(step, 4, 10, 7) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and list(seen[:10]) != list(seen[10:])
    assert np.array_equal(step_examples(3, 4, 10, 7), seen[12:16])
    assert generator(1, "a").random() != generator(1, "b").random()


def gradients(run):
    from accelerate import Accelerator

    trainer = _Trainer(run, Accelerator(cpu=True))
    trainer.module.eval()
    trainer.optimizer.step = lambda: None
    trainer.step(0, run.collate(0), False)
    return {name: parameter.grad.clone() for name, parameter in run.student.named_parameters()}, trainer


def test_splitting_a_batch_changes_no_gradient(view, tmp_path):
    whole, first = gradients(make_run(view, tmp_path, max_tokens=10**6))
    split, second = gradients(make_run(view, tmp_path, max_tokens=40))
    assert len(first.run.collate(0).micro_batches) == 1 and len(second.run.collate(0).micro_batches) > 2
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], rtol=1e-4, atol=1e-6)


def test_the_start_token_trains_even_if_it_is_the_padding_token(view, tmp_path):
    run = make_run(view, tmp_path)
    assert run.student.model.config.pad_token_id == view.start_id
    found, _ = gradients(run)
    assert found["model.model.embed_tokens.weight"][view.start_id].norm() > 0


def test_resumed_equals_uninterrupted(view, tmp_path):
    straight = make_run(view, tmp_path / "a")
    expected = train(straight)
    stopped = make_run(view, tmp_path / "b", train={"save_interval": 3})
    collate = stopped.collate

    def interrupted(step):
        if step == 5:
            raise KeyboardInterrupt
        return collate(step)

    stopped.collate = interrupted
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    assert checkpoints.latest(tmp_path / "b").name == "step-00000003"
    again = make_run(view, tmp_path / "b", model_seed=99)
    found = train(again)
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(again)[name]), name
    assert found["metrics"] == expected["metrics"] and len(found["metrics"]) == 3
    lines = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected["metrics"]
    assert not [path for path in (tmp_path / "b").rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]


def test_damaged_checkpoint_is_named(tmp_path):
    checkpoints.save(tmp_path, 3, {"model/x": torch.ones(2)}, {"step": 3})
    (tmp_path / "step-00000009.partial").mkdir()
    (tmp_path / "step-00000003" / "state.safetensors").write_bytes(b"cut")
    assert checkpoints.latest(tmp_path).name == "step-00000003"
    with pytest.raises(UserError, match="step-00000003 cannot be read"):
        checkpoints.load(checkpoints.latest(tmp_path))


def test_termination_saves_and_says_so(view, tmp_path):
    run = make_run(view, tmp_path, train={"steps": 1000})
    threading.Thread(target=lambda: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGTERM))).start()
    with pytest.raises(UserError, match=r"after step \d+ of 1000: the checkpoint is saved"):
        train(run)
    _, state = checkpoints.load(checkpoints.latest(tmp_path))
    assert state["step"] >= 1


def test_two_processes_equal_one(view, tmp_path):
    alone = make_run(view, tmp_path / "one", train={"steps": 3}, dropout=0.0)
    expected = train(alone)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from tests.unit.test_training import process; process(*sys.argv[1:])"
    jobs = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", code, str(view.folder), str(tmp_path / "two")]
        jobs.append(subprocess.Popen(command, env=environment))
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    found = load_file(tmp_path / "two" / "weights.safetensors")
    for name, value in weights(alone).items():
        torch.testing.assert_close(value, found[name], rtol=1e-3, atol=2e-5)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in expected["metrics"]]
    for one, other in zip(lines, expected["metrics"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def process(tokenizer, folder):
    """One of two processes of the test above."""
    from pathlib import Path

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    run = make_run(ByteView.load(Path(tokenizer)), Path(folder), rank, 2, train={"steps": 3}, dropout=0.0)
    train(run)
    if rank == 0:
        save_file(weights(run), Path(folder) / "weights.safetensors")


def test_schedules():
    settings = settings_of({"steps": 10, "warmup_steps": 2, "learning_rate": 1.0})
    assert [learning_rate(step, settings) for step in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]
    assert learning_rate(6, settings | {"lr_schedule": "cosine"}) == pytest.approx(0.5)
    assert learning_rate(9, settings | {"lr_schedule": "constant"}) == 1.0


@pytest.mark.parametrize(
    "mode,embeddings", [("full", True), ("full", False), ("lora", True), ("lora", False), ("embeddings", True)]
)
def test_modes(mode, embeddings):
    model = tiny_model("llama").to(torch.bfloat16)
    options = {"train_model_mode": mode, "train_embeddings": embeddings, "model_lora_rank": 2}
    prepare_mode(describe(model, "tiny", 97, "tiny"), DEFAULTS | options, 1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert ("lm_head.weight" in trained) == ("model.embed_tokens.weight" in trained) == embeddings
    body = {name for name in trained if "layers" in name}
    assert bool(body) == (mode != "embeddings") and (mode == "lora") == any("lora_A" in name for name in body)
    if mode == "lora":
        assert all("lora_" in name for name in body)


def test_too_few_examples(view):
    with pytest.raises(UserError, match="2 processes"):
        Collator(examples_table(), view, None, None, None, batch_size=1, max_tokens=10, seed=0, ranks=2)
    with pytest.raises(UserError, match="no training examples"):
        Collator(examples_table(0), view, None, None, None, batch_size=1, max_tokens=10, seed=0)


def test_frozen_half_precision_trains_on_a_cpu(view, tmp_path):
    train_lora = {"train_model_mode": "lora", "train_embeddings": False, "model_lora_rank": 2, "steps": 2}
    run = make_run(view, tmp_path, train=train_lora)
    before = weights(run)
    assert np.isfinite(train(run)["metrics"][-1]["loss"])
    changed = {name for name, value in weights(run).items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    half = make_run(view, tmp_path / "half", train={"dtype": "bfloat16", "steps": 2})
    assert np.isfinite(train(half)["metrics"][-1]["loss"])
