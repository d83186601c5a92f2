"""Tests of the two training stages and of the personal reward function."""

import copy
import warnings

import numpy as np
import pytest
import torch

from workingpapers.alignment import (
    Comparison,
    Episode,
    EpisodeSampler,
    FewShotTemplate,
    FSPOConfig,
    FSPOLoss,
    FSPOTrainer,
    PersonalRewarder,
    PrefFTTrainer,
    collate_preferences,
    pair_logprobs,
)

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEMPLATE = FewShotTemplate()


@pytest.fixture(scope="module")
def tokenizer():
    """Words and newlines, as they come."""
    template = FewShotTemplate(describe=True)
    texts = [
        FewShotTemplate(describe=d).prompt(shots, "red or blue ?")
        for d in (False, True)
        for shots in ([], [shot("red", "blue")] * 5)
    ]
    text = "".join(texts) + template.response_heading + template.description_heading + " green\nlikes red blue or green"
    words = dict.fromkeys(piece for piece, _ in splitter().pre_tokenize_str(text))
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", *words])}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    found.pre_tokenizer = splitter()
    found.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, eos_token="</s>", bos_token="<s>")


def splitter():
    return tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n| ?[^\s]+"), "isolated")


def shot(chosen, rejected, **more):
    return Comparison("red or blue ?", chosen, rejected, **more)


def tiny(tokenizer, seed=0):
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def two_users(count=8):
    """One who likes red and one who likes blue: only the shots tell which."""
    sides = [("red", "blue"), ("blue", "red")]
    return [Episode((shot(*sides[i % 2]),), shot(*sides[i % 2]), i % 2) for i in range(count)]


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


ARGS = FSPOConfig(learning_rate=2e-2, warmup=None, max_grad_norm=1.0, batch_size=8, max_steps=60)


def test_the_loss_of_a_step_is_that_of_summed_log_probabilities_with_the_shots_in_both(tokenizer):
    model, reference = tiny(tokenizer, 0), tiny(tokenizer, 1)
    episodes = two_users(4)
    pairs = [TEMPLATE.fit(e.shots, e.query, tokenizer, 100) for e in episodes]
    with torch.no_grad():
        logps = [pair_logprobs(m, collate_preferences(pairs)) for m in (model, reference)]
    for loss in (FSPOLoss("ipo", 0.25), FSPOLoss("dpo", 0.3, 0.1)):
        args = FSPOConfig(max_steps=1)
        trainer = FSPOTrainer(copy.deepcopy(model), reference, tokenizer, episodes, TEMPLATE, args, loss=loss)
        [row] = trainer.train() if loss.kind == "dpo" else caught(trainer)
        assert row["loss"] == pytest.approx(loss(*logps[0], *logps[1]).loss.item(), rel=1e-5)


def caught(trainer):
    with pytest.warns(UserWarning, match=r"under half of the 1 / \(2 beta\) = 2 that IPO aims at"):
        return trainer.train()


