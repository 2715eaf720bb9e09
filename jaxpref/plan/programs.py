"""The programs that a run compiles, from shapes alone: no array is made, no weights are read."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import (
    config as config_lib,
    data as data_lib,
    experience,
    models,
    reference as reference_lib,
    sharding,
    weights,
)
from jaxpref.checkpoint import CRITIC
from jaxpref.models import Decoder
from jaxpref.packing import Budget, Group, PackedBatch
from jaxpref.reference.modes import COLUMN
from jaxpref.sampling import calls_of
from jaxpref.train import Layout, lay_out
from jaxpref.train.state import POLICY
from jaxpref.trainable import as_abstract, merge, store_frozen

# A run that has not begun has no workdir.
_NOWHERE = Path("there is no workdir")
# Modes in which a step asks a reference's model.
_ASKED = ("live", "adapter", "synced")


class Work(NamedTuple):
    """What a call of a program computes with, over all devices.

    Attributes:
      tokens: that go through a model, padding among them.
      scored: of them, those that meet the LM head, or may.
      length: of the rows that they lie in; 0 where there are none.
      trips: of the loop that is told when to end, each with its share of the tokens; None for none.
    """

    tokens: int
    scored: int
    length: int
    trips: int | None


class Program(NamedTuple):
    """A function that a run compiles.

    Attributes:
      name: of the function.
      function: jitted.
      inputs: of it, as shapes with shardings; static ones among them.
      held: what devices hold while it is run, by what that is: shapes, too.
      calls: how often a step calls it.
      work: what a call computes with.
      passes: times that a token goes forward through a model, with its parameters (shapes), and
        twice as often backward if that is trained: (parameters, trained).
      rules: under which it is traced.
      copied: what devices hold, too, until its inputs are made of that: shapes.
    """

    name: str
    function: Any
    inputs: tuple[Any, ...]
    held: Mapping[str, Any]
    calls: int
    work: Work
    passes: tuple[tuple[Any, bool], ...]
    rules: sharding.Rules = sharding.RULES
    copied: Any = ()


class Planned(NamedTuple):
    """A run as it would be.

    Attributes:
      layout: its shapes.
      programs: what it compiles.
      examples: of a step, such as pairs.
      fill: share of the batch's tokens that are no padding.
      data: what the batch was made from.
      sampling: names of those of the programs that sample.
      sampled: tokens that a step samples, if no response ends early.
      rows: of a micro-batch, over all devices; 0 where a batch is taken whole.
    """

    layout: Layout
    programs: tuple[Program, ...]
    examples: int
    fill: float
    data: str
    sampling: tuple[str, ...] = ()
    sampled: int = 0
    rows: int = 0

    @property
    def decoder(self) -> Decoder:
        """The policy's model."""
        return self.layout.opened.model


def plan_run(config: ConfigDict, mesh: Mesh, rows: int = 0) -> Planned:
    """What a run with this config compiles on a mesh.

    Args:
      config: a checked config.
      mesh: of devices that need not be here.
      rows: full rows a device, in place of what the data need; 0: this. A step then has as many
        examples, one of which fills a row.

    Raises:
      UserError: the run could not begin.
    """
    platform = mesh.devices.flat[0].platform
    opened = weights.open_first(config, platform)
    another = reference_lib.find_another(config, _NOWHERE, opened.model, opened.tokenizer)
    # How long the learning rate takes changes nothing of a program.
    layout = lay_out(config, opened, mesh, config.train.steps or 1000)
    stored = store_frozen(layout.frozen, config.model.frozen_dtype, convert=as_abstract)
    mode, held = reference_lib.abstract(
        reference_lib.Start(
            config=config,
            workdir=_NOWHERE,
            mesh=mesh,
            decoder=opened.model,
            another=another,
            policy=layout.state.policy,
            frozen=stored,
            resuming=False,
        )
    )
    shares = {
        "policy": layout.state.roles[POLICY].params,
        "optimizer": layout.state.roles[POLICY].optimizer_state,
        "reference": (held, layout.state.reference),
        "frozen": stored,
    }
    if layout.online is not None:
        return _online(layout, mode, held, stored, shares, rows)
    of = _small(config) if rows else config
    data = data_lib.load(of, opened.tokenizer, config_lib.data_kind(config))
    given = data_lib.stream_of(of, data, "train", mesh, training=True).batch(0)
    batch = sharding.abstract_batch(mesh, _as_given(config, given, mesh, rows))
    update, policy = layout.policy_update(mode), merge(layout.state.policy, stored)
    examples = batch.lengths.shape[1] if rows else config.data.batch_size
    passes: tuple[tuple[Any, bool], ...] = ((policy, True),)
    if layout.algorithm.reference_logps is not None and config.reference.mode in _ASKED:
        passes += ((layout.state.reference if mode.moves else merge(stored, held), False),)
    inputs = (layout.state, stored, held, batch)
    count, fill = (1, 1.0) if rows else _filled(given)
    held_then = {**shares, "batch": batch}
    program = Program("update", update, inputs, held_then, 1, _work(batch, count), passes)
    what = f"{rows} full row{'s' * (rows > 1)} a device" if rows else "the first batch of the data"
    whole = config_lib.method_of(config.algorithm.name).compares_examples and not config.data.rows
    of_data = 0 if rows or whole else batch.tokens.shape[1]
    return Planned(layout, (program,), examples, fill, what, rows=of_data)


