"""The FRUGAL optimiser."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from workingpapers.common.validation import check_choice, check_integer, check_number
from workingpapers.training.frugal import subspaces
from workingpapers.training.frugal.memory import state_memory
from workingpapers.training.frugal.rules import MOMENTS, RULES, FullRule, Group, clear
from workingpapers.training.frugal.subspaces import Projection, Subspace

FreeRule = Literal["sign", "sgd", "none"]
OnRefresh = Literal["reset", "keep", "reproject"]
BlockOrder = Literal["random", "ascending", "descending", "mirror"]
Parameters: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

# Parameters are updated in batches of about this many numbers: temporary tensors stay small, and on a CPU in its cache.
BATCH = {"cpu": 2**20}
BATCH_ELSEWHERE = 2**24


class Moved(NamedTuple):
    """A parameter that has a gradient, and its place in the group."""

    position: int
    p: Tensor
    grad: Tensor


class Frugal(Optimizer):
    """Adam (or Lion, or SGD with momentum) on a rotating part of the linear weights, signs of the gradient on the rest.

    Groups marked ``"projectable": True`` hold the matrices whose state is saved; make them with `frugal_param_groups`.
    All other groups are updated by the full rule. A projectable weight W with gradient G, in whose current subspace P
    projects, moves by::

        W <- (1 - lr weight_decay) W + P^T U - lr proj_lr_scale free_lr_scale free(G - P^T P G)
        U = -lr proj_lr_scale m / (sqrt(v) + eps)        # m, v: Adam's corrected moments of P G, for full="adamw"

    Subspaces change at the first step of a group and every `update_gap` of its steps, using the gradient of that step.
    With "svd" and "random" the sign of the remainder is not orthogonal to the subspace; the method accepts that. Where
    a gradient has a lower rank than its subspace (fewer tokens than directions), the remainder is rounding error and
    its sign is noise: take fewer directions, or another projection.

    Gradients may be of any floating-point type; state is float32, or float64 for float64 parameters. Clip gradients if
    you like, but the sign does not feel it; gradients that underflow to 0 have sign 0, so with float16 scale the loss
    and let ``scaler.step(optimiser)`` unscale. In distributed data parallel training all processes choose the same
    subspaces, provided that they pass the same `generator`. Sharded parameters (FSDP) have not been tried.

    Parameters
    ----------
    params : parameter groups, or parameters; a group may set any of the options below for itself.
    lr : at least 0.
    density : share of the projectable weights that keeps state, in [0, 1]. 0 is pure signSGD there. Of a matrix (a, b)
        it is floor(density b) columns, floor(density a) rows, floor(density a b) entries, or, for "svd", "random" and
        "randperm", round(density min(a, b)) directions; of n tensors round(density n) blocks. Rank is density * width.
    update_gap : steps between changes of subspace, at least 1; the paper takes 200, and 500 for fine-tuning.
    projection : which subspaces:

        - "block" : whole tensors, in `block_order`;
        - "columns", "rows", "randk" : random columns, rows or entries;
        - "svd" : leading singular vectors of the gradient on the smaller side, as GaLore;
        - "random" : a random subspace of the smaller side; "randperm" : random coordinates of the smaller side.
    full : the rule with state: "adamw", "lion" (for which betas=(0.9, 0.99) is usual), or "sgdm", whose momentum is
        betas[0] and whose buffer starts at 0, as in `torch.optim.SGD`.
    free : the rule without: "sign", "sgd" (the gradient itself) or "none".
    free_lr_scale : learning rate of the free rule relative to the full one's on projectable weights; at least 0. The
        paper takes 1 for pre-training and 0.1 for fine-tuning.
    proj_lr_scale : learning rate of projectable weights relative to `lr`; at least 0.
    betas : decay rates of the averages, in [0, 1).
    eps : at least 0, added to the root of the second moment.
    weight_decay : at least 0, decoupled, on whole parameters.
    on_refresh : what becomes of moments when the subspace changes:

        - "reset" : they and the step counter start at zero, as in the paper's experiments;
        - "keep" : they stay as they are, although they now belong to other coordinates, as in GaLore;
        - "reproject" : m becomes R m and v becomes (R o R) v with R = P_new P_old^T; coordinates that stay keep theirs.
          Bias is corrected for every coordinate by the share of its history that is still there, and two numbers for
          each column, row, entry or direction are stored for that.

        "block" knows "reset" only.
    block_order : "random" (drawn anew each time), "ascending" or "descending" (in the order of the group, from the
        first tensor up or the last one down, going on where it stopped), or "mirror" (pairs from both ends; needs an
        even number of blocks).
    generator : what random subspaces are drawn from; read once, here. None always takes the same seed.

    Raises
    ------
    TypeError : an option is of the wrong type, or a parameter is complex.
    ValueError : an option is out of range, or a projectable parameter is not a matrix.
    RuntimeError : by `step`, when a gradient is sparse.

    Warns
    -----
    UserWarning : no group is projectable, or a positive density rounds to no state at all.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        density: float = 0.25,
        update_gap: int = 200,
        projection: Projection = "block",
        full: FullRule = "adamw",
        free: FreeRule = "sign",
        free_lr_scale: float = 1.0,
        proj_lr_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        on_refresh: OnRefresh = "reset",
        block_order: BlockOrder = "random",
        generator: torch.Generator | None = None,
    ) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
        seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator, device=generator.device))
        defaults = {
            "lr": lr,
            "density": density,
            "update_gap": update_gap,
            "projection": projection,
            "full": full,
            "free": free,
            "free_lr_scale": free_lr_scale,
            "proj_lr_scale": proj_lr_scale,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "on_refresh": on_refresh,
            "block_order": block_order,
            "projectable": False,
            "seed": seed,
            # where the group stands: its steps, its subspaces so far, the active blocks and where the next ones start
            "steps": 0,
            "refreshes": 0,
            "active": (),
            "pointer": None,
        }
        super().__init__(params, defaults)
        if not any(group["projectable"] for group in self.param_groups):
            warnings.warn(
                f"Frugal got no group with projectable=True, so all state is kept ({full}); "
                "frugal_param_groups(model) makes them",
                stacklevel=2,
            )

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`; mark it with "projectable" if it is."""
        options = {**self.defaults, **param_group}
        check_number("lr", options["lr"], at_least=0)
        check_number("density", options["density"], at_least=0, at_most=1)
        check_integer("update_gap", options["update_gap"], at_least=1)
        check_choice("projection", options["projection"], get_args(Projection))
        check_choice("full", options["full"], get_args(FullRule))
        check_choice("free", options["free"], get_args(FreeRule))
        for name in ("free_lr_scale", "proj_lr_scale", "eps", "weight_decay"):
            check_number(name, options[name], at_least=0)
        if not isinstance(options["betas"], tuple | list) or len(options["betas"]) != 2:
            raise TypeError(f"betas must be two numbers, got {options['betas']!r}")
        for k, beta in enumerate(options["betas"]):
            check_number(f"betas[{k}]", beta, at_least=0, below=1)
        check_choice("on_refresh", options["on_refresh"], get_args(OnRefresh))
        check_choice("block_order", options["block_order"], get_args(BlockOrder))
        check_choice("projectable", options["projectable"], (False, True))
        if options["projection"] == "block" and options["on_refresh"] != "reset":
            raise ValueError(f"on_refresh must be 'reset' when projection is 'block', got {options['on_refresh']!r}")

        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
        if any(isinstance(tensor, Tensor) and tensor.is_complex() for tensor in tensors):
            raise TypeError("params must be real, got a complex tensor")
        if options["projectable"]:
            shapes = [tuple(tensor.shape) for tensor in tensors if isinstance(tensor, Tensor)]
            if any(len(shape) != 2 for shape in shapes):
                raise ValueError(f"projectable params must be matrices, got shapes {shapes}")
            _check_share(tensors, options)
        super().add_param_group({**param_group, "params": given})

    # ----------------------------------------------------------------------------------------------------------------
    # A step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Parameters
        ----------
        closure : evaluates the model, calls backward and returns the loss.

        Returns
        -------
        The closure's loss, None without a closure.

        Raises
        ------
        RuntimeError : a gradient is sparse; no parameter has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad.is_sparse for group in self.param_groups for p in group["params"] if p.grad is not None):
            raise RuntimeError("Frugal does not support sparse gradients")

        for number, group in enumerate(self.param_groups):
            moved = [Moved(k, p, p.grad) for k, p in enumerate(group["params"]) if p.grad is not None]
            if not moved:
                continue
            if group["projectable"] and group["steps"] % group["update_gap"] == 0:
                group["refreshes"] += 1
                if group["projection"] == "block":
                    self._next_blocks(number, group)
            group["steps"] += 1
            for batch in _batches(moved):
                if group["weight_decay"]:
                    torch._foreach_mul_([one.p for one in batch], 1 - group["lr"] * group["weight_decay"])
                if group["projectable"]:
                    self._step_projectable(batch, number, group)
                else:
                    self._step_full(batch, group, group["lr"])
        return loss

    def _step_full(self, batch: list[Moved], group: Group, rate: float) -> None:
        """The full rule on whole tensors."""
        if batch:
            params = [one.p for one in batch]
            torch._foreach_add_(params, self._rule(params, [_wide(one.grad) for one in batch], group, rate))

    def _step_free(self, batch: list[Moved], group: Group, rate: float) -> None:
        """The free rule on whole tensors."""
        if batch and group["free"] != "none":
            grads = [one.grad for one in batch]
            directions = torch._foreach_sign(grads) if group["free"] == "sign" else grads
            torch._foreach_add_([one.p for one in batch], directions, alpha=-rate)

    def _step_projectable(self, batch: list[Moved], number: int, group: Group) -> None:
        full_rate = group["lr"] * group["proj_lr_scale"]
        free_rate = full_rate * group["free_lr_scale"]
        if group["projection"] == "block":
            active = set(group["active"])
            self._step_full([one for one in batch if one.position in active], group, full_rate)
            self._step_free([one for one in batch if one.position not in active], group, free_rate)
            return

        divided = [subspaces.size(one.p.shape, group["projection"], group["density"]) > 0 for one in batch]
        self._step_free([one for one, split in zip(batch, divided, strict=True) if not split], group, free_rate)
        batch = [one for one, split in zip(batch, divided, strict=True) if split]
        if not batch:
            return
        grads = [_wide(one.grad) for one in batch]
        chosen = [self._subspace(one, grad, number, group) for one, grad in zip(batch, grads, strict=True)]
        low = [subspace.down(grad) for subspace, grad in zip(chosen, grads, strict=True)]  # P G
        updates = self._rule([one.p for one in batch], low, group, full_rate)  # U
        for one, grad, subspace, part, update in zip(batch, grads, chosen, low, updates, strict=True):
            if group["free"] == "none":
                move = grad.new_zeros(grad.shape)
            else:
                rest = subspace.remainder(grad, part).contiguous()  # G - P^T P G
                move = rest.sign().mul_(-free_rate) if group["free"] == "sign" else rest * -free_rate
            subspace.insert(update, move)  # + P^T U
            one.p.add_(move)

    def _rule(self, params: list[Tensor], grads: list[Tensor], group: Group, rate: float) -> list[Tensor]:
        """What the full rule adds to parameters, or to coordinates of them, with these gradients."""
        states = [self.state[p] for p in params]
        for state, grad in zip(states, grads, strict=True):
            if MOMENTS[group["full"]][0] not in state:
                clear(state, grad, group)
        return RULES[group["full"]](states, grads, group, rate)

    # ----------------------------------------------------------------------------------------------------------------
    # Subspaces

    def _generator(self, number: int, group: Group, position: int) -> torch.Generator:
        """For one draw: depends on the seed and on what is drawn, not on what was drawn before."""
        entropy = np.random.SeedSequence((group["seed"], number, group["refreshes"], position))
        return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    def _next_blocks(self, number: int, group: Group) -> None:
        """Choose the blocks that have state from now on; all state so far is dropped."""
        n = len(group["params"])
        count = _block_count(n, group)
        pointer = group["pointer"]
        match group["block_order"]:
            case "random":
                active = torch.randperm(n, generator=self._generator(number, group, 0))[:count].tolist()
            case "ascending":
                pointer = 0 if pointer is None else pointer
                active = [(pointer + j) % n for j in range(count)]
                pointer = (pointer + count) % n
            case "descending":
                pointer = n - 1 if pointer is None else pointer
                active = [(pointer - j) % n for j in range(count)]
                pointer = (pointer - count) % n
            case _:  # mirror
                half = max(n // 2, 1)
                pointer = 0 if pointer is None else pointer
                first = [(pointer + j) % half for j in range(count // 2)]
                active = first + [n - 1 - j for j in first]
                pointer = (pointer + count // 2) % half
        group["active"], group["pointer"] = sorted(active), pointer
        for p in group["params"]:
            self.state.pop(p, None)

    def _subspace(self, one: Moved, grad: Tensor, number: int, group: Group) -> Subspace:
        """The current subspace of a weight; chosen now if it has none since the last refresh."""
        state, projection = self.state[one.p], group["projection"]
        before = next((state[key] for key in ("indices", "projector") if key in state), None)
        if before is not None and state["refresh"] == group["refreshes"]:
            return subspaces.from_tensor(before, grad.shape, projection)

        generator = self._generator(number, group, one.position)
        subspace = subspaces.choose(grad, projection, group["density"], generator)
        state[subspace.key], state["refresh"] = subspace.tensor, group["refreshes"]
        if before is None or group["on_refresh"] == "reset":
            low = subspace.down(grad)
            clear(state, low, group)
            if group["full"] == "adamw" and group["on_refresh"] == "reproject":
                along = low.ndim + subspace.axis
                state["mass"] = low.new_zeros(2, *(n if d == along else 1 for d, n in enumerate(low.shape)))
        elif group["on_refresh"] == "reproject":
            for name in {*MOMENTS[group["full"]], "mass"} & state.keys():
                state[name] = subspace.carry(state[name], before, squared=name in ("exp_avg_sq", "mass"))
        elif subspace.tensor.shape != before.shape:
            raise ValueError("on_refresh='keep' needs the same density throughout")
        return subspace

    # ----------------------------------------------------------------------------------------------------------------
    # What is there

    def active_fraction(self) -> float:
        """Share of the projectable parameters that have state now: about `density`, 0 before the first step."""
        total = active = 0
        for group in self.param_groups:
            if group["projectable"]:
                name = MOMENTS[group["full"]][0]
                total += sum(p.numel() for p in group["params"])
                active += sum(self.state[p][name].numel() for p in group["params"] if name in self.state.get(p, {}))
        return active / total if total else 0.0

    def state_memory_bytes(self) -> int:
        """Bytes of all state; `state_memory` tells what for."""
        return state_memory(self).bytes

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; training goes on with the same bits, random subspaces included."""
        super().load_state_dict(state_dict)
        # torch has cast indices and float32 moments to the type of the parameter: take them again
        saved = [k for group in state_dict["param_groups"] for k in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for k, p in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(k, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(device=p.device, copy=True)


def _wide(tensor: Tensor) -> Tensor:
    """In the type of the state: float32 for 16 bits."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _batches(moved: list[Moved]) -> Iterator[list[Moved]]:
    """Neighbours of about `BATCH` numbers together."""
    batch: list[Moved] = []
    count = 0
    for one in moved:
        batch.append(one)
        count += one.p.numel()
        if count >= BATCH.get(one.p.device.type, BATCH_ELSEWHERE):
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def _block_count(n: int, options: Group) -> int:
    count: int = round(options["density"] * n)
    if options["block_order"] == "mirror" and count % 2:
        raise ValueError(f"block_order='mirror' needs an even number of blocks, density gives {count} of {n}")
    return count


def _check_share(tensors: list[Any], options: Group) -> None:
    """Warn where a positive density rounds to nothing."""
    projection, density = options["projection"], options["density"]
    if projection == "block":
        empty = [] if _block_count(len(tensors), options) else tensors
    else:
        empty = [tensor for tensor in tensors if not subspaces.size(tensor.shape, projection, density)]
    if density and empty:
        warnings.warn(
            f"density={density:g} rounds to no state for {len(empty)} of {len(tensors)} projectable tensors "
            f"with projection={projection!r}",
            stacklevel=5,
        )
