"""Turn the config a person wrote into the full one: defaults filled in, matrices expanded, references checked."""

import itertools
import re
from collections.abc import Iterable
from typing import Any

from stages.core.errors import UserError
from stages.planning.check import check_is_text, check_name, check_names, merged, nearest, validate
from stages.planning.methods import METHODS


def expand(config: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return the full config: every default in place, every matrix expanded, every name resolved.

    UserError, one sentence, for an unknown key, a wrong type, a dangling name or an impossible combination.
    """
    full = validate(config, schema, None, "")
    check_names(full)
    full["corpora"] = {
        name: _validate_kind(name, entry, schema, "corpora", CORPUS_KINDS) for name, entry in full["corpora"].items()
    }
    for section, alternatives in (("tokenizers", ("source", "train")), ("models", ("path", "pretrain"))):
        prefix = {
            "source": "tokenizer_source",
            "train": "tokenizer_train",
            "path": "model_source",
            "pretrain": "model_pretrain",
        }
        for name, entry in full[section].items():
            where = f"{section}.{name}"
            given = [key for key in alternatives if key in entry]
            if len(given) != 1:
                raise UserError(f"Config: `{where}` needs exactly one of `{alternatives[0]}` and `{alternatives[1]}`.")
            full[section][name] = validate(entry, schema, prefix[given[0]], where)
    groups = seed_groups(full["experiments"])
    full["experiments"] = {
        name: validate(entry, schema, "experiment", f"experiments.{name}") | {"group": groups.get(name)}
        for name, entry in expand_matrices(full["experiments"]).items()
    }
    suites = full["evaluation"].get("suites", {})
    full["evaluation"]["suites"] = {
        name: _validate_kind(name, entry, schema, "evaluation.suites", SUITE_KINDS) for name, entry in suites.items()
    }
    _fill_experiments(full)
    _check_references(full)
    return full


CORPUS_KINDS = {
    "python_docs": "corpus_python_docs", "hub": "corpus_hub", "jsonl": "corpus_files", "parquet": "corpus_files",
    "txt": "corpus_files", "subset": "corpus_subset", "generated": "corpus_generated",
}  # fmt: skip
SUITE_KINDS = {"bits_per_byte": "suite_bits_per_byte", "lm_eval": "suite_lm_eval"}


def expand_matrices(experiments: dict[str, dict]) -> dict[str, dict]:
    """Return the experiments with every `matrix` replaced by one experiment for each combination of its axes.

    An axis that maps labels to settings merges those settings; an axis that is a list sets the key it is named
    after (dotted for nested keys). {"seed": [1, 2]} under "alm" gives alm-seed1 and alm-seed2.
    """
    expanded: dict[str, dict] = {}
    for name, entry in experiments.items():
        base = {key: value for key, value in entry.items() if key != "matrix"}
        for choice in itertools.product(*_axes(name, entry)):
            label = _joined(name, choice)
            settings = base
            for _, overrides in choice:
                settings = merged(settings, overrides)
            check_name(label, "experiments")
            if label in expanded:
                raise UserError(
                    f"Config: two experiments are called `{label}`; rename one, or a value of "
                    f"`experiments.{name}.matrix`."
                )
            expanded[label] = settings
    return expanded


def seed_groups(experiments: dict[str, dict]) -> dict[str, str]:
    """Return name -> name without its seed, of the experiments of a matrix that differ from others in their seeds only.

    {"seed": [1, 2]} under "alm" gives alm-seed1 and alm-seed2 of the group alm.
    """
    groups: dict[str, str] = {}
    for name, entry in experiments.items():
        axes = _axes(name, entry)
        seeds = [all(set(overrides) == {"seed"} for _, overrides in axis) for axis in axes]
        made = {}
        for choice in itertools.product(*axes) if any(seeds) else ():
            others = [part for part, is_seed in zip(choice, seeds, strict=True) if not is_seed]
            made[_joined(name, choice)] = _joined(name, others)
        both = set(made.values()) & set(groups.values())
        if both:
            raise UserError(
                f"Config: two matrices make experiments called `{both.pop()}` but for their seeds; rename "
                f"`experiments.{name}`."
            )
        groups |= made
    return groups


def _joined(name: str, choice: Iterable[tuple[str, dict]]) -> str:
    return "-".join([name, *(part for part, _ in choice)])


def _axes(name: str, entry: dict) -> list[list[tuple[str, dict]]]:
    """Return (label, settings) of every choice of every axis of a matrix."""
    axes = entry.get("matrix", {})
    if not isinstance(axes, dict):
        raise UserError(f"Config: `experiments.{name}.matrix` must be a mapping from axes to their values.")
    return [_axis(name, axis, values) for axis, values in axes.items()]


def _axis(name: str, axis: str, values: Any) -> list[tuple[str, dict]]:
    where = f"experiments.{name}.matrix.{axis}"
    check_is_text(axis, f"experiments.{name}.matrix")
    for label in values if isinstance(values, dict) else ():
        check_is_text(label, where)
    if isinstance(values, dict) and values and all(isinstance(item, dict) for item in values.values()):
        return list(values.items())
    if isinstance(values, list) and values:
        return [(_value_label(axis, value), _nested(axis.split("."), value)) for value in values]
    raise UserError(f"Config: `{where}` must be a list of values, or a mapping from a label to settings.")


def _value_label(axis: str, value: Any) -> str:
    if isinstance(value, list):
        text = "-".join(map(str, value))
    else:
        text = value if isinstance(value, str) else f"{axis.rpartition('.')[2]}{value}"
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower())


def _nested(path: list[str], value: Any) -> dict:
    return {path[0]: value if len(path) == 1 else _nested(path[1:], value)}


def _validate_kind(name: str, entry: dict, schema: dict, section: str, kinds: dict[str, str]) -> dict:
    where = f"{section}.{name}"
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"Config: `{where}.kind` is `{kind}`; {nearest(str(kind), list(kinds))}")
    return validate(entry, schema, kinds[kind], where)


def _fill_experiments(config: dict) -> None:
    """Fill in what defaults to another entry: seeds, the teacher, the tokenizer, loss weights."""
    for entry in config["corpora"].values():
        entry.setdefault("seed", config["seed"])
    for entry in config["models"].values():
        if "pretrain" in entry:
            entry["pretrain"].setdefault("seed", config["seed"])
            architecture = entry["pretrain"]["architecture"]
            architecture.setdefault("intermediate_size", 4 * architecture["hidden_size"])
    for task in config["evaluation"].get("tasks", {}).values():
        task.setdefault("seed", config["seed"])
    for name, entry in config["experiments"].items():
        entry.setdefault("seed", config["seed"])
        entry.setdefault("label", name)
        _known(entry["student"], config["models"], f"experiments.{name}.student", "models")
        entry.setdefault("tokenizer", config["models"][entry["student"]]["tokenizer"])
        entry["teacher"] = entry["teacher"] or entry["student"]
        if entry["loss_weights"] is None:
            entry["loss_weights"] = [1.0] * len(entry["losses"])
        if entry["loss_schedules"] is None:
            entry["loss_schedules"] = ["constant"] * len(entry["losses"])


def _check_references(config: dict) -> None:
    corpora, tokenizers, models = config["corpora"], config["tokenizers"], config["models"]
    for name, entry in corpora.items():
        if entry["kind"] == "subset":
            _known(entry["of"], corpora, f"corpora.{name}.of", "corpora")
            if corpora[entry["of"]]["kind"] == "subset":
                raise UserError(
                    f"Config: `corpora.{name}.of` is itself a subset; name the full corpus "
                    f"`{corpora[entry['of']]['of']}`."
                )
        if entry["kind"] == "generated":
            _known(entry["prompts"], corpora, f"corpora.{name}.prompts", "corpora")
            _known(entry["teacher"], models, f"corpora.{name}.teacher", "models")
            if entry["prompt_bytes"] >= entry["max_bytes"]:
                raise UserError(
                    f"Config: `corpora.{name}.prompt_bytes` is {entry['prompt_bytes']}, which leaves no room for an "
                    f"answer in max_bytes ({entry['max_bytes']}); lower it."
                )
    for name, entry in tokenizers.items():
        if "train" in entry:
            _known(entry["train"]["corpus"], corpora, f"tokenizers.{name}.train.corpus", "corpora")
    for name, entry in models.items():
        _known(entry["tokenizer"], tokenizers, f"models.{name}.tokenizer", "tokenizers")
        if "pretrain" in entry:
            _known(entry["pretrain"]["corpus"], corpora, f"models.{name}.pretrain.corpus", "corpora")
            _check_heads(name, entry["pretrain"]["architecture"])
            _check_train(f"models.{name}.pretrain.train", entry["pretrain"]["train"])
    for name in corpora:
        _refuse_circle(name, config, ())
    for name, entry in config["experiments"].items():
        _check_experiment(name, entry, config)
    _check_evaluation(config)


def _refuse_circle(name: str, config: dict, below: tuple[str, ...]) -> None:
    """Refuse a generated corpus whose teacher or prompts are made from it. `below`: the corpora that lead to `name`."""
    if name in below:
        raise UserError(f"Config: `corpora.{name}` is made from itself ({' from '.join([*below, name])}); change one.")
    entry, made_of = config["corpora"][name], []
    if entry["kind"] == "subset":
        made_of.append(entry["of"])
    if entry["kind"] == "generated":
        teacher = config["models"][entry["teacher"]]
        trained = (teacher.get("pretrain"), config["tokenizers"][teacher["tokenizer"]].get("train"))
        made_of += [entry["prompts"], *(recipe["corpus"] for recipe in trained if recipe)]
    for other in made_of:
        _refuse_circle(other, config, (*below, name))


def _check_heads(name: str, architecture: dict) -> None:
    hidden, heads = architecture["hidden_size"], architecture["num_attention_heads"]
    if hidden % heads or (hidden // heads) % 2:
        raise UserError(
            f"Config: `models.{name}.pretrain.architecture`: hidden_size {hidden} must be num_attention_heads "
            f"({heads}) "
            "times an even number; change one."
        )


def _check_experiment(name: str, entry: dict, config: dict) -> None:
    where = f"experiments.{name}"
    if name in config["models"]:
        raise UserError(
            f"Config: `{name}` is both a model and an experiment; evaluations are filed by name, so rename one."
        )
    _known(entry["teacher"], config["models"], f"{where}.teacher", "models")
    _known(entry["tokenizer"], config["tokenizers"], f"{where}.tokenizer", "tokenizers")
    losses, weights, schedules = entry["losses"], entry["loss_weights"], entry["loss_schedules"]
    for loss in losses:
        if loss not in METHODS:
            raise UserError(f"Config: `{where}.losses` has `{loss}`, which is no loss; {nearest(loss, list(METHODS))}")
    if len(set(losses)) != len(losses):
        raise UserError(f"Config: `{where}.losses` names one loss twice; use `loss_weights` to weigh it.")
    if len(weights) != len(losses):
        raise UserError(
            f"Config: `{where}.loss_weights` has {len(weights)} numbers for {len(losses)} losses; give one for each."
        )
    if len(schedules) != len(losses):
        raise UserError(
            f"Config: `{where}.loss_schedules` has {len(schedules)} words for {len(losses)} losses; give one for each."
        )
    _check_aggregation(where, entry["multitask_aggregation_fn"], entry["train"]["train_model_mode"])
    if losses and not any(weights):
        raise UserError(f"Config: `{where}.loss_weights` are all 0, so nothing would be learned; raise one.")
    if losses and "corpus" not in entry:
        raise UserError(
            f"Config: `{where}` trains ({', '.join(losses)}) but names no `corpus`; add one of "
            f"{', '.join(config['corpora'])}."
        )
    apart = config["models"][entry["teacher"]]["tokenizer"] != entry["tokenizer"]
    for loss in losses:
        if METHODS[loss].same_tokenizer and apart:
            raise UserError(
                f"Config: `{where}.losses` has `{loss}`, which compares token by token, but its teacher has another "
                f"tokenizer (`{config['models'][entry['teacher']]['tokenizer']}`) than its student "
                f"(`{entry['tokenizer']}`); take a loss that crosses tokenizers, or name one for both "
                "where they are the same."
            )
    if "corpus" in entry:
        _known(entry["corpus"], config["corpora"], f"{where}.corpus", "corpora")
    if not losses and entry["tokenizer"] == config["models"][entry["student"]]["tokenizer"]:
        raise UserError(
            f"Config: `{where}` neither trains (no `losses`) nor changes the tokenizer, so it would be a copy of "
            "its student."
        )
    train = entry["train"]
    _check_train(f"{where}.train", train)
    if losses and train["steps"] == 0:
        raise UserError(
            f"Config: `{where}.train.steps` is 0 but `losses` are given; remove the losses or raise the steps."
        )
    _check_methods(where, entry)


def _check_train(where: str, train: dict) -> None:
    if train["warmup_steps"] > train["steps"]:
        raise UserError(
            f"Config: `{where}.warmup_steps` is {train['warmup_steps']}, more than `steps` "
            f"({train['steps']}); lower it."
        )
    if train["train_model_mode"] == "embeddings" and not train["train_embeddings"]:
        raise UserError(
            f"Config: `{where}`: train_model_mode `embeddings` with train_embeddings false trains nothing; change one."
        )


def _check_methods(where: str, entry: dict) -> None:
    """Refuse settings that a module of stages/losses would refuse after hours in a queue."""
    losses = entry["losses"]
    known_flags = {"append_space", "eos_as_space", "merge_by_space_prob"}
    for flag in filter(None, entry["alm_mode"].split("+")):
        if flag not in known_flags:
            raise UserError(f"Config: `{where}.alm_mode` has the flag `{flag}`; {nearest(flag, list(known_flags))}")
    if entry["alm_diff_fn"] == "renyi" and entry["renyi_alpha"] == 1:
        raise UserError(f"Config: `{where}.renyi_alpha` is 1; take alm_diff_fn reverse_binary_kl, which is its limit.")
    if "rskd" in losses and entry["temperature"] != 1:
        raise UserError(
            f"Config: `{where}.temperature` is {entry['temperature']}, but `rskd` draws tokens at temperature 1 and "
            "can only be read there; remove it."
        )
    if "gold" in losses and entry["gold_unmatched_weight"] is None and (entry["gold_matched_weight"] or 0) > 1:
        raise UserError(
            f"Config: `{where}.gold_matched_weight` is above 1, so that `gold_unmatched_weight`, by default 1 minus "
            "it, would be negative; give both."
        )
    projects = entry["latents_do_project"] and entry["latents_to_align"] == "all_hidden_states"
    if "alm_latents" in losses and projects:
        raise UserError(
            f"Config: `{where}.latents_do_project` goes with latents_to_align last_hidden_state, not "
            "all_hidden_states; change one."
        )


def _check_aggregation(where: str, name: str, mode: str) -> None:
    """Refuse a `multitask_aggregation_fn` that `stages.training.aggregation` would refuse after hours in a queue."""
    alone = ["none", "approx_gradmag", "approx_gradmag_preserve_mag", "gradnorm"]
    if name in alone[1:] and mode == "embeddings":
        raise UserError(
            f"Config: `{where}.multitask_aggregation_fn` {name} compares gradients in the last transformer block, of "
            "which train_model_mode `embeddings` trains nothing; take gradmag."
        )
    if name in alone:
        return
    for part in name.split("+"):
        if part in alone:
            raise UserError(f"Config: `{where}.multitask_aggregation_fn`: `{part}` stands alone; take one of `{name}`.")
        if part not in ("gradmag", "pcgrad") and not re.fullmatch(r"gradclip:(?=.*[1-9])\d*\.?\d+(e-?\d+)?", part):
            known = [*alone, "gradmag", "pcgrad", "gradclip:<longest>"]
            raise UserError(f"Config: `{where}.multitask_aggregation_fn` has `{part}`; {nearest(part, known)}")


def _check_evaluation(config: dict) -> None:
    evaluation = config["evaluation"]
    for flag in config["signals"]["space_mask_mode"].split("+"):
        if flag not in ("space", "tab", "newline", "special"):
            raise UserError(
                f"Config: `signals.space_mask_mode` has the flag `{flag}`; "
                f"{nearest(flag, ['space', 'tab', 'newline', 'special'])}"
            )
    for name, task in evaluation["tasks"].items():
        _known(task["corpus"], config["corpora"], f"evaluation.tasks.{name}.corpus", "corpora")
    for name, suite in evaluation["suites"].items():
        where = f"evaluation.suites.{name}"
        if suite["kind"] == "bits_per_byte":
            _known(suite["corpus"], config["corpora"], f"{where}.corpus", "corpora")
        elif not suite["tasks"] and not suite["built"]:
            raise UserError(
                f"Config: `{where}` names no task; give `tasks`, or `built` with names of evaluation.tasks."
            )
        for task in suite.get("built", []):
            _known(task, evaluation["tasks"], f"{where}.built", "evaluation.tasks")
    evaluated = {**config["models"], **config["experiments"]}
    for name in evaluation.get("models", []):
        _known(name, evaluated, "evaluation.models", "models and experiments")
    evaluation.setdefault("models", list(evaluated))


def _known(name: str, entries: dict, where: str, section: str) -> None:
    if name not in entries:
        raise UserError(f"Config: `{where}` names `{name}`, which is not in {section}; {nearest(name, list(entries))}")
