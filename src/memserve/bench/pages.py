"""Reports as one self-contained HTML file: style and plots are inline, without scripts."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from memserve.bench import environment as measured_on
from memserve.bench.plots import Plot, draw
from memserve.bench.tables import plain_tables

_PACKAGE = "memserve.bench"


def render_page(
    template: str, environment: measured_on.Environment, package: str = _PACKAGE, **values: object
) -> str:
    """Return an HTML document. `template`: a file in the folder `templates` of `package`, which
    extends `page.html`. `values`: its variables, escaped. Raises ConfigError without matplotlib."""
    loader = ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, _PACKAGE))])
    pages = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"plain_tables": plain_tables, "data_uri": _data_uri}
    return pages.get_template(template).render(environment=environment, **values)


def write_page(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _data_uri(plot: Plot) -> str:
    return f"data:image/svg+xml;base64,{b64encode(draw(plot).encode()).decode()}"
