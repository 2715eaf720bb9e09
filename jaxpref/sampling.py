"""Generation: what a policy says to prompts, sampled token by token on the tree.

A prompt is read once for all of its samples (see `jaxpref.models.cache`). Every random number is a
function of the prompt's key, the number of the sample and the place of the token, so that a
sample does not depend on what else is decoded beside it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from jaxpref import models, sharding
from jaxpref.models import Cache, Decoder

# Tokens whose probabilities are added up before one of them is drawn.
_BLOCK = 128
# Prompts are padded to a multiple of this, so that few lengths are compiled.
_PROMPT_STEP = 64
# Branches begin with room for so many tokens, or all; growing to more is another loop to compile.
_FIRST_SLOTS = 32
# Rooms of more tokens than this are multiples of it, which CPUs read faster.
_SLOT_STEP = 16


class Sampling(NamedTuple):
    """How responses are sampled.

    Attributes:
      samples: responses to each prompt.
      max_new_tokens: a response is cut after so many tokens.
      stops: a response ends with the first of these tokens, which belongs to it.
      temperature: what logits are divided by, for each sample, or one for all; 0 takes the most
        probable token.
      top_k: only so many tokens, the most probable ones, may be drawn; 0 for all.
      top_p: only the most probable tokens that together reach this probability may be drawn
        (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751); 1 for all.
      min_p: only tokens at least this share as probable as the most probable one may be drawn
        (Nguyen et al. 2024, arXiv 2407.01082); 0 for all.
      cache_dtype: of the keys and values that are remembered; None for the compute dtype.
    """

    samples: int = 1
    max_new_tokens: int = 128
    stops: tuple[int, ...] = ()
    temperature: float | tuple[float, ...] = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    cache_dtype: str | None = None

    @property
    def temperatures(self) -> tuple[float, ...]:
        """One for each sample."""
        given = self.temperature
        return given if isinstance(given, tuple) else (given,) * self.samples

    def check(self) -> None:
        """Refuses what cannot be sampled.

        Raises:
          ValueError: naming the field.
        """
        for name, fits, need in (
            ("samples", self.samples >= 1, "at least 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", all(0 <= t < np.inf for t in self.temperatures), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not fits:
                raise ValueError(f"{name} should be {need}; got {getattr(self, name)}.")
        if len(self.temperatures) != self.samples:
            raise ValueError(
                f"temperature should be one for all samples, or one for each of {self.samples}; "
                f"got {self.temperature}."
            )


class Generated(NamedTuple):
    """What was said to prompts, as NumPy arrays.

    Attributes:
      tokens: ids; 0 after a response's end.
      lengths: tokens of each response, the stop token among them; at least 1.
      stopped: whether a response ended with a stop token; else it was cut.
      logps: of each token under the policy, at temperature 1 and without truncation, in nats; 0
        after a response's end.
      sampled_logps: of each token under the distribution that it was drawn from; for a greedy
        sample 0.
    """

    tokens: Int[np.ndarray, "prompts samples new"]
    lengths: Int[np.ndarray, "prompts samples"]
    stopped: Bool[np.ndarray, "prompts samples"]
    logps: Float[np.ndarray, "prompts samples new"]
    sampled_logps: Float[np.ndarray, "prompts samples new"]

    def responses(self, prompt: int) -> list[Int[np.ndarray, " _"]]:
        """The token ids of each response to a prompt."""
        return [
            row[:length]
            for row, length in zip(self.tokens[prompt], self.lengths[prompt], strict=True)
        ]


def truncated(
    logits: Float[Array, "*rows vocabulary"],
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Float[Array, "*rows vocabulary"]:
    """Logits with -infinity for what may not be drawn; see `Sampling`.

    The three are applied in this order, each to what the one before has left. Tokens as probable
    as the last one that is kept are kept too, so that the result does not depend on their order.

    >>> print(truncated(jnp.log(jnp.array([0.5, 0.3, 0.2])), top_p=0.6))
    [-0.6931472 -1.2039728       -inf]
    """
    if 0 < top_k < logits.shape[-1]:
        logits = _keep_most(logits, jnp.ones_like(logits), jnp.asarray(top_k, logits.dtype))
    if top_p < 1:
        probabilities = jax.nn.softmax(logits, axis=-1)
        logits = _keep_most(logits, probabilities, jnp.asarray(top_p, logits.dtype))
    if min_p > 0:
        least = logits.max(axis=-1, keepdims=True) + np.log(min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def _keep_most(logits: Array, weights: Array, enough: Array) -> Array:
    """Keeps the highest logits whose weights reach `enough`.

    The lowest logit that is kept is found bit by bit, which on most devices is much faster than
    to sort a vocabulary.
    """
    bits = 8 * logits.dtype.itemsize
    unsigned = jnp.dtype(f"uint{bits}")
    raw = jax.lax.bitcast_convert_type(logits, unsigned)
    highest = jnp.asarray(1 << (bits - 1), unsigned)
    # As unsigned numbers these are in the order of the floating-point numbers.
    rank = jnp.where(raw >= highest, ~raw, raw | highest)

    def step(i: Array, least: UInt[Array, "*rows 1"]) -> UInt[Array, "*rows 1"]:
        higher = least | (highest >> i.astype(unsigned))
        reached = jnp.where(rank >= higher, weights, 0).sum(-1, keepdims=True)
        return jnp.where(reached >= enough, higher, least)

    least = jax.lax.fori_loop(0, bits, step, jnp.zeros((*logits.shape[:-1], 1), unsigned))
    return jnp.where(rank >= least, logits, -jnp.inf)


def draw(
    key: Key[Array, ""], logits: Float[Array, " vocabulary"]
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Draws a token from the softmax of logits, and gives its log-probability in nats.

    A block of the vocabulary is drawn first, by its share of the probability, then a token of the
    block, each as the highest of logits with Gumbel noise. The distribution is that of noise on
    every logit, for a small part of the random numbers.
    """
    vocabulary = logits.shape[0]
    padded = jnp.pad(logits, (0, -vocabulary % _BLOCK), constant_values=-jnp.inf)
    blocks = padded.reshape(-1, _BLOCK)
    shares = jax.nn.logsumexp(blocks, axis=1)
    noise = jax.random.gumbel(key, (len(blocks) + _BLOCK,), logits.dtype)
    block = jnp.argmax(shares + noise[: len(blocks)])
    within = jnp.argmax(blocks[block] + noise[len(blocks) :])
    logp = blocks[block, within] - jax.nn.logsumexp(shares)
    return (block * _BLOCK + within).astype(jnp.int32), logp


