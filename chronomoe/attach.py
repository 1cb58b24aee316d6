"""Close the loop around a Hugging Face mixture-of-experts model, without changing its code.

    handle = chronomoe.attach(model, ChronoConfig(...))
    ...
    optimizer.step(); handle.step()          # after each optimizer step

Hooks on each router add beta to the logits where the choice is made, and keep the router's own rule (families.py). The
router still returns its clean logits, so the model's auxiliary loss balances clean routing. In training, a hook gives
each slot (a token and one of its choices) to the experts as a token of its own, so that the experts module, whichever
implementation it uses, returns y_e per slot; a second hook adds them with their weights. Evaluation and generation run
the experts module as it is.

The loop's state is the submodule `chrono` of the model: `save_pretrained`, `state_dict` and the checkpoints of Trainer
hold it, and `model.to(bfloat16)` leaves it in float32. Only a forward of the whole model in train mode, with
gradients, records; so gradient checkpointing, which runs layers again in the backward, counts a step once.

Shapes: L MoE layers, E experts, N tokens, K top_k, S = N * K slots, D model width.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chronomoe.config import ChronoConfig
from chronomoe.families import FAMILIES, Family
from chronomoe.lifecycle import PruneDecision
from chronomoe.loop import ChronoLoop
from chronomoe.router import FirstOrder, RouterBias, RouterState, Routing, applied_relevance
from chronomoe.state import widened
from chronomoe.statistics import collect_trace
from chronomoe.trace import MoETrace

NAME = "chrono"  # of the submodule and of the entry in the model's config


class _State(nn.Module):
    """The loop's state, as a part of the model."""

    def __init__(self, loop: ChronoLoop):
        super().__init__()
        self.router_state = loop.router_state
        self.coherence = loop.coherence
        self.lifecycle = loop.lifecycle
        self.signals = loop.signals


@dataclasses.dataclass
class _Layer:
    """One MoE layer, and what its router and experts did in the last forward."""

    router: nn.Module
    experts: nn.Module
    family: Family
    masked: Tensor | None = None  # [E] bool, experts that no token may choose
    routing: Routing | None = None
    flips: Tensor | None = None  # [2] share of the set, and of the first choices, that differ from the native ones
    slots: tuple[Tensor, Tensor] | None = None  # experts and weights [N, K], while the experts run
    outputs: Tensor | None = None  # [2, E, D]
    gated_norm: Tensor | None = None  # [E]


class Slots(NamedTuple):
    """What one MoE layer computed in a forward."""

    experts: Tensor  # [N, K] int64
    weights: Tensor  # [N, K], with a gradient if gradients are enabled
    y: Tensor  # [N, K, D] output of each choice


