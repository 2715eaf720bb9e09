import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, random_groups

from jaxpref import (
    config as config_lib,
    models,
    optimizer as optimizer_lib,
    packing,
    reference,
    sharding,
    train,
    weights,
)
from jaxpref.errors import UserError
from jaxpref.models import Decoder
from jaxpref.packing import Budget

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all": (2, 2, 2)}
STEPS = 3


def mesh_of(sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return sharding.make_mesh(*sizes, devices=devices)


def batch_of(mesh, step, responses=2, extras=None, token_extras=()):
    """A batch of random groups, and random values of what else it has."""
    groups = random_groups(step, 12, responses)
    budget = Budget(32, 20, sharding.batch_shards(mesh))
    batch = packing.materialise(packing.plan(groups, budget), groups, budget)
    rng = np.random.default_rng(step)
    # One value a token, wherever the token is.
    values = {name: rng.normal(size=(12, responses, 8)) - 2 for name in token_extras}
    index = np.asarray(packing.index_in_response(batch))
    flat = np.minimum(np.asarray(batch.response), 12 * responses - 1)
    batch = dataclasses.replace(
        batch,
        extras={name: rng.normal(size=shape) - 3 for name, shape in (extras or {}).items()},
        token_extras={
            name: x.reshape(-1, 8)[flat, np.minimum(index, 7)] for name, x in values.items()
        },
    )
    return sharding.put_batch(mesh, jax.tree.map(lambda x: np.asarray(x)[None], batch))


ON_TOKENS = ("old_logps", "sampled_logps", "advantages", "reference_logps")
# Changes of the config, responses of a group, and what else the batch has.
CASES = {
    "sft": ("sft", {}, 1, {}),
    "dpo": ("dpo", {}, 2, {}),
    "precomputed": ("dpo", {"reference.mode": "precomputed"}, 2, {"reference_logps": (12, 2)}),
    "lora": ("dpo", {"model.lora.rank": 2, "reference.mode": "adapter"}, 2, {}),
    "reward": ("reward", {}, 2, {}),
    "ppo": ("ppo", {}, 1, {"kl_coefficient": (12,)}),
    "grpo": ("grpo", {"sampling.samples": 3}, 3, {"kl_coefficient": (12,)}),
}


def three_steps(case, sizes):
    """Parameters and measurements after three steps.

    With momentum rather than Adam, which would make a whole step of a gradient that is 0 but for
    rounding.
    """
    method, changes, responses, extras = CASES[case]
    mesh, config = mesh_of(sizes), config_lib.default(method)
    config.update_from_flattened_dict(changes)
    shape = dataclasses.replace(
        TINY, dtype="float64", param_dtype="float64", lora=models.lora(config.model)
    )
    model = Decoder(shape)
    model = models.as_scalar(model) if method == "reward" else model
    opened = weights.Opened(weights.Source(None, None), None, model)
    with pytest.MonkeyPatch.context() as patch:
        sgd = optax.sgd(1.0, momentum=0.9), lambda step: 1.0
        patch.setattr(optimizer_lib, "build", lambda *_: sgd)
        layout = train.lay_out(config, opened, mesh, STEPS)
    abstract, critic = layout.state, layout.critic
    params, frozen = weights.load_first(config, opened, abstract.policy, layout.frozen)
    # Random adapters, since fresh ones have gradients of one factor alone.
    params = jax.tree.map(lambda x: x + 0.01 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params)
    state = train.initial_state(
        params,
        layout.optimizer,
        running=layout.algorithm.running,
        controls=layout.controls,
        abstract=abstract,
    )
    if critic is not None:
        state = state._replace(roles={**state.roles, "critic": critic.first(params, frozen)})
    modes = {
        "live": reference.Live(layout.policy),
        "precomputed": reference.Precomputed(),
        "adapter": reference.Live(models.packed(models.without_adapters(model))),
        "free": reference.Free(),
    }
    mode = modes[config.reference.mode]
    tokens = (*ON_TOKENS, "returns", "old_values") if critic else ON_TOKENS
    more = {"responses": responses, "extras": extras}
    more["token_extras"] = tokens if layout.online else ()
    with sharding.use(mesh):
        # In the policy's updates of a method that samples the reference has been asked before.
        held = jax.tree.map(jnp.copy, state.policy) if isinstance(mode, reference.Live) else {}
        held = {} if case == "lora" else held
        updates = [(layout.policy_update(mode), frozen, held)]
        if critic is not None:
            updates.insert(0, (layout.critic_update(), {}, {}))
        measured = []
        for step in range(STEPS):
            batch = batch_of(mesh, step, **more)
            for update, of_frozen, of_reference in updates:
                state, metrics = update(state, of_frozen, of_reference, batch)
                metrics = {k: (float(m.values), float(m.weights)) for k, m in metrics.items()}
                measured.append({k: v / w for k, (v, w) in metrics.items() if w})
    return state.params, measured


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        *((case, "all") for case in CASES),
        *(
            pytest.param(case, mesh, marks=pytest.mark.long)
            for case in CASES
            for mesh in ("data", "fsdp", "tensor")
        ),
    ],
)
def test_eight_devices_equal_one(case, mesh, float64):
    params, measured = three_steps(case, (1, 1, 1))
    found, sharded = three_steps(case, MESHES[mesh])
    for number, (step, other) in enumerate(zip(measured, sharded, strict=True)):
        # The first margins are 0 but for rounding: their signs say nothing.
        compared = step.keys() - ({"rewards/accuracies"} if number == 0 else set())
        assert step.keys() == other.keys()
        for key in compared:
            # Norms of all parameters are logged in float32.
            tolerance = 1e-6 if key.endswith("_norm") else 1e-9
            np.testing.assert_allclose(
                other[key], step[key], rtol=tolerance, atol=1e-9, err_msg=key
            )
    assert all(step["grad_norm"] > 1e-3 for step in measured)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    for path, a, b in zip(paths, jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-9, err_msg=path)


