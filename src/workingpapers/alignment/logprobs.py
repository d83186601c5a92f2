"""Log-probabilities of responses under any transformers causal language model.

Everything that scores preference pairs needs the same three things: log pi(y_t | x, y_<t) for the tokens of a
response, the same under a frozen reference, and as little memory as possible on the way. The logits of a vocabulary
are by far the largest tensor of such a step, so here

- the model's own head runs on the scored positions alone, (N, V) for N response tokens in place of (B, T, V) for all
  positions. The hidden states are narrowed by a hook in front of the head, so whatever the architecture does around
  the head (scaling, soft-capping, an adapter on it) happens as usual;
- the log-softmax is never stored: the backward pass rebuilds each softmax row from the logits and one number.

Where even (N, V) does not fit, score fewer sequences at a time and accumulate gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_BLOCK = 2**22  # logits converted to float32 or exponentiated at a time: 16 MiB of scratch memory


def token_logprobs(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"],
    response_mask: Bool[Tensor, "batch length"],
) -> Float[Tensor, "batch length"]:
    """Log-probability of every response token given what stands before it.

    Padding may be on either side. Gradients flow to the model; call under ``torch.no_grad()`` where none are wanted.

    Parameters
    ----------
    model : a transformers causal LM, or a peft model around one.
    input_ids : token ids of prompt, response and padding.
    attention_mask : 1 on prompt and response, 0 on padding.
    response_mask : True on the tokens to score. The first token of a sequence cannot be scored: it has no context.

    Returns
    -------
    Nats, aligned with `input_ids`: entry t is log pi(token t | tokens before t) where `response_mask`, 0 elsewhere.
    In float32 when the logits are half precision, else in the dtype of the logits.

    Raises
    ------
    ValueError : shapes differ, or `response_mask` marks padding, a first token, or nothing at all.
    """
    logits = response_logits(model, input_ids, attention_mask, response_mask)
    scored = select_logprobs(logits, input_ids[response_mask].to(logits.device))
    return scored.new_zeros(input_ids.shape).masked_scatter(response_mask.to(scored.device), scored)


def sequence_logprobs(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"],
    response_mask: Bool[Tensor, "batch length"],
) -> Float[Tensor, " batch"]:
    """Log-probability of each whole response, the sum of `token_logprobs` over its tokens; same arguments."""
    return token_logprobs(model, input_ids, attention_mask, response_mask).sum(dim=-1)


def response_logits(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"],
    response_mask: Bool[Tensor, "batch length"],
) -> Float[Tensor, "scored vocabulary"]:
    """Logits from which each marked token is predicted, row by row; the other positions never reach the head.

    For losses that need more of the distribution than one entry (divergences, entropies). Arguments as in
    `token_logprobs`.
    """
    _check_masks(input_ids, attention_mask, response_mask)
    length = input_ids.shape[1]
    # The state at position t - 1 predicts token t.
    predicting = response_mask[:, 1:].reshape(-1).nonzero().squeeze(1)

    def narrowed(states: Tensor) -> Tensor:
        states = states[:, states.shape[1] - length : -1]  # prompt-learning adapters put virtual tokens in front
        return states.reshape(-1, states.shape[-1]).index_select(0, predicting.to(states.device))

    reached = False

    def narrow_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal reached
        reached = True
        return (narrowed(args[0])[None], *args[1:])

    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    hook = head.register_forward_pre_hook(narrow_input) if head is not None else None
    try:
        logits: Tensor = model(
            input_ids=input_ids, attention_mask=attention_mask, **_accepted_extras(model, attention_mask)
        ).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits[0] if reached else narrowed(logits)  # a model that uses its head's weight directly: narrow late


def select_logprobs(logits: Float[Tensor, "rows vocabulary"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """``log_softmax(logits)[i, labels[i]]`` without storing the log-softmax.

    Half-precision logits are normalised in float32. Differentiable once.

    Raises
    ------
    ValueError : `labels` does not name one entry of each row.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must be one per row of logits {tuple(logits.shape)}, got {tuple(labels.shape)}")
    selected: Tensor = _SelectLogProbs.apply(logits, labels)  # type: ignore[no-untyped-call]
    return selected


class _SelectLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        precise = torch.promote_types(logits.dtype, torch.float32)
        # log Z_i = log sum_v exp(logit_iv)
        log_normaliser = torch.cat([block.to(precise).logsumexp(-1) for block in _blocks(logits)])
        ctx.save_for_backward(logits, labels, log_normaliser)
        return logits.gather(1, labels[:, None]).squeeze(1).to(precise) - log_normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, labels, log_normaliser = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        # d log p_iy / d logit_iv = [v = y] - p_iv
        start = 0
        for block in _blocks(logits):
            rows = slice(start, start + len(block))
            probabilities = (block.to(log_normaliser.dtype) - log_normaliser[rows, None]).exp_()
            gradient[rows] = probabilities.mul_(-upstream[rows, None])
            start += len(block)
        gradient.scatter_add_(1, labels[:, None], upstream[:, None].to(gradient.dtype))
        return gradient, None


def _blocks(logits: Tensor) -> tuple[Tensor, ...]:
    return torch.split(logits, max(1, _BLOCK // logits.shape[1]))


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Lend a model in evaluation mode and without gradients; every module's training flag is as before afterwards."""
    in_training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield model
    finally:
        for module in in_training:
            module.training = True


@contextmanager
def reference_of(model: nn.Module, ref_model: nn.Module | None = None) -> Iterator[nn.Module]:
    """Lend the frozen reference policy.

    With no `ref_model` it is `model` with its peft adapters switched off, which costs no memory.

    Parameters
    ----------
    model : the policy.
    ref_model : the reference as a model of its own.

    Raises
    ------
    ValueError : `ref_model` is None and `model` has no adapters to switch off.
    """
    adapters: AbstractContextManager[Any] = nullcontext()
    if ref_model is None:
        disable_adapter: Any = getattr(model, "disable_adapter", None)
        if disable_adapter is None:
            raise ValueError(
                f"ref_model may be None only when model is a peft model, whose adapters can be switched off; got a "
                f"{type(model).__name__}: pass a frozen copy as ref_model"
            )
        adapters = disable_adapter()
    with frozen(model if ref_model is None else ref_model) as reference, adapters:
        yield reference


def _accepted_extras(model: nn.Module, attention_mask: Tensor) -> dict[str, Any]:
    """Arguments that some architectures take: positions that skip left padding, and no key-value cache."""
    architecture: nn.Module = getattr(model, "get_base_model", lambda: model)()  # peft forwards take any argument
    accepted = inspect.signature(architecture.forward).parameters
    extras = {
        "position_ids": (attention_mask.long().cumsum(-1) - 1).clamp_(min=0),
        "use_cache": False,
    }
    return {name: value for name, value in extras.items() if name in accepted}


def _check_masks(input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (batch, length), got {tuple(input_ids.shape)}")
    for name, mask in (("attention_mask", attention_mask), ("response_mask", response_mask)):
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(mask.shape)}"
            )
    if response_mask.dtype != torch.bool:
        raise ValueError(f"response_mask must be boolean, got {response_mask.dtype}")
    first = (attention_mask != 0).long().cumsum(-1) <= 1  # padding on the left and the first real token
    if not response_mask.any():
        raise ValueError("response_mask marks no token")
    if (response_mask & (first | (attention_mask == 0))).any():
        raise ValueError("response_mask marks padding or the first token of a sequence, which has no context")
