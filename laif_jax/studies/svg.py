"""What all figures share: colours that follow the page's light or dark, style, thinning, and SVG for inlining."""

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

# Colours that stand for the page's CSS variables: matplotlib draws these, `svg` puts the variables in.
VARIABLES = {
    "#010101": "var(--fg)",
    "#020202": "var(--muted)",
    "#030303": "var(--grid)",
    "#040404": "var(--sft)",
    "#050505": "var(--laif)",
    "#060606": "var(--page)",
}
FG, MUTED, GRID, SFT, LAIF, PAGE = VARIABLES
# Told apart on white and on near-black, and by most colour-blind readers.
PALETTE = ("#4c8fd6", "#e07b39", "#2fa36b", "#c7569b", "#9a7bd1", "#b8860b", "#2aa5b5", "#d1495b")
MAX_POINTS = 300  # per line; longer curves are averaged in bins

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "svg.hashsalt": "laif",  # the same data gives the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a `$` in an arm's name is a `$`
    "text.color": FG,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": FG,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": FG,
    "ytick.labelcolor": FG,
    "legend.frameon": False,
}


def thin(steps: Sequence[Any], values: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values as arrays of at most MAX_POINTS, averaged in bins; what is not a number is left out."""
    x = np.array([np.nan if step is None else step for step in steps], dtype=np.float64)
    y = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) <= MAX_POINTS:
        return x, y
    bins = [np.array_split(array, MAX_POINTS) for array in (x, y)]
    return np.array([part.mean() for part in bins[0]]), np.array([part.mean() for part in bins[1]])


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an `<svg>` element for inlining: theme colours, ids made unique per figure, nothing external."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    width, height = (float(side) for side in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0])
    # Metadata names web addresses, and a <style> inside inline SVG would style the whole page.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"<>]*", "font-family: inherit", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    head = (
        f'<svg class="figure" role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width: {width * 4 / 3:.0f}px" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + text[text.index(">") + 1 :]


def short(name: str, width: int = 32) -> str:
    """A name of at most `width` characters."""
    return name if len(name) <= width else name[: width - 1] + "…"


def wrap(name: str, width: int) -> str:
    """Breaks a name over lines of at most `width` characters, after a space, `-`, `_`, `/` or `+` where it can."""
    lines = [""]
    for part in re.findall(rf"[^-_/+ ]{{0,{max(1, width - 1)}}}[-_/+ ]?", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.strip() for line in lines)
