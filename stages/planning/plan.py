"""What every artifact is made of: its stage, settings, code and inputs, all from the config alone.

`build` returns one Node per artifact. The Snakefile writes them down once per run; jobs that start later, on this
machine or another, read that file and never the config again.
"""

from dataclasses import asdict, dataclass
from typing import Any

from stages.core import code, specs
from stages.planning import shapes, sources
from stages.planning.methods import METHODS, aggregation_of, method_of, options_of, signal_needs


@dataclass(frozen=True)
class Node:
    """One artifact: where its manifest goes (relative to the results folder) and everything it depends on."""

    stage: str
    manifest: str
    spec: dict[str, Any]
    code: str
    lineage: str

    @property
    def inputs(self) -> list[str]:
        """Return the manifests this artifact is made from."""
        found = []
        for entry in self.spec["inputs"].values():
            found += [item["manifest"] for item in (entry if isinstance(entry, list) else [entry])]
        return found


def build(config: dict[str, Any], digests: sources.Digests) -> dict[str, Node]:
    """Return every artifact of the full config (see `expand`) by its manifest's path, inputs before outputs.

    UserError when a model, tokenizer or data file does not exist.
    """
    planner = _Planner(config, digests)
    for name in config["tokenizers"]:
        planner.tokenizer(name)
    for name in config["experiments"]:
        planner.experiment(name)
        planner.pair(name)
    for name in config["evaluation"]["models"]:
        for suite in config["evaluation"]["suites"]:
            planner.evaluation(name, suite)
    if config["evaluation"]["suites"] and config["evaluation"]["models"]:
        planner.report()
    return planner.nodes


def to_json(nodes: dict[str, Node]) -> dict[str, Any]:
    """Return the nodes as JSON values; `from_json` is the way back."""
    return {manifest: asdict(node) for manifest, node in nodes.items()}


def from_json(value: dict[str, Any]) -> dict[str, Node]:
    """Return the nodes that `to_json` wrote."""
    return {manifest: Node(**node) for manifest, node in value.items()}


