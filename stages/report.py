"""Write the report: one HTML page that needs nothing beside it."""

from pathlib import Path

from stages.core import stage

TEMPLATE = Path(__file__).parent / "summary" / "report.html.jinja"


def main(argv: list[str] | None = None) -> None:
    """Read the summary, the tokenizer pairs and every manifest of the run; write report.html."""
    job = stage.parse("stages.report", __doc__, argv)
    import jinja2

    from stages.summary import headline
    from stages.summary.page import context

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals |= {"number": number, "short": headline.number}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(context(job))
    with job.publish() as draft:
        (draft.folder / "report.html").write_text(page, encoding="utf-8")


def number(value: object) -> str:
    """Return a number with thousands separators or four digits, another value as it is."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    stage.run(main)