def prompt_keys(seed: int, step: int, prompts: int) -> Key[Array, " prompts"]:
    """The keys of a step's prompts."""
    of_step = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(partial(jax.random.fold_in, of_step))(jnp.arange(prompts))


class _Rows(NamedTuple):
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


def _done(rows: _Rows) -> Bool[Array, "P K"]:
    return rows.stopped | (rows.lengths >= rows.tokens.shape[-1])


def _said(settings: Sampling, logits: Array, rows: _Rows) -> _Rows:
    """One more token in every sample that is not done, from its logits `[P, K, vocabulary]`."""
    temperatures = settings.temperatures
    warm = jnp.asarray([t or 1.0 for t in temperatures], logits.dtype)
    # Then what is drawn from is the policy itself.
    usual = all(t == 1 for t in temperatures) and settings[4:7] == Sampling()[4:7]
    cut = logits if usual else logits / warm[None, :, None]
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
    if not usual:
        of_token = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        logp = of_token - jax.nn.logsumexp(logits, axis=-1)
    goes_on = ~_done(rows)
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
def _begin(
    model: Decoder,
    settings: Sampling,
    slots: int,
    weights: Any,
    tokens: Int[Array, "P length"],
    lengths: Int[Array, " P"],
    key_data: UInt[Array, "P words"],
) -> _Rows:
    """Reads prompts, padded on the right, and samples the first token of each response."""
    prompts, length = tokens.shape
    # A row without a prompt reads its padding, since a softmax needs something to look at.
    real = jnp.arange(length)[None] < jnp.maximum(lengths, 1)[:, None]
    hidden, kept = model.apply({"params": weights}, tokens, real, method="prefill")
    cache = models.branch(kept, real, settings.samples, slots, settings.cache_dtype)
    logits = _logits(model, weights, hidden)
    shape = (prompts, settings.samples)
    nothing = jnp.zeros((*shape, settings.max_new_tokens), logits.dtype)
    rows = _Rows(
        cache,
        jax.random.wrap_key_data(key_data),
        lengths,
        nothing.astype(jnp.int32),
        nothing,
        nothing,
        jnp.zeros(shape, jnp.int32),
        jnp.broadcast_to((lengths == 0)[:, None], shape),
    )
    return _said(settings, jnp.broadcast_to(logits[:, None], (*shape, logits.shape[-1])), rows)


