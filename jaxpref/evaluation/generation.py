"""What a policy says to a file's prompts."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxpref import checkpoint, config as config_lib, data as data_lib, sharding, weights
from jaxpref.data import Example
from jaxpref.data.chat import Chat
from jaxpref.data.convert import to_prompt
from jaxpref.data.records import fingerprint
from jaxpref.errors import UserError
from jaxpref.models import huggingface
from jaxpref.sampling import Generated, Sampler, Sampling, prompt_keys
from jaxpref.terminal import console, progress
from jaxpref.tokenizer import decode
from jaxpref.weights import Opened
from jaxpref.workdir import AnyPath, as_folder, as_path, read_lines

# Columns about the responses that a record had, which are not those that are sampled.
_OF_OTHERS = ("responses", "finish", "logps", "scores")


class Written(NamedTuple):
    """What became of a file.

    Attributes:
      prompts: lines of the output.
      counts: prompts left out and cut, columns left out, and prompts of which a response was cut
        by length, by reason.
    """

    prompts: int
    counts: dict[str, int]


def generate_file(
    model: str | AnyPath,
    path: str,
    output: str | Path,
    sampling: Sampling,
    *,
    seed: int = 0,
    data_format: str = "auto",
    chat_template: str = "",
    max_prompt_length: int = 0,
    on_long_prompt: str = "error",
    at_once: int = 16,
    dtype: str = "",
) -> Written:
    """Writes sampled responses to all prompts of a file, with progress in the terminal.

    A line of the output is a record with all of its columns and, beside them, `prompt`,
    `responses`, and of each response `finish` ("stop" or "length") and `logps`, its log-prob
    under the policy at temperature 1, in nats, the stop token's among it. So it is read as format
    `responses`. Such columns that the record had, and its `scores`, are replaced or left out.
    `where` is the record's place, unless it says one itself. A response's text is without the
    token that stopped it.

    What is sampled for a prompt depends on nothing but the seed, the prompt, and its number in the
    file. Lines are written as responses end, in the file's order. If some are there already, from
    the same settings (they are in `OUTPUT.settings`), the rest is written behind them.

    Args:
      model: a run's workdir, or a Hugging Face directory or hub name, of a language model.
      path: of the prompts; see `data.path`. Of records that have responses, the prompt is taken.
      output: receives one JSON object a record.
      sampling: how to sample; its stops are EOS, the chat template's end of a turn, and what the
        model's files say, with those that are given.
      seed: of the random numbers.
      data_format: see `data.format`.
      chat_template: see `tokenizer.chat_template`; empty for the run's own.
      max_prompt_length: tokens that longer prompts are cut to. 0: the run's own
        `data.max_prompt_length`, or 1,024; less if the model knows fewer positions.
      on_long_prompt: what becomes of longer prompts, see `data.on_long_prompt`.
      at_once: prompts that are decoded together.
      dtype: of weights and activations; empty for the run's own, or float32.

    Raises:
      UserError: there is no language model, the prompts or the settings cannot be used, or the
        output is of another command.
    """
    output = as_folder(output, "--output")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"{output}: should be a file to write, in a directory that exists.")
    try:
        sampling.check()
    except ValueError as error:
        raise UserError(str(error)) from error
    config = _config(as_path(model), max_prompt_length, sampling.max_new_tokens)
    config.tokenizer.chat_template = chat_template or config.tokenizer.chat_template
    config.model.dtype = dtype or config.model.dtype
    opened = weights.open_run(config, as_path(model))
    sampling = sampling._replace(stops=_stops(config, opened, sampling.stops))
    log = _Log(
        output,
        {
            "model": str(model),
            "step": checkpoint.latest_step(as_path(model)),
            "prompts": fingerprint(path, "", "train"),
            **sampling._asdict(),
            "seed": seed,
            "format": data_format,
            "chat_template": config.tokenizer.chat_template,
            "max_prompt_length": config.data.max_prompt_length,
            "on_long_prompt": on_long_prompt,
            "dtype": config.model.dtype,
        },
    )
    examples, prompts, counts = _prompts(
        config, opened.tokenizer, path, data_format, on_long_prompt
    )
    kept = [number for number, prompt in enumerate(prompts) if len(prompt)]
    waiting = kept[log.done :]
    if log.done:
        console.print(f"{output}: has {log.done:,} of {len(kept):,} prompts already")
    mesh = sharding.make_mesh(**config.mesh)
    sampler = Sampler(
        opened.model,
        sampling,
        mesh=mesh if mesh.size > 1 else None,
        at_once=at_once,
        # So that what is resumed is padded as all would be.
        prompt_length=max(map(len, prompts)),
    )
    if waiting:
        held = sampler.prepare(weights.load_finished(as_path(model), opened, mesh))
        keys = prompt_keys(seed, 0, len(prompts))[np.asarray(waiting)]
        said = sampler.as_they_end(held, [prompts[number] for number in waiting], keys)
        with progress(f"sampling for {len(kept):,} prompts", "done") as tell:
            for place, of_prompt in _in_order(said):
                log.write(_line(examples[waiting[place]], of_prompt, opened.tokenizer))
                tell(log.done)
    return Written(len(kept), {**counts, **log.counts()})


def _config(path: AnyPath, max_prompt_length: int, new: int) -> ConfigDict:
    """The config of a policy's run, or of SFT, with room for prompts and responses."""
    config = weights.config_of(path)
    if config is None:
        config = config_lib.default("sft")
        config.model.init_from = str(path)
        config.data.max_prompt_length = 1024
    elif config.algorithm.name == "reward":
        raise UserError(f"{path}: is a run of a reward model, whose head gives no words.")
    data, source = config.data, weights.find(config, path)
    data.max_prompt_length = max_prompt_length or data.max_prompt_length
    data.max_length = max(data.max_length, data.max_prompt_length + new)
    if source.pretrained is None:
        return config
    model = huggingface.read_model(
        source.pretrained, max_length=data.max_length, ignore=config.model.ignore_keys
    )
    known = model.config.max_length
    if 0 < known < data.max_length:
        if max_prompt_length + new > known or new >= known:
            raise UserError(
                f"{path}: knows {known} positions, which max_prompt_length ({max_prompt_length}) "
                f"and max_new_tokens ({new}) exceed."
            )
        data.max_length = known
        data.max_prompt_length = min(data.max_prompt_length, known - new)
    return config


