"""Tests of the mathematics: each fails when the idea it names is removed. Episodes, template, losses, personas."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from workingpapers.alignment import EpisodeSampler, FewShotTemplate, FSPOLoss, personas, split_users
from workingpapers.alignment.fewshot_preference import Comparison, as_comparison

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def records(users=3, each=11, **more):
    return [
        {"prompt": f"q{u}-{i}", "chosen": f"good{u}-{i}", "rejected": f"bad{u}-{i}", "user": u, **more}
        for u in range(users)
        for i in range(each)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, with a beginning and an end."""
    vocabulary = {"<s>": 0, "</s>": 1} | {chr(code): code for code in range(2, 127)}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    found.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, eos_token="</s>", bos_token="<s>")


# ---------------------------------------------------------------------------------------------------------- episodes


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("num_shots", [0, 1, 4])
def test_an_episode_has_one_user_and_its_query_is_not_among_its_shots(num_shots, replacement):
    sampler = EpisodeSampler(records(), num_shots, replacement=replacement)
    for episode in itertools.islice(sampler, 50):
        assert len(episode.shots) == num_shots
        assert episode.query not in episode.shots
        assert len(set(episode.shots)) == num_shots
        assert {c.prompt[1] for c in (*episode.shots, episode.query)} == {str(episode.user)}


def test_a_pass_uses_every_record_at_most_once_and_counts_what_is_left_over():
    sampler = EpisodeSampler(records(3, 11), num_shots=4)
    used = [c.prompt for e in sampler for c in (*e.shots, e.query)]
    assert len(used) == len(set(used)) == 3 * 10
    assert len(sampler) == len(list(sampler)) == 6
    assert sampler.leftover_records == 3
    assert len(list(EpisodeSampler(records(), 4, passes=3))) == 18


def test_epochs_differ_and_are_reproducible():
    def epoch(number, seed=0):
        return list(EpisodeSampler(records(), 4, random_state=seed).epoch(number))

    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=1)
    assert len({episode.user for episode in epoch(0)[:3]}) > 1  # users are mixed, not one after the other


def test_a_repeated_comparison_counts_once_whatever_its_label():
    rows = records(1, 3)
    rows += [dict(rows[0]), {**rows[1], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}]
    with pytest.warns(UserWarning, match="2 records repeat a comparison"):
        sampler = EpisodeSampler(rows, 2)
    [episode] = sampler
    assert {c.prompt for c in (*episode.shots, episode.query)} == {"q0-0", "q0-1", "q0-2"}


def test_users_with_too_few_records_are_skipped_and_counted():
    with pytest.warns(UserWarning, match="1 of 2 users have fewer than num_shots \\+ 1 = 4"):
        sampler = EpisodeSampler([*records(1, 5), *({**row, "user": "few"} for row in records(1, 2))], 3)
    assert sampler.users == [0]
    assert sampler.skipped_users == ["few"]
    with pytest.raises(ValueError, match="records must hold a user with at least num_shots \\+ 1 = 9"):
        EpisodeSampler(records(1, 2))


def test_a_missing_rejected_persona_is_another_users():
    rows = [{**row, "persona": f"is {row['user']}"} for row in records(3, 4)]
    for episode in EpisodeSampler(rows, 1):
        assert episode.query.persona == f"is {episode.user}"
        assert episode.query.rejected_persona in {"is 0", "is 1", "is 2"} - {episode.query.persona}
    given = EpisodeSampler([{**row, "rejected_persona": "that one"} for row in rows], 1)
    assert {episode.query.rejected_persona for episode in given} == {"that one"}