def _decode(
    model: Decoder,
    settings: Sampling,
    sizes: tuple[int, ...],
    weights: Any,
    rows: _Rows,
    groups: Int[Array, ""],
) -> _Rows:
    """Samples until so many prompts have all of their responses.

    The branches have room for `sizes[0]` tokens at first, which grows, so that the first tokens
    are not paid for by reading empty slots. The last size is a ring that goes round and round.
    """

    def step(rows: _Rows) -> _Rows:
        last = jnp.maximum(rows.lengths - 1, 0)
        token = jnp.take_along_axis(rows.tokens, last[..., None], axis=-1)[..., 0]
        positions = rows.prompt_lengths[:, None] + last
        hidden, cache = model.apply(
            {"params": weights}, token, positions, rows.cache, method="step"
        )
        return _said(settings, _logits(model, weights, hidden), rows._replace(cache=cache))

    for size in sizes:
        rows = rows._replace(cache=models.widened(rows.cache, size))

        def goes_on(rows: _Rows, size: int = size) -> Array:
            more = _done(rows).all(axis=1).sum() < groups
            return more if size == sizes[-1] else more & (rows.cache.places.used < size)

        rows = jax.lax.while_loop(goes_on, step, rows)
    return rows


# Room that grows leaves buffers of the old size, which no result can take over.
_decode_growing = jax.jit(_decode, static_argnums=(0, 1, 2))
_decode_ring = jax.jit(_decode, static_argnums=(0, 1, 2), donate_argnums=4)


@partial(jax.jit, donate_argnums=0)
def _seat(rows: _Rows, new: _Rows, seats: Int[Array, " new"]) -> _Rows:
    """Puts other prompts into the seats of those that are done."""
    used = rows.cache.places.used
    put = jax.tree.map(lambda old, x: old.at[seats].set(x) if x.ndim else old, rows, new)
    return put._replace(cache=put.cache._replace(places=put.cache.places._replace(used=used)))


@partial(jax.jit, static_argnums=(0, 1))
def _prepared(model: Decoder, mesh: Mesh | None, params: Any) -> Any:
    """See `Sampler.prepare`."""
    dtype = jnp.dtype(model.config.dtype)
    base, merged = models.merge_adapters(model, params)
    unrolled, weights = models.unroll(base, models.dequantize(merged))
    # Norms stay as they are: they are computed in float32.
    weights = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, weights)
    if mesh is None:
        return weights
    boxed = jax.eval_shape(lambda: models.init_params(unrolled, jax.random.key(0), boxed=True))
    places = sharding.shardings(mesh, boxed, sharding.GENERATION_RULES)
    return jax.lax.with_sharding_constraint(weights, places)