def _stops(config: ConfigDict, opened: Opened, given: Sequence[int]) -> tuple[int, ...]:
    """The tokens that a response ends with: as in an export of the run, and those given."""
    source = opened.source.pretrained
    own = config.tokenizer.name == "auto"
    known = huggingface.known_stops(source) if source is not None and own else []
    return tuple(dict.fromkeys([*data_lib.stop_ids(opened.tokenizer), *known, *given]))


def _prompts(
    config: ConfigDict, tokenizer: Any, path: str, data_format: str, on_long_prompt: str
) -> tuple[list[Example], list[np.ndarray], dict[str, int]]:
    """The examples of a file, their prompts' ids (none where one is left out), and counts."""
    examples, dropped = data_lib.read_examples(
        path,
        data_format,
        on_divergent="skip",
        on_empty="skip",
        on_assistant_prompt=config.data.on_assistant_prompt,
        min_score_ratio=1.0,
        keep_records=True,
    )
    bare = next((example for example in examples if example.prompt is None), None)
    if bare is not None:
        raise UserError(f"{bare.where}: has text alone; a column 'prompt' says what to continue.")
    examples = [to_prompt(example) for example in examples]
    config.data.on_long_prompt = "truncate"
    with progress("tokenising", "prompts") as tell:
        dataset = data_lib.tokenize(
            examples,
            tokenizer,
            data_lib.limits_of(config, tokenizer),
            parse_special_tokens=config.tokenizer.parse_special_tokens,
            processes=config.data.num_proc,
            progress=tell,
        )
    prompts = [dataset.group(number).prompt for number in range(len(dataset))]
    most, counts = config.data.max_prompt_length, {**dataset.counts}
    long = [number for number in range(len(prompts)) if dataset.uncut[number] > most]
    if long and on_long_prompt == "error":
        raise UserError(
            f"{examples[long[0]].where}: the prompt has {dataset.uncut[long[0]]} tokens, over "
            f"max_prompt_length ({most}), as have {len(long) - 1:,} others. Raise it, or cut such "
            "prompts to their last tokens with on_long_prompt=truncate, or leave them out with "
            "=skip."
        )
    if on_long_prompt == "skip":
        counts |= {"prompts_cut": 0, "dropped/long_prompt": len(long)}
        prompts = [p[: len(p) * (n not in set(long))] for n, p in enumerate(prompts)]
    replaced = sum(any(name in example.record for name in _OF_OTHERS) for example in examples)
    return (
        examples,
        prompts,
        {
            **{f"dropped/{reason}": count for reason, count in dropped.items()},
            **counts,
            "records_whose_own_responses_were_replaced": replaced,
        },
    )