class _Planner:
    """Makes each node once; the methods mirror the sections of the config and return a manifest's path."""

    def __init__(self, config: dict[str, Any], digests: sources.Digests) -> None:
        self.config = config
        self.digests = digests
        self.nodes: dict[str, Node] = {}

    def add(
        self, stage: str, manifest: str, spec: dict[str, Any], inputs: dict[str, Any], modules: list[str] | None = None
    ) -> str:
        """Make the node of `manifest` unless it exists; `inputs` are manifests of nodes that do."""
        if manifest not in self.nodes:
            full = spec | {"inputs": {name: self._entry(value) for name, value in inputs.items() if value}}
            if modules:
                full["code_modules"] = modules
            digest = code.code_digest(f"stages.{stage}", *(modules or []))
            lineage = specs.lineage(specs.canonical(full), digest)
            self.nodes[manifest] = Node(stage, manifest, full, digest, lineage)
        return manifest

    def _entry(self, value: str | list[str]) -> Any:
        if isinstance(value, list):
            return [self._entry(item) for item in value]
        return {"manifest": value, "lineage": self.nodes[value].lineage}

    def corpus(self, name: str) -> str:
        entry = self.config["corpora"][name]
        if entry["kind"] == "generated":
            return self.generated(name)
        spec = {key: value for key, value in entry.items() if key not in ("of",)}
        if entry["kind"] in ("jsonl", "parquet", "txt"):
            spec["files"] = sources.data_files(name, entry["path"], self.digests)
            del spec["path"]
        parent = self.corpus(entry["of"]) if entry["kind"] == "subset" else None
        return self.add("corpus", f"corpora/{name}/manifest.json", spec, {"corpus": parent})

    def generated(self, name: str) -> str:
        """Return the corpus of a teacher's answers. Greedy search knows neither seed nor shape of a distribution."""
        entry = self.config["corpora"][name]
        model, manifest = self.model(entry["teacher"])
        sampling = dict(entry["sampling"])
        if not sampling["do_sample"]:
            sampling = {key: sampling[key] for key in ("do_sample", "max_new_tokens")}
        spec = {"model": model, "sampling": sampling, "dtype": self.config["signals"]["dtype"]}
        spec |= {key: entry[key] for key in ("prompt_bytes", "drop_truncated", "batch_tokens", "max_bytes")}
        spec |= {"enable_thinking": entry["enable_thinking"]} if entry["enable_thinking"] is not None else {}
        if sampling["do_sample"]:
            spec["seed"] = entry["seed"]
        tokenizer = self.tokenizer(self.config["models"][entry["teacher"]]["tokenizer"])
        inputs = {"corpus": self.corpus(entry["prompts"]), "tokenizer": tokenizer, "model": manifest}
        return self.add("generate", f"corpora/{name}/manifest.json", spec, inputs)

    def tokenizer(self, name: str) -> str:
        entry = self.config["tokenizers"][name]
        manifest = f"tokenizers/{name}/manifest.json"
        if "train" in entry:
            settings = {key: value for key, value in entry["train"].items() if key != "corpus"}
            return self.add(
                "tokenizer", manifest, {"train": settings}, {"corpus": self.corpus(entry["train"]["corpus"])}
            )
        digest = sources.tokenizer_digest(name, entry["source"], self.digests)
        spec = {"tokenizer": entry["source"], "revision": entry["revision"], "digest": digest}
        return self.add("tokenizer", manifest, spec, {})

    def model(self, name: str) -> tuple[dict[str, Any], str | None]:
        """Return (the "model" of a spec, the manifest of the model when it is trained here)."""
        entry = self.config["models"][name]
        settings = {"name": name, "path": None, "revision": None, "digest": None, "dtype": "auto"}
        settings |= {"attn_implementation": None, "trust_remote_code": False}
        if "path" in entry:
            digest = sources.model_digest(name, entry["path"], self.digests)
            kept = ("path", "revision", "dtype", "attn_implementation", "trust_remote_code")
            return settings | {key: entry[key] for key in kept} | {"digest": digest}, None
        recipe = entry["pretrain"]
        spec = {"architecture": recipe["architecture"], "train": recipe["train"], "seed": recipe["seed"]}
        inputs = {"corpus": self.corpus(recipe["corpus"]), "tokenizer": self.tokenizer(entry["tokenizer"])}
        return settings, self.add("pretrain", f"models/{name}/manifest.json", spec, inputs)

    def initialized(self, name: str) -> tuple[dict[str, Any], str | None]:
        """Return the experiment's student with the target tokenizer, as `model` does; shared by experiments."""
        entry = self.config["experiments"][name]
        settings, manifest = self.model(entry["student"])
        own = self.config["models"][entry["student"]]["tokenizer"]
        if entry["tokenizer"] == own:
            return settings, manifest
        method, mode = entry["initialize"]["method"], entry["initialize"]["output_embeddings_mode"]
        variant = method if mode == "preserve" else f"{method}-{mode}"
        spec = {"model": settings, "method": method, "output_embeddings_mode": mode, "seed": self.config["seed"]}
        inputs = {
            "tokenizer": self.tokenizer(entry["tokenizer"]),
            "source_tokenizer": self.tokenizer(own),
            "model": manifest,
        }
        place = f"initialized/{entry['student']}/{entry['tokenizer']}/{variant}/manifest.json"
        made = self.add("initialize", place, spec, inputs)
        return settings | {"path": None, "revision": None, "digest": None}, made

    def signals(self, teacher: str, corpus: str) -> str:
        """Return the index of a teacher's signals on a corpus: the union of what all experiments need of them."""
        users = [entry for entry in self.config["experiments"].values() if self._signals_of(entry) == (teacher, corpus)]
        settings = self.config["signals"]
        model, manifest = self.model(teacher)
        spec = {"model": model, "needs": signal_needs(users, settings["top_k"])}
        if spec["needs"]["samples"]:
            spec["seed"] = self.config["seed"]
        spec |= {key: settings[key] for key in ("space_mask_mode", "shards", "dtype", "batch_tokens")}
        tokenizer = self.tokenizer(self.config["models"][teacher]["tokenizer"])
        inputs = {"corpus": self.corpus(corpus), "tokenizer": tokenizer, "model": manifest}
        folder = f"teachers/{teacher}/{corpus}"
        shards = [
            self.add("teacher_signals", f"{folder}/part-{shard:04d}.manifest.json", spec | {"shard": shard}, inputs)
            for shard in range(settings["shards"])
        ]
        return self.add("teacher_index", f"{folder}/manifest.json", {}, {"shards": shards})

    def teacher_head(self, teacher: str) -> str:
        """Return the matrices of a teacher that some methods read beside its signals."""
        model, manifest = self.model(teacher)
        inputs = {"tokenizer": self.tokenizer(self.config["models"][teacher]["tokenizer"]), "model": manifest}
        spec = {"model": model, "dtype": self.config["signals"]["dtype"]}
        return self.add("teacher_head", f"teachers/{teacher}/head.manifest.json", spec, inputs)

    def experiment(self, name: str) -> tuple[dict[str, Any], str | None]:
        """Return the experiment's final model, as `model` does."""
        entry = self.config["experiments"][name]
        model, start = self.initialized(name)
        if not entry["losses"]:
            return model, start
        shapes.check_latents(f"experiments.{name}", entry, self.config["models"])
        methods = {loss: method_of(loss, entry) for loss in entry["losses"]}
        losses = [
            {"name": loss, "module": method.module, "chunks": method.chunks, "weight": weight, "schedule": schedule}
            for (loss, method), weight, schedule in zip(
                methods.items(), entry["loss_weights"], entry["loss_schedules"], strict=True
            )
        ]
        train = entry["train"] | aggregation_of(entry)
        spec = {"model": model, "losses": losses, "train": train, "seed": entry["seed"]}
        inputs = {
            "corpus": self.corpus(entry["corpus"]),
            "tokenizer": self.tokenizer(entry["tokenizer"]),
            "init": start,
        }
        if any(method.teacher for method in methods.values()):
            spec["loss"] = options_of(entry["losses"], entry)
            spec["loss"]["space_mask_mode"] = self.config["signals"]["space_mask_mode"]
            spec["teacher"] = entry["teacher_signals"]
            spec["teacher_model"], teacher = self.model(entry["teacher"])
            inputs["teacher_tokenizer"] = self.tokenizer(self.config["models"][entry["teacher"]]["tokenizer"])
            if entry["teacher_signals"] == "cached":
                inputs["signals"] = self.signals(entry["teacher"], entry["corpus"])
                if any(method.head for method in methods.values()):
                    inputs["teacher_head"] = self.teacher_head(entry["teacher"])
            else:
                inputs["teacher"] = teacher
                spec["needs"] = signal_needs([entry], self.config["signals"]["top_k"])
            if any("mapping" in method.pair for method in methods.values()):
                inputs["mapping"] = self.mapping(name)
            if any("bias" in method.pair for method in methods.values()):
                inputs["bias"] = self.bias(name)
        modules = sorted({method.module for method in methods.values()})
        manifest = self.add("distill", f"students/{name}/manifest.json", spec, inputs, modules)
        return model | {"path": None, "revision": None, "digest": None}, manifest

    def _signals_of(self, entry: dict[str, Any]) -> tuple[str, str] | None:
        """Return the (teacher, corpus) whose cached signals an experiment reads, None when it reads none."""
        needs = any(METHODS[loss].teacher for loss in entry["losses"]) and entry["teacher_signals"] == "cached"
        return (entry["teacher"], entry["corpus"]) if needs else None

    def pair(self, name: str) -> None:
        """Make statistics and mapping of the experiment's two tokenizers, where they differ."""
        entry = self.config["experiments"][name]
        teacher, student = self.tokenizers(name)
        if teacher == student:
            return
        self.mapping(name)
        if "corpus" in entry:
            self.statistics(name)

    def statistics(self, name: str) -> str:
        """Return the statistics of the experiment's two tokenizers on its corpus."""
        return self._of_pair("tokenizer_stats", name, "statistics", {})

    def bias(self, name: str) -> str:
        """Return the tokenization bias between the experiment's two tokenizers on its corpus."""
        like = (self.tokenizers(name), self.config["experiments"][name]["corpus"])
        beside = [
            entry
            for other, entry in self.config["experiments"].items()
            if (self.tokenizers(other), entry.get("corpus")) == like
        ]
        every = any("every_bias" in method_of(loss, entry).pair for entry in beside for loss in entry["losses"])
        spec = self.config["tokenizer_bias"] | ({"pairs": "all"} if every else {})
        return self._of_pair("tokenizer_bias", name, "bias", spec, statistics=self.statistics(name))

    def _of_pair(self, stage: str, name: str, part: str, spec: dict[str, Any], **inputs: str) -> str:
        """Return an artifact made from the experiment's two tokenizers and corpus, `inputs` beside them."""
        (teacher, student), corpus = self.tokenizers(name), self.config["experiments"][name]["corpus"]
        given = {"teacher_tokenizer": self.tokenizer(teacher), "tokenizer": self.tokenizer(student)}
        given |= {"corpus": self.corpus(corpus)} | inputs
        return self.add(stage, f"tokenizer_pairs/{teacher}/{student}/{part}/{corpus}/manifest.json", spec, given)

    def mapping(self, name: str) -> str:
        """Return the mapping between the experiment's two tokenizers."""
        teacher, student = self.tokenizers(name)
        inputs = {"teacher_tokenizer": self.tokenizer(teacher), "tokenizer": self.tokenizer(student)}
        spec = {"max_distance": self.config["mapping"]["max_distance"]}
        return self.add("mined_mapping", f"tokenizer_pairs/{teacher}/{student}/mapping/manifest.json", spec, inputs)

    def tokenizers(self, name: str) -> tuple[str, str]:
        """Return the names of the teacher's and the student's tokenizer of an experiment."""
        entry = self.config["experiments"][name]
        return self.config["models"][entry["teacher"]]["tokenizer"], entry["tokenizer"]

    def evaluation(self, name: str, suite: str) -> str:
        if name in self.config["models"]:
            (model, manifest), tokenizer = self.model(name), self.config["models"][name]["tokenizer"]
        else:
            (model, manifest), tokenizer = self.experiment(name), self.config["experiments"][name]["tokenizer"]
        settings = dict(self.config["evaluation"]["suites"][suite])
        inputs: dict[str, Any] = {"tokenizer": self.tokenizer(tokenizer), "model": manifest}
        if settings["kind"] == "bits_per_byte":
            inputs["corpus"] = self.corpus(settings.pop("corpus"))
        else:
            inputs["tasks"] = [self.task(task) for task in settings.pop("built")]
            if settings["include_path"]:
                settings["files"] = sources.folder_files(
                    settings["include_path"], f"evaluation.suites.{suite}.include_path", self.digests
                )
        spec = {"model": model, "suite": settings, "seed": self.config["seed"]}
        return self.add("evaluate", f"evaluations/{name}/{suite}/manifest.json", spec, inputs)

    def task(self, name: str) -> str:
        entry = self.config["evaluation"]["tasks"][name]
        spec = {key: value for key, value in entry.items() if key != "corpus"} | {"name": name}
        return self.add("cloze_task", f"tasks/{name}/manifest.json", spec, {"corpus": self.corpus(entry["corpus"])})

    def report(self) -> str:
        def of(stage: str) -> list[str]:
            return [manifest for manifest, node in self.nodes.items() if node.stage == stage]

        kept = ("label", "story", "student", "teacher", "tokenizer", "losses", "seed", "group")
        experiments = [
            {"name": name, "control": self.control(name)} | {key: entry[key] for key in kept}
            for name, entry in self.config["experiments"].items()
        ]
        inputs = {
            "evaluations": of("evaluate"),
            "students": of("distill"),
            "models": of("pretrain"),
            "statistics": of("tokenizer_stats"),
            "mappings": of("mined_mapping"),
        }
        teachers = {"teachers": of("teacher_index")}
        template = self.digests.file(code.ROOT / "stages" / "summary" / "report.html.jinja")
        graph = [[node.stage, manifest, node.inputs] for manifest, node in self.nodes.items()]
        spec = {
            "title": self.config.get("title", self.config["name"]),
            "seed": self.config["seed"],
            "experiments": experiments,
        }
        summary = self.add("summarize", "summary/manifest.json", spec, inputs)
        return self.add(
            "report",
            "report.manifest.json",
            {"title": spec["title"], "graph": graph, "template": template},
            {"summary": summary} | inputs | teachers,
        )

    def control(self, name: str) -> str | None:
        """Return the experiment that differs from this one only in learning from the text alone (sft).

        Of an experiment that does so with a teacher's answers, the one on the text that the prompts come from.
        """
        entry = self.config["experiments"][name]
        corpus = entry.get("corpus")
        if entry["losses"] and not any(METHODS[loss].teacher for loss in entry["losses"]):
            corpus = self.config["corpora"][corpus].get("prompts")
        if not entry["losses"] or corpus is None:
            return None
        same = ("student", "tokenizer", "initialize", "train", "seed", "story")
        for other, candidate in self.config["experiments"].items():
            alone = candidate["losses"] in (["sft"], ["clm"]) and candidate["corpus"] == corpus
            if alone and all(candidate.get(key) == entry.get(key) for key in same):
                return other
        return None
