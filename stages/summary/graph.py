"""The artifacts of a run as a drawing: layers from left to right, one box per artifact or group of alike ones."""

from collections import Counter
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, GAP_X, GAP_Y = 168, 36, 46, 10
GROUP_ABOVE = 6  # more artifacts of one stage than this in a layer become one box
COLOURS = {
    "corpus": "#009e73",
    "tokenizer": "#e69f00",
    "tokenizer_stats": "#e69f00",
    "mined_mapping": "#e69f00",
    "pretrain": "#56b4e9",
    "initialize": "#56b4e9",
    "distill": "#0072b2",
    "teacher_signals": "#cc79a7",
    "teacher_index": "#cc79a7",
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
    """Return (box -> (stage, text, layer), manifest -> box). Shards, and crowds of one stage in a layer, share one."""
    depth = layers(graph)
    crowd = Counter((stage, depth[manifest]) for stage, manifest, _ in graph)
    shapes: dict[str, tuple[str, str, int]] = {}
    owner = {}
    members: Counter[str] = Counter()
    for stage, manifest, _ in graph:
        folder = manifest.rpartition("/")[0]
        layer = depth[manifest]
        shard = not manifest.endswith("/manifest.json") and folder != ""
        if crowd[stage, layer] > GROUP_ABOVE and not shard:
            box, text = f"{stage} {layer}", folder.split("/")[0]
        else:
            box, text = (f"{stage} {folder}", folder) if shard else (manifest, folder or manifest)
        members[box] += 1
        owner[manifest] = box
        count = f" x {members[box]}" if members[box] > 1 else ""
        shapes[box] = (stage, text + count, layer)
    return shapes, owner


def draw(graph: Sequence[tuple[str, str, list[str]]]) -> str:
    """Return the graph as an SVG element."""
    shapes, owner = boxes(graph)
    edges = sorted(
        {(owner[item], owner[manifest]) for _, manifest, upstream in graph for item in upstream if item in owner}
    )
    edges = [(a, b) for a, b in edges if a != b]
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
            f'<text class="name" x="{x + 14}" y="{y + 29}">{escape(_short(text, 27))}</text></g>'
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
    """Return the end of a path, which says most, within `width` characters."""
    return text if len(text) <= width else "…" + text[-(width - 1) :]
