"""Claims of "Grokking at the Edge of Numerical Stability".

The task is the paper's, addition modulo p of two one-hot numbers by a ReLU network with two hidden layers and without
biases, full batch, AdamW; the modulus is smaller where 113 takes too long. Accuracy on the held-out pairs is recorded
every 20 steps, and a run ends when it reaches 99 %. A run that never does counts with its whole budget of steps, which
flatters it.

OrthoGrad and weight decay keep the paper's learning rate. StableMax by itself needs 80 000 steps of them; here it has a
smaller modulus and three times the learning rate, as has the softmax it is compared with. All numbers are those of all
seeds: the time to generalise varies a lot between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from workingpapers.common.validation import require
from workingpapers.desk.claim import (
    Cell,
    Row,
    always,
    artifact,
    bars,
    benchmark,
    claim,
    close,
    faster,
    higher,
    line,
    lower,
    scales,
    seeds,
)
from workingpapers.training.stablemax import (
    GrokkingMonitor,
    OrthoGrad,
    modular_dataset,
    softmax_collapse_fraction,
    stablemax_cross_entropy,
)

PAPER = "stablemax"

# --------------------------------------------------------------------------------------------------------------------
# Training

TASKS = {37: (0.7, 128), 59: (0.5, 128), 113: (0.4, 200)}  # modulus: share of the pairs to train on, width
SOFTMAX_TYPES = {"softmax16": torch.float16, "softmax64": torch.float64}  # of the loss alone
PLAIN, DECAYED = {"weight_decay": 0.0}, {"weight_decay": 1.0}


def loss_of(method: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Softmax cross-entropy in the method's precision, or StableMax in float32."""
    if method.startswith("StableMax"):
        return stablemax_cross_entropy
    dtype = SOFTMAX_TYPES.get(method, torch.float32)
    return lambda logits, labels: functional.cross_entropy(logits.to(dtype), labels).float()


@contextmanager
def fast_small_numbers() -> Iterator[None]:
    """Without subnormal numbers, which Adam's moments become after overfitting and which are slow."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@artifact
def training_run(
    method: str, p: int, fraction: float, width: int, steps: int, lr: float, beta2: float, eps: float, seed: int
) -> dict[str, Tensor]:
    """The snapshots of one run, every 20 steps, each measure as one tensor."""
    task = modular_dataset(p, "add", fraction, random_state=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, second, third = (nn.Linear(n, m, bias=False) for n, m in ((2 * p, width), (width, width), (width, p)))
    model, loss = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third), loss_of(method)
    options: dict[str, Any] = {"lr": lr, "betas": (0.9, beta2), "eps": eps}
    options |= DECAYED if method.endswith("weight decay 1") else PLAIN
    wrap = OrthoGrad if method.endswith("OrthoGrad") else torch.optim.AdamW
    optimiser = wrap(model.parameters(), **options)
    link, dtype = "stablemax" if method.startswith("StableMax") else "softmax", SOFTMAX_TYPES.get(method)
    monitor = GrokkingMonitor(model, loss, task.train, task.test, link=link, dtype=dtype)  # type: ignore[arg-type]
    inputs, labels = task.train
    with fast_small_numbers():
        for step in range(1, steps + 1):
            optimiser.zero_grad()
            torch.autograd.backward(loss(model(inputs), labels))
            optimiser.step()
            if step % 20 == 0 and monitor.record(step).test_accuracy >= 0.99:
                break
    names = ("step", "train_accuracy", "test_accuracy", "collapsed", "logit_scale", "cosine")
    return {name: torch.tensor([float(getattr(s, name)) for s in monitor.history]) for name in names}


def outcome(run: dict[str, Tensor], budget: int, stride: int = 1) -> list[Row]:
    """The curve, with the first step of 99 % accuracy; `collapsed` is the largest share so far."""
    reached = {}
    for part in ("train", "test"):
        there = run["step"][run[f"{part}_accuracy"] >= 0.99]
        reached[part] = int(there[0]) if len(there) else budget
    worst = run["collapsed"].cummax(0).values
    kept = range(len(worst) - 1, -1, -stride)  # the last one and every stride-th before it
    return [
        {
            "step": int(run["step"][k]),
            "test_accuracy": float(run["test_accuracy"][k]),
            "train_accuracy": float(run["train_accuracy"][k]),
            "collapsed": float(worst[k]),
            "logit_scale": float(run["logit_scale"][k]),
            "cosine": float(run["cosine"][k]),
            "steps_to_99": reached["test"],
            "delay": reached["test"] / reached["train"],  # 1: it generalises as soon as it has memorised
        }
        for k in reversed(kept)
    ]


def addition(cell: Cell) -> list[Row]:
    """One run with the paper's learning rate and the defaults of AdamW."""
    setting = (cell.p, *TASKS[cell.p], cell.steps, 0.01, 0.999, 1e-8)
    return outcome(training_run(cell.method, *setting, cell.seed), cell.steps)