def test_labels_say_which_response_is_preferred_and_messages_become_text():
    one = as_comparison({"prompt": " q ", "response_1": "a", "response_2": "b", "label": 1})
    assert one == Comparison("q", "b", "a")
    assert as_comparison({"prompt": "q", "response_1": "a", "response_2": "b", "label": 0}).chosen == "a"
    message = [{"role": "user", "content": "hi"}]
    assert as_comparison({"prompt": message, "chosen": [1, 2], "rejected": [3]}) == Comparison("hi", (1, 2), (3,))
    longer = [*message, {"role": "assistant", "content": "yes?"}]
    assert as_comparison({"prompt": longer, "chosen": "a", "rejected": "b"}).prompt == "user: hi\nassistant: yes?"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "record 0: label must be 0 .* or 1 .*, got None"),
        ({"label": 0.5}, "got 0.5: drop ties"),
        ({"label": float("nan")}, "got nan"),
        ({"response_2": "a"}, "the same response, a tie"),
        ({"prompt": " "}, "record 0: prompt must not be empty"),
        ({"response_1": None}, "record 0: response_1 must be text"),
        ({"user": None}, "record 0 has no user"),
    ],
)
def test_bad_records_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        EpisodeSampler([{"prompt": "q", "response_1": "a", "response_2": "b", "label": 0, "user": 1, **change}], 0)


def test_users_are_split_whole():
    rows = records(10, 3)
    train, test = split_users(rows, 0.25, random_state=1)
    assert {row["user"] for row in train}.isdisjoint(row["user"] for row in test)
    assert len({row["user"] for row in test}) == 3
    assert sorted(map(str, train + test)) == sorted(map(str, rows))
    assert split_users(rows, 0.25, random_state=1)[1] == test != split_users(rows, 0.25, random_state=2)[1]
    assert len({row["user"] for row in split_users(rows, 4)[1]}) == 4
    with pytest.raises(ValueError, match="test_size=10 of 10 users leaves no user"):
        split_users(rows, 10)
    with pytest.raises(ValueError, match="test_size must be above 0 and below 1"):
        split_users(rows, 1.5)


def test_bad_sampler_arguments_are_named():
    with pytest.raises(ValueError, match="num_shots must be at least 0"):
        EpisodeSampler(records(), -1)
    with pytest.raises(TypeError, match="has no length"):
        len(EpisodeSampler(records(), replacement=True))


# ---------------------------------------------------------------------------------------------------------- template

SHOTS = [Comparison(f"q{i}", f"good{i}", f"bad{i}") for i in range(3)]
QUERY = Comparison("new?", "yes", "no", persona="likes yes", rejected_persona="likes no")


def test_the_prompt_shows_shots_in_order_and_ends_after_the_question():
    prompt, chosen, rejected = FewShotTemplate().render(SHOTS, QUERY)
    blocks = prompt.split("# Example ")
    assert blocks[2].startswith("2\n## Question\nq1\n## Preferred response\ngood1\n## Dispreferred response\nbad1\n")
    assert prompt.endswith("## Question\nnew?\n")
    assert (chosen, rejected) == ("## Preferred response\nyes\n", "## Preferred response\nno\n")
    assert "yes" not in prompt
    assert "likes" not in prompt + chosen


def test_variants_of_the_prompt():
    shown = FewShotTemplate(include_dispreferred=False).render(SHOTS, QUERY)
    assert "bad" not in shown[0]
    assert shown[1] == "## Response\nyes\n"
    described = FewShotTemplate(describe=True).render(SHOTS, QUERY)
    assert described[1] == "## User description\nlikes yes\n## Preferred response\nyes\n"
    assert described[2] == "## User description\nlikes no\n## Preferred response\nno\n"
    forced = FewShotTemplate(describe=True, teacher_forced=True).render(SHOTS, QUERY)
    assert forced[0].endswith("new?\n## User description\nlikes yes\n")
    assert forced[1:] == FewShotTemplate().render(SHOTS, QUERY)[1:]
    alone = FewShotTemplate().render([], QUERY)[0]
    assert "example" not in alone.lower()
    assert len({FewShotTemplate(*flags).render(SHOTS, QUERY)[0] for flags in itertools.product((0, 1), (0, 1))}) == 4
    with pytest.raises(ValueError, match="query has no rejected_persona"):
        FewShotTemplate(describe=True).render(SHOTS, Comparison("q", "a", "b", persona="x"))
    with pytest.raises(ValueError, match="teacher_forced=True needs describe=True"):
        FewShotTemplate(teacher_forced=True)
    with pytest.raises(TypeError, match="needs text, got token ids"):
        FewShotTemplate().render([], Comparison((1,), (2,), (3,)))


