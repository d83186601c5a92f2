"""What the experiment asks of a model, and how transformers models give it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workingpapers.alignment.logprobs import frozen, response_logits
from workingpapers.alignment.sampling import sample_responses
from workingpapers.alignment.sequences import SequenceBatch


@runtime_checkable
class SequenceModel(Protocol):
    """An autoregressive model. Transformers models are wrapped; anything else implements these two methods.

    A student must be a ``torch.nn.Module`` besides. A ``vocab_size`` attribute, where there is one, is compared before
    any work.
    """

    def logits(self, batch: SequenceBatch) -> Float[Tensor, "tokens vocabulary"]:
        """Logits from which each response token is predicted, row by row, for the tokens of ``response_mask``."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> SequenceBatch:
        """One answer to each prompt, in their order."""


def as_sequence_model(name: str, model: Any) -> SequenceModel:
    """The model itself where it has the two methods, else its wrapper.

    Parameters
    ----------
    name : of the argument, for the error.
    model : a transformers causal or encoder-decoder LM, a peft model around one, or a `SequenceModel`.

    Raises
    ------
    TypeError : it is none of these.
    """
    if isinstance(model, SequenceModel):
        return model
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "is_encoder_decoder"):
        raise TypeError(
            f"{name} must be a transformers language model or have the methods sample and logits, "
            f"got {type(model).__name__}"
        )
    return EncoderDecoderLM(model) if config.is_encoder_decoder else CausalLM(model)


def check_shared_vocabulary(**models: SequenceModel) -> None:
    """Refuse models whose vocabularies differ in size, as far as they say.

    Raises
    ------
    ValueError : two sizes differ.
    """
    sizes = {name: size for name, model in models.items() if (size := getattr(model, "vocab_size", None)) is not None}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} has {size} tokens" for name, size in sizes.items())
        raise ValueError(f"the models must share their tokenizer, but {said}")


def underlying(model: SequenceModel) -> Any:
    """What the caller passed: the transformers model of a wrapper, or the model itself."""
    return model.model if isinstance(model, CausalLM | EncoderDecoderLM) else model


def module_of(model: SequenceModel) -> nn.Module | None:
    """The module that holds the parameters; None for an object that is not a module."""
    module = underlying(model)
    return module if isinstance(module, nn.Module) else None


@contextmanager
def frozen_model(model: SequenceModel) -> Iterator[SequenceModel]:
    """Lend a model without gradients and, where it is a module, in evaluation mode."""
    module = module_of(model)
    if module is None:
        with torch.no_grad():
            yield model
    else:
        with frozen(module):
            yield model


