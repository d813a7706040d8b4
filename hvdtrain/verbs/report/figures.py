"""Figures in the look of a page, empty yet. Bokeh draws; nothing here does."""

from __future__ import annotations

from typing import Any

COLOURS = ("#0072b2", "#c04a00", "#00734f", "#a8327d", "#806000", "#5146c9", "#8f2d2d", "#4d4d4d")
"""At least 3:1 against white, and told apart by those who see no red or no green; further curves have dashes."""
_PLAIN = str.maketrans({"<": "‹", ">": "›", "&": "+", "$": "S", "@": "(at)", "\\": "/", "{": "(", "}": ")"})


def base_figure(x_label: str, **kinds: str) -> Any:
    """Return an empty figure in the page's look; `kinds` are Bokeh's `x_axis_type` and `y_axis_type`."""
    from bokeh.models import BoxZoomTool, NumeralTickFormatter, PanTool, ResetTool, SaveTool, WheelZoomTool
    from bokeh.plotting import figure

    build: Any = figure  # whose types know no arguments by name
    zoom = BoxZoomTool()
    plot: Any = build(
        height=300,
        sizing_mode="stretch_width",
        tools=[zoom, PanTool(), WheelZoomTool(), ResetTool(), SaveTool()],
        active_drag=zoom,
        toolbar_location="above",
        x_axis_label=x_label,
        **kinds,
    )
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0.[00]")
    plot.toolbar.logo = None
    plot.background_fill_color = plot.border_fill_color = None
    plot.outline_line_color = "#999999"
    plot.grid.grid_line_color = "#e0e0e0"
    for axis in (plot.xaxis, plot.yaxis):
        axis.axis_label_text_color = axis.major_label_text_color = "#333333"
        axis.axis_label_text_font_style, axis.axis_label_text_font_size = "normal", "13px"
        axis.major_label_text_font_size = "12px"
    return plot


def without_axes(plot: Any) -> None:
    """Have a figure stay as it is when the page's reader chooses another axis."""
    plot.tags = ["fixed"]


def plain(text: str) -> str:
    """Return a text that is nothing but text to Bokeh: no markup, no formula, no field."""
    return text.translate(_PLAIN)
