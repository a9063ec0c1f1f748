"""Contents as shapes: what a chat template can see of a text is kept, all else is one character that stands for it.

A template's output may depend on a content: whitespace is stripped at its ends, it is split at `</think>`, compared
with a word. The texts that a template looks for stand in its source. What lies between them, from its first to its last
character that is no whitespace, is inert: the template can only pass it on whole or drop it. So the rendering of a
shape says where every part of the content goes, and is the same for all contents of that shape.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import islice, product
from typing import Any, NamedTuple

from stages.tokenization.rendering import PLACEHOLDERS, environment

MOST_RUNS = 0xF000  # that there are characters for
MOST_VALUES = 32  # of one name: more are the parts of an output and nothing that is looked for

_FINDING = {
    "split", "rsplit", "partition", "rpartition", "startswith", "endswith", "removeprefix", "removesuffix", "replace",
    "find", "rfind", "index", "rindex", "count",
}  # fmt: skip
_STRIPPING = {"strip", "lstrip", "rstrip", "trim"}
_COMPARING = {"select", "reject", "selectattr", "rejectattr"}
_NO_MACROS = {"raise_exception", "namespace", "strftime_now", "range", "dict"}


class Shape(NamedTuple):
    """A text with placeholders, and the spans (first character, end) of the text that they stand for, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


class Sought(NamedTuple):
    """What a template looks for: `within` matches it anywhere in a text; `words` matter as the whole of a text."""

    within: re.Pattern[str] | None
    words: frozenset[str]
    texts: frozenset[str]  # that `within` matches

    def shape(self, text: str, first: int) -> Shape:
        """Return the shape of a text whose placeholders are numbered from `first`."""
        shaped: list[str] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for match in [*self.within.finditer(text), None] if self.within else [None]:
            part = text[at : match.start() if match else len(text)]
            inert = part.strip()
            if inert and inert not in self.words:
                start = at + len(part) - len(part.lstrip())
                end = start + len(inert)
                shaped += [text[at:start], chr(PLACEHOLDERS + first + len(spans)), text[end : at + len(part)]]
                spans.append((start, end))
            else:
                shaped.append(part)
            if match:
                shaped.append(match[0])
                at = match.end()
        if first + len(spans) > MOST_RUNS:
            return Shape(chr(PLACEHOLDERS + first), ((0, len(text)),))
        return Shape("".join(shaped), tuple(spans))


def sought_by(source: str, variables: Mapping[str, str]) -> Sought:
    """Return what a template looks for in texts; `variables` are its variables. Nothing where it is not valid Jinja."""
    import jinja2

    try:
        reader = _Reader(environment().parse(source), variables)
    except jinja2.TemplateError:
        return Sought(None, frozenset(), frozenset())
    within = frozenset(filter(None, reader.within))
    longest_first = sorted(within, key=lambda text: (-len(text), text))
    pattern = re.compile("|".join(map(re.escape, longest_first))) if within else None
    return Sought(pattern, frozenset(reader.words), within)


class _Reader:
    """Reads a template's syntax tree: constants that something is searched for or compared with."""

    def __init__(self, tree: Any, variables: Mapping[str, str]) -> None:
        from jinja2 import nodes

        self.nodes = nodes
        self.within: set[str] = set()
        self.words: set[str] = set()
        self.known: dict[str, set[str]] = {name: {value} for name, value in variables.items()}
        self.items = {node.target.name for node in tree.find_all(nodes.For) if isinstance(node.target, nodes.Name)}
        self._name_values(tree)
        for node in tree.find_all(nodes.Compare):
            self._compare(node)
        for node in tree.find_all(nodes.Call):
            if isinstance(node.node, nodes.Getattr):
                self._search(node.node.attr, node.args)
            elif isinstance(node.node, nodes.Name) and node.node.name not in _NO_MACROS:
                self._add(value for argument in node.args for value in self._values(argument))
        for node in tree.find_all(nodes.Filter):
            self._search(node.name, node.args)
        for node in tree.find_all(nodes.Test):
            self._add(value for argument in node.args for value in self._values(argument))

    def _add(self, texts: Iterator[str]) -> None:
        """Take texts that something is compared with; one that is no word may be compared with a part of a content."""
        for text in texts:
            (self.words if re.fullmatch(r"\w+", text) else self.within).add(text)

    def _compare(self, node: Any) -> None:
        left = node.expr
        for operand in node.ops:
            if operand.op in ("in", "notin"):
                element = isinstance(operand.expr, self.nodes.Name) and operand.expr.name in self.items
                for text in self._values(left):
                    # `'image' in item` asks for a key of a part of a content.
                    if not (element and re.fullmatch(r"\w+", text)):
                        self.within.add(text)
            else:
                self._add(iter(self._values(left)))
            self._add(iter(self._values(operand.expr)))
            left = operand.expr

    def _search(self, name: str, arguments: list[Any]) -> None:
        if name in _FINDING and arguments:
            self.within |= self._values(arguments[0])
        elif name in _STRIPPING and arguments:
            self.within |= {c for text in self._values(arguments[0]) for c in text if not c.isspace()}
        elif name in _COMPARING:
            self._add(value for argument in arguments for value in self._values(argument))

    def _name_values(self, tree: Any) -> None:
        """Find the texts that names can stand for: set, looped over, or given to a macro."""
        nodes = self.nodes
        macros = {node.name: node.args for node in tree.find_all(nodes.Macro)}
        for _ in range(2):
            for node in tree.find_all(nodes.Assign):
                if isinstance(node.target, nodes.Name) and _is_call(nodes, node.node, "namespace"):
                    for pair in node.node.kwargs:
                        self._know(f"{node.target.name}.{pair.key}", pair.value)
                elif isinstance(node.target, nodes.Name):
                    self._know(node.target.name, node.node)
                elif isinstance(node.target, nodes.NSRef):
                    self._know(f"{node.target.name}.{node.target.attr}", node.node)
            for node in tree.find_all(nodes.For):
                if isinstance(node.target, nodes.Name):
                    self._know(node.target.name, node.iter)
            for node in tree.find_all(nodes.Call):
                if isinstance(node.node, nodes.Name) and node.node.name in macros:
                    for parameter, argument in zip(macros[node.node.name], node.args, strict=False):
                        self._know(parameter.name, argument)

    def _know(self, name: str, node: Any) -> None:
        values = self.known.get(name, set()) | self._values(node)
        if len(values) <= MOST_VALUES:
            self.known[name] = values

    def _values(self, node: Any) -> set[str]:
        """Return the texts that an expression can be, as far as the source says."""
        nodes = self.nodes
        if isinstance(node, nodes.Const):
            return {node.value} if isinstance(node.value, str) else set()
        if isinstance(node, nodes.Name):
            return self.known.get(node.name, set())
        if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
            return self.known.get(f"{node.node.name}.{node.attr}", set())
        if isinstance(node, (nodes.List, nodes.Tuple)):
            return {value for item in node.items for value in self._values(item)}
        if isinstance(node, nodes.CondExpr):
            return self._values(node.expr1) | (self._values(node.expr2) if node.expr2 else set())
        if isinstance(node, (nodes.Add, nodes.Concat)):
            parts = [node.left, node.right] if isinstance(node, nodes.Add) else node.nodes
            return {"".join(texts) for texts in islice(product(*map(self._values, parts)), MOST_VALUES)}
        return set()


def _is_call(nodes: Any, node: Any, name: str) -> bool:
    return isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == name
