"""Cut a data set, local files or Python's own documentation into training and held-out examples."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core import artifact, stage
from stages.core.errors import UserError
from stages.corpora.examples import ROWS_PER_GROUP, ExampleWriter, example_rows

if TYPE_CHECKING:
    from stages.corpora.cutting import Turn

TRAIN_ON = "assistant"
LEFT_OUT = {
    "empty_rows": "no text in them (null, empty, or no such column)",
    "refused_rows": "they hold more than text, an image say",
    "untrained_documents": "nothing in them is trained on, see train_on",
}


def main(argv: list[str] | None = None) -> None:
    """Write train.parquet and heldout.parquet, one row per example (schema EXAMPLES)."""
    job = stage.parse("stages.corpus", __doc__, argv)
    subset = job.spec["kind"] == "subset"
    _check_files(job.spec.get("files", {}))
    counts: Counter[str] = Counter()
    with job.publish() as draft:
        splits = _subset(job) if subset else _examples(job.spec, counts)
        writers = {
            split: ExampleWriter(draft.folder / f"{split}.parquet", job.identity) for split in ("train", "heldout")
        }
        for split, rows in splits:
            writers[split].add(rows)
        for split, writer in writers.items():
            writer.close()
            draft.metrics |= {f"{split}_{name}": value for name, value in writer.counts().items()}
            draft.describe[f"{split}.parquet"] = {"rows": writer.examples}
        if not writers["train"].examples:
            raise UserError(_empty(job))
        draft.metrics |= counts
        for name, why in LEFT_OUT.items():
            if counts[name]:
                print(f"{counts[name]} {name.replace('_', ' ')} left out: {why}.")


def _check_files(files: dict[str, str]) -> None:
    """Refuse files ({path: SHA-256}) that are not what they were when the run was planned."""
    for name, digest in files.items():
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"{path} does not exist: restore it, or correct the path of the corpus.")
        if artifact.file_digest(path) != digest:
            raise UserError(
                f"{path} was changed since the run was planned: start snakemake again, which plans with the new text."
            )


def _examples(spec: dict[str, Any], counts: Counter[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (split, rows of one document) in document order; `counts` gets what was read and what is left out."""
    from stages.corpora.documents import read_documents, sampled

    seen: Counter[str] = Counter()
    seed = spec.get("seed", 0)
    streamed = spec.get("streaming") and spec["kind"] == "hub"
    count = None if streamed else spec.get("sample")
    documents = sampled(
        read_documents(spec, counts), count, lambda document: _fraction("sample", seed, _content_id(document.slots))
    )
    for document in _with_progress(documents):
        content = _content_id(document.slots)
        seen[content] += 1
        document_id = content if seen[content] == 1 else f"{content}-{seen[content]}"
        # Both by content alone: more documents never move one to the other side, and copies stay together.
        split = "heldout" if _fraction("heldout", seed, content) < spec["heldout"] else "train"
        rows = _rows(document, document_id, spec["max_bytes"], spec.get("train_on", TRAIN_ON))
        if rows:
            yield split, rows
        else:
            counts["untrained_documents"] += 1


def _rows(document: Any, document_id: str, max_bytes: int, train_on: str) -> list[dict[str, Any]]:
    """Return the examples of a document."""
    from stages.corpora.cutting import Turn, cut_text, cut_turns

    if document.slots[0].role == "text":
        cut = [[Turn("text", piece)] for piece in cut_text(document.slots[0].text, max_bytes)]
    else:
        cut = cut_turns(_with_loss(document.slots, train_on), max_bytes)
    return example_rows(document_id, cut, document.starts, document.ends)


def _with_loss(turns: "tuple[Turn, ...]", train_on: str) -> "list[Turn]":
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    trained = {"all": range(len(turns)), "assistant": answers, "last_answer": answers[-1:]}[train_on]
    return [turn._replace(loss=i in trained) for i, turn in enumerate(turns)]


def _subset(job: stage.Job) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield a share of the parent's training text, in whole documents, and all of its held-out text."""
    from stages.artifacts.schemas import EXAMPLES
    from stages.artifacts.tables import read_batches, read_table

    train = job.data("corpus", "train.parquet")
    sizes: Counter[str] = Counter()
    columns = read_table(train, EXAMPLES, ["document_id", "bytes"])
    for document, size in zip(*(column.to_pylist() for column in columns), strict=True):
        sizes[document] += size
    chosen = _share(sizes, job.spec["fraction"], job.spec.get("seed", 0))
    for split, path in (("train", train), ("heldout", job.data("corpus", "heldout.parquet"))):
        for batch in read_batches(path, EXAMPLES, ROWS_PER_GROUP):
            yield split, [row for row in batch.to_pylist() if split == "heldout" or row["document_id"] in chosen]


def _share(sizes: dict[str, int], fraction: float, seed: int) -> set[str]:
    """Return documents that hold at most `fraction` of all bytes, in the order of a hash; what is too large stays out.

    By bytes, since one document of a corpus is often a thousand times as long as another.
    """
    room = fraction * sum(sizes.values())
    chosen = set()
    for document in sorted(sizes, key=lambda name: (_fraction("subset", seed, name), name)):
        if sizes[document] <= room:
            chosen.add(document)
            room -= sizes[document]
    return chosen


def _content_id(turns: "tuple[Turn, ...]") -> str:
    hasher = hashlib.sha256()
    for turn in turns:
        data = (turn.text + turn.extra).encode()
        hasher.update(f"{turn.role} {len(data)}\n".encode() + data)
    return hasher.hexdigest()[:16]


def _fraction(purpose: str, seed: int, name: str) -> float:
    """Return a number in [0, 1) that depends on the purpose, the seed and the name alone."""
    digest = hashlib.sha256(f"{purpose} {seed} {name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _with_progress(documents: Any) -> Any:
    from tqdm import tqdm

    return tqdm(documents, desc="documents", unit="")


def _empty(job: stage.Job) -> str:
    if job.spec["kind"] == "subset":
        return f"{job.manifest}: no training document falls into fraction {job.spec['fraction']}; choose a larger one."
    source = job.spec.get("path") or ", ".join(job.spec.get("files", {})) or job.spec["kind"]
    kept = (
        f"with train_on={job.spec['train_on']} and heldout={job.spec['heldout']}"
        if "train_on" in job.spec
        else "to train on"
    )
    return f"{job.manifest}: {source} leaves no training text {kept}; give more documents or change these settings."


if __name__ == "__main__":
    stage.run(main)
