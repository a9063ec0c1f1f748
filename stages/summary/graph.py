"""The artifacts of a run as a drawing: layers from left to right, one box per artifact or group of alike ones."""

from collections import Counter
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, GAP_X, GAP_Y = 150, 36, 34, 10
LETTERS = 22  # of a name that fit into a box
GROUP_ABOVE = 12  # more boxes of one stage than this in a layer become one
COLOURS = {
    "corpus": "#009e73",
    "tokenizer": "#e69f00",
    "tokenizer_stats": "#e69f00",
    "tokenizer_bias": "#e69f00",
    "mined_mapping": "#e69f00",
    "pretrain": "#56b4e9",
    "initialize": "#56b4e9",
    "distill": "#0072b2",
    "teacher_signals": "#cc79a7",
    "teacher_index": "#cc79a7",
    "teacher_head": "#cc79a7",
    "generate": "#cc79a7",
    "cloze_task": "#009e73",
    "evaluate": "#d55e00",
    "ensemble": "#d55e00",
}


def layers(graph: Sequence[tuple[str, str, list[str]]]) -> dict[str, int]:
    """Return manifest -> layer: 0 for an artifact without inputs, else one more than its latest input.

    `graph` lists (stage, manifest, manifests it is made from) in any order.
    """
    inputs = {manifest: upstream for _, manifest, upstream in graph}
    depth: dict[str, int] = {}

    def visit(manifest: str) -> int:
        if manifest not in depth:
            depth[manifest] = 1 + max((visit(item) for item in inputs.get(manifest, [])), default=-1)
        return depth[manifest]

    for manifest in inputs:
        visit(manifest)
    return {manifest: depth[manifest] for manifest in inputs}


def boxes(graph: Sequence[tuple[str, str, list[str]]]) -> tuple[dict[str, tuple[str, str, int]], dict[str, str]]:
    """Return (box -> (stage, text, layer), manifest -> box). Shards, evaluations of a model, and crowds share one."""
    depth = layers(graph)
    last = max((depth[manifest] for stage, manifest, _ in graph if stage == "evaluate"), default=0)
    depth |= {manifest: last for stage, manifest, _ in graph if stage == "evaluate"}
    owner, members = {}, {}
    for stage, manifest, _ in graph:
        box = _box(stage, manifest)
        owner[manifest] = box
        members.setdefault(box, []).append((stage, manifest))
    crowd = Counter((part[0][0], depth[part[0][1]]) for part in members.values())
    shapes: dict[str, tuple[str, str, int]] = {}
    for box, part in members.items():
        stage, layer = part[0][0], max(depth[manifest] for _, manifest in part)
        if crowd[stage, layer] > GROUP_ABOVE:
            group = f"{stage} {layer}"
            shapes[group] = (stage, f"{crowd[stage, layer]} folders", layer)
            owner |= {manifest: group for _, manifest in part}
        else:
            shapes[box] = (stage, _text(part), layer)
    return shapes, owner


def _box(stage: str, manifest: str) -> str:
    """Return the key of the box of an artifact: its manifest, or the folder it shares with alike ones."""
    folder, _, file = manifest.rpartition("/")
    if stage == "evaluate":
        return f"{stage} {folder.rpartition('/')[0]}"
    return manifest if file == "manifest.json" or not folder else f"{stage} {folder}"


def _text(part: list[tuple[str, str]]) -> str:
    """Return what a box says below its stage: the folder without its first part, which the stage tells."""
    stage, manifest = part[0]
    folder = manifest.rpartition("/")[0] or manifest.removesuffix(".manifest.json")
    if stage == "evaluate":
        return f"{folder.split('/')[-2]}: " + ", ".join(item.split("/")[-2] for _, item in part)
    name = folder.partition("/")[2] or folder
    return f"{name} x {len(part)}" if len(part) > 1 else name


