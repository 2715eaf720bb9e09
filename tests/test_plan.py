"""Plans: what a compiled program's text says, and that a plan has what a run compiles."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY
from jax.sharding import PartitionSpec as P
from test_train import small

from jaxpref import models, sharding, train
from jaxpref.errors import UserError
from jaxpref.models import Decoder
from jaxpref.plan import hlo, machines
from jaxpref.plan.estimate import TooLargeError, _attention, _useful, estimate
from jaxpref.plan.programs import Program, Work, bytes_of, plan_run
from jaxpref.plan.report import Report
from jaxpref.plan.search import alternatives
from jaxpref.sampling import decode, prepared
from jaxpref.train import layout

ROOT = Path(__file__).parent.parent
REWARD = "test_plan:reward"


def reward(prompts, completions, **_):
    """Another one for nearly every text, so that every step has a gradient."""
    return [sum(map(ord, text)) % 97 for text in completions]


KERNEL = """
%body (p: (s32[], bf16[4,32,128])) -> (s32[], bf16[4,32,128]) {
  %p = (s32[], bf16[4,32,128]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %x = bf16[4,32,128]{2,1,0} get-tuple-element(%p), index=1
  %y = bf16[4,32,128]{2,1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/splash_mha_fwd/pallas_call"}
  ROOT %t = (s32[], bf16[4,32,128]{2,1,0}) tuple(%n, %y)
}

%cond (p: (s32[], bf16[4,32,128])) -> pred[] {
  %p = (s32[], bf16[4,32,128]{2,1,0}) parameter(0)
  ROOT %c = pred[] constant(true)
}

ENTRY %main (x: (s32[], bf16[4,32,128])) -> (s32[], bf16[4,32,128]) {
  %x = (s32[], bf16[4,32,128]{2,1,0}) parameter(0)
  ROOT %w = (s32[], bf16[4,32,128]{2,1,0}) while(%x), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_attention_of_a_kernel_is_that_of_its_rows(found):
    """Three rows of 32 tokens with 4 heads of 128: scores and sums for all pairs."""
    program = found.planned.programs[0]
    program = program._replace(work=program.work._replace(length=32))
    config = dataclasses.replace(found.planned.decoder.config, heads=4, head_dim=128)
    operations = _attention(hlo.Program(KERNEL), config, program, found.planned.layout.mesh)
    assert operations == 3 * 2 * 2 * (32 * 33 / 2) * 4 * 128


def shapes_of(tree):
    """Shapes, dtypes and places of arrays by their paths; what is no array as it is."""
    return {
        jax.tree_util.keystr(path): (
            (x.shape, x.dtype, getattr(x, "sharding", None)) if hasattr(x, "dtype") else x
        )
        for path, x in jax.tree.leaves_with_path(tree)
    }


def assert_same_inputs(ours, theirs):
    """Those of a plan are those of a run."""
    assert ours.keys() == theirs.keys()
    for where, given in theirs.items():
        if not isinstance(given, tuple):
            assert ours[where] == given, where
            continue
        shape, dtype, place = given
        assert ours[where][:2] == (shape, dtype), where
        if ours[where][2] is None:
            # Numbers that JAX puts where they are needed.
            assert place is None or place.is_fully_replicated, where
        else:
            assert ours[where][2].is_equivalent_to(place, len(shape)), where


FULL = {"data__row_length": 128, "data__scored_length": 128}
METHODS = [
    ("dpo", {}),
    ("dpo", {"reference__mode": "precomputed"}),
    ("dpo", {"model__lora__rank": 2, "reference__mode": "adapter", "model__frozen_dtype": "nf4"}),
    ("dpo", {"reference__mode": "synced", "data__rows": 8}),
    # A row a device, which holds a pair at least.
    ("dpo", {"data__rows": 4, "data__batch_size": 4, **FULL}),
    ("sft", {}),
    ("kto", {}),
    ("reward", {}),
    ("grpo", {"sampling__samples": 2}),
    ("ppo", {}),
    ("rejection_sampling", {"sampling__samples": 2}),
]
SLOW = ("kto", "reward", "rejection_sampling")


@pytest.mark.parametrize(
    ("method", "changes"),
    [pytest.param(*case, marks=pytest.mark.long if case[0] in SLOW else ()) for case in METHODS],
    ids=lambda x: x if isinstance(x, str) else ",".join(map(str, x.values())),
)
def test_a_plan_has_the_very_updates_that_a_run_compiles(method, changes, tmp_path, monkeypatch):
    """What `main` gives its updates has the shapes, dtypes and places that the plan says."""
    if method in ("grpo", "ppo", "rejection_sampling"):
        changes = {"reward__function": REWARD, "sampling__max_new_tokens": 16, **changes}
    config = small(method, mesh__data=2, mesh__fsdp=2, train__steps=1, **changes)
    given, original = {}, train.update.make_update

    def make_update(*args, **options):
        update = original(*args, **options)

        def noted(*inputs):
            given.setdefault(options.get("role", "policy"), shapes_of(inputs))
            return update(*inputs)

        noted.lower = update.lower
        return noted

    for module in (layout, train.critic):
        monkeypatch.setattr(module, "make_update", make_update)
    mesh = sharding.make_mesh(2, 2, 1, devices=jax.devices()[:4])
    monkeypatch.setattr(sharding, "make_mesh", lambda **sizes: mesh)
    train.run(config, tmp_path)
    planned = plan_run(config, mesh)
    plans = [planned]
    if changes.items() >= FULL.items():
        plans.append(plan_run(config, mesh, rows=1))
    assert len(given) == 1 + (method == "ppo")
    for role, inputs in given.items():
        name = "update" if role == "policy" else "critic's update"
        for plan in plans:
            (program,) = (p for p in plan.programs if p.name == name)
            assert_same_inputs(shapes_of(program.inputs), inputs)
    assert 0 < planned.fill <= 1


SAMPLED = [
    # Rooms of 32 and of 48 tokens.
    ("grpo", (2, 2, 1), {"sampling__samples": 2, "sampling__max_new_tokens": 48}),
    # A greedy sample beside the others, and adapters that are merged.
    pytest.param(
        *("remax", (1, 2, 2), {"model__lora__rank": 2, "model__frozen_dtype": "nf4"}),
        marks=pytest.mark.long,
    ),
    # Four seats for eight prompts, of which two are filled again at a time.
    ("rloo", (2, 1, 2), {"sampling__samples": 2, "sampling__at_once": 4}),
]


@pytest.mark.parametrize(
    ("method", "sizes", "changes"), SAMPLED, ids=["rooms", "greedy", "in turn"]
)
def test_a_plan_has_the_very_sampling_that_a_run_compiles(
    method, sizes, changes, tmp_path, monkeypatch
):
    changes = {"reward__function": REWARD, "sampling__max_new_tokens": 16, **changes}
    changes |= {f"mesh__{axis}": size for axis, size in zip(sharding.AXES, sizes, strict=True)}
    config = small(method, train__steps=1, train__eval_every=0, **changes)
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:4])
    given = []

    def noted(name, function):
        def call(*inputs):
            given.append((name, shapes_of(inputs)))
            return function(*inputs)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(sharding, "make_mesh", lambda **sizes: mesh)
        for module, name in (
            (prepared, "beside"),
            (prepared, "one_layer"),
            (decode, "begin"),
            (decode, "decode"),
        ):
            patched.setattr(module, name, noted(name, getattr(module, name)))
        train.run(config, tmp_path)
    # Evaluations before the step and after it sample, too, one response to each prompt.
    starts = [i for i, (name, _) in enumerate(given) if name == "beside"]
    assert len(starts) == 3
    given = given[starts[1] : starts[2]]
    layers = [inputs for name, inputs in given if name == "one_layer"]
    begun = [inputs for name, inputs in given if name == "begin"]
    decoded = [inputs for name, inputs in given if name == "decode"]
    # A run pads prompts to the longest one that it has.
    config.data.max_prompt_length = begun[0]["[4]"][0][1]
    planned = plan_run(config, mesh)
    programs = {p.name: p for p in planned.programs if p.name in planned.sampling}
    assert planned.sampled == 8 * (config.sampling.samples + (method == "remax")) * (
        config.sampling.max_new_tokens
    )
    assert_same_inputs(shapes_of(programs["prepare"].inputs), given[0][1])
    assert programs["prepare a layer"].calls == len(layers) == config.model.layers
    for inputs in layers:
        assert_same_inputs(shapes_of(programs["prepare a layer"].inputs), inputs)
    assert_same_inputs(shapes_of(programs["read"].inputs), begun[0])
    assert_same_inputs(shapes_of(programs["decode"].inputs), decoded[-1])
    assert ("read more" in programs) == ("sampling__at_once" in changes)
    for inputs in begun[1:]:
        assert_same_inputs(shapes_of(programs["read more"].inputs), inputs)
    if "read more" in programs:
        assert programs["read more"].calls == len(begun) - 1


CHIP = machines.Chip("tiny", 1e9, 1e9, 1e9, 1e6)


def test_what_decoding_takes():
    """Operations of every token, counted by hand, and what is held beside the parameters."""
    width, layers, heads, head_dim, wide, vocabulary = 64, 2, 4, 16, 128, 512
    shape = {"width": width, "layers": layers, "heads": heads, "kv_heads": heads}
    shape |= {"head_dim": head_dim, "feed_forward": wide, "vocabulary_size": vocabulary}
    shape = {f"model__{name}": size for name, size in shape.items()}
    new, samples, prompts = 48, 4, 8
    config = small(
        "grpo",
        **shape,
        reward__function=REWARD,
        sampling__samples=samples,
        sampling__max_new_tokens=new,
        data__max_length=256,
    )
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    planned = plan_run(config, mesh)
    found = tuple(estimate(planned, program, mesh, CHIP) for program in planned.programs)
    report = Report(planned, found, CHIP, 1)
    prepare, of_layer, read, decoding, look, update = found
    assert planned.sampling == ("prepare", "prepare a layer", "read", "decode")
    assert planned.sampled == prompts * samples * new
    # The first token is said after the prompt, the last one is not read.
    trips, branches = new - 1, prompts * samples
    assert decoding.tokens == trips * branches
    weights = layers * (4 * width * heads * head_dim + 3 * width * wide) + width * vocabulary
    assert decoding.useful == 2 * weights * trips * branches
    # Scores and sums with the keys of the prompt, of the room, and of the token itself.
    pairs = config.data.max_prompt_length + new + 1
    attention = layers * 2 * 2 * pairs * heads * head_dim * trips * branches
    assert decoding.operations == pytest.approx(decoding.useful + attention, rel=0.01)
    assert read.tokens == prompts * config.data.max_prompt_length
    assert read.useful == pytest.approx(
        2 * (weights - width * vocabulary) * read.tokens + 2 * width * vocabulary * prompts
    )
    assert prepare.useful == of_layer.useful == 0
    # All layers but the one that is made.
    copied = of_layer.held["copy of the policy"]
    one = 4 * ((weights - width * vocabulary) // layers + 2 * width)
    assert copied == decoding.held["copy of the policy"] - one
    # Keys and values of the prompts, and of the branches.
    cached = layers * 2 * heads * head_dim * 4
    cached *= prompts * (config.data.max_prompt_length + samples * new)
    assert decoding.held["cache"] == pytest.approx(cached, rel=0.05)
    assert decoding.held["copy of the policy"] == decoding.held["policy"]
    assert "cache" not in update.held
    assert "copy of the policy" not in look.held
    # The room of 32 tokens is there until that of 48 is.
    copied = layers * 2 * heads * head_dim * 4 * branches * 32
    assert decoding.peak > sum(decoding.held.values()) + copied
    assert report.sampling_seconds == sum(
        e.calls * max(e.seconds.values()) for e in (prepare, of_layer, read, decoding)
    )
    assert report.seconds > report.sampling_seconds
    told = json.loads(json.dumps(report.as_dict()))
    assert told["sampled_tokens"] == planned.sampled
    assert "a step takes" in report.sentences()[1]
    assert "if no response ends early" in report.sentences()[1]
    assert f"the longest prompts and {planned.sampled:,} tokens" in report.sentences()[2]
    assert f"{update.tokens:,} tokens an update" in report.sentences()[0]
    columns = [[str(column.header) for column in table.columns] for table in report.tables()]
    assert columns == [["", *planned.sampling], ["", "look", "update"]]


def test_of_a_mixture_a_token_needs_the_experts_that_it_goes_to():
    """As many operations as with one network as wide as these, and those of the router."""
    tokens, wide = 64, 24

    def useful(**changes):
        model = Decoder(dataclasses.replace(TINY, **changes))
        params = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
        work, passes = Work(tokens, 0, tokens, None), ((params, True),)
        return _useful(Program("update", None, (), {}, 1, work, passes), model.config)

    mixture = useful(feed_forward=wide, experts=8, experts_per_token=2)
    routers = TINY.layers * TINY.width * 8
    assert mixture - 6 * routers * tokens == useful(feed_forward=2 * wide)


@pytest.fixture(scope="module")
def found():
    """The estimate of a DPO update on eight devices, with full rows."""
    config = small(mesh__data=2, mesh__fsdp=4, data__row_length=128)
    mesh = sharding.make_mesh(2, 4, 1, devices=jax.devices()[:8])
    planned = plan_run(config, mesh, rows=2)
    return Report(planned, (estimate(planned, planned.programs[0], mesh, CHIP),), CHIP, 8)


@pytest.mark.parametrize(("sizes", "reference"), [((1, 8, 1), "live"), ((2, 4, 1), "precomputed")])
def test_an_update_moves_the_textbooks_bytes(sizes, reference):
    """Layers' weights forward and backward, once more for a live reference; gradients once."""
    shape = {"layers": 3, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 32}
    shape |= {"feed_forward": 256, "remat": "full"}
    changes = {f"model__{name}": value for name, value in shape.items()}
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:8])
    config = small(reference__mode=reference, data__row_length=128, **changes)
    planned = plan_run(config, mesh, rows=1)
    (program,) = planned.programs
    with sharding.use(mesh):
        compiled = program.function.lower(*program.inputs).compile()
    layers = jax.tree.leaves(planned.layout.state.policy["layers"])
    # Norms are whole on every device.
    weights = 4 * sum(x.size for x in layers if x.size > 3 * 64)
    moved: dict[str, int] = {}
    for found in hlo.Program(compiled.as_text(), 1).collectives():
        in_layers = any("Decoder" in loop for loop in found.loops)
        # Of the gradients of norms, and of parts of gradients that have been scattered, there are
        # sums.
        if found.devices > 1 and in_layers and found.kind != "all-reduce":
            moved[found.kind] = moved.get(found.kind, 0) + found.size * found.times
        elif in_layers and found.devices == 8:
            assert found.size * found.times <= 2 * 4 * 3 * 64
    assert moved == {
        "all-gather": (2 + (reference == "live")) * weights,
        "reduce-scatter": weights,
    }


