"""The best linear gate for given states: ridge regression on the source's logits, then cross-entropy with its routes.

Knows tensors alone. Knows nothing about models, blocks or where states come from.

Letters: T tokens, D model width, E experts, F features of a token (D, and a constant 1 where the gate has a bias).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pregate.models.routing import Choose, ScoreFunction, first_choice, logits_agreement

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Penalties on the distance from the start, in units of the features' mean square."""
TEMPERATURES = {ScoreFunction.softmax: (1.0, 0.5, 0.25), ScoreFunction.sigmoid: (1.0,)}
"""Of both softmaxes, in units of the logits' standard deviation: from like the regression to like top-1 alone. Of both
sigmoids, as they are: colder ones would ask which scores are above one half, which decides nothing."""
CHUNK_TOKENS = 4096
"""Tokens whose states are in float64 at once."""


@dataclass(frozen=True)
class Tokens:
    """states_TD: what a gate reads. logits_TE: what the source's gate said about the same tokens."""

    states_TD: Tensor
    logits_TE: Tensor

    def __len__(self) -> int:
        return len(self.states_TD)


@dataclass(frozen=True)
class GateFit:
    """A gate, and its slot agreement with the source on held-out tokens: of the start (`copy`), of the best ridge fit
    and of the best refined one. `chosen` says which of them the gate is."""

    weight_ED: Tensor
    bias_E: Tensor | None
    copy: float
    ridge: float
    refined: float
    chosen: str


def fit_gate(
    weight_ED: Tensor,
    bias_E: Tensor | None,
    fit: Tokens,
    held_out: Tokens,
    steps: int,
    choose: Choose = first_choice,
    scores: ScoreFunction = ScoreFunction.softmax,
) -> GateFit:
    """The gate that agrees most with the source on `held_out`, of several fitted on `fit` and the given start itself.

    `steps`: most iterations at each temperature; 0 leaves the ridge fits alone. `choose`: the router's rule. `scores`:
    its score function. On equal agreement the simpler fit wins, so the result is never worse than the start on the
    tokens held out.
    """
    start_EF = weight_ED if bias_E is None else torch.cat([weight_ED, bias_E[:, None]], dim=1)
    start_EF = start_EF.double()
    states_TF, judged_TF = (_features(tokens.states_TD, bias_E is not None) for tokens in (fit, held_out))

    def agreement(gate_EF: Tensor) -> float:
        return logits_agreement(judged_TF @ gate_EF.to(judged_TF.dtype).T, held_out.logits_TE, choose)

    copy = agreement(start_EF)
    gates: dict[str, Tensor] = {"copy": start_EF}
    agreements = {"copy": copy}
    regression = Regression(start_EF, states_TF, fit.logits_TE, scores)
    for penalty in reversed(RIDGES):
        name = f"ridge {penalty:g}"
        gates[name] = regression.ridge(penalty)
        agreements[name] = agreement(gates[name])
    closed = max((name for name in agreements if name != "copy"), key=agreements.__getitem__)
    refined, gate_EF = agreements[closed], gates[closed]
    for temperature in TEMPERATURES[scores] if steps else ():
        name = f"temperature {temperature:g}"
        gate_EF = regression.refine(gate_EF, temperature, float(closed.split()[1]), steps)
        gates[name], agreements[name] = gate_EF, agreement(gate_EF)
        refined = max(refined, agreements[name])
    chosen = max(agreements, key=agreements.__getitem__)
    result_EF = gates[chosen].to(weight_ED.dtype)
    D = weight_ED.shape[1]
    return GateFit(
        weight_ED=result_EF[:, :D].contiguous(),
        bias_E=None if bias_E is None else result_EF[:, D].contiguous(),
        copy=copy,
        ridge=agreements[closed],
        refined=refined,
        chosen=chosen,
    )


