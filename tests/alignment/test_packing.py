"""Packed sequences have the log-probabilities of padded ones, and are blind to each other."""

from __future__ import annotations

import pytest
import torch

from workingpapers.alignment import collate_sequences, packed_token_logprobs, token_logprobs

transformers = pytest.importorskip("transformers")
SEQUENCES = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10]), ([3, 3], [1])]


def tiny(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        return transformers.GPT2LMHeadModel(config).double().eval()
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_values_and_gradients_are_those_of_the_padded_batch(kind, side):
    model = tiny(kind)
    batch = collate_sequences(SEQUENCES, padding_side=side)
    weights = torch.randn(batch.input_ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, logprobs in (
        ("padded", token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask)),
        ("packed", packed_token_logprobs(model, batch)),
    ):
        gradients = torch.autograd.grad((weights * logprobs).sum(), list(model.parameters()), allow_unused=True)
        found[name] = [logprobs.detach(), *(gradient for gradient in gradients if gradient is not None)]
    for one, other in zip(found["packed"], found["padded"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_adapters_take_part_and_prompts_are_refused():
    peft = pytest.importorskip("peft")
    batch = collate_sequences(SEQUENCES)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama"), lora)
    padded = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask)
    torch.testing.assert_close(packed_token_logprobs(model, batch), padded)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt-learning"):
        packed_token_logprobs(peft.get_peft_model(tiny("llama"), prompts), batch)


def test_a_model_without_positions_is_refused():
    class Model(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(ValueError, match="position_ids"):
        packed_token_logprobs(Model(), collate_sequences(SEQUENCES))
