"""Scores a file's responses with a reward model: `python -m jaxpref.score`.

    python -m jaxpref.score --model=W --input=pairs.jsonl --output=scored.jsonl

W is the workdir of a run of algorithm `reward`, or a Hugging Face directory or hub name with a
sequence classifier that has one label. The input is read like `data.path`. Each line of the
output is a record with all that it had, and with its prompt, its responses and their scores; so
what was scored is a ranking to train on.
"""

from absl import app, flags

from jaxpref.commands import OUTPUT, fail, no_room, quiet
from jaxpref.errors import UserError
from jaxpref.knobs import DATA_FORMATS

# --help shows this one as well.
flags.declare_key_flag("output")
_MODEL = flags.DEFINE_string("model", None, "A reward model's workdir, directory or hub name.")
_INPUT = flags.DEFINE_string("input", None, "File, or hub name, with prompts and responses.")
_FORMAT = flags.DEFINE_enum(
    "format",
    "auto",
    [name for name in DATA_FORMATS if name != "synthetic"],
    "See data.format; auto goes by the columns.",
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "Rows of tokens scored at a time.", lower_bound=1
)
_CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template", "", "See tokenizer.chat_template. Empty: the run's, or the tokenizer's own."
)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", 0, "Tokens of prompt plus response. 0: the run's, or 1,024.", lower_bound=0
)


def main(argv: list[str]) -> None:
    """Hands the flags to `evaluation.score_file`."""
    if len(argv) > 1:
        fail(f"unexpected arguments: {' '.join(argv[1:])}; flags look like --model=DIR.")
    if not _MODEL.value or not _INPUT.value or not OUTPUT.value:
        fail("give --model=W, a reward model's workdir, --input=FILE and --output=FILE.")
    quiet()
    # JAX loads here, so that wrong flags answer at once.
    from jaxpref import evaluation
    from jaxpref.terminal import console

    try:
        scored = evaluation.score_file(
            _MODEL.value,
            _INPUT.value,
            OUTPUT.value,
            data_format=_FORMAT.value,
            batch_size=_BATCH_SIZE.value,
            max_length=_MAX_LENGTH.value,
            chat_template=_CHAT_TEMPLATE.value,
        )
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if (message := no_room(error)) is None:
            raise
        fail(message)
    counts = "".join(f", {n:,} {name.replace('_', ' ')}" for name, n in scored.counts.items() if n)
    console.print(f"{OUTPUT.value}: {scored.prompts:,} prompts scored{counts}")


if __name__ == "__main__":
    app.run(main)