def test_the_losses_equal_those_of_trl(tokenizer, tmp_path):
    """trl averages log-ratios over tokens in IPO: where answers have L tokens, its beta is L times ours."""
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    datasets = pytest.importorskip("datasets")
    model, reference = tiny(tokenizer, 0), tiny(tokenizer, 1)
    pairs = [TEMPLATE.fit(e.shots, e.query, tokenizer, 100) for e in two_users(2)]
    length = len(pairs[0].chosen)
    assert {len(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)} == {length}
    with torch.no_grad():
        logps = [
            *pair_logprobs(model, collate_preferences(pairs)),
            *pair_logprobs(reference, collate_preferences(pairs)),
        ]
    arguments = dpo.DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    trainer = dpo.DPOTrainer(
        model,
        reference,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([TEMPLATE.row(two_users()[0]) | {"user": "1"}]),
        processing_class=tokenizer,
    )
    inputs = trainer.data_collator(
        [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    )
    for kind, name, scale in (("dpo", "sigmoid", 1), ("ipo", "ipo", length)):
        trainer.loss_types, trainer.beta = [name], 0.3 * scale
        theirs = trainer._compute_loss(trainer.model, inputs, False).item()
        ours = FSPOLoss(kind, 0.3)(*logps).loss.item()
        assert ours / scale**2 == pytest.approx(theirs, abs=1e-5)


@pytest.fixture(scope="module")
def stage_one(tokenizer):
    trainer = PrefFTTrainer(tiny(tokenizer), tokenizer, two_users(), TEMPLATE, ARGS)
    trainer.train()
    return trainer


def test_users_are_told_apart_by_their_shots_alone(tokenizer, stage_one):
    reference = stage_one.reference()
    model = copy.deepcopy(stage_one.model)
    args = FSPOConfig(learning_rate=3e-3, warmup=None, batch_size=8, max_steps=20)
    trainer = FSPOTrainer(model, reference, tokenizer, two_users(), TEMPLATE, args, loss=FSPOLoss("ipo", 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the margin reaches its target
        trainer.train()
    assert trainer.history[-1]["margin"] == pytest.approx(1.0, abs=0.5)
    rewarder = trainer.rewarder()
    assert (rewarder.margins(two_users(2)) > 0).all()
    red, blue = (
        rewarder.score([shot(*sides)], "red or blue ?", ["red", "blue"]) for sides in (("red", "blue"), ("blue", "red"))
    )
    assert red[0] > red[1]
    assert blue[0] < blue[1]
    np.testing.assert_allclose(red[0] - red[1], rewarder.margins(two_users(1))[0], rtol=1e-3)
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_scores_are_scaled_log_ratios_and_zero_at_the_reference(tokenizer):
    model = tiny(tokenizer)
    rewarder = PersonalRewarder(model, copy.deepcopy(model), tokenizer, TEMPLATE, beta=0.3)
    np.testing.assert_allclose(rewarder.score([], "red or blue ?", ["red", "blue", "or"]), 0, atol=1e-6)
    other = PersonalRewarder(model, tiny(tokenizer, 1), tokenizer, TEMPLATE, beta=0.3, batch_size=2)
    double = PersonalRewarder(model, tiny(tokenizer, 1), tokenizer, TEMPLATE, beta=0.6, batch_size=1)
    scores = other.score([shot("red", "blue")], "red or blue ?", ["red", "blue", "green or blue"])
    np.testing.assert_allclose(
        double.score([shot("red", "blue")], "red or blue ?", ["red", "blue", "green or blue"]), 2 * scores, rtol=1e-4
    )
    with pytest.raises(ValueError, match="responses must be a list"):
        other.score([], "red or blue ?", "red")
    with pytest.raises(ValueError, match="episodes must hold at least one"):
        other.margins([])
    with pytest.raises(ValueError, match="ref_model may be None only when model is a peft model"):
        PersonalRewarder(model, None, tokenizer, TEMPLATE).score([], "red or blue ?", ["red"])


def test_generation_follows_the_shots(tokenizer, stage_one):
    rewarder = PersonalRewarder(stage_one.model, None, tokenizer, TEMPLATE)
    for sides in (("red", "blue"), ("blue", "red")):
        [found] = rewarder.generate([shot(*sides)], "red or blue ?", max_new_tokens=4, temperature=0.0)
        assert found.text == sides[0]
        assert found.description is None


class Script:
    """In place of a model that draws: says what it is told to, and remembers what it was asked."""

    def __init__(self, tokenizer, *texts):
        self.tokenizer, self.texts, self.asked = tokenizer, list(texts), []

    def __call__(self, model, prompts, *, n, **options):
        self.asked += [self.tokenizer.decode(ids) for ids in prompts for _ in range(n)]
        return self

    def responses(self):
        count = len(self.asked)
        said, self.texts = self.texts[:count], self.texts[count:]
        self.asked, self.heard = [], self.asked
        return [self.tokenizer(text, add_special_tokens=False).input_ids for text in said]


def test_the_description_comes_first_and_the_response_follows_it(tokenizer, monkeypatch):
    template = FewShotTemplate(describe=True)
    rewarder = PersonalRewarder(tiny(tokenizer), tiny(tokenizer, 1), tokenizer, template)
    context, question = [shot("red", "blue")], "red or blue ?"
    overshot = "likes red\n## Preferred response\nblue\n"
    script = Script(tokenizer, overshot, "likes blue", "red\n", "blue\n")
    monkeypatch.setattr("workingpapers.alignment.fewshot_preference.rewarder.sample_responses", script)
    found = rewarder.generate(context, question, n=2)
    assert [(answer.description, answer.text) for answer in found] == [("likes red", "red"), ("likes blue", "blue")]
    # asked for a response as it was trained: under the description
    for asked, answer in zip(script.heard, found, strict=True):
        completion = f"## User description\n{answer.description}\n## Preferred response\n"
        assert asked == template.prompt(context, question) + completion

    script.texts = ["red"]
    [given] = rewarder.generate(context, question, description="likes blue")
    assert (given.description, given.text) == ("likes blue", "red")
    assert script.heard[0].endswith("## User description\nlikes blue\n## Preferred response\n")

    script.texts = ["likes red"]
    by_itself = rewarder.score(context, question, ["red", "blue"])
    told = rewarder.score(context, question, ["red", "blue"], description="likes red")
    np.testing.assert_array_equal(by_itself, told)
    assert not np.allclose(told, rewarder.score(context, question, ["red", "blue"], description="likes blue"))


def test_bad_generation_arguments_are_named(tokenizer):
    model = tiny(tokenizer)
    rewarder = PersonalRewarder(model, None, tokenizer, TEMPLATE, max_length=100)
    with pytest.raises(ValueError, match="description needs describe=True"):
        rewarder.generate([], "red or blue ?", description="x")
    with pytest.raises(ValueError, match="max_new_tokens must be below max_length=100, got 256"):
        rewarder.generate([], "red or blue ?")
    with pytest.raises(TypeError, match="FewShotTemplate alone"):
        PersonalRewarder(model, None, tokenizer, object()).generate([], "red or blue ?")


def test_samples_are_reproducible(tokenizer):
    rewarder = PersonalRewarder(tiny(tokenizer), None, tokenizer, TEMPLATE)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return rewarder.generate([], "red or blue ?", n=3, max_new_tokens=5, generator=generator)

    assert draw(0) == draw(0) != draw(1)


def test_stage_one_is_the_summed_negative_log_likelihood_and_both_adds_the_rejected(tokenizer):
    model = tiny(tokenizer)
    pairs = [TEMPLATE.fit(e.shots, e.query, tokenizer, 100) for e in two_users(4)]
    with torch.no_grad():
        chosen, rejected = pair_logprobs(model, collate_preferences(pairs))
    args = FSPOConfig(batch_size=8, max_steps=1)
    for sft_on, expected in (("chosen", -chosen.mean()), ("both", -torch.cat([chosen, rejected]).mean())):
        [row] = PrefFTTrainer(copy.deepcopy(model), tokenizer, two_users(4), TEMPLATE, args, sft_on=sft_on).train()
        assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="sft_on must be one of"):
        PrefFTTrainer(model, tokenizer, two_users(), TEMPLATE, sft_on="rejected")


def test_epochs_are_in_new_windows_and_a_sampler_with_replacement_needs_an_end(tokenizer):
    rows = [{"prompt": f"red or blue {i} ?", "chosen": "red", "rejected": "blue", "user": i % 2} for i in range(12)]
    model, reference = tiny(tokenizer), tiny(tokenizer, 1)

    def trainer(sampler, **change):
        args = FSPOConfig(**{"batch_size": 2, **change})
        return FSPOTrainer(model, reference, tokenizer, sampler, TEMPLATE, args)

    finite = trainer(EpisodeSampler(rows, 2), epochs=3)
    assert len(finite.pairs) == 12
    assert finite.total_steps == 6
    assert len(trainer(EpisodeSampler(rows, 2), max_steps=5).pairs) == 12
    assert {pair.user for pair in finite.pairs} == {0, 1}
    assert len(trainer(EpisodeSampler(rows, 2, replacement=True), max_steps=7).pairs) == 14
    with pytest.raises(ValueError, match=r"args\.max_steps must be given"):
        trainer(EpisodeSampler(rows, 2, replacement=True))


def test_a_run_resumes_and_repeats_and_leaves_the_reference_alone(tokenizer):
    reference = tiny(tokenizer, 1)
    before = parameters(reference).clone()

    def start():
        args = FSPOConfig(learning_rate=1e-3, max_steps=6, batch_size=3)
        return FSPOTrainer(
            tiny(tokenizer), reference, tokenizer, two_users(), TEMPLATE, args, loss=FSPOLoss("dpo", 0.1)
        )

    whole, first, second = start(), start(), start()
    whole.train()
    first.train(2)
    second.load_state_dict(first.state_dict())
    second.train()
    torch.testing.assert_close(parameters(second.model), parameters(whole.model), atol=0, rtol=0)
    assert second.history == whole.history
    assert torch.equal(parameters(reference), before)
