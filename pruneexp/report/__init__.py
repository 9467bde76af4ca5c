"""What a run did, for people: a short table at its end and a picture of the structure that is left."""

from pruneexp.report.structure import Width, removed_share, structure_figure, widths
from pruneexp.report.summary import Row, print_summary, summary, summary_line, summary_table

__all__ = [
    "Row",
    "Width",
    "print_summary",
    "removed_share",
    "structure_figure",
    "summary",
    "summary_line",
    "summary_table",
    "widths",
]
