"""A trained reward model: a run's workdir, or a sequence classifier in Hugging Face's layout."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from jaxpref import config as config_lib, data as data_lib, weights
from jaxpref.algorithms import response_scalars
from jaxpref.data import Example, columns
from jaxpref.errors import UserError
from jaxpref.models import Model, packed
from jaxpref.packing import Group, PackedBatch
from jaxpref.rewards.base import Reward, Sampled, shown
from jaxpref.rewards.scoring import Scorer
from jaxpref.terminal import console
from jaxpref.tokenizer import special_tokens
from jaxpref.workdir import AnyPath, as_path


class RewardModel(Scorer):
    """A reward model whose weights are still to be loaded."""

    def __init__(
        self,
        path: str | AnyPath,
        *,
        max_length: int = 0,
        at_least: int = 0,
        chat_template: str = "",
        mesh: Mesh | None = None,
    ):
        """Opens it, before any weights are read.

        Args:
          path: the workdir of a run of algorithm `reward`, or a Hugging Face directory or hub
            name with a sequence classifier that has one label.
          max_length: tokens of a prompt with a response; a prompt that has to be cut keeps half
            of them. 0: the run's own `data.max_length` and `data.max_prompt_length`; without a
            run `at_least`, or 1,024.
          at_least: tokens that a row has to have room for, if `max_length` is 0.
          chat_template: see `tokenizer.chat_template`; empty for its own.
          mesh: over which it is sharded; None for the one that its config says.

        Raises:
          UserError: there is no reward model.
        """
        trained = weights.config_of(as_path(path))
        config = _config(path, trained, max_length, at_least)
        super().__init__(path, config, max_length, chat_template, mesh)
        source, _, decoder = self.opened
        if trained is None and not source.has_scalar_head(decoder):
            raise UserError(
                f"{path}: has no scalar head ('score.weight'), so it is not a reward model."
            )
        self._rewards = jax.jit(rewards_of(packed(decoder)))

    def reads_ids(self, tokenizer: Any, conversations: bool) -> bool:
        """Whether it is given a policy's token ids as they are.

        That is so where `same_tokens` holds, unless the prompts are conversations and it has
        another chat template than the policy.
        """
        template = self.tokenizer.chat_template
        same = not conversations or not template or template == tokenizer.chat_template
        return same and same_tokens(tokenizer, self.tokenizer)

    def load(self, dtype: str = "float32") -> Any:
        """See `Scorer`."""
        return weights.load_finished(self.workdir, self.opened, self.mesh, dtype)

    def rewards(self, params: Any, batch: PackedBatch) -> Float[Array, "groups responses"]:
        """See `Scorer`."""
        return self._rewards(params, batch)


def rewards_of(model: Model) -> Callable[[Any, PackedBatch], Float[Array, "groups responses"]]:
    """A function of parameters and of a batch of one micro-batch: what its head says at the end."""

    def rewards(params: Any, batch: PackedBatch) -> Float[Array, "groups responses"]:
        whole = jax.tree.map(lambda x: x[0], batch)
        return response_scalars(model(params, whole), whole)

    return rewards


def same_tokens(policy: Any, other: Any) -> bool:
    """Whether another tokenizer gives every token of a policy's tokenizer the same meaning.

    That is: each token of the policy has the same id there, is special there if it is special
    here, and ends a response (EOS) in both or in neither. The other one may have tokens added to
    it, as a reward model's has that was exported with a padding token of its own, but not a larger
    vocabulary: with that it would read the same text as fewer and longer tokens.
    """
    vocabulary, special = other.get_vocab(), special_tokens(other)
    own = policy.get_vocab()
    return (
        policy.eos_token_id == other.eos_token_id
        and all(vocabulary.get(name) == id for name, id in own.items())
        and vocabulary.keys() - own.keys() <= other.get_added_vocab().keys()
        and all(special.get(name) == id for name, id in special_tokens(policy).items())
    )


def from_model(model: RewardModel, tokenizer: Any, *, rows: int, dtype: str = "float32") -> Reward:
    """The reward that a model gives, which is loaded here.

    It sees the very token ids that the policy has sampled where `RewardModel.reads_ids` says so.
    Otherwise it reads the texts with its own tokenizer: its own template, BOS, and after a
    response that came to its end its own end token.

    Args:
      model: opened.
      tokenizer: the policy's.
      rows: how many are scored at a time, at most.
      dtype: of the model's parameters.
    """
    params, told = model.load(dtype), Counter[str]()
    reads_ids = {kind: model.reads_ids(tokenizer, kind) for kind in (False, True)}

    def groups(sampled: Sampled) -> list[Group]:
        if reads_ids[sampled.conversations]:
            return _groups(sampled)
        check_template(model, tokenizer, sampled.conversations)
        dataset = data_lib.tokenize(
            list(_examples(sampled)),
            model.tokenizer,
            data_lib.limits_of(model.config, model.tokenizer),
            parse_special_tokens=model.config.tokenizer.parse_special_tokens,
        )
        _tell(model, dataset.counts, told)
        return [dataset.group(index) for index in range(len(dataset))]

    def reward(sampled: Sampled) -> Float[np.ndarray, " responses"]:
        return model.score(params, groups(sampled), rows=rows)

    return reward


def check_template(model: RewardModel, tokenizer: Any, conversations: bool) -> None:
    """Refuses a reward model that cannot read a policy's conversations.

    Args:
      model: opened.
      tokenizer: the policy's.
      conversations: whether any prompt is a list of messages.

    Raises:
      UserError: with the names of both tokenizers.
    """
    readable = model.tokenizer.chat_template or model.reads_ids(tokenizer, conversations)
    if conversations and not readable:
        raise UserError(
            f"{model.name}: the prompts are conversations. The reward model's tokenizer "
            f"({_named(model.tokenizer)}) is not the policy's ({_named(tokenizer)}) and has no "
            "chat template, so it cannot read them. Name a reward model with a chat template, or "
            "one that was trained with the policy's tokenizer."
        )


def _named(tokenizer: Any) -> str:
    name = tokenizer.name_or_path
    return f"{type(tokenizer).__name__}{f' of {name}' if name else ''}"


def _tell(model: RewardModel, counts: Counter[str], told: Counter[str]) -> None:
    """Says in the terminal, once for each, that texts are cut for the reward model."""
    for name in ("prompts_cut", "responses_cut"):
        if counts[name] and not told[name]:
            console.print(
                f"{model.name}: {counts[name]} {name.replace('_', ' ')} to fit its "
                f"{model.config.data.max_length} tokens (reward.max_length), which is said once"
            )
        told[name] += counts[name]


def _groups(sampled: Sampled) -> list[Group]:
    """The token ids; responses to one prompt that follow each other share it."""
    return [
        Group(sampled.prompt_ids[run[0]], [sampled.response_ids[row] for row in run])
        for run in _runs(sampled, lambda row: sampled.prompt_ids[row].tobytes())
    ]


def _examples(sampled: Sampled) -> Iterator[Example]:
    """The texts; responses to one prompt that follow each other share it."""
    records: Sequence[Mapping] = sampled.records or [{}] * len(sampled.responses)
    for run in _runs(sampled, lambda row: (sampled.prompts[row], records[row])):
        prompt, where = sampled.prompts[run[0]], f"the prompt {shown(sampled.prompts[run[0]])}"
        yield Example(
            prompt
            if isinstance(prompt, str)
            else columns.chat(records[run[0]], list(prompt), where),
            tuple(sampled.responses[row] for row in run),
            where=where,
            finished=tuple(bool(sampled.finished[row]) for row in run),
        )


def _runs(sampled: Sampled, key: Callable[[int], Any]) -> Iterator[list[int]]:
    """The responses that follow each other and have one key."""
    for _, run in groupby(range(len(sampled.responses)), key):
        yield list(run)


def _config(
    path: str | AnyPath, trained: ConfigDict | None, max_length: int, at_least: int
) -> ConfigDict:
    """The config of a reward model's run, or one for a classifier, with room for the texts."""
    if trained is None:
        config = config_lib.default("reward")
        config.model.init_from = str(path)
        config.data.max_length = at_least or 1024
        config.data.max_prompt_length = config.data.max_length // 2
        return config
    if trained.algorithm.name != "reward":
        raise UserError(f"{path}: is a run of {trained.algorithm.name}, not of a reward model.")
    if at_least > trained.data.max_length and not max_length:
        trained.data.max_length = at_least
        trained.data.row_length = 0
    return trained
