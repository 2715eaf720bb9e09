"""Conversations to token ids, through the tokenizer's chat template.

The template decides how a conversation reads. What is guaranteed here, whatever it says:
the response's ids continue the prompt's ids, so that the model is trained on what it will
see when it generates; BOS stands once at the start, where the tokenizer puts it on plain
texts too; a response ends in one end-of-turn token, the template's or else EOS; and the
name of a special token inside a message is text, not a token.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpref.errors import UserError

Message = Mapping[str, Any]

# Templates for models that came with none. Neither needs tokens that a model may not have.
TEMPLATES: dict[str, str] = {
    # Instructions as Stanford Alpaca writes them; a system message takes the preamble's place.
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
    # Dialogues as Anthropic's HH writes them.
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

# Stands for a special token's name inside a message while the template is rendered.
_FIRST_MARK = 0xF0000
_MARKS = re.compile("([\U000f0000-\U000ffffd])")
_SHOWN = 40


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation that a response continues.

    Attributes:
      messages: each with a `role` and its `content`, and what else the template reads.
      tools: JSON schemas of the functions that may be called.
      options: further variables for the template.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The ids of a tokenizer's special tokens by name."""
    added = tokenizer.added_tokens_decoder.items()
    # Some tokenizers do not mark EOS and the like among what was added.
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {token.content: id for id, token in added if token.special} | dict(named)


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
        return Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"tokenizer.chat_template is {name!r}; it should be one of {', '.join(TEMPLATES)}, a "
            f"Jinja file, or a template ({error})."
        ) from error


class ChatEncoder:
    """Encodes conversations with one tokenizer.

    Attributes:
      special_names: names of special tokens met in messages.
    """

    def __init__(self, tokenizer: Any, *, eos: int, parse_special_tokens: bool = False):
        """Prepares.

        Args:
          tokenizer: a `transformers` tokenizer.
          eos: ends responses where the template has no end-of-turn token.
          parse_special_tokens: read the names of special tokens in messages as such.
        """
        self.special_names = 0
        self._tokenizer = tokenizer
        self._eos = eos
        self._parse = parse_special_tokens
        self._special = set(special_tokens(tokenizer).values())
        self._special_names = special_names(tokenizer)
        self._names = re.compile(f"{self._special_names.pattern}|{_MARKS.pattern}")

    def encode(
        self, chat: Chat, responses: Sequence[str | Message], where: str
    ) -> tuple[list[int], list[list[int]]]:
        """The ids of the prompt and of each response, which ends its turn.

        Args:
          chat: the conversation, which ends before the assistant's turn.
          responses: the messages that may continue it.
          where: place of the record, for messages.

        Raises:
          UserError: the tokenizer has no chat template, the template fails, or a response
            does not continue the prompt.
        """
        names: list[str] = []
        chat = _map_text(chat, lambda text: self._mask(text, names))
        prompt = self._render(chat, where, add_generation_prompt=True)
        prompt_ids = self._tokenize(prompt, names)
        encoded = []
        for response in responses:
            response = _map_text(response, lambda text: self._mask(text, names))
            whole = self._render(
                dataclasses.replace(chat, messages=(*chat.messages, response)), where
            )
            if not whole.startswith(prompt):
                raise self._boundary_error(prompt, whole, "text", where)
            if not (self._parse or self._special_names.sub("", whole[len(prompt) :]).strip()):
                raise UserError(
                    f"{where}: the chat template shows nothing of the response (it has "
                    f"{', '.join(sorted(response))}); use a template that does."
                )
            whole_ids = self._tokenize(whole, names)
            if whole_ids[: len(prompt_ids)] != prompt_ids:
                raise self._boundary_error(prompt_ids, whole_ids, "tokens", where)
            encoded.append(self._end_turn(whole_ids[len(prompt_ids) :]))
        return prompt_ids, encoded

    def _mask(self, text: str, names: list[str]) -> str:
        def mark(match: re.Match) -> str:
            self.special_names += not _MARKS.match(match[0])
            if self._parse:
                return match[0]
            names.append(match[0])
            return chr(_FIRST_MARK + len(names) - 1)

        return self._names.sub(mark, text)

    def _render(self, chat: Chat, where: str, *, add_generation_prompt: bool = False) -> str:
        import jinja2

        if not self._tokenizer.chat_template:
            raise UserError(
                f"{where}: is a conversation, but the tokenizer has no chat template; name one "
                f"with --config.tokenizer.chat_template={'|'.join(TEMPLATES)} or a Jinja file."
            )
        try:
            return self._tokenizer.apply_chat_template(
                list(chat.messages),
                tools=list(chat.tools) or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **chat.options,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: the chat template fails on this conversation (roles: "
                f"{', '.join(message['role'] for message in chat.messages)}): {error}"
            ) from error

    def _tokenize(self, text: str, names: list[str]) -> list[int]:
        """Token ids, with the marked names as text."""
        ids: list[int] = []
        for i, piece in enumerate(_MARKS.split(text) if names else [text]):
            is_name = i % 2 == 1
            if is_name:
                piece = names[ord(piece) - _FIRST_MARK]
            if piece:
                ids += self._tokenizer(
                    piece, add_special_tokens=False, split_special_tokens=is_name
                ).input_ids
        return ids

    def _end_turn(self, ids: list[int]) -> list[int]:
        """Cuts what follows the template's end-of-turn token; adds EOS if there is none."""
        last = next((i for i in reversed(range(len(ids))) if ids[i] in self._special), None)
        if last is not None and not self._tokenizer.decode(ids[last + 1 :]).strip():
            return ids[: last + 1]
        return [*ids, self._eos]

    def _boundary_error(self, prompt: Any, whole: Any, unit: str, where: str) -> UserError:
        parted = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
            min(len(prompt), len(whole)),
        )

        def shown(pieces: Any) -> str:
            near = pieces[max(parted - _SHOWN // 2, 0) : parted + _SHOWN // 2]
            return repr(near if unit == "text" else self._tokenizer.convert_ids_to_tokens(near))

        return UserError(
            f"{where}: the response does not continue the prompt. From place {parted} of the "
            f"{unit}, the prompt with the template's opening of a turn reads\n  {shown(prompt)}\n"
            f"but with the response after it\n  {shown(whole)}\n"
            "The model would be trained on other tokens than it continues when it generates. "
            "Change the template (tokenizer.chat_template) so that a turn opens in the same way "
            "and, if tokens merge, so that a special token or the response's own whitespace "
            "stands at the boundary."
        )


def stop_ids(tokenizer: Any) -> list[int]:
    """The ids that responses end in: EOS, and what ends a turn in the chat template, if any."""
    eos = tokenizer.eos_token_id
    if not tokenizer.chat_template:
        return [eos]
    turn = Chat(({"role": "user", "content": "a"},))
    try:
        encoder = ChatEncoder(tokenizer, eos=eos)
        _, (response,) = encoder.encode(
            turn, [{"role": "assistant", "content": "b"}], "a conversation of two words"
        )
    except UserError:
        # A template that cannot write so simple a conversation says nothing of its end.
        return [eos]
    return list(dict.fromkeys([eos, response[-1]]))


def _map_text(value: Any, function: Callable[[str], str]) -> Any:
    """The value with every text in it replaced, but for keys and roles."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Chat):
        return Chat(
            *(_map_text(getattr(value, f.name), function) for f in dataclasses.fields(Chat))
        )
    if isinstance(value, Mapping):
        return {k: v if k == "role" else _map_text(v, function) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_text(item, function) for item in value)
    return value