def _in_order(said: Iterable[tuple[list[int], Generated]]) -> Iterator[tuple[int, Generated]]:
    """Prompts one by one in the order of their numbers, each as soon as may be."""
    early: dict[int, Generated] = {}
    following = 0
    for numbers, some in said:
        for place, number in enumerate(numbers):
            early[number] = Generated(*(x[place] for x in some))
        while following in early:
            yield following, early.pop(following)
            following += 1


def _line(example: Example, said: Generated, tokenizer: Any) -> dict[str, Any]:
    """The record with what was sampled.

    Args:
      example: a prompt.
      said: to this prompt; without the axis of prompts.
      tokenizer: the policy's.
    """
    logps = said.logps.sum(-1)
    if not np.isfinite(logps).all():
        raise UserError(
            f"{example.where}: the policy's log-probs are {', '.join(map(str, logps))}, which are "
            "not all finite numbers. Did its training diverge?"
        )
    ends = said.lengths - said.stopped
    texts = [
        decode(tokenizer, ids[:end])
        for ids, end in zip(said.tokens.tolist(), ends.tolist(), strict=True)
    ]
    prompt = example.prompt
    kept = {name: value for name, value in example.record.items() if name not in _OF_OTHERS}
    return {
        "where": example.where,
        **kept,
        # A prompt that the record has is written as it is there.
        "prompt": kept.get("prompt", list(prompt.messages) if isinstance(prompt, Chat) else prompt),
        "responses": texts,
        "finish": ["stop" if stopped else "length" for stopped in said.stopped.tolist()],
        "logps": [round(float(logp), 6) for logp in logps],
    }


class _Log:
    """The lines of an output that may have been begun already.

    Attributes:
      done: lines written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Finds what is there.

        Raises:
          UserError: it is not from these settings.
        """
        self.done = 0
        self._path, self._beside = path, path.with_name(f"{path.name}.settings")
        self._settings = json.loads(json.dumps(settings))
        if path.exists() and path.stat().st_size:
            self._check()
            lines = path.read_bytes()
            # A process that was killed may have left half a line.
            whole = lines.rfind(b"\n") + 1
            os.truncate(path, whole)
            self.done = lines.count(b"\n")

    def _check(self) -> None:
        try:
            before = json.loads(self._beside.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._path}: is there already, and {self._beside.name}, which would say what it "
                f"was made from, cannot be read ({error}). Give another output, or remove it."
            ) from error
        changed = [name for name in self._settings if before.get(name) != self._settings[name]]
        if changed:
            what = "; ".join(
                f"{name} was {before.get(name)!r} and is {self._settings[name]!r}"
                for name in changed
            )
            raise UserError(
                f"{self._path}: was made from other settings ({what}). Give another output, or "
                "remove it."
            )

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line, which is whole as soon as it is there."""
        if not self.done:
            self._beside.write_text(json.dumps(self._settings, indent=1))
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps(line, ensure_ascii=False, default=str).encode() + b"\n")
        self.done += 1

    def counts(self) -> dict[str, int]:
        """How many prompts have a response that was cut."""
        lines = read_lines(self._path) if self.done else []
        return {
            "with_a_response_cut_by_length": sum("length" in json.loads(x)["finish"] for x in lines)
        }
