"""Run a teacher over one shard of a corpus and keep what distillation reads of its predictions."""

from typing import TYPE_CHECKING, Any

from stages.core import stage
from stages.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from stages.core.artifact import Draft
    from stages.signals.compute import Wanted
    from stages.tokenization import ByteView
    from stages.tokenization.encoding import EncodedBatch
    from stages.vocabulary.head import Head

WINDOW = 1024  # examples that are sorted by length together, and one row group of the output


def main(argv: list[str] | None = None) -> None:
    """Encode the shard, refuse what the teacher cannot take, compute and write."""
    job = stage.parse("stages.teacher_signals", __doc__, argv)
    shard, shards = job.spec["shard"], job.spec["shards"]
    if not 0 <= shard < shards:
        raise UserError(f"shard is {shard} but there are {shards} shards, counted from 0.")
    import numpy as np
    import torch

    from stages.artifacts.schemas import EXAMPLES
    from stages.artifacts.tables import read_table
    from stages.core.seeds import seed_of
    from stages.models.description import describe, usable
    from stages.models.loading import load_model, teacher_dtype
    from stages.signals.compute import wanted_signals
    from stages.tokenization import ByteView
    from stages.tokenization.batches import refuse_inexact

    view = ByteView.load(job.inputs["tokenizer"]["path"].parent)
    table = read_table(job.data("corpus", "train.parquet"), EXAMPLES)
    first, last = (len(table) * edge // shards for edge in (shard, shard + 1))
    table = table.slice(first, last - first)
    windows = encode_windows(view, table)
    exact = np.concatenate([np.ones(0, bool), *(batch.exact for batch in windows)])
    refuse_inexact(exact, table["example_id"].to_pylist(), view.name)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(job.spec["model"], job.inputs.get("model"), teacher_dtype(job.spec["dtype"], device))
    model = model.to(device).eval().requires_grad_(False)
    view = usable(view, model, job.spec["model"]["name"])
    teacher = describe(model, job.spec["model"]["name"], view.vocab_size, view.name)
    if windows:
        teacher.check_length(*longest_example(windows, table))
    mask, seed = view.boundary_mask(job.spec["space_mask_mode"]), seed_of(job.spec.get("seed", 0), "samples", shard)
    wanted = wanted_signals(job.spec["needs"], mask, view.eos_id, device, seed)
    with job.publish() as draft:
        compute = Shard(teacher.body, teacher.head, wanted, job.spec["batch_tokens"], teacher.name)
        write_shard(draft, f"part-{shard:04d}.parquet", job, compute, table, windows)


class Shard:
    """A teacher ready to run over windows of examples."""

    def __init__(self, body: "torch.nn.Module", head: "Head", wanted: "Wanted", batch_tokens: int, name: str) -> None:
        self.body, self.head, self.wanted, self.batch_tokens, self.name = body, head, wanted, batch_tokens, name

    def signals(self, batch: "EncodedBatch", progress: Any) -> "dict[str, np.ndarray]":
        """Return the signals of a window in the order of its tokens, computed in batches of like length."""
        import numpy as np

        from stages.signals.compute import teacher_pass
        from stages.tokenization.batches import length_batches, token_places

        result: dict[str, np.ndarray] = {}
        for examples in length_batches(np.diff(batch.offsets), self.batch_tokens):
            part = teacher_pass(self.body, self.head, batch.ids, batch.offsets, examples, self.wanted)
            places = token_places(batch.offsets, examples)
            for column, values in part.items():
                if column not in result:
                    result[column] = np.empty((len(batch.ids), *values.shape[1:]), values.dtype)
                result[column][places] = values
            progress.update(len(places))
        return result

    def errors(self, batch: "EncodedBatch") -> list[dict[str, Any]]:
        """Return `signal_errors` of the first examples of a window."""
        import numpy as np
        import torch

        from stages.models.body import hidden_states
        from stages.signals.compute import padded_rows
        from stages.signals.error import ROWS, signal_errors

        filled = np.flatnonzero(np.diff(batch.offsets))
        first = filled[: 1 + int(np.searchsorted(batch.offsets[1:][filled], ROWS))]
        padded, within = padded_rows(batch.ids, batch.offsets, first)
        device = self.head.weight.device
        with torch.no_grad():
            index = torch.from_numpy(np.flatnonzero(within)).to(device)
            hidden = hidden_states(self.body, torch.from_numpy(padded).to(device), None, index)
        return signal_errors(hidden, self.head, torch.Generator(device).manual_seed(0))


def write_shard(
    draft: "Draft", file: str, job: stage.Job, compute: Shard, table: "pa.Table", windows: "list[EncodedBatch]"
) -> None:
    """Write the shard's Parquet file and its figures."""
    import time

    from tqdm import tqdm

    from stages.signals.compute import check_finite
    from stages.signals.schema import columns_for
    from stages.signals.writer import writing

    tokens = sum(len(batch.ids) for batch in windows)
    names = table["example_id"].to_pylist()
    started = time.time()
    progress = tqdm(total=tokens, unit=" tokens", unit_scale=True)
    with writing(draft.folder / file, columns_for(job.spec["needs"]), job.identity) as writer, progress:
        for number, batch in enumerate(windows):
            signals = compute.signals(batch, progress)
            ids = names[number * WINDOW : (number + 1) * WINDOW]
            check_finite(signals, batch.offsets, ids, compute.name)
            writer.add(ids, batch.exact, batch.ids, batch.offsets, signals)
    if job.spec["shard"] == 0 and tokens and any(job.spec["needs"].get(key) for key in ("top_k", "samples", "hidden")):
        draft.metrics["signal_error"] = compute.errors(next(batch for batch in windows if len(batch.ids)))
    inexact = sum(int((~batch.exact).sum()) for batch in windows)
    draft.describe[file] = {"rows": len(names), "columns": columns_for(job.spec["needs"])}
    draft.metrics.update(examples=len(names), tokens=tokens, inexact=inexact)
    draft.run.update(tokens_per_second=round(tokens / max(time.time() - started, 1e-9), 1))


def encode_windows(view: "ByteView", table: "pa.Table") -> "list[EncodedBatch]":
    """Return the table's examples as token batches of WINDOW examples."""
    from stages.tokenization.batches import encode_rows

    return [encode_rows(view, table.slice(start, WINDOW)) for start in range(0, len(table), WINDOW)]


def longest_example(windows: "list[EncodedBatch]", table: "pa.Table") -> tuple[int, int, str]:
    """Return (tokens, bytes, example id) of the example with most tokens."""
    import numpy as np

    lengths = np.concatenate([np.diff(batch.offsets) for batch in windows])
    at = int(np.argmax(lengths))
    return int(lengths[at]), table["bytes"][at].as_py(), table["example_id"][at].as_py()


if __name__ == "__main__":
    stage.run(main)
