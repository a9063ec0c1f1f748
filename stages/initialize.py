"""Give a model another tokenizer: embeddings by FVT (or a baseline), everything else as it was."""

from typing import TYPE_CHECKING

from stages.core import stage
from stages.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from stages.embeddings.fvt import Plan
    from stages.tokenization import ByteView
    from stages.tokenization.spelling import Vocabulary

METHODS = ("fvt", "random", "mean")
MODES = ("preserve", "untie")


def main(argv: list[str] | None = None) -> None:
    """Read the model and both tokenizers, write the initialised student and where each row came from."""
    job = stage.parse("stages.initialize", __doc__, argv)
    method, mode = job.spec.get("method", "fvt"), job.spec.get("output_embeddings_mode", "preserve")
    if method not in METHODS:
        raise UserError(f"Unknown initialisation method {method!r}: choose one of {', '.join(METHODS)}.")
    if mode not in MODES:
        raise UserError(f"Unknown output_embeddings_mode {mode!r}: choose one of {', '.join(MODES)}.")
    from collections import Counter

    from stages.artifacts.tables import write_table
    from stages.embeddings import replacement
    from stages.models.configuration import set_special_ids
    from stages.models.description import describe, usable
    from stages.models.export import copy_tokenizer, save_model
    from stages.models.loading import load_model
    from stages.tokenization import ByteView

    target = ByteView.load(job.inputs["tokenizer"]["path"].parent)
    source = ByteView.load(job.inputs.get("source_tokenizer", job.inputs["tokenizer"])["path"].parent)
    with job.publish() as draft:
        model = load_model(job.spec["model"], job.inputs.get("model"))
        source = usable(source, model, job.spec["model"]["name"])
        rows = source.vocab_size
        described = describe(model, job.spec["model"]["name"], rows, source.name)
        plan = make_plan(method, target, source, rows)
        embedding = replacement.replace_embeddings(described, plan, rows, job.spec["seed"], mode == "untie")
        set_special_ids(model, target.roles, target.start_id, target.pad_id)
        draft.describe["model.safetensors"] = save_model(model, described.dtypes, draft.folder)
        draft.metrics["auto_tokenizer"] = copy_tokenizer(job.inputs["tokenizer"], draft.folder)
        table = provenance(plan, target.token_bytes, embedding.float().norm(dim=1).numpy())
        write_table(draft.folder / "provenance.parquet", table, job.identity)
        draft.describe["provenance.parquet"] = {"rows": table.num_rows}
        draft.metrics["rows_by_rule"] = dict(sorted(Counter(plan.rules).items()))
        draft.metrics["tied"] = described.tied


def make_plan(method: str, target: "ByteView", source: "ByteView", rows: int) -> "Plan":
    """Return the `fvt.Plan` of a method for two ByteViews."""
    from stages.embeddings import fvt

    if method != "fvt":
        return fvt.uniform_plan(target.vocab_size, method, rows)
    if target.digest == source.digest:
        return fvt.identity_plan(target.vocab_size)
    return fvt.plan(vocabulary(target), vocabulary(source), rows=rows)


def vocabulary(view: "ByteView") -> "Vocabulary":
    """Return what FVT reads of a ByteView."""
    import json

    from stages.tokenization.specials import own_roles
    from stages.tokenization.spelling import Vocabulary

    added = json.loads((view.folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    duplicates = [i for i, content in enumerate(view.token_bytes) if content and view.id_of_bytes[content] != i]
    return Vocabulary(
        view.token_bytes,
        roles=own_roles(view),
        special_texts={token["id"]: token["content"] for token in added if token["id"] in view.special_ids},
        duplicate_ids=frozenset(duplicates),
        encode=lambda texts: view.text_ids(texts, [False] * len(texts)),
    )


def provenance(plan: "Plan", token_bytes: list[bytes | None], norms: "np.ndarray") -> "pa.Table":
    """Return the provenance table: one row per target id; `norms` are the L2 norms of the input rows."""
    import pyarrow as pa

    from stages.artifacts.schemas import PROVENANCE

    columns = [list(range(len(plan.rules))), token_bytes, plan.rules, plan.sources, norms]
    return pa.table(dict(zip(PROVENANCE.names, columns, strict=True)), schema=PROVENANCE)


if __name__ == "__main__":
    stage.run(main)
