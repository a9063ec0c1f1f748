"""Join the shards of a teacher's signals on a corpus into one index."""

from typing import Any

from stages.core import artifact, stage
from stages.core.errors import UserError

SAME = {
    "model": "teacher",
    "needs": "columns",
    "space_mask_mode": "boundary tokens",
    "dtype": "dtype",
    "shards": "number of shards",
}


def main(argv: list[str] | None = None) -> None:
    """Check that all shards belong together and list them."""
    job = stage.parse("stages.teacher_index", __doc__, argv)
    shards = job.inputs["shards"]
    facts = common_facts(shards)
    parts = []
    for manifest in sorted(shards, key=lambda shard: shard["spec"]["shard"]):
        (file,) = manifest["data"]
        artifact.data_path(manifest, file)
        entry = manifest["data"][file]
        parts.append({"file": file, "rows": entry["rows"], "bytes": entry["bytes"], "columns": entry["columns"]})
    found = [shard["spec"]["shard"] for shard in shards]
    if sorted(found) != list(range(facts["shards"])):
        raise UserError(
            f"The teacher signals have the shards {sorted(found)} but are cut into {facts['shards']}: "
            "run snakemake again, which builds the missing ones."
        )
    with job.publish() as draft:
        artifact.write_json(draft.folder / "shards.json", facts | {"parts": parts})
        draft.metrics["signal_error"] = next(
            (s["metrics"]["signal_error"] for s in shards if "signal_error" in s["metrics"]), []
        )
        draft.metrics.update({key: sum(s["metrics"][key] for s in shards) for key in ("examples", "tokens", "inexact")})


def common_facts(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what all shards share; UserError naming the first shard that differs and in what."""
    first = shards[0]
    facts = {key: first["spec"][key] for key in SAME}
    facts |= {name: _lineage(first, name) for name in ("corpus", "tokenizer", "model_artifact")}
    for shard in shards[1:]:
        for key, what in SAME.items():
            if shard["spec"][key] != facts[key]:
                raise UserError(
                    f"{shard['name']} has another {what} than {first['name']} ({shard['spec'][key]} and {facts[key]}): "
                    "remove it and run snakemake again."
                )
        for name in ("corpus", "tokenizer", "model_artifact"):
            if _lineage(shard, name) != facts[name]:
                raise UserError(
                    f"{shard['name']} was made from another {name} than {first['name']}: "
                    "remove it and run snakemake again."
                )
    return facts


def _lineage(manifest: dict[str, Any], name: str) -> str | None:
    entry = manifest["inputs"].get("model" if name == "model_artifact" else name)
    return entry["lineage"] if entry else None


if __name__ == "__main__":
    stage.run(main)
