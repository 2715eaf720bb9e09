"""The preference tree: K responses that share one prompt, packed into rows.

A group is a prompt followed by its K responses; a row holds several groups:

    tokens     p p p p | a a a | b b b b |  q q | c c | d d d |  . .
    positions  0 1 2 3 | 4 5 6 | 4 5 6 7 |  0 1 | 2 3 | 2 3 4 |  0 0
    group      1 1 1 1   1 1 1   1 1 1 1    2 2   2 2   2 2 2    0 0     0 = padding
    branch     0 0 0 0   1 1 1   2 2 2 2    0 0   1 1   2 2 2    0 0     0 = prompt, k = k-th

A token sees the earlier tokens of its group that lie in the prompt or in its own
branch, so every response sees exactly what it would see in a row of its own.

What is scored is a table apart: `source` says which hidden state predicts, `target`
which token, `response` whose it is. The first token of every response is predicted
from the prompt's last hidden state. Only these positions ever meet the LM head. A
response may have tokens that it sees but that are not scored, such as what a user said
between two turns of the assistant; they are in its branch and not in the table.

Rows are divided into equal shards, one a device along the batch axes of the mesh, and
the scored positions of a shard's rows share one table, so that a long response in one
row may use the room that another row leaves.

A group too long for one row is split over several, each with the prompt again. Losses
still see whole groups, because sums per response come out in batch order, wherever
the responses were placed.
"""

from jaxpref.packing.batch import (
    ROW_FIELDS,
    PackedBatch,
    Written,
    attention_mask,
    gather_places,
    gather_sources,
    index_in_response,
    is_last,
    last_places,
    response_means,
    response_sums,
    sum_by_response,
)
from jaxpref.packing.filling import Budget, Lengths, Part, Plan
from jaxpref.packing.micro_batches import map_micro_batches, sum_micro_batches
from jaxpref.packing.planner import (
    Planner,
    Shape,
    fixed_shape,
    plan_micro_batches,
    plan_padded,
    plan_tree,
    round_rows,
    scored_budget,
)
from jaxpref.packing.tree import LONGEST_ALIGNED, Alignment, Group, Seats, Tree, sees
from jaxpref.packing.writer import materialise, pack, pack_micro_batches, plan

__all__ = [
    "LONGEST_ALIGNED",
    "ROW_FIELDS",
    "Alignment",
    "Budget",
    "Group",
    "Lengths",
    "PackedBatch",
    "Part",
    "Plan",
    "Planner",
    "Seats",
    "Shape",
    "Tree",
    "Written",
    "attention_mask",
    "fixed_shape",
    "gather_places",
    "gather_sources",
    "index_in_response",
    "is_last",
    "last_places",
    "map_micro_batches",
    "materialise",
    "pack",
    "pack_micro_batches",
    "plan",
    "plan_micro_batches",
    "plan_padded",
    "plan_tree",
    "response_means",
    "response_sums",
    "round_rows",
    "scored_budget",
    "sees",
    "sum_by_response",
    "sum_micro_batches",
]
