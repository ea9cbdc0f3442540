"""Every name gradwatch puts on a wire, once: attributes, metrics, events, Prometheus families.

The agent, the collector, the alert rules and the dashboards all take their names from here, and
``docs/telemetry.md`` is checked against it. OpenTelemetry's own names are used where they exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

SCOPE_NAME: Final = "gradwatch"

# --- Resource attributes: who is speaking --------------------------------------------------------------

SERVICE_NAME: Final = "service.name"
SERVICE_INSTANCE_ID: Final = "service.instance.id"
RUN_ID: Final = "training.run.id"
RUN_ATTEMPT: Final = "training.run.attempt"
RANK: Final = "training.rank"
WORLD_SIZE: Final = "training.world_size"
MODEL: Final = "training.model"
DATASET: Final = "training.dataset"
TEAM: Final = "training.team"
TIER: Final = "training.tier"
TARGET: Final = "training.target"
DEADLINE: Final = "training.deadline"
SEED: Final = "training.seed"
DETERMINISTIC: Final = "training.deterministic"
GIT_COMMIT: Final = "vcs.ref.head.revision"
TORCH_VERSION: Final = "training.torch.version"
CUDA_VERSION: Final = "training.cuda.version"
DEVICE_NAME: Final = "training.device.name"
PYTHON_VERSION: Final = "process.runtime.version"
CONFIG_HASH: Final = "training.config.hash"
HOST_NAME: Final = "host.name"
PROCESS_PID: Final = "process.pid"
PARENT_PID: Final = "process.parent_pid"
PROCESS_COMMAND: Final = "process.command"
SUPERVISOR: Final = "training.supervisor"
SUPERVISOR_INSTANCE: Final = "gradwatch.supervisor.instance"

# What the collector's keys hold: characters of run, job and instance; the highest attempt and rank.
MAX_IDENTITY: Final = 256
MAX_INT32: Final = 2**31 - 1

RESOURCE_ATTRIBUTES: Final[dict[str, str]] = {
    SERVICE_NAME: "The job. Becomes the Prometheus label `training_job`.",
    SERVICE_INSTANCE_ID: "Unique per process.",
    RUN_ID: "The run; all ranks and attempts of a run share it.",
    RUN_ATTEMPT: "1-based attempt, when the caller or the launcher knows it.",
    RANK: "Global 0-based rank.",
    WORLD_SIZE: "Number of ranks.",
    MODEL: "Name of the model; the class name of the first watched module unless told.",
    DATASET: "Name of the data set, when told.",
    TEAM: "Owning team, when told.",
    TIER: "`production` or `experiment` (the default).",
    TARGET: "The run's target, such as `val_loss<=0.5`, when told.",
    DEADLINE: "Seconds from the start within which the target should hold, when told.",
    SEED: "`torch.initial_seed()` at the start.",
    DETERMINISTIC: "Whether torch is held to deterministic algorithms at the start.",
    GIT_COMMIT: "Commit of the working directory, when it is a git checkout.",
    TORCH_VERSION: "Version of torch.",
    CUDA_VERSION: "CUDA version torch was built for.",
    DEVICE_NAME: "Name of the device, such as `NVIDIA H200`; absent unless CUDA is in use at the start.",
    PYTHON_VERSION: "Version of Python.",
    CONFIG_HASH: "Hash of the hyper-parameters, when told.",
    HOST_NAME: "Host.",
    PROCESS_PID: "Process id.",
    PARENT_PID: "Process id of the parent.",
    PROCESS_COMMAND: "The script or module that is running, without its arguments.",
    SUPERVISOR: "True for `gradwatch run`, which sees an attempt's processes from outside; it is no rank.",
    SUPERVISOR_INSTANCE: "`service.instance.id` of the `gradwatch run` that the process was started under.",
}

TIER_PRODUCTION: Final = "production"
TIER_EXPERIMENT: Final = "experiment"

# --- Attributes of data points and events --------------------------------------------------------------

LAYER_NAME: Final = "training.layer.name"
OPTIMIZER: Final = "training.optimizer"
PARAM_GROUP: Final = "training.param_group"
DEVICE: Final = "training.device"
METRIC_NAME: Final = "training.metric.name"
EVENT_SEQUENCE: Final = "training.event.sequence"
STEP: Final = "training.step"
STATUS: Final = "training.run.status"
REASON: Final = "training.run.reason"
EXIT_CODE: Final = "process.exit.code"
EVIDENCE: Final = "training.run.evidence"
WILL_RETRY: Final = "training.run.will_retry"
STACKS: Final = "training.stacks"
EXCEPTION_TYPE: Final = "exception.type"
EXCEPTION_MESSAGE: Final = "exception.message"
BORN_IN: Final = "training.nonfinite.born_in"
NONFINITE_EARLIEST: Final = "training.nonfinite.earliest"
NONFINITE_LATEST: Final = "training.nonfinite.latest"
NONFINITE_STEPS: Final = "training.nonfinite.steps"
NONFINITE_ELEMENTS: Final = "training.nonfinite.elements"
NONFINITE_LAYERS: Final = "training.nonfinite.layers"
LOSS_VALUE: Final = "training.loss.value"
TARGET_VALUE: Final = "training.target.value"
PHASE: Final = "training.phase"
COLLECTIVE: Final = "training.collective.operation"
INPUT_NAME: Final = "training.input.name"
MISSING_REASON: Final = "training.instrumentation.reason"
FLIGHT_TRIGGER: Final = "training.flight_record.trigger"
FLIGHT_STEPS: Final = "training.flight_record.steps"
FLIGHT_DATA: Final = "training.flight_record.data"
BUNDLE_PATH: Final = "training.bundle.path"
OOM_DURING: Final = "training.oom.during"
OOM_REQUESTED: Final = "training.oom.requested"
CHECKPOINT_NAME: Final = "training.checkpoint.name"
CHECKPOINT_SIZE: Final = "training.checkpoint.size"
CHECKPOINT_DURATION: Final = "training.checkpoint.duration"
CHECKPOINT_FAULT: Final = "training.checkpoint.fault"

ATTRIBUTES: Final[dict[str, str]] = {
    LAYER_NAME: "Qualified name of the parameter (or path of the module), without wrappers' parts.",
    OPTIMIZER: "Index of the optimizer among the watched ones, when there is more than one.",
    PARAM_GROUP: "Index of the optimizer's parameter group, when there is more than one.",
    DEVICE: "Device, such as `cuda:0`.",
    METRIC_NAME: "Name given to `watch.log(name=value)`.",
    EVENT_SEQUENCE: "Counts the events of a process from 0; part of an event's key.",
    STEP: "0-based optimizer step the event belongs to; for heartbeats and endings the last that ended, for "
    "checkpoints the one to go on with.",
    STATUS: "`succeeded`, `failed` or `cancelled`.",
    REASON: "Why the run ended so: exception type, `exit 3`, `SIGTERM`, `interrupted`.",
    EXIT_CODE: "Exit code, when known.",
    EVIDENCE: "What the supervisor goes by, in one line, such as `the kernel killed 1 process of its cgroup`.",
    WILL_RETRY: "True where the supervisor or torchrun will start again: the attempt is over, the run is not.",
    STACKS: "The stack of every thread, innermost frame last, at most 64 KiB.",
    EXCEPTION_TYPE: "Qualified class name of the exception.",
    EXCEPTION_MESSAGE: "First line of the exception's message, at most 200 characters.",
    BORN_IN: "Where a non-finite value was born, absent when not known: `input`, `forward`, `loss`, "
    "`backward`, `optimizer`, `parameters`.",
    NONFINITE_EARLIEST: "First step in which it may have come; only where the step is not known.",
    NONFINITE_LATEST: "Last step in which it may have come; only where the step is not known.",
    NONFINITE_STEPS: "Non-finite steps of this process so far, this one included.",
    NONFINITE_ELEMENTS: "Non-finite gradient elements in the step; absent where they were not counted.",
    NONFINITE_LAYERS: "Number of parameters with a non-finite gradient in the step.",
    LOSS_VALUE: "The loss of the step, `NaN` and `Infinity` included.",
    TARGET_VALUE: "The value that reached the target.",
    PHASE: "Part of a step: `forward`, `backward`, `optimizer`.",
    COLLECTIVE: "Collective operation, such as `all_reduce`.",
    INPUT_NAME: "Place of an input among the model's arguments, such as `0` or `pixel_values`.",
    MISSING_REASON: "Why a loop cannot be seen properly, in one line.",
    FLIGHT_TRIGGER: "Why the black box was sent: `nonfinite`, `exception`, `oom`, `stalled`, `SIGTERM`.",
    FLIGHT_STEPS: "Number of steps in the black box.",
    FLIGHT_DATA: "The black box: per-layer values of the last steps, zlib-compressed JSON, as bytes.",
    BUNDLE_PATH: "Where the reproduction bundle of a failing step was written.",
    OOM_DURING: "What was being done when memory ran out: `forward`, `backward`, `optimizer`, when known.",
    OOM_REQUESTED: "Bytes that were asked for when memory ran out, when known.",
    CHECKPOINT_NAME: "Name of the checkpoint's file or folder, with the folder it is in.",
    CHECKPOINT_SIZE: "Bytes of all files of the checkpoint.",
    CHECKPOINT_DURATION: "Seconds that saving took, until everything was on disk.",
    CHECKPOINT_FAULT: "What is wrong with a checkpoint, in one line that begins with `missing`, `truncated`, "
    "`altered` or `unloadable`.",
}

# What `training.nonfinite.born_in` and a finding's `born_in` may say.
BIRTHPLACES: Final = ("input", "forward", "loss", "backward", "optimizer", "parameters")

# --- Metrics (OTLP) ------------------------------------------------------------------------------------

MetricKind = Literal["gauge", "sum", "exponential_histogram"]

# OpenTelemetry's unit codes (UCUM) and the words that Prometheus names carry for them.
_UNIT_WORDS: Final = {"s": "seconds", "By": "bytes", "W": "watts", "1": "ratio"}


@dataclass(frozen=True, slots=True)
class Metric:
    """One OTLP metric: its name, UCUM unit, kind, meaning and the attributes of its points."""

    name: str
    unit: str
    kind: MetricKind
    description: str
    attributes: tuple[str, ...] = ()

    @property
    def prometheus_name(self) -> str:
        """Name on ``/metrics``: dots to underscores, unit word, ``_total`` for sums."""
        name = self.name.replace(".", "_")
        word = _UNIT_WORDS.get(self.unit)
        if word and not name.endswith(f"_{word}"):
            name = f"{name}_{word}"
        return f"{name}_total" if self.kind == "sum" else name


# fmt: off
LOSS: Final = Metric(
    "training.loss", "{loss}", "gauge",
    "Loss of the step: unscaled, summed over the micro-batches that were backpropagated; "
    "`watch.log(loss=...)` wins.", (OPTIMIZER,),
)
LEARNING_RATE: Final = Metric(
    "training.learning_rate", "{learning_rate}", "gauge", "Learning rate of the step.",
    (OPTIMIZER, PARAM_GROUP),
)
STEP_INDEX: Final = Metric("training.step", "{step}", "gauge", "0-based index of the optimizer step.")
GRADIENT_NORM: Final = Metric(
    "training.gradient.norm", "{norm}", "gauge",
    "L2 norm over all gradients of the step, before clipping; only steps that were observed.", (OPTIMIZER,),
)
LAYER_GRADIENT_NORM: Final = Metric(
    "training.layer.gradient.norm", "{norm}", "exponential_histogram",
    "L2 norm of a parameter's gradient over the observed steps of the interval (delta, scale 3, "
    "zero threshold 0).", (LAYER_NAME, OPTIMIZER),
)
CLIP_RATIO: Final = Metric(
    "training.gradient.clip.ratio", "1", "gauge",
    "What clipping multiplied the gradients with: 1 where the norm was within the bound. Steps that clip.",
    (OPTIMIZER,),
)
OBSERVED_STEPS: Final = Metric(
    "training.gradient.observed", "{step}", "sum",
    "Steps of the interval whose gradients were read (delta); the others appear in per-step scalars only.",
    (OPTIMIZER,),
)
GRADIENT_SHARD_SQUARE: Final = Metric(
    "training.gradient.shard.square", "{norm}", "gauge",
    "Squared L2 norm of this rank's share of sharded gradients, replicas counted once: the sum over ranks is "
    "the squared global norm. Observed steps.", (OPTIMIZER,),
)
LAYER_GRADIENT_SHARD_SQUARE: Final = Metric(
    "training.layer.gradient.shard.square", "{norm}", "gauge",
    "The same of one parameter.", (LAYER_NAME, OPTIMIZER),
)
LOCAL_GRADIENT_NORM: Final = Metric(
    "training.gradient.local.norm", "{norm}", "gauge",
    "Under data parallelism, the L2 norm over this rank's own gradients before they are averaged.",
    (OPTIMIZER,),
)
UPDATE_RATIO: Final = Metric(
    "training.update.ratio", "1", "gauge",
    "Norm of a step's update of a parameter over the norm that it had before, at a slow cadence.",
    (LAYER_NAME, OPTIMIZER),
)
WEIGHT_NORM: Final = Metric(
    "training.layer.weight.norm", "{norm}", "gauge",
    "L2 norm of a parameter before the step's update, at a slow cadence.",
    (LAYER_NAME, OPTIMIZER),
)
LOSS_SCALE: Final = Metric(
    "training.loss_scale", "1", "gauge", "Loss scale of mixed precision in the step.", (OPTIMIZER,)
)
SKIPPED_STEPS: Final = Metric(
    "training.step.skipped", "{step}", "sum",
    "Steps that the loss scaler skipped: transient overflow, no finding (delta).",
)
DATA_WAIT: Final = Metric(
    "training.data.wait", "s", "gauge", "Time of the step that training waited for its data loaders."
)
PHASE_DURATION: Final = Metric(
    "training.phase.duration", "s", "gauge",
    "Time of a part of ten steps a second; on a device from its own events. `optimizer`: of observed steps.",
    (PHASE,),
)
COLLECTIVE_DURATION: Final = Metric(
    "training.collective.duration", "s", "exponential_histogram",
    "Time of collective operations in the interval (delta, scale 3).", (COLLECTIVE,),
)
INPUT_MEAN: Final = Metric(
    "training.input.mean", "1", "gauge", "Mean of a floating input of the model, once a second.",
    (INPUT_NAME,),
)
INPUT_STDDEV: Final = Metric(
    "training.input.stddev", "1", "gauge", "Standard deviation of a floating input, once a second.",
    (INPUT_NAME,),
)
INPUT_NONFINITE: Final = Metric(
    "training.input.nonfinite", "1", "gauge", "Share of a floating input that is NaN or Inf.", (INPUT_NAME,),
)
NONFINITE: Final = Metric(
    "training.gradient.nonfinite", "{step}", "sum",
    "Steps with a non-finite loss or gradient (delta).",
)
STEP_DURATION: Final = Metric(
    "training.step.duration", "s", "gauge", "From the end of one optimizer step to the end of the next.",
)
LOGGED: Final = Metric(
    "training.metric", "{value}", "gauge", "Any other number given to `watch.log(name=value)`.",
    (METRIC_NAME,),
)
DEVICE_MEMORY_ALLOCATED: Final = Metric(
    "training.device.memory.allocated", "By", "gauge", "Held by tensors, from torch's allocator.", (DEVICE,)
)
DEVICE_MEMORY_RESERVED: Final = Metric(
    "training.device.memory.reserved", "By", "gauge", "Held by torch's caching allocator.", (DEVICE,)
)
DEVICE_MEMORY_PEAK: Final = Metric(
    "training.device.memory.peak", "By", "gauge", "Peak reserved since the start of the process.", (DEVICE,)
)
DEVICE_MEMORY_LIMIT: Final = Metric(
    "training.device.memory.limit", "By", "gauge", "Memory of the device.", (DEVICE,)
)
DEVICE_MEMORY_FRAGMENTATION: Final = Metric(
    "training.device.memory.fragmentation", "1", "gauge",
    "(reserved - allocated) / reserved of torch's caching allocator.", (DEVICE,),
)
DEVICE_MEMORY_HEADROOM: Final = Metric(
    "training.device.memory.headroom", "1", "gauge",
    "(limit - peak) / limit; of the host and the process where there is no device.", (DEVICE,),
)
HW_GPU_UTILIZATION: Final = Metric(
    "hw.gpu.utilization", "1", "gauge", "Share of time in which a kernel ran, from NVML.", (DEVICE,)
)
HW_GPU_MEMORY_USAGE: Final = Metric(
    "hw.gpu.memory.usage", "By", "gauge", "Memory in use by all processes, from NVML.", (DEVICE,)
)
HW_GPU_MEMORY_LIMIT: Final = Metric(
    "hw.gpu.memory.limit", "By", "gauge", "Total memory, from NVML.", (DEVICE,)
)
HW_POWER: Final = Metric("hw.power", "W", "gauge", "Power draw, from NVML.", (DEVICE,))
HW_TEMPERATURE: Final = Metric("hw.temperature", "Cel", "gauge", "Temperature, from NVML.", (DEVICE,))
PROCESS_MEMORY: Final = Metric("process.memory.usage", "By", "gauge", "Resident memory of the process.")
HOST_MEMORY_LIMIT: Final = Metric(
    "training.host.memory.limit", "By", "gauge", "Memory of the host, or of the process's cgroup if lower."
)
AGENT_OVERHEAD: Final = Metric(
    "gradwatch.agent.overhead", "1", "gauge",
    "Share of step time that gradwatch spent on the training thread over the interval.",
)
AGENT_DROPPED: Final = Metric(
    "gradwatch.agent.dropped", "{item}", "sum",
    "Events and samples the agent could not deliver and gave up (delta).",
)

METRICS: Final[tuple[Metric, ...]] = (
    LOSS, LEARNING_RATE, STEP_INDEX, GRADIENT_NORM, LAYER_GRADIENT_NORM, CLIP_RATIO, OBSERVED_STEPS,
    GRADIENT_SHARD_SQUARE, LAYER_GRADIENT_SHARD_SQUARE, LOCAL_GRADIENT_NORM, UPDATE_RATIO, WEIGHT_NORM,
    NONFINITE, LOSS_SCALE, SKIPPED_STEPS, STEP_DURATION, DATA_WAIT, PHASE_DURATION, COLLECTIVE_DURATION, LOGGED,
    INPUT_MEAN, INPUT_STDDEV, INPUT_NONFINITE,
    DEVICE_MEMORY_ALLOCATED, DEVICE_MEMORY_RESERVED, DEVICE_MEMORY_PEAK, DEVICE_MEMORY_LIMIT,
    DEVICE_MEMORY_FRAGMENTATION, DEVICE_MEMORY_HEADROOM,
    HW_GPU_UTILIZATION, HW_GPU_MEMORY_USAGE, HW_GPU_MEMORY_LIMIT, HW_POWER, HW_TEMPERATURE,
    PROCESS_MEMORY, HOST_MEMORY_LIMIT, AGENT_OVERHEAD, AGENT_DROPPED,
)

# fmt: on

EXPONENTIAL_HISTOGRAM_SCALE: Final = 3

# What `training.collective.operation` says of DDP's own figures: of a backward's communication, and of the part
# of it that computation did not hide.
DDP_ALL_REDUCE: Final = "ddp_all_reduce"
DDP_EXPOSED: Final = "ddp_all_reduce_exposed"

# What a loop that applies gradients of other workers tells by `watch.log(gradient_staleness=N)`: by how many
# updates the parameters are newer than those that the gradients were computed from.
GRADIENT_STALENESS: Final = "gradient_staleness"

# --- Events (log records with an event name) -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its name, meaning and attributes."""

    name: str
    description: str
    attributes: tuple[str, ...] = ()


