"""Prompts go in, responses come out: where a prompt sits, and how much room its samples get."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpref import models, sharding
from jaxpref.interrupts import StoppedError
from jaxpref.models import Decoder
from jaxpref.sampling import decode, prepared
from jaxpref.sampling.decode import Rows
from jaxpref.sampling.distribution import Sampling

# Prompts are padded to a multiple of this, so that few lengths are compiled.
_PROMPT_STEP = 64
# Branches begin with room for so many tokens, or all; growing to more is another loop to compile.
_FIRST_SLOTS = 32
# Whether to stop is asked after so many tokens, at the latest.
_ASK_AFTER = 64
# Rooms of more tokens than this are multiples of it, which CPUs read faster.
_SLOT_STEP = 16


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


class Seating(NamedTuple):
    """Who sits where.

    Attributes:
      length: what prompts are padded to.
      seats: prompts that are decoded together, empty seats among them.
      refilled: seats that are filled again at a time; 0 where every prompt has one from the start.
      rooms: tokens that a branch has room for, one room after the other.
    """

    length: int
    seats: int
    refilled: int
    rooms: tuple[int, ...]


_rotary_table = jax.jit(models.rotary_table, static_argnums=0)


class Sampler:
    """Samples from one model by the same settings, again and again.

    Attributes:
      model: the language model.
      decoder: what decodes, see `prepared`.
      settings: how to sample.
      mesh: over which prompts are split; None for one device.
    """

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
        self.model, self.decoder, self.mesh = model, prepared.unrolled(model), mesh
        self._at_once, self._prompt_length = at_once, prompt_length

    def prepare(self, params: Any) -> Any:
        """The parameters as decoding takes them, see `prepared`."""
        return prepared.prepare(self.model, self.mesh, params)

    def __call__(
        self,
        weights: Any,
        prompts: Sequence[Int[np.ndarray, " _"]],
        keys: Key[Array, " prompts"],
        stopping: Callable[[], bool] = lambda: False,
    ) -> Generated:
        """Samples responses.

        Args:
          weights: from `prepare`.
          prompts: token ids of each, at least one.
          keys: of each prompt's random numbers, see `prompt_keys`.
          stopping: asked now and then; True ends it. All processes have to answer alike.

        Raises:
          ValueError: there are no prompts, or not as many keys; a prompt is empty, has ids that
            the model does not know, or is so long that a response would leave its positions.
          StoppedError: `stopping` said so.
        """
        ended = self.as_they_end(weights, prompts, keys, stopping)
        numbers, said = zip(*ended, strict=True)
        order = np.argsort(np.concatenate(numbers))
        return Generated(*(np.concatenate(parts)[order] for parts in zip(*said, strict=True)))

    def as_they_end(
        self,
        weights: Any,
        prompts: Sequence[Int[np.ndarray, " _"]],
        keys: Key[Array, " prompts"],
        stopping: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[list[int], Generated]]:
        """The same, as soon as all samples of some prompts have ended.

        Yields:
          The numbers of these prompts, and what was said to them.
        """
        if len(prompts) != len(keys) or not len(prompts):
            raise ValueError(f"expected a key a prompt; got {len(keys)} for {len(prompts)}.")
        self._check(prompts)
        seating = self.seating(len(prompts), max(map(len, prompts)))
        table = self._table(seating.length)
        begin = partial(self._begin, weights, prompts, keys, seating.length, table=table)
        decoded = partial(self._decoded, weights, table, stopping)
        if seating.refilled:
            yield from self._in_turn(begin, decoded, len(prompts), seating)
            return
        seats, (first, *larger) = seating.seats, seating.rooms
        with self.in_mesh():
            rows, ended = decoded(begin(range(len(prompts)), seats, first), seats, first)
            for size in larger:
                if ended < seats:
                    # Bound to the same name, so that the room before is free while it decodes.
                    rows = decode.widen(rows, size)
                    rows, ended = decoded(rows, seats, size)
        yield list(range(len(prompts))), _fetched(rows, range(len(prompts)))

    def seating(self, prompts: int, longest: int) -> Seating:
        """Who sits where, of so many prompts, the longest of which has so many tokens."""
        if longest > (length := self._prompt_length):
            length = -(-longest // _PROMPT_STEP) * _PROMPT_STEP
        shards = 1 if self.mesh is None else sharding.batch_shards(self.mesh)
        at_once = min(self._at_once or prompts, prompts)
        seats = -(-at_once // shards) * shards
        slots = _room(self.settings.max_new_tokens - 1)
        if seats < prompts:
            # A quarter of the seats is filled at a time: to read one prompt costs nearly as much
            # as to read several, and to wait until all are done would leave seats idle.
            refilled = -(-max(seats // 4, 1) // shards) * shards
            return Seating(length, seats, refilled, (slots,))
        # Rooms grow, so that the first tokens are not paid for by reading empty slots.
        first = min(_room(max(slots // 4, _FIRST_SLOTS)), slots)
        rooms = tuple(sorted({first, max(_room(slots // 2), first), slots}))
        return Seating(length, seats, 0, rooms)

    def in_mesh(self) -> AbstractContextManager[None]:
        """Inside, logical axes lie along the mesh as decoding has them."""
        if self.mesh is None:
            return nullcontext()
        return sharding.use(self.mesh, sharding.GENERATION_RULES)

    def _check(self, prompts: Sequence[np.ndarray]) -> None:
        config = self.decoder.config
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
        self,
        begin: Callable[..., Rows],
        decoded: Callable[..., tuple[Rows, int]],
        prompts: int,
        seating: Seating,
    ) -> Iterator[tuple[list[int], Generated]]:
        """More prompts than seats: those that are done make room for those that wait."""
        seats, few, (slots,) = seating.seats, seating.refilled, seating.rooms
        waiting = deque(range(seats, prompts))
        sitting: list[int | None] = list(range(seats))
        with self.in_mesh():
            rows = begin(range(seats), seats, slots)
        while any(number is not None for number in sitting):
            with self.in_mesh():
                rows, _ = decoded(rows, few if waiting else seats)
            done = np.all(np.asarray(sharding.fetch(decode.done(rows))), axis=1).tolist()
            ended = {seat: n for seat, n in enumerate(sitting) if done[seat] and n is not None}
            sitting = [None if seat in ended else n for seat, n in enumerate(sitting)]
            yield list(ended.values()), _fetched(rows, list(ended))
            free = [seat for seat, number in enumerate(sitting) if number is None]
            while waiting and len(free) >= few:
                numbers = [waiting.popleft() for _ in range(min(few, len(waiting)))]
                taken, free = free[:few], free[few:]
                with self.in_mesh():
                    rows = decode.seat(
                        rows, begin(numbers, few, slots), jnp.asarray(taken, jnp.int32)
                    )
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
        *,
        table: models.Angles | None,
    ) -> Rows:
        """Seats the prompts of these numbers; further seats stay empty."""
        tokens, lengths = np.zeros((seats, length), np.int32), np.zeros(seats, np.int32)
        index = np.zeros(seats, np.int32)
        for seat, number in enumerate(numbers):
            index[seat], lengths[seat] = number, len(prompts[number])
            tokens[seat, : lengths[seat]] = prompts[number]
        put = partial(sharding.put_rows, self.mesh) if self.mesh else jnp.asarray
        # Where there are several processes an array of keys cannot be put on all devices itself.
        data = jax.random.key_data(keys)[index]
        return decode.begin(
            self.decoder, self.settings, slots, weights, put(tokens), put(lengths), put(data), table
        )

    def _decoded(
        self,
        weights: Any,
        table: models.Angles | None,
        stopping: Callable[[], bool],
        rows: Rows,
        groups: int,
        most: float = math.inf,
    ) -> tuple[Rows, int]:
        """The rows when so many prompts are done, or so many tokens were written; see `decode`.

        Also how many prompts are done.
        """
        used, ended = map(int, sharding.fetch(decode.progress(rows)))
        while ended < groups and used < most:
            if stopping():
                raise StoppedError("sampling was stopped.")
            until = min(used + _ASK_AFTER, most)
            bounds = jnp.asarray(groups), jnp.asarray(until, jnp.int32)
            rows = decode.decode(self.decoder, self.settings, weights, rows, *bounds, table)
            used, ended = map(int, sharding.fetch(decode.progress(rows)))
        return rows, ended

    def angles(self, length: int) -> models.Angles | None:
        """The rotary angles of a prompt of `length` tokens and its responses."""
        positions = np.arange(length + self.settings.max_new_tokens)[None]
        return _rotary_table(self.decoder.config, positions)

    def _table(self, length: int) -> models.Angles | None:
        """The same on the devices."""
        table = self.angles(length)
        if self.mesh is None:
            return table
        return jax.tree.map(partial(sharding.put_whole, self.mesh), table)


def _room(tokens: int) -> int:
    """Slots for so many tokens of a branch, at least one."""
    return -(-tokens // _SLOT_STEP) * _SLOT_STEP if tokens > _SLOT_STEP else max(tokens, 1)


def _fetched(rows: Rows, seats: Sequence[int]) -> Generated:
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
    >>> from jaxpref.sampling import prompt_keys
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
