"""The statistics of the verdict: coverage, false alarms, power, and what must never come out as `holds`."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from workingpapers.desk.expect import Table, always, close, faster, higher, lower, slope, worst

from workingpapers.desk.expect import _holm_intervals, _p_value, _Sample, t_interval  # isort: skip


def contest(ours, theirs, *, sizes=(1,), name="DAGMA"):
    """A table in which method `ours` scores ours[seed, size] and the baseline theirs[seed, size]."""
    ours, theirs = (np.reshape(values, (-1, len(sizes))) for values in (ours, theirs))
    rows = [
        {"nodes": nodes, "seed": seed, "method": method, "shd": scores[seed, j]}
        for j, nodes in enumerate(sizes)
        for method, scores in (("ours", ours), (name, theirs))
        for seed in range(len(scores))
    ]
    frame = pd.DataFrame(rows)
    frame["cell"] = range(len(frame))
    return Table(frame, ("nodes", "seed", "method"))


def only(judgements):
    (judgement,) = judgements
    return judgement


class TestIntervals:
    @pytest.mark.parametrize("n", [5, 8, 20])
    @pytest.mark.parametrize(
        ("draw", "mean"),
        [
            (lambda rng, n: rng.normal(3.0, 2.0, n), 3.0),
            (lambda rng, n: rng.uniform(-1.0, 1.0, n), 0.0),
            (lambda rng, n: rng.laplace(1.0, 1.0, n), 1.0),
            (lambda rng, n: rng.binomial(20, 0.4, n), 8.0),
        ],
        ids=["normal", "uniform", "laplace", "binomial"],
    )
    def test_coverage_is_nominal_from_five_seeds_up(self, draw, mean, n):
        rng = np.random.default_rng(0)
        runs = 4000
        intervals = [t_interval(draw(rng, n).tolist(), 0.95) for _ in range(runs)]
        covered = sum(low <= mean <= high for low, high in intervals)
        # 0.95 give or take four standard errors, and one point for the distributions that are not normal
        assert abs(covered / runs - 0.95) < 0.01 + 4 * math.sqrt(0.95 * 0.05 / runs)

    def test_a_percentile_bootstrap_would_not_do(self):
        rng = np.random.default_rng(0)
        covered = 0
        for _ in range(1000):
            sample = rng.normal(size=5)
            means = rng.choice(sample, (400, 5)).mean(axis=1)
            low, high = np.quantile(means, [0.025, 0.975])
            covered += low <= 0 <= high
        assert covered < 900

    def test_agrees_with_scipy(self):
        sample = np.random.default_rng(1).normal(0.3, 1.0, 7)
        expected = stats.ttest_1samp(sample, 0.1)
        assert _p_value(sample.tolist(), 0.1) == pytest.approx(expected.pvalue, rel=1e-10)
        interval = expected.confidence_interval(0.95)
        assert t_interval(sample.tolist(), 0.95) == pytest.approx((interval.low, interval.high), rel=1e-10)

    def test_holm_keeps_the_family_wise_error(self):
        rng = np.random.default_rng(2)
        wrong = 0
        for _ in range(1000):
            samples = [_Sample(tuple(rng.normal(size=6))) for _ in range(5)]
            wrong += any(low > 0 or high < 0 for low, high in _holm_intervals(samples, 0.0))
        assert wrong / 1000 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)

    def test_holm_does_not_pass_a_comparison_after_the_first_that_fails(self):
        # p-values 0.03 and 0.04: the smaller misses 0.05 / 2, so the larger may not be held against 0.05
        base = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
        shift = {p: stats.t.isf(p / 2, 4) * base.std(ddof=1) / math.sqrt(5) for p in (0.03, 0.04)}
        samples = [_Sample(tuple(base + shift[p])) for p in (0.03, 0.04)]
        assert all(low < 0 < high for low, high in _holm_intervals(samples, 0.0))


class TestVerdicts:
    def test_pure_noise_holds_in_at_most_one_of_twenty(self):
        rng = np.random.default_rng(0)
        expectation = lower("shd", "ours", than="DAGMA")
        held = sum(
            only(expectation.judge(contest(rng.normal(size=5), rng.normal(size=5)))).verdict == "holds"
            for _ in range(1000)
        )
        assert held <= 50

    def test_noise_shared_by_many_cells_of_a_seed_does_not_fake_certainty(self):
        # eight sizes per seed move together: taken for 40 independent differences they would hold far too often
        rng = np.random.default_rng(3)
        expectation, held, naive = lower("shd", "ours", than="DAGMA"), 0, 0
        for _ in range(300):
            shared = rng.normal(size=(5, 1)) + 0.1 * rng.normal(size=(5, 8))
            held += only(expectation.judge(contest(shared, np.zeros((5, 8)), sizes=range(8)))).verdict == "holds"
            naive += t_interval(shared.ravel().tolist(), 0.95)[1] < 0
        assert held / 300 < 0.05
        assert naive / 300 > 0.2

    def test_a_clear_effect_holds_nearly_always_and_its_mirror_fails(self):
        rng = np.random.default_rng(1)
        verdicts = {"better": [], "worse": []}
        for _ in range(300):
            noise = rng.normal(size=(2, 6))
            table = contest(noise[0] - 4.0, noise[1])
            verdicts["better"].append(only(lower("shd", "ours", than="DAGMA").judge(table)).verdict)
            verdicts["worse"].append(only(higher("shd", "ours", than="DAGMA").judge(table)).verdict)
        assert verdicts["better"].count("holds") >= 285
        assert verdicts["worse"].count("fails") >= 285

    @pytest.mark.parametrize("seeds", [1, 2, 3, 4])
    def test_too_few_seeds_never_hold(self, seeds):
        found = only(lower("shd", "ours", than="DAGMA").judge(contest(np.zeros(seeds), np.full(seeds, 100.0))))
        assert found.verdict == "inconclusive"
        assert "too few" in found.note
        assert found.measured == -100.0

    def test_pairing_removes_the_variation_between_seeds(self):
        rng = np.random.default_rng(4)
        difficulty = 100 * rng.normal(size=8)
        table = contest(difficulty - 1 + 0.1 * rng.normal(size=8), difficulty)
        found = only(lower("shd", "ours", than="DAGMA").judge(table))
        assert found.verdict == "holds"
        assert found.measured == pytest.approx(-1, abs=0.2)

    def test_equal_scores_are_not_lower(self):
        found = only(lower("shd", "ours", than="DAGMA").judge(contest(np.ones(6), np.ones(6))))
        assert (found.verdict, found.interval) == ("fails", (0.0, 0.0))

    def test_margin_factor_and_constants(self):
        rng = np.random.default_rng(5)
        table = contest(10 + 0.1 * rng.normal(size=8), 9.5 + 0.1 * rng.normal(size=8))
        assert only(lower("shd", "ours", than="DAGMA").judge(table)).verdict == "fails"
        assert only(lower("shd", "ours", than="DAGMA", margin=1.0).judge(table)).verdict == "holds"
        assert only(lower("shd", "ours", than="DAGMA", factor=1.2).judge(table)).verdict == "holds"
        assert only(lower("shd", "ours", than=11.0).judge(table)).verdict == "holds"
        ratio = only(higher("shd", "ours", than="DAGMA", factor=1.0).judge(table))
        assert ratio.verdict == "holds"
        assert ratio.measured == pytest.approx(10 / 9.5, rel=0.02)
        assert ratio.threshold == pytest.approx(1.0)

    def test_each_value_of_an_axis_is_judged_by_itself(self):
        ours = np.column_stack([np.zeros(6), np.full(6, 5.0)]) + 0.01 * np.arange(6)[:, None]
        table = contest(ours, np.ones((6, 2)), sizes=(10, 20))
        found = lower("shd", "ours", than="DAGMA", each="nodes").judge(table)
        assert [judgement.verdict for judgement in found] == ["holds", "fails"]
        assert "nodes = 10" in found[0].expectation
        assert worst([judgement.verdict for judgement in found]) == "fails"

    def test_what_is_not_finite_never_holds(self):
        ours = np.array([0.0, 0.0, np.nan, 0.0, 0.0])
        found = only(lower("shd", "ours", than="DAGMA").judge(contest(ours, np.ones(5))))
        assert (found.verdict, "not finite" in found.note) == ("fails", True)
        found = only(lower("shd", "ours", than="DAGMA").judge(contest(np.zeros(5), [1, 1, 1, 1, np.inf])))
        assert (found.verdict, "not finite" in found.note) == ("inconclusive", True)

    def test_rows_without_a_partner_are_left_out_and_counted(self):
        table = contest(np.zeros(8) + np.arange(8) * 0.01, np.ones(8))
        frame = table.frame[(table.frame.method == "ours") | (table.frame.seed < 6)]
        found = only(lower("shd", "ours", than="DAGMA").judge(Table(frame, table.axes)))
        assert found.replicates == 6
        assert "2 cells" in found.note

    def test_missing_methods_and_columns(self):
        table = contest(np.zeros(5), np.ones(5))
        found = only(lower("shd", "ours", than="GOLEM").judge(table))
        assert (found.verdict, found.note) == ("inconclusive", "no rows of GOLEM")
        with pytest.raises(KeyError, match=r"no column 'sid'; it has nodes, seed"):
            lower("sid", "ours", than="DAGMA").judge(table)

    def test_last_row_of_each_curve(self):
        frame = pd.DataFrame(
            [
                {"seed": seed, "method": method, "iteration": t, "gap": gap, "cell": f"{method}{seed}"}
                for seed in range(5)
                for method, end in (("ours", 1 + seed), ("ISTA", 3 + seed))
                for t, gap in enumerate([0.0] * end + [1.0 if method == "ours" else 2.0 + seed / 10])
            ]
        )
        table = Table(frame, ("seed", "method"))
        found = only(lower("gap", "ours", than="ISTA", where={"iteration": "last"}).judge(table))
        assert found.measured == pytest.approx(-1.2)

    def test_speed_up_is_a_ratio_of_times(self):
        frame = pd.DataFrame(
            [
                {"round": r, "contender": c, "seconds": s * (1 + 0.01 * r), "cell": i}
                for i, (r, c, s) in enumerate((r, c, s) for r in range(5) for c, s in (("ours", 1.0), ("peer", 3.0)))
            ]
        )
        found = only(faster("ours", than="peer", by=2).judge(Table(frame, ("contender", "round"))))
        assert found.verdict == "holds"
        assert found.measured == pytest.approx(3.0)
        assert found.threshold == pytest.approx(2.0)
        assert only(faster("peer", than="ours").judge(Table(frame, ("contender", "round")))).verdict == "fails"


class TestSlopes:
    def table(self, exponent, noise=0.02, seeds=6):
        rng = np.random.default_rng(0)
        frame = pd.DataFrame(
            [
                {"n": n, "seed": seed, "method": "ours", "calls": n**exponent * math.exp(noise * rng.normal())}
                for n in (100, 1000, 10000)
                for seed in range(seeds)
            ]
        )
        frame["cell"] = range(len(frame))
        return Table(frame, ("n", "seed", "method"))

    def test_recovers_a_power_law(self):
        found = only(slope("calls", over="n", of="ours", at_most=0.6).judge(self.table(0.5)))
        assert found.verdict == "holds"
        assert found.interval[0] < 0.5 < found.interval[1]
        assert only(slope("calls", over="n", of="ours", at_most=0.4).judge(self.table(0.5))).verdict == "fails"
        both = slope("calls", over="n", of="ours", at_least=0.4, at_most=0.6)
        assert only(both.judge(self.table(0.5))).verdict == "holds"

    def test_noise_and_few_seeds_are_inconclusive(self):
        assert only(slope("calls", over="n", at_most=0.5).judge(self.table(0.5, noise=1.0))).verdict == "inconclusive"
        assert only(slope("calls", over="n", at_most=9).judge(self.table(0.5, seeds=3))).verdict == "inconclusive"

    def test_a_zero_among_the_rows_keeps_it_from_holding(self):
        table = self.table(0.5)
        table.frame.loc[0, "calls"] = 0.0
        assert only(slope("calls", over="n", at_most=0.9).judge(table)).verdict == "inconclusive"

    def test_needs_a_bound(self):
        with pytest.raises(ValueError, match="at_most or at_least"):
            slope("calls", over="n")


class TestExact:
    table = Table(pd.DataFrame({"gap": [1e-9, 2e-9], "other": [0.0, 0.0], "kept": [True, True], "cell": [0, 1]}), ())

    def test_every_row(self):
        assert only(always("gap", at_most=1e-8).judge(self.table)).verdict == "holds"
        found = only(always("gap", at_most=1.5e-9).judge(self.table))
        assert (found.verdict, found.measured, found.note) == ("fails", 2e-9, "broken in 1 of 2 rows")
        assert only(always("kept").judge(self.table)).verdict == "holds"
        assert only(always("other").judge(self.table)).verdict == "fails"

    def test_nan_breaks_it(self):
        table = Table(pd.DataFrame({"gap": [0.0, np.nan], "cell": [0, 1]}), ())
        assert only(always("gap", at_most=1.0).judge(table)).verdict == "fails"
        assert only(close("gap", 0.0, atol=1.0).judge(table)).verdict == "fails"

    def test_close_to_a_column_or_a_constant(self):
        assert only(close("gap", "other", atol=1e-8).judge(self.table)).verdict == "holds"
        assert only(close("gap", "other", atol=1.5e-9).judge(self.table)).verdict == "fails"
        assert only(close("gap", 1.5e-9, rtol=0.5).judge(self.table)).verdict == "holds"
        with pytest.raises(ValueError, match="positive tolerance"):
            close("gap", 0.0)

    def test_no_rows_are_inconclusive(self):
        empty = Table(self.table.frame.iloc[:0], ())
        assert only(always("gap", at_most=1.0).judge(empty)).verdict == "inconclusive"
        assert only(close("gap", 0.0, atol=1.0).judge(empty)).verdict == "inconclusive"
        assert worst([]) == "inconclusive"
