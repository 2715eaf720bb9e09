"""Writes a run's model for everybody else: `python -m jaxpref.export --workdir=W --output=DIR`.

DIR is in Hugging Face's layout: transformers, vLLM and llama.cpp read it.
"""

from pathlib import Path

from absl import app, flags

from jaxpref import config as config_lib
from jaxpref.commands import OUTPUT, WORKDIR, fail, quiet, told
from jaxpref.errors import UserError
from jaxpref.workdir import AnyPath, as_folder, as_path

# --help shows these two as well.
flags.declare_key_flag("workdir")
flags.declare_key_flag("output")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Of all weights. By default those that they had where the run began, else float32.",
)

_ADAPTERS = flags.DEFINE_bool(
    "adapters", False, "Write the adapters alone, in PEFT's format, rather than merged weights."
)
_STEP = flags.DEFINE_string(
    "step", "", "Of which checkpoint: a step, or best (see train.best_metric). By default the last."
)
_BASE = flags.DEFINE_string(
    "base",
    "",
    "With --adapters: the directory or hub name of the model that they belong to. By default "
    "where the run began.",
)


def main(argv: list[str]) -> None:
    """Hands the flags to `run`."""
    if len(argv) > 1:
        fail(f"unexpected arguments: {' '.join(argv[1:])}; flags look like --workdir=DIR.")
    if not WORKDIR.value or not OUTPUT.value:
        fail("give --workdir=W, a run's workdir, and --output=DIR, the directory to write.")
    if _BASE.value and not _ADAPTERS.value:
        fail("--base belongs to --adapters; merged weights have no base.")
    quiet()
    with told():
        run(
            WORKDIR.value,
            OUTPUT.value,
            _DTYPE.value,
            adapters=_ADAPTERS.value,
            base=_BASE.value,
            step=_STEP.value,
        )


def run(
    workdir: str | AnyPath,
    output: str | Path,
    dtype: str | None = None,
    *,
    adapters: bool = False,
    base: str = "",
    step: str = "",
) -> None:
    """Writes the model of a workdir's checkpoint in Hugging Face's layout.

    Args:
      workdir: of a run.
      output: the directory; must not hold anything yet.
      dtype: of all weights; by default as where the run began.
      adapters: write the adapters alone, in PEFT's format, instead of merging them.
      base: of the adapters: the directory or hub name of the model that they belong to; by
        default where the run began.
      step: of the checkpoint, or "best"; by default the last.

    Raises:
      UserError: there is no checkpoint, the output is not empty or cannot be written, or it is
        not known which model the adapters belong to.
    """
    # JAX loads here, so that wrong flags answer at once.
    from jaxpref import checkpoint, data, identity, models, sharding, weights
    from jaxpref.models import huggingface
    from jaxpref.terminal import console

    workdir, output = as_path(workdir), as_folder(output, "--output")
    described = identity.read(workdir)
    if described is None or checkpoint.latest_step(workdir) is None:
        raise UserError(f"--workdir={workdir}: holds no run with a complete checkpoint.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output}: is not empty; give a new directory.")
    config = config_lib.from_flat(described)
    source, tokenizer, model = weights.open_run(config, workdir)
    if adapters:
        base = base or weights.base_of(workdir)
    mesh = sharding.make_mesh(data=1, fsdp=-1)
    abstract = huggingface.abstract_params(model, mesh)
    params, found = checkpoint.restore_params(workdir, abstract, step)
    if adapters:
        models.save_adapters(model, params, output, base)
        if model.config.scalar_head:
            tokenizer, note = models.padding_beside_adapters(model, tokenizer)
            console.print(note)
        tokenizer.save_pretrained(output)
        console.print(f"{workdir}, step {found}: adapters of {base} written to {output}")
        return
    model, params = models.merge_adapters(model, models.dequantize(params))
    # A model's own tokenizer files go along as they are.
    own = source.pretrained is not None and config.tokenizer.name == "auto"
    huggingface.save_pretrained(
        model,
        params,
        output,
        # A reward model's may need another padding token.
        tokenizer=None if own and not model.config.scalar_head else tokenizer,
        dtype=dtype,
        stop_ids=data.stop_ids(tokenizer),
    )
    if own and config.tokenizer.chat_template:
        (output / "chat_template.jinja").write_text(tokenizer.chat_template)
    family = model.origin.family
    kind = family.classifier if model.config.scalar_head else family.architecture
    console.print(f"{workdir}, step {found}: written to {output} as {kind}")


if __name__ == "__main__":
    app.run(main)