@pytest.mark.parametrize("remat", ["full", "none"])
def test_activations_are_what_layers_keep(remat):
    """With `full` that is the input of each; the values are in float32."""
    layers, width, length, rows = 3, 32, 128, 2
    shape = {"layers": layers, "width": width, "feed_forward": 4 * width, "remat": remat}
    changes = {f"model__{name}": value for name, value in shape.items()}
    mesh = sharding.make_mesh(2, 2, 1, devices=jax.devices()[:4])
    planned = plan_run(small(data__row_length=length, **changes), mesh, rows)
    kept = estimate(planned, planned.programs[0], mesh, None).activations
    inputs = layers * rows * length * width * 4
    # And without, at least queries, keys, values, and twice the wider part.
    assert kept == inputs if remat == "full" else kept > 11 * inputs


def test_full_rows_in_place_of_the_data(found):
    (program,) = found.planned.programs
    batch = program.inputs[-1]
    assert batch.tokens.shape == (1, 16, 128)
    # A pair a row.
    assert batch.lengths.shape == (1, 16, 2)
    assert found.planned.examples == 16
    assert found.estimates[0].tokens == 2048


def test_what_an_update_takes(found):
    """Memory by what it is for, and operations between what is needed and twice that."""
    (measured,) = found.estimates
    held = measured.held
    policy = sum(x.size for x in jax.tree.leaves(found.planned.layout.state.policy))
    # Norms are whole on every device.
    assert policy <= held["policy"] <= 1.3 * policy
    assert held["optimizer"] == pytest.approx(2 * held["policy"], rel=0.01)
    assert held["reference"] == held["policy"]
    assert measured.peak > sum(held.values())
    assert measured.useful < measured.operations < 2.5 * measured.useful
    assert measured.exchanged["all-gather"] > 0
    assert measured.bound == "links"
    assert found.seconds == pytest.approx(sum(measured.exchanged.values()) / 1e6)
    assert found.fits
    assert len(found.tables()) == 1
    assert 0 < found.utilisation < 1
    told = json.loads(json.dumps(found.as_dict()))
    assert told["programs"][0]["bound"] == "links"
    assert "bound: update by its links" in found.sentences()[1]


