"""Tests of the mathematics: each fails when the idea it names is removed."""

import copy
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from workingpapers.alignment import RewardModel, TokenPair, bradley_terry_loss, collate_preferences, pair_scores

transformers = pytest.importorskip("transformers")


def gpt2(kind="GPT2Model", **changes):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=16, n_embd=8, n_layer=2, n_head=2, num_labels=1, pad_token_id=0, **changes
    )
    return getattr(transformers, kind)(config).eval()


def llama(kind="LlamaModel"):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
        pad_token_id=0,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


PAIRS = [TokenPair([3, 4], [5, 6, 7], [8]), TokenPair([9], [2], [10, 11])]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_score_is_that_of_the_last_real_token_with_padding_on_either_side(make):
    reward = RewardModel(make(), generator=torch.Generator().manual_seed(1))
    alone = torch.cat(
        [
            reward(torch.tensor([[*pair.prompt, *answer]]))
            for answers in ("chosen", "rejected")
            for pair in PAIRS
            for answer in [getattr(pair, answers)]
        ]
    )
    for side in ("left", "right"):
        batch = collate_preferences(PAIRS, padding_side=side)
        torch.testing.assert_close(torch.cat(pair_scores(reward, batch)), alone, atol=1e-6, rtol=1e-5)
    states = reward.model(input_ids=torch.tensor([[9, 2]])).last_hidden_state
    torch.testing.assert_close(alone[1], (states[0, -1] @ reward.head.weight[0]))


def test_a_causal_model_is_read_before_its_vocabulary():
    model = llama("LlamaForCausalLM")
    reward = RewardModel(model, generator=torch.Generator().manual_seed(1))
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the vocabulary was scored"))
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(reward(ids), reward.head(model.model(input_ids=ids).last_hidden_state[:, -1])[:, 0])


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_classifier_keeps_its_head_and_its_scores(make):
    model = make({gpt2: "GPT2ForSequenceClassification", llama: "LlamaForSequenceClassification"}[make])
    reward = RewardModel(model)
    assert reward.head is None
    batch = collate_preferences(PAIRS)
    expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    torch.testing.assert_close(reward(batch.input_ids, batch.attention_mask), expected)


def test_an_answer_may_end_in_the_token_that_pads():
    model = gpt2("GPT2ForSequenceClassification")
    reward = RewardModel(model)
    ids, mask = torch.tensor([[3, 5, 0, 0]]), torch.tensor([[1, 1, 1, 0]])  # 0 ends the answer, and pads
    alone = model.score(model.transformer(input_ids=ids[:, :3]).last_hidden_state[:, -1])[:, 0]
    torch.testing.assert_close(reward(ids, mask), alone)
    assert (model(input_ids=ids, attention_mask=mask).logits[:, 0] - alone).abs().item() > 1e-4  # one token too early


def test_an_encoder_with_its_own_pooling_is_left_to_it():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(RewardModel(model)(ids), model(input_ids=ids).logits[:, 0])
    with pytest.raises(ValueError, match="pools in its own way"):
        RewardModel(model).token_values(ids)