class Handle:
    """The loop around a model. Made by `attach`.

    Attributes:
        loop: the ChronoLoop.
        config: its settings.
    """

    def __init__(self, model: nn.Module, config: ChronoConfig, families: Sequence[Family], seed: int):
        self.model, self.config = model, config
        found = _find_layers(model, families)
        self.layers = [layer for _, layer in found]
        _check_layers(self.layers)
        state = RouterState(len(found), _num_experts(self.layers[0]), config).to(_device(self.layers[0]))
        self.loop = ChronoLoop(state, [block for block, _ in found], seed)
        self._biases: list[RouterBias | None] = []
        self._trace: MoETrace | None = None
        self._records = False
        self._observed: dict[int, Slots] | None = None
        self._hooks = [model.register_forward_pre_hook(self._begin), model.register_forward_hook(self._end)]
        # bound methods, so that a deep copy of the model has a handle of its own
        for index, layer in enumerate(self.layers):
            self._hooks += [
                layer.router.register_forward_hook(partial(self._route, index)),
                layer.experts.register_forward_pre_hook(partial(self._expand, index)),
                layer.experts.register_forward_hook(partial(self._mix, index)),
            ]
        model.add_module(NAME, _State(self.loop))
        if hasattr(model, "config"):
            setattr(model.config, NAME, dataclasses.asdict(config))

    def __getstate__(self) -> dict[str, Any]:
        """Without the tensors of the last forward, which have a gradient and cannot be copied."""
        return self.__dict__ | {"_biases": [], "_trace": None, "_records": False}

    def step(self, found_inf: Tensor | None = None, loss_scale: Tensor | None = None) -> None:
        """Update the loop from the training forwards since the last call. Call it after optimizer.step(), on all ranks.

        found_inf: [] tensor, nonzero if the optimizer step was skipped. loss_scale: [], the factor of the loss in
        backward (GradScaler); only signal 'first_order' needs it. Raises RuntimeError if there was no forward in train
        mode with gradients.
        """
        if self._trace is None:
            raise RuntimeError(
                "handle.step() without a forward of the model in train mode since the last step; blocks that "
                "`use_kernels` has replaced do not call the router"
            )
        trace, self._trace = self._trace, None
        self.loop.step(self.loop.collect(trace, loss_scale), found_inf)

    def read(self) -> dict[str, float | None]:
        """The last step's metrics by name. Synchronizes with the device."""
        return self.loop.read()

    def report(self) -> list[PruneDecision]:
        """Prune candidates that opened or were withdrawn since the last report. Synchronizes with the device."""
        return self.loop.report()

    def detach(self) -> None:
        """Remove the hooks and the state from the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._trace = None
        if NAME in self.model._modules:
            del self.model._modules[NAME]
        if hasattr(self.model, "config") and hasattr(self.model.config, NAME):
            delattr(self.model.config, NAME)

    @contextmanager
    def masked(self, masks: Mapping[int, Sequence[int]]) -> Iterator[None]:
        """Let no token choose some experts, by transformer block, while the block is open.

        Raises ValueError for a block without experts, an expert that does not exist, or if fewer than K are left.
        """
        by_block = dict(zip(self.loop.layer_ids, self.layers))
        masked = {}
        for block, experts in masks.items():
            if block not in by_block:
                raise ValueError(f"block {block} has no experts; blocks {sorted(by_block)} have")
            masked[block] = _mask(by_block[block], block, experts)
        try:
            for block, mask in masked.items():
                by_block[block].masked = mask
            yield
        finally:
            for block in masked:
                by_block[block].masked = None

    @contextmanager
    def observed(self) -> Iterator[dict[int, Slots]]:
        """What the layers compute in the forwards of the block, in evaluation too, by transformer block.

        The state does not change. Each forward replaces the entries of the last one.
        """
        self._observed = {}
        try:
            yield self._observed
        finally:
            self._observed = None

    # hooks, in the order in which a forward calls them

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._records = model.training and torch.is_grad_enabled()

    def _bias(self, index: int) -> RouterBias | None:
        """A layer's bias. The first layer reads the state, which does not change between forward and backward."""
        if index == 0 or not self._biases:
            with torch.enable_grad():  # of the probe; checkpointing runs the first forward without
                self._biases = self.loop.router_state.layer_biases()
        return self._biases[index]

    def _is_training(self) -> bool:
        """In a training forward, or in a part of it that gradient checkpointing runs again."""
        return self._records or (self.model.training and torch.is_grad_enabled())

    def _route(self, index: int, router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        layer, bias = self.layers[index], self._bias(index)
        logits, weights, experts = output
        native, z_clean = experts, widened(logits)
        biased, relevance = z_clean, None
        if bias is not None:
            relevance = applied_relevance(z_clean.detach(), bias, self.config)
            biased = z_clean + relevance * bias.beta_eff
        if bias is not None or layer.masked is not None:
            of_weights = z_clean if self.config.gates == "clean" else biased
            choice = biased
            if layer.masked is not None:
                choice, of_weights = (z.masked_fill(layer.masked, -torch.inf) for z in (choice, of_weights))
            exact, experts = layer.family.rule(router, choice, of_weights)
            if bias is not None and bias.probe is not None and self.model.training and torch.is_grad_enabled():
                exact = FirstOrder.apply(exact, experts, bias.probe)
            weights = exact.to(weights.dtype)
        if self._records:
            layer.routing = _routing(z_clean, biased, weights, experts, bias, relevance)
            layer.flips = _flips(layer.routing, native) if bias is not None else None
        return logits, weights, experts

    def _expand(self, index: int, module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> Any:
        layer = self.layers[index]
        layer.slots = None  # checkpointing can leave the experts by an exception
        if self._observed is None and not (self.config.coherence and self._is_training()):
            return None
        hidden, experts, weights = args
        if self._observed is not None and torch.is_grad_enabled() and not weights.requires_grad:
            weights = weights.detach().requires_grad_()  # of a frozen router
        layer.slots = experts, weights
        ones = torch.ones_like(weights).reshape(-1, 1)
        return hidden.repeat_interleave(experts.shape[-1], dim=0), experts.reshape(-1, 1), ones

    def _mix(self, index: int, module: nn.Module, args: Any, y: Tensor) -> Tensor | None:
        layer = self.layers[index]
        if layer.slots is None:
            return None
        (experts, weights), layer.slots = layer.slots, None
        if self._observed is not None:
            block = self.loop.layer_ids[index]
            self._observed[block] = Slots(experts, weights, y.detach().view(*experts.shape, -1))
        if self._records and self.config.coherence:
            self._sum(layer, y.detach(), experts.flatten(), weights.detach().flatten())
        mixture = (y * weights.reshape(-1, 1)).view(*experts.shape, y.shape[-1]).sum(dim=1)
        return mixture.to(y.dtype)

    @torch.no_grad()
    def _sum(self, layer: _Layer, y: Tensor, experts: Tensor, weights: Tensor) -> None:
        """The sums over the slots of each expert: y and g y [2, E, D], and |g y| [E] if the signal needs it."""
        with torch.autocast(y.device.type, enabled=False):
            y = widened(y)
            is_of = experts.unsqueeze(-1) == torch.arange(self.loop.router_state.beta_coeff.shape[1], device=y.device)
            one_hot = is_of.to(y.dtype)  # [S, E]; index_add would use atomics
            weights = weights.to(y.dtype)
            layer.outputs = torch.stack([one_hot.t() @ y, (one_hot * weights.unsqueeze(-1)).t() @ y])
            if self.config.measures("gated_norm"):
                layer.gated_norm = (weights * y.norm(dim=-1)) @ one_hot

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if not self._records:
            return
        self._records = False
        routings = [layer.routing for layer in self.layers]
        if any(routing is None for routing in routings):
            return  # the blocks were replaced: `step` reports it
        trace = self._collect([routing for routing in routings if routing is not None], getattr(output, "loss", None))
        self._trace = trace if self._trace is None else self._trace + trace
        for layer in self.layers:
            layer.routing = layer.outputs = layer.flips = layer.gated_norm = None

    @torch.no_grad()
    def _collect(self, routings: list[Routing], loss: Tensor | None) -> MoETrace:
        trace = collect_trace(
            routings,
            self.config,
            cross_entropy=None if loss is None else loss.detach().float(),
            outputs=[layer.outputs for layer in self.layers if layer.outputs is not None],
            gated_norms=[layer.gated_norm for layer in self.layers if layer.gated_norm is not None],
        )
        if self.config.router:
            # by the model's own rule, which need not follow the order of the logits
            flips = torch.stack([layer.flips for layer in self.layers if layer.flips is not None], dim=1)
            trace.flip_set, trace.flip = flips.unbind(0)
        return trace


def _num_experts(layer: _Layer) -> int:
    return int(layer.router.num_experts)  # type: ignore[arg-type]


def _device(layer: _Layer) -> torch.device:
    return next(layer.router.parameters()).device


def _check_layers(layers: list[_Layer]) -> None:
    sizes = {_num_experts(layer) for layer in layers}
    if len(sizes) > 1:
        raise ValueError(f"the MoE layers have different numbers of experts: {sorted(sizes)}")
    devices = {str(_device(layer)) for layer in layers}
    if len(devices) > 1:
        raise ValueError(f"the MoE layers are on several devices, {', '.join(sorted(devices))}: load the model on one")
    if any(getattr(layer.experts, "_is_expert_parallel", False) for layer in layers):
        raise ValueError("expert parallelism is not supported: load the model without it")


def _mask(layer: _Layer, block: int, experts: Sequence[int]) -> Tensor:
    """[E] bool, True for the given experts."""
    router: Any = layer.router
    chosen = set(experts)
    if not chosen <= set(range(router.num_experts)):
        raise ValueError(f"block {block} has experts 0 to {router.num_experts - 1}, not {sorted(chosen)}")
    is_masked = torch.tensor([e in chosen for e in range(router.num_experts)])
    # of DeepSeek's router, whose token may get the groups with the fewest experts
    groups, limit = getattr(router, "num_group", 1), getattr(router, "topk_group", 1)
    left = (~is_masked).view(groups, -1).sum(-1).sort().values[:limit].sum()
    if left < router.top_k:
        raise ValueError(f"block {block}: {len(chosen)} masked experts can leave a token fewer than {router.top_k}")
    return is_masked.to(_device(layer))


@torch.no_grad()
def _routing(
    z_clean: Tensor,
    biased: Tensor,
    weights: Tensor,
    experts: Tensor,
    bias: RouterBias | None,
    relevance: Tensor | None,
) -> Routing:
    """What collect_trace reads, without the losses, which are the model's."""
    counts = torch.zeros_like(z_clean).scatter(-1, experts, 1.0).sum(0)
    zero = z_clean.new_zeros(())
    return Routing(
        experts, weights.detach(), z_clean.detach(), None, biased.detach(), counts, zero, zero, bias, relevance
    )


@torch.no_grad()
def _flips(routing: Routing, native: Tensor) -> Tensor:
    """Sums over tokens [2]: the share of the choice that is not in the native one [N, K], and 1 if the first differs.

    The first expert is the one with the largest logit.
    """
    is_native = (routing.experts.unsqueeze(-1) == native.unsqueeze(-2)).any(-1)  # [N, K]
    first, native_first = (
        experts.gather(-1, z.gather(-1, experts).argmax(-1, keepdim=True))
        for z, experts in ((routing.z_biased, routing.experts), (routing.z_clean, native))
    )
    changed = (~is_native).float().mean(-1).sum(), (first != native_first).float().sum()
    return torch.stack(changed)


def attach(
    model: nn.Module,
    config: ChronoConfig | None = None,
    *,
    families: Sequence[Family] = (),
    seed: int = 0,
) -> Handle:
    """Close the loop around a Hugging Face mixture-of-experts model.

    Args:
        model: of one of FAMILIES; its MoE layers must be on one device.
        config: settings of the loop. None: those that `save_pretrained` stored with the model, and its state.
        families: descriptions of other routers; they win over FAMILIES.
        seed: of the random numbers of the signals.

    Raises ValueError for a model without known routers, one that is attached already, or if config is None and the
    model's folder holds no state.
    """
    if NAME in model._modules:
        raise ValueError("the model is attached already: call detach() on its handle first")
    if config is not None:
        return Handle(model, config, [*families, *FAMILIES], seed)
    stored = getattr(getattr(model, "config", None), NAME, None)
    if not isinstance(stored, dict):
        raise ValueError("attach(model) without a config needs a model that was saved while it was attached")
    try:
        settings = ChronoConfig(**stored)
    except (TypeError, ValueError) as e:
        raise ValueError(f"the model's config has settings of another version of chronomoe: {e}") from None
    handle = Handle(model, settings, [*families, *FAMILIES], seed)
    try:
        model.get_submodule(NAME).load_state_dict(_saved_state(Path(str(getattr(model, "name_or_path", "")))))
    except (OSError, ValueError, RuntimeError) as e:
        handle.detach()
        raise ValueError(f"the loop's state cannot be read: {' '.join(str(e).split())}") from None
    return handle


def _saved_state(folder: Path) -> dict[str, Tensor]:
    """The loop's state in the safetensors files of a folder that save_pretrained wrote."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            for name in f.keys():
                if name.startswith(f"{NAME}."):
                    found[name.removeprefix(f"{NAME}.")] = f.get_tensor(name)
    if not found:
        raise ValueError(f"no file *.safetensors in {folder} holds it")
    return found


def _find_layers(model: nn.Module, families: Sequence[Family]) -> list[tuple[int, _Layer]]:
    """(transformer block, layer) of each router, in the order of the model."""
    by_name: dict[str, Family] = {}
    for family in families:
        by_name.setdefault(family.router, family)
    found: list[tuple[int, _Layer]] = []
    for name, module in model.named_modules():
        family_of = by_name.get(type(module).__name__)
        if family_of is None:
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        experts = getattr(parent, family_of.experts, None)
        if not isinstance(experts, nn.Module):
            raise ValueError(
                f"{name}: its parent has no module {family_of.experts!r}; describe it with Family(experts=)"
            )
        number = re.search(r"\.(\d+)\.", f".{name}.")
        found.append((int(number[1]) if number else len(found), _Layer(module, experts, family_of)))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no known router; known are {', '.join(sorted(by_name))}. Describe another one "
            "with families=[Family(router class, rule)], see chronomoe/families.py"
        )
    if len({block for block, _ in found}) < len(found):  # for example an encoder and a decoder
        return [(index, layer) for index, (_, layer) in enumerate(found)]
    return found
