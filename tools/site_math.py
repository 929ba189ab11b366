"""Sets the formulas of the documentation site, as a hook of MkDocs (`mkdocs.yml`).

Pages write LaTeX between dollar signs or in a fence named `math`, as GitHub does. The hook turns it
into MathML while the site is built, so a reader's browser needs no script and no network.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# The form in which `pymdownx.arithmatex` leaves formulas with `generic: true`.
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.S
)


def on_page_content(text: str, **_: Any) -> str:
    """A page's HTML with MathML in place of LaTeX."""

    def formula(match: re.Match) -> str:
        display = "block" if match["tag"] == "div" else "inline"
        mathml = convert(html.unescape(match["latex"]).strip(), display=display)
        return f'<div class="formula">{mathml}</div>' if display == "block" else mathml

    return FORMULA.sub(formula, text)
