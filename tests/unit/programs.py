"""The programs of `test_distill` for losses that read more: signals, the teacher's matrices, the mapping, distill."""

from stages import mined_mapping, teacher_head, teacher_index, teacher_signals

from . import test_distill


class World(test_distill.World):
    """Also makes the signals that a loss asks for, and trains on them cached and online."""

    def both(self, losses, needs, options, head, train=None, pair=()):
        """Metrics of a run on cached signals and of one with the teacher at hand.

        `head`: whether the teacher's matrices are made; `pair`: what of "mapping" is.
        """
        self.run(teacher_signals.main, "teachers/made/part-0000.manifest.json", self._spec(needs), **self._teacher())
        parts = ["teachers/made/part-0000.manifest.json"]
        self.run(teacher_index.main, "teachers/made/manifest.json", {}, shards=parts)
        inputs = {"signals": "teachers/made/manifest.json"}
        if head:
            inputs["teacher_head"] = "teachers/made/head.manifest.json"
            spec = {"model": test_distill.MODEL, "dtype": "auto"}
            self.run(teacher_head.main, inputs["teacher_head"], spec, **self._teacher(corpus=None))
        made = {}
        if "mapping" in pair:
            made["mapping"] = "tokenizer_pairs/mapping/manifest.json"
            both = {"teacher_tokenizer": self.teacher_tokenizer, "tokenizer": self.tokenizer}
            self.run(mined_mapping.main, made["mapping"], {"max_distance": 0.3}, **both)
        common = {"losses": losses, "loss": options, "train": {"steps": 6, "learning_rate": 1e-2} | (train or {})}
        self.distill("cached", **common, **inputs, **made)
        self.distill("online", **common, **made, teacher="online", spec={"needs": needs})
        return self.metrics("cached"), self.metrics("online")

    def _spec(self, needs):
        spec = {"model": test_distill.MODEL, "needs": needs, "space_mask_mode": test_distill.LOSS["space_mask_mode"]}
        return spec | {"shards": 1, "shard": 0, "dtype": "auto", "batch_tokens": 200}

    def _teacher(self, **changes):
        inputs = {"corpus": self.corpus, "tokenizer": self.teacher_tokenizer, "model": self.teacher}
        return inputs | changes
