"""Mode seeking: the two divergences, and on how many actions each way of training ends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from workingpapers.claims.alignment.onpolicy_preference.common import (
    ANSWERS,
    LOSSES,
    PAPER,
    QUERIES,
    TABLE_RATES,
)
from workingpapers.desk.claim import (
    Axis,
    Cell,
    Row,
    always,
    bars,
    claim,
    lower,
    scales,
    seeds,
)

if TYPE_CHECKING:
    import torch


@claim(
    paper=PAPER,
    says="The gradients of the two divergences are the stated ones, checked against finite differences; the forward "
    "one lifts an action by at most what it lacks.",
    published="d KL(q || p) / dz = p - q and d KL(p || q) / dz = p (log(p / q) - KL(p || q)) (section on mode seeking)",
    grid={"actions": scales(smoke=[5, 100], laptop=[5, 100, 1_000]), "seed": seeds(smoke=5, laptop=8)},
    expect=[always("forward_error", at_most=1e-7), always("reverse_error", at_most=1e-7), always("bounded")],
)
def gradients(cell: Cell) -> Row:
    import torch

    from workingpapers.alignment import kl_gradients

    generator = torch.Generator().manual_seed(cell.seed)
    logits, target = torch.randn(2, cell.actions, generator=generator, dtype=torch.float64)
    log_target, step = target.log_softmax(0), 1e-6
    shifted = logits + step * torch.cat([torch.eye(cell.actions), -torch.eye(cell.actions)])
    log_p = shifted.log_softmax(1)
    values = (
        (log_target.exp() * (log_target - log_p)).sum(1),
        (log_p.exp() * (log_p - log_target)).sum(1),
    )
    forward, reverse = kl_gradients(logits, log_target)
    errors = [
        float(((up - down) / (2 * step) - exact).abs().max())
        for (up, down), exact in zip((value.chunk(2) for value in values), (forward, reverse), strict=True)
    ]
    lacks = log_target.exp() - logits.softmax(0)
    return {
        "forward_error": errors[0],
        "reverse_error": errors[1],
        "bounded": bool((-forward <= lacks.clamp(min=0) + 1e-12).all()),
    }


MODE_SEEKING = "mode-seeking objectives move probability mass to the right bins faster than maximum likelihood"
DESCENT: dict[str, Axis] = {
    "centre": [20, 70],
    "seed": seeds(smoke=5, laptop=8),
    "method": ["reverse KL", "forward KL"],
}


@claim(
    paper=PAPER,
    says="Plain gradient descent on the reverse divergence to the optimal policy comes within 10 % of its reward in "
    "fewer steps than on the forward one, with a light and with a heavy KL weight (0.1 and 0.3).",
    published=MODE_SEEKING,
    grid={"beta": scales(smoke=[], laptop=[0.1, 0.3]), **DESCENT},
    expect=[lower("steps", "reverse KL", than="forward KL", factor=1.0, each=["beta", "centre"])],
    plot=bars(x="centre", y="steps", by="method", log="y"),
)
def speed_of_both_divergences(cell: Cell) -> Row:
    return _descent(cell)


@claim(
    paper=PAPER,
    says="It does with a light KL weight (0.1), although with the far peak it is behind after ten steps: it hardly "
    "sees actions that the policy hardly takes.",
    published=MODE_SEEKING,
    grid={"beta": [0.1], **DESCENT},
    expect=[
        lower("steps", "reverse KL", than="forward KL", factor=1.0, each="centre"),
        lower("after_ten", "reverse KL", than="forward KL", where={"centre": 70}),
    ],
    plot=bars(x="centre", y="steps", by="method", log="y"),
)
def speed_with_a_light_weight(cell: Cell) -> Row:
    return _descent(cell)


def _descent(cell: Cell) -> Row:
    """Steps of length 1 on the logits of a policy that starts near the reference."""
    import torch

    from workingpapers.alignment import kl_gradients, testbeds

    env = testbeds.bump_bandit(cell.centre)
    reward = env.reward(None, torch.arange(100)[None])[0].double()
    log_ref = env.probabilities.log()
    log_optimum = (log_ref + reward / cell.beta).log_softmax(0)
    best = float(log_optimum.exp() @ reward)
    noise = torch.randn(100, generator=torch.Generator().manual_seed(cell.seed), dtype=torch.float64)
    logits, limit = log_ref + 0.3 * noise, 2_000
    steps, after_ten = limit, math.nan
    for step in range(1, limit + 1):
        logits = logits - kl_gradients(logits, log_optimum)[cell.method == "reverse KL"]
        share = float(logits.softmax(0) @ reward) / best
        after_ten = share if step == 10 else after_ten
        if share >= 0.9 and step >= 10:
            steps = step
            break
    return {"steps": steps, "after_ten": after_ten}


TWO_PEAKS = ["DPO fixed", "IPO fixed", "PPO fresh", "DPO fresh", "best of n fresh", "best of n fixed", "RWR 0.25 fixed"]


@claim(
    paper=PAPER,
    says="With two equal peaks, what pushes down or samples freshly ends on fewer actions than the likelihood of fixed "
    "samples.",
    published="on-policy sampling and the negative gradient are mode-seeking, maximum likelihood covers modes",
    grid={"seed": seeds(smoke=5, laptop=8), "method": TWO_PEAKS},
    expect=[
        lower("effective_actions", ours, than=["best of n fixed", "RWR 0.25 fixed"], factor=0.8)
        for ours in TWO_PEAKS[:5]
    ],
    plot=bars(x="method", y="effective_actions"),
)
def commitment(cell: Cell) -> Row:
    """Peaks of width 10 at 35 and 75; rates of the far peak. Effective actions: exp(entropy)."""
    import torch

    from workingpapers.alignment import PreferenceTuner, testbeds

    env = testbeds.bump_bandit(70)
    name, _, source = cell.method.rpartition(" ")
    fresh = source == "fresh"

    def two_peaks(_: Any, actions: torch.Tensor) -> torch.Tensor:
        first, second = (testbeds.bump_reward(actions, centre=centre, width=10) for centre in (35, 75))
        return torch.maximum(first, second)

    policy = env.table()
    tuner = PreferenceTuner(
        policy,
        env.reference(),
        two_peaks,
        on_policy=fresh,
        inner_steps=5 if fresh else 100,
        batch_size=10 * ANSWERS if fresh else QUERIES,
        responses_per_prompt=ANSWERS,
        lr=TABLE_RATES[70][name][source == "fixed"],
        generator=torch.Generator().manual_seed(cell.seed),
        **LOSSES[name],
    )
    contexts = env.contexts(QUERIES // ANSWERS)
    history = tuner.fit(contexts, QUERIES, eval_prompts=contexts[:1], evaluate_every=100)
    shares = policy.log_distribution(contexts[:1])[0].exp()
    sides = torch.stack([shares[:55].sum(), shares[55:].sum()])
    return {
        "effective_actions": math.exp(history.entropy[-1]),
        "larger_side": float(sides.max()),
        "reward": history.reward[-1],
    }
