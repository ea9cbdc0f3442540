"""Alerts about runs: one for each rule whose findings are told to people.

The collector has decided the severity already, from the evidence and the tier, and put evidence, likely cause
and advice in the finding; what is said here is the first thing to know and the first thing to do.
"""

from __future__ import annotations

from typing import Final

from alert import KEEP_FIRING_FOR, ML_ENGINEER, ML_SRE, PAGE, TICKET, Alert, Group, over_replicas

from gradwatch import conventions as names

# What many runs have at once is one outage, which should be told before each of them is told of.
OUTAGE_GRACE: Final = "30s"

_RUN: Final = "Run {{ $labels.run_id }} of {{ $labels.training_job }}"
_SEE: Final = " See `gradwatch runs show {{ $labels.run_id }}`."
_REASON: Final = (
    f'{{{{ with printf "{names.RUN_INFO.name}{{run_id=%q}}" $labels.run_id | query }}}}'
    ' ({{ . | first | label "reason" }}){{ end }}'
)
_OF_THE_RUN: Final = "gradwatch-debug?var-run_id={{ $labels.run_id | urlquery }}"
_OF_ALL_RUNS: Final = "gradwatch-oncall"


def _finding(
    rule: str,
    owner: str,
    summary: str,
    description: str,
    *,
    asks_for: str = TICKET,
    hold: str | None = None,
    dashboard: str = _OF_THE_RUN,
) -> Alert:
    series = f'{names.FINDING_ACTIVE.name}{{rule="{rule}", severity=~"{PAGE}|{TICKET}"}}'
    return Alert(
        name=names.RULE_ALERTS[rule],
        expr=f"{over_replicas(series)} == 1",
        summary=f"{_RUN} {summary}",
        description=description + _SEE,
        dashboard=dashboard,
        owner=owner,
        slo_severity=asks_for,
        hold=hold,
        keep_firing_for=KEEP_FIRING_FOR,
    )


