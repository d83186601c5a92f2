"""Prompts as token ids."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from workingpapers.alignment.prompts import end_tokens, tokenize_prompts

BEGIN, OPENING = 11, "k"


class Tokenizer:
    """a is 0, b is 1, ...; it adds a beginning, and its chat template the opening of an answer."""

    eos_token_id = 25

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [BEGIN] * add_special_tokens + [ord(letter) - ord("a") for letter in text]}

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "".join(message["content"] for message in messages) + OPENING


def test_prompts_are_text_messages_rows_or_tokens():
    given = ["abc", [{"role": "user", "content": "de"}], {"prompt": "f"}, [7, 8], {"prompt": [9]}]
    # the template writes the special tokens itself: the beginning stands once, before plain text alone
    assert tokenize_prompts(given, Tokenizer()) == [[BEGIN, 0, 1, 2], [3, 4, 10], [BEGIN, 5], [7, 8], [9]]
    assert tokenize_prompts(iter([[7, 8], [9]])) == [[7, 8], [9]]


def test_a_long_prompt_loses_its_beginning():
    assert tokenize_prompts(["abc", "d"], Tokenizer(), max_prompt_length=2) == [[1, 2], [BEGIN, 3]]


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "questions must hold at least one prompt"),
        ([[1], []], ValueError, "questions must not be empty, but prompt 1 has no tokens"),
        (["a"], ValueError, "tokenizer may be None only when questions are token ids"),
        ([[{"role": "user", "content": "a"}]], ValueError, "tokenizer may be None only"),
        ([[-1]], ValueError, "questions must be at least 0"),
        ([[0.5]], TypeError, "questions must be an integer"),
        ("abc", TypeError, "questions must be a list of prompts, got one string"),
    ],
)
def test_what_is_not_a_list_of_prompts_is_refused(prompts, error, message):
    with pytest.raises(error, match=message):
        tokenize_prompts(prompts, name="questions")


def test_answers_end_where_the_model_stops_or_the_tokenizer_says():
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[3, 4]))
    assert end_tokens(model, Tokenizer()) == [3, 4]
    assert end_tokens(SimpleNamespace(), Tokenizer()) == 25
    assert end_tokens(SimpleNamespace()) is None
