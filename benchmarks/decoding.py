"""Decoding: tokens per second against transformers' `generate`, and what the tree saves.

    python benchmarks/decoding.py

A 17M-parameter Llama (384 wide, 6 layers, 6 heads, feed-forward 1024, vocabulary 16,384) with
random weights, float32, on the CPU:

- `transformers`: batch 32, prompts of 64 tokens, 128 new ones, sampled at temperature 1, against
  `generate` of transformers on torch with the same weights (it needs the `torch` extra);
- `tree`: 8 samples of a prompt of 256 tokens against 8 rows with a prompt each, and 16 to 128 new
  tokens;
- `seats`: 64 prompts in 16 seats that are filled again, against four batches of 16, where
  responses have stop tokens and so differ in length.

Both sides run in one process and take turns; times are medians. It also prints what the decode
loop keeps in memory beside its cache and weights, as XLA plans it: a loop that copied the cache
would keep it twice.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import describe_machine

from jaxpref import models, sampling
from jaxpref.sampling import Sampler, Sampling, decode

VOCABULARY, WIDTH, LAYERS, HEADS, INNER = 16_384, 384, 6, 6, 1_024
TURNS = 3


def build() -> tuple[models.Decoder, Any]:
    """The model and its random weights."""
    config = models.DecoderConfig(
        vocabulary_size=VOCABULARY,
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=WIDTH // HEADS,
        feed_forward=INNER,
        rope=(models.make_rope(head_dim=WIDTH // HEADS),),
    )
    model = models.Decoder(config)
    return model, jax.jit(lambda key: models.init_params(model, key))(jax.random.key(0))


def in_transformers(params: Any) -> Any:
    """The same model in transformers."""
    import torch
    import transformers

    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    twin = transformers.LlamaForCausalLM(shape).eval()
    stacked = params["layers"]
    names = {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
    }
    with torch.no_grad():
        twin.model.embed_tokens.weight.copy_(torch.tensor(np.asarray(params["embedding"])))
        for i, layer in enumerate(twin.model.layers):
            for ours, theirs in names.items():
                weight = np.asarray(stacked[ours][i]).reshape(WIDTH, -1).T
                layer.get_submodule(theirs).weight.copy_(torch.tensor(weight.copy()))
            out = np.asarray(stacked["out"][i]).reshape(-1, WIDTH).T
            layer.self_attn.o_proj.weight.copy_(torch.tensor(out.copy()))
            down = np.asarray(stacked["down"][i]).T
            layer.mlp.down_proj.weight.copy_(torch.tensor(down.copy()))
    return twin


def medians(*sides: Callable[[], Any]) -> list[float]:
    """Seconds of each side, which take turns; the first turn, which compiles, does not count."""
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(TURNS + 1):
        for side, of_side in zip(sides, times, strict=True):
            began = time.perf_counter()
            side()
            if turn:
                of_side.append(time.perf_counter() - began)
    return [statistics.median(of_side) for of_side in times]


def prompts_of(rng: np.random.Generator, count: int, length: int) -> list[np.ndarray]:
    return list(rng.integers(2, VOCABULARY, (count, length), dtype=np.int32))


def against_transformers(model: models.Decoder, params: Any, rng: np.random.Generator) -> None:
    try:
        import torch
    except ImportError:
        print("transformers: skipped, torch is not installed")
        return
    twin = in_transformers(params)
    check = prompts_of(rng, 2, 16)
    logits = model.apply({"params": params}, np.stack(check))
    with torch.no_grad():
        theirs = twin(torch.tensor(np.stack(check)).long()).logits.numpy()
    print(f"largest difference of logits {np.abs(np.asarray(logits) - theirs).max():.1e}")
    rows, length, new = 32, 64, 128
    prompts = prompts_of(rng, rows, length)
    sampler = Sampler(model, Sampling(max_new_tokens=new), prompt_length=length)
    weights = sampler.prepare(params)
    ids = torch.tensor(np.stack(prompts)).long()
    mask = torch.ones_like(ids)

    def ours() -> None:
        assert (sampler(weights, prompts, sampling.prompt_keys(0, 0, rows)).lengths == new).all()

    def theirs() -> None:
        with torch.no_grad():
            said = twin.generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=True, top_k=0
            )
        assert said.shape == (rows, length + new)

    mine, other = medians(ours, theirs)
    tokens = rows * new
    print(
        f"transformers, {rows} rows, prompts of {length}, {new} new tokens: "
        f"{tokens / mine:,.0f} tokens/s against {tokens / other:,.0f}: {other / mine:.2f} times"
    )


def tree_against_rows(model: models.Decoder, params: Any, rng: np.random.Generator) -> None:
    (prompt,) = prompts_of(rng, 1, 256)
    for new in (16, 32, 64, 128):
        tree = Sampler(model, Sampling(samples=8, max_new_tokens=new), prompt_length=256)
        rows = Sampler(model, Sampling(max_new_tokens=new), prompt_length=256)
        weights = tree.prepare(params)
        one, each = medians(
            partial(tree, weights, [prompt], sampling.prompt_keys(0, 0, 1)),
            partial(rows, weights, [prompt] * 8, sampling.prompt_keys(0, 0, 8)),
        )
        print(
            f"tree, 8 samples of a prompt of 256, {new} new tokens: {one:.3f} s against "
            f"{each:.3f} s in 8 rows: {each / one:.2f} times"
        )


def seats(model: models.Decoder, params: Any, rng: np.random.Generator) -> None:
    prompts = prompts_of(rng, 64, 64)
    # With these stops a response ends after 32 tokens on average, if it is not cut.
    stops = tuple(range(2, 2 + VOCABULARY // 32))
    settings = Sampling(max_new_tokens=128, stops=stops)
    keys = sampling.prompt_keys(0, 0, len(prompts))
    refilled = Sampler(model, settings, at_once=16, prompt_length=64)
    batches = Sampler(model, settings, prompt_length=64)
    weights = refilled.prepare(params)

    def in_batches() -> list[Any]:
        return [
            batches(weights, prompts[i : i + 16], keys[i : i + 16])
            for i in range(0, len(prompts), 16)
        ]

    together = refilled(weights, prompts, keys)
    apart = np.concatenate([part.tokens for part in in_batches()])
    print(
        f"seats: lengths {together.lengths.mean():.0f} on average, up to {together.lengths.max()}; "
        f"{(together.tokens == apart).all(axis=(1, 2)).mean():.3f} of the responses are the same"
    )
    one, each = medians(lambda: refilled(weights, prompts, keys), in_batches)
    print(
        f"seats, 64 prompts in 16 seats: {one:.2f} s against {each:.2f} s in batches: "
        f"{each / one:.2f} times"
    )


def memory(model: models.Decoder, params: Any, rng: np.random.Generator) -> None:
    settings = Sampling(max_new_tokens=513)
    sampler = Sampler(model, settings, prompt_length=64)
    weights = sampler.prepare(params)
    prompts = prompts_of(rng, 32, 64)
    keys = sampling.prompt_keys(0, 0, 32)
    table = sampler._table(64)
    rows = sampler._begin(weights, prompts, keys, 64, range(32), 32, 512, table=table)
    bounds = jnp.asarray(32), jnp.asarray(512)
    compiled = decode.decode.lower(
        sampler.decoder, settings, weights, rows, *bounds, table
    ).compile()
    plan = compiled.memory_analysis()
    cache = sum(x.nbytes for x in jax.tree.leaves(rows.cache.layers))
    print(
        f"memory: the cache takes {cache / 1e6:.0f} MB, the weights "
        f"{sum(x.nbytes for x in jax.tree.leaves(weights)) / 1e6:.0f} MB; the decode loop plans "
        f"{plan.temp_size_in_bytes / 1e6:.1f} MB beside its arguments and results"
    )


def main() -> None:
    print(describe_machine())
    model, params = build()
    rng = np.random.default_rng(0)
    memory(model, params, rng)
    tree_against_rows(model, params, rng)
    seats(model, params, rng)
    against_transformers(model, params, rng)


if __name__ == "__main__":
    main()
