"""One module per paper: the claim, and `reproduce(scale)` that measures it with the library's public API.

>>> from headwise.papers import rows
>>> len(rows())
33
"""

from headwise.papers.catalogue import Paper, Row, row, rows
from headwise.papers.reproduction import Check, Reproduction, environment

__all__ = ["Check", "Paper", "Reproduction", "Row", "environment", "row", "rows"]
