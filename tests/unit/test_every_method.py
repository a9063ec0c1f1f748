"""Every row of the table of methods through the programs: splits, two processes, invariants, nothing to learn."""

import json
import os
import socket
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages import (
    mined_mapping,
    teacher_head,
    teacher_index,
    teacher_signals,
    tokenizer_bias,
    tokenizer_stats,
)
from stages.artifacts.schemas import EXAMPLES
from stages.planning.methods import METHODS

from . import test_distill, tiny

NEEDS = {
    "boundary": True, "eos": True, "top_k": 100, "temperatures": [2.0], "samples": 20, "hidden": True,
    "hidden_states": True,
}  # fmt: skip
LOSS = {"latents_do_project": True, "tokenizer_pair_bias_threshold": 0.1}
TRAIN = {"steps": 3, "batch_size": 8, "max_tokens": 10**6}
NAMES = list(METHODS)
# Texts that teach little or nothing: none, one byte, masked, one chunk without a space in it.
CORNERS = [("", True), ("x", True), ("", False), (tiny.text(3, 12), False), ("日本語", True)]


class World(test_distill.World):
    """Two tokenizers and all that any method reads; or one tokenizer, and a teacher with padded columns."""

    def __init__(self, root, same):
        super().__init__(root)
        if same:
            self.teacher_tokenizer = self.tokenizer
        self.commands = {}
        self.corpora = {
            "mixed": self.written("mixed", [*CORNERS, *((tiny.text(i, 6 + 9 * i), True) for i in range(7))]),
            "corners": self.written("corners", [(text, False) for text, _ in CORNERS]),
        }
        self.inputs = {name: self.made(name) for name in self.corpora}

    def variant(self, name, padding, constant):
        """The student with rows of junk after its 300, and a constant added to the logits of each place."""
        folder = self.root.parent / f"weights-{name}"
        tiny.llama(folder, 300 + padding, 2)
        weights = load_file(self.root.parent / "weights-student" / "model.safetensors")
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            weights[key] = torch.cat([weights[key], torch.full((padding, 32), 40.0)])
        weights["lm_head.weight"] += constant * torch.randn(32, generator=torch.Generator().manual_seed(0))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        manifest = f"models/{name}/manifest.json"
        tiny.publish(self.root / manifest, "pretrain", {path.name: path for path in folder.iterdir()})
        return self.named(manifest)

    def written(self, name, texts):
        rows = []
        for number, (content, trained) in enumerate(texts):
            row = {"example_id": f"{number}", "document_id": f"{number}", "bytes": len(content.encode())}
            row |= {"slots": [{"role": "text", "text": content, "loss": trained}]}
            rows.append(row | {"starts_document": True, "ends_document": trained})
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=EXAMPLES), sink)
        manifest = f"corpora/{name}/manifest.json"
        tiny.publish(self.root / manifest, "corpus", {"train.parquet": sink.getvalue().to_pybytes()})
        return self.named(manifest)

    def made(self, corpus):
        """The artifacts that methods read, of one corpus."""
        pair = {"teacher_tokenizer": self.teacher_tokenizer, "tokenizer": self.tokenizer}
        text, home = {"corpus": self.corpora[corpus]}, f"made/{corpus}"
        teacher = {"tokenizer": self.teacher_tokenizer, "model": self.teacher}
        spec = {"model": test_distill.MODEL, "dtype": "auto"}
        shard = spec | {
            "needs": NEEDS,
            "space_mask_mode": test_distill.LOSS["space_mask_mode"],
            "shards": 1,
            "shard": 0,
        }
        self.run(
            teacher_signals.main, f"{home}/part-0000.manifest.json", shard | {"batch_tokens": 200}, **teacher, **text
        )
        self.run(teacher_index.main, f"{home}/manifest.json", {}, shards=[f"{home}/part-0000.manifest.json"])
        self.run(teacher_head.main, f"{home}/head.manifest.json", spec, **teacher)
        self.run(mined_mapping.main, f"{home}/mapping/manifest.json", {"max_distance": 0.3}, **pair)
        statistics = {"statistics": f"{home}/statistics/manifest.json"}
        self.run(tokenizer_stats.main, statistics["statistics"], {}, **pair, **text)
        self.run(
            tokenizer_bias.main, f"{home}/bias/manifest.json", {"pairs": "chunk_ends"}, **pair, **text, **statistics
        )
        read = {name: f"{home}/{name}/manifest.json" for name in ("mapping", "bias")}
        return text | read | {"signals": f"{home}/manifest.json", "teacher_head": f"{home}/head.manifest.json"}

    def run(self, main, manifest, spec, **inputs):
        def kept(argv):
            self.commands[manifest] = argv
            main(argv)

        return super().run(kept, manifest, spec, **inputs)

    def train(self, name, kind, corpus="mixed", init=None, **train):
        """Metrics and weights of a method on cached signals."""
        method = METHODS[name]
        entry = {"name": name, "module": method.module, "chunks": method.chunks, "weight": 1.0}
        reads = self.inputs[corpus] if method.teacher else {"corpus": self.corpora[corpus]}
        self.distill(f"{kind}-{name}", [entry], TRAIN | train, LOSS, init=init, **reads)
        return self.result(f"{kind}-{name}")

    def result(self, name):
        return self.metrics(name), load_file(self.root / f"students/{name}/model.safetensors")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")
    return {same: World(root / f"same-{same}" / "results", same) for same in (False, True)}


