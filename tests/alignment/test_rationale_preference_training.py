"""Rationales as text and tokens, and training on them."""

import copy

import numpy as np
import pytest
import torch

from workingpapers.alignment import (
    RationaleConfig,
    RationaleFormatter,
    RationaleLoss,
    RationaleTrainer,
    RPOConfig,
    RPOTrainer,
    TokenPair,
    TokenSequence,
    add_rationales,
    collate_preferences,
    pair_logprobs,
    sequence_logprobs,
    tokenize_preferences,
    tokenize_rationales,
)

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
ROW = {"prompt": "Say hi.", "chosen": "Hi!", "rejected": "No way.", "rationale": "It greets."}


def chat(prompt, chosen, rejected, **columns):
    messages = {"prompt": ("user", prompt), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
    return {name: [{"role": role, "content": text}] for name, (role, text) in messages.items()} | columns


CHAT_ROW = chat(ROW["prompt"], ROW["chosen"], ROW["rejected"], rationale=ROW["rationale"])


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, and the markers of the chat template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        additional_special_tokens=["<u>", "<a>", "<s>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


# ------------------------------------------------------------------------------------------------------------- prompts


def test_the_better_response_is_quoted_first():
    text = RationaleFormatter()("What is it?", "a sun", "a moon", 7)
    assert text.index("What is it?") < text.index("a sun") < text.index("a moon")
    assert text.endswith("Which of the two responses serves the request better, and why?")


def test_in_random_order_the_prompt_names_the_winner_wherever_it_stands():
    formatter = RationaleFormatter("random", random_state=3)
    first = 0
    for number in range(200):
        text = formatter("?", "sun", "moon", number)
        assert text == formatter("?", "sun", "moon", number)
        place = 1 if text.index("sun") < text.index("moon") else 2
        assert text.endswith(f"Response {place} serves the request better. Why?")
        first += place == 1
    assert 70 < first < 130
    others = [RationaleFormatter("random", random_state=4)("?", "sun", "moon", number) for number in range(200)]
    assert others != [formatter("?", "sun", "moon", number) for number in range(200)]


def test_the_rationale_answers_its_own_prompt_and_is_nowhere_else(tokenizer):
    for row, mark in ((ROW, "\n\n"), (CHAT_ROW, "<end><a>")):
        (pair,) = tokenize_rationales([row], tokenizer)
        (bare,) = tokenize_preferences([row], tokenizer)
        (other,) = tokenize_rationales([{**row, "rationale": "Because."}], tokenizer)
        assert pair[:3] == bare[:3] == other[:3]
        assert other.rationale.prompt == pair.rationale.prompt
        assert tokenizer.decode(pair.rationale.response) == "It greets.<end>"
        prompt = tokenizer.decode(pair.rationale.prompt)
        assert RationaleFormatter()("Say hi.", "Hi!", "No way.", 0) + mark in prompt
        assert "It greets." not in prompt
        # the other way round, the prompt of the answers shows neither answer nor rationale
        assert "Hi!" not in tokenizer.decode(pair.prompt)
        batch = collate_preferences([pair])
        assert batch.rationales.responses() == [pair.rationale.response]  # only its tokens are scored


def test_every_pair_of_a_prompt_keeps_its_own_rationale(tokenizer):
    rows = [ROW, {**ROW, "chosen": "Hello.", "rationale": "It is polite."}]
    prompts = [tokenizer.decode(pair.rationale.prompt) for pair in tokenize_rationales(rows, tokenizer)]
    assert ["Hello." in prompt for prompt in prompts] == [False, True]


def test_conversations_keep_their_system_message_and_quote_turns_by_role(tokenizer):
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hm?"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go."},
    ]
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "Ok."), ("rejected", "No."))
    }
    (pair,) = tokenize_rationales([{"prompt": turns, **answers, "rationale": "Willing."}], tokenizer)
    prompt = tokenizer.decode(pair.rationale.prompt)
    assert prompt.startswith("<s>Be kind.<end><u>")
    assert prompt.count("Be kind.") == 1
    assert "Request:\nuser: Hm?\nassistant: Yes?\nuser: Go.\n" in prompt
    whole = {name: turns + messages for name, messages in answers.items()}
    assert tokenize_rationales([{**whole, "rationale": "Willing."}], tokenizer) == [pair]


