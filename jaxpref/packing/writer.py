"""Groups as packed rows: plans are made, and tokens written where they say."""

import zlib
from collections.abc import Sequence

import jax
import numpy as np

from jaxpref.packing.batch import PackedBatch, Written
from jaxpref.packing.filling import Budget, Plan
from jaxpref.packing.planner import Planner, Shape, plan_micro_batches, plan_tree
from jaxpref.packing.tree import Group


def plan(groups: Sequence[Group], budget: Budget, planner: Planner = plan_tree) -> Plan:
    """Plans the rows of `groups`.

    Raises:
      ValueError: an empty prompt or response, or one too long for a row; or a response none
        of whose tokens is scored.
    """
    _check_groups(groups)
    if min(budget.row_length, budget.scored_length, budget.shards) < 1:
        raise ValueError(f"a row needs at least one token and one scored token; got {budget}.")
    return planner(
        [len(group.prompt) for group in groups],
        [[len(response) for response in group.responses] for group in groups],
        budget,
        [group.scored_lengths for group in groups],
    )


def pack(
    groups: Sequence[Group],
    *,
    row_length: int,
    scored_length: int | None = None,
    shards: int = 1,
    planner: Planner = plan_tree,
) -> PackedBatch:
    """Packs groups into rows.

    Args:
      groups: prompts with their responses; K may differ from group to group.
      row_length: tokens a row, at least the longest prompt plus response.
      scored_length: scored tokens a row; by default `row_length`, which always suffices.
      shards: blocks of rows, one a device along the batch axes of the mesh.
      planner: `plan_tree`, or `plan_padded` for one response a row.

    Returns:
      The batch, with NumPy arrays, its groups in the order given.

    Raises:
      ValueError: an empty prompt or response, or one too long for a row.

    >>> import numpy as np
    >>> group = Group(np.array([1, 2]), [np.array([3]), np.array([4, 5])])
    >>> pack([group], row_length=6).branch.tolist()
    [[0, 0, 1, 2, 2, 0]]
    """
    budget = Budget(row_length, row_length if scored_length is None else scored_length, shards)
    return materialise(plan(groups, budget, planner), groups, budget)


def pack_micro_batches(
    groups: Sequence[Group],
    budget: Budget,
    *,
    shape: Shape,
    responses: int | None = None,
    batch_size: int | None = None,
) -> PackedBatch:
    """Packs groups into micro-batches of a fixed shape.

    In the tables every micro-batch has all groups; one that it does not hold is absent there.

    Args:
      groups: prompts with their responses.
      budget: the shape of a row.
      shape: rows of a micro-batch, and how many there are at least; those beyond what the groups
        need come last and are empty.
      responses: see `materialise`.
      batch_size: see `materialise`.

    Raises:
      ValueError: see `plan_micro_batches`.
    """
    _check_groups(groups)
    plans = plan_micro_batches(
        [len(group.prompt) for group in groups],
        [[len(response) for response in group.responses] for group in groups],
        budget,
        shape.rows,
        [group.scored_lengths for group in groups],
    )
    empty: Plan = [[] for _ in range(shape.rows)]
    plans += [empty] * (shape.micro_batches - len(plans))
    size = batch_size or len(groups)
    parts = [
        materialise(plan, groups, budget, responses=responses, batch_size=size) for plan in plans
    ]
    return jax.tree.map(lambda *xs: np.stack(xs), *parts)