def needed(edges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the edges without those that a longer way between the same boxes implies."""
    after: dict[str, set[str]] = {}
    for a, b in edges:
        after.setdefault(a, set()).add(b)
    reached: dict[str, set[str]] = {}

    def reach(box: str) -> set[str]:
        if box not in reached:
            reached[box] = set()
            for other in after.get(box, ()):
                reached[box] |= {other} | reach(other)
        return reached[box]

    return [(a, b) for a, b in edges if not any(b in reach(other) for other in after[a] if other != b)]


def draw(graph: Sequence[tuple[str, str, list[str]]]) -> str:
    """Return the graph as an SVG element."""
    shapes, owner = boxes(graph)
    edges = sorted(
        {(owner[item], owner[manifest]) for _, manifest, upstream in graph for item in upstream if item in owner}
    )
    edges = needed([(a, b) for a, b in edges if a != b])
    place = _places(shapes, edges)
    right = max((x for x, _ in place.values()), default=0) + WIDTH + 2
    bottom = max((y for _, y in place.values()), default=0) + HEIGHT + 2
    parts = [
        f'<svg class="graph" viewBox="0 0 {right} {bottom}" width="{right}" role="img" '
        'aria-label="artifacts and what they are made from">'
    ]
    for a, b in edges:
        (x1, y1), (x2, y2) = place[a], place[b]
        x1, y1, y2 = x1 + WIDTH, y1 + HEIGHT / 2, y2 + HEIGHT / 2
        bend = max(GAP_X, (x2 - x1) / 2)
        parts.append(f'<path class="edge" d="M{x1} {y1:g}C{x1 + bend:g} {y1:g} {x2 - bend:g} {y2:g} {x2} {y2:g}"/>')
    for box, (stage, text, _) in shapes.items():
        x, y = place[box]
        colour = COLOURS.get(stage, "#7f7f7f")
        frame = f'x="{x + 1}" y="{y + 1}" height="{HEIGHT}"'
        parts.append(
            f'<g><title>{escape(text)}</title><rect class="box" {frame} width="{WIDTH}" rx="6"/>'
            f'<rect {frame} width="5" rx="2" fill="{colour}"/>'
            f'<text class="stage" x="{x + 14}" y="{y + 15}">{escape(stage)}</text>'
            f'<text class="name" x="{x + 14}" y="{y + 29}">{escape(_short(text, LETTERS))}</text></g>'
        )
    return "".join([*parts, "</svg>"])


def _places(shapes: dict[str, tuple[str, str, int]], edges: list[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """Return box -> (x, y); boxes of a layer are ordered by the mean place of their neighbours (barycentre)."""
    columns: dict[int, list[str]] = {}
    for box, (_, _, layer) in shapes.items():
        columns.setdefault(layer, []).append(box)
    before = {box: [a for a, b in edges if b == box] for box in shapes}
    after = {box: [b for a, b in edges if a == box] for box in shapes}
    rank = {box: float(index) for column in columns.values() for index, box in enumerate(column)}
    for sweep in range(6):
        forward = sweep % 2 == 0
        for layer in sorted(columns, reverse=not forward):
            near = before if forward else after
            centre = {box: _mean([rank[other] for other in near[box]], rank[box]) for box in columns[layer]}
            columns[layer].sort(key=lambda box, centre=centre: (centre[box], rank[box]))
            rank |= {box: float(index) for index, box in enumerate(columns[layer])}
    tallest = max((len(column) for column in columns.values()), default=0)
    place = {}
    for number, layer in enumerate(sorted(columns)):
        shift = (tallest - len(columns[layer])) / 2
        for index, box in enumerate(columns[layer]):
            place[box] = (number * (WIDTH + GAP_X), round((index + shift) * (HEIGHT + GAP_Y)))
    return place


def _mean(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _short(text: str, width: int) -> str:
    """Return a name within `width` characters, with its end, which says most."""
    return text if len(text) <= width else "…" + text[-(width - 1) :]
