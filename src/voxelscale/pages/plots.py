"""Interactive figures by Plotly, whose script is a part of the page."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from voxelscale.pages.page import LIGHT, wide

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


GRID = "#ccd3db"
"""Of grid lines; to be seen when it is inverted, too."""


def text(name: str) -> str:
    """A name as Plotly's own markup shows it: no part of it is taken for a tag or a link."""
    return escape(name, quote=False)


def plot(figure: Figure, title: str, caption: str = "", *, height: int = 360, width: int = 0) -> str:
    """A figure with its title, as HTML for a page that has `scripts`.

    It is drawn for a light page; in the dark the page inverts it.

    Args:
        title: plain text.
        caption: HTML below it.
        height: pixels.
        width: pixels below which it is scrolled rather than shrunk; 0: it fits any page.
    """
    axis = {
        "gridcolor": GRID,
        "linecolor": LIGHT["soft"],
        "zeroline": False,
        "automargin": True,
        "exponentformat": "e",
        "minexponent": 5,
        "title_font_size": 12,
    }
    figure.update_layout(
        template="none",
        title=None,
        font={"family": "system-ui, sans-serif", "size": 12, "color": LIGHT["soft"]},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 50, "r": 12, "t": 12, "b": 40},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        hovermode="closest",
    )
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    size = f"height:{height}px" + (f";min-width:{width}px" if width else "")
    # The JSON has no "<": nothing in it can end the element.
    drawn = (
        f'<div class="plot" style="{size}" role="img" aria-label="{escape(title)}"></div>'
        f'<script type="application/json">{figure.to_json()}</script>'
    )
    drawn = wide(drawn, title, "scroll") if width else drawn
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{drawn}{below}</figure>"


def scripts() -> list[str]:
    """What `voxelscale.pages.page.write_page` needs for a page with plots: Plotly, and what draws them."""
    from plotly.offline import get_plotlyjs

    return [get_plotlyjs(), resources.files("voxelscale.pages").joinpath("plots.js").read_text()]
