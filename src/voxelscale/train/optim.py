"""Update rules, schedules, learning rates for large batches, and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from voxelscale.config import OptimConfig

KEPT = (
    {"exp_avg", "exp_avg_sq", "step"},  # PyTorch's AdamW
    {"momentum_buffer"},  # its SGD
    {"mean", "square", "step"},
    {"momentum"},
)
"""What the rules keep of a weight: all of one of these, or it has not been updated."""


def make_optimizer(model: nn.Module, config: OptimConfig, pretrained: Collection[str] = ()) -> Optimizer:
    """The update rule by name.

    ``adamw`` (Loshchilov and Hutter 2019), ``sgd`` with Nesterov momentum, ``lars`` (You, Gitman and
    Ginsburg 2017), ``lamb`` (You et al. 2020), ``muon`` (Jordan et al. 2024). Norms and biases are not
    decayed; LARS and LAMB do not adapt their rates either, as the papers' own code excludes them. What the
    config leaves open is the rule's own (`voxelscale.config.optim.OWN`).

    Args:
        pretrained: names of the parameters whose rate is `config.pretrained_lr` of the others'.
    """
    own = config.used
    slow = frozenset(pretrained) if config.pretrained_lr < 1 else frozenset[str]()
    named = [(name in slow, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for kept in (False, True) if slow else (False,):
        kernels, others = (
            [p for old, p in named if old == kept and (p.ndim > 1) == k] for k in (True, False)
        )
        more = {"rate": config.pretrained_lr} if kept else {}
        groups += [
            {"params": kernels, "weight_decay": own.weight_decay, "adapt": True, **more},
            {"params": others, "weight_decay": 0.0, "adapt": False, **more},
        ]
    if config.name == "lars":
        return Lars(groups, {"lr": own.lr, "momentum": own.momentum, "trust": config.trust})
    if config.name == "lamb":
        return Lamb(groups, {"lr": own.lr, "betas": config.betas, "eps": config.eps})
    if config.name == "muon":
        rates: dict[str, Any] = {"lr": own.lr, "momentum": own.momentum}
        return Muon(groups, rates | {"betas": config.betas, "eps": config.eps})
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=own.lr, betas=config.betas, eps=config.eps, fused=True)
    return torch.optim.SGD(groups, lr=own.lr, momentum=own.momentum, nesterov=own.momentum > 0)


class _Rule(Optimizer):
    """What the rules below share with PyTorch's: called with nothing, or with a closure.

    All parameters of a group are updated by few operations on lists of tensors: one by one they would be
    over a thousand kernels a step on a GPU.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._update(parameters, [p.grad for p in parameters], group)
        return loss

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _kept(self, parameters: Sequence[Tensor], name: str) -> list[Tensor]:
        """A tensor of each parameter's state, of zeros at first."""
        for p in parameters:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in parameters]

    def _adam_direction(
        self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """``m' / (sqrt(v') + eps)`` of Kingma and Ba 2015, with the bias corrected."""
        one, two = group["betas"]
        means, squares = self._kept(parameters, "mean"), self._kept(parameters, "square")
        for p in parameters:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
        steps = [self.state[p]["step"] for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - one)
        torch._foreach_mul_(squares, two)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - two)
        roots = torch._foreach_div(squares, [1 - two**step for step in steps])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        directions = torch._foreach_div(means, [1 - one**step for step in steps])
        torch._foreach_div_(directions, roots)
        return list(directions)


def _norms(tensors: list[Tensor]) -> Tensor:
    """(number of tensors,) their L2 norms."""
    return torch.stack(list(torch._foreach_norm(tensors)))


