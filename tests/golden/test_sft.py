"""SFT against tokenkit's `compute_sft_loss`, values and gradients of tokenkit_sft_uld.json, and DSKD's cross entropy.

DSKD's figure with label smoothing has no counterpart: ours has no such setting.
"""

import json

import numpy as np
import torch

from stages.losses import sft
from tests.conftest import golden_file
from tests.golden.compare import gradients, values


def test_sft(golden):
    cases = json.loads(golden_file(golden, "tokenkit_sft_uld.json").read_text())
    cases = [case for case in cases if case["id"].startswith("sft")]
    z = dict(np.load(golden_file(golden, "tokenkit_sft_uld.npz")))
    ids, mask = z["input_ids"], z["loss_mask"]
    rows, length = ids.shape
    assert cases
    for case in cases:
        logits = torch.tensor(z["student_logits"], requires_grad=True)
        following = torch.tensor(np.roll(ids, -1, axis=1), dtype=torch.int64)
        observed = torch.log_softmax(logits, -1).gather(-1, following[..., None]).flatten()
        targets = sft.target_rows(mask.reshape(-1), np.arange(rows + 1) * length)
        total, _ = sft.loss({"observed_logprob": observed}, {"rows": torch.tensor(targets)}, {})
        whole = mask if case["global_batch_is_batch"] else z["global_loss_mask"]
        count = sft.target_rows(whole.reshape(-1), np.arange(len(whole) + 1) * length)
        # tokenkit divides means: of the batch by that of the global batch, which has more rows.
        value = total / len(count) * (len(whole) / rows)
        values(value.item(), case["loss"])
        value.backward()
        number = case["id"].split("_")[1]
        gradients(logits.grad.numpy(), z[f"sft_grad_{number}"])


def test_dskd(golden):
    """DSKD's labels are those of the row they stand at: one more token in front makes them tokens of ours."""
    z = np.load(golden_file(golden, "dskd_uld.npz"))
    labels = z["student_target"]
    trained = np.pad(labels != -100, ((0, 0), (1, 0)))
    rows = torch.tensor(sft.target_rows(trained.reshape(-1), np.arange(len(labels) + 1) * trained.shape[1]))
    logprob = torch.log_softmax(torch.tensor(z["student_logits"]), -1)
    observed = logprob.gather(-1, torch.tensor(labels).clamp(min=0)[..., None])[..., 0]
    observed = torch.nn.functional.pad(observed, (0, 1), value=torch.nan).flatten()  # no token after the last
    total, _ = sft.loss({"observed_logprob": observed}, {"rows": rows}, {})
    assert len(rows) == (labels != -100).sum()
    values(total.item(), z["cross_entropy_sum"])
