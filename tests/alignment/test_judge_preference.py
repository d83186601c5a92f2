"""Tests of judges, pairs and reports: each fails when the idea it names is removed."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from workingpapers.alignment.judge_preference import (
    CharacterF,
    ClinicalJudge,
    LabelF1,
    LanguageModelJudge,
    LengthControlled,
    RougeL,
    TokenF1,
    alignment_tax,
    build_preferences,
    judge_scores,
    normalize_report,
    overoptimization_report,
    to_binary,
    verbosity_report,
)
from workingpapers.alignment.judge_preference.judges import common_subsequence

# ------------------------------------------------------------------------------------------------------------- judges


def test_normalisation_has_the_steps_of_the_official_code():
    text = "**Findings:** [image 1] No\n\t effusion [see [note] ] "
    assert normalize_report(text) == "findings: no effusion ]"  # the shortest spans, so an outer bracket stays
    assert normalize_report("A[x\ny]B") == "a[x y]b"  # a span does not cross lines


@given(st.text("abcd", max_size=70), st.text("abcd", max_size=70))
def test_bits_find_the_longest_common_subsequence(first, second):
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, j in itertools.product(range(len(first)), range(len(second))):
        table[i + 1, j + 1] = table[i, j] + 1 if first[i] == second[j] else max(table[i, j + 1], table[i + 1, j])
    assert common_subsequence(first, second) == table[-1, -1]


def test_metrics_of_overlap_have_their_textbook_values():
    candidate, reference = "the cat was under the bed", "The cat was found under the bed."
    assert TokenF1()(candidate, reference) == pytest.approx(2 * 6 / (6 + 7))
    assert RougeL()(candidate, reference) == pytest.approx(2 * 6 / (6 + 7))
    reordered = "under the bed was the cat"
    assert TokenF1()(reordered, reference) == TokenF1()(candidate, reference)
    assert RougeL()(reordered, reference) == pytest.approx(2 * 3 / (6 + 7))  # under the bed
    # "the" counts once in the reference, however often the candidate says it
    assert TokenF1()("the the the", "the end") == pytest.approx(2 * 1 / (3 + 2))
    # abc against abd: unigrams 2/3, bigrams 1/2, trigrams 0 in both directions
    assert CharacterF()("a bc", "ab d") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    precision, recall = 1.0, (2 / 4 + 1 / 3) / 2
    assert CharacterF(order=2)("ab", "abcd") == pytest.approx(5 * precision * recall / (4 * precision + recall))
    assert LabelF1(str.split)("a b b", "b c") == pytest.approx(0.5)


@pytest.mark.parametrize("judge", [TokenF1(), RougeL(), CharacterF(), LabelF1(str.split), ClinicalJudge()])
def test_judges_give_one_to_a_copy_zero_to_nothing_in_common_and_bear_empty_texts(judge):
    text = "Large effusion"
    assert judge(text, text) == 1.0
    assert judge("", text) == 0.0
    assert judge("nodular opacity", "edema") < 0.3
    assert judge("", "") == 1.0


def test_length_control_divides_by_relative_length_and_gives_no_bonus_for_brevity():
    def plain(candidate, reference):
        return 0.6

    judge = LengthControlled(plain)
    assert judge("a b c", "x y") == pytest.approx(0.6 / 1.5)
    assert judge("a", "x y") == 0.6
    assert judge("", "x y") == 0.6
    assert LengthControlled(plain, floor=0.5)("a", "x y") == pytest.approx(1.2)
    assert LengthControlled(plain, count=list)("abcd", "ab") == pytest.approx(0.3)
    with pytest.raises(ValueError, match="reference must not be empty"):
        judge("a", " ")
    with pytest.raises(ValueError, match="scores of at least 0 to be length-controlled"):
        LengthControlled(lambda *_: -0.5)("a", "b")
    with pytest.raises(ValueError, match="floor must be above 0"):
        LengthControlled(plain, floor=0.0)


def test_a_judge_of_many_texts_is_called_once():
    class Batched:
        calls = 0

        def __call__(self, candidate, reference):
            raise AssertionError("one by one")

        def scores(self, candidates, references):
            self.calls += 1
            return [float(len(text)) for text in candidates]

    judge = Batched()
    assert judge_scores(LengthControlled(judge), ["aa", "b c"], ["x", "x"]) == [2.0, 1.5]
    assert judge.calls == 1
    with pytest.raises(ValueError, match="references must be one per candidate"):
        judge_scores(judge, ["a"], [])
    with pytest.raises(ValueError, match="judge must give finite scores, got nan for 'a'"):
        judge_scores(lambda *_: math.nan, ["a"], ["b"])


def test_a_language_model_is_asked_once_and_its_number_is_scaled():
    asked = []

    def generate(prompts):
        asked.append(prompts)
        return ["I would say 7.5 of 10", "0"]

    judge = LanguageModelJudge(generate, template="{reference} | {candidate} {x}")
    assert judge.scores(["{reference}", "b"], ["r", "s"]) == [0.75, 0.0]
    assert asked == [["r | {reference} {x}", "s | b {x}"]]
    with pytest.raises(ValueError, match="must be a number from 0 to 10, got 'very good'"):
        LanguageModelJudge(lambda _: ["very good"])("a", "b")
    with pytest.raises(ValueError, match="from 0 to 10, got '11'"):
        LanguageModelJudge(lambda _: ["11"])("a", "b")
    with pytest.raises(ValueError, match=r"template must contain \{reference\}"):
        LanguageModelJudge(generate, template="{candidate}")


# -------------------------------------------------------------------------------------------------------------- pairs

SCORES = {"a": 0.2, "b b": 0.9, "c c c": 0.9, "d": 0.2, "e": 0.2}


def lookup(candidate, reference):
    return SCORES[candidate]


def fixed(texts):
    return lambda inputs, n: [list(texts[text]) for text in inputs]


def test_the_first_best_is_paired_with_the_first_worst_and_ties_are_dropped():
    texts = {"p": ["a", "b b", "c c c", "d"], "q": ["a", "d", "e", "a"], "r": ["c c c", "e", "d", "b b"]}
    items = [("p", "ref p"), ("q", "ref q"), {"prompt": "r", "reference": "ref r"}]
    pairs = build_preferences(items, fixed(texts), lookup)
    assert [row["chosen"] for row in pairs] == ["b b", "c c c"]
    assert [row["rejected"] for row in pairs] == ["a", "e"]
    assert pairs[0] == {
        "prompt": "p",
        "chosen": "b b",
        "rejected": "a",
        "reference": "ref p",
        "reward_chosen": 0.9,
        "reward_rejected": 0.2,
    }
    assert (len(pairs), pairs.dropped, pairs.identical) == (2, 1, 0)
    assert pairs.kept.tolist() == [0, 2]
    np.testing.assert_allclose(pairs.spreads, [0.7, 0.0, 0.7])
    assert pairs.mean_length_gap == pytest.approx((1 + 2) / 2)
    assert items == [("p", "ref p"), ("q", "ref q"), {"prompt": "r", "reference": "ref r"}]


def test_a_spread_must_exceed_the_threshold():
    texts = {"p": ["a", "b b"]}
    score = {"a": 0.25, "b b": 0.75}

    def judge(candidate, reference):
        return score[candidate]

    assert len(build_preferences([("p", "r")], fixed(texts), judge, n=2, min_spread=0.49)) == 1
    none = build_preferences([("p", "r")], fixed(texts), judge, n=2, min_spread=0.5)
    assert (len(none), none.dropped, none.mean_length_gap) == (0, 1, 0.0)


def test_normalisation_is_for_the_judge_alone():
    texts = {"p": ["**A**", "a [b]", "C"], "q": ["Same", "same", " same"]}
    seen = []

    def judge(candidate, reference):
        seen.append((candidate, reference))
        return float(len(candidate) + ord(candidate[0]))

    pairs = build_preferences([("p", "R [x]"), ("q", "R")], fixed(texts), judge, n=3, normalizer=normalize_report)
    assert seen == [("a", "r"), ("c", "r"), ("same", "r")]  # every distinct pair of texts once
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == ("C", "**A**")
    assert pairs.identical == pairs.dropped == 1


def test_the_default_judge_is_clinical():
    texts = {"x": ["No effusion.", "Large effusion."]}
    pairs = build_preferences([("x", "There is a large pleural effusion.")], fixed(texts), n=2)
    assert pairs[0]["chosen"] == "Large effusion."


def test_inputs_reach_the_sampler_and_conversations_stay_conversations():
    seen = []

    def sample(inputs, n):
        seen.extend(inputs)
        return [["a", "b b"] for _ in inputs]

    messages = [{"role": "user", "content": "hello"}]
    items = [{"prompt": messages, "reference": "r", "input": {"image": "x.png"}}, ("q", "r")]
    pairs = build_preferences(items, sample, lookup, n=2)
    assert seen == [{"image": "x.png"}, "q"]
    assert pairs[0]["prompt"] == messages
    assert pairs[0]["chosen"] == [{"role": "assistant", "content": "b b"}]
    assert pairs[1]["chosen"] == "b b"
    assert to_binary(pairs)[2:] == [
        {"prompt": "q", "completion": "b b", "label": True},
        {"prompt": "q", "completion": "a", "label": False},
    ]


def random_texts(inputs, n, random_state):
    rng = np.random.default_rng(random_state)
    return [[" ".join("w" * rng.integers(1, 9)) for _ in range(n)] for _ in inputs]


def by_length(candidate, reference):
    return float(len(candidate))


def test_an_interrupted_run_goes_on_and_draws_what_a_whole_one_draws(tmp_path):
    items = [(f"p{number}", "r") for number in range(10)]
    options = {"random_state": 3, "chunk_size": 4}
    calls, seeds = [], set()

    def seen(inputs, n, random_state):
        seeds.add(random_state)
        return random_texts(inputs, n, random_state)

    whole = build_preferences(items, seen, by_length, **options)
    assert len(seeds) == 3  # chunks do not share their draws

    def interrupted(inputs, n, random_state):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(list(inputs))
        return random_texts(inputs, n, random_state)

    cache = tmp_path / "kept.sqlite"
    with pytest.raises(KeyboardInterrupt):
        build_preferences(items, interrupted, by_length, cache=cache, **options)
    calls.clear()
    resumed = build_preferences(items, interrupted, by_length, cache=cache, **options)
    assert calls == [["p8", "p9"]]
    assert list(resumed) == list(whole)
    np.testing.assert_array_equal(resumed.scores, whole.scores)
    other = build_preferences(items, random_texts, by_length, random_state=4, chunk_size=4)
    assert list(other) != list(whole)


def test_scores_are_cached_by_judge_and_candidates_are_shared_by_judges(tmp_path):
    items, cache, drawn, judged = [("p", "r"), ("q", "r")], tmp_path / "kept.sqlite", [], []

    def sample(inputs, n):
        drawn.extend(inputs)
        return [["a", "b b"], ["d", "c c c"]][: len(inputs)]

    class Judge:
        def __init__(self, name):
            self.cache_name = name

        def __call__(self, candidate, reference):
            judged.append(candidate)
            return SCORES[candidate]

    first = build_preferences(items, sample, Judge("one"), n=2, cache=cache)
    again = build_preferences(items, sample, Judge("one"), n=2, cache=cache)
    assert list(first) == list(again)
    assert drawn == ["p", "q"]
    assert judged == ["a", "b b", "d", "c c c"]
    build_preferences(items, sample, Judge("two"), n=2, cache=cache)
    build_preferences(items, sample, LengthControlled(RougeL()), n=2, cache=cache)
    assert drawn == ["p", "q"]
    assert len(judged) == 8
    build_preferences(items, sample, Judge("one"), n=2, cache=cache, policy_name="another")
    assert drawn == ["p", "q"] * 2
    with pytest.raises(ValueError, match="judge must have a name"):
        build_preferences(items, sample, lambda *_: 1.0, n=2, cache=cache)
    with pytest.raises(ValueError, match="inputs that can be written as JSON"):
        build_preferences([({1, 2}, "r")], sample, lookup, n=2, cache=cache)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"items": []}, ValueError, "items must hold at least one item"),
        ({"items": ["text"]}, ValueError, r"item 0 must be \(prompt, reference\) or a mapping, got 'text'"),
        ({"items": [{"prompt": "p"}]}, ValueError, "item 0 must have prompt and reference, got prompt"),
        ({"items": [("p", " ")]}, ValueError, "item 0: reference must not be empty"),
        ({"items": [("p", None)]}, ValueError, "item 0: reference must be a string"),
        ({"items": [("p", "[x]")], "normalizer": normalize_report}, ValueError, "reference must not be empty"),
        ({"n": 1}, ValueError, "n must be at least 2, got 1"),
        ({"min_spread": -1.0}, ValueError, "min_spread must be at least 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"random_state": 0.5}, TypeError, "random_state must be an integer"),
        ({"sample": lambda inputs, n: []}, ValueError, r"sample must return 4 texts for each of 1 inputs, got \[\]"),
        ({"sample": lambda inputs, n: [["a"]]}, ValueError, r"got \[1\]"),
        ({"sample": lambda inputs, n: [["a", "b", "c", 1]]}, ValueError, "sample must return strings, got 1"),
        ({"judge": lambda *_: math.inf}, ValueError, "judge must give finite scores, got inf"),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = {"items": [("p", "r")], "sample": fixed({"p": list("aaaa")}), "judge": lookup}
    with pytest.raises(error, match=message):
        build_preferences(**(good | change))


# ------------------------------------------------------------------------------------------------------------ reports


def test_verbosity_is_relative_and_its_interval_is_paired():
    before, after, references = ["a", "a b", "a"], ["a b c", "a b c d", "a b"], ["x y", "x", "x"]
    report = verbosity_report(before, after, references, judge=TokenF1())
    assert (report.words_before, report.words_after, report.words_reference) == (4 / 3, 3.0, 4 / 3)
    assert report.verbosity_after == pytest.approx(9 / 4)
    assert report.growth == pytest.approx(9 / 4 - 1)
    assert report.relative_to_before == pytest.approx(9 / 4)
    growth = np.array([2, 2, 1]) / (4 / 3)
    low, high = stats.t.interval(0.95, 2, growth.mean(), growth.std(ddof=1) / np.sqrt(3))
    assert report.growth_interval == pytest.approx((low, high))
    longer = verbosity_report(["x"] * 2, ["x x x x"] * 2, ["x x"] * 2, judge=lambda candidate, _: float(len(candidate)))
    assert longer.judge_after / longer.judge_before == 7.0
    assert longer.controlled_after / longer.controlled_before == 3.5
    assert verbosity_report(["a"], ["a b"], ["x"]).growth_interval == (-math.inf, math.inf)
    assert report.judge_before == 0.0
    with pytest.raises(ValueError, match="must have one text per input, at least one, got 1, 1, 2"):
        verbosity_report(["a"], ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="references must not be empty"):
        verbosity_report(["a"], ["a"], [" "])


def test_a_judge_that_rises_while_the_held_out_metric_falls_is_overoptimised():
    report = overoptimization_report([0.5, 0.7, 0.9], [0.6, 0.7, 0.5])
    assert report.overoptimized
    assert (report.best, report.judge_gain) == (1, pytest.approx(0.4))
    assert report.lost_since_best == pytest.approx(0.2)
    assert report.heldout_gain == pytest.approx(-0.1)
    assert report.heldout_interval is None
    assert report.rank_correlation == pytest.approx(-0.5)
    both_fall = overoptimization_report([0.5, 0.9, 0.7], [0.6, 0.7, 0.5])
    assert not both_fall.overoptimized
    examples = np.array([[0.0, 1.0, 0.0], [1.0, 1.0, 0.5]])
    paired = overoptimization_report([0.1, 0.2], examples)
    assert not paired.overoptimized
    assert paired.heldout_interval == pytest.approx(stats.t.interval(0.95, 2, 0.5, 0.5 / np.sqrt(3)))
    assert math.isnan(paired.rank_correlation)
    with pytest.raises(ValueError, match="two checkpoints or more"):
        overoptimization_report([0.1], [0.1])
    with pytest.raises(ValueError, match="heldout_scores must have 2 checkpoints"):
        overoptimization_report([0.1, 0.2], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="heldout_scores must be finite"):
        overoptimization_report([0.1, 0.2], [0.1, math.nan])


def test_the_alignment_tax_holds_for_all_tasks_together():
    rng = np.random.default_rng(0)
    before = {"reverse": rng.random(50), "count": rng.random(50)}
    after = {"reverse": before["reverse"] - 0.2 + 0.1 * rng.random(50), "count": before["count"] + rng.normal(size=50)}
    report = alignment_tax(before, after)
    assert report.taxed == ("reverse",)
    change = after["reverse"] - before["reverse"]
    wanted = stats.t.interval(0.975, 49, change.mean(), stats.sem(change))  # 95 % for two tasks together
    assert report.tasks["reverse"].interval == pytest.approx(wanted)
    assert report.change == pytest.approx(np.mean([task.change for task in report.tasks.values()]))
    with pytest.raises(ValueError, match="after must have the tasks of before"):
        alignment_tax(before, {"reverse": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"after\['a'\] must have 2 scores like before, got 3"):
        alignment_tax({"a": [1.0, 2.0]}, {"a": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match=r"before\['a'\] must have shape"):
        alignment_tax({"a": [1.0]}, {"a": [1.0]})
    with pytest.raises(ValueError, match="level must be above 0 and below 1"):
        alignment_tax({"a": [1.0, 2.0]}, {"a": [1.0, 2.0]}, level=1.0)