def test_a_mesh_leaves_tpus_enough_columns():
    message = "leaves a TPU 8 of the 512 columns .* Set mesh.fsdp to at most 32, and give"
    with pytest.raises(UserError, match=message):
        layout._check_columns(512, 64, "tpu")
    for fsdp, platform in ((32, "tpu"), (64, "cpu"), (1, "tpu")):
        layout._check_columns(512, fsdp, platform)


def test_alternatives_are_other_configs():
    config = small(mesh__data=1, mesh__fsdp=8, model__remat="full")
    found = {flags: other for flags, other, _ in alternatives(config, 8, of_data=16)}
    assert [found[f"--config.data.rows={rows}"].data.rows for rows in (8, 32)] == [8, 32]
    assert "--config.model.remat=dots" in found
    assert "--config.mesh.data=1 --config.mesh.fsdp=4 --config.mesh.tensor=2" in found
    assert "--config.mesh.data=1 --config.mesh.fsdp=8 --config.mesh.tensor=1" not in found
    assert found["--config.reference.mode=precomputed"].reference.mode == "precomputed"
    assert config.reference.mode == "live"
    # A device has a row at least, and rows that are given take the place of the data's.
    flags = [flags for flags, _, _ in alternatives(config, 8, of_data=8)]
    assert "--config.data.rows=16" in flags
    assert "--config.data.rows=4" not in flags
    given = {flags: rows for flags, _, rows in alternatives(config, 8, rows=2)}
    assert (given["--rows=1"], given["--rows=4"], given["--config.model.remat=dots"]) == (1, 4, 2)


