"""How a policy's responses to held-out prompts compare with those of its reference."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxpref import evaluation
from jaxpref.errors import UserError
from jaxpref.experience.held_out import KL, LENGTH, SCORES, HeldOut, Other, Said, write_lines
from jaxpref.workdir import AnyPath

_FILE = "reference_samples.jsonl"
# What is measured of samples, by its name in the measurements.
_MEASURED = {"reward": SCORES, "kl": KL, "length": LENGTH}


class _Theirs(NamedTuple):
    """What the reference has said to the same prompts.

    Attributes:
      response_ids: token ids.
      rewards: of the responses.
    """

    response_ids: Sequence[Sequence[int]]
    rewards: Float[np.ndarray, " prompts"]


class AgainstReference:
    """Measures what a policy has said to the first held-out prompts, also against the reference.

    The reference answers once, before the first step, when its weights are there in every mode,
    with the random numbers that the policy has at every evaluation. What it says is kept in the
    workdir, so a run that is resumed measures the same.
    """

    def __init__(
        self,
        held_out: HeldOut,
        count: int,
        workdir: AnyPath,
        *,
        reference: Callable[[], Other] | None,
        resuming: bool,
    ):
        """Prepares, and reads what the reference has said if that is known.

        Args:
          held_out: lets policies answer.
          count: of the prompts.
          workdir: of the run.
          reference: another policy that is the reference, called once before the first step; None
            if the reference is the policy before the first step.
          resuming: whether the run is resumed.

        Raises:
          UserError: there are too few prompts, or what the reference has said cannot be read.
        """
        if min(count, len(held_out)) < 2:
            raise UserError(
                f"eval.win_rate_prompts is {count}, and {len(held_out)} of the held-out prompts "
                "can be answered, but a win rate is one of at least 2: ask for more, hold out more "
                "with data.eval_fraction or data.eval_path, or leave it at 0."
            )
        self._held_out, self._count = held_out, min(count, len(held_out))
        self._reference, self._path = reference, workdir / _FILE
        self._theirs = _read(self._path) if resuming and held_out.rewarded else None

    def __call__(self, state: Any, said: Said) -> dict[str, float]:
        """The win rate and the means of what is known of the policy's responses.

        Of a run that begins the first call is before the first step.

        Args:
          state: the train state.
          said: what the policy says to the held-out prompts.
        """
        found = {
            f"eval/samples/{name}": float(said.values[known][: self._count].mean())
            for name, known in _MEASURED.items()
            if known in said.values
        }
        if not self._held_out.rewarded:
            return found
        if self._theirs is None:
            self._theirs = self._first(state, said)
        scores = _scores(said, self._theirs)
        return {**found, "eval/win_rate": evaluation.win_rate(scores).rate}

    def _first(self, state: Any, said: Said) -> _Theirs:
        """What the reference says."""
        if self._reference is not None:
            said = self._held_out.scored(self._reference(), state, self._count)
        theirs = _Theirs(
            [ids.tolist() for ids in said.response_ids[: self._count]],
            said.values[SCORES][: self._count],
        )
        if not jax.process_index():
            lines = [
                {
                    "prompt": said.prompts[place],
                    "response": said.responses[place],
                    "response_ids": theirs.response_ids[place],
                    "reward": float(theirs.rewards[place]),
                }
                for place in range(self._count)
            ]
            write_lines(self._path, [json.dumps(line, ensure_ascii=False) for line in lines])
        return theirs


def _scores(said: Said, theirs: _Theirs) -> Float[np.ndarray, " prompts"]:
    """1 where the policy's response has the higher reward, 0 where it has the lower, 1/2 for a tie.

    Equal responses are a tie, whatever a reward makes of them that is drawn, or is rounded in one
    batch otherwise than in another.
    """
    # Fewer prompts are held out than there were if eval.max_examples has changed since.
    count = min(len(said.responses), len(theirs.rewards))
    scores = (1 + np.sign(said.values[SCORES][:count] - theirs.rewards[:count])) / 2
    pairs = zip(said.response_ids[:count], theirs.response_ids[:count], strict=True)
    return np.where([ours.tolist() == [*other] for ours, other in pairs], 0.5, scores)


def _read(path: AnyPath) -> _Theirs:
    """What `AgainstReference` has kept."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]
        rewards = np.asarray([line["reward"] for line in lines], np.float64)
        return _Theirs([[*map(int, line["response_ids"])] for line in lines], rewards)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: what the reference of this run has said to held-out prompts cannot be read "
            f"({error}); put the file back, or start again in another --workdir."
        ) from error
