"""Conversations of several turns: what is scored, what is only seen, and that it is exact."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, response_logps
from test_chat import BAD, CHATML, GOOD, STYLES, SYSTEM, TALK, build_tokenizer, write

from jaxpref import algorithms, config as config_lib, packing
from jaxpref.data import cache
from jaxpref.data.chat import Chat
from jaxpref.data.convert import adapt
from jaxpref.data.dataset import deduplicate, mismatch
from jaxpref.data.examples import Example
from jaxpref.data.load import load_file
from jaxpref.data.read import read_examples
from jaxpref.data.tokenize import Limits, tokenize
from jaxpref.errors import UserError
from jaxpref.logprobs import LMHead
from jaxpref.models import Decoder, packed
from jaxpref.packing import Group
from jaxpref.tokenizer import load_tokenizer

THANKS = {"role": "user", "content": "Thanks! And the plums?"}
RIPE = {"role": "assistant", "content": "The plums are ripe."}
# Three turns of the assistant, each after the user's.
LONG = (*TALK, GOOD, THANKS, RIPE)


def read(tmp_path, record, format="auto", **options):
    (example,), _ = read_examples(write(tmp_path / "x.jsonl", record), format, **options)
    return dataclasses.replace(example, where="")


def tokenized(style, *examples, max_length=4096):
    tokenizer = build_tokenizer(STYLES[style])
    return tokenize(examples, tokenizer, Limits(max_length, 512, tokenizer.eos_token_id))


def test_every_turn_after_the_first_question_is_the_response(tmp_path):
    record = {"messages": [SYSTEM, *LONG]}
    asked = Chat((SYSTEM, LONG[0]))
    assert read(tmp_path, record) == Example(asked, (LONG[1:],))
    last = Example(Chat((SYSTEM, *LONG[:-1])), (RIPE,))
    assert read(tmp_path, record, turns="last") == last
    # The assistant's greeting answers nothing.
    greeted = {"messages": [SYSTEM, GOOD, *LONG]}
    assert read(tmp_path, greeted) == Example(Chat((SYSTEM, GOOD, LONG[0])), (LONG[1:],))
    # A prompt that is given is the prompt, and what follows it the response.
    given = {"prompt": list(LONG[:3]), "completion": list(LONG[3:])}
    assert read(tmp_path, given) == Example(Chat(LONG[:3]), (LONG[3:],))
    # Of the prompt alone nothing is trained.
    for example in (read(tmp_path, record), last):
        assert adapt([example], "prompts")[0] == [Example(last.prompt, ())]


def test_pairs_part_in_any_turn_of_the_assistant(tmp_path):
    chosen, rejected = (list(LONG), [*TALK, BAD, TALK[0], GOOD])
    expected = Example(Chat(TALK), (LONG[3:], (BAD, TALK[0], GOOD)))
    assert read(tmp_path, {"chosen": chosen, "rejected": rejected}) == expected
    given = {"prompt": list(TALK), "chosen": chosen[3:], "rejected": rejected[3:]}
    assert read(tmp_path, given) == expected
    path = write(tmp_path / "x.jsonl", {"chosen": chosen, "rejected": rejected})
    with pytest.raises(UserError, match=r"x.jsonl:1: .*last turns .*--config.data.turns=all"):
        read_examples(path, turns="last")
    with pytest.raises(UserError, match=r"no usable record.*'divergent_prompt': 1"):
        read_examples(path, turns="last", on_divergent="skip")
    with pytest.raises(UserError, match="chosen response is empty"):
        read(
            tmp_path,
            {"chosen": [*TALK, {**GOOD, "content": " "}, THANKS, RIPE], "rejected": rejected},
        )


@pytest.mark.parametrize("style", sorted(set(STYLES) - {"hh"}))
def test_each_turn_is_what_the_model_would_see_and_say(style):
    """Whatever comes after it, and nothing else is scored."""
    tokenizer = build_tokenizer(STYLES[style])
    group = tokenized(style, Example(Chat(LONG[:1]), (LONG[1:],))).group(0)
    whole = [*group.prompt.tolist(), *group.responses[0].tolist()]
    context = [*[True] * len(group.prompt), *group.context[0].tolist()]
    scored = []
    for place in (1, 3, 5):
        before = tokenizer.apply_chat_template(
            list(LONG[:place]), add_generation_prompt=True, return_dict=False
        )
        alone = tokenized(style, Example(Chat(LONG[:place]), (LONG[place],))).group(0)
        assert alone.prompt.tolist() == before
        until = [*before, *alone.responses[0].tolist()]
        assert whole[: len(until)] == until
        scored += range(len(before), len(until))
    assert np.flatnonzero(~np.asarray(context)).tolist() == scored


THINKING = CHATML.replace(
    "+ message.content -}}",
    "+ (message.content if loop.last else message.content.split('</think>')[-1]) -}}",
)


def test_a_template_that_rewrites_earlier_turns_can_train_the_last_alone():
    thought = {"role": "assistant", "content": "<think>hm</think>Hi!"}
    talk = (TALK[0], thought, *TALK[2:], GOOD)
    tokenizer = build_tokenizer(dataclasses.replace(STYLES["chatml"], template=THINKING))
    limits = Limits(512, 256, tokenizer.eos_token_id)
    with pytest.raises(UserError) as caught:
        tokenize([Example(Chat(talk[:1]), (talk[1:],), where="x:7")], tokenizer, limits)
    said = str(caught.value)
    assert said.startswith("x:7: the chat template writes turn 1 of the assistant otherwise")
    assert "--config.data.turns=last" in said
    assert "think" in said
    last = tokenize([Example(Chat(talk[:3]), talk[3:])], tokenizer, limits).group(0)
    assert "think" not in tokenizer.decode(last.prompt)
    # What ends a turn has to be seen as well: this template marks no end inside a conversation.
    with pytest.raises(UserError, match="turn 1 of the assistant otherwise"):
        tokenized("hh", Example(Chat(LONG[:1]), (LONG[1:],)))


def test_a_turn_that_was_begun_is_continued_or_refused(tmp_path):
    begun = {"role": "assistant", "content": "The pears"}
    rest = {"role": "assistant", "content": " are fresh."}
    record = {"prompt": [*TALK, begun], "completion": [rest]}
    with pytest.raises(UserError, match="follows a message of the assistant"):
        read(tmp_path, record)
    with pytest.raises(UserError, match="'assistant_prompt': 1"):
        read(tmp_path, record, on_assistant_prompt="skip")
    with pytest.raises(UserError, match="follows a message of the assistant"):
        read(tmp_path, {"prompt": [*TALK, begun]})
    with pytest.raises(UserError, match="follows a message of the assistant"):
        read(tmp_path, {"messages": [*TALK, begun, rest]})

    going_on = read(tmp_path, record, on_assistant_prompt="continue")
    style = STYLES["chatml"]
    tokenizer = build_tokenizer(style)
    group = tokenized("chatml", going_on).group(0)
    whole = tokenized("chatml", Example(Chat(TALK), (GOOD,))).group(0)
    assert tokenizer.decode(group.prompt).endswith("<|im_start|>assistant\nThe pears")
    assert tokenizer.decode(group.responses[0]) == " are fresh.<|im_end|>"
    assert [*group.prompt, *group.responses[0]] == [*whole.prompt, *whole.responses[0]]
    # Both halves are the same turn where both are trained.
    both = read(tmp_path, {"messages": [TALK[0], begun, rest]}, on_assistant_prompt="continue")
    one = tokenized("chatml", Example(Chat(TALK[:1]), (GOOD,))).group(0)
    assert tokenized("chatml", both).group(0).responses[0].tolist() == one.responses[0].tolist()
    called = {**begun, "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(UserError, match=r"calls tools, .* cannot be continued"):
        tokenized("chatml", Example(Chat((*TALK, called)), (rest,)))


def lengths_of(data):
    return data.response_lengths.tolist(), data.scored_lengths.tolist()


def test_arrays_of_conversations(tmp_path):
    """What is taken, borrowed, cut, kept and told apart."""
    long = Example(Chat(LONG[:1]), (LONG[1:],), label=True)
    short = Example(Chat(TALK), (GOOD,), label=True)
    data = tokenized("chatml", long, short)
    (tokens, turns) = ([r[0] for r in x] for x in lengths_of(data))
    assert turns[0] < tokens[0]
    assert turns[1] == tokens[1] == len(data.group(1).responses[0])
    (same,) = (data.take(np.asarray([1, 0])).take(np.asarray([1])),)
    assert lengths_of(same) == ([tokens[:1]], [turns[:1]])
    np.testing.assert_array_equal(same.group(0).context[0], data.group(0).context[0])
    assert data.take(np.asarray([1])).fingerprint() != data.fingerprint()

    borrowed = mismatch(data, 4096)
    assert lengths_of(borrowed) == ([tokens, tokens[::-1]], [turns, turns[::-1]])
    assert borrowed.group(1).context[1].tolist() == data.group(0).context[0].tolist()

    # The same tokens, scored otherwise, are another example.
    scored = dataclasses.replace(data, context=np.zeros_like(data.context))
    assert scored.fingerprint() != data.fingerprint()
    twice = tokenized("chatml", long, short, long)
    twice = dataclasses.replace(twice, context=twice.context.copy())
    assert len(deduplicate(twice)) == 2
    twice.context[: data.piece_offsets[2]] = False
    assert len(deduplicate(twice)) == 3

    cache.write(tmp_path / "kept", data, None, {"held_out_examples": 0})
    kept, _, _ = cache.read(tmp_path / "kept")
    assert kept.fingerprint() == data.fingerprint()
    assert lengths_of(kept) == lengths_of(data)


def test_a_cut_conversation_ends_with_what_is_scored():
    long = Example(Chat(LONG[:1]), (LONG[1:],))
    whole = tokenized("chatml", long).group(0)
    prompt, context = len(whole.prompt), whole.context[0]
    for room in range(1, len(context) + 1):
        data = tokenized("chatml", long, max_length=prompt + room)
        kept = data.group(0).responses[0]
        # Everything scored that fits, and nothing after it.
        assert len(kept) == np.flatnonzero(~context[:room])[-1] + 1
        np.testing.assert_array_equal(kept, whole.responses[0][: len(kept)])
        assert data.counts["responses_cut"] == (room < len(context))
        assert data.uncut_lengths(0) == [prompt, len(context)]


def test_the_last_turn_of_a_scored_conversation_is_what_its_reward_is_of(tmp_path):
    path = write(tmp_path / "x.jsonl", {"messages": list(LONG)})
    config = config_lib.default("reward")
    tokenizer = load_tokenizer("bytes", "alpaca")
    (example,), _, _ = load_file(config, tokenizer, path)
    assert example.responses == (RIPE,)
    assert example.prompt == Chat(LONG[:-1])


def dialogues(seed=0, count=4, responses=2, turns=3, longest=4):
    """Groups of random tokens whose responses are several turns with context between them."""
    rng = np.random.default_rng(seed)

    def ids():
        return rng.integers(1, TINY.vocabulary_size, rng.integers(1, longest), dtype=np.int32)

    groups = []
    for _ in range(count):
        pieces = [[ids() for _ in range(2 * turns - 1)] for _ in range(responses)]
        groups.append(
            Group(
                ids(),
                [np.concatenate(p) for p in pieces],
                [
                    np.concatenate([np.full(len(x), i % 2 == 1) for i, x in enumerate(p)])
                    for p in pieces
                ],
            )
        )
    return groups


ROW = 2 * 3 * 8


def test_the_table_has_what_is_scored_and_the_rows_have_all():
    p, a, u, b = (np.asarray(x, np.int32) for x in ([10, 11], [20, 21], [30, 31], [40]))
    group = Group(p, [np.concatenate([a, u, b]), a], [np.isin(range(5), (2, 3)), np.zeros(2, bool)])
    batch = packing.pack([group], row_length=10, scored_length=6)
    expected = {
        "tokens": "10 11  20 21 30 31 40  20 21  0",
        "positions": "0 1  2 3 4 5 6  2 3  0",
        "branch": "0 0  1 1 1 1 1  2 2  0",
        "source": "1 2 5  1 7  0",
        "place": "2 3 6  7 8  0",
        "target": "20 21 40  20 21  0",
        "response": "0 0 0  1 1  2",
    }
    for field, drawing in expected.items():
        assert getattr(batch, field).tolist() == [[int(x) for x in drawing.split()]], field
    assert batch.lengths.tolist() == [[3, 2]]
    assert packing.is_last(batch).tolist() == [[False, False, True, False, True, False]]
    assert packing.index_in_response(batch).tolist()[0][:5] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ([np.ones(2, bool)], "no token of response 0 is scored"),
        ([np.zeros(3, bool)], r"group 0: context should say of each token .*\[2\].*has \[3\]"),
    ],
)
def test_impossible_context_is_an_error(context, message):
    ids = np.asarray([1, 2], np.int32)
    with pytest.raises(ValueError, match=message):
        packing.pack([Group(ids, [ids], context)], row_length=8)


class Attentive(Decoder):
    """A layer of attention with positions in float64: quick to compile, and sees all before it."""

    def setup(self):
        normal = nn.initializers.normal(0.5)
        for name, rows in (("embedding", TINY.vocabulary_size), ("place", ROW), ("kernel", 64)):
            setattr(self, name, self.param(name, normal, (rows, 8), jnp.float64))

    def hidden_states(self, tokens, positions=None, tree=None):
        x = self.embedding[tokens] + self.place[positions]
        seats = packing.Seats(jnp.arange(tokens.shape[1]), positions, tree)
        seen = jnp.where(packing.sees(seats, seats), x @ x.swapaxes(1, 2), -jnp.inf)
        return x + jax.nn.softmax(seen) @ x

    def lm_head(self):
        return LMHead(self.kernel)


@pytest.fixture(scope="module")
def exact():
    """A model and its parameters in float64."""
    with jax.enable_x64(True):
        model, nothing = Attentive(TINY), np.zeros((1, 1), np.int32)
        args = (jax.random.key(0), nothing, nothing, packing.Tree(nothing, nothing))
        yield model, model.init(*args, method="hidden_states")["params"]


def logps_of(model, params, groups, **options):
    batch = packing.pack(groups, row_length=ROW, **options)
    return np.asarray(jax.jit(response_logps, static_argnums=0)(model, params, batch))


def test_packed_equals_one_conversation_a_row(exact):
    groups = dialogues()
    together = logps_of(*exact, groups, scored_length=ROW // 2)
    for (g, k), value in np.ndenumerate(together):
        group = groups[g]
        alone = Group(group.prompt, [group.responses[k]], [group.context[k]])
        np.testing.assert_allclose(logps_of(*exact, [alone])[0, 0], value, rtol=1e-9)


def test_what_is_scored_is_exactly_the_mask(exact):
    """With all tokens scored, their log-probs are the same, and the sum is of those unmasked."""
    groups = dialogues()
    whole = [group._replace(context=None) for group in groups]
    batch = packing.pack(whole, row_length=ROW)

    def by_token(params):
        hidden = exact[0].apply(
            {"params": params},
            jnp.asarray(batch.tokens),
            jnp.asarray(batch.positions),
            batch.tree,
            method="hidden_states",
        )
        head = exact[0].apply({"params": params}, method="lm_head")
        return algorithms.base.token_logprobs(
            packing.gather_sources(hidden, batch), head, jnp.asarray(batch.target)
        )

    values = np.asarray(by_token(exact[1]))
    index = np.asarray(packing.index_in_response(batch))
    expected = np.zeros((len(groups), 2))
    for value, response, place in zip(
        values.ravel(), batch.response.ravel(), index.ravel(), strict=True
    ):
        if response < expected.size:
            g, k = divmod(int(response), 2)
            expected[g, k] += 0 if groups[g].context[k][place] else value
    np.testing.assert_allclose(logps_of(*exact, groups), expected, rtol=1e-9)


def test_a_later_turn_changes_no_earlier_log_prob(exact):
    """The first turn alone is scored, and what comes after it is another."""
    (group,) = dialogues(count=1, responses=1)
    (ids,), (context,) = group.responses, group.context
    end = int(np.flatnonzero(context)[0])
    context = np.arange(len(ids)) >= end
    other = np.where(context, (ids + 7) % TINY.vocabulary_size, ids)
    first, second = (logps_of(*exact, [Group(group.prompt, [x], [context])]) for x in (ids, other))
    assert (ids != other).any()
    np.testing.assert_array_equal(first, second)


def test_the_gradient_of_all_turns_is_the_sum_of_the_last_turns(exact):
    """Of every prefix of the conversations that ends with the assistant."""
    model, params = exact
    groups = dialogues(responses=1)
    prefixes = []
    for group in groups:
        whole = np.concatenate([group.prompt, group.responses[0]])
        scored = np.concatenate([np.zeros(len(group.prompt), bool), ~group.context[0]])
        # Where a turn begins and where the next one does.
        edges = np.flatnonzero(np.diff(scored, append=False)) + 1
        turns = edges.reshape(-1, 2).tolist()
        prefixes += [Group(whole[:start], [whole[start:end]]) for start, end in turns]
    assert len(prefixes) == 3 * len(groups)
    sft, forward = algorithms.build(config_lib.default("sft")), packed(model)

    def gradient(groups):
        batch = packing.pack(groups, row_length=ROW)

        def total(params):
            # Its loss is per token, weighted by tokens.
            loss = sft.loss(forward(params, batch), batch, algorithms.LossInputs()).loss
            return jnp.sum(loss.values * loss.weights)

        return jax.jit(jax.grad(total))(params)

    found, expected = gradient(groups), gradient(prefixes)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