def materialise(
    plan: Plan,
    groups: Sequence[Group],
    budget: Budget,
    *,
    responses: int | None = None,
    batch_size: int | None = None,
) -> PackedBatch:
    """Writes the tokens of `groups` where `plan` places them.

    Where several processes train, each of them plans all rows and writes those of `budget.own`. The
    tables of groups are whole in every process.

    Args:
      plan: the rows.
      groups: the groups that were planned.
      budget: the shape that was planned for, and whose rows are written.
      responses: K of the tables; by default the largest K among the groups.
      batch_size: groups in the tables; by default those given. More are absent, with
        length 0.
    """
    own = range(budget.shards) if budget.own is None else budget.own
    of_shard, shards = len(plan) // budget.shards, len(own)
    rows = shards * of_shard
    responses = responses or max((len(group.responses) for group in groups), default=1)
    batch_size = batch_size or len(groups)
    tokens, positions, group_ids, branch = np.zeros((4, rows, budget.row_length), np.int32)
    table = (shards, of_shard * budget.scored_length)
    source, place, target = np.zeros((3, *table), np.int32)
    response = np.full(table, batch_size * responses, np.int32)
    lengths = np.zeros((batch_size, responses), np.int32)
    for part in (part for parts in plan for part in parts):
        scored_lengths = groups[part.group].scored_lengths
        for k in part.responses:
            lengths[part.group, k] = scored_lengths[k]
    filled = [0] * shards
    for row in range(rows):
        shard, row_in_shard = divmod(row, of_shard)
        first_of_row = row_in_shard * budget.row_length
        end = 0
        parts = plan[own[shard] * of_shard + row_in_shard]
        for number, part in enumerate(parts, start=1):
            prompt, responses_here = groups[part.group].prompt, groups[part.group].responses
            sizes = [len(responses_here[k]) for k in part.responses]
            before, starts = budget.aligned.places(len(prompt), sizes)
            origin = budget.aligned.after(end)
            start = origin + before
            end = start + len(prompt)
            tokens[row, start:end] = prompt
            positions[row, start:end] = np.arange(len(prompt))
            group_ids[row, start:end] = number
            last_of_prompt = first_of_row + end - 1
            scored_places = groups[part.group].scored
            for k, offset in zip(part.responses, starts, strict=True):
                ids, places = responses_here[k], scored_places[k]
                start, end = origin + offset, origin + offset + len(ids)
                tokens[row, start:end] = ids
                positions[row, start:end] = np.arange(len(prompt), len(prompt) + len(ids))
                group_ids[row, start:end] = number
                branch[row, start:end] = k + 1
                scored = slice(filled[shard], filled[shard] + len(places))
                filled[shard] += len(places)
                # Each token is predicted from the one before it, the first from the prompt.
                here = places + start + first_of_row
                source[shard, scored] = here - 1
                if places[0] == 0:
                    source[shard, scored.start] = last_of_prompt
                place[shard, scored] = here
                target[shard, scored] = ids[places]
                response[shard, scored] = part.group * responses + k
    by_row = (rows, budget.scored_length)
    return PackedBatch(
        tokens=tokens,
        positions=positions,
        group=group_ids,
        branch=branch,
        source=source.reshape(by_row),
        place=place.reshape(by_row),
        target=target.reshape(by_row),
        response=response.reshape(by_row),
        lengths=lengths,
        extras={},
        written=None if budget.own is None else _written(plan, groups, budget),
        shards=shards,
        aligned=budget.aligned,
    )


def _written(plan: Plan, groups: Sequence[Group], budget: Budget) -> Written:
    digest, tokens = zlib.crc32(repr((plan, budget._replace(own=None))).encode()), 0
    for part in (part for parts in plan for part in parts):
        group = groups[part.group]
        for piece in (group.prompt, *(group.responses[k] for k in part.responses)):
            digest = zlib.crc32(np.ascontiguousarray(piece, np.int32).data, digest)
            tokens += len(piece)
    return Written(np.asarray(digest, np.uint32), np.asarray(tokens, np.int32))


def _check_groups(groups: Sequence[Group]) -> None:
    for index, group in enumerate(groups):
        empty = [k for k, response in enumerate(group.responses) if len(response) == 0]
        if len(group.prompt) == 0 or empty:
            what = f"response {empty[0]}" if empty else "the prompt"
            raise ValueError(
                f"group {index}: {what} is empty. A prompt needs a token to predict from "
                "(BOS will do), and a response a token to score."
            )
        if group.context is None:
            continue
        sizes = [len(response) for response in group.responses]
        if [len(context) for context in group.context] != sizes:
            raise ValueError(
                f"group {index}: context should say of each token of each response (there are "
                f"{sizes}) whether it is scored; it has {[len(c) for c in group.context]}."
            )
        unscored = [k for k, scored in enumerate(group.scored_lengths) if not scored]
        if unscored:
            raise ValueError(f"group {index}: no token of response {unscored[0]} is scored.")