def test_parameters_and_optimizer_state_are_split_as_the_rules_say():
    mesh = mesh_of((2, 2, 2))
    optimizer, _ = optimizer_lib.build(config_lib.default("dpo").optimizer, 1)
    abstract, _ = train.abstract_state(Decoder(TINY), optimizer, mesh)
    query = abstract.policy["layers"]["query"]
    assert query.shape == (2, 16, 4, 4)
    # layers whole, width over fsdp, heads over tensor, head_dim whole.
    assert query.sharding.shard_shape(query.shape) == (2, 8, 2, 4)
    table = abstract.policy["embedding"]
    assert table.sharding.shard_shape(table.shape) == (32, 8)
    moments = [
        x
        for x in jax.tree.leaves(abstract.roles["policy"].optimizer_state)
        if x.shape == query.shape
    ]
    assert len(moments) == 2
    assert {x.sharding for x in moments} == {query.sharding}


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = mesh_of((1, 1, 8))
    box = nn.LogicallyPartitioned(
        jax.ShapeDtypeStruct((16, 2, 4), jnp.float32), ("width", "kv_heads", "head_dim")
    )
    assert sharding.shardings(mesh, box).shard_shape((16, 2, 4)) == (16, 2, 4)


def test_what_is_large_and_not_split_is_told():
    mesh = mesh_of((2, 2, 2))
    axes = ("width", "feed_forward")
    shapes = {"odd": (1025, 1025), "even": (1026, 1025), "small": (15, 15)}
    boxes = {
        name: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)
        for name, shape in shapes.items()
    }
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.meta.unbox({"layers": boxes}),
        sharding.shardings(mesh, {"layers": boxes}),
    )
    (said,) = sharding.not_split({"policy": placed})
    assert said.startswith("not split: policy layers/odd, 4.2 MB on every device")
    assert sharding.not_split({}, frozen=placed) == [said.replace("policy", "frozen")]
    # Where only rows are split it is as it should be.
    alone = sharding.shardings(mesh_of((8, 1, 1)), boxes["odd"])
    leaf = jax.ShapeDtypeStruct((1025, 1025), jnp.float32, sharding=alone)
    assert not sharding.not_split({"policy": {"odd": leaf}})


