"""What is sampled at evaluations: the responses of policies to held-out prompts, measured."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import config as config_lib, experience, models, reference as reference_lib, rewards
from jaxpref.data import TokenizedDataset
from jaxpref.data.chat import Chat
from jaxpref.data.synthetic import true_rewards
from jaxpref.errors import UserError
from jaxpref.packing import Budget
from jaxpref.terminal import console
from jaxpref.train.begun import Begun
from jaxpref.train.state import State

# Of a step and a state, with the prefix `eval/`. The function asks whether to stop, and then raises
# `interrupts.StoppedError`.
Evaluate = Callable[[int, State, Callable[[], bool]], dict[str, float]]
# Why some modes of the reference have no log-probs of what is sampled.
_WITHOUT_KL = {
    "free": "there is no reference, and eval/win_rate is against the first policy",
    "precomputed": "the reference's weights are not there after the first step",
}


def of_run_on_data(begun: Begun) -> Evaluate:
    """What is measured of responses that the policy of a run on data samples at evaluations."""
    config, prompts = begun.config, begun.data.prompts
    if prompts is None:
        return lambda step, state, stopping: {}
    mode, without = begun.reference.mode, _WITHOUT_KL.get(config.reference.mode)
    if without is not None:
        mode = reference_lib.Free()
        console.print(
            f"reference.mode is {config.reference.mode!r}, so eval/samples/kl is not measured: "
            f"{without}"
        )
    reward = None
    if config_lib.has_reward(config):
        reward = build_rewards(begun, prompts)
    elif config.data.format == "synthetic":
        function = rewards.from_function("the true reward", true_rewards)
        reward = rewards.Rewards({"true_reward": function}, {"true_reward": 1.0}, config.reward)
    else:
        console.print(
            "there is no eval/win_rate, since no reward says which response is better "
            "(reward.path, reward.function or reward.mixture)"
        )
    budget = experience.budget_of(config, begun.mesh, samples=1)
    parts = experience.SamplingParts(
        **shared_parts(begun, budget), mode=mode, rewards=reward, true_rewards=None
    )
    held_out = experience.HeldOut(parts, experience.Prompts(prompts, None), begun.workdir)
    against = _against_reference(begun, held_out)
    assert against is not None
    return lambda step, state, stopping: against(state, held_out.said(step, state, stopping))


def of_run_on_samples(begun: Begun, parts: experience.Parts) -> Evaluate:
    """What is measured of the responses to held-out prompts of a run that samples."""
    config, prompts = begun.config, begun.data.held_out
    if prompts is None:
        return lambda step, state, stopping: {}
    held_out = experience.HeldOut(parts, experience.Prompts(prompts, None), begun.workdir)
    against = _against_reference(begun, held_out)
    # These are measured once, before the first step, and not kept.
    others = _others(config, begun.opened.tokenizer, begun.mesh) if not begun.start else {}

    def evaluate(step: int, state: State, stopping: Callable[[], bool]) -> dict[str, float]:
        said = held_out.said(step, state, stopping)
        found = said.means("eval")
        if against is not None:
            found |= against(state, said)
        while others:
            name, other = others.popitem()
            found |= held_out.said_by(other, state).means(f"eval/{name}")
        return found

    return evaluate


def shared_parts(begun: Begun, budget: Budget) -> dict[str, Any]:
    """Those of `experience.SamplingParts` that every run which samples has in common."""
    config, decoder = begun.config, begun.opened.model
    return {
        "config": config,
        "decoder": decoder,
        "policy": models.packed(decoder, temperature=config.sampling.temperature),
        "frozen": begun.frozen,
        "reference": begun.reference.params,
        "tokenizer": begun.opened.tokenizer,
        "mesh": begun.mesh,
        "budget": budget,
    }


def build_rewards(begun: Begun, prompts: TokenizedDataset) -> rewards.Rewards:
    """The rewards that the config names, of responses to such prompts."""
    return rewards.build(
        begun.config.reward,
        begun.opened.tokenizer,
        max_length=begun.config.data.max_length,
        mesh=begun.mesh,
        conversations=any(isinstance(e.prompt, Chat) for e in prompts.examples),
    )


def _against_reference(
    begun: Begun, held_out: experience.HeldOut
) -> experience.AgainstReference | None:
    """What compares the policy's samples with the reference's, if that is asked for."""
    count = begun.config.eval.win_rate_prompts
    if not count:
        return None
    if len(held_out) < count:
        console.print(
            f"eval.win_rate_prompts is {count}, but {len(held_out)} held-out prompts can be "
            "answered; all of them are"
        )
    return experience.AgainstReference(
        held_out,
        count,
        begun.workdir,
        reference=None if begun.another is None else partial(_first_reference, begun),
        resuming=begun.start > 0,
    )


def _first_reference(begun: Begun) -> experience.Other:
    """Another policy as the reference, as it is before the first step."""
    assert begun.another is not None
    # One whose log-probs are precomputed has been there for that alone.
    params = begun.reference.params or begun.reference.moving
    return experience.Other(
        begun.another.model, params or begun.another.load(begun.mesh, "float32")
    )


def _others(config: ConfigDict, tokenizer: Any, mesh: Mesh) -> dict[str, experience.Other]:
    """The policies that this run is compared with, by the last part of their paths."""
    found = {}
    for path in config.sampling.compare:
        another = reference_lib.open_another(config, path, "sampling.compare", tokenizer)
        params = another.load(mesh, "float32")
        found[Path(path).name] = experience.Other(another.model, params)
    if len(found) < len(config.sampling.compare):
        raise UserError(
            f"sampling.compare names policies whose last part is the same: "
            f"{', '.join(config.sampling.compare)}; it is their name in the table."
        )
    return found