def test_responses_are_shortened_before_the_rationale_is(tokenizer):
    row = {**ROW, "chosen": "x" * 400, "rejected": "y" * 50, "rationale": "z" * 60}
    with pytest.warns(UserWarning, match="1 of 1 rationales quote shortened responses: max_rationale_length=300"):
        (pair,) = tokenize_rationales([row], tokenizer, max_rationale_length=300)
    prompt = tokenizer.decode(pair.rationale.prompt)
    assert prompt.startswith("Request:\nSay hi.")
    assert "y" * 50 in prompt
    assert "x" * 20 + " ..." in prompt
    assert tokenizer.decode(pair.rationale.response) == "z" * 60 + "<end>"
    assert 280 <= len(pair.rationale.prompt) + len(pair.rationale.response) <= 300
    assert len(pair.chosen) == 401  # the pair itself is whole


def test_where_even_that_is_not_enough_the_rationale_keeps_half(tokenizer):
    row = {**ROW, "prompt": "p" * 400, "rationale": "z" * 90}
    with pytest.warns(UserWarning, match="shortened"):
        (pair,) = tokenize_rationales([row], tokenizer, max_rationale_length=100)
    assert tokenizer.decode(pair.rationale.response) == "z" * 50
    assert tokenizer.decode(pair.rationale.prompt).endswith("and why?\n\n")
    assert len(pair.rationale.prompt) == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rationale": " "}, "row 0 of dataset: rationale must be a non-empty text, got ' '"),
        ({"rationale": None}, "row 0 of dataset: rationale must be a non-empty text, got None"),
        ({"chosen": ""}, "row 0 of dataset: chosen must be a non-empty text, got ''"),
        ({"prompt": None}, "row 0 of dataset: prompt must be a non-empty text, got None"),
        ({"chosen": 3}, "row 0 of dataset: chosen must be text or a list of messages"),
    ],
)
def test_bad_rows_are_named(tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        tokenize_rationales([ROW | change], tokenizer)


def test_bad_formatting_is_named(tokenizer):
    with pytest.raises(ValueError, match="dataset must have at least one row"):
        tokenize_rationales([], tokenizer)
    with pytest.raises(ValueError, match="max_rationale_length must be at least 2"):
        tokenize_rationales([ROW], tokenizer, max_rationale_length=1)
    with pytest.raises(ValueError, match="order must be one of 'chosen_first', 'random'"):
        RationaleFormatter("rejected_first")
    with pytest.raises(ValueError, match="random_state must be at least 0"):
        RationaleFormatter("random", random_state=-1)


# ------------------------------------------------------------------------------------------------- written by a model


def test_a_model_is_told_the_label_and_writes_a_column():
    asked = []

    def generate(instructions):
        asked.extend(instructions)
        return [f" reason {number} \n" for number in range(len(instructions))]

    rows = [{key: ROW[key] for key in ("prompt", "chosen", "rejected")}, chat("Why?", "So.", "Hm.")]
    found = add_rationales(rows, generate)
    assert [row["rationale"] for row in found] == ["reason 0", "reason 1"]
    assert "rationale" not in rows[0]
    assert found[1]["chosen"] == rows[1]["chosen"]
    assert (
        asked[0].index("Say hi.") < asked[0].index("The better response:\nHi!") < asked[0].index("other response:\nNo")
    )
    assert "The better response:\nSo." in asked[1]
    general = asked.copy()
    asked.clear()
    add_rationales(rows, generate, style="specific")
    assert "quote the words" in asked[0]
    assert "do not quote" in general[0]


def test_a_dataset_gets_the_column_and_trains(tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{key: ROW[key] for key in ("prompt", "chosen", "rejected")}] * 3)
    found = add_rationales(rows, lambda asked: ["It is kind."] * len(asked))
    assert isinstance(found, datasets.Dataset)
    assert found.column_names == ["prompt", "chosen", "rejected", "rationale"]
    model = tiny(vocabulary=len(tokenizer))
    trainer = RationaleTrainer(model, tiny(vocabulary=len(tokenizer)), found, tokenizer, RationaleConfig(gamma=0.001))
    assert trainer.train()[0]["rationale_perplexity"] > 1.0