def test_whole_shots_are_dropped_from_the_front(tokenizer):
    template = FewShotTemplate()
    for kept in range(3, -1, -1):
        expected = "".join(template.render(SHOTS[3 - kept :], QUERY)[:2])
        limit = len(expected) + 1  # and the end token
        if kept == 3:
            pair = template.fit(SHOTS, QUERY, tokenizer, limit)
        else:
            with pytest.warns(UserWarning, match="the oldest shots of an episode were dropped"):
                pair = template.fit(SHOTS, QUERY, tokenizer, limit)
        assert tokenizer.decode(pair.prompt + pair.chosen[:-1]) == expected
        assert pair.chosen[-1] == pair.rejected[-1] == tokenizer.eos_token_id
        assert len(pair.prompt) + len(pair.chosen) <= limit
    with pytest.raises(ValueError, match=f"the query without shots has {limit} tokens, more than max_length=20"):
        template.fit(SHOTS, QUERY, tokenizer, 20)


def test_the_longer_completion_decides_what_fits(tokenizer):
    longer = Comparison("new?", "yes", "no" * 10)
    limit = len("".join(FewShotTemplate().render(SHOTS, longer)[:2])) + 1
    with pytest.warns(UserWarning, match="dropped"):
        pair = FewShotTemplate().fit(SHOTS, longer, tokenizer, limit)
    assert tokenizer.decode(pair.prompt) == FewShotTemplate().render(SHOTS[1:], longer)[0]


def test_responses_are_fitted_to_one_context(tokenizer):
    template = FewShotTemplate()
    pair = template.fit(SHOTS, QUERY, tokenizer, 1000)
    fitted = template.fit_responses(SHOTS, "new?", ["yes", "no"], tokenizer, 1000)
    assert [s.response for s in fitted] == [pair.chosen, pair.rejected]
    assert fitted[0].prompt == fitted[1].prompt == pair.prompt
    with pytest.warns(UserWarning, match="dropped"):
        short = template.fit_responses(SHOTS, "new?", ["yes", "n" * 50], tokenizer, len(pair.prompt) + 50)
    assert short[0].prompt == short[1].prompt != pair.prompt


def test_an_episode_exports_to_a_row_of_trl():
    [episode] = EpisodeSampler(records(1, 3), 2)
    row = FewShotTemplate().row(episode)
    assert row.keys() == {"prompt", "chosen", "rejected", "user"}
    assert row["chosen"].endswith(f"{episode.chosen}\n")


# ------------------------------------------------------------------------------------------------------------ losses


@pytest.fixture
def logps():
    generator = torch.Generator().manual_seed(0)
    values = -20 * torch.rand(4, 6, generator=generator, dtype=torch.float64)
    return [row.clone().requires_grad_(place < 2) for place, row in enumerate(values)]


def test_ipo_is_the_square_of_summed_log_ratios_less_its_target(logps):
    chosen, rejected, ref_chosen, ref_rejected = logps
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    out = FSPOLoss("ipo", beta=0.25)(*logps)
    torch.testing.assert_close(out.loss, ((margin - 2.0) ** 2).mean())
    torch.testing.assert_close(out.margin, margin.detach())
    torch.testing.assert_close(out.chosen_rewards - out.rejected_rewards, 0.25 * margin.detach())
    assert out.accuracy.tolist() == (margin > 0).double().tolist()
    assert not any(t.requires_grad for t in (out.margin, out.chosen_rewards, out.rejected_rewards, out.accuracy))
    out.loss.backward()
    torch.testing.assert_close(chosen.grad, 2 * (margin.detach() - 2.0) / 6)
    torch.testing.assert_close(chosen.grad, -rejected.grad)


def test_dpo_is_its_formula_and_smoothing_the_expectation_over_flips(logps):
    chosen, rejected, ref_chosen, ref_rejected = logps
    margin = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    expected = -0.8 * logsigmoid(margin) - 0.2 * logsigmoid(-margin)
    torch.testing.assert_close(FSPOLoss("dpo", 0.1, 0.2, reduction="none")(*logps).loss, expected)
    torch.testing.assert_close(FSPOLoss("dpo", 0.1, reduction="sum")(*logps).loss, -logsigmoid(margin).sum())


