"""The frozen reference: how each mode starts, gives log-probs, and moves after an update."""

from jaxpref.reference.another import Another, find_another, open_another
from jaxpref.reference.finished import finished
from jaxpref.reference.modes import COLUMN, Free, Live, Mode, Precomputed, Reference, Synced
from jaxpref.reference.start import Start, abstract, describe, has_adapted, moves, start
from jaxpref.reference.table import digest, load_table, precompute, save_table

__all__ = [
    "COLUMN",
    "Another",
    "Free",
    "Live",
    "Mode",
    "Precomputed",
    "Reference",
    "Start",
    "Synced",
    "abstract",
    "describe",
    "digest",
    "find_another",
    "finished",
    "has_adapted",
    "load_table",
    "moves",
    "open_another",
    "precompute",
    "save_table",
    "start",
]
