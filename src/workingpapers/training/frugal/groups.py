"""Which weights of a model FRUGAL may project, and which keep their whole state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def frugal_param_groups(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] = ("lm_head", "embed", "norm"),
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into regular ones and projectable weights of linear layers.

    Everything that is not the weight of a linear layer is regular, as is a weight that another module shares (tied
    embeddings) and the output layer of a transformers model. The output layer must keep its state: by sign alone it
    learns badly. A classification head is not recognised: put its name ("classifier", "score") into `exclude`.

    Parameters
    ----------
    model : of `torch.nn.Linear` modules, or the `Conv1D` of GPT-2.
    targets : project only weights of modules whose name contains one of these, for example ("q_proj", "v_proj"); None
        takes all.
    exclude : modules whose name contains one of these are regular.

    Returns
    -------
    list of dict : two groups for `Frugal`, with "projectable" False (absent if there is none) and True, in the order of
    the model. Options of `Frugal` can be added to each.

    Raises
    ------
    TypeError : `model` is no module, or `targets` or `exclude` is a single string.
    ValueError : nothing is projectable; the message names the linear layers there are.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, words in (("targets", targets), ("exclude", exclude)):
        if isinstance(words, str):
            raise TypeError(f"{name} must be a list of strings, got {words!r}")

    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    chosen = {
        name: module
        for name, module in linear.items()
        if module is not head
        and (targets is None or any(word in name for word in targets))
        and not any(word in name for word in exclude)
    }
    weights = {id(module.get_parameter("weight")) for module in chosen.values()}
    for module in model.modules():
        if all(module is not projected for projected in chosen.values()):  # a tied weight may be its own as well
            weights -= {id(parameter) for parameter in module.parameters(recurse=False)}

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if (id(p) in weights) == projectable], "projectable": projectable}
        for projectable in (False, True)
    ]
    if not groups[1]["params"]:
        raise ValueError(
            f"model has no projectable weight: its linear layers are {', '.join(linear) or 'none'}; "
            f"targets={targets!r}, exclude={exclude!r}"
        )
    return [group for group in groups if group["params"]]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
