"""What goes wrong, by kind; and what must be found of each, what else may be."""

from __future__ import annotations

from typing import Final

from gradwatch import conventions as c
from gym.fault import EVERYWHERE, STRONG, WEAK, Kind
from gym.faults.checkpoints import FailingSaver, TruncatedCheckpoint
from gym.faults.data import InputShift, LabelNoise, MissingSeed, Overfitting, StarvedLoader
from gym.faults.machine import Crash, HungRank, MemoryLeak, SlowRank
from gym.faults.numbers import (
    CorruptBatch,
    DivisionInBackward,
    DivisionInForward,
    DivisionInLoss,
    HalfOverflow,
)
from gym.faults.optimisation import (
    BadInitialisation,
    LearningRateBomb,
    NoisyGradients,
    OverClipping,
    Plateau,
    SigmoidDepth,
    StaleGradients,
)

_SUPERVISED: Final = ("mlp", "cnn", "gpt", "lstm", "ddp")
_FLOATING_INPUTS: Final = ("mlp", "cnn", "lstm", "gan", "actor_critic", "ddp")
_SLOW: Final = frozenset({c.RULE_PLATEAU, c.RULE_SLOW_CONVERGENCE})
_WILD: Final = frozenset({c.RULE_GRADIENT_EXPLOSION, c.RULE_DIVERGENCE})
_LEARNING: Final = _SLOW | _WILD | {
    c.RULE_VANISHING_GRADIENT, c.RULE_NOISY_GRADIENTS, c.RULE_OVER_CLIPPING, c.RULE_OVERFITTING,
}  # fmt: skip
_ENDINGS: Final = frozenset({c.RULE_RUN_FAILED, c.RULE_RUN_LOST, c.RULE_REPEATED_FAILURE})
_NONFINITE: Final = frozenset({c.RULE_NONFINITE})
# A distribution over NaNs raises, which ends a run that acts by one.
_AFTER_NAN: Final = _WILD | _ENDINGS

# fmt: off
KINDS: Final[dict[str, Kind]] = {kind.name: kind for kind in (
    Kind(
        name="learning_rate_bomb", make=LearningRateBomb,
        expected=_WILD | _NONFINITE, companions=_LEARNING | _ENDINGS,
    ),
    Kind(
        name="bad_initialisation", make=BadInitialisation, from_start=True,
        families=("mlp", "cnn", "gpt", "gan", "ddp"),
        expected=_SLOW | _WILD, companions=_LEARNING | _NONFINITE,
    ),
    Kind(
        name="sigmoid_depth", make=SigmoidDepth, from_start=True, families=("mlp", "cnn", "ddp"),
        expected=frozenset({c.RULE_VANISHING_GRADIENT}), companions=_SLOW,
    ),
    Kind(name="division_in_forward", make=DivisionInForward, expected=_NONFINITE, companions=_AFTER_NAN),
    Kind(name="division_in_loss", make=DivisionInLoss, expected=_NONFINITE, companions=_AFTER_NAN),
    Kind(name="division_in_backward", make=DivisionInBackward, expected=_NONFINITE, companions=_AFTER_NAN),
    Kind(
        name="corrupt_batch", make=CorruptBatch, families=_FLOATING_INPUTS,
        expected=_NONFINITE, companions=_AFTER_NAN | {c.RULE_INPUT_SHIFT},
    ),
    Kind(
        name="half_overflow", make=HalfOverflow, families=("mlp", "cnn", "ddp"),
        expected=frozenset({c.RULE_LOSS_SCALE_COLLAPSE}), companions=_NONFINITE | _SLOW | _WILD,
    ),
    Kind(
        name="label_noise", make=LabelNoise, families=_SUPERVISED,
        expected=_SLOW | {c.RULE_DIVERGENCE, c.RULE_OVERFITTING}, companions=_LEARNING,
    ),
    Kind(
        # Inputs are looked at once a second.
        name="input_shift", make=InputShift, families=_FLOATING_INPUTS, pace=4.0,
        expected=frozenset({c.RULE_INPUT_SHIFT}), companions=_LEARNING,
    ),
    Kind(
        name="overfitting", make=Overfitting, from_start=True, families=("mlp", "gpt", "lstm", "ddp"),
        expected=frozenset({c.RULE_OVERFITTING}),
    ),
    Kind(
        name="missing_seed", make=MissingSeed, from_start=True,
        expected=frozenset({c.RULE_MISSING_SEED}),
    ),
    Kind(
        name="starved_loader", make=StarvedLoader, families=("mlp", "cnn", "gpt", "lstm", "gan", "ddp"),
        expected=frozenset({c.RULE_DATA_STARVATION}), companions=frozenset({c.RULE_STEP_TIME_REGRESSION}),
    ),
    Kind(
        name="over_clipping", make=OverClipping,
        expected=frozenset({c.RULE_OVER_CLIPPING}), companions=_SLOW,
    ),
    Kind(name="plateau", make=Plateau, from_start=True, families=_SUPERVISED, expected=_SLOW),
    Kind(
        name="stale_gradients", make=StaleGradients, families=("mlp", "cnn", "gpt", "lstm", "actor_critic"),
        expected=frozenset({c.RULE_STALE_GRADIENTS}), companions=_LEARNING,
    ),
    Kind(
        name="noisy_gradients", make=NoisyGradients, from_start=True, families=("mlp", "gpt", "lstm"),
        expected=frozenset({c.RULE_NOISY_GRADIENTS}), companions=_LEARNING,
    ),
    Kind(
        name="slow_rank", make=SlowRank, families=("ddp",), expected=frozenset({c.RULE_STRAGGLER}),
        companions=frozenset({c.RULE_SLOW_COLLECTIVE, c.RULE_STEP_TIME_REGRESSION}),
    ),
    Kind(
        name="hung_rank", make=HungRank, families=("ddp",), hangs=True,
        expected=frozenset({c.RULE_STALLED}),
        companions=_ENDINGS | {
            c.RULE_STRAGGLER, c.RULE_SLOW_COLLECTIVE, c.RULE_COLLECTIVE_OUTAGE, c.RULE_STEP_TIME_REGRESSION,
        },
    ),
    Kind(
        # What is asked is to see it before memory runs out: that it did is told of itself.
        name="memory_leak", make=MemoryLeak, families=("mlp", "cnn", "gpt", "lstm", "gan"), pace=4.0,
        expected=frozenset({c.RULE_MEMORY_GROWTH, c.RULE_MEMORY_HEADROOM}),
        companions=_ENDINGS | {c.RULE_OUT_OF_MEMORY, c.RULE_CHECKPOINT_FAILED},
    ),
    Kind(
        name="truncated_checkpoint", make=TruncatedCheckpoint,
        expected=frozenset({c.RULE_CHECKPOINT_CORRUPT}), companions=frozenset({c.RULE_CHECKPOINT_STALE}),
    ),
    Kind(
        name="failing_saver", make=FailingSaver,
        expected=frozenset({c.RULE_CHECKPOINT_FAILED}), companions=frozenset({c.RULE_CHECKPOINT_STALE}),
    ),
    Kind(
        name="repeated_crash", make=Crash, launches={STRONG: 3, WEAK: 1}, retries={WEAK: 2},
        expected=frozenset({c.RULE_REPEATED_FAILURE}), companions=_ENDINGS,
    ),
)}
# fmt: on

__all__ = ["EVERYWHERE", "KINDS"]