@pytest.mark.parametrize(
    ("message", "without"),
    [
        ("Ran out of memory. Used 23.50G of 15.75G hbm.", True),
        ("the total memory required for HLO temporaries (23.50G) exceeds available HBM", False),
    ],
)
def test_what_the_compiler_finds_no_room_for_is_told(message, without, found):
    class Lowered:
        def compile(self):
            raise RuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    class Function:
        def lower(self, *inputs):
            return Lowered()

    program = found.planned.programs[0]._replace(function=Function())
    with pytest.raises(TooLargeError) as error:
        estimate(found.planned, program, found.planned.layout.mesh, None)
    held = 0 if without else sum(found.estimates[0].held.values())
    assert error.value.needed == int(23.5 * 2**30) + held


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v7:2x2", "should be one of v4, v5e, v5p, v6e, as in v5p:4x4x4; or cpu:8, or gpu"),
        ("v5p", "should be one of"),
        ("cpu:2x2", "CPUs have a number alone"),
        ("cpu:900", "JAX was loaded with 8 CPU devices"),
    ],
)
def test_topologies_that_there_are_not(topology, message):
    with pytest.raises(UserError, match=re.escape(message)):
        machines.devices_of(topology)


def test_without_the_compiler_for_tpus(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="which needs no TPU: pip install 'jaxpref\\[tpu\\]'"):
        machines.devices_of("v5p:2x2x4")