@pytest.mark.parametrize(
    ("rows", "generate", "message"),
    [
        ([], list, "dataset must have at least one row"),
        ([ROW], list, "row 0 of dataset has a rationale already"),
        ([{**ROW, "chosen": " "}], list, "row 0 of dataset"),
        ([chat("a", "b", "c")], lambda asked: [], "generate must return 1 rationales, got 0"),
        ([chat("a", "b", "c")], lambda asked: [" "], "generate's rationale 0 must be a non-empty text"),
        ([chat("a", "b", "c")], lambda asked: [None], "generate's rationale 0 must be a non-empty text, got None"),
    ],
)
def test_bad_rationales_are_named(rows, generate, message):
    with pytest.raises(ValueError, match=message):
        add_rationales(rows, generate)
    with pytest.raises(ValueError, match="style must be one of 'general', 'specific', got 'short'"):
        add_rationales(rows, generate, style="short")


# ------------------------------------------------------------------------------------------------------------ training

VOCABULARY = 24


def tiny(seed=0, vocabulary=VOCABULARY):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def random_pairs(n=10, seed=0):
    rng = np.random.default_rng(seed)

    def ids(most):
        return rng.integers(VOCABULARY, size=rng.integers(1, most)).tolist()

    return [TokenPair(ids(5), ids(7), ids(7), rationale=TokenSequence(ids(12), ids(6))) for _ in range(n)]


def train(model, ref_model, steps=None, pairs=None, **options):
    options = {"learning_rate": 1e-2, "batch_size": 4, "epochs": 3, "gamma": 0.1} | options
    trainer = RationaleTrainer(model, ref_model, pairs or random_pairs(), args=RationaleConfig(**options))
    trainer.train(steps)
    return trainer


