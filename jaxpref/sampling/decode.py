"""The compiled part of generation: prompts are read, then one token after another is sampled."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from jaxpref import models, sharding
from jaxpref.models import Cache, Decoder
from jaxpref.sampling.distribution import Sampling, draw, truncated


class Rows(NamedTuple):
    """What is being decoded: P prompts with K samples each.

    Attributes:
      cache: keys and values.
      keys: of the prompts' random numbers.
      prompt_lengths: tokens of each prompt.
      tokens: sampled so far; 0 after.
      logps: see `Generated`.
      sampled_logps: see `Generated`.
      lengths: tokens sampled so far.
      stopped: whether a stop token was among them; True as well where there is no prompt.
    """

    cache: Cache
    keys: Key[Array, " P"]
    prompt_lengths: Int[Array, " P"]
    tokens: Int[Array, "P K new"]
    logps: Float[Array, "P K new"]
    sampled_logps: Float[Array, "P K new"]
    lengths: Int[Array, "P K"]
    stopped: Bool[Array, "P K"]


def placed(rows: Rows, put: Callable[[Any, tuple[str, ...]], Any]) -> Rows:
    """The rows with every array put somewhere by the names of its axes, see `jaxpref.sharding`.

    Prompts lie along the mesh as rows of a batch do, and what is remembered of a head where the
    head is.

    Args:
      rows: arrays, or their shapes.
      put: from an array and the names to what takes its place.
    """

    def by(*names: str) -> Callable[[Any], Any]:
        return lambda x: put(x, (*names, *("length",) * x.ndim)[: x.ndim])

    whole = jax.tree.map(by("rows"), rows._replace(cache=rows.cache._replace(layers=())))
    of_prompt, of_branch = by("rows", "kv_heads"), by("rows", "length", "kv_heads")
    layers = tuple(
        held._replace(
            prompt_keys=of_prompt(held.prompt_keys),
            prompt_values=of_prompt(held.prompt_values),
            keys=of_branch(held.keys),
            values=of_branch(held.values),
        )
        for held in rows.cache.layers
    )
    return whole._replace(cache=whole.cache._replace(layers=layers))


def _in_place(rows: Rows) -> Rows:
    """The same, each array where it belongs; of empty rooms XLA would give all to every device."""

    def put(x: Array, names: tuple[str, ...]) -> Array:
        spec = sharding.spec_of(names, x.shape)
        return x if spec is None else jax.lax.with_sharding_constraint(x, spec)

    return placed(rows, put)


def done(rows: Rows) -> Bool[Array, "P K"]:
    """Which responses have ended, by a stop token or by their length."""
    return rows.stopped | (rows.lengths >= rows.tokens.shape[-1])


def _said(settings: Sampling, logits: Array, rows: Rows) -> Rows:
    """One more token in every sample that is not done, from its logits `[P, K, vocabulary]`."""
    temperatures = settings.temperatures
    warm = jnp.asarray([t or 1.0 for t in temperatures], logits.dtype)
    plain = settings.plain
    cut = logits if plain else logits / warm[None, :, None]
    cut = truncated(cut, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p)

    def key_of(key: Array, sample: Array, place: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, sample), place)

    of_samples = jax.vmap(key_of, (None, 0, 0))
    keys = jax.vmap(of_samples, (0, None, 0))(rows.keys, jnp.arange(settings.samples), rows.lengths)
    token, sampled = jax.vmap(jax.vmap(draw))(keys, cut)
    if 0 in temperatures:
        greedy = jnp.asarray([t == 0 for t in temperatures])[None]
        token = jnp.where(greedy, jnp.argmax(logits, axis=-1).astype(jnp.int32), token)
        sampled = jnp.where(greedy, 0, sampled)
    logp = sampled
    if not plain:
        of_token = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        logp = of_token - jax.nn.logsumexp(logits, axis=-1)
    goes_on = ~done(rows)
    places = jnp.arange(rows.tokens.shape[-1])[None, None]
    here = (places == rows.lengths[..., None]) & goes_on[..., None]
    stops = jnp.isin(token, jnp.asarray(settings.stops, jnp.int32)) if settings.stops else False

    def noted(values: Array, new: Array) -> Array:
        return jnp.where(here, new[..., None].astype(values.dtype), values)

    return rows._replace(
        tokens=noted(rows.tokens, token),
        logps=noted(rows.logps, logp),
        sampled_logps=noted(rows.sampled_logps, sampled),
        lengths=rows.lengths + goes_on,
        stopped=rows.stopped | (goes_on & stops),
    )


def _logits(model: Decoder, weights: Any, hidden: Array) -> Array:
    return model.apply({"params": weights}, method="lm_head").logits(hidden)


@partial(jax.jit, static_argnums=(0, 1, 2))
def begin(
    model: Decoder,
    settings: Sampling,
    slots: int,
    weights: Any,
    tokens: Int[Array, "P length"],
    lengths: Int[Array, " P"],
    key_data: UInt[Array, "P words"],
    table: models.Angles | None,
) -> Rows:
    """Reads prompts, padded on the right, and samples the first token of each response.

    The last argument is of `models.rotary_table` for all positions, here and in what follows.
    """
    prompts, length = tokens.shape
    # A row without a prompt reads its padding, since a softmax needs something to look at.
    real = jnp.arange(length)[None] < jnp.maximum(lengths, 1)[:, None]
    hidden, kept = model.apply({"params": weights}, tokens, real, table, method="prefill")
    cache = models.branch(kept, real, settings.samples, slots, settings.cache_dtype)
    logits = _logits(model, weights, hidden)
    shape = (prompts, settings.samples)
    nothing = jnp.zeros((*shape, settings.max_new_tokens), logits.dtype)
    rows = Rows(
        cache,
        jax.random.wrap_key_data(key_data),
        lengths,
        nothing.astype(jnp.int32),
        nothing,
        nothing,
        jnp.zeros(shape, jnp.int32),
        jnp.broadcast_to((lengths == 0)[:, None], shape),
    )
    logits = jnp.broadcast_to(logits[:, None], (*shape, logits.shape[-1]))
    return _in_place(_said(settings, logits, rows))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(
    model: Decoder,
    settings: Sampling,
    weights: Any,
    rows: Rows,
    groups: Int[Array, ""],
    until: Int[Array, ""],
    table: models.Angles | None,
) -> Rows:
    """Samples until so many prompts have all of their responses, or so many tokens were written.

    The slots of branches are a ring that goes round and round: to write more than they have room
    for is right where no response is longer.
    """

    def step(rows: Rows) -> Rows:
        last = jnp.maximum(rows.lengths - 1, 0)
        token = jnp.take_along_axis(rows.tokens, last[..., None], axis=-1)[..., 0]
        positions = rows.prompt_lengths[:, None] + last
        hidden, cache = model.apply(
            {"params": weights}, token, positions, rows.cache, table, method="step"
        )
        return _said(settings, _logits(model, weights, hidden), rows._replace(cache=cache))

    def goes_on(rows: Rows) -> Array:
        return (_ended(rows) < groups) & (rows.cache.places.used < until)

    return _in_place(jax.lax.while_loop(goes_on, step, rows))


@jax.jit
def progress(rows: Rows) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How many tokens were written into each branch, and how many prompts have all responses."""
    return rows.cache.places.used, _ended(rows)


def _ended(rows: Rows) -> Int[Array, ""]:
    return done(rows).all(axis=1).sum()


def widen(rows: Rows, slots: int) -> Rows:
    """Gives branches room for `slots` tokens."""
    # Compiled as a whole this would copy what is held of the prompts, too.
    return rows._replace(cache=models.widened(rows.cache, slots))


def own(rows: Rows) -> Any:
    """What `widen` makes anew: that of the branches."""
    held = [(layer.keys, layer.values) for layer in rows.cache.layers]
    return held, rows.cache.places.own


@partial(jax.jit, donate_argnums=0)
def seat(rows: Rows, new: Rows, seats: Int[Array, " new"]) -> Rows:
    """Puts other prompts into the seats of those that are done."""
    used = rows.cache.places.used
    put = jax.tree.map(lambda old, x: old.at[seats].set(x) if x.ndim else old, rows, new)
    put = put._replace(cache=put.cache._replace(places=put.cache.places._replace(used=used)))
    return _in_place(put)
