"""What a run minimises, its objective: a weighted sum of one or several preference losses, with all their numbers.

A *loss* is one term of the sum. Users know the whole by its option, ``--loss``; logs and JSON call its value the loss.

Names, defaults and what goes with what live here, without PyTorch, so that a command line is checked before anything
heavy is imported. The equations are in ``losses.py`` and ``loss_catalogue.py``.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import DpoCacheError


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTraits:
    """What the trainer has to know about a loss besides its equation.

    Attributes:
        default_beta: Beta where none is given.
        usual_beta: Betas outside this range are warned about: they belong to a loss of the other unit.
        averages: It works on averages per token; rewards and the logged ``logps/*`` are averages too.
        uses_reference: Without a reference there are no rewards to log.
        smooths_labels: Label smoothing is defined for it.
        default_label_smoothing: Smoothing where none is given. Above 0 where the loss has no value without it.
        takes_f_divergence: It sees policy and reference through the difference Δ of the two sides alone, in which the
            normaliser of another divergence cancels.
        sorts_global_batch: A pair's loss depends on the other pairs of the global batch.
        fixed_at_reference: A policy equal to its reference has one loss, known in advance.
    """

    default_beta: float
    usual_beta: tuple[float, float] = (0.0, 1.0)
    averages: bool = False
    uses_reference: bool = True
    smooths_labels: bool = False
    default_label_smoothing: float = 0.0
    takes_f_divergence: bool = False
    sorts_global_batch: bool = False
    fixed_at_reference: bool = True


LOSS_TRAITS: dict[str, LossTraits] = {
    "dpo": LossTraits(default_beta=0.1, smooths_labels=True, takes_f_divergence=True),
    "dpo_norm": LossTraits(default_beta=5.0, usual_beta=(1.0, math.inf), averages=True, smooths_labels=True),
    "ipo": LossTraits(default_beta=0.1, averages=True),
    "ipo_sum": LossTraits(default_beta=0.1, takes_f_divergence=True),
    "hinge": LossTraits(default_beta=0.1, takes_f_divergence=True),
    "robust": LossTraits(default_beta=0.1, smooths_labels=True, takes_f_divergence=True),
    "simpo": LossTraits(
        default_beta=2.0,
        usual_beta=(1.0, math.inf),
        averages=True,
        uses_reference=False,
        smooths_labels=True,
        fixed_at_reference=False,
    ),
    "wpo": LossTraits(default_beta=0.1, smooths_labels=True, takes_f_divergence=True, fixed_at_reference=False),
    "exo_pair": LossTraits(
        default_beta=0.1, smooths_labels=True, default_label_smoothing=1e-3, takes_f_divergence=True
    ),
    "nca_pair": LossTraits(default_beta=0.01),
    "bco_pair": LossTraits(default_beta=0.1),
    "sppo_hard": LossTraits(default_beta=1e-3),
    "aot": LossTraits(default_beta=0.1, smooths_labels=True, sorts_global_batch=True),
    "aot_unpaired": LossTraits(default_beta=0.1, smooths_labels=True, sorts_global_batch=True),
    "apo_zero": LossTraits(default_beta=0.1),
    "apo_down": LossTraits(default_beta=0.1),
    "discopop": LossTraits(default_beta=0.05, takes_f_divergence=True),
}

NAMES_ELSEWHERE = {
    **{"sigmoid": "dpo", "sigmoid_norm": "dpo_norm", "rso": "hinge", "rdpo": "robust", "cdpo": "dpo"},
    **{"slic": "hinge", "bco": "bco_pair", "nca": "nca_pair", "exo": "exo_pair", "sppo": "sppo_hard"},
}
"""What other trainers call some of them."""

_NEEDS_NEW_RESPONSES = (
    "it samples responses from the policy during training, which no cache can hold",
    "train in rounds: sample new responses, build a cache of the pairs, and train again",
)
_NEEDS_NO_REFERENCE = (
    "it uses no reference, so there is nothing to cache",
    "the nearest loss here is simpo, with --nll-coef for the term that keeps the chosen response likely",
)
_RATES_SINGLE_RESPONSES = (
    "it trains on single responses that were rated, and only losses on pairs are supported",
    "for pairs, bco_pair and apo_zero also judge each response by itself",
)
_MOVES_THE_REFERENCE = (
    "it changes the reference during training, so that the cached values would no longer hold",
    "train in rounds: build a cache with the trained model as the reference, and train again",
)
LOSSES_NOT_HERE = {
    **dict.fromkeys(("kto", "kto_pair", "bco_unpaired"), _RATES_SINGLE_RESPONSES),
    "tr_dpo": _MOVES_THE_REFERENCE,
    **dict.fromkeys(("orpo", "cpo"), _NEEDS_NO_REFERENCE),
    **dict.fromkeys(("online_dpo", "ppo", "grpo", "rloo", "xpo", "nash_md"), _NEEDS_NEW_RESPONSES),
    "sft": ("it is a term beside a preference loss, not one", "use --nll-coef"),
}
"""Known losses and methods that a cache of pairs does not serve: why, and what to do instead."""

DEFAULT_GAMMA_BETA_RATIO = 0.3
DEFAULT_F_ALPHA = 0.5
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings:
    """One loss with its numbers.

    Attributes:
        name: A key of :data:`LOSS_TRAITS`.
        beta: Strength of the pull towards the reference. For losses on averages it multiplies nats per token, for
            the others nats per response, which is why no default fits all losses.
        weight: Its factor in a sum of losses.
        label_smoothing: ε, the assumed probability that a pair's label is wrong, in [0, 0.5).
        gamma_beta_ratio: The target margin of ``simpo`` divided by beta (γ/β), in nats per token.
    """

    name: str
    beta: float
    weight: float = 1.0
    label_smoothing: float = 0.0
    gamma_beta_ratio: float = DEFAULT_GAMMA_BETA_RATIO

    @property
    def traits(self) -> LossTraits:
        """What goes with this loss."""
        return LOSS_TRAITS[self.name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """The sum that a run minimises, pair by pair; make it with :func:`resolve_objective`, which checks it.

    Attributes:
        losses: The terms, at least one.
        f_divergence: One of :data:`F_DIVERGENCES`, between policy and reference.
        f_alpha: α of the ``alpha`` divergence, between 0 (the reverse KL) and 1 (the forward KL).
        ld_alpha: Weight of the tokens of the longer response that lie past the length of the shorter one; 1 is plain.
        nll_coef: Weight of the negative log-likelihood per token of the chosen response.
    """

    losses: tuple[LossSettings, ...]
    f_divergence: str = "reverse_kl"
    f_alpha: float = DEFAULT_F_ALPHA
    ld_alpha: float = 1.0
    nll_coef: float = 0.0

    @property
    def lead(self) -> LossSettings:
        """The loss whose beta and unit the logged rewards and log-probabilities have: the first with a reference."""
        return next((loss for loss in self.losses if loss.traits.uses_reference), self.losses[0])

    @property
    def uses_reference(self) -> bool:
        """Whether there are rewards to log."""
        return self.lead.traits.uses_reference

    @property
    def averages(self) -> bool:
        """Whether rewards and log-probabilities are logged per token."""
        return self.lead.traits.averages

    @property
    def sorts_global_batch(self) -> bool:
        """Whether a pair's loss depends on all pairs of its global batch."""
        return any(loss.traits.sorts_global_batch for loss in self.losses)

    @property
    def fixed_at_reference(self) -> bool:
        """Whether a policy equal to its reference has one loss, known in advance."""
        return not self.nll_coef and all(loss.traits.fixed_at_reference for loss in self.losses)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are compared when a run is resumed."""
        return {**asdict(self), "losses": [asdict(loss) for loss in self.losses]}

    def summary(self) -> str:
        """For people: ``dpo_norm, beta 5``."""
        parts = [_loss_summary(loss, alone=len(self.losses) == 1) for loss in self.losses]
        if self.f_divergence != "reverse_kl":
            alpha = f" {self.f_alpha:g}" if self.f_divergence == "alpha" else ""
            parts.append(f"f-divergence {self.f_divergence}{alpha}")
        if self.ld_alpha != 1:
            parts.append(f"LD alpha {self.ld_alpha:g}")
        if self.nll_coef:
            parts.append(f"plus {self.nll_coef:g} x NLL of the chosen response")
        return "; ".join(parts)


def _loss_summary(loss: LossSettings, *, alone: bool) -> str:
    factor = "" if alone and loss.weight == 1 else f"{loss.weight:g} x "
    smoothing = f", label smoothing {loss.label_smoothing:g}" if loss.label_smoothing else ""
    margin = f", gamma/beta {loss.gamma_beta_ratio:g}" if loss.name == "simpo" else ""
    return f"{factor}{loss.name}, beta {loss.beta:g}{margin}{smoothing}"


def resolve_objective(
    text: str,
    *,
    beta: float | None = None,
    label_smoothing: float | None = None,
    gamma_beta_ratio: float | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
    ld_alpha: float | None = None,
    nll_coef: float = 0.0,
) -> Objective:
    """Read ``--loss`` and the numbers that go with it.

    Args:
        text: ``NAME``, or a weighted sum ``NAME[:BETA][=WEIGHT],…``; weights are 1 where none is given.
        beta: Of every loss that names none of its own; each loss brings a default.
        label_smoothing: ε of all losses of the sum.
        gamma_beta_ratio: γ/β of ``simpo``.
        f_divergence: One of :data:`F_DIVERGENCES`.
        f_alpha: α of the ``alpha`` divergence.
        ld_alpha: α of LD-DPO.
        nll_coef: Weight of the NLL term.

    Raises:
        DpoCacheError: An unknown loss, a number out of range, or one that a loss of the sum has no use for.
    """
    objective = Objective(
        losses=tuple(
            _resolve_term(term, beta=beta, label_smoothing=label_smoothing, gamma_beta_ratio=gamma_beta_ratio)
            for term in text.split(",")
        ),
        f_divergence=f_divergence,
        f_alpha=DEFAULT_F_ALPHA if f_alpha is None else f_alpha,
        ld_alpha=1.0 if ld_alpha is None else ld_alpha,
        nll_coef=nll_coef,
    )
    if beta is not None and all(":" in term for term in text.split(",")):
        raise DpoCacheError(
            f"--beta has no effect with --loss {text}, which gives every loss a beta of its own",
            next_step="leave out --beta, or the betas in --loss",
        )
    names = [loss.name for loss in objective.losses]
    if gamma_beta_ratio is not None and "simpo" not in names:
        raise DpoCacheError("--gamma-beta-ratio has no effect without --loss simpo")
    _check_divergence(objective, f_alpha_given=f_alpha is not None)
    _check_ld_alpha(objective)
    if not (nll_coef >= 0 and math.isfinite(nll_coef)):
        raise DpoCacheError(f"--nll-coef is {nll_coef}", expected="0 or more")
    return objective


_TERM = re.compile(r"\s*(?P<name>[a-z_]+)\s*(:(?P<beta>[^=:]+))?(=(?P<weight>[^=:]+))?")


def _resolve_term(
    text: str, *, beta: float | None, label_smoothing: float | None, gamma_beta_ratio: float | None
) -> LossSettings:
    """One ``NAME[:BETA][=WEIGHT]``."""
    parsed = _TERM.fullmatch(text)
    name = parsed["name"] if parsed else text.strip()
    traits = LOSS_TRAITS.get(name)
    if parsed is None or traits is None:
        raise _no_such_loss(name or repr(text))
    if parsed["beta"] is not None:
        beta = _positive(parsed["beta"], f"the beta of --loss {text}")
    elif beta is None:
        beta = traits.default_beta
    if label_smoothing is None:
        label_smoothing = traits.default_label_smoothing
    elif traits.default_label_smoothing and not label_smoothing:
        raise DpoCacheError(
            f"--label-smoothing is 0, but --loss {name} is not defined without it",
            expected=f"a number above 0, such as its default {traits.default_label_smoothing:g}",
        )
    _check_label_smoothing(name, traits, label_smoothing)
    return LossSettings(
        name=name,
        beta=_positive(beta, "--beta"),
        weight=1.0 if parsed["weight"] is None else _positive(parsed["weight"], f"the weight of --loss {text}"),
        label_smoothing=label_smoothing,
        gamma_beta_ratio=DEFAULT_GAMMA_BETA_RATIO if gamma_beta_ratio is None else gamma_beta_ratio,
    )


def _no_such_loss(written: str) -> DpoCacheError:
    expected = f"one of {', '.join(LOSS_TRAITS)}, or a weighted sum such as dpo_norm=1.0,ipo:0.1=0.2"
    name = written.lower().replace("-", "_")
    if name in LOSSES_NOT_HERE:
        reason, next_step = LOSSES_NOT_HERE[name]
        return DpoCacheError(f"there is no --loss {written}: {reason}", expected=expected, next_step=next_step)
    meant = NAMES_ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, LOSS_TRAITS, n=1)), None)
    return DpoCacheError(
        f"unknown --loss {written}", expected=expected, next_step=f"did you mean {meant}?" if meant else None
    )


def _positive(value: float | str, what: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if number > 0 and math.isfinite(number):
        return number
    raise DpoCacheError(f"{what} is {value}", expected="a number above 0")


def _check_label_smoothing(name: str, traits: LossTraits, label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise DpoCacheError(
            f"--label-smoothing is {label_smoothing}",
            expected="a number from 0 up to, but not including, 0.5: at 0.5 the labels carry no information",
        )
    if label_smoothing and not traits.smooths_labels:
        raise DpoCacheError(
            f"--label-smoothing is not defined for --loss {name}",
            expected="one of " + ", ".join(key for key, known in LOSS_TRAITS.items() if known.smooths_labels),
            next_step="leave out --label-smoothing, or choose another loss",
        )


def _check_divergence(objective: Objective, *, f_alpha_given: bool) -> None:
    if objective.f_divergence not in F_DIVERGENCES:
        raise DpoCacheError(
            f"unknown --f-divergence {objective.f_divergence}", expected=f"one of {', '.join(F_DIVERGENCES)}"
        )
    if f_alpha_given and objective.f_divergence != "alpha":
        raise DpoCacheError("--f-alpha has no effect without --f-divergence alpha")
    if not 0 < objective.f_alpha < 1:
        raise DpoCacheError(
            f"--f-alpha is {objective.f_alpha}",
            expected="a number between 0 and 1; at 0 the alpha divergence is reverse_kl, at 1 forward_kl",
        )
    if objective.f_divergence == "reverse_kl":
        return
    for loss in objective.losses:
        if not loss.traits.takes_f_divergence:
            raise DpoCacheError(
                f"--f-divergence {objective.f_divergence} is not defined for --loss {loss.name}",
                expected="one of " + ", ".join(key for key, known in LOSS_TRAITS.items() if known.takes_f_divergence),
                next_step="leave out --f-divergence, or choose another loss",
            )


def _check_ld_alpha(objective: Objective) -> None:
    if not 0 <= objective.ld_alpha <= 1:
        raise DpoCacheError(f"--ld-alpha is {objective.ld_alpha}", expected="a number from 0 to 1")
    if objective.ld_alpha == 1:
        return
    for loss in objective.losses:
        if loss.traits.averages:
            raise DpoCacheError(
                f"--ld-alpha is not defined for --loss {loss.name}, which works on averages per token",
                expected="one of " + ", ".join(key for key, known in LOSS_TRAITS.items() if not known.averages),
                next_step="leave out --ld-alpha: an average per token has no length bias to correct",
            )


def beta_warnings(objective: Objective) -> list[str]:
    """A sentence for the log about each beta that looks meant for another loss."""
    return [
        _beta_warning(loss)
        for loss in objective.losses
        if not loss.traits.usual_beta[0] <= loss.beta <= loss.traits.usual_beta[1]
    ]


def _beta_warning(loss: LossSettings) -> str:
    unit = "averages per token" if loss.traits.averages else "sums over the response"
    if loss.beta < loss.traits.usual_beta[0]:
        reason = "an average is much smaller than a sum, so beta is usually 2 to 10"
    else:
        reason = "beta is usually 0.01 to 0.5"
    return (
        f"--beta {loss.beta:g} looks wrong for --loss {loss.name}, which works on {unit}: {reason} "
        f"(default {loss.traits.default_beta:g})"
    )
