"""The zoo: models that nobody here wrote, each captured, rewired and compared, one process each.

catalogue  which models, as texts that `re2fx.targets` reads
measure    what re2fx does with one of them, and whether it is right
census     the skip-adds of a graph, counted without the planner
keepers    one process per model; a crash or a timeout is a result
results    what was found, as data and as a file that a later run goes on from
tables     the same to read, with a sentence for every kind of refusal and failure
"""

from __future__ import annotations

from .catalogue import Entry, catalogue
from .keepers import visit
from .results import Results, Row

__all__ = ["Entry", "Results", "Row", "catalogue", "visit"]
