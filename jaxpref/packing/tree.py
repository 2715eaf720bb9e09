"""The tree itself: groups of tokens, and who sees whom."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


class Group(NamedTuple):
    """Token ids of a prompt and its responses.

    Attributes:
      prompt: the prompt, at least one token.
      responses: K responses of at least one token each.
      context: which tokens of each response are seen but not scored; None for none.
    """

    prompt: Int[np.ndarray, " prompt_tokens"]
    responses: Sequence[Int[np.ndarray, " response_tokens"]]
    context: Sequence[Bool[np.ndarray, " response_tokens"]] | None = None

    @property
    def scored(self) -> list[Int[np.ndarray, " scored_tokens"]]:
        """The places in each response of the tokens that are scored."""
        if self.context is None:
            return [np.arange(len(response)) for response in self.responses]
        return [np.flatnonzero(~context) for context in self.context]

    @property
    def scored_lengths(self) -> list[int]:
        """How many tokens of each response are scored."""
        if self.context is None:
            return [len(response) for response in self.responses]
        return [int((~context).sum()) for context in self.context]


# Tokens of the longest row that `Alignment` knows of.
LONGEST_ALIGNED = 32_768


class Alignment(NamedTuple):
    """Where prompts end and responses start in a row, for kernels that know these places coarsely.

    Attributes:
      prompt: prompts with several responses end at multiples of this.
      response: the responses start at multiples of this, which divides `prompt`.
    """

    prompt: int = 1
    response: int = 1

    @classmethod
    def of(cls, length: int) -> "Alignment":
        """So that a token's place, its prompt's end and its branch's start fit 32 bits together.

        Rows of up to 1,024 tokens need none, those of 4,096 prompts that end at multiples of 16.

        Args:
          length: tokens of a row.

        Raises:
          ValueError: it is above 32,768.
        """
        if length > LONGEST_ALIGNED:
            raise ValueError(f"rows should have at most {LONGEST_ALIGNED} tokens; got {length}.")
        missing = max(3 * max((length - 1).bit_length(), 1) - 32, 0)
        # There are more responses than prompts, so that theirs is the coarser.
        of_prompts = min(missing, 7)
        return cls(2**of_prompts, 2 ** (missing - of_prompts))

    def includes(self, other: "Alignment") -> bool:
        """Whether what has this alignment has another one too."""
        return self.prompt % other.prompt == 0 and self.response % other.response == 0

    def places(self, prompt: int, responses: Sequence[int]) -> tuple[int, list[int]]:
        """Where a prompt and its responses start, after a multiple of `prompt` in the row.

        A single response needs no alignment, since there is nothing between it and its prompt.

        Args:
          prompt: its tokens.
          responses: their tokens.
        """
        if len(responses) < 2:
            return 0, [prompt] * len(responses)
        end = self.after(prompt)
        starts = [end]
        for tokens in responses[:-1]:
            starts.append(starts[-1] + -(-tokens // self.response) * self.response)
        return end - prompt, starts

    def after(self, end: int) -> int:
        """The first place from `end` on where a prompt may end, and what follows a group start."""
        return -(-end // self.prompt) * self.prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """Whose token each one is: the tree itself, as the drawing in `jaxpref.packing` has it.

    Attributes:
      group: 1, 2, ... within a row; 0 is padding.
      branch: 0 for a prompt, k for the k-th response of the group.
      aligned: where prompts are known to end, and responses to start.
    """

    group: Int[Array | np.ndarray, "*micro rows length"]
    branch: Int[Array | np.ndarray, "*micro rows length"]
    aligned: Alignment = dataclasses.field(default=Alignment(), metadata={"static": True})


class Seats(NamedTuple):
    """Where the tokens of rows sit: all that `sees` needs to say who sees whom.

    Attributes:
      order: each token's place in its row, or its slot in a cache; the same in every row.
      positions: position of each token in its own sequence, which windows are measured in.
      tree: groups and branches; None where a row is one sequence.
    """

    order: Int[Array, " length"]
    positions: Int[Array, "rows length"]
    tree: Tree | None = None

    def between(self, start: int, end: int) -> "Seats":
        """The seats of the tokens from `start` to before `end`."""
        return jax.tree.map(lambda x: x[..., start:end], self)


def sees(
    queries: Seats, keys: Seats, window: Int[Array, ""] | int | None = None
) -> Bool[Array, "rows queries keys"]:
    """Who sees whom, as `mask[row, query, key]`: the one rule of attention.

    A query sees a key that is not later, is in the same group, and is in the prompt (branch 0)
    or in the query's own branch. Padding sees padding, so that no query is left without a key.

    Args:
      queries: seats of the tokens that look.
      keys: seats of the tokens that are looked at; with a tree if the queries have one.
      window: a query sees only keys whose position is less than this before its own; 0 or
        None for all keys.

    Raises:
      ValueError: only one of them has a tree.
    """
    if (queries.tree is None) != (keys.tree is None):
        raise ValueError("queries and keys should both have a tree, or neither.")
    mask = (queries.order[:, None] >= keys.order[None, :])[None]
    if queries.tree is not None and keys.tree is not None:
        mask &= queries.tree.group[:, :, None] == keys.tree.group[:, None, :]
        own, branch = queries.tree.branch[:, :, None], keys.tree.branch[:, None, :]
        mask &= (branch == 0) | (branch == own)
    if window is not None:
        distance = queries.positions[:, :, None] - keys.positions[:, None, :]
        mask &= (distance < window) | (window == 0)
    return jnp.broadcast_to(mask, (queries.positions.shape[0], *mask.shape[1:]))