def test_heads_differ_by_their_generator_alone():
    first, again, other = (RewardModel(gpt2(), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    wide = torch.stack(
        [RewardModel(gpt2(), generator=torch.Generator().manual_seed(s)).head.weight for s in range(100)]
    )
    assert wide.std().item() == pytest.approx(1 / 3, rel=0.1)  # 1 / sqrt(8 + 1)


def test_adapters_are_trained_through_the_score():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        gpt2("GPT2LMHeadModel"), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    reward = RewardModel(model, generator=torch.Generator().manual_seed(1))
    batch = collate_preferences(PAIRS)
    with model.disable_adapter():
        before = reward(batch.input_ids, batch.attention_mask)
    optimizer = torch.optim.Adam([p for p in reward.parameters() if p.requires_grad], lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        loss = bradley_terry_loss(*pair_scores(reward, batch))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(p.abs().sum() > 0 for p in adapters)
    with model.disable_adapter():
        assert not torch.allclose(reward(batch.input_ids, batch.attention_mask), before)  # the head moved
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    prompted = peft.get_peft_model(gpt2("GPT2LMHeadModel"), prompts)
    with pytest.raises(ValueError, match="prompt-learning"):
        RewardModel(prompted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_values_are_the_scores_of_prefixes(side):
    reward = RewardModel(llama(), generator=torch.Generator().manual_seed(1))
    batch = collate_preferences(PAIRS, padding_side=side)
    values = reward.token_values(batch.input_ids, batch.attention_mask)
    for row, real in enumerate(batch.attention_mask.bool()):
        ids = batch.input_ids[row][real]
        prefixes = torch.cat([reward(ids[None, :length]) for length in range(1, len(ids))])
        torch.testing.assert_close(values[row][real][1:], prefixes, atol=1e-6, rtol=1e-5)
    assert values[:, 0].tolist() == [0.0] * 4


def test_half_precision_scores_come_back_in_single():
    assert RewardModel(llama().bfloat16())(torch.tensor([[1, 2]])).dtype == torch.float32


def test_saved_weights_load(tmp_path):
    reward, other = (RewardModel(gpt2(), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    torch.save(reward.state_dict(), tmp_path / "reward.pt")
    other.load_state_dict(torch.load(tmp_path / "reward.pt"))
    ids = torch.tensor([[1, 2]])
    assert torch.equal(reward(ids), other(ids))


def test_bad_batches_and_models_are_named():
    reward = RewardModel(gpt2())
    with pytest.raises(ValueError, match="one shape"):
        reward(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one token"):
        reward(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    config = copy.deepcopy(gpt2().config)
    config.num_labels = 2
    with pytest.raises(ValueError, match="num_labels=1, got 2"):
        RewardModel(transformers.GPT2ForSequenceClassification(config))


# ---------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_that_of_trl(tmp_path):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    tokenizers = pytest.importorskip("tokenizers")
    model = llama("LlamaForSequenceClassification")
    vocabulary = {"<p>": 0, **{chr(97 + i): i + 1 for i in range(12)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[])),
        pad_token="<p>",
        eos_token="l",
    )
    arguments = trl.RewardConfig(
        output_dir=str(tmp_path), report_to=[], bf16=False, gradient_checkpointing=False, use_cpu=True,
        center_rewards_coefficient=0.01, disable_dropout=True,
    )  # fmt: skip
    rows = [{"prompt": "cd", "chosen": "efg", "rejected": "h"}, {"prompt": "i", "chosen": "b", "rejected": "jk"}]
    trainer = trl.RewardTrainer(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    inputs = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    theirs = trainer.compute_loss(model, dict(inputs))
    theirs.backward()
    their_gradient = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    chosen, rejected = RewardModel(model)(inputs["input_ids"], inputs["attention_mask"]).chunk(2)
    ours = bradley_terry_loss(chosen, rejected, centre=0.01)
    ours.backward()
    assert abs(ours.item() - theirs.item()) < 1e-5
    our_gradient = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-5, rtol=1e-4)
    margin = torch.tensor([0.5, 1.0])
    theirs = trainer.compute_loss(model, {**inputs, "margin": margin})
    assert abs(bradley_terry_loss(chosen, rejected, margin=margin, centre=0.01).item() - theirs.item()) < 1e-5


def test_each_term_of_the_loss_is_its_formula():
    won, lost = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    plain = -logsigmoid(won - lost)
    torch.testing.assert_close(bradley_terry_loss(won, lost, reduction="none"), plain)
    torch.testing.assert_close(bradley_terry_loss(won, lost, reduction="sum"), plain.sum())
    torch.testing.assert_close(bradley_terry_loss(won, lost, margin=0.3), -logsigmoid(won - lost - 0.3).mean())
    penalised = bradley_terry_loss(won, lost, score_l2=0.2, reduction="none")
    torch.testing.assert_close(penalised - plain, 0.1 * (won**2 + lost**2))
    centred = bradley_terry_loss(won, lost, centre=0.2, reduction="none")
    torch.testing.assert_close(centred - plain, 0.2 * (won + lost) ** 2)
    assert bradley_terry_loss(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(math.log(2))


def test_a_constant_added_to_all_scores_is_seen_by_the_penalties_alone():
    won, lost = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    assert bradley_terry_loss(won + 9, lost + 9) == bradley_terry_loss(won, lost)
    assert bradley_terry_loss(won + 9, lost + 9, centre=0.1) > bradley_terry_loss(won, lost, centre=0.1) + 10


def test_far_scores_do_not_overflow():
    won = torch.tensor([-1e4], requires_grad=True)
    loss = bradley_terry_loss(won, torch.zeros(1))
    loss.backward()
    assert (loss.item(), won.grad.item()) == (1e4, -1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": torch.zeros(3)}, r"one shape, got \(2,\) and \(3,\)"),
        ({"margin": torch.zeros(1)}, r"margin must have the shape of chosen \(2,\)"),
        ({"score_l2": -1.0}, "score_l2 must be at least 0"),
        ({"centre": float("nan")}, "centre must be at least 0"),
        ({"reduction": "max"}, "reduction must be one of"),
    ],
)
def test_bad_arguments_of_the_loss_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry_loss(**({"chosen": torch.zeros(2), "rejected": torch.zeros(2)} | change))
