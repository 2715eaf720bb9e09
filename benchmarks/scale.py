"""What updates take of TPUs that are not here: memory, operations, what chips exchange.

    python benchmarks/scale.py            # about fifteen minutes on two cores, with jaxpref[tpu]

Each row compiles the update that `python -m jaxpref.main` would run, for a model of Llama-3-8B's
shape, and reads the compiled program. The textbook of fully sharded training gathers each weight
forward and backward and scatters its gradient, all in bfloat16, and gathers it once more for a live
reference; the embedding is looked up and does not move. Then come compile times over depth and over
row length, and last the attention of one layer, forward and backward.
"""

import runpy
import time
from pathlib import Path

from jaxpref.plan import machines

CONFIGS = Path(__file__).parent.parent / "configs"
# Topology, mesh, rows a chip, and changes of the config. Without rows the batch is of generated
# pairs, here of micro-batches of 1 row a chip, of which they fill four.
CASES = [
    ("v5p:2x2x4", (1, 16, 1), 1, {}),
    ("v5p:2x2x4", (1, 16, 1), 1, {"data.max_length": 4096, "data.row_length": 4096}),
    ("v5p:2x2x4", (1, 16, 1), 1, {"model.remat": "dots"}),
    ("v5p:2x2x4", (1, 16, 1), 4, {}),
    (
        "v5p:2x2x4",
        (1, 16, 1),
        0,
        {"data.rows": 16, "data.batch_size": 1200, "data.synthetic_pairs": 4000},
    ),
    ("v5p:2x2x4", (1, 4, 4), 1, {}),
    ("v5e:16x16", (16, 16, 1), 1, {}),
    ("v5e:16x16", (8, 32, 1), 1, {}),
    ("v5e:16x16", (1, 256, 1), 1, {}),
]
DEPTHS, LENGTHS = (2, 16, 48), (2048, 8192, 32_768)


def main() -> None:
    """Prints two tables in Markdown."""
    machines.prepare(CASES[0][0])
    print(
        "| case | compiled in s | temporary GB | at most GB | TFLOP | exchanged GB | textbook GB |"
    )
    print("|---|---|---|---|---|---|---|")
    for topology, mesh, rows, changes in CASES:
        found = measure(topology, mesh, rows, changes)
        of_rows = f"{rows} row{'s' * (rows > 1)} a chip" if rows else "4 micro-batches"
        moves = textbook(mesh) * (1 if rows else 4)
        said = ", ".join(f"{k.partition('.')[2]} {v}" for k, v in changes.items())
        print(
            f"| {topology}, {' x '.join(map(str, mesh))}, {of_rows}"
            f"{', ' * bool(said)}{said} | {found.compiling:.0f} | "
            f"{(found.peak - sum(found.held.values())) / 1e9:.2f} | {found.peak / 1e9:.2f} | "
            f"{found.operations / 1e12:.0f} | {sum(found.exchanged.values()) / 1e9:.1f} "
            f"({', '.join(f'{k} {v / 1e9:.1f}' for k, v in found.exchanged.items())}) | "
            f"{moves / 1e9:.1f} |",
            flush=True,
        )
    print("\n| layers | tokens of a row | compiled in s |\n|---|---|---|")
    for layers in DEPTHS:
        found = measure("v5p:2x2x4", (1, 16, 1), 1, {"model.layers": layers})
        print(f"| {layers} | 2048 | {found.compiling:.0f} |", flush=True)
    for length in LENGTHS:
        changes = {"model.layers": 2, "data.max_length": length, "data.row_length": length}
        found = measure("v5p:2x2x4", (1, 16, 1), 1, changes)
        print(f"| 2 | {length} | {found.compiling:.0f} |", flush=True)
    print("\n| rows of | compiled in s | temporary GB | moved GB |\n|---|---|---|---|")
    for length in (2048, 4096, 8192, 32_768):
        print(f"| {length} | {attention(length)} |", flush=True)


def measure(topology: str, sizes: tuple[int, int, int], rows: int, changes: dict):
    """The estimate of the update."""
    from jaxpref import sharding
    from jaxpref.plan.estimate import estimate
    from jaxpref.plan.programs import plan_run

    devices, chip = machines.devices_of(topology)
    config = runpy.run_path(str(CONFIGS / "shapes.py"))["get_config"]("llama3_8b,dpo")
    config.update_from_flattened_dict(changes)
    mesh = sharding.make_mesh(*sizes, devices=devices)
    planned = plan_run(config, mesh, rows)
    return estimate(planned, planned.programs[0], mesh, chip)


def attention(length: int, rows: int = 4, heads: int = 32, kv_heads: int = 8) -> str:
    """What attention of packed rows takes of one v5p chip, forward and backward; cells of a row."""
    import jax
    import jax.numpy as jnp

    from jaxpref import sharding
    from jaxpref.models.splash import splash_attention
    from jaxpref.packing import Alignment, Seats, Tree
    from jaxpref.plan.hlo import Program

    devices, _ = machines.devices_of("v5p:2x2x1")
    mesh = sharding.make_mesh(1, devices=devices[:1])

    def loss(query, key, value, group, branch):
        seats = Seats(jnp.arange(length), branch, Tree(group, branch, Alignment.of(length)))
        return splash_attention(query, key, value, seats).astype(jnp.float32).sum()

    place = jax.NamedSharding(mesh, jax.P())
    shapes = [(rows, length, count, 128) for count in (heads, kv_heads, kv_heads)]
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    given += [jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=place)] * 2
    began = time.monotonic()
    with sharding.use(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*given).compile()
    took = time.monotonic() - began
    temporary = compiled.memory_analysis().temp_size_in_bytes
    moved = Program(compiled.as_text()).moved()
    return f"{took:.0f} | {temporary / 1e9:.2f} | {moved / 1e9:.1f}"


def textbook(sizes: tuple[int, int, int]) -> float:
    """Bytes that a chip receives of weights and of their gradients; see above."""
    shape = runpy.run_path(str(CONFIGS / "shapes.py"))["SHAPES"]["llama3_8b"]
    width, heads, kv_heads = shape["width"], shape["heads"], shape["kv_heads"]
    attention = 2 * width * (heads + kv_heads) * shape["head_dim"]
    layer = attention + 3 * width * shape["feed_forward"]
    head = shape["vocabulary_size"] * width
    _, fsdp, tensor = sizes
    share = (1 - 1 / fsdp) / tensor
    # The head's gradient is scattered in float32.
    return share * (4 * 2 * (shape["layers"] * layer + head) + 2 * head)


if __name__ == "__main__":
    main()
