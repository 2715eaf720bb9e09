"""Says which of two files of responses is better: `python -m jaxpref.judge`.

    python -m jaxpref.judge --a=ours.jsonl --b=theirs.jsonl --judge=J --output=judged.jsonl

The files are what `python -m jaxpref.generate` writes, or AlpacaEval's; a policy's workdir, or a
Hugging Face directory or hub name, in place of one is sampled first. J is a reward model (a
workdir, directory or hub name), `module:function`, `endpoint:MODEL`, or `terminal` for a person.
Each line of the output is a prompt with its verdicts; the summary, which is also printed, is beside
it. The same command goes on where it was stopped.
"""

import json

from absl import app, flags

from jaxpref.commands import CHAT_TEMPLATE, OUTPUT, fail, quiet, told

# --help shows these, too.
flags.declare_key_flag("output")
flags.declare_key_flag("chat_template")
_A = flags.DEFINE_string("a", None, "File of responses, or a policy, whose win rate is asked for.")
_B = flags.DEFINE_string("b", None, "File of responses, or a policy, to compare with.")
_JUDGE = flags.DEFINE_string(
    "judge", None, "A reward model, module:function, endpoint:MODEL, or terminal."
)
_COMPARE = flags.DEFINE_string(
    "compare", "", "Output of another judging of the same responses: how much do both agree?"
)
_SEED = flags.DEFINE_integer("seed", 0, "Of samples, a person's orders, and intervals.")
# Of an endpoint.
_BASE_URL = flags.DEFINE_string(
    "base_url", "", "Of the endpoint, such as http://localhost:8000/v1. Empty: OpenAI's."
)
_TEMPLATE = flags.DEFINE_string(
    "template",
    "chat",
    "What the endpoint is asked: summary, summary_concise, dialogue, chat, chat_graded, "
    "chat_letter, or a file with {prompt}, {first} and {second}.",
)
_LOGPROBS = flags.DEFINE_bool(
    "logprobs", False, "Take the probability of the endpoint's letter as the score."
)
_AT_ONCE = flags.DEFINE_integer(
    "at_once", 16, "Questions to the endpoint that are under way at a time.", lower_bound=1
)
_ATTEMPTS = flags.DEFINE_integer(
    "attempts", 3, "How often a question is asked whose answer has no verdict.", lower_bound=1
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 0, "Of an endpoint's answer. 0: what fits the template.", lower_bound=0
)
_MAX_REQUESTS = flags.DEFINE_integer(
    "max_requests", 0, "The most questions the endpoint is asked. 0: any number.", lower_bound=0
)
_PRICE = flags.DEFINE_list(
    "price", None, "IN,OUT: dollars for a million tokens that go in, and that come out."
)
_TIMEOUT = flags.DEFINE_float(
    "timeout", 120.0, "Seconds until a request counts as lost.", lower_bound=0.1
)
_REQUEST = flags.DEFINE_string(
    "request",
    "{}",
    "JSON object of further fields of a request; null leaves one out, as in "
    '{"max_tokens": null, "max_completion_tokens": 2000}.',
)
# Of a policy that is sampled.
_PROMPTS = flags.DEFINE_string(
    "prompts", "", "File of the prompts that policies answer. Empty: those of the other file."
)
_SAMPLES = flags.DEFINE_integer("samples", 1, "A policy's responses to a prompt.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of a policy. 0 takes the likeliest token.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 128, "A policy's response is cut after so many tokens.", lower_bound=1
)
# Of a reward model.
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "Rows of tokens that a reward model scores at a time.", lower_bound=1
)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length",
    0,
    "Tokens of prompt plus response for a reward model. 0: its run's, or 1,024.",
    lower_bound=0,
)


def main(argv: list[str]) -> None:
    """Hands the flags to `evaluation.judge_files`."""
    if len(argv) > 1:
        fail(f"unexpected arguments: {' '.join(argv[1:])}; flags look like --a=FILE.")
    if not (_A.value and _B.value and _JUDGE.value and OUTPUT.value):
        fail("give --a=FILE, --b=FILE, --judge=J and --output=FILE.")
    price, request = _price(), _request()
    quiet()
    with told():
        # JAX loads here, so that wrong flags answer at once.
        from jaxpref import evaluation
        from jaxpref.evaluation import judges
        from jaxpref.sampling import Sampling
        from jaxpref.terminal import console

        found = evaluation.judge_files(
            _A.value,
            _B.value,
            _JUDGE.value,
            OUTPUT.value,
            asking=judges.Asking(
                base_url=_BASE_URL.value,
                template=_TEMPLATE.value,
                logprobs=_LOGPROBS.value,
                at_once=_AT_ONCE.value,
                attempts=_ATTEMPTS.value,
                max_tokens=_MAX_TOKENS.value,
                max_requests=_MAX_REQUESTS.value,
                price=price,
                timeout=_TIMEOUT.value,
                request=request,
            ),
            reading=judges.Reading(
                prompts=_PROMPTS.value,
                sampling=Sampling(
                    samples=_SAMPLES.value,
                    max_new_tokens=_MAX_NEW_TOKENS.value,
                    temperature=_TEMPERATURE.value,
                ),
                chat_template=CHAT_TEMPLATE.value,
                batch_size=_BATCH_SIZE.value,
                max_length=_MAX_LENGTH.value,
            ),
            seed=_SEED.value,
            compare=_COMPARE.value,
        )
        console.print(judges.table(found, _A.value, _B.value, _JUDGE.value))
        console.print(f"{OUTPUT.value}: {found.prompts:,} prompts judged")


def _price() -> tuple[float, float] | None:
    if not _PRICE.value:
        return None
    try:
        into, out = map(float, _PRICE.value)
    except ValueError:
        fail(f"--price={','.join(_PRICE.value)}: should be two numbers, as in --price=0.15,0.6.")
    return into, out


def _request() -> dict:
    try:
        request = json.loads(_REQUEST.value)
    except ValueError as error:
        fail(f"--request={_REQUEST.value}: is not JSON ({error}).")
    if not isinstance(request, dict):
        fail(f"--request={_REQUEST.value}: should be a JSON object.")
    return request


if __name__ == "__main__":
    app.run(main)