def _small(config: ConfigDict) -> ConfigDict:
    """A config of few generated examples, whose batches have the right parts."""
    small = config.copy_and_resolve_references()
    small.data.format, small.data.synthetic_pairs = "synthetic", 64
    small.data.path = ""
    small.data.batch_size = 4
    return small


def _as_given(config: ConfigDict, batch: PackedBatch, mesh: Mesh, rows: int) -> PackedBatch:
    """A batch as an update is given it, or one with the same parts and as many full rows."""
    extras: dict[str, Any] = dict(batch.extras)
    if config.reference.mode == "precomputed":
        extras[COLUMN] = np.zeros(batch.lengths.shape, np.float32)
    batch = dataclasses.replace(batch, extras=extras)
    if not rows:
        return batch
    length = config.data.row_length or config.data.max_length
    scored = config.data.scored_length or length
    # As large as it may be with a single micro-batch, see `packing.fixed_shape`.
    count = rows * sharding.batch_shards(mesh)

    def of_rows(name: str, x: Any) -> jax.ShapeDtypeStruct:
        width = length if name in ("tokens", "positions", "group", "branch") else scored
        return jax.ShapeDtypeStruct((1, count, width), x.dtype)

    by_row: dict[str, Any] = {
        name: of_rows(name, getattr(batch, name)) for name in sharding.ROW_FIELDS
    }
    tables: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((1, count, *x.shape[2:]), x.dtype)
        for name, x in {"lengths": batch.lengths, **extras}.items()
    }
    return dataclasses.replace(
        batch,
        **by_row,
        lengths=tables.pop("lengths"),
        extras=tables,
        shards=sharding.batch_shards(mesh),
        aligned=models.alignment(config, mesh),
    )