PLAN = [sys.executable, "-m", "jaxpref.plan"]


@pytest.mark.process
def test_the_command(tmp_path):
    output = tmp_path / "plan.json"
    flags = ["--config=configs/quickstart.py:dpo", "--config.model.init_from=", "--topology=cpu:4"]
    flags += ["--config.mesh.fsdp=4", "--config.mesh.data=1", f"--output={output}"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    run = partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True)
    done = run([*PLAN, *flags], check=False)
    assert done.returncode == 0, done.stderr
    assert "memory at most" in done.stdout
    assert "4 devices, mesh data 1 x fsdp 4 x tensor 1; 64 examples a step" in done.stdout
    assert json.loads(output.read_text())["given"]["devices"] == 4
    missing = run([*PLAN, "--config=configs/quickstart.py:dpo"], check=False)
    assert missing.returncode == 2
    assert "--topology is missing" in missing.stderr


# Each makes the inputs, compiles, and measures what the process takes on top while programs run.
MEASURE = """
import jax, jax.numpy as jnp, numpy as np
from jaxpref import sharding
from jaxpref.plan.estimate import estimate
from jaxpref.plan.programs import plan_run
from jaxpref.sampling import decode
from test_train import small

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return 1024 * int(line.split()[1])

def measured(function):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    jax.block_until_ready(function())
    return status("VmHWM") - before

def zeros(tree):
    values = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    places = jax.tree.map(lambda x: x.sharding, tree)
    return jax.block_until_ready(jax.device_put(values, places))

def executable(program):
    with sharding.use(mesh, program.rules):
        return program.function.lower(*program.inputs).compile()

shape = dict(model__width=256, model__layers=4, model__feed_forward=1024, model__heads=4,
             model__kv_heads=4, model__head_dim=64, model__vocabulary_size=8192,
             data__max_length=512)
mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
"""