# fmt: off
RUN_STARTED: Final = Event("training.run.started", "The process began to watch.", (EVENT_SEQUENCE,))
RUN_HEARTBEAT: Final = Event(
    "training.run.heartbeat", "Sign of life, every 5 s by default; updates the run and is not stored.",
    (EVENT_SEQUENCE, STEP),
)
RUN_ENDED: Final = Event(
    "training.run.ended", "The process is about to end, and why.",
    (
        EVENT_SEQUENCE, STEP, STATUS, REASON, EXIT_CODE, EXCEPTION_TYPE, EXCEPTION_MESSAGE, EVIDENCE,
        WILL_RETRY,
    ),
)
STALLED: Final = Event(
    "training.stalled", "No step has ended for much longer than steps take; training may still go on.",
    (EVENT_SEQUENCE, STEP, STACKS),
)
NONFINITE_STEP: Final = Event(
    "training.nonfinite", "A step with a non-finite loss or gradient: each of the first ten, then 100, 1000...",
    (
        EVENT_SEQUENCE, STEP, NONFINITE_EARLIEST, NONFINITE_LATEST, LAYER_NAME, BORN_IN, NONFINITE_STEPS,
        NONFINITE_ELEMENTS, NONFINITE_LAYERS, LOSS_VALUE,
    ),
)
TARGET_REACHED: Final = Event(
    "training.target.reached", "The target held for the first time.",
    (EVENT_SEQUENCE, STEP, TARGET, TARGET_VALUE),
)
INSTRUMENTATION_MISSING: Final = Event(
    "training.instrumentation.missing", "A loop that cannot be seen properly; nothing false is reported of it.",
    (EVENT_SEQUENCE, STEP, MISSING_REASON),
)
FLIGHT_RECORD: Final = Event(
    "training.flight_record", "The black box: every per-layer value of the last steps.",
    (EVENT_SEQUENCE, STEP, FLIGHT_TRIGGER, FLIGHT_STEPS, FLIGHT_DATA),
)
BUNDLE_SAVED: Final = Event(
    "training.bundle.saved", "A reproduction bundle of a failing step was written on the host.",
    (EVENT_SEQUENCE, STEP, BUNDLE_PATH),
)
OUT_OF_MEMORY: Final = Event(
    "training.oom", "Memory ran out; training may have recovered.",
    (EVENT_SEQUENCE, STEP, DEVICE, OOM_DURING, OOM_REQUESTED),
)
CHECKPOINT_SAVED: Final = Event(
    "training.checkpoint.saved", "A checkpoint is complete, on disk, and its checksums are written down.",
    (EVENT_SEQUENCE, STEP, CHECKPOINT_NAME, CHECKPOINT_SIZE, CHECKPOINT_DURATION),
)
CHECKPOINT_FAILED: Final = Event(
    "training.checkpoint.failed", "A checkpoint could not be saved; the one before is as it was.",
    (EVENT_SEQUENCE, STEP, CHECKPOINT_NAME, CHECKPOINT_DURATION, EXCEPTION_TYPE, EXCEPTION_MESSAGE),
)
CHECKPOINT_VERIFIED: Final = Event(
    "training.checkpoint.verified", "Every byte of a checkpoint was read again, and is what was saved.",
    (EVENT_SEQUENCE, STEP, CHECKPOINT_NAME, CHECKPOINT_SIZE),
)
CHECKPOINT_CORRUPT: Final = Event(
    "training.checkpoint.corrupt", "A checkpoint was read again, and is not what was saved.",
    (EVENT_SEQUENCE, STEP, CHECKPOINT_NAME, CHECKPOINT_SIZE, CHECKPOINT_FAULT),
)