@pytest.fixture(scope="module")
def whole(worlds):
    """Each method's run with a batch in one piece, and the world of its tokenizers."""
    found = {}
    for name in NAMES:
        world = worlds[METHODS[name].same_tokenizer]
        found[name] = (*world.train(name, "whole"), world)
    return found


def agree(found, expected):
    for one, other in zip(found[0], expected[0], strict=True):
        for key, value in other.items():
            assert one[key] == pytest.approx(value, rel=2e-3, abs=1e-6), key
    for name, value in expected[1].items():
        assert abs(found[1][name] - value).max() < 1e-4, name


@pytest.mark.parametrize("name", NAMES)
def test_a_split_batch_is_the_same_batch(whole, name):
    metrics, weights, world = whole[name]
    assert metrics[0][name] > 0 and metrics[0]["grad_norm"] > 0
    agree(world.train(name, "split", max_tokens=24), (metrics, weights))


def test_two_processes_are_one(whole):
    commands = []
    for name, (_, _, world) in whole.items():
        argv = world.commands[f"students/whole-{name}/manifest.json"]
        commands.append(
            [f"students/two-{name}/manifest.json" if part.startswith("students/") else part for part in argv]
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = []
    for rank in range(2):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        code = "import json, sys; from stages.distill import main; [main(argv) for argv in json.load(sys.stdin)]"
        job = subprocess.Popen([sys.executable, "-c", code], env=os.environ | ranks | place, stdin=subprocess.PIPE)
        job.stdin.write(json.dumps(commands).encode())
        job.stdin.close()
        jobs.append(job)
    assert [job.wait(timeout=400) for job in jobs] == [0, 0]
    for name, (metrics, weights, world) in whole.items():
        agree(world.result(f"two-{name}"), (metrics, weights))


@pytest.mark.parametrize("name", NAMES)
def test_padding_columns_and_a_constant_on_all_logits_change_nothing(whole, name):
    metrics, _, world = whole[name]
    # The maps of dskd_eta start in a closed form of the output matrix; baseline_dskd's projectors only take its sizes.
    constant = 0.0 if name == "dskd_eta" else 3.0
    init = world.variant(f"odd-{constant:.0f}", 20, constant)
    found, _ = world.train(name, "odd", init=init, steps=1)
    for key in (name, "loss", "grad_norm"):
        assert found[0][key] == pytest.approx(metrics[0][key], rel=1e-3), key


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_learn_is_zero(worlds, name):
    metrics, _ = worlds[METHODS[name].same_tokenizer].train(name, "corners", "corners", steps=1)
    assert metrics[0][name] == metrics[0]["loss"] == metrics[0]["grad_norm"] == 0
    assert all(value == value and abs(value) < float("inf") for value in metrics[0].values())
