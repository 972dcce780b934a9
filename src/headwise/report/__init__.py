"""Reports: figures, the self-contained HTML page, and the story that `headwise demo` tells."""

from headwise.report.page import Card, Section, Table, render

__all__ = ["Card", "Section", "Table", "render"]
