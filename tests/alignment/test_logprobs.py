"""Tests of the mathematics: each fails when the idea it names is removed."""

import copy

import pytest
import torch

from workingpapers.alignment import (
    frozen,
    reference_of,
    response_logits,
    select_logprobs,
    sequence_logprobs,
    token_logprobs,
)

transformers = pytest.importorskip("transformers")
VOCABULARY = 40


def tiny(kind, seed=0):
    torch.manual_seed(seed)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    elif kind == "gemma2":  # soft-caps the logits behind its head
        config = transformers.Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.3,
            final_logit_softcapping=2.0,
            attn_implementation="eager",
        )
    else:  # absolute positions
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
        )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def padded(side, extra=0):
    """Three sequences of 5, 8 and 3 tokens; the response starts at token 2, 4 and 1."""
    generator = torch.Generator().manual_seed(1)
    length = 8 + extra
    ids, attention = torch.zeros(3, length, dtype=torch.long), torch.zeros(3, length, dtype=torch.long)
    response = torch.zeros(3, length, dtype=torch.bool)
    for row, (used, prompt) in enumerate([(5, 2), (8, 4), (3, 1)]):
        start = length - used if side == "left" else 0
        ids[row, start : start + used] = torch.randint(1, VOCABULARY, (used,), generator=generator)
        attention[row, start : start + used] = 1
        response[row, start + prompt : start + used] = True
    return ids, attention, response


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_agrees_with_the_log_softmax_of_all_logits_also_in_its_gradient(kind):
    ids, attention, response = padded("right")
    model = tiny(kind)
    weights = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    found = token_logprobs(model, ids, attention, response)
    (found * weights).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model.zero_grad()
    everything = model(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
    plain = torch.zeros(3, 8)
    plain[:, 1:] = everything.gather(2, ids[:, 1:, None]).squeeze(2)
    plain = plain * response
    (plain * weights).sum().backward()
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    expected = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == len(expected)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_side_and_amount_do_not_matter(kind):
    model = tiny(kind)
    with torch.no_grad():
        right = sequence_logprobs(model, *padded("right"))
        left = sequence_logprobs(model, *padded("left", extra=3))
        alone = [sequence_logprobs(model, *(part[row : row + 1] for part in padded("right"))) for row in range(3)]
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(alone), right, atol=1e-5, rtol=1e-5)


def test_prompt_tokens_are_not_scored_but_condition_the_response():
    model = tiny("llama")
    ids, attention, response = padded("right")
    with torch.no_grad():
        before = token_logprobs(model, ids, attention, response)
        ids[1, 1] = (ids[1, 1] + 1) % VOCABULARY
        after = token_logprobs(model, ids, attention, response)
    assert (before[~response] == 0).all()
    assert (before[1, response[1]] != after[1, response[1]]).all()


def test_only_scored_positions_reach_the_head():
    model = tiny("llama")
    ids, attention, response = padded("right")
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    logits = response_logits(model, ids, attention, response)
    assert seen == [(1, int(response.sum()), VOCABULARY)]
    assert logits.shape == (int(response.sum()), VOCABULARY)
    assert not model.lm_head._forward_pre_hooks


def test_a_model_that_bypasses_its_head_module_is_scored_all_the_same():
    class Bypassing(transformers.LlamaForCausalLM):
        def forward(self, input_ids, attention_mask):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)

    model = tiny("llama")
    bypassing = Bypassing(model.config).eval()
    bypassing.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            sequence_logprobs(bypassing, *padded("right")), sequence_logprobs(model, *padded("right"))
        )


def test_selection_is_exact_in_blocks_and_half_precision_is_normalised_in_float32(monkeypatch):
    monkeypatch.setattr("workingpapers.alignment.logprobs._BLOCK", 3 * 11)
    logits = torch.randn(10, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.arange(10)
    assert torch.autograd.gradcheck(lambda z: select_logprobs(z, labels), (logits,))
    torch.testing.assert_close(select_logprobs(logits, labels), logits.log_softmax(1)[torch.arange(10), labels])
    half = (100 * logits).bfloat16().detach()
    assert select_logprobs(half, labels).dtype == torch.float32
    torch.testing.assert_close(select_logprobs(half, labels), half.float().log_softmax(1)[torch.arange(10), labels])


def test_reference_is_the_model_without_its_adapters_and_equals_a_frozen_copy():
    peft = pytest.importorskip("peft")
    base = tiny("llama")
    copied = copy.deepcopy(base)
    # An adapter on the head as well: the head's own forward must run.
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], lora_dropout=0.5, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.train()
    batch = padded("left")
    with reference_of(model) as reference:
        without = sequence_logprobs(reference, *batch)
    with reference_of(model, copied) as reference:
        frozen_copy = sequence_logprobs(reference, *batch)
    assert not without.requires_grad
    torch.testing.assert_close(without, frozen_copy, rtol=0, atol=1e-6)
    with frozen(model):
        adapted = sequence_logprobs(model, *batch)
    assert (adapted - without).abs().min() > 1e-3
    assert model.training
    assert all(module.training for module in model.modules())


def test_a_model_without_adapters_needs_a_reference_of_its_own():
    with pytest.raises(ValueError, match="got a LlamaForCausalLM: pass a frozen copy"), reference_of(tiny("llama")):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, attention, response: (ids[0], attention, response), "input_ids must have shape"),
        (lambda ids, attention, response: (ids, attention[:, 1:], response), "attention_mask must have the shape"),
        (lambda ids, attention, response: (ids, attention, response.long()), "must be boolean, got torch.int64"),
        (lambda ids, attention, response: (ids, attention, response & False), "marks no token"),
        (lambda ids, attention, response: (ids, attention, attention.bool()), "the first token of a sequence"),
        (lambda ids, attention, response: (ids, attention, response | ~attention.bool()), "marks padding"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        token_logprobs(tiny("llama"), *change(*padded("left", extra=1)))


def test_labels_must_fit_the_logits():
    with pytest.raises(ValueError, match=r"one per row of logits \(3, 5\), got \(2,\)"):
        select_logprobs(torch.zeros(3, 5), torch.zeros(2, dtype=torch.long))
