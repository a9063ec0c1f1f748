"""Text distillation in the workflow: a corpus that a teacher writes, and a student that learns from it."""

import json

import pytest

from .test_reruns import set_config, student

pytestmark = pytest.mark.workflow

ANSWERS = {"kind": "generated", "teacher": "teacher", "prompts": "part", "prompt_bytes": 32, "max_bytes": 256}
ANSWERS |= {"sampling": {"max_new_tokens": 8}, "drop_truncated": False}


def test_text_distillation(project):
    config = project.config
    config["corpora"]["answers"] = ANSWERS
    config["experiments"]["seqkd"] = dict(config["experiments"]["sft"], corpus="answers")
    config["evaluation"]["models"].append("seqkd")
    project.write_config()
    new = {"corpora/answers/manifest.json", "tokenizer_pairs/bytebpe/spbpe/statistics/answers/manifest.json"}
    assert project.planned() == new | student("seqkd")
    done = project.snakemake("results/tiny/students/seqkd/manifest.json")
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((project.root / "corpora/answers/manifest.json").read_text())
    assert manifest["stage"] == "generate" and manifest["metrics"]["train_examples"] > 0
    left = project.planned()
    assert not left & {"corpora/answers/manifest.json", "students/seqkd/manifest.json"}
    set_config("corpora", "answers", "sampling", "top_p", value=0.5)(project)  # greedy search does not read it
    assert project.planned() == left
    set_config("corpora", "answers", "sampling", "max_new_tokens", value=9)(project)
    assert project.planned() == new | student("seqkd")
