"""Resolve a tokenizer, or train one on a corpus, and write it with the bytes of its every token."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.core import stage
from stages.core.errors import UserError

# Weights are never wanted here.
HUB_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt"]


def main(argv: list[str] | None = None) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja, byte_view.json and tokens.parquet."""
    job = stage.parse("stages.tokenizer", __doc__, argv)
    from stages.tokenization import ByteView, sources
    from stages.tokenization.spec import parse_spec

    with job.publish() as draft:
        if "train" in job.spec:
            from stages.tokenization.training import train_tokenizer

            prepared = train_tokenizer(job.spec["train"], lambda: _texts(job), job.manifest.parent.name)
        else:
            spec = parse_spec(job.spec["tokenizer"])
            prepared = sources.prepare(_folder(spec.name, job.spec.get("revision")), spec)
        sources.write(prepared, draft.folder)
        view = ByteView.load(draft.folder)
        _write_tokens(view, draft.folder / "tokens.parquet", job.identity)
        draft.describe["tokens.parquet"] = {"rows": view.vocab_size}
        draft.metrics |= {
            "vocab_size": view.vocab_size,
            "special_tokens": len(view.special_ids),
            "byte_function": view.settings["byte_function"],
            "digest": view.digest,
        }


def _folder(name: str, revision: str | None) -> Path:
    """Return the local folder of a tokenizer, downloading its files when `name` is a Hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"Tokenizer {name} is neither a folder nor a Hub id that can be read ({reason}): correct the name or "
            "download it to a folder."
        ) from None


def _texts(job: stage.Job) -> Iterator[str]:
    from stages.artifacts.schemas import EXAMPLES
    from stages.artifacts.tables import read_batches

    for batch in read_batches(job.data("corpus", "train.parquet"), EXAMPLES, 1000):
        for slots in batch.column("slots").to_pylist():
            yield from (slot["text"] for slot in slots if slot["text"])


def _write_tokens(view: Any, path: Path, identity: dict[str, str]) -> None:
    import pyarrow as pa

    from stages.artifacts.schemas import TOKENS
    from stages.artifacts.tables import write_table

    strings = [view.string_of(i) for i in range(view.vocab_size)]
    roles = [view.role_of.get(i) for i in range(view.vocab_size)]
    columns = [range(view.vocab_size), view.token_bytes, strings, roles]
    arrays = [pa.array(list(values), field.type) for values, field in zip(columns, TOKENS, strict=True)]
    write_table(path, pa.Table.from_arrays(arrays, schema=TOKENS), identity)


if __name__ == "__main__":
    stage.run(main)
