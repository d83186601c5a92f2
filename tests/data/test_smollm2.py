"""The converted model speaks: wrong rotary pairs, norms or token ids would all show in what it says."""

import pytest
import torch

from workingpapers.data import DataNotInstalled, smollm2

FLUENT = (
    "Photosynthesis is the process by which plants, algae, and some bacteria convert light energy from the sun into "
    "chemical energy in the form of organic compounds, such as glucose. This process is essential for life on Earth, "
    "as it provides the energy and organic compounds needed to support the food chain."
)


@pytest.fixture(scope="module")
def loaded():
    pytest.importorskip("transformers")
    try:
        return smollm2()
    except DataNotInstalled as missing:
        pytest.skip(str(missing))


def nats_per_token(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def test_it_knows_the_capital_of_france(loaded):
    model, tokenizer = loaded
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=2, do_sample=False)[0]
    assert tokenizer.decode(answer).startswith("The capital of France is Paris")


def test_fluent_text_costs_little_and_its_shuffle_much(loaded):
    model, tokenizer = loaded
    ids = tokenizer(FLUENT, return_tensors="pt").input_ids
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    assert nats_per_token(model, ids) < 1.8
    assert nats_per_token(model, shuffled) > 5.0


def test_text_survives_the_tokenizer_and_digits_are_single(loaded):
    _, tokenizer = loaded
    text = "In 1987: café, 日本\n\n  two  spaces"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode(token) for token in tokenizer("1987").input_ids] == ["1", "9", "8", "7"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat).input_ids[0] == tokenizer.bos_token_id


def test_every_call_reads_the_weights_anew(loaded):
    model, _ = loaded
    other, _ = smollm2(torch.bfloat16)
    assert other.dtype == torch.bfloat16
    with torch.no_grad():
        other.model.norm.weight.zero_()
    assert model.model.norm.weight.abs().sum() > 0
