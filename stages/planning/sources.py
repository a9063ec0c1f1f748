"""What lies outside the project: model and tokenizer folders, data files. Found, checked and digested by content."""

import glob
import hashlib
import json
import os
import re
from pathlib import Path

from stages.core.artifact import file_digest, write_json
from stages.core.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "config.json",
)  # fmt: skip
MODEL_PATTERNS = ("*.safetensors", "*.json")


class Digests:
    """Content digests of files, remembered by path, size and modification time so that a large file is hashed once."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        try:
            self.known: dict[str, list] = json.loads(cache.read_text())
        except (FileNotFoundError, ValueError):
            self.known = {}
        self.changed = False

    def file(self, path: Path) -> str:
        """Return the SHA-256 of a file, from memory when size and modification time are as they were."""
        status = path.stat()
        key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        if self.known.get(key, [None])[0] != stamp:
            self.known[key] = [stamp, file_digest(path)]
            self.changed = True
        return self.known[key][1]

    def files(self, paths: list[Path]) -> str:
        """Return one digest over the names and contents of `paths`."""
        text = "".join(f"{path.name} {self.file(path)}\n" for path in sorted(paths))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def save(self) -> None:
        """Keep what was learned for the next run."""
        if self.changed:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.cache, self.known)


def model_digest(name: str, path: str, digests: Digests) -> str | None:
    """Return the digest of a local model folder, None for a Hub id; UserError when it is neither."""
    folder = _local_folder(path, f"models.{name}.path")
    if folder is None:
        return None
    files = [file for pattern in MODEL_PATTERNS for file in folder.glob(pattern)]
    if not (folder / "config.json").is_file():
        raise UserError(
            f"Config: `models.{name}.path`: {path} has no config.json, so it is no Hugging Face model folder; "
            "correct the path."
        )
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(
            f"Config: `models.{name}.path`: {path} has no .safetensors weights; save the model with safe serialization."
        )
    return digests.files(files)


def tokenizer_digest(name: str, source: str, digests: Digests) -> str | None:
    """Return the digest of a local tokenizer folder, None for a Hub id; UserError when it is neither."""
    path = re.split(r":(?=\w+=)", source)[0]
    folder = _local_folder(path, f"tokenizers.{name}.source")
    if folder is None:
        return None
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"Config: `tokenizers.{name}.source`: {path} has no tokenizer.json; convert it to a fast tokenizer with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    return digests.files([folder / file for file in TOKENIZER_FILES if (folder / file).is_file()])


def data_files(name: str, patterns: str | list[str], digests: Digests) -> dict[str, str]:
    """Return {path: digest} of the files that the patterns match, in sorted order; UserError when none does."""
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = os.path.expanduser(pattern)
        # A path that exists is that file, whatever characters it has.
        matches = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
        matched = [match for match in matches if os.path.isfile(match)]
        if not matched:
            what = f"{pattern} is a folder: name its files" if matches else f"no file matches {pattern}"
            raise UserError(f"Config: `corpora.{name}.path`: {what}; correct the path.")
        found.update(matched)
    return {path: digests.file(Path(path)) for path in sorted(found)}


def folder_files(path: str, where: str, digests: Digests) -> dict[str, str]:
    """Return {name: digest} of all files under a local folder; UserError when it is none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"Config: `{where}`: the folder {path} does not exist; correct the path.")
    return {str(file.relative_to(folder)): digests.file(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def _local_folder(path: str, where: str) -> Path | None:
    """Return the folder of a local path, None for what can only be a Hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", path) is not None
    if not is_hub_id or path.startswith((".", "~", "/")) or folder.exists():
        raise UserError(
            f"Config: `{where}`: the folder {path} does not exist; correct the path, or give a Hub id such as org/name."
        )
    return None
