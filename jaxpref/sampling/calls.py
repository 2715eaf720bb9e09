"""What sampling compiles and how often it runs that, from shapes alone: what a plan is made of."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpref import sharding
from jaxpref.sampling import decode, prepared
from jaxpref.sampling.sampler import Sampler, Seating


class Call(NamedTuple):
    """A program that sampling runs.

    Attributes:
      name: of what it does.
      function: jitted.
      inputs: of it, those that are static among them; arrays are shapes with shardings.
      weights: shapes of what `Sampler.prepare` has given, which is there meanwhile; None before.
      rows: the same of what is decoded; None before.
      times: how often it is run.
      trips: of its loop each time; None where it has none.
      tokens: that go through the model each time, padding and empty seats among them.
      scored: of them, those that meet the LM head.
      length: of the prompts that it reads; 0 where it reads none.
      copied: shapes of arrays that are there until its inputs are made of them.
    """

    name: str
    function: Any
    inputs: tuple[Any, ...]
    weights: Any = None
    rows: Any = None
    times: int = 1
    trips: int | None = None
    tokens: int = 0
    scored: int = 0
    length: int = 0
    copied: Any = ()


def calls_of(sampler: Sampler, params: Any, prompts: int, longest: int) -> tuple[Call, ...]:
    """What a sampler compiles and runs if no response ends early; nothing is computed.

    Rooms that grow are here the largest one from the first token on, and the loop runs to its
    end, which a run leaves now and then to ask whether to stop.

    Args:
      sampler: of the model.
      params: shapes and shardings of the parameters, as `Sampler.prepare` takes them.
      prompts: how many there are.
      longest: tokens of the longest one.
    """
    with sampler.in_mesh():
        return tuple(_calls(sampler, params, sampler.seating(prompts, longest), prompts))


def _calls(sampler: Sampler, params: Any, seating: Seating, prompts: int) -> Iterator[Call]:
    length, seats, few, rooms = seating
    model, decoder, settings, mesh = sampler.model, sampler.decoder, sampler.settings, sampler.mesh
    new = settings.max_new_tokens - 1
    weights = _weights(sampler, params)
    table = jax.tree.map(partial(_placed, mesh), jax.eval_shape(partial(sampler.angles, length)))

    def given(seats: int) -> tuple[Any, ...]:
        return weights, *_prompts(mesh, length, seats), table

    def read(name: str, seats: int, room: int, **more: Any) -> Call:
        inputs, tokens = (decoder, settings, room, *given(seats)), seats * length
        of_prompts = {"tokens": tokens, "scored": seats, "length": length, **more}
        return Call(name, decode.begin, inputs, weights, **of_prompts)

    def rows_in(room: int) -> decode.Rows:
        """What is decoded in a room of so many tokens."""
        rows = jax.eval_shape(partial(decode.begin, decoder, settings, room), *given(seats))
        return decode.placed(rows, lambda x, names: _placed(mesh, x, *names))

    in_rooms = [rows_in(room) for room in rooms]
    rows = in_rooms[-1]
    of_layers, others = prepared.apart(params)
    yield Call("prepare", prepared.beside, (model, mesh, others))
    # The last layer is made beside all others.
    *before, _ = weights
    number = jax.ShapeDtypeStruct((), np.int32)
    yield Call(
        "prepare a layer",
        prepared.one_layer,
        (model, mesh, of_layers, number),
        {name: weights[name] for name in before},
        times=model.config.layers,
    )
    yield read("read", seats, rooms[0])
    rounds, waiting = 1, prompts - seats
    if few:
        yield read("read more", few, rooms[-1], rows=rows, times=-(-waiting // few))
        # All end together, and seats are filled again only so many at a time.
        rounds += -(-waiting // (seats // few * few))
    if new:
        bound = jax.ShapeDtypeStruct((), jnp.int32)
        said = seats * settings.samples * new
        yield Call(
            "decode",
            decode.decode,
            (decoder, settings, weights, rows, bound, bound, table),
            weights,
            rows,
            times=rounds,
            trips=new,
            tokens=said,
            scored=said,
            copied=decode.own(in_rooms[-2]) if rooms[1:] else (),
        )


def _weights(sampler: Sampler, params: Any) -> Any:
    """What `Sampler.prepare` gives."""
    model, mesh = sampler.model, sampler.mesh
    layers, others = prepared.apart(params)
    shapes = dict(jax.eval_shape(partial(prepared.beside, model, None), others))
    layer = jax.eval_shape(partial(prepared.one_layer, model, None), layers, 0)
    shapes |= {f"layers_{number}": layer for number in range(model.config.layers)}
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        prepared.places(sampler.decoder, mesh),
    )


def _prompts(mesh: Mesh | None, length: int, seats: int) -> tuple[Any, ...]:
    """Tokens, lengths and keys of prompts in their seats."""
    data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((seats, length), np.int32)
    lengths = jax.ShapeDtypeStruct((seats,), np.int32)
    keys = jax.ShapeDtypeStruct((seats, *data.shape), data.dtype)
    return tuple(_placed(mesh, x, "rows") for x in (tokens, lengths, keys))


def _placed(mesh: Mesh | None, x: Any, *names: str) -> jax.ShapeDtypeStruct:
    """A shape in its place, by the logical names of its first axes; others are whole."""
    if mesh is None:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    spec = sharding.spec_of([*names, *["length"] * x.ndim][: x.ndim], x.shape)
    place = NamedSharding(mesh, spec or PartitionSpec())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