EVENTS: Final[tuple[Event, ...]] = (
    RUN_STARTED, RUN_HEARTBEAT, RUN_ENDED, STALLED, NONFINITE_STEP, TARGET_REACHED,
    INSTRUMENTATION_MISSING, FLIGHT_RECORD, BUNDLE_SAVED, OUT_OF_MEMORY, CHECKPOINT_SAVED, CHECKPOINT_FAILED,
    CHECKPOINT_VERIFIED, CHECKPOINT_CORRUPT,
)

# fmt: on

RUN_EVENT_PREFIX: Final = "training.run."

# --- Prometheus: the collector's /metrics --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Family:
    """One Prometheus metric family on the collector's ``/metrics``."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    description: str
    labels: tuple[str, ...] = ()


# fmt: off
# `training_job` and never `job`: Prometheus owns `job` and `instance` as scrape labels.
JOB_LABELS: Final = ("training_job", "model", "dataset", "team", "tier")
RUN_LABELS: Final = ("run_id", *JOB_LABELS)
# What a scrape adds, and all that differs between replicas of the collector on one database.
REPLICA_LABELS: Final = ("instance", "job", "pod")

RUN_INFO: Final = Family(
    "gradwatch_run_info", "gauge",
    "1 for every run that is live, or failed or was lost within the last hour.",
    (*RUN_LABELS, "status", "reason", "host"),
)
RUN_STARTED_TIMESTAMP: Final = Family(
    "gradwatch_run_started_timestamp_seconds", "gauge", "When the run started (Unix time).", RUN_LABELS
)
RUN_LAST_SEEN_TIMESTAMP: Final = Family(
    "gradwatch_run_last_seen_timestamp_seconds", "gauge", "Last sign of life of the run (Unix time).",
    RUN_LABELS,
)
RUN_MEMORY_HEADROOM: Final = Family(
    "gradwatch_run_memory_headroom_ratio", "gauge",
    "(limit - peak) / limit of the tightest device of the run; of the host for a run without devices.",
    RUN_LABELS,
)
RUNS_LIVE: Final = Family("gradwatch_runs_live", "gauge", "Runs that are running now.", JOB_LABELS)
RUNS_ENDED: Final = Family(
    "gradwatch_runs_ended_total", "counter", "Runs ended since the collector started, by status.",
    (*JOB_LABELS, "status"),
)
TIME_TO_TARGET: Final = Family(
    "gradwatch_time_to_target_seconds", "gauge",
    "Median time from start to target over the job's last 20 runs that reached it.", JOB_LABELS,
)
LAST_METRIC: Final = Family(
    "gradwatch_last_metric", "gauge", "Last value of a logged metric over the job's runs.",
    (*JOB_LABELS, "name"),
)
FINDING_ACTIVE: Final = Family(
    "gradwatch_finding_active", "gauge", "1 while a finding is open.",
    ("run_id", "rule", "severity", "team", "tier", "training_job"),
)
FINDINGS_OPENED: Final = Family(
    "gradwatch_findings_opened_total", "counter", "Findings opened since the collector started.",
    (*JOB_LABELS, "rule"),
)

SLO_LABELS: Final = ("slo", "training_job", "model", "dataset", "team", "tier")
SLO_VERDICT: Final = Family(
    "gradwatch_slo_verdict", "gauge", "1 for the objective's current verdict, 0 for the others.",
    (*SLO_LABELS, "verdict"),
)
SLO_SLI: Final = Family(
    "gradwatch_slo_sli_ratio", "gauge",
    "Good / counted events in the window; with `RatioTimeslices` the mean of its time slices.", SLO_LABELS,
)
SLO_TARGET: Final = Family("gradwatch_slo_target_ratio", "gauge", "The objective's target.", SLO_LABELS)
SLO_BUDGET_REMAINING: Final = Family(
    "gradwatch_slo_budget_remaining_ratio", "gauge",
    "1 - bad / (n (1 - target)); may be negative. With `RatioTimeslices` of time slices.", SLO_LABELS,
)
SLO_EVENTS: Final = Family(
    "gradwatch_slo_events", "gauge",
    "What the p-value is of: counted events in the window, by quality (`good`, `bad`). With `Timeslices` these"
    " are time slices, with `RatioTimeslices` what was counted in them.",
    (*SLO_LABELS, "quality"),
)
SLO_P_VALUE: Final = Family(
    "gradwatch_slo_p_value", "gauge",
    "Exact binomial P(X >= bad | n, 1 - target): how surprising the window would be if the target held.",
    SLO_LABELS,
)
SLO_BURN_RATE: Final = Family(
    "gradwatch_slo_burn_rate_ratio", "gauge",
    "Error rate over the look-back `window` (`5m`, `1h`, `3d`, ...) divided by the error budget's, 1 - target.",
    (*SLO_LABELS, "window"),
)

COLLECTOR_RECEIVED: Final = Family(
    "gradwatch_collector_received_total", "counter", "Items received over OTLP, by signal.", ("signal",)
)
COLLECTOR_COMMITTED: Final = Family(
    "gradwatch_collector_committed_total", "counter", "Items committed to the database, by signal.", ("signal",)
)
COLLECTOR_REJECTED: Final = Family(
    "gradwatch_collector_rejected_total", "counter",
    "Requests refused, by reason; one for a path or a method that is not served is `unsupported`.",
    ("reason",),
)
COLLECTOR_REJECTED_ITEMS: Final = Family(
    "gradwatch_collector_rejected_items_total", "counter",
    "Items of accepted requests that could not be stored (partial success), by signal.", ("signal",),
)
COLLECTOR_COMMIT_DURATION: Final = Family(
    "gradwatch_collector_commit_duration_seconds", "histogram", "Time of one group commit."
)
COLLECTOR_QUEUE_DEPTH: Final = Family(
    "gradwatch_collector_queue_depth", "gauge", "Requests waiting for a commit."
)
COLLECTOR_QUEUE_BYTES: Final = Family(
    "gradwatch_collector_queue_bytes", "gauge",
    "What requests hold that arrive or wait for a commit; many small parts count for more than their bytes.",
)
COLLECTOR_QUEUE_LIMIT: Final = Family(
    "gradwatch_collector_queue_limit_bytes", "gauge",
    "What requests may hold together; further ones are put off.",
)
COLLECTOR_CONNECTIONS: Final = Family(
    "gradwatch_collector_connections", "gauge", "Open HTTP connections."
)
COLLECTOR_DATABASE_CONNECTIONS: Final = Family(
    "gradwatch_collector_database_connections", "gauge", "Connections to the database that are in use."
)
COLLECTOR_DATABASE_SIZE: Final = Family(
    "gradwatch_collector_database_size_bytes", "gauge", "Size of the database, a few seconds ago."
)
COLLECTOR_EVALUATED_TIMESTAMP: Final = Family(
    "gradwatch_collector_evaluated_timestamp_seconds", "gauge",
    "When runs, findings and objectives were last evaluated (Unix time).",
)

# The OTLP gauges that `/metrics` repeats for live runs, latest value, highest over ranks and devices.
RUN_GAUGES: Final[tuple[Metric, ...]] = (
    LOSS, LEARNING_RATE, STEP_INDEX, GRADIENT_NORM, STEP_DURATION, NONFINITE,
    DEVICE_MEMORY_ALLOCATED, DEVICE_MEMORY_PEAK, DEVICE_MEMORY_LIMIT, HW_GPU_UTILIZATION,
    PROCESS_MEMORY, HOST_MEMORY_LIMIT, AGENT_OVERHEAD,
)

def family_of(metric: Metric) -> Family:
    """Return the per-run family that repeats an OTLP metric on ``/metrics``."""
    kind: Literal["gauge", "counter"] = "counter" if metric.kind == "sum" else "gauge"
    return Family(metric.prometheus_name, kind, metric.description, RUN_LABELS)


FAMILIES: Final[tuple[Family, ...]] = (
    *map(family_of, RUN_GAUGES),
    RUN_INFO, RUN_STARTED_TIMESTAMP, RUN_LAST_SEEN_TIMESTAMP, RUN_MEMORY_HEADROOM, RUNS_LIVE, RUNS_ENDED,
    TIME_TO_TARGET, LAST_METRIC, FINDING_ACTIVE, FINDINGS_OPENED,
    SLO_VERDICT, SLO_SLI, SLO_TARGET, SLO_BUDGET_REMAINING, SLO_EVENTS, SLO_P_VALUE,
    SLO_BURN_RATE,
    COLLECTOR_RECEIVED, COLLECTOR_COMMITTED, COLLECTOR_REJECTED, COLLECTOR_REJECTED_ITEMS,
    COLLECTOR_COMMIT_DURATION,
    COLLECTOR_QUEUE_DEPTH, COLLECTOR_QUEUE_BYTES, COLLECTOR_QUEUE_LIMIT, COLLECTOR_CONNECTIONS,
    COLLECTOR_DATABASE_CONNECTIONS, COLLECTOR_DATABASE_SIZE, COLLECTOR_EVALUATED_TIMESTAMP,
)

# fmt: on

# --- Findings and objectives ---------------------------------------------------------------------------

RULE_RUN_FAILED: Final = "run_failed"
RULE_RUN_LOST: Final = "run_lost"
RULE_REPEATED_FAILURE: Final = "repeated_failure"
RULE_TELEMETRY_OUTAGE: Final = "telemetry_outage"
RULE_NONFINITE: Final = "nonfinite"
RULE_GRADIENT_EXPLOSION: Final = "gradient_explosion"
RULE_VANISHING_GRADIENT: Final = "vanishing_gradient"
RULE_LOSS_SCALE_COLLAPSE: Final = "loss_scale_collapse"
RULE_OVER_CLIPPING: Final = "over_clipping"
RULE_NOISY_GRADIENTS: Final = "noisy_gradients"
RULE_STALE_GRADIENTS: Final = "stale_gradients"
RULE_DIVERGENCE: Final = "divergence"
RULE_PLATEAU: Final = "plateau"
RULE_SLOW_CONVERGENCE: Final = "slow_convergence"
RULE_OVERFITTING: Final = "overfitting"
RULE_INPUT_SHIFT: Final = "input_shift"
RULE_RUN_VARIANCE: Final = "run_variance"
RULE_MISSING_SEED: Final = "missing_seed"
RULE_MEMORY_HEADROOM: Final = "memory_headroom"
RULE_MEMORY_GROWTH: Final = "memory_growth"
RULE_OUT_OF_MEMORY: Final = "out_of_memory"
RULE_STALLED: Final = "stalled"
RULE_COLLECTIVE_OUTAGE: Final = "collective_outage"
RULE_SLOW_COLLECTIVE: Final = "slow_collective"
RULE_STRAGGLER: Final = "straggler"
RULE_CHECKPOINT_CORRUPT: Final = "checkpoint_corrupt"
RULE_CHECKPOINT_FAILED: Final = "checkpoint_failed"
RULE_CHECKPOINT_STALE: Final = "checkpoint_stale"
RULE_DATA_STARVATION: Final = "data_starvation"
RULE_STEP_TIME_REGRESSION: Final = "step_time_regression"
RULE_SWEEP_COST: Final = "sweep_cost"
RULE_MISSING_INSTRUMENTATION: Final = "missing_instrumentation"

# The alert that an open finding of the rule raises, and the name of the rule's runbook.
RULE_ALERTS: Final[dict[str, str]] = {
    RULE_RUN_FAILED: "GradwatchRunFailed",
    RULE_RUN_LOST: "GradwatchRunLost",
    RULE_REPEATED_FAILURE: "GradwatchRepeatedFailure",
    RULE_TELEMETRY_OUTAGE: "GradwatchTelemetryOutage",
    RULE_NONFINITE: "GradwatchNonfinite",
    RULE_GRADIENT_EXPLOSION: "GradwatchGradientExplosion",
    RULE_VANISHING_GRADIENT: "GradwatchVanishingGradient",
    RULE_LOSS_SCALE_COLLAPSE: "GradwatchLossScaleCollapse",
    RULE_OVER_CLIPPING: "GradwatchOverClipping",
    RULE_NOISY_GRADIENTS: "GradwatchNoisyGradients",
    RULE_STALE_GRADIENTS: "GradwatchStaleGradients",
    RULE_DIVERGENCE: "GradwatchDivergence",
    RULE_PLATEAU: "GradwatchPlateau",
    RULE_SLOW_CONVERGENCE: "GradwatchSlowConvergence",
    RULE_OVERFITTING: "GradwatchOverfitting",
    RULE_INPUT_SHIFT: "GradwatchInputShift",
    RULE_RUN_VARIANCE: "GradwatchRunVariance",
    RULE_MISSING_SEED: "GradwatchMissingSeed",
    RULE_MEMORY_HEADROOM: "GradwatchMemoryHeadroom",
    RULE_MEMORY_GROWTH: "GradwatchMemoryGrowth",
    RULE_OUT_OF_MEMORY: "GradwatchOutOfMemory",
    RULE_STALLED: "GradwatchStalled",
    RULE_COLLECTIVE_OUTAGE: "GradwatchCollectiveOutage",
    RULE_SLOW_COLLECTIVE: "GradwatchSlowCollective",
    RULE_STRAGGLER: "GradwatchStraggler",
    RULE_CHECKPOINT_CORRUPT: "GradwatchCheckpointCorrupt",
    RULE_CHECKPOINT_FAILED: "GradwatchCheckpointFailed",
    RULE_CHECKPOINT_STALE: "GradwatchCheckpointStale",
    RULE_DATA_STARVATION: "GradwatchDataStarvation",
    RULE_STEP_TIME_REGRESSION: "GradwatchStepTimeRegression",
    RULE_SWEEP_COST: "GradwatchSweepCost",
    RULE_MISSING_INSTRUMENTATION: "GradwatchMissingInstrumentation",
}
# Whose findings are for information: they raise no alert, and have a runbook all the same.
RULES_WITHOUT_ALERT: Final = frozenset({RULE_NOISY_GRADIENTS, RULE_MISSING_SEED})
RUNBOOK_BASE_URL: Final = "https://github.com/gradwatch/gradwatch/blob/main/alerts/runbooks"


def runbook_url(alert: str, base_url: str = RUNBOOK_BASE_URL) -> str:
    """Absolute address of an alert's runbook."""
    return f"{base_url.rstrip('/')}/{alert}.md"


SLO_TRAINING_SUCCESS_RATE: Final = "training-success-rate"
SLO_TIME_TO_CONVERGENCE: Final = "time-to-convergence"