def test_a_bradley_terry_user_is_recovered_by_dpo_and_saturated_by_ipo():
    """With preference probability p, DPO's margin is logit(p) / beta and IPO's (2 p - 1) / (2 beta)."""
    p, beta = 0.8, 0.5
    wins = torch.tensor([1.0] * 8 + [-1.0] * 2, dtype=torch.float64)
    zero = torch.zeros(10, dtype=torch.float64)
    for kind, expected in (("dpo", np.log(p / (1 - p)) / beta), ("ipo", (2 * p - 1) / (2 * beta))):
        h = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([h], max_iter=100, tolerance_grad=1e-12)

        def closure(kind=kind, h=h, optimizer=optimizer):
            optimizer.zero_grad()
            loss = FSPOLoss(kind, beta)(h * wins - 30, zero - 30, zero, zero).loss
            loss.backward()
            return loss

        optimizer.step(closure)
        assert h.item() == pytest.approx(expected, rel=1e-3)


def test_bad_losses_are_named(logps):
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 for kind='ipo', got 0\.1: use beta=0\.0125"):
        FSPOLoss("ipo", 0.01, 0.1)
    for change, message in (
        ({"kind": "kto"}, "kind must be one of 'ipo', 'dpo'"),
        ({"beta": 0}, "beta must be above 0"),
        ({"reduction": "max"}, "reduction must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            FSPOLoss(**change)
    with pytest.raises(ValueError, match="ref_rejected_logps must have shape"):
        FSPOLoss()(*logps[:3], logps[3][:2])
    with pytest.raises(ValueError, match="policy_chosen_logps must be finite"):
        FSPOLoss()(logps[0] * np.nan, *logps[1:])


# ---------------------------------------------------------------------------------------------------------- personas


def test_label_entropy_in_nats():
    assert personas.label_entropy([[0, 1, 0, 1], [1, 0, 0, 1]]) == pytest.approx(np.log(2))
    assert personas.label_entropy([[0, 0], [1, 1]]) == 0
    assert personas.label_entropy([[0, 0, 0, 1]]) == pytest.approx(-0.25 * np.log(0.25) - 0.75 * np.log(0.75))
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        personas.label_entropy([[0, np.nan]])
    with pytest.raises(ValueError, match=r"labels must have shape \(pairs, judgements\)"):
        personas.label_entropy([0, 1])


def test_disagreement_is_over_pairs_in_common():
    found = personas.disagreement([[0, 1, 1, -1], [0, 0, 1, 1], [-1, -1, -1, 0]])
    np.testing.assert_allclose(found[0, 1], 1 / 3)
    np.testing.assert_allclose(found[1, 2], 1.0)
    assert np.isnan(found[0, 2])
    np.testing.assert_allclose(found, found.T)
    assert (np.diag(found) == 0).all()
    with pytest.raises(ValueError, match="labels_by_user must be 0, 1 or"):
        personas.disagreement([[0, 2]])


def test_response_similarity_is_the_mean_cosine_of_distinct_pairs():
    vectors = np.random.default_rng(0).standard_normal((3, 5, 4))
    units = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    expected = np.mean([u @ v for prompt in units for u, v in itertools.combinations(prompt, 2)])
    assert personas.response_similarity(vectors) == pytest.approx(expected)
    assert personas.response_similarity(np.ones((4, 3))) == pytest.approx(1.0)
    bad = {"zero vectors": np.zeros((2, 3)), "two responses": np.ones((1, 3)), "NaN": [[np.nan]] * 2}
    for message, vectors in bad.items():
        with pytest.raises(ValueError, match=message):
            personas.response_similarity(vectors)


def facts(count, seed=0):
    """A persona is a set of known signs; a pair asks about the product of two of them."""
    rng = np.random.default_rng(seed)
    return [tuple(sorted(pair)) for pair in (rng.choice(4, 2, replace=False).tolist() for _ in range(count))]


def decide(persona, pair):
    """The sign of a sum, open unless the attribute is known."""
    known = dict(persona)
    return known.get(pair[0])


def test_refinement_settles_every_pair_consistently_and_leaves_the_persona_alone():
    start = frozenset({(0, 1)})
    pairs = facts(30)
    found = personas.refine(start, pairs, decide, lambda p, pair, label: p | {(pair[0], label)})
    assert start == frozenset({(0, 1)})
    assert (found.labels >= 0).all()
    for first in range(4):  # one question, one answer
        assert len({label for pair, label in zip(pairs, found.labels, strict=True) if pair[0] == first}) <= 1
    assert all(found.labels[place] == 1 for place, pair in enumerate(pairs) if pair[0] == 0)
    assert len(found.added) == len({pair[0] for pair in pairs} - {0})  # a fact once stated is not chosen again
    assert found.relabelled == ()


def test_the_final_description_relabels_earlier_pairs():
    def last_word(persona, pair):
        return persona[-1] if persona and pair == "both" else None if pair not in persona else 0

    with pytest.warns(RuntimeWarning, match="leaves 1 of 2 pairs open"):
        found = personas.refine((0,), ["both", "x"], last_word, lambda p, pair, label: (*p, 1))
    assert found.labels.tolist() == [1, -1]
    assert found.relabelled == (0,)
    with pytest.raises(ValueError, match="decide must return 0, 1 or None, got 2 for pair 0"):
        personas.refine((), [0], lambda *_: 2, lambda *_: ())


def likes(description, prompt, first, second):
    return 0 if first.count(description) > second.count(description) else 1


def test_synthesis_conditions_responses_and_labels_by_user():
    made = personas.synthesize(
        [f"q{i}" for i in range(6)],
        {"ann": "a", "bob": "b"},
        [lambda prompt, viewpoint: f"{prompt} {viewpoint * 3}", lambda prompt, viewpoint: f"{prompt} {viewpoint * 2}"],
        likes,
        responses_per_prompt=2,
    )
    assert made.judged == len(made.records) == 12
    assert made.flipped == made.undecided == made.too_similar == 0
    for record in made.records:
        mine = {"ann": "a", "bob": "b"}[record["user"]]
        assert record["persona"] == mine
        assert record["chosen"].count(mine) > record["rejected"].count(mine)
        assert record["rejected_persona"] != mine
    assert {len(record["chosen"].split()[1]) for record in made.records} == {2, 3}  # both writers
    assert len(list(EpisodeSampler(made.records, 2))) == 4


def test_a_judge_that_likes_the_first_place_is_found_out_by_asking_twice():
    options = {"prompts": list("xyz"), "users": {0: "a", 1: "b"}, "writers": [lambda q, v: q + v]}

    def first_place(*_):
        return 0

    made = personas.synthesize(judge=first_place, responses_per_prompt=2, **options)
    assert made.records == []
    assert made.flipped == made.judged == 6
    once = personas.synthesize(judge=first_place, responses_per_prompt=2, swap=False, **options)
    assert len(once.records) == 6
    silent = personas.synthesize(judge=lambda *_: None, responses_per_prompt=2, **options)
    assert silent.undecided == 6


def test_diversity_is_measured_and_near_copies_are_dropped():
    directions = {"north": [1.0, 0.0], "nearly": [1.0, 0.1], "east": [0.0, 1.0]}

    def make(limit):
        return personas.synthesize(
            ["q"],
            {0: "north"},
            [lambda q, v: v],
            lambda *texts: 0 if texts[2] < texts[3] else 1,
            viewpoints=list(directions),
            responses_per_prompt=3,
            pairs_per_prompt=5,
            embed=lambda texts: [directions[text] for text in texts],
            max_similarity=limit,
        )

    everything, distinct = make(1.0), make(0.9)
    assert (len(everything.records), len(distinct.records)) == (3, 1)
    assert distinct.too_similar == 1
    assert distinct.similarity < everything.similarity
    assert "rejected_persona" not in everything.records[0]
    with pytest.raises(ValueError, match=r"max_similarity=0\.5 needs embed"):
        personas.synthesize(["q"], {0: "a"}, [lambda q, v: v], likes, max_similarity=0.5)
    with pytest.raises(ValueError, match="prompts, users and writers"):
        personas.synthesize([], {0: "a"}, [lambda q, v: v], likes)
    with pytest.raises(ValueError, match="judge must return 0, 1 or None, got 7"):
        personas.synthesize(["q"], {0: "a", 1: "b"}, [lambda q, v: v], lambda *_: 7)


def test_the_judge_is_told_what_not_to_count():
    text = personas.judge_prompt("likes tea", "drink?", "tea", "coffee")
    assert text.index("likes tea") < text.index("tea\n\nResponse B")
    assert "length" in text
