"""Scores a file's responses: `python -m jaxpref.score`.

    python -m jaxpref.score --model=W --input=pairs.jsonl --output=scored.jsonl

W is the workdir of a run of algorithm `reward`, or a Hugging Face directory or hub name with a
sequence classifier that has one label; or the workdir of a run of DPO, or of another method that
compares its policy with a reference, for the implicit reward. The input is read like `data.path`.
Each line of the output is a record with all that it had, and with its prompt, its responses and
their scores; so what was scored is a ranking to train on. With --format=reward_bench it reads a
file of RewardBench, and prints the benchmark's table, too.
"""

from absl import app, flags

from jaxpref.commands import CHAT_TEMPLATE, MODEL, OUTPUT, fail, format_flag, quiet, told
from jaxpref.knobs import DATA_FORMATS

# --help shows these, too.
flags.declare_key_flag("model")
flags.declare_key_flag("output")
flags.declare_key_flag("chat_template")
_INPUT = flags.DEFINE_string("input", None, "File, or hub name, with prompts and responses.")
_FORMAT = format_flag(DATA_FORMATS)
flags.declare_key_flag("format")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "Rows of tokens scored at a time.", lower_bound=1
)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", 0, "Tokens of prompt plus response. 0: the run's, or 1,024.", lower_bound=0
)


def main(argv: list[str]) -> None:
    """Hands the flags to `evaluation.score_file`."""
    if len(argv) > 1:
        fail(f"unexpected arguments: {' '.join(argv[1:])}; flags look like --model=DIR.")
    if not MODEL.value or not _INPUT.value or not OUTPUT.value:
        fail("give --model=W, of a reward model or a DPO run, --input=FILE and --output=FILE.")
    quiet()
    with told():
        # JAX loads here, so that wrong flags answer at once.
        from jaxpref import evaluation
        from jaxpref.terminal import console, listed

        scored = evaluation.score_file(
            MODEL.value,
            _INPUT.value,
            OUTPUT.value,
            data_format=_FORMAT.value,
            batch_size=_BATCH_SIZE.value,
            max_length=_MAX_LENGTH.value,
            chat_template=CHAT_TEMPLATE.value,
        )
        if scored.benchmark is not None:
            console.print(evaluation.reward_bench.report(scored.benchmark))
        console.print(f"{OUTPUT.value}: {scored.prompts:,} prompts scored{listed(scored.counts)}")


if __name__ == "__main__":
    app.run(main)
