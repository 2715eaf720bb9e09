"""Scores a file's responses with a trained reward model: `python -m jaxpref.score`.

    python -m jaxpref.score --workdir=W --input=pairs.jsonl --output=scored.jsonl

W is the workdir of a run of algorithm `reward`. The input is read like `data.path` and cut to
the run's lengths. Each line of the output has the place of a record, its prompt, its
responses and their rewards.
"""

import json
from pathlib import Path

from absl import app, flags

from jaxpref import config as config_lib
from jaxpref.commands import OUTPUT, WORKDIR, fail, quiet
from jaxpref.errors import UserError

_INPUT = flags.DEFINE_string("input", None, "File, or hub name, with prompts and responses.")
_FORMAT = flags.DEFINE_string("format", "auto", "See data.format; auto goes by the columns.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Prompts scored at a time.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Hands the flags to `run`."""
    if len(argv) > 1:
        fail(f"unexpected arguments: {' '.join(argv[1:])}; flags look like --workdir=DIR.")
    if not WORKDIR.value or not _INPUT.value or not OUTPUT.value:
        fail("give --workdir=W, a reward model's run, --input=FILE and --output=FILE.")
    quiet()
    try:
        run(
            WORKDIR.value,
            _INPUT.value,
            OUTPUT.value,
            data_format=_FORMAT.value,
            batch_size=_BATCH_SIZE.value,
        )
    except UserError as error:
        fail(str(error))


def run(
    workdir: str | Path,
    path: str,
    output: str | Path,
    *,
    data_format: str = "auto",
    batch_size: int = 64,
) -> None:
    """Writes the rewards of all responses of a file.

    Args:
      workdir: of a run of algorithm `reward`.
      path: what is scored; see `data.path`.
      output: receives one JSON object a record: `where`, `prompt`, `responses`, `rewards`.
      data_format: see `data.format`.
      batch_size: prompts scored at a time.

    Raises:
      UserError: there is no reward model, or the input cannot be read.
    """
    # JAX loads here, so that wrong flags answer at once.
    import jax

    from jaxpref import checkpoint, data, packing, reference, sharding, weights
    from jaxpref.algorithms import response_scalars
    from jaxpref.metrics import console
    from jaxpref.models import huggingface

    workdir, output = Path(workdir), Path(output)
    described = checkpoint.read_run(workdir)
    if described is None or checkpoint.latest_step(workdir) is None:
        raise UserError(f"--workdir={workdir}: holds no run with a complete checkpoint.")
    config = config_lib.from_flat(described)
    if config.algorithm.name != "reward":
        raise UserError(
            f"--workdir={workdir}: is a run of {config.algorithm.name}, not of a reward model."
        )
    if config.data.on_long_prompt == "skip":
        # Every record gets its rewards.
        config.data.on_long_prompt = "truncate"
    source = weights.find(config, workdir)
    name = config.tokenizer.name
    tokenizer = data.load_tokenizer(
        source.tokenizer if name == "auto" else name, config.tokenizer.chat_template
    )
    model = weights.build_model(config, source, len(tokenizer))
    with console.status("tokenising"):
        examples, dataset = data.load_file(config, tokenizer, path, data_format)
    mesh = sharding.make_mesh(**config.mesh)
    params, step = checkpoint.restore_params(workdir, huggingface.abstract_params(model, mesh))
    row_length = config.data.row_length or config.data.max_length
    scored = packing.scored_budget(dataset.prompt_lengths, dataset.response_lengths, row_length)
    budget = packing.Budget(row_length, scored, sharding.batch_shards(mesh))
    stream = data.BatchStream(dataset, batch_size=batch_size, budget=budget)
    rewards = jax.jit(
        lambda batch: response_scalars(model, params, jax.tree.map(lambda x: x[0], batch))
    )
    with sharding.use(mesh), console.status("scoring") as status:
        table = reference.precompute(
            lambda batch: rewards(sharding.put_batch(mesh, batch)),
            stream.once(),
            len(dataset),
            lambda done: status.update(f"scoring: {done} of {len(dataset)} prompts"),
        )
    if jax.process_index() == 0:
        with output.open("w") as file:
            for example, row in zip(examples, table, strict=True):
                prompt = example.prompt
                line = {
                    "where": example.where,
                    "prompt": prompt if isinstance(prompt, str) else list(prompt.messages),
                    "responses": list(example.responses),
                    "rewards": [round(float(x), 6) for x in row[: len(example.responses)]],
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    console.print(f"{workdir}, step {step}: {len(examples)} prompts scored, in {output}")


if __name__ == "__main__":
    app.run(main)
