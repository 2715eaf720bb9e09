"""Samples responses to a file's prompts: `python -m jaxpref.generate`.

    python -m jaxpref.generate --model=W --prompts=prompts.jsonl --output=generated.jsonl

W is a run's workdir, or a Hugging Face directory or hub name, of a language model. The prompts
may be records of any format; of those with responses the prompt is taken. Each line of the output
is a record with all that it had, and with `prompt`, `responses`, `finish` and `logps`, which
`python -m jaxpref.score` reads. The same command goes on where it was stopped.
"""

from absl import app, flags

from jaxpref.commands import CHAT_TEMPLATE, MODEL, OUTPUT, fail, format_flag, quiet, told
from jaxpref.knobs import DATA_FORMATS

# --help shows these, too.
flags.declare_key_flag("model")
flags.declare_key_flag("output")
flags.declare_key_flag("chat_template")
_PROMPTS = flags.DEFINE_string("prompts", None, "File, or hub name, with prompts.")
_FORMAT = format_flag(DATA_FORMATS)
flags.declare_key_flag("format")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Responses to each prompt.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many tokens, the likeliest; 0 for all.")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Draw from the likeliest tokens that together have this probability."
)
_MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Draw from tokens at least this share as likely as the likeliest."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 128, "A response is cut after so many tokens.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random numbers.")
_MAX_PROMPT_LENGTH = flags.DEFINE_integer(
    "max_prompt_length", 0, "Tokens of a prompt. 0: the run's, or 1,024.", lower_bound=0
)
_ON_LONG_PROMPT = flags.DEFINE_enum(
    "on_long_prompt",
    "error",
    ["error", "truncate", "skip"],
    "What becomes of longer prompts: refused, cut to their last tokens, or left out and counted.",
)
_AT_ONCE = flags.DEFINE_integer("at_once", 16, "Prompts that are decoded together.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the model. By default the run's, or float32."
)
_CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype", None, ["float32", "bfloat16"], "Of the KV cache. By default the model's."
)


def main(argv: list[str]) -> None:
    """Hands the flags to `evaluation.generate_file`."""
    if len(argv) > 1:
        fail(f"unexpected arguments: {' '.join(argv[1:])}; flags look like --model=DIR.")
    if not MODEL.value or not _PROMPTS.value or not OUTPUT.value:
        fail("give --model=W, a language model's workdir, --prompts=FILE and --output=FILE.")
    quiet()
    with told():
        # JAX loads here, so that wrong flags answer at once.
        from jaxpref import evaluation
        from jaxpref.sampling import Sampling
        from jaxpref.terminal import console, listed

        written = evaluation.generate_file(
            MODEL.value,
            _PROMPTS.value,
            OUTPUT.value,
            Sampling(
                samples=_SAMPLES.value,
                max_new_tokens=_MAX_NEW_TOKENS.value,
                temperature=_TEMPERATURE.value,
                top_k=_TOP_K.value,
                top_p=_TOP_P.value,
                min_p=_MIN_P.value,
                cache_dtype=_CACHE_DTYPE.value,
            ),
            seed=_SEED.value,
            data_format=_FORMAT.value,
            chat_template=CHAT_TEMPLATE.value,
            max_prompt_length=_MAX_PROMPT_LENGTH.value,
            on_long_prompt=_ON_LONG_PROMPT.value,
            at_once=_AT_ONCE.value,
            dtype=_DTYPE.value or "",
        )
        console.print(f"{OUTPUT.value}: {written.prompts:,} prompts{listed(written.counts)}")


if __name__ == "__main__":
    app.run(main)