class Sampler:
    """Samples from one model by the same settings, again and again."""

    def __init__(
        self,
        model: Decoder,
        settings: Sampling,
        *,
        mesh: Mesh | None = None,
        at_once: int = 0,
        prompt_length: int = 0,
    ):
        """Prepares what does not depend on the parameters.

        Args:
          model: a language model.
          settings: how to sample.
          mesh: over which prompts are split; None for one device.
          at_once: prompts that are decoded together; others wait until some are done. 0: all.
          prompt_length: what prompts are padded to, at least; with a bound of their lengths here
            they are compiled for once.

        Raises:
          ValueError: the settings cannot be used, or the model has no LM head.
        """
        settings.check()
        if model.config.scalar_head:
            raise ValueError("a model with a scalar head gives no words to sample from.")
        self.settings = settings
        self._mesh, self._at_once, self._prompt_length = mesh, at_once, prompt_length
        self._given = model
        base = models.without_adapters(model)
        self._model = Decoder(base.config, unrolled=True)

    def prepare(self, params: Any) -> Any:
        """The parameters as decoding takes them: adapters merged, in the compute dtype.

        They are a copy, whole on every device but for what `mesh.tensor` splits: from parts along
        their width they would be gathered anew for every token.
        """
        return _prepared(self._given, self._mesh, params)

    def __call__(
        self, weights: Any, prompts: Sequence[Int[np.ndarray, " _"]], keys: Key[Array, " prompts"]
    ) -> Generated:
        """Samples responses.

        Args:
          weights: from `prepare`.
          prompts: token ids of each, at least one.
          keys: of each prompt's random numbers, see `prompt_keys`.

        Raises:
          ValueError: there are no prompts, or not as many keys; a prompt is empty, has ids that
            the model does not know, or is so long that a response would leave its positions.
        """
        numbers, said = zip(*self.as_they_end(weights, prompts, keys), strict=True)
        order = np.argsort(np.concatenate(numbers))
        return Generated(*(np.concatenate(parts)[order] for parts in zip(*said, strict=True)))

    def as_they_end(
        self, weights: Any, prompts: Sequence[Int[np.ndarray, " _"]], keys: Key[Array, " prompts"]
    ) -> Iterator[tuple[list[int], Generated]]:
        """The same, as soon as all samples of some prompts have ended.

        Yields:
          The numbers of these prompts, and what was said to them.
        """
        if len(prompts) != len(keys) or not len(prompts):
            raise ValueError(f"expected a key a prompt; got {len(keys)} for {len(prompts)}.")
        self._check(prompts)
        longest = max(map(len, prompts))
        if longest > (length := self._prompt_length):
            length = -(-longest // _PROMPT_STEP) * _PROMPT_STEP
        shards = 1 if self._mesh is None else sharding.batch_shards(self._mesh)
        at_once = min(self._at_once or len(prompts), len(prompts))
        seats = -(-at_once // shards) * shards
        begin = partial(self._begin, weights, prompts, keys, length)
        slots = _room(self.settings.max_new_tokens - 1)
        if seats < len(prompts):
            yield from self._in_turn(weights, begin, len(prompts), seats, slots)
            return
        first = min(_room(max(slots // 4, _FIRST_SLOTS)), slots)
        sizes = tuple(sorted({first, max(_room(slots // 2), first), slots}))
        with self._in_mesh():
            rows = begin(range(len(prompts)), seats, sizes[0])
            settings = self.settings
            rows = _decode_growing(self._model, settings, sizes, weights, rows, jnp.asarray(seats))
        yield list(range(len(prompts))), _fetched(rows, range(len(prompts)))

    def _in_mesh(self) -> AbstractContextManager[None]:
        if self._mesh is None:
            return nullcontext()
        return sharding.use(self._mesh, sharding.GENERATION_RULES)

    def _check(self, prompts: Sequence[np.ndarray]) -> None:
        config = self._model.config
        # The last token of a response is not read any more.
        room = config.max_length - self.settings.max_new_tokens + 1
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {number} is empty; BOS will do.")
            if not 0 <= prompt.min() <= prompt.max() < config.vocabulary_size:
                raise ValueError(
                    f"prompt {number} should have ids from 0 to {config.vocabulary_size - 1}; got "
                    f"{prompt.min()} to {prompt.max()}."
                )
            if config.max_length and len(prompt) > room:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens, and max_new_tokens is "
                    f"{self.settings.max_new_tokens}, but the model knows only "
                    f"{config.max_length} positions."
                )

    def _in_turn(
        self, weights: Any, begin: Callable[..., _Rows], prompts: int, seats: int, slots: int
    ) -> Iterator[tuple[list[int], Generated]]:
        """More prompts than seats: those that are done make room for those that wait."""
        # A quarter of the seats is filled at a time: to read one prompt costs nearly as much as
        # to read several, and to wait until all are done would leave seats idle.
        shards = 1 if self._mesh is None else sharding.batch_shards(self._mesh)
        few = -(-max(seats // 4, 1) // shards) * shards
        waiting = deque(range(seats, prompts))
        sitting: list[int | None] = list(range(seats))
        with self._in_mesh():
            rows = begin(range(seats), seats, slots)
        while any(number is not None for number in sitting):
            target = jnp.asarray(few if waiting else seats)
            with self._in_mesh():
                rows = _decode_ring(self._model, self.settings, (slots,), weights, rows, target)
            done = np.all(np.asarray(sharding.fetch(_done(rows))), axis=1).tolist()
            ended = {seat: n for seat, n in enumerate(sitting) if done[seat] and n is not None}
            sitting = [None if seat in ended else n for seat, n in enumerate(sitting)]
            yield list(ended.values()), _fetched(rows, list(ended))
            free = [seat for seat, number in enumerate(sitting) if number is None]
            while waiting and len(free) >= few:
                numbers = [waiting.popleft() for _ in range(min(few, len(waiting)))]
                taken, free = free[:few], free[few:]
                with self._in_mesh():
                    rows = _seat(rows, begin(numbers, few, slots), jnp.asarray(taken, jnp.int32))
                for seat, number in zip(taken, numbers, strict=False):
                    sitting[seat] = number

    def _begin(
        self,
        weights: Any,
        prompts: Sequence[np.ndarray],
        keys: Array,
        length: int,
        numbers: Sequence[int],
        seats: int,
        slots: int,
    ) -> _Rows:
        """Seats the prompts of these numbers; further seats stay empty."""
        tokens, lengths = np.zeros((seats, length), np.int32), np.zeros(seats, np.int32)
        index = np.zeros(seats, np.int32)
        for seat, number in enumerate(numbers):
            index[seat], lengths[seat] = number, len(prompts[number])
            tokens[seat, : lengths[seat]] = prompts[number]
        put = partial(sharding.put_rows, self._mesh) if self._mesh else jnp.asarray
        # Where there are several processes an array of keys cannot be put on all devices itself.
        data = jax.random.key_data(keys)[index]
        return _begin(
            self._model, self.settings, slots, weights, put(tokens), put(lengths), put(data)
        )


def _room(tokens: int) -> int:
    """Slots for so many tokens of a branch, at least one."""
    return -(-tokens // _SLOT_STEP) * _SLOT_STEP if tokens > _SLOT_STEP else max(tokens, 1)


def _fetched(rows: _Rows, seats: Sequence[int]) -> Generated:
    """What was said in these seats."""
    fields = (rows.tokens, rows.lengths, rows.stopped, rows.logps, rows.sampled_logps)
    index = np.asarray(list(seats), np.int64)
    return Generated(*(np.asarray(x)[index] for x in sharding.fetch(fields)))


def generate(
    model: Decoder,
    params: Any,
    prompts: Sequence[Int[np.ndarray, " _"]],
    keys: Key[Array, " prompts"],
    *,
    samples: int = 1,
    max_new_tokens: int = 128,
    stops: Sequence[int] = (),
    temperature: float | Sequence[float] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    cache_dtype: str | None = None,
    at_once: int = 0,
) -> Generated:
    """Samples responses to prompts.

    Args:
      model: a language model.
      params: of the model.
      prompts: token ids of each, at least one.
      keys: of each prompt's random numbers, see `prompt_keys`.
      samples: see `Sampling`, also for those that follow.
      max_new_tokens: of a response.
      stops: token ids.
      temperature: one for all samples, or one for each.
      top_k: see `Sampling`.
      top_p: see `Sampling`.
      min_p: see `Sampling`.
      cache_dtype: see `Sampling`.
      at_once: prompts that are decoded together; 0: all.

    Raises:
      ValueError: something of it cannot be used.

    >>> from jaxpref import models
    >>> shape = {"width": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8,
    ...          "feed_forward": 8, "rope": (models.make_rope(head_dim=8),)}
    >>> model = models.Decoder(models.DecoderConfig(vocabulary_size=16, **shape))
    >>> params = models.init_params(model, jax.random.key(0))
    >>> said = generate(model, params, [np.array([1, 2, 3])], prompt_keys(0, 0, 1), samples=2,
    ...                 max_new_tokens=4, stops=[5])
    >>> said.tokens.shape, bool((said.lengths <= 4).all())
    ((1, 2, 4), True)
    """
    given = temperature if isinstance(temperature, int | float) else tuple(temperature)
    settings = Sampling(
        samples, max_new_tokens, tuple(stops), given, top_k, top_p, min_p, cache_dtype
    )
    sampler = Sampler(model, settings, at_once=at_once)
    return sampler(sampler.prepare(params), prompts, keys)