class Lars(_Rule):
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg, arXiv:1708.03888, algorithm 1).

    ``v = m v + lr * trust * |w| / (|g| + wd |w|) * (g + wd w)``, ``w -= v``; without the ratio for
    groups whose ``adapt`` is False.
    """

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        decay = group["weight_decay"]
        steps = torch._foreach_add(gradients, torch._foreach_mul(parameters, decay))
        if group["adapt"]:
            sizes, slopes = _norms(parameters), _norms(gradients)
            ratios = group["trust"] * sizes / (slopes + decay * sizes)
            ratios = torch.where((sizes > 0) & (slopes > 0), ratios, torch.ones_like(ratios))
            torch._foreach_mul_(steps, list((group["lr"] * ratios).unbind()))
        else:
            torch._foreach_mul_(steps, group["lr"])
        velocities = self._kept(parameters, "momentum")
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, steps)
        torch._foreach_sub_(parameters, velocities)


class Lamb(_Rule):
    """Adam with layer-wise adaptation (You et al., ICLR 2020, arXiv:1904.00962, algorithm 2).

    ``u = m' / (sqrt(v') + eps) + wd w`` with Adam's bias-corrected moments, ``w -= lr |w| / |u| u``;
    without the ratio for groups whose ``adapt`` is False.
    """

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        updates = self._adam_direction(parameters, gradients, group)
        torch._foreach_add_(updates, torch._foreach_mul(parameters, group["weight_decay"]))
        if group["adapt"]:
            sizes, lengths = _norms(parameters), _norms(updates)
            ratios = torch.where((sizes > 0) & (lengths > 0), sizes / lengths, torch.ones_like(sizes))
            torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


class Muon(_Rule):
    """Momentum with orthogonalised updates (Jordan et al., "Muon", 2024).

    A kernel ``(out, in, ...)`` is taken as an ``out x prod(in, ...)`` matrix; its momentum's singular
    values are all brought near 1 by Newton and Schulz's iteration, and the result has the root mean
    square of an Adam update (0.2 sqrt(larger side); Liu et al., "Muon is scalable", arXiv:2502.16982),
    so that one learning rate serves both. Groups whose ``adapt`` is False, and kernels of a single
    input or output channel, are updated by AdamW.
    """

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        turned: list[tuple[Tensor, Tensor]] = []
        others: list[tuple[Tensor, Tensor]] = []
        for p, gradient in zip(parameters, gradients, strict=True):
            (turned if group["adapt"] and min(p.shape[:2]) > 1 else others).append((p, gradient))
        for pairs, direction in ((turned, self._orthogonal), (others, self._adam_direction)):
            if pairs:
                chosen, slopes = (list(each) for each in zip(*pairs, strict=True))
                updates = direction(chosen, slopes, group)
                torch._foreach_mul_(chosen, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(chosen, updates, alpha=-group["lr"])

    def _orthogonal(
        self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        velocities = self._kept(parameters, "momentum")
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, gradients)
        nesterov = torch._foreach_add(gradients, velocities, alpha=group["momentum"])
        # Columns in the order in which they lie in memory (channels last or not): no matrix is a copy.
        orders = [[0, *sorted(range(1, p.ndim), key=p.stride, reverse=True)] for p in parameters]
        moved = [x.permute(order) for x, order in zip(nesterov, orders, strict=True)]
        matrices = [x.reshape(len(x), -1) for x in moved]
        turned = orthogonalise(matrices, [0.2 * math.sqrt(max(matrix.shape)) for matrix in matrices])
        return [
            x.view(like.shape).permute([order.index(axis) for axis in range(like.ndim)])
            for x, like, order in zip(turned, moved, orders, strict=True)
        ]


def orthogonalise(matrices: Sequence[Tensor], scales: Sequence[float], steps: int = 5) -> list[Tensor]:
    """Each matrix with the same singular vectors and singular values of about its scale (0.7 to 1.2 of it).

    The quintic iteration of Newton and Schulz with Jordan's coefficients (2024), ``X <- (a + b G + c G^2)
    X`` with ``G = X X^T``, which needs no decomposition; float32. All factors are polynomials of the first
    G, so they are multiplied with each other, as small as the matrix's shorter side, and with X once: a
    quarter of the arithmetic for a kernel of 27 voxels. Matrices whose shorter sides are equal go together.
    """
    wide = [matrix.float() if len(matrix) <= matrix.shape[1] else matrix.float().mT for matrix in matrices]
    alike: dict[int, list[int]] = {}
    for number, x in enumerate(wide):
        alike.setdefault(len(x), []).append(number)
    found: dict[int, Tensor] = {}
    for numbers in alike.values():
        grams = torch.stack([wide[number] @ wide[number].mT for number in numbers])
        factors = list(_newton_schulz(grams, steps))
        torch._foreach_mul_(factors, [scales[number] for number in numbers])
        for number, factor in zip(numbers, factors, strict=True):
            tall = wide[number].shape != matrices[number].shape
            # All factors are symmetric.
            found[number] = wide[number].mT @ factor if tall else factor @ wide[number]
    return [found[number] for number in range(len(matrices))]


def _newton_schulz(grams: Tensor, steps: int) -> Tensor:
    """What `orthogonalise` multiplies matrices X with, from their ``X X^T``, ``(matrices, n, n)``."""
    a, b, c = 3.4445, -4.7750, 2.0315
    # The square of the Frobenius norm.
    square = grams.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] + 1e-14
    gram = grams / square
    whole = torch.eye(grams.shape[-1], device=grams.device) / square.sqrt()
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        whole = factor @ whole
        if step + 1 < steps:
            gram = factor @ gram @ factor
    return whole


def peak_rate(config: OptimConfig, global_batch: int) -> float:
    """The highest learning rate at this global batch, from the one tuned at ``reference_batch``.

    ``linear`` (Goyal et al. 2017), ``sqrt`` (Hoffer et al. 2017; for adaptive rules Malladi et al.
    2022), ``none``, or the rule that suits the optimiser where it is null; never above ``max_lr`` where
    that is set.
    """
    ratio = global_batch / config.reference_batch
    factor = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.used.scaling]
    rate = config.used.lr * factor
    return min(rate, config.max_lr) if config.max_lr else rate


def learning_rate(config: OptimConfig, seen: int, samples: int, global_batch: int | None = None) -> float:
    """The rate for the step that begins after `seen` of `samples` samples.

    Linear warm-up over the share `config.warmup`, then poly ``(1 - t) ** 0.9`` (nnU-Net), cosine
    ``(1 + cos(pi t)) / 2`` (Loshchilov and Hutter 2017), linear ``1 - t``, step (times
    ``step_factor`` after each of ``step_at``) or constant. A function of samples, not of steps: it has
    the same shape for every number of workers.
    """
    peak = peak_rate(config, global_batch or config.reference_batch)
    progress = min(seen / samples, 1.0)
    if progress < config.warmup:
        # The middle of the step: the first must not be wasted on a rate of zero.
        middle = (seen + (global_batch or 0) / 2) / samples
        return peak * min(1.0, max(middle / config.warmup, 0.02))
    t = (progress - config.warmup) / (1 - config.warmup)
    factor = {
        "poly": (1 - t) ** 0.9,
        "cosine": (1 + math.cos(math.pi * t)) / 2,
        "linear": 1 - t,
        "step": config.step_factor ** sum(progress >= share for share in config.step_at),
        "constant": 1.0,
    }
    return float(peak * factor[config.schedule])


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give it to every parameter group, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)


class AveragedWeights:
    """Moving average of weights and running statistics (Polyak and Juditsky 1992).

    Its memory is a share of the run's samples, not a number of updates, so that it averages over the
    same stretch of a training whatever the number of workers; and it never reaches further back than
    a tenth of the training so far, so that the first weights are forgotten.

    Args:
        model: its parameters and floating-point buffers are averaged.
        share: time constant as a share of the budget, above 0.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share = share
        self.weights = {name: value.clone() for name, value in _averaged(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, seen: int, global_batch: int, samples: int) -> None:
        """After the update that ended at `seen` samples."""
        reach = min(self.share * samples, 0.1 * seen)
        keep = math.exp(-global_batch / reach) if reach > 0 else 0.0
        torch._foreach_lerp_(list(self.weights.values()), list(_averaged(model).values()), 1 - keep)


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach() for name, value in named if value.is_floating_point()}
