"""Adding up the gradients of several losses: weights, schedules, splitting, processes, interruption, bad input."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stages.core.errors import UserError
from stages.losses import Loss, sft
from stages.planning import expand, plan, run, sources
from stages.tokenization import ByteView
from stages.training import checkpoints
from stages.training.aggregation import SCHEDULES, GradNorm, combination, dot_products, factors, last_block, parse
from stages.training.modes import settings_of
from stages.training.trainer import _Trainer, train

from . import tiny
from .test_config import changed
from .test_distill import ALM, SFT, World
from .test_training import make_run, weights

WAYS = (
    "none", "approx_gradmag", "approx_gradmag_preserve_mag", "gradnorm", "gradmag", "gradclip:0.1", "pcgrad",
    "pcgrad+gradmag",
)  # fmt: skip


class Square:
    """A second loss: the squared log-probability of each target."""

    prepare = staticmethod(sft.prepare)

    @staticmethod
    def loss(student, arrays, options):
        return options["factor"] * student["observed_logprob"][arrays["rows"]].square().sum(), {}


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.bpe(folder, 300)
    return ByteView.load(folder)


def two_losses(view, folder, way, *, own=(1.0, 0.5), schedules=("constant", "constant"), factor=3.0, **options):
    """A run of two losses, put into the list that the collator of `make_run` reads."""
    settings = {"multitask_aggregation_fn": way, "max_grad_norm": 1e9} | options.pop("train", {})
    run = make_run(view, folder, train=settings, **options)
    run.losses[:] = [
        Loss("sft", sft, {}, own[0], schedules[0]),
        Loss("square", Square, {"factor": factor}, own[1], schedules[1]),
    ]
    return run


def gradients(run, step=0):
    """The gradient of one step, and each loss's factor."""
    trainer = _Trainer(run, Accelerator(cpu=True))
    trainer.module.eval()
    trainer.optimizer.step = lambda: None
    trainer.step(step, run.collate(step), False)
    found = {name: p.grad.clone() for name, p in run.student.named_parameters() if p.grad is not None}
    window = trainer.metrics.window
    return found, np.array([window.get(f"{loss.name}/weight", loss.weight) for loss in run.losses])


def alone(view, folder, which, **options):
    """The gradient of one of the two losses."""
    own = [0.0, 0.0]
    own[which] = 1.0
    return gradients(two_losses(view, folder, "none", own=own, **options))[0]


def flat(gradient):
    return torch.cat([value.flatten() for value in gradient.values()])


@pytest.mark.parametrize("way", WAYS)
def test_splitting_a_batch_changes_nothing(view, tmp_path, way):
    whole, one = gradients(two_losses(view, tmp_path, way, max_tokens=10**6))
    split, other = gradients(two_losses(view, tmp_path, way, max_tokens=40))
    assert len(two_losses(view, tmp_path, way, max_tokens=40).collate(0).micro_batches) > 2
    np.testing.assert_allclose(one, other, rtol=1e-4)
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_the_losses_gradients_times_their_factors(view, tmp_path, way):
    found, factor = gradients(two_losses(view, tmp_path, way))
    parts = [alone(view, tmp_path, which) for which in (0, 1)]
    for name, value in found.items():
        torch.testing.assert_close(value, factor[0] * parts[0][name] + factor[1] * parts[1][name], rtol=1e-3, atol=1e-5)


def test_weights_are_ratios_of_gradient_norms(view, tmp_path):
    parts = [flat(alone(view, tmp_path, which)) for which in (0, 1)]
    _, factor = gradients(two_losses(view, tmp_path, "gradmag", own=(1.0, 0.5)))
    np.testing.assert_allclose(factor * [part.norm().item() for part in parts], [1.0, 0.5], rtol=1e-4)
    run = two_losses(view, tmp_path, "approx_gradmag_preserve_mag", own=(1.0, 0.5))
    block = {name for name, p in run.student.named_parameters() if any(p is q for q in last_block(run.student.model))}
    assert block and all("layers.1." in name for name in block)
    _, factor = gradients(run)
    parts = [alone(view, tmp_path, which) for which in (0, 1)]
    sizes = [flat({name: part[name] for name in block}).norm().item() for part in parts]
    assert factor.sum() == pytest.approx(1)
    assert factor[0] * sizes[0] / (factor[1] * sizes[1]) == pytest.approx(2, rel=1e-4)
    # Multiplying a loss changes nothing.
    _, scaled = gradients(two_losses(view, tmp_path, "approx_gradmag", own=(1.0, 0.5), factor=300.0))
    _, plain = gradients(two_losses(view, tmp_path, "approx_gradmag", own=(1.0, 0.5), factor=3.0))
    np.testing.assert_allclose(scaled * [1, 100], plain, rtol=1e-4)