def parameters(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def test_gamma_zero_trains_as_dpo_does_and_reads_no_rationale():
    ours = train(tiny(), tiny(1), gamma=0.0, pairs=[pair._replace(rationale=None) for pair in random_pairs()])
    args = RPOConfig(learning_rate=1e-2, batch_size=4, epochs=3, eta=0.0)
    dpo = RPOTrainer(tiny(), tiny(1), random_pairs(), args=args)
    dpo.train()
    assert torch.equal(parameters(ours.model), parameters(dpo.model))
    assert "rationale_loss" not in ours.history[0]


@pytest.mark.parametrize("base", ["dpo", "orpo", "simpo"])
def test_a_step_follows_the_gradient_of_the_loss_of_its_log_probabilities(base):
    pairs, model, reference = random_pairs(4), tiny(), tiny(1)
    by_hand = copy.deepcopy(model)
    batch = collate_preferences(pairs)
    asked = batch.rationales
    with torch.no_grad():
        referred = pair_logprobs(reference, batch)
    out = RationaleLoss(base, gamma=0.1)(
        *pair_logprobs(by_hand, batch),
        sequence_logprobs(by_hand, asked.input_ids, asked.attention_mask, asked.response_mask),
        *referred,
        chosen_lengths=batch.chosen_lengths,
        rejected_lengths=batch.rejected_lengths,
        rationale_lengths=asked.lengths,
    )
    out.loss.backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.5).step()
    args = RationaleConfig(base=base, gamma=0.1, learning_rate=0.5, warmup=None, batch_size=4, max_grad_norm=1e9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = RationaleTrainer(model, reference if base == "dpo" else None, pairs, args=args, optimizer=optimizer)
    (row,) = trainer.train(1)
    torch.testing.assert_close(parameters(model), parameters(by_hand), atol=1e-5, rtol=1e-5)
    for name in ("loss", "preference_loss", "rationale_loss", "rationale_perplexity"):
        assert row[name] == pytest.approx(getattr(out, name).mean().item(), rel=1e-4), name
    assert ("sft_loss" in row) is (base == "orpo")


def test_the_rationale_is_learned_where_gamma_is_above_zero():
    perplexity = {}
    for gamma in (1e-9, 0.5):
        trainer = train(tiny(), tiny(1), gamma=gamma, epochs=8)
        perplexity[gamma] = trainer.history[-1]["rationale_perplexity"]
        assert trainer.history[-1]["margin"] > trainer.history[0]["margin"]
    assert perplexity[0.5] < 0.6 * perplexity[1e-9]


@pytest.mark.parametrize("base", ["dpo", "orpo", "simpo"])
def test_accumulated_gradients_equal_those_of_the_joint_batch(base):
    pairs = random_pairs(7)  # the last part is smaller than the others
    joint, parts = tiny(), tiny()
    one = train(joint, tiny(1), 2, pairs, base=base, batch_size=7)
    other = train(parts, tiny(1), 2, pairs, base=base, batch_size=2, accumulation=4)
    for name, value in one.history[-1].items():
        assert other.history[-1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    torch.testing.assert_close(parameters(parts), parameters(joint), atol=1e-4, rtol=1e-4)


def test_a_resumed_run_with_adapters_goes_on_identically():
    peft = pytest.importorskip("peft")

    def start():
        model = tiny()
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM")), None

    whole = train(*start())
    state = train(*start(), steps=4).state_dict()
    second = train(*start(), steps=0)
    second.load_state_dict(state)
    second.train()
    assert second.history == whole.history
    assert torch.equal(parameters(second.model), parameters(whole.model))


def test_memory_savers_change_no_result():
    plain = train(tiny(), tiny(1))
    for options in ({"precompute_reference": True}, {"gradient_checkpointing": True}):
        other = train(tiny(), tiny(1), **options)
        torch.testing.assert_close(parameters(other.model), parameters(plain.model), atol=1e-4, rtol=1e-4)
    rounded = train(tiny(), tiny(1), 2, bf16=True)
    assert rounded.history[1]["loss"] == pytest.approx(plain.history[1]["loss"], rel=0.05)


def test_a_rationale_that_swamps_the_preferences_is_warned_of(recwarn):
    with pytest.warns(UserWarning, match="gamma=20 is large for rationales of this length with rationale_reduction='s"):
        train(tiny(), tiny(1), 1, gamma=20.0)
    train(tiny(), tiny(1), 1, gamma=0.01)
    train(tiny(), tiny(1), 1, gamma=20.0, preference_weight=0.0)  # rationales alone are meant
    assert not [warning for warning in recwarn if "gamma" in str(warning.message)]


def test_bad_trainer_input_is_named(tokenizer):
    without = [pair._replace(rationale=None) for pair in random_pairs(3)]
    with pytest.raises(ValueError, match="train_dataset must have a rationale in every pair, pair 0 has none"):
        train(tiny(), tiny(1), pairs=without)
    with pytest.raises(ValueError, match="pair 2 has none"):
        train(tiny(), tiny(1), pairs=[*random_pairs(2), without[0]])
    with pytest.raises(ValueError, match="pass a frozen copy as ref_model"):
        train(tiny(), None)
    with pytest.raises(ValueError, match="tokenizer may be None only"):
        RationaleTrainer(tiny(), tiny(1), [ROW])
    with pytest.raises(ValueError, match="row 0 of dataset: rationale must be a non-empty text"):
        RationaleTrainer(tiny(), tiny(1), [{**ROW, "rationale": ""}], tokenizer)
    for name, value in {"gamma": -1.0, "beta": 0.0, "base": "ipo", "max_rationale_length": 1}.items():
        with pytest.raises(ValueError, match=name):
            RationaleConfig(**{name: value})
