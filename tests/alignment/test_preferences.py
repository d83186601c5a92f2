"""Tests of the mathematics: each fails when the idea it names is removed."""

import pytest
import torch

from workingpapers.alignment import (
    TokenPair,
    TokenSequence,
    as_token_pairs,
    collate_preferences,
    pair_logprobs,
    tokenize_preferences,
)

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character, a merge of "ab", and the markers of the chat template."""
    characters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [" "]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: n for n, c in enumerate([*characters, "ab"])}, merges=[("a", "b")])
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", additional_special_tokens=["<u>", "<a>"], chat_template=TEMPLATE
    )
    wrapped.pad_token = None  # none is needed
    return wrapped


def texts(tokenizer, pair):
    return tuple(tokenizer.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected))


def test_plain_text_gets_an_end_and_is_divided_at_the_prompt(tokenizer):
    (pair,) = tokenize_preferences([{"prompt": "cde", "chosen": "fg", "rejected": "h<end>"}], tokenizer)
    assert isinstance(pair, TokenPair)
    assert pair.chosen == [5, 6, tokenizer.eos_token_id]
    assert pair.rejected == [7, tokenizer.eos_token_id]  # not two ends
    assert pair.prompt == [2, 3, 4]


def test_a_token_that_spans_the_boundary_belongs_to_the_response(tokenizer):
    (pair,) = tokenize_preferences([{"prompt": "ca", "chosen": "bd", "rejected": "d"}], tokenizer)
    assert pair.prompt == [2]
    assert pair.chosen[0] == 27  # "ab"
    assert pair.rejected[:2] == [0, 3]


CONVERSATION = {
    "prompt": [{"role": "user", "content": "cd"}],
    "chosen": [{"role": "assistant", "content": "e"}],
    "rejected": [{"role": "assistant", "content": "f"}],
}


def test_conversations_are_rendered_with_the_template_and_whole_ones_are_divided_where_they_differ(tokenizer):
    (pair,) = tokenize_preferences([CONVERSATION], tokenizer)
    assert [text.replace(" ", "") for text in texts(tokenizer, pair)] == ["<u>cd<end><a>", "e<end>", "f<end>"]
    whole = {side: CONVERSATION["prompt"] + CONVERSATION[side] for side in ("chosen", "rejected")}
    assert tokenize_preferences([whole], tokenizer) == [pair]
    assert tokenize_preferences([{"prompt": "cd", **whole}], tokenizer) == [pair]


def test_agrees_with_the_tokenisation_of_trl(tokenizer):
    datasets = pytest.importorskip("datasets")
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    for row in ({"prompt": "ca", "chosen": "bde", "rejected": "d"}, CONVERSATION):
        prepared = dpo.DPOTrainer._prepare_dataset(
            type("Bare", (), {"_tokenizer": tokenizer})(),
            datasets.Dataset.from_list([row]),
            tokenizer,
            type("Arguments", (), {"dataset_num_proc": None, "max_length": None, "truncation_mode": "keep_start"})(),
            "train",
        )[0]
        expected = TokenPair(prepared["prompt_ids"], prepared["chosen_ids"], prepared["rejected_ids"])
        assert tokenize_preferences(datasets.Dataset.from_list([row]), tokenizer) == [expected]


def test_long_prompts_lose_their_beginning_long_responses_their_end(tokenizer):
    row = {"prompt": "cdefg", "chosen": "hijk", "rejected": "l"}
    with pytest.warns(UserWarning, match="1 of 1 pairs were cut to max_length=5, max_prompt_length=3"):
        (pair,) = tokenize_preferences([row], tokenizer, max_length=5, max_prompt_length=3)
    assert pair == TokenPair([4, 5, 6], [7, 8], [11, tokenizer.eos_token_id])


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_hold_chosen_rows_then_rejected_rows_and_only_padding_is_masked(side):
    pairs = [TokenPair([1, 2], [3], [4, 5, 6]), TokenPair([7], [8, 9], [10])]
    batch = collate_preferences(pairs, pad_token_id=0, padding_side=side)
    assert len(batch) == 2
    assert batch.chosen_lengths.tolist() == [1, 2]
    assert batch.rejected_lengths.tolist() == [3, 1]
    for row, pair in enumerate(pairs):
        for offset, response in ((0, pair.chosen), (2, pair.rejected)):
            real = batch.attention_mask[row + offset].bool()
            assert batch.input_ids[row + offset][real].tolist() == pair.prompt + response
            assert batch.input_ids[row + offset][batch.response_mask[row + offset]].tolist() == response
            assert (batch.attention_mask[row + offset, 0 if side == "left" else -1] == 0) == (
                len(pair.prompt + response) < 5
            )


def test_pair_logprobs_keeps_the_halves_apart():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=1)).eval()
    pairs = [TokenPair([1, 2], [3], [4, 5, 6]), TokenPair([7], [8, 9], [10])]
    with torch.no_grad():
        chosen, rejected = pair_logprobs(model, collate_preferences(pairs))
        swapped = [TokenPair(pair.prompt, pair.rejected, pair.chosen) for pair in pairs]
        rejected_again, chosen_again = pair_logprobs(model, collate_preferences(swapped).to("cpu"))
    torch.testing.assert_close(chosen, chosen_again)
    torch.testing.assert_close(rejected, rejected_again)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([{"prompt": "c", "chosen": "d"}], "row 0 of dataset: rejected must be a string, got columns prompt, chosen"),
        ([{"prompt": "c", "chosen": "d", "rejected": ["e"]}], "rejected must be a string, got a list"),
        ([CONVERSATION, {"prompt": "c", "chosen": "d", "rejected": "e"}], "row 1 of dataset: chosen must be a list"),
        ([{"prompt": "", "chosen": "d", "rejected": "e"}], "row 0 of dataset: prompt has no tokens"),
        ([{**CONVERSATION, "prompt": []}], "row 0 of dataset: prompt has no messages"),
    ],
)
def test_bad_rows_are_named(rows, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        tokenize_preferences(rows, tokenizer)


def test_other_bad_input_is_named(tokenizer):
    with pytest.raises(ValueError, match="max_length must be at least 513, got 512"):
        tokenize_preferences([CONVERSATION], tokenizer, max_length=512)
    with pytest.raises(ValueError, match="at least one pair"):
        collate_preferences([])
    with pytest.raises(ValueError, match="no empty prompt or response"):
        collate_preferences([TokenPair([1], [], [2])])
    with pytest.raises(ValueError, match="padding_side must be one of"):
        collate_preferences([TokenPair([1], [2], [3])], padding_side="middle")
    with pytest.raises(ValueError, match="tokenizer may be None only"):
        as_token_pairs([CONVERSATION], None)


def test_users_scores_and_rationales_are_carried_along(tokenizer):
    row = {"prompt": "ab", "chosen": "cd", "rejected": "e", "user": "ann", "score_chosen": 4, "score_rejected": 1.5}
    rated, plain = tokenize_preferences([row, {"prompt": "e", "chosen": "f", "rejected": "c"}], tokenizer)
    assert (rated.user, rated.scores) == ("ann", (4.0, 1.5))
    assert (plain.user, plain.scores, plain.rationale) == (None, None, None)
    explained = rated._replace(rationale=TokenSequence([1, 2], [3, 4, 5]))
    batch = collate_preferences([explained, explained._replace(user="bob", scores=(0.0, 2.0))], padding_side="left")
    assert batch.users == ("ann", "bob")
    assert batch.scores.tolist() == [[4.0, 1.5], [0.0, 2.0]]
    assert batch.rationales.sequences() == [([1, 2], [3, 4, 5])] * 2
    mixed = collate_preferences([explained, plain]).to("cpu")
    assert mixed.users == ("ann", None)
    assert mixed.scores is None
    assert mixed.rationales is None
