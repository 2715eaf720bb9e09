"""The tokenizer of a run: how it is loaded, its chat template, its special tokens."""

import io
import os
import re
from collections.abc import Sequence
from typing import Any

from jaxpref.errors import UserError
from jaxpref.workdir import as_path, get, is_address, open_file

# Templates for models that come without one. They need no token that a model may lack.
TEMPLATES: dict[str, str] = {
    # The form of Stanford Alpaca's instructions. A system message takes the preamble's place.
    "alpaca": """
{%- if tools -%}{{- raise_exception('alpaca has no place for tools') -}}{%- endif -%}
{%- for message in messages -%}
  {%- if message.content is not string or message.tool_calls -%}
    {{- raise_exception('alpaca writes messages of text alone') -}}
  {%- endif -%}
{%- endfor -%}
{%- if messages[0].role != 'system' -%}
  {{- 'Below is an instruction that describes a task. Write a response that appropriately '
      + 'completes the request.\n\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}
    {{- message.content + '\n\n' -}}
  {%- elif message.role == 'user' -%}
    {{- '### Instruction:\n' + message.content + '\n\n' -}}
  {%- elif message.role == 'assistant' -%}
    {{- '### Response:\n' + message.content | trim -}}
    {%- if not loop.last -%}{{- (eos_token or '') + '\n\n' -}}{%- endif -%}
  {%- else -%}
    {{- raise_exception('alpaca has no role ' + message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}
""",
    # The form of the dialogues in Anthropic's HH.
    "hh": """
{%- if tools -%}{{- raise_exception('hh has no place for tools') -}}{%- endif -%}
{%- for message in messages -%}
  {%- if message.content is not string or message.tool_calls -%}
    {{- raise_exception('hh writes messages of text alone') -}}
  {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- '\n\nHuman: ' + message.content | trim -}}
  {%- elif message.role == 'assistant' -%}
    {{- '\n\nAssistant: ' + message.content | trim -}}
  {%- else -%}
    {{- raise_exception('hh has no role ' + message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\n\nAssistant:' -}}{%- endif -%}
""",
}


def load_tokenizer(name: str, chat_template: str = "") -> Any:
    """A `transformers` tokenizer.

    Args:
      name: "bytes" for ByT5's, which needs no files; a directory, which may be in a bucket; or a
        hub name.
      chat_template: see `read_template`; empty for the tokenizer's own.

    Raises:
      UserError: it cannot be loaded, or has no EOS token.
    """
    tokenizer = _load_tokenizer(name)
    if chat_template:
        tokenizer.chat_template = read_template(chat_template)
    return tokenizer


def _load_tokenizer(name: str) -> Any:
    # Without this, transformers warns that it lacks torch; only its tokenizers are used here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    if name == "bytes":
        return transformers.ByT5Tokenizer()
    try:
        folder = get(as_path(name))
    except OSError as error:
        raise UserError(f"tokenizer.name is {name!r}, which cannot be read: {error}.") from error
    if folder is None and is_address(name):
        raise UserError(
            f"tokenizer.name is {name!r}, and there is no such folder with files in the bucket."
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder or name))
    except Exception as error:  # The hub's client raises errors of many classes.
        where = "in that directory" if folder else "of that name on the hub"
        raise UserError(
            f"tokenizer.name is {name!r}, and no tokenizer {where} could be loaded: {error}\n"
            "Without a network, give a local directory, or 'bytes', which needs no files."
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name!r} has no EOS token, which every response ends in.")
    return tokenizer


def begins_with_bos(tokenizer: Any, policy: str) -> int | None:
    """The id that prompts begin with, or None.

    Args:
      tokenizer: a `transformers` tokenizer.
      policy: "auto" (where the tokenizer itself puts BOS before a text), "always" or "never".

    Raises:
      UserError: "always", and the tokenizer has no BOS.
    """
    if policy == "never":
        return None
    bos = tokenizer.bos_token_id
    if policy == "always" and bos is None:
        raise UserError("tokenizer.bos is 'always', but the tokenizer has no BOS token.")
    return bos if policy == "always" or tokenizer("a").input_ids[:1] == [bos] else None


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The ids of a tokenizer's special tokens by name."""
    added = tokenizer.added_tokens_decoder.items()
    # Some tokenizers do not mark EOS and other special tokens among the added ones.
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {token.content: id for id, token in added if token.special} | dict(named)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of sampled ids, special tokens by their names.

    A model may have more rows in its embedding than the tokenizer has ids; in place of such an id
    stands U+FFFD.
    """
    known = len(tokenizer)
    runs: list[list[int]] = [[]]
    for id in ids:
        if id < known:
            runs[-1].append(id)
        else:
            runs.append([])
    texts = (tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs)
    return "\ufffd".join(texts)


def special_names(tokenizer: Any) -> re.Pattern:
    """Matches the name of a special token."""
    names = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)))


def read_template(name: str) -> str:
    """The chat template that `tokenizer.chat_template` names.

    Args:
      name: one of `TEMPLATES`, a file, or the template itself.

    Raises:
      UserError: it is none of these.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{" in name:
        return name
    try:
        with io.TextIOWrapper(open_file(as_path(name)), encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"tokenizer.chat_template is {name!r}; it should be one of {', '.join(TEMPLATES)}, a "
            f"Jinja file, or a template ({error})."
        ) from error
