"""Build a local lm-eval task from held-out text: which of four passages continues this one?"""

import json
from pathlib import Path
from typing import Any

from stages.core import stage
from stages.core.errors import UserError
from stages.core.seeds import seed_of

DEFAULTS = {"items": 200, "context_bytes": 256, "continuation_bytes": 64}

TASK = """\
# Made by stages.cloze_task. With lm-eval alone, run it from this folder: `lm_eval --include_path . --tasks {name}`.
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: items.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def main(argv: list[str] | None = None) -> None:
    """Read a corpus's held-out split, write `<name>.yaml` and `items.jsonl`."""
    job = stage.parse("stages.cloze_task", __doc__, argv)
    settings = {key: job.spec.get(key) or value for key, value in DEFAULTS.items()}
    import numpy as np

    from stages.evaluation import cloze

    names, texts = heldout_texts(job.data("corpus", "heldout.parquet"))
    pool = [
        window
        for index, text in enumerate(texts)
        for window in cloze.windows(index, text, settings["context_bytes"], settings["continuation_bytes"])
    ]
    name = job.spec["name"]
    generator = np.random.default_rng(seed_of(job.spec["seed"], "cloze", name))
    items = cloze.questions(pool, settings["items"], generator)
    if len(items) < settings["items"]:
        raise UserError(
            f"Task {name!r} asks for {settings['items']} items but the held-out split gives {len(items)}: lower "
            "`items`, `context_bytes` or `continuation_bytes`, or hold more text out."
        )
    with job.publish() as draft:
        (draft.folder / f"{name}.yaml").write_text(TASK.format(name=name), encoding="utf-8")
        with open(draft.folder / "items.jsonl", "w", encoding="utf-8") as stream:
            for item in items:
                stream.write(json.dumps(item | {"document": names[item["document"]]}, ensure_ascii=False) + "\n")
        draft.describe["items.jsonl"] = {"rows": len(items)}
        draft.metrics |= {
            "items": len(items),
            "documents": len({item["document"] for item in items}),
            "windows": len(pool),
        }


def heldout_texts(path: Path) -> tuple[list[str], list[str]]:
    """Return (document ids, the text of each document), in corpus order; chat slots are joined by blank lines."""
    from stages.artifacts.schemas import EXAMPLES
    from stages.artifacts.tables import read_table

    documents: dict[str, list[str]] = {}
    rows: list[dict[str, Any]] = read_table(path, EXAMPLES, ["document_id", "slots"]).to_pylist()
    for row in rows:
        documents.setdefault(row["document_id"], []).append("\n\n".join(slot["text"] for slot in row["slots"]))
    return list(documents), ["".join(parts) for parts in documents.values()]


if __name__ == "__main__":
    stage.run(main)