def test_rows_are_split_and_tables_whole():
    mesh = mesh_of((4, 2, 1))
    batch = batch_of(mesh, 0)
    rows = batch.tokens.shape[1]
    assert batch.tokens.addressable_shards[0].data.shape[1] == rows // 8
    assert batch.source.addressable_shards[0].data.shape[1] == rows // 8
    assert batch.lengths.addressable_shards[0].data.shape == batch.lengths.shape


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (8, 2, 1)])
def test_mesh_sizes_must_fit_the_devices(sizes):
    with pytest.raises(UserError, match="should multiply to the 8 devices here"):
        sharding.make_mesh(*sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh is made from, of a device that is not here."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5p"
    process_index: int = 0
    core_on_chip: int = 0


def torus(x, y, z, slices=1, **kind):
    places = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    return [
        Chip(s * len(places) + n, place, s, **kind)
        for s in range(slices)
        for n, place in enumerate(places)
    ]


# The first four are sizes that `jax.make_mesh` refuses on these slices.
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((2, 8, 4), (4, 4, 4)),
        ((8, 8, 1), (4, 4, 4)),
        ((1, 32, 2), (4, 4, 4)),
        ((4, 64, 1), (16, 16, 1)),
        ((16, 16, 1), (16, 16, 1)),
    ],
)
def test_any_sizes_fit_a_torus(sizes, shape):
    chips = torus(*shape)
    found = sharding.arrange(sizes, chips)
    assert found.shape == sizes
    assert {chip.id for chip in found.flat} == {chip.id for chip in chips}


# As `mesh_utils` orders the chips: in grids of lines, or in a ring.
@pytest.mark.parametrize(
    ("sizes", "shape", "kind", "lines"),
    [
        ((1, 256, 1), (16, 16, 1), "TPU v5 lite", (16, 16)),
        ((8, 32, 1), (16, 16, 1), "TPU v5 lite", (16, 2)),
        ((1, 16, 1), (2, 2, 4), "TPU v5p", (2, 2, 4)),
        ((4, 16, 1), (4, 4, 4), "TPU v5p", (4, 4)),
        ((1, 4, 4), (2, 2, 4), "TPU v5p", (4,)),
        ((1, 8, 1), (2, 4, 1), "TPU v5 lite", (2, 4)),
        ((1, 16, 1), (4, 4, 1), "TPU v6 lite", (4, 4)),
        ((2, 8, 1), (4, 4, 1), "TPU v6 lite", (4, 2)),
        ((1, 1, 8), (2, 2, 2), "TPU v5p", ()),
    ],
    ids=str,
)
def test_gradients_are_scattered_along_the_lines_of_a_torus(sizes, shape, kind, lines):
    chips = torus(*shape, device_kind=kind)
    mesh = jax.sharding.Mesh(sharding.arrange(sizes, chips), sharding.AXES)
    assert sharding._lines(mesh)["fsdp"] == lines


def test_only_data_lies_between_slices():
    chips = torus(2, 2, 2, slices=4)
    found = sharding.arrange((8, 2, 2), chips)
    assert found.shape == (8, 2, 2)
    # Two neighbours along data are in each slice, with all of fsdp and tensor.
    slices = np.vectorize(lambda chip: chip.slice_index)(found)
    np.testing.assert_array_equal(slices, np.repeat(np.arange(4), 8).reshape(8, 2, 2))
    for sizes in ((2, 16, 1), (1, 8, 4)):
        with pytest.raises(UserError, match=r"in 4 slices.*Set mesh.data to a multiple of 4"):
            sharding.arrange(sizes, chips)
    # What connects the hosts of GPUs carries fsdp as well.
    gpus = torus(2, 2, 2, slices=4, platform="gpu", device_kind="H200")
    assert sharding.arrange((2, 16, 1), gpus).shape == (2, 16, 1)


def test_minus_one_takes_what_is_left():
    assert dict(sharding.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
