"""The programs of `test_distill` for losses that read hidden states: signals, the teacher's matrices, distill."""

from stages import teacher_head, teacher_index, teacher_signals

from . import test_distill


class World(test_distill.World):
    """Also makes the signals that a loss asks for, and trains on them cached and online."""

    def both(self, losses, needs, options, head, train=None):
        """Metrics of a run on cached signals and of one with the teacher at hand."""
        self.run(teacher_signals.main, "teachers/made/part-0000.manifest.json", self._spec(needs), **self._teacher())
        parts = ["teachers/made/part-0000.manifest.json"]
        self.run(teacher_index.main, "teachers/made/manifest.json", {}, shards=parts)
        inputs = {"signals": "teachers/made/manifest.json"}
        if head:
            inputs["teacher_head"] = "teachers/made/head.manifest.json"
            spec = {"model": test_distill.MODEL, "dtype": "auto"}
            self.run(teacher_head.main, inputs["teacher_head"], spec, **self._teacher(corpus=None))
        common = {"losses": losses, "loss": options, "train": {"steps": 6, "learning_rate": 1e-2} | (train or {})}
        self.distill("cached", **common, **inputs)
        self.distill("online", **common, teacher="online", spec={"needs": needs})
        return self.metrics("cached"), self.metrics("online")

    def _spec(self, needs):
        spec = {"model": test_distill.MODEL, "needs": needs, "space_mask_mode": test_distill.LOSS["space_mask_mode"]}
        return spec | {"shards": 1, "shard": 0, "dtype": "auto", "batch_tokens": 200}

    def _teacher(self, **changes):
        inputs = {"corpus": self.corpus, "tokenizer": self.teacher_tokenizer, "model": self.teacher}
        return inputs | changes
