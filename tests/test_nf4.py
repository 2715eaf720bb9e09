"""Four-bit weights, and training adapters on a base that has them."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_weights import QWEN3, small, write_model

from jaxpref import checkpoint, config as config_lib, export, metrics, models, nf4, sharding, train
from jaxpref.models import Lora, huggingface

pytestmark = pytest.mark.usefixtures("one_device")

WIDE = {**QWEN3, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}


def test_levels_are_those_of_the_paper():
    """A few of the sixteen values of appendix E, to its printed digits."""
    levels = nf4.levels()
    assert len(levels) == 16
    assert levels[[0, 7, 15]].tolist() == [-1, 0, 1]
    np.testing.assert_allclose(
        levels[[1, 6, 8, 14]], [-0.69619280, -0.09105004, 0.07958030, 0.72295684], atol=1e-4
    )


def test_each_value_becomes_the_nearest_level_of_its_block():
    x = jax.random.normal(jax.random.key(0), (3, 4, 128))
    stored = nf4.quantize(x)
    assert stored.codes.shape == (3, 4, 64)
    assert stored.scales.shape == (3, 4, 2)
    back = np.asarray(stored.dequantize("float32"))
    scales = np.repeat(np.asarray(stored.scales, np.float32), 64, axis=-1)
    exact = np.repeat(np.abs(np.asarray(x)).reshape(3, 4, 2, 64).max(-1), 64, axis=-1)
    distances = np.abs(np.asarray(x)[..., None] / exact[..., None] - nf4.levels())
    np.testing.assert_allclose(back, nf4.levels()[distances.argmin(-1)] * scales, rtol=1e-6)
    assert np.sqrt(np.mean((back - x) ** 2) / np.mean(x**2)) < 0.1


def test_rounding_twice_changes_nothing():
    once = nf4.quantize(jax.random.normal(jax.random.key(1), (5, 64)))
    twice = nf4.quantize(once.dequantize("float32"))
    np.testing.assert_array_equal(once.codes, twice.codes)
    np.testing.assert_array_equal(once.scales, twice.scales)


def test_a_block_of_zeros_stays_zero():
    stored = nf4.quantize(jnp.zeros((2, 64)))
    assert not stored.dequantize("float32").any()


@pytest.mark.parametrize(("shape", "fits"), [((2, 64), True), ((2, 32), True), ((64,), False)])
def test_what_fits(shape, fits):
    assert nf4.fits(shape) == fits
    assert not nf4.fits((2, 96))
    assert not nf4.fits((2, 7))


def test_abstract_says_what_quantize_gives():
    mesh = sharding.make_mesh(1, 4, 2)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    x = jax.device_put(jnp.ones((8, 128)), where)
    shapes = nf4.abstract(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where))
    stored = nf4.quantize(x)
    for ours, said in zip(jax.tree.leaves(stored), jax.tree.leaves(shapes), strict=True):
        assert (ours.shape, ours.dtype) == (said.shape, said.dtype)
        assert said.sharding.shard_shape(said.shape)[0] == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4")
    write_model(folder / "hf", WIDE)
    train.run(quantized(folder / "hf"), folder / "run")
    return folder


def quantized(source, **changes):
    settings = {"reference__mode": "adapter", "model__frozen_dtype": "nf4", "model__lora__rank": 2}
    return small("dpo", source, **{**settings, **changes})


def test_the_base_takes_four_bits_and_the_bits_of_its_scales(folder):
    model = huggingface.read_model(folder / "hf", lora=Lora(2))
    params, _ = checkpoint.restore_params(folder / "run", huggingface.abstract_params(model))
    query = params["layers"]["query"]
    assert isinstance(query, nf4.Nf4)
    # Heads of 32 make blocks of 32: 4 bits a weight, and 16 for each 32.
    weights = 2 * 64 * 2 * 32
    assert query.codes.nbytes + query.scales.nbytes == weights * (4 + 16 / 32) / 8
    assert params["embedding"].dtype == jnp.bfloat16
    assert params["layers"]["query_lora_a"].dtype == jnp.float32


@pytest.mark.long
def test_training_lowers_the_loss_and_resumes_bit_for_bit(folder, tmp_path):
    lines = metrics.read(folder / "run" / "metrics.jsonl")
    assert lines[0]["eval/loss"] == pytest.approx(np.log(2), rel=1e-3)
    assert lines[-1]["eval/loss"] != pytest.approx(np.log(2), rel=1e-4)
    whole = quantized(folder / "hf", train__steps=3)
    train.run(whole, tmp_path / "whole")
    shutil.copytree(folder / "run", tmp_path / "parts")
    train.run(whole, tmp_path / "parts")
    abstract = huggingface.abstract_params(huggingface.read_model(folder / "hf", lora=Lora(2)))
    (one, _), (other, _) = (
        checkpoint.restore_params(tmp_path / name, abstract) for name in ("whole", "parts")
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_merged_export_is_the_model_that_was_trained(folder, tmp_path):
    export.run(folder / "run", tmp_path / "out")
    merged, weights = models.from_pretrained(tmp_path / "out")
    model = huggingface.read_model(folder / "hf", lora=Lora(2))
    params, _ = checkpoint.restore_params(folder / "run", huggingface.abstract_params(model))
    tokens = np.arange(12, dtype=np.int32)[None]
    np.testing.assert_allclose(
        merged.apply({"params": weights}, tokens),
        model.apply({"params": params}, tokens),
        atol=2e-5,
    )


@pytest.mark.long
def test_eight_devices_train_the_four_bit_base_too(folder, tmp_path):
    config = quantized(folder / "hf", mesh__fsdp=2, mesh__tensor=2, mesh__data=2)
    train.run(config, tmp_path)
    one, other = (metrics.read(d / "metrics.jsonl") for d in (folder / "run", tmp_path))
    # What is measured before the first update, gradients too, and that there was one.
    assert one[1]["step"] == other[1]["step"] == 1
    for name in ("loss", "grad_norm", "logps/chosen"):
        assert one[1][name] == pytest.approx(other[1][name], rel=1e-4)
    assert other[-1]["eval/loss"] != pytest.approx(np.log(2), rel=1e-4)


@pytest.mark.long
def test_a_bfloat16_base_is_kept_as_it_is(folder, tmp_path):
    config = quantized(folder / "hf", model__frozen_dtype="bfloat16", train__steps=1)
    train.run(config, tmp_path)
    assert config_lib.trainable(config)
    model = huggingface.read_model(folder / "hf", lora=Lora(2))
    params, _ = checkpoint.restore_params(tmp_path, huggingface.abstract_params(model))
    assert params["layers"]["query"].dtype == jnp.bfloat16
    assert params["embedding"].dtype == jnp.bfloat16
