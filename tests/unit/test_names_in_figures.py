"""What users call things is text: in the figures as in the page, whatever matplotlib or HTML would make of it."""

import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from stages.summary import figures
from tests.unit.test_compare import entry, made_up, reported

NAMES = [
    "50% $x_{a$ off",
    "$5, not $10",
    "$\\frac{1}{2}$",
    "\\frac",
    "<b>bold</b> & <script>alert(1)</script>",
    "_x^2",
    "]]> --> <!-- &amp; &#36;",
    "#123456 is INK, fill: #123456",
    "style=\"fill: #123456\" 'quoted'",
    "{{ 7 * 7 }} {% raw %} %(x)s {0}",
    "日本語 ไทย العربية 🦙🔥",
    "a  b",
    "nolegend _nolegend_",
    "_nolegend_",
    "l" * 300 + "end",
]
ODD = ["two\nlines", "tab\tand\x07bell", "\u2028separator"]


def rows(name, story="s"):
    row = {"label": name, "story": story, "value": 2.0, "stderr": 0.1, "flops": 1e6}
    return [row, row | {"label": f"{name}!", "value": 2.5, "flops": 4e7}]


def drawings(name):
    """Every figure that shows a name that users give."""
    curve = {"loss": "sft", "steps": [1, 2, 3], "values": [3.0, 2.0, 1.0]}
    return {
        "bars": figures.bits_per_byte_bars(
            rows(name, name), [row | {"label": f"{name} base"} for row in rows(name)[:1]]
        ),
        "compute": figures.compute_scatter(rows(name, name)),
        "learning-curves": figures.learning_curves([curve | {"label": name}, curve | {"label": f"{name}!"}]),
    }


def texts(svg):
    """The texts of an SVG as a reader sees them."""
    return [
        "".join(element.itertext()) for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")
    ]


@pytest.mark.parametrize("name", NAMES + ODD)
def test_a_name_is_drawn_as_it_is(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = {kind: figures.svg(figure, kind) for kind, figure in drawings(name).items()}
    shown = figures.plain(name)
    assert shown == name or len(name) > figures.LONGEST or name in ODD
    for kind, svg in drawn.items():
        found = texts(svg)
        times = {"bars": 2, "compute": 2, "learning-curves": 1}[kind]  # as label, and as story
        assert not any("mathdefault" in text for text in found)  # of matplotlib's own numbers
        assert sum(text.strip() == shown.strip() for text in found) == times, (kind, found)
        assert "<script" not in svg and "<b>" not in svg
    assert any(text.endswith("base") for text in texts(drawn["bars"]))


@pytest.mark.parametrize("name", NAMES)
def test_ink_follows_the_page_and_names_do_not(name):
    svg = figures.svg(drawings(name)["bars"], "x")
    assert figures.INK not in "".join(part.split(">")[0] for part in svg.split("<"))
    assert "currentColor" in svg and "currentColor" not in "".join(texts(svg))


def test_figures_do_not_depend_on_this_machines_settings(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\naxes.facecolor: red\nfont.size: 30\n")
    code = "from tests.unit.test_names_in_figures import drawings, figures\n"
    code += "import matplotlib\nassert matplotlib.rcParams['text.usetex'] == ('{}' == 'True')\n"
    code += "print(figures.svg(drawings('$x$')['bars'], 'x'))"
    here = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    made = [
        subprocess.run(
            [sys.executable, "-c", code.format(bool(more))], env=here | more, capture_output=True, text=True, check=True
        ).stdout
        for more in ({}, {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")})
    ]
    assert made[0] == made[1] and "$x$" in made[0]
    assert matplotlib.rcParams["text.parse_math"]  # outside a drawing, settings stay as they were


@pytest.mark.parametrize("name", NAMES + ODD)
def test_a_name_stands_on_the_page_as_it_is(tmp_path, name):
    root = tmp_path / "results"
    made = [
        made_up(root, model, "suite", {(name, name): [0.0, 1.0, 1.0], (name, "other"): [1.0] * 3}) for model in "ab"
    ]
    _, _, page = reported(root, made, [entry("a", label=name, story=name, control="b")])
    whole = " ".join(page.text.split())
    assert whole.count(" ".join(name.split())) >= 4  # story, label, metric, in the headline and the tables
    assert "script" not in page.tags and "b" not in page.tags