UPDATE = """
config = small(**shape, data__row_length=512, model__remat="none")
planned = plan_run(config, mesh, rows=16)
(program,) = planned.programs
found = estimate(planned, program, mesh, None)
update, inputs = executable(program), zeros(program.inputs)
print(measured(lambda: update(*inputs)), found.peak - sum(found.held.values()))
"""

# The copy of the parameters, the prompts in the first room, and decoding in the larger one.
SAMPLING = """
config = small("grpo", **shape, reward__function="test_plan:reward", sampling__samples=8,
               sampling__max_new_tokens=64, data__batch_size=32, data__synthetic_pairs=120)
planned = plan_run(config, mesh)
programs = {program.name: program for program in planned.programs}
sampling = [programs[name] for name in planned.sampling]
found = [estimate(planned, program, mesh, None) for program in sampling]
others, layer, read, loop = map(executable, sampling)
params = zeros([program.inputs[2] for program in sampling[:2]])
prompts, table = zeros(sampling[2].inputs[4:7]), zeros(sampling[2].inputs[7])
room = jax.tree.leaves(sampling[-1].inputs[3].cache.places.own)[0].shape[-1]
bound = jnp.asarray(64, jnp.int32)

def sampled():
    weights = others(params[0])
    for number in range(config.model.layers):
        weights[f"layers_{number}"] = layer(params[1], np.int32(number))
    rows = read(weights, *prompts, table)
    assert rows.cache.places.own.shape[-1] < room
    # Accelerators take room when they are asked to compute, CPUs when they do.
    rows = jax.block_until_ready(decode.widen(rows, room))
    # There are fewer prompts than the first bound, so that the loop runs up to the second.
    return loop(weights, rows, bound, bound, table)

beside = sum(size for name, size in found[0].held.items())
print(measured(sampled), max(each.peak for each in found) - beside)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="it reads what Linux says of a process")
@pytest.mark.parametrize("measured", [UPDATE, SAMPLING], ids=["update", "sampling"])
def test_the_memory_of_a_plan_is_what_a_run_takes(measured):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + measured],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    taken, planned = map(int, done.stdout.split())
    assert planned > 2e8
    assert abs(taken - planned) < 0.2 * planned


def test_bytes_of_a_device():
    mesh = sharding.make_mesh(2, 2, 2, devices=jax.devices()[:8])
    spec = jax.sharding.NamedSharding(mesh, P(None, "fsdp"))
    tree = {"a": jax.ShapeDtypeStruct((6, 8), jnp.bfloat16, sharding=spec), "b": {}}
    assert bytes_of(tree) == 6 * 4 * 2