def affordable(cell: Cell) -> bool:
    """Modulo 113 a step takes nine times as long: on a laptop there are 200 of them, and none in float64."""
    if cell.steps not in (200, 400):
        return True
    return bool(cell.method != "softmax64" and cell.steps == 200 if cell.p == 113 else cell.steps == 400)


# --------------------------------------------------------------------------------------------------------------------
# Generalisation


@claim(
    paper=PAPER,
    says="With OrthoGrad a network groks modular addition to 99 % in the steps in which softmax alone only memorises.",
    published="modulo 113, 40 % of the pairs, AdamW: OrthoGrad groks within 300 steps; float32 softmax without "
    "regularisation does not grok, float64 only gains late (figures)",
    grid={
        "p": scales(smoke=[37], laptop=[59, 113]),
        "steps": scales(smoke=[160], laptop=[200, 400], paper=[2000]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": scales(smoke=["softmax32", "OrthoGrad"], laptop=["softmax32", "softmax64", "OrthoGrad"]),
    },
    only=affordable,
    expect=[
        always("test_accuracy", at_least=0.99, of="OrthoGrad", where={"step": "last"}),
        always("train_accuracy", at_least=0.99, of="softmax32", where={"step": "last"}),
        higher("test_accuracy", "OrthoGrad", than="softmax32", margin=0.5, each="p", where={"step": "last"}),
        lower("test_accuracy", "softmax32", than=0.5, each="p", where={"step": "last"}),
    ],
    plot=line(x="step", y="test_accuracy", by="method", each="p"),
)
def orthograd_groks(cell: Cell) -> list[Row]:
    return addition(cell)


@claim(
    paper=PAPER,
    says="OrthoGrad reaches 99 % at least 5 times sooner than AdamW with weight decay 1, and within twice the steps it "
    "takes to learn the training pairs.",
    published="grokking with almost no delay after memorisation, ahead of weight decay (figures)",
    grid={
        "p": scales(smoke=[], laptop=[37, 59], paper=[37, 59, 113]),
        "steps": scales(smoke=[1500], laptop=[1500], paper=[5000]),
        "seed": seeds(smoke=5, laptop=8, paper=10),
        "method": ["softmax32, weight decay 1", "OrthoGrad"],
    },
    expect=[
        lower("steps_to_99", "OrthoGrad", than="softmax32, weight decay 1", factor=0.2, each="p"),
        lower("delay", "OrthoGrad", than=2.0, each="p"),
    ],
    plot=bars(x="p", y="steps_to_99", by="method"),
)
def orthograd_needs_less_time_than_weight_decay(cell: Cell) -> Row:
    return addition(cell)[-1]


ALONE = (31, 0.8, 128)  # modulus, share, width: small and with most pairs known, so that 4000 steps show it


def alone(cell: Cell) -> list[Row]:
    """One run without any regularisation, with an eps of AdamW that does not freeze it."""
    setting = (113, 0.4, 200, cell.steps, 0.01, 0.999) if cell.steps > 4000 else (*ALONE, cell.steps, 0.03, 0.99)
    return outcome(training_run(cell.method, *setting, 1e-25, cell.seed), cell.steps, stride=10)


WITHOUT_REGULARISATION: dict[str, Any] = {
    "steps": scales(smoke=[], laptop=[4000], paper=[80_000]),
    "seed": seeds(smoke=5, laptop=5, paper=5),
    "method": ["softmax32", "StableMax32"],
}


@claim(
    paper=PAPER,
    says="Without any regularisation StableMax ends with a higher test accuracy than softmax, all in float32.",
    published="StableMax groks without regularisation, softmax does not (modulo 113, float64 for StableMax; figures)",
    grid=WITHOUT_REGULARISATION,
    expect=[
        higher("test_accuracy", "StableMax32", than="softmax32", where={"step": "last"}),
        higher("collapsed", "softmax32", than=0.0, where={"step": "last"}),
    ],
    plot=line(x="step", y="test_accuracy", by="method"),
)
def stablemax_generalises_without_regularisation(cell: Cell) -> list[Row]:
    return alone(cell)


@claim(
    paper=PAPER,
    says="StableMax groks, to 99 % test accuracy, without any regularisation.",
    published="within 80 000 steps modulo 113 (learning rate 0.01), within 100 000 on products and parities (figures)",
    grid=WITHOUT_REGULARISATION,
    expect=[always("test_accuracy", at_least=0.99, of="StableMax32", where={"step": "last"})],
    plot=line(x="step", y="test_accuracy", by="method"),
)
def stablemax_groks_without_regularisation(cell: Cell) -> list[Row]:
    return alone(cell)


# --------------------------------------------------------------------------------------------------------------------
# Collapse


@claim(
    paper=PAPER,
    says="The fewer bits the softmax has, the more samples collapse in the same steps; with StableMax none do.",
    published="learning stops when all samples have collapsed, later with more bits (16, 32, 64; figures)",
    grid={
        "steps": scales(smoke=[160], laptop=[1000], paper=[20_000]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ["softmax16", "softmax32", "softmax64", "StableMax32"],
    },
    expect=[
        higher("collapsed", "softmax16", than=["softmax32", "softmax64"], margin=0.5, where={"step": "last"}),
        higher("collapsed", "softmax32", than="softmax64", where={"step": "last"}),
        always("collapsed", at_most=0.0, of="StableMax32"),
    ],
    plot=line(x="step", y="collapsed", by="method"),
)
def fewer_bits_collapse_more(cell: Cell) -> list[Row]:
    run = training_run(cell.method, 23, 0.8, 64, cell.steps, 0.03, 0.99, 1e-25, cell.seed)
    return outcome(run, cell.steps)


BITS = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}


@claim(
    paper=PAPER,
    says="With two classes a sample collapses when its right logit leads by log 2 times the bits of the significand.",
    published="absorption: the sum of exponentials rounds to that of the right class (definition of softmax collapse)",
    grid={"dtype": list(BITS), "seed": seeds(smoke=1, laptop=1)},
    expect=[close("lead", to="predicted", rtol=0.02), always("stablemax_lead", at_least=100.0)],
    plot=bars(x="dtype", y="lead"),
)
def leads_at_which_samples_collapse(cell: Cell) -> Row:
    dtype = getattr(torch, cell.dtype)
    leads = {}
    for link, highest in (("softmax", 60.0), ("stablemax", 6e4)):
        lead = torch.linspace(0.0, highest, 60_001, dtype=torch.float64).to(dtype)
        logits = torch.stack([lead, torch.zeros_like(lead)], 1)
        labels = torch.zeros(len(lead), dtype=torch.long)
        share = softmax_collapse_fraction(logits, labels, link=link)  # type: ignore[arg-type]
        leads[link] = highest * (1 - share)  # all leads above the first that collapses do
    return {"lead": leads["softmax"], "predicted": BITS[cell.dtype] * math.log(2), "stablemax_lead": leads["stablemax"]}


# --------------------------------------------------------------------------------------------------------------------
# Cost


@benchmark(
    paper=PAPER,
    says="An AdamW step with OrthoGrad takes less time than with the OrthoGrad of pytorch_optimizer.",
    grid={
        "width": scales(smoke=[64], laptop=[64, 256, 512]),
        "layers": [24],
        "contender": ["ours", "pytorch_optimizer", "pytorch_optimizer, foreach", "AdamW alone"],
    },
    expect=[faster("ours", than=["pytorch_optimizer", "pytorch_optimizer, foreach"])],
    plot=bars(x="width", y="seconds", by="contender"),
)
def a_step(cell: Cell) -> Row:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(cell.width, cell.width, generator=generator)) for _ in range(cell.layers)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimiser: Any = torch.optim.AdamW(parameters, lr=1e-9)
    if cell.contender == "ours":
        optimiser = OrthoGrad(parameters, lr=1e-9)
    elif cell.contender.startswith("pytorch_optimizer"):
        peer = require("pytorch_optimizer", extra="peers")
        optimiser = peer.OrthoGrad(optimiser, foreach=cell.contender.endswith("foreach") or None)
    optimiser.step()  # allocates the moments
    calls = max(2, 2**18 // cell.width**2)
    with cell.timed(calls=calls):
        for _ in range(calls):
            optimiser.step()
    return {"parameters": sum(parameter.numel() for parameter in parameters)}


def published_formula(logits: Tensor, labels: Tensor) -> Tensor:
    """StableMax cross-entropy as the paper writes it, in float64."""
    z = logits.double()
    s = torch.where(z >= 0, z + 1, 1 / (1 - z + 1e-30))
    return -(s / s.sum(1, keepdim=True)).log().gather(1, labels[:, None]).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": stablemax_cross_entropy,
    "published formula": published_formula,
    "softmax in float32": functional.cross_entropy,
    "softmax in float64": lambda logits, labels: functional.cross_entropy(logits.double(), labels),
}


@benchmark(
    paper=PAPER,
    says="The loss and its gradient take less time than the published formula in float64.",
    grid={
        "samples": scales(smoke=[1000], laptop=[1000, 5000]),
        "classes": scales(smoke=[113], laptop=[113], paper=[113, 1000]),
        "contender": list(LOSSES),
    },
    expect=[faster("ours", than="published formula")],
    plot=bars(x="samples", y="seconds", by="contender", each="classes"),
)
def the_loss(cell: Cell) -> Row:
    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(cell.samples, cell.classes, generator=generator)).requires_grad_()
    labels = torch.randint(cell.classes, (cell.samples,), generator=generator)
    with cell.timed(calls=3):
        for _ in range(3):
            loss = LOSSES[cell.contender](logits, labels)
            torch.autograd.grad(loss, logits)
    return {"loss": float(loss.detach())}