class Regression:
    """Fits of a gate to `logits_TE`, beginning at `start_EF` (float64). What they share is computed once, in float64, a
    part of the tokens at a time: all states in float64 would take twice their memory."""

    def __init__(
        self,
        start_EF: Tensor,
        states_TF: Tensor,
        logits_TE: Tensor,
        scores: ScoreFunction = ScoreFunction.softmax,
    ) -> None:
        self._start_EF, self._states_TF, self._scores = start_EF, states_TF, scores
        # a softmax does not see a constant that is added to a token's logits
        seen = _centred if scores is ScoreFunction.softmax else _unchanged
        F = states_TF.shape[1]
        self._moments_FF = torch.zeros(F, F, dtype=torch.float64, device=states_TF.device)
        self._products_FE = torch.zeros_like(start_EF.T)
        self._wanted_TE = seen(logits_TE.double())
        self._begin_TE = torch.empty_like(self._wanted_TE)
        for rows, part_TF in self._parts():
            self._moments_FF.addmm_(part_TF.T, part_TF)
            self._begin_TE[rows] = part_TF @ start_EF.T
            self._products_FE += part_TF.T @ seen(self._wanted_TE[rows] - self._begin_TE[rows])
        self._moments_FF /= len(states_TF)
        self._products_FE /= len(states_TF)
        self._whitened: tuple[float, Tensor, Tensor] | None = None

    def ridge(self, penalty: float) -> Tensor:
        """The gate whose logits are nearest to those wanted; for a softmax up to a constant for each token.

        Minimises |states (gate - start) - (logits - start logits)|^2 + penalty m T |gate - start|^2, with m the mean
        square of the features. In float64.
        """
        return self._start_EF + torch.linalg.solve(self._penalised(penalty), self._products_FE).T

    def refine(self, gate_EF: Tensor, temperature: float, penalty: float, steps: int) -> Tensor:
        """Lower the cross-entropy between the source's routing scores and the gate's, beginning at `gate_EF`.

        Both softmaxes are taken at `temperature` standard deviations of the logits, so that the gate keeps the source's
        scale, which is that of its combine weights, whatever the temperature. Sigmoids are taken at `temperature`, and
        their cross-entropy is the sum over experts of that of two outcomes. The penalty is that of `ridge`, which
        this turns into as the temperature rises. Full-batch L-BFGS in coordinates in which the features are white: in
        their own, a few directions of the residual stream carry almost all the variance and it stops far from the
        minimum.
        """
        dtype, num_experts = self._states_TF.dtype, len(gate_EF)
        softmax = self._scores is ScoreFunction.softmax
        scale = temperature * (self._wanted_TE.std().clamp_min(1e-6).item() if softmax else 1.0)
        wanted_TE = self._wanted_TE / scale
        wanted_TE = (wanted_TE.softmax(-1) if softmax else wanted_TE.sigmoid()).to(dtype)
        # the curvature of the cross-entropy where all logits are zero
        curvature = 1 / num_experts if softmax else 1 / 4
        root64_FF, white_TF = self._white(penalty)
        mean_square = self._moments_FF.diagonal().mean().item()
        begin_TE = (self._begin_TE / scale).to(dtype)
        step_EF = ((gate_EF - self._start_EF) @ root64_FF / scale).to(dtype).requires_grad_()
        root_FF = root64_FF.to(dtype)
        optimizer = torch.optim.LBFGS(
            [step_EF], max_iter=steps, tolerance_grad=1e-6, tolerance_change=1e-8, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits_TE = begin_TE + white_TF @ step_EF.T
            if softmax:
                entropy = -(wanted_TE * logits_TE.log_softmax(-1)).sum(-1).mean()
            else:
                entropy = binary_cross_entropy_with_logits(logits_TE, wanted_TE, reduction="sum") / len(logits_TE)
            moved_EF = torch.linalg.solve_triangular(root_FF, step_EF, upper=False, left=False)
            loss = entropy + penalty * mean_square * curvature / 2 * moved_EF.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        moved_EF = torch.linalg.solve_triangular(root64_FF, step_EF.detach().double(), upper=False, left=False)
        return self._start_EF + scale * moved_EF

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, len(self._states_TF), CHUNK_TOKENS):
            rows = slice(first, first + CHUNK_TOKENS)
            yield rows, self._states_TF[rows].double()

    def _penalised(self, penalty: float) -> Tensor:
        """The second moments of the features, with the penalty on the diagonal; never singular."""
        tiny = torch.finfo(self._moments_FF.dtype).tiny ** 0.5
        ridge_F = (penalty * self._moments_FF.diagonal().mean()).clamp_min(tiny).expand(len(self._moments_FF))
        return self._moments_FF + torch.diag(ridge_F)

    def _white(self, penalty: float) -> tuple[Tensor, Tensor]:
        """The root of the penalised moments, in float64, and the features that it makes white."""
        if self._whitened is None or self._whitened[0] != penalty:
            root_FF = torch.linalg.cholesky(self._penalised(penalty))
            white_TF = torch.empty_like(self._states_TF)
            for rows, part_TF in self._parts():
                white_TF[rows] = torch.linalg.solve_triangular(root_FF.T, part_TF, upper=True, left=False)
            self._whitened = penalty, root_FF, white_TF
        return self._whitened[1:]


def _features(states_TD: Tensor, bias: bool) -> Tensor:
    return torch.cat([states_TD, states_TD.new_ones(len(states_TD), 1)], dim=1) if bias else states_TD


def _centred(logits_TE: Tensor) -> Tensor:
    return logits_TE - logits_TE.mean(-1, keepdim=True)


def _unchanged(logits_TE: Tensor) -> Tensor:
    return logits_TE