class CausalLM:
    """A transformers causal LM as a `SequenceModel`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.vocab_size, self.eos_token_id, self.pad_token_id = _special_ids(model)

    def logits(self, batch: SequenceBatch) -> Float[Tensor, "tokens vocabulary"]:
        batch = batch.to(_device(self.model))
        return response_logits(self.model, batch.input_ids, batch.attention_mask, batch.response_mask)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> SequenceBatch:
        return sample_responses(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.pad_token_id,
            temperature=temperature,
            generator=generator,
        )


class EncoderDecoderLM:
    """A transformers encoder-decoder LM as a `SequenceModel`: the encoder reads the prompt, the decoder answers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.vocab_size, self.eos_token_id, self.pad_token_id = _special_ids(model)
        config: Any = model.config
        self.start_token_id = config.decoder_start_token_id
        if self.start_token_id is None:
            self.start_token_id = self.pad_token_id

    def logits(self, batch: SequenceBatch) -> Float[Tensor, "tokens vocabulary"]:
        batch = batch.to(_device(self.model))
        prompts, prompt_mask = _gathered(batch.input_ids, (batch.attention_mask != 0) & ~batch.response_mask)
        answers, answer_mask = _gathered(batch.input_ids, batch.response_mask)
        begun = torch.full_like(answers[:, :1], self.start_token_id)
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]

        def narrow_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][answer_mask][None], *args[1:])  # as in `response_logits`: padding never reaches the head

        hook = head.register_forward_pre_hook(narrow_input)
        try:
            logits: Tensor = self.model(
                input_ids=prompts,
                attention_mask=prompt_mask.long(),
                decoder_input_ids=torch.cat([begun, answers[:, :-1]], 1),
                decoder_attention_mask=answer_mask.long(),
                use_cache=False,
            ).logits
        finally:
            hook.remove()
        return logits[0]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> SequenceBatch:
        device = _device(self.model)
        input_ids, attention_mask = padded(prompts, self.pad_token_id)
        input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
        ends = torch.tensor([] if self.eos_token_id is None else self.eos_token_id, device=device).reshape(-1)
        token = torch.full((len(prompts), 1), self.start_token_id, device=device)
        going = torch.ones(len(prompts), dtype=torch.bool, device=device)
        tokens: list[Tensor] = []
        inside: list[Tensor] = []
        cache: Any = None
        with frozen(self.model):
            encoder: nn.Module = self.model.get_encoder()  # type: ignore[operator]
            read, read_mask = _gathered(
                input_ids, attention_mask != 0
            )  # positions may be absolute: no padding in front
            states = encoder(input_ids=read, attention_mask=read_mask.long())
            while len(tokens) < max_new_tokens and going.any():
                out = self.model(
                    encoder_outputs=states,
                    attention_mask=read_mask.long(),
                    decoder_input_ids=token,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = out.past_key_values
                token = drawn(out.logits[:, -1], temperature, generator)
                tokens.append(token)
                inside.append(going)
                going = going & ~torch.isin(token[:, 0], ends)
        answers, answer_mask = torch.cat(tokens, 1), torch.stack(inside, 1)
        return SequenceBatch(
            torch.cat([input_ids, answers.masked_fill(~answer_mask, self.pad_token_id)], 1),
            torch.cat([attention_mask, answer_mask.long()], 1),
            torch.cat([torch.zeros_like(attention_mask, dtype=torch.bool), answer_mask], 1),
            finished=~going,
        )


def padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int = 0
) -> tuple[Int[Tensor, "prompts length"], Int[Tensor, "prompts length"]]:
    """Prompts padded on the left, and 1 where there is none of it."""
    width = max(len(prompt) for prompt in prompts)
    rows = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return torch.tensor(rows), (torch.arange(width) >= width - lengths[:, None]).long()


def drawn(
    logits: Float[Tensor, "rows vocabulary"], temperature: float, generator: torch.Generator | None
) -> Int[Tensor, "rows 1"]:
    """One token of each row at a temperature above 0, by the index of the uniform number among cumulative shares."""
    shares = (logits / temperature).softmax(-1, dtype=torch.float64).cumsum(-1)
    where = logits.device if generator is None else generator.device
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator, device=where).to(logits.device)
    return torch.searchsorted(shares, uniform * shares[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)


def _gathered(
    ids: Int[Tensor, "rows length"], mask: Bool[Tensor, "rows length"]
) -> tuple[Int[Tensor, "rows longest"], Bool[Tensor, "rows longest"]]:
    """The marked tokens of each row at its beginning, and which places they fill."""
    lengths = mask.sum(-1)
    filled = torch.arange(int(lengths.max()), device=ids.device) < lengths[:, None]
    return ids.new_zeros(filled.shape).masked_scatter(filled, ids[mask]), filled


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _special_ids(model: nn.Module) -> tuple[int, Any, int]:
    """Vocabulary size, what ends an answer (one id, several, or None), and an id for padding."""
    config: Any = model.config
    generation: Any = getattr(model, "generation_config", None)
    text: Any = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    end, pad = (
        next((value for value in (getattr(part, name, None) for part in (generation, text)) if value is not None), None)
        for name in ("eos_token_id", "pad_token_id")
    )
    return text.vocab_size, end, 0 if pad is None else pad
