"""Sampling from a policy: the distribution, the cached log-probabilities, and independence of the batching."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare

from workingpapers.alignment import collate_sequences, sample_responses, token_logprobs

transformers = pytest.importorskip("transformers")
VOCABULARY, END = 11, 10
PROMPTS = [[1, 2, 3], [4], [5, 6]]


def tiny(kind="llama", seed=0, scale=6.0):
    torch.manual_seed(seed)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, bos_token_id=None, eos_token_id=END, pad_token_id=0,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=END
        )
        model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)  # far from uniform
    return model.eval()


def draw(model, seed=0, prompts=PROMPTS, **options):
    options = {"n": 4, "max_new_tokens": 6, "eos_token_id": END} | options
    return sample_responses(model, prompts, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.5, "top_k": 5}, {"top_p": 0.8}])
def test_logprobs_are_those_of_the_model_without_filters(kind, filters):
    model = tiny(kind).double()
    batch = draw(model, **filters)
    again = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask)
    torch.testing.assert_close(batch.logprobs, again.detach())
    other_side = collate_sequences(batch.sequences())
    again = token_logprobs(model, other_side.input_ids, other_side.attention_mask, other_side.response_mask)
    torch.testing.assert_close(batch.logprobs.sum(1), again.detach().sum(1))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"min_new_tokens": 1}])
def test_tokens_follow_the_distribution_of_transformers_generate(options):
    model = tiny(scale=10.0).double()
    count = 4000
    logits = model(torch.tensor([[1, 2, 3]])).logits[0, -1].detach() / options.get("temperature", 1.0)
    warpers = []
    if "top_k" in options:
        warpers.append(transformers.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(transformers.TopPLogitsWarper(options["top_p"]))
    if "min_new_tokens" in options:
        logits[END] = -math.inf
    scores = logits[None]
    for warper in warpers:
        scores = warper(None, scores)
    expected = scores.softmax(-1)[0].numpy() * count
    batch = draw(model, prompts=[[1, 2, 3]], n=count, max_new_tokens=1, **options)
    observed = torch.bincount(torch.tensor(batch.responses()).squeeze(1), minlength=VOCABULARY).numpy()
    assert observed[expected == 0].sum() == 0
    assert chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_greedy_decoding_is_that_of_transformers():
    model = tiny(scale=10.0)
    batch = draw(model, n=1, temperature=0.0, eos_token_id=END, max_new_tokens=8)
    for prompt, response in zip(PROMPTS, batch.responses(), strict=True):
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=8, eos_token_id=END, pad_token_id=0,
        )  # fmt: skip
        assert response == expected[0, len(prompt) :].tolist()


def test_batching_and_the_global_generator_change_nothing():
    model = tiny().double()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    whole = draw(model, max_new_tokens=20)
    assert torch.equal(state, torch.random.get_rng_state())
    for size in (1, 4, 5, 8):
        parts = draw(model, max_new_tokens=20, batch_size=size)
        assert parts.responses() == whole.responses()
        torch.testing.assert_close(parts.logprobs, whole.logprobs)
    alone = draw(model, max_new_tokens=20, prompts=PROMPTS[:1])
    assert alone.responses() == whole.responses()[:4]
    assert draw(model, seed=1, max_new_tokens=20).responses() != whole.responses()


def test_responses_end_where_they_end():
    batch = draw(tiny(), n=50, max_new_tokens=12)
    assert 0 < batch.finished.sum() < len(batch), "both kinds must be there"
    for response, finished in zip(batch.responses(), batch.finished.tolist(), strict=True):
        assert (response[-1] == END) == finished
        assert END not in response[:-1]
        assert finished or len(response) == 12
    assert batch.prompts() == [prompt for prompt in PROMPTS for _ in range(50)]
    assert not batch.logprobs[~batch.response_mask].any()
    never = draw(tiny(), n=5, max_new_tokens=12, eos_token_id=None)
    assert never.lengths.tolist() == [12] * 15
    assert not never.finished.any()
    several = draw(tiny(), n=50, max_new_tokens=12, eos_token_id=[END, 3])
    assert {response[-1] for response in several.responses() if len(response) < 12} == {END, 3}


def test_the_model_is_left_as_it_was():
    model = tiny().train()
    draw(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adapters_take_part():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    batch = draw(model)
    with torch.no_grad():
        again = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask)
    torch.testing.assert_close(batch.logprobs, again, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must"),
        ({"max_new_tokens": 0}, "max_new_tokens must"),
        ({"min_new_tokens": 9}, "min_new_tokens must"),
        ({"temperature": -1.0}, "temperature must"),
        ({"temperature": math.nan}, "temperature must"),
        ({"top_k": 0}, "top_k must"),
        ({"top_p": 0.0}, "top_p must"),
        ({"batch_size": 0}, "batch_size must"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[1], []]}, "none may be empty"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny(), **options)


def test_logits_that_are_no_numbers_are_refused():
    model = tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not numbers"):
        draw(model)