def test_lora_compares_the_adapters_of_the_last_block(view, tmp_path):
    train_lora = {"train_model_mode": "lora", "model_lora_rank": 2}
    run = two_losses(view, tmp_path, "approx_gradmag", train=train_lora)
    ours = {id(p) for p in last_block(run.student.model)}
    names = [name for name, p in run.student.named_parameters() if id(p) in ours]
    assert names and all("layers.1." in name and "lora_" in name for name in names)
    _, factor = gradients(run)
    assert (factor > 0).all() and np.isfinite(factor).all()


def test_dropout_is_the_same_in_both_rounds(view, tmp_path):
    """The factors come from the very gradients that are added up, and the generator goes on as after one round."""
    ends = []
    for way in ("none", "approx_gradmag"):
        run = two_losses(view, tmp_path, way, dropout=0.5)
        trainer = _Trainer(run, Accelerator(cpu=True))
        trainer.step(0, run.collate(0), False)
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


@pytest.mark.parametrize(("schedule", "expected"), [("linear", 0.5), ("cosine", 0.5), ("reverse_cosine", 0.5)])
def test_schedules(view, tmp_path, schedule, expected):
    ends = {"linear": (0, 1), "cosine": (1, 0), "reverse_cosine": (0, 1)}[schedule]
    assert [SCHEDULES[schedule](share) for share in (0.0, 0.5, 1.0)] == pytest.approx([ends[0], expected, ends[1]])
    run = two_losses(
        view, tmp_path, "none", own=(1.0, 4.0), schedules=("constant", schedule), train={"log_interval": 1}
    )
    lines = train(run)["metrics"]
    seen = [line["square/weight"] for line in lines]
    assert seen == pytest.approx([4 * SCHEDULES[schedule](step / 6) for step in range(6)])
    assert all("sft/weight" not in line for line in lines)
    assert [line["loss"] for line in lines] == pytest.approx(
        [line["sft"] + line["square/weight"] * line["square"] for line in lines]
    )


@pytest.mark.parametrize("way", ["gradnorm", "approx_gradmag", "pcgrad+gradclip:0.5"])
def test_resumed_equals_uninterrupted(view, tmp_path, way):
    schedules = ("constant", "reverse_cosine")
    straight = two_losses(view, tmp_path / "a", way, schedules=schedules)
    expected = train(straight)
    stopped = two_losses(view, tmp_path / "b", way, schedules=schedules, train={"save_interval": 3})
    collate = stopped.collate

    def interrupted(step):
        if step == 5:
            raise KeyboardInterrupt
        return collate(step)

    stopped.collate = interrupted
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    tensors, _ = checkpoints.load(checkpoints.latest(tmp_path / "b"))
    assert ("gradnorm/exp_avg" in tensors) == (way == "gradnorm")
    again = two_losses(view, tmp_path / "b", way, schedules=schedules, model_seed=99)
    found = train(again)
    assert found["metrics"] == expected["metrics"]
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(again)[name]), name


@pytest.mark.parametrize(
    ("way", "max_tokens"), [("approx_gradmag", 64), ("approx_gradmag", 10**6), ("gradnorm", 64), ("pcgrad+gradmag", 64)]
)
def test_two_processes_equal_one(view, tmp_path, way, max_tokens):
    single = two_losses(view, tmp_path / "one", way, train={"steps": 3}, dropout=0.0)
    expected = train(single)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from tests.unit.test_aggregation import process; process(*sys.argv[1:])"
    jobs = []
    for rank in range(2):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", code, str(view.folder), str(tmp_path / "two"), way, str(max_tokens)]
        jobs.append(subprocess.Popen(command, env=os.environ | ranks | place))
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    for one, other in zip(lines, expected["metrics"], strict=True):
        for key, value in other.items():
            assert one[key] == pytest.approx(value, rel=1e-3), key
    found = load_file(tmp_path / "two" / "weights.safetensors")
    for name, value in weights(single).items():
        torch.testing.assert_close(value, found[name], rtol=1e-3, atol=5e-5)