def _online(
    layout: Layout, mode: Any, held: Any, stored: Any, shares: dict[str, Any], rows: int
) -> Planned:
    """A run on what the policy samples: what samples, what looks at responses, the updates."""
    config, mesh, online = layout.config, layout.mesh, layout.online
    assert online is not None
    critic = layout.critic
    critic_frozen = {} if critic is None else critic.frozen(stored)
    whole = merge(layout.state.policy, stored)
    own = layout.state.reference if mode.moves else held
    asked = experience.Asked(whole, stored, own)
    if critic is not None:
        values = merge(layout.state.roles[CRITIC].params, critic_frozen)
        asked = asked._replace(critic=values)
        shares |= {
            "critic": layout.state.roles[CRITIC].params,
            "critic's optimizer": layout.state.roles[CRITIC].optimizer_state,
        }
    look = experience.make_look(layout.policy, mode, None if critic is None else critic.model)
    packed = _longest(layout, rows)
    plain = sharding.abstract_batch(mesh, packed)
    batch = experience.abstract_batch(online, look, asked, packed, mesh)
    read: tuple[tuple[Any, bool], ...] = ()
    if config.reference.mode in _ASKED:
        read = ((own if mode.moves else merge(stored, own), False),)
    updates, (count, fill) = online.epochs * online.minibatches, _filled(packed)
    work = _work(plain, count)
    sampling, sampled = _sampling(layout, whole, shares)
    programs = [*sampling]
    if online.learned is not None:
        passes = ((whole, False), *read, *(((asked.critic, False),) if critic else ()))
        of_look = {**shares, "batch": plain}
        calls = online.minibatches
        programs.append(Program("look", look, (asked, plain), of_look, calls, work, passes))
    of_updates = {**shares, "batch": batch}
    inputs = (layout.state, stored, held, batch)
    passes = ((whole, True), *(read if layout.algorithm.reference_logps is not None else ()))
    update = layout.policy_update(mode)
    programs.append(Program("update", update, inputs, of_updates, updates, work, passes))
    if (of_critic := layout.critic_update()) is not None:
        inputs = (layout.state, critic_frozen, {}, batch)
        passes = ((asked.critic, True),)
        programs.append(
            Program("critic's update", of_critic, inputs, of_updates, updates, work, passes)
        )
    examples = config.data.batch_size * config.sampling.samples
    what, named = "the longest prompts and responses", tuple(program.name for program in sampling)
    of_data = 0 if rows else packed.tokens.shape[1]
    return Planned(layout, tuple(programs), examples, fill, what, named, sampled, of_data)


def _sampling(layout: Layout, policy: Any, shares: dict[str, Any]) -> tuple[list[Program], int]:
    """What samples for the longest prompts until no response may be longer, and how many tokens.

    Args:
      layout: of the run.
      policy: shapes of all of its parameters.
      shares: what devices hold at all times.
    """
    config, online = layout.config, layout.online
    assert online is not None
    longest = config.data.max_prompt_length
    sampler = experience.make_sampler(
        config,
        layout.opened.tokenizer,
        layout.mesh,
        layout.opened.model,
        longest,
        greedy=online.greedy,
        samples=config.sampling.samples,
    )
    programs = [
        Program(
            call.name,
            call.function,
            call.inputs,
            {**shares, "copy of the policy": call.weights, "cache": call.rows},
            call.times,
            Work(call.tokens, call.scored, call.length, call.trips),
            ((call.weights, False),),
            sharding.GENERATION_RULES,
            call.copied,
        )
        for call in calls_of(sampler, policy, config.data.batch_size, longest)
    ]
    responses = config.data.batch_size * sampler.settings.samples
    return programs, responses * sampler.settings.max_new_tokens


def _longest(layout: Layout, rows: int) -> PackedBatch:
    """A batch of the longest prompts with the longest responses, as they are packed."""
    config, online = layout.config, layout.online
    assert online is not None
    samples = config.sampling.samples
    budget: Budget = experience.budget_of(
        config, layout.mesh, samples=samples, scored_length=config.data.scored_length
    )
    if rows:
        config = config.copy_and_resolve_references()
        config.data.rows = rows * budget.shards
    trained = len(online.choose(np.arange(2.0))) if online.choose else samples
    size = config.data.batch_size // online.minibatches
    prompt = np.zeros(config.data.max_prompt_length, np.int32)
    response = np.zeros(config_lib.max_new_tokens(config), np.int32)
    groups = [Group(prompt, [response] * trained)] * size
    return experience.Packer(config, budget)(groups, batch_size=size, responses=trained)


def _filled(batch: PackedBatch) -> tuple[int, float]:
    """How many micro-batches hold anything, and the share of their tokens that are no padding."""
    real = np.asarray(batch.group) > 0
    holds = real.any(axis=(1, 2))
    return int(holds.sum()), float(real[holds].mean())


def _work(batch: PackedBatch, micro_batches: int) -> Work:
    """What it is to read so many micro-batches of a batch."""
    rows, length = batch.tokens.shape[1:]
    scored = micro_batches * math.prod(batch.target.shape[1:])
    return Work(micro_batches * rows * length, scored, length, micro_batches)


def bytes_of(tree: Any) -> int:
    """Bytes that a device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
