"""What each method needs, in one table, so that the plan follows from the losses an experiment names.

To add a method: one module in stages/losses (see its docstring) and one row here. Stages do not import this
table: the plan hands each distillation job its own rows, so a new row invalidates nothing.
"""

from typing import Any, NamedTuple

ALM = (
    "alm_mode", "alm_diff_fn", "binarization_temp", "renyi_alpha", "merge_threshold", "distill_main_path_numerator",
    "distill_main_path_denominator",
)  # fmt: skip

DIVERGENCE = (
    "temperature", "t_squared", "teacher_distribution", "jsd_beta", "baseline.skew_lambda",
    "baseline.adaptive_kl_alpha",
)  # fmt: skip
LATENTS = ("latents_to_align", "latents_normalization", "latents_chunks", "latents_do_project")
BASELINE = (
    "baseline.divergence", "baseline.kd_temp", "baseline.skew_lambda", "baseline.adaptive_kl_alpha", "jsd_beta",
)  # fmt: skip
TOP_K = 64  # likeliest tokens that a method reads, unless signals.top_k asks for more
CDM_TOP_K = 100  # as in the paper
SAMPLES = 50


class Method(NamedTuple):
    """One row: the module of the loss, what it needs of teacher and tokenizers, and the settings that it reads."""

    module: str
    chunks: str | None = None  # kind of alignment; None: no alignment
    boundary: bool = False  # log boundary mass and log p(eos) beside the observed log-probability
    top_k: int = 0  # likeliest tokens with their log-probabilities, and the tail's log mass
    temperature: str | None = None  # setting that says at which temperature the likeliest tokens are read
    samples: int = 0  # tokens drawn from the distribution
    hidden: str | None = None  # "hidden": states after the last norm; "hidden_states": of all layers
    head: bool = False  # the teacher's output layer and embedding
    pair: tuple[str, ...] = ()  # artifacts of the two tokenizers: mapping, bias; every_bias: not of chunk ends alone
    same_tokenizer: bool = False  # whether teacher and student must share their tokenizer
    settings: tuple[str, ...] = ()  # keys of the experiment; "baseline.kd_temp" is kd_temp to the loss

    @property
    def teacher(self) -> bool:
        """Whether the method reads teacher signals at all."""
        return bool(self.chunks or self.boundary or self.top_k or self.samples or self.hidden)


METHODS = {
    "sft": Method("stages.losses.sft"),
    "clm": Method("stages.losses.sft"),
    "alm_unconstrained": Method("stages.losses.alm", chunks="unconstrained", boundary=True, settings=ALM),
    "alm_space": Method("stages.losses.alm", chunks="space", boundary=True, settings=ALM),
    "alm_greedy": Method("stages.losses.alm", chunks="greedy", boundary=True, settings=ALM),
    "alm_unbiased": Method(
        "stages.losses.alm",
        chunks="unbiased",
        boundary=True,
        pair=("bias",),
        settings=(*ALM, "tokenizer_pair_bias_threshold"),
    ),
    **{
        name: Method(
            "stages.losses.same_tokenizer",
            chunks="unconstrained",
            top_k=TOP_K,
            temperature="temperature",
            same_tokenizer=True,
            settings=DIVERGENCE,
        )
        for name in ("fkl", "rkl", "skl", "srkl", "js", "gjsd", "akl", "tvd", "last_token_kd")
    },
    "rskd": Method(
        "stages.losses.same_tokenizer",
        chunks="unconstrained",
        samples=SAMPLES,
        same_tokenizer=True,
        settings=DIVERGENCE,
    ),
    "alm_latents": Method("stages.losses.latents", chunks="unconstrained", hidden="hidden", settings=LATENTS),
    "baseline_dskd": Method(
        "stages.losses.dskd", hidden="hidden", head=True, settings=(*BASELINE, "baseline.teacher_temperature")
    ),
    "dskd_eta": Method(
        "stages.losses.dskd_eta",
        chunks="unconstrained",
        top_k=1,
        hidden="hidden",
        head=True,
        pair=("mapping",),
        settings=BASELINE,
    ),
    **{
        name: Method(
            "stages.losses.mined",
            chunks="unconstrained",
            top_k=TOP_K,
            temperature="baseline.kd_temp",
            pair=("mapping",),
            settings=BASELINE,
        )
        for name in ("baseline_mined", "baseline_minED")
    },
    "alm_side_path": Method(
        "stages.losses.side_path",
        chunks="unconstrained",
        top_k=TOP_K,
        pair=("mapping",),
        settings=(
            "side_path_mapping_mode",
            "side_path_distance_fn",
            "tokenizer_pair_bias_threshold_side_path",
        ),
    ),
    "cdm": Method(
        "stages.losses.cdm",
        chunks="unconstrained",
        top_k=CDM_TOP_K,
        temperature="temperature",
        pair=("mapping",),
        settings=("cdm_alignment", "cdm_mapping", "temperature", "t_squared"),
    ),
    "baseline_uld": Method("stages.losses.uld", chunks="unconstrained", top_k=TOP_K, settings=("uld_alignment",)),
    "gold": Method(
        "stages.losses.gold",
        chunks="unconstrained",
        top_k=TOP_K,
        temperature="temperature",
        pair=("mapping",),
        settings=("temperature", "jsd_beta", "gold_hybrid", "gold_matched_weight", "gold_unmatched_weight"),
    ),
    "multilevel_ot": Method("stages.losses.multilevel_ot", hidden="hidden", head=True),
    **{
        name: Method(
            "stages.losses.x_token",
            chunks="unconstrained",
            top_k=TOP_K,
            temperature="temperature",
            pair=("mapping",),
            settings=("temperature", "t_squared"),
        )
        for name in ("p_kl", "h_kl")
    },
}