def process(tokenizer, folder, way, max_tokens):
    """One of two processes of the test above."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    options = {"rank": rank, "ranks": 2, "dropout": 0.0, "train": {"steps": 3}, "max_tokens": int(max_tokens)}
    run = two_losses(ByteView.load(Path(tokenizer)), Path(folder), way, **options)
    train(run)
    if rank == 0:
        save_file(weights(run), Path(folder) / "weights.safetensors")


def test_the_program(tmp_path):
    """Settings of a spec reach the training, and cached signals give what an online teacher gives."""
    world = World(tmp_path / "results")
    losses = [ALM, SFT | {"schedule": "reverse_cosine"}]
    train = {"multitask_aggregation_fn": "approx_gradmag_preserve_mag", "max_tokens": 64, "steps": 3}
    world.distill("cached", losses, train=train, signals=world.signals())
    world.distill("online", losses, train=train, teacher="online")
    lines = world.metrics("cached")
    assert [line["alm_unconstrained/weight"] + line["sft/weight"] for line in lines] == pytest.approx([1.0] * 3)
    assert lines[0]["sft/weight"] == 0 < lines[2]["sft/weight"]
    for one, other in zip(lines, world.metrics("online"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    with pytest.raises(UserError, match="schedule of loss 'sft' is 'sine'"):
        world.distill("refused", [SFT | {"schedule": "sine"}])


def test_gradnorm_against_the_paper():
    """One step by hand: L_grad = mean |w_i n_i - T_i|, whose derivative is sign(.) n_i / N; Adam moves by its rate."""
    learned = GradNorm(2, alpha=0.5, rate=0.1)
    learned.update(np.array([1.0, 3.0]), np.array([2.0, 8.0]))
    # First step: r = 1, T = mean(1, 3) = 2: loss 0 is too short and loss 1 too long by 1.
    np.testing.assert_allclose(learned.factors, [1.1, 0.9], rtol=1e-3)
    np.testing.assert_allclose(learned.first, [2, 8])
    learned.update(np.array([2.0, 2.0]), np.array([2.0, 4.0]))
    # Loss 1 has halved: r = (1, 0.5) / 0.75, so T = 2 sqrt(4/3), 2 sqrt(2/3) against 2.2, 1.8: both move up.
    assert learned.factors[0] > 1.1 - 0.01 and learned.factors.sum() == pytest.approx(2)


def test_gradnorm_makes_norms_equal():
    """With alpha 0 the weighted gradients end up equally long."""
    learned, sizes = GradNorm(2, alpha=0.0, rate=0.01), np.array([1.0, 4.0])
    for _ in range(1000):
        learned.update(sizes, np.array([1.0, 1.0]))
    np.testing.assert_allclose(learned.factors, [1.6, 0.4], atol=0.03)
    again = GradNorm(2, alpha=0.0, rate=0.01)
    again.restore({name: value.clone() for name, value in learned.tensors().items()})
    for one in (learned, again):
        one.update(sizes, np.array([2.0, 0.0]))
    assert np.array_equal(learned.factors, again.factors)


def test_gradnorm_of_losses_that_are_zero():
    learned = GradNorm(2, alpha=0.12, rate=0.025)
    for _ in range(3):
        learned.update(np.zeros(2), np.zeros(2))
    np.testing.assert_allclose(learned.factors, [1.0, 1.0])


GRADIENTS = st.lists(st.lists(st.floats(-10, 10, width=16), min_size=4, max_size=4), min_size=2, max_size=3)


@given(GRADIENTS, st.data())
def test_pcgrad_leaves_no_conflict_with_the_last(rows, data):
    rows = torch.tensor(rows)
    orders = [data.draw(st.permutations(range(len(rows)))) for _ in rows]
    made = (
        combination(dot_products(rows), np.ones(len(rows)), parse("pcgrad").functions, orders) @ rows.double().numpy()
    )
    for i, order in enumerate(orders):
        last = [j for j in order if j != i][-1]
        assert made[i] @ rows[last].double().numpy() >= -1e-6 * (1 + np.abs(rows.numpy()).max() ** 2)
    gram = rows.double() @ rows.double().T
    if (gram >= 0).all():
        np.testing.assert_allclose(made, rows, atol=1e-9)


@given(GRADIENTS, st.sampled_from(WAYS[1:]))
def test_factors_are_finite_and_permute_with_the_losses(rows, way):
    rows = torch.tensor(rows)
    own = np.linspace(0.5, 1.5, len(rows))
    in_turn = [range(len(rows))] * len(rows)
    found = factors(parse(way), dot_products(rows), own, in_turn)
    assert np.isfinite(found).all()
    if way != "pcgrad" and way != "pcgrad+gradmag":
        turned = factors(parse(way), dot_products(rows.flip(0)), own[::-1], in_turn)
        np.testing.assert_allclose(turned[::-1], found, rtol=1e-9)


def test_what_a_projection_removes_is_nothing():
    """Two gradients in opposite directions leave nothing over, and nothing is not blown up to unit length."""
    rows = torch.tensor([[0.1, 0.3], [-0.2, -0.6]])
    found = factors(parse("pcgrad+gradmag"), dot_products(rows), np.ones(2), [range(2)] * 2)
    np.testing.assert_allclose(found @ rows.double().numpy(), 0, atol=1e-6)


def test_a_loss_of_weight_zero_has_no_part(view, tmp_path):
    for way in ("approx_gradmag_preserve_mag", "pcgrad", "gradmag"):
        with_it, factor = gradients(two_losses(view, tmp_path, way, own=(1.0, 0.0)))
        assert factor[1] == 0
        scaled = {name: factor[0] * value for name, value in alone(view, tmp_path, 0).items()}
        for name, value in with_it.items():
            torch.testing.assert_close(value, scaled[name], rtol=1e-3, atol=1e-6)


def test_a_gradient_that_is_not_finite_names_its_loss(view, tmp_path):
    for way in ("gradmag", "approx_gradmag", "gradnorm"):
        with pytest.raises(UserError, match="The gradient of square in step 1 is not finite"):
            gradients(two_losses(view, tmp_path, way, factor=float("inf")))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gradmagg", "'gradmagg' is unknown"),
        ("gradmag+none", "none stands alone"),
        ("gradclip", "gradclip needs the longest gradient"),
        ("gradclip:0", "gradclip needs the longest gradient"),
        ("gradclip:nan", "gradclip needs the longest gradient"),
        ("gradmag:1", "'gradmag:1' is unknown"),
    ],
)
def test_unknown_ways_are_refused(text, sentence):
    with pytest.raises(UserError, match=sentence):
        settings_of({"multitask_aggregation_fn": text})


def test_nothing_to_compare_is_refused(view, tmp_path):
    with pytest.raises(UserError, match="In the last transformer block of LlamaForCausalLM nothing is trained"):
        gradients(two_losses(view, tmp_path, "approx_gradmag", train={"train_model_mode": "embeddings"}))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("multitask_aggregation_fn", "approx_gradmagg", "multitask_aggregation_fn.*did you mean `approx_gradmag`"),
        ("multitask_aggregation_fn", "gradnorm+gradmag", "`gradnorm` stands alone"),
        ("multitask_aggregation_fn", "gradclip", "has `gradclip`; did you mean `gradclip:<longest>`"),
        ("multitask_aggregation_fn", "gradclip:0.0", "has `gradclip:0.0`"),
        ("loss_schedules", ["linear", "linear"], "loss_schedules. has 2 words for 1 losses"),
        ("loss_schedules", ["linaer"], "loss_schedules.0.*did you mean `linear`"),
    ],
)
def test_faults_of_a_config(repository, key, value, sentence):
    schema = yaml.safe_load((repository / run.SCHEMA).read_text())
    with pytest.raises(UserError, match=sentence):
        expand.expand(changed(f"experiments/alm/{key}", value), schema)
    config = changed("experiments/alm/multitask_aggregation_fn", "approx_gradmag")
    config["experiments"]["alm"]["train"] = {"train_model_mode": "embeddings"}
    with pytest.raises(UserError, match="last transformer block, of which train_model_mode `embeddings`"):
        expand.expand(config, schema)


def test_plan_of_an_aggregation(repository, tmp_path):
    """Settings reach the job that reads them and no other."""
    schema = yaml.safe_load((repository / run.SCHEMA).read_text())

    def trained(**settings):
        config = changed("experiments/alm/losses", ["alm_unconstrained", "sft"])
        config["experiments"]["alm"] |= settings
        nodes = plan.build(expand.expand(config, schema), sources.Digests(tmp_path / "digests.json"))
        return nodes["students/alm/manifest.json"].spec

    plain, other = trained(), {"gradnorm_alpha": 0.5}
    assert "multitask_aggregation_fn" not in plain["train"] and plain == trained(baseline=other)
    assert trained(multitask_aggregation_fn="pcgrad")["train"] == plain["train"] | {
        "multitask_aggregation_fn": "pcgrad"
    }
    learned = trained(multitask_aggregation_fn="gradnorm", baseline=other)["train"]
    assert learned["gradnorm_alpha"] == 0.5 and learned["gradnorm_lr"] == 0.025
    assert settings_of(learned)["gradnorm_alpha"] == 0.5
    schedules = [loss["schedule"] for loss in trained(loss_schedules=["constant", "cosine"])["losses"]]
    assert schedules == ["constant", "cosine"]
