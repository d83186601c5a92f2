"""FRUGAL under the Trainer of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from workingpapers.common.validation import check_integer, require
from workingpapers.training.frugal.groups import frugal_param_groups
from workingpapers.training.frugal.optimizer import Frugal

if TYPE_CHECKING:
    from transformers import TrainingArguments


def trainer_optimizers(
    model: nn.Module,
    args: TrainingArguments,
    *,
    num_training_steps: int | None = None,
    **options: Any,
) -> tuple[Frugal, LRScheduler]:
    """Optimiser and schedule for ``Trainer(model, args, optimizers=trainer_optimizers(model, args))``.

    Learning rate, betas, eps, weight decay, warm-up and the kind of schedule are those of `args`. Weight decay acts on
    every trained parameter, as in the paper; Trainer's own optimiser would spare biases and norms. Clipping
    (`max_grad_norm`) acts on the whole gradient: it does not change the part that moves by sign.

    Parameters
    ----------
    model : as for `frugal_param_groups`. For other groups than its default build `Frugal` yourself.
    args : the Trainer's.
    num_training_steps : of the whole run, at least 1; None takes ``args.max_steps``.
    **options : for `Frugal`: density, update_gap, projection, ...; they win over `args`.

    Returns
    -------
    optimiser, scheduler

    Raises
    ------
    ValueError : the number of steps is not known, or `Frugal` or `frugal_param_groups` refuses its arguments.
    ImportError : transformers is absent.
    """
    if num_training_steps is None and args.max_steps < 1:
        raise ValueError("num_training_steps must be given when args.max_steps is not set")
    steps = args.max_steps if num_training_steps is None else num_training_steps
    check_integer("num_training_steps", steps, at_least=1)
    own: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    optimizer = Frugal(frugal_param_groups(model), **(own | options))
    scheduler: LRScheduler = require("transformers", extra="language").get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return optimizer, scheduler