def method_of(loss: str, entry: dict[str, Any]) -> Method:
    """Return the row of a loss as an experiment uses it: settings may turn to other signals than the row's."""
    method = METHODS[loss]
    if entry["teacher_distribution"] == "exact" and method.same_tokenizer and method.top_k:
        return method._replace(top_k=0, hidden="hidden", head=True)
    if loss == "alm_latents" and entry["latents_to_align"] == "all_hidden_states":
        return method._replace(hidden="hidden_states", head=True)
    if loss == "alm_latents" and entry["latents_do_project"]:
        return method._replace(head=True)
    if loss == "alm_side_path" and entry["side_path_mapping_mode"] == "bias_threshold":
        return method._replace(pair=("mapping", "bias", "every_bias"))
    if loss == "gold" and not entry["gold_hybrid"]:
        return method._replace(pair=())
    return method


def setting(entry: dict[str, Any], key: str) -> Any:
    """Return the value of a setting of an experiment by its dotted key."""
    value: Any = entry
    for part in key.split("."):
        value = value[part]
    return value


def options_of(losses: list[str], entry: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the losses of an experiment read, by the last part of their keys."""
    keys = {key for loss in losses for key in METHODS[loss].settings}
    values = {key.rpartition(".")[2]: setting(entry, key) for key in keys}
    return {key: value for key, value in values.items() if value is not None}  # null: the method's own default


def aggregation_of(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the training settings with which an experiment adds up its losses; empty for their weighted sum."""
    name = entry["multitask_aggregation_fn"]
    learned = ("gradnorm_alpha", "gradnorm_lr") if name == "gradnorm" else ()
    chosen = {} if name == "none" else {"multitask_aggregation_fn": name}
    return chosen | {key: entry["baseline"][key] for key in learned}


def signal_needs(entries: list[dict[str, Any]], top_k: int) -> dict[str, Any]:
    """Return what the experiments together need of one teacher per token, as `stages.signals.schema.NO_NEEDS` has it.

    `top_k` is the least number of likeliest tokens, asked for by the config itself.
    """
    used = [(method_of(loss, entry), entry) for entry in entries for loss in entry["losses"]]
    methods = [method for method, _ in used]
    boundary = any(method.boundary for method in methods)
    temperatures = {
        float(setting(entry, method.temperature)) for method, entry in used if method.temperature and method.top_k
    }
    return {
        "boundary": boundary,
        "eos": boundary,
        "top_k": max([top_k, *(method.top_k for method in methods)]),
        "temperatures": sorted(temperatures - {1.0}),
        "samples": max([0, *(method.samples for method in methods)]),
        "hidden": any(method.hidden == "hidden" for method in methods),
        "hidden_states": any(method.hidden == "hidden_states" for method in methods),
    }