# What silences others comes first: when a run dies with smaller findings open, Alertmanager hears of the death
# before it hears of them, and sends one notification.
FINDINGS: Final = Group(
    "gradwatch-runs",
    (
        _finding(
            names.RULE_RUN_FAILED,
            ML_SRE,
            "failed",
            f"The latest attempt of the run ended as failed{_REASON} and will not be retried.",
            asks_for=PAGE,
        ),
        _finding(
            names.RULE_RUN_LOST,
            ML_SRE,
            "fell silent",
            "No rank of the run has sent a sign of life within the limit, and none said it ended:"
            " killed, out of host memory, node gone or cut off.",
            asks_for=PAGE,
        ),
        _finding(
            names.RULE_TELEMETRY_OUTAGE,
            ML_SRE,
            "and many others fell silent at once",
            "At least five runs, and more than a fifth of those that were live, stopped sending"
            " within 10 s: suspect the network, a proxy or a shared host. None of them is called lost yet;"
            " leave them alone, and look at the way to the collector. The finding names them.",
            asks_for=PAGE,
            dashboard=_OF_ALL_RUNS,
        ),
        _finding(
            names.RULE_COLLECTIVE_OUTAGE,
            ML_SRE,
            "and others wait in collectives at once",
            "Collective operations of several runs stopped or slowed down together: suspect the network that"
            " they share (a switch, a link, a node), not the runs. The finding names them; look for what their"
            " hosts have in common before you restart any.",
            asks_for=PAGE,
            dashboard=_OF_ALL_RUNS,
        ),
        _finding(
            names.RULE_STALLED,
            ML_SRE,
            "hangs",
            "No step has ended for much longer than steps take, and its processes are alive: they wait for a"
            " peer, a disk or a lock, and hold their devices. The finding names the rank that the others wait"
            " for, where that is known; take stacks before you end it.",
            asks_for=PAGE,
            hold=OUTAGE_GRACE,
        ),
        _finding(
            names.RULE_CHECKPOINT_CORRUPT,
            ML_SRE,
            "has a corrupt checkpoint",
            "A checkpoint is not what its manifest says, or cannot be read: a resume from it fails or goes"
            " on from garbage. Find the last good one with `gradwatch checkpoint verify` before anything"
            " resumes, and keep it from being deleted.",
            asks_for=PAGE,
        ),
        _finding(
            names.RULE_NONFINITE,
            ML_ENGINEER,
            f'has NaN or Inf in its {{{{ if eq $labels.severity "{PAGE}" }}}}steps, repeatedly'
            "{{ else }}steps{{ end }}",
            "The loss or a gradient was not finite. If every step is bad from then on, the parameters are lost:"
            " stop the run, and resume from the last checkpoint before the first bad step. The finding has that"
            " step, the layer and where the value was born.",
            asks_for=PAGE,
        ),
        _finding(
            names.RULE_OUT_OF_MEMORY,
            ML_ENGINEER,
            "ran out of memory",
            "An allocation failed or the kernel killed a process for its memory. Started again unchanged, it"
            " fails again: lower the micro-batch first.",
        ),
        _finding(
            names.RULE_REPEATED_FAILURE,
            ML_ENGINEER,
            "failed as runs of its job did before",
            "The same failure has come again and again: a retry will not help, it costs the same hours once"
            " more. Stop retries of the job until the cause is mended.",
        ),
        _finding(
            names.RULE_GRADIENT_EXPLOSION,
            ML_ENGINEER,
            "has exploding gradients",
            "The gradient norm is far above what it was before, and NaN or divergence is likely next. Look"
            " at the step and layer of the finding: learning rate, warm-up, clipping, a bad batch.",
        ),
        _finding(
            names.RULE_VANISHING_GRADIENT,
            ML_ENGINEER,
            "has layers that hardly learn",
            "Gradients of some layers are near zero while those of others are not, and the loss is flat:"
            " part of the model does not train. The heat map shows which.",
        ),
        _finding(
            names.RULE_LOSS_SCALE_COLLAPSE,
            ML_ENGINEER,
            "skips steps: its loss scale collapses",
            "The gradient scaler halves its scale again and again, as gradients overflow in half precision:"
            " most steps update nothing. Use bfloat16, or find the layer that overflows.",
        ),
        _finding(
            names.RULE_OVER_CLIPPING,
            ML_ENGINEER,
            "clips nearly every step",
            "Clipping cuts gradients so often and so much that it sets the step size instead of the learning"
            " rate. Compare the clipping bound with the norms in the finding.",
        ),
        _finding(
            names.RULE_STALE_GRADIENTS,
            ML_ENGINEER,
            "trains on stale gradients",
            "Gradients that are applied were computed on parameters many versions old: convergence suffers."
            " Bound the staleness, or slow down for the slowest worker.",
        ),
        _finding(
            names.RULE_DIVERGENCE,
            ML_ENGINEER,
            "diverges",
            "The loss rises and does not come back: further steps only cost. Stop it, and go back to the"
            " checkpoint before the rise with a lower learning rate.",
        ),
        _finding(
            names.RULE_PLATEAU,
            ML_ENGINEER,
            "does not improve",
            "The loss has stayed where it was for long. Decide whether to change the learning rate or to stop:"
            " further steps cost and gain nothing.",
        ),
        _finding(
            names.RULE_SLOW_CONVERGENCE,
            ML_ENGINEER,
            "converges more slowly than runs before it",
            "At the same step the loss is well above that of earlier good runs, or the target will not be"
            " reached in time. `gradwatch runs compare {{ $labels.run_id }}` says what was changed since.",
        ),
        _finding(
            names.RULE_OVERFITTING,
            ML_ENGINEER,
            "overfits",
            "The validation metric gets worse while the training loss still falls: the best checkpoint lies"
            " behind. Keep that one, and stop or regularise.",
        ),
        _finding(
            names.RULE_INPUT_SHIFT,
            ML_ENGINEER,
            "gets other inputs than before",
            "Mean or spread of a model input are suddenly not what they were: a changed source, a broken"
            " transform, another order of the data. What it learns now is of the new data.",
        ),
        _finding(
            names.RULE_RUN_VARIANCE,
            ML_ENGINEER,
            "and its like differ too much",
            "Runs with the same configuration end with final metrics that are far apart: a single one of"
            " them proves nothing. Set seeds, and compare several.",
        ),
        _finding(
            names.RULE_MEMORY_HEADROOM,
            ML_ENGINEER,
            "is close to running out of memory",
            "The peak of the run's tightest device (of the host, for a run without devices) leaves"
            " little below the limit.",
        ),
        _finding(
            names.RULE_MEMORY_GROWTH,
            ML_ENGINEER,
            "leaks memory",
            "Memory in use grows steadily, and reaches the limit at the time that the finding tells."
            " Something is kept from step to step; save a checkpoint before then.",
        ),
        _finding(
            names.RULE_SLOW_COLLECTIVE,
            ML_SRE,
            "has slow collectives",
            "Collective operations take much longer than they did, and every rank waits for them. Look for"
            " the link or the rank that is slow.",
            hold=OUTAGE_GRACE,
        ),
        _finding(
            names.RULE_STRAGGLER,
            ML_SRE,
            "waits for a slow rank",
            "One rank takes longer over its own work than the others, in every step: they all pay for it. The"
            " finding names it; look at its host and device.",
            hold=OUTAGE_GRACE,
        ),
        _finding(
            names.RULE_CHECKPOINT_FAILED,
            ML_SRE,
            "could not save a checkpoint",
            "Saving raised an error; the checkpoint before is as it was. Until one succeeds, a crash costs"
            " all work since then. Disk full, permissions and quota are the usual causes.",
        ),
        _finding(
            names.RULE_CHECKPOINT_STALE,
            ML_SRE,
            "has saved no checkpoint for too long",
            "A crash now would cost all work since the last good checkpoint, whose age is in the finding."
            " Find out why saving stopped, or save one now.",
        ),
        _finding(
            names.RULE_DATA_STARVATION,
            ML_ENGINEER,
            "waits for its data",
            "A large part of each step is spent waiting for data loaders, and devices idle meanwhile. More"
            " workers, a faster source, or less work in the transforms.",
        ),
        _finding(
            names.RULE_STEP_TIME_REGRESSION,
            ML_SRE,
            "takes longer over a step than runs before it",
            "Steps take longer than those of earlier runs with the same job, model and data set, and"
            " versions of libraries or drivers differ. `gradwatch runs compare {{ $labels.run_id }}` lists"
            " what does.",
        ),
        _finding(
            names.RULE_SWEEP_COST,
            ML_ENGINEER,
            "is one of many that get expensive",
            "Runs of this job took several times as many device-hours within a day as they usually do, or"
            " each of their steps costs more. See whether a sweep grew or was started twice, and end what"
            " nobody waits for.",
        ),
        _finding(
            names.RULE_MISSING_INSTRUMENTATION,
            ML_ENGINEER,
            "cannot be watched properly",
            "The loop does something that the agent cannot see, so that silence about this run does not mean"
            " health. The reason is in the finding.",
        ),
    ),
)
