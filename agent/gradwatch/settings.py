"""What the user can set: keyword, then ``GRADWATCH_*``, then the standard ``OTEL_*``, then the default."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Final, Literal, TypeVar
from urllib.parse import unquote, urlsplit

from gradwatch import conventions
from gradwatch.checkpoints import manifest as manifests
from gradwatch.checkpoints.manifest import ManifestError
from gradwatch.export.spool import DEFAULT_BYTES
from gradwatch.local_files import default_directory
from gradwatch.redaction import redact_text
from gradwatch.target import Target

T = TypeVar("T")
# What HTTP takes, and the client too.
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_HEADER_VALUE: Final = re.compile(r"(?:[!-~\xa1-\xff][\t -~\xa0-\xff]*)?")

DEFAULT_ENDPOINT: Final = "http://127.0.0.1:4318"
NvtxMode = Literal["step", "layers"]
ON_NONFINITE: Final = "on_nonfinite"
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off", ""})
# What is counted on from there has to fit into 64 bits.
_MOST: Final = 2**62
_TIERS: Final = (conventions.TIER_PRODUCTION, conventions.TIER_EXPERIMENT)


class SettingsError(ValueError):
    """A setting the user gave cannot be used. The only error ``watch()`` raises besides ``TypeError``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything ``watch()`` was told, resolved and checked.

    Attributes:
        job: Name of the job (``service.name``).
        run_id: The caller's run id; None lets the launcher or gradwatch choose.
        attempt: 1-based; None when the caller does not know.
        rank: Global rank; None lets the launcher or ``torch.distributed`` say.
        deadline: Seconds from the start within which the target should hold.
        config: Hyper-parameters; only their hash leaves the process.
        every: Observe gradients at every n-th step; None lets the overhead budget decide.
        overhead_budget: Share of step time that the training thread may spend here.
        start_step: Index of the first step, after a resume; ``resume`` reads it from a checkpoint's manifest.
        export_interval: Seconds between exports of metrics.
        heartbeat_interval: Seconds between signs of life.
        endpoint: Base URL of the OTLP/HTTP collector.
        headers: Sent with each request.
        resource: Additional resource attributes.
        directory: Where black boxes, bundles and undelivered telemetry are written on this host.
        spool_max_bytes: Bound on undelivered telemetry on disk; 0 keeps it in memory only.
        exit_timeout: Seconds that delivery may hold up the end of the process.
        flight_steps: Steps that the black box holds.
        stall_after: Seconds without a step that are a stall; None judges by the steps and pauses so far.
        capture: ``on_nonfinite`` writes a reproduction bundle of the first non-finite step; None none.
        replay: ``module:function`` that builds the model again for ``gradwatch replay``.
        disabled: Watch nothing.
        preemptible: SIGTERM means that the scheduler preempted the run.
        inputs: Report mean, spread and non-finite share of the models' floating inputs, now and then.
        collectives: Time the collective calls of ``torch.distributed``.
        nvtx: NVTX ranges: ``step``, ``layers`` for leaf modules too, or None.
    """

    job: str
    model: str | None = None
    dataset: str | None = None
    team: str | None = None
    tier: str = conventions.TIER_EXPERIMENT
    run_id: str | None = None
    attempt: int | None = None
    rank: int | None = None
    target: Target | None = None
    deadline: float | None = None
    config: Mapping[str, object] | None = None
    capture_loss: bool = True
    every: int | None = None
    overhead_budget: float = 0.005
    start_step: int = 0
    export_interval: float = 5.0
    heartbeat_interval: float = 5.0
    endpoint: str = DEFAULT_ENDPOINT
    headers: Mapping[str, str]
    resource: Mapping[str, str]
    directory: Path
    spool_max_bytes: int = DEFAULT_BYTES
    exit_timeout: float = 2.0
    flight_steps: int = 256
    stall_after: float | None = None
    capture: str | None = None
    replay: str | None = None
    disabled: bool = False
    preemptible: bool = False
    inputs: bool = True
    collectives: bool = False
    nvtx: NvtxMode | None = None

    @classmethod
    def resolve(
        cls, keywords: Mapping[str, Any], environ: Mapping[str, str] = os.environ, program: str | None = None
    ) -> Settings:
        """Merge keywords and environment. Keywords that are None count as not given.

        Raises:
            SettingsError: One clear line naming the setting, what it was and what is expected.
        """
        resource = _pairs("OTEL_RESOURCE_ATTRIBUTES", environ)
        standard = {
            "job": environ.get("OTEL_SERVICE_NAME") or resource.pop(conventions.SERVICE_NAME, None),
            "endpoint": environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"),
            "disabled": environ.get("OTEL_SDK_DISABLED"),
            "directory": environ.get("GRADWATCH_DIR"),
        }

        def setting(name: str, convert: Callable[[Any], T], default: T) -> T:
            variable = f"GRADWATCH_{name.upper()}"
            for source, raw in (
                (name, keywords.get(name)),
                (variable, environ.get(variable) or None),
                ("OTEL_*", standard.get(name) or None),
            ):
                if raw is not None:
                    try:
                        return convert(raw)
                    except (ValueError, TypeError) as error:
                        raise SettingsError(f"gradwatch: {redact_text(f'{source}={raw!r}')}: {error}") from None
            return default

        return cls(
            job=setting("job", _name, program or _program()),
            model=setting("model_name", _text, None),
            dataset=setting("dataset", _text, None),
            team=setting("team", _text, None),
            tier=setting("tier", _tier, conventions.TIER_EXPERIMENT),
            run_id=setting("run_id", _name, None),
            attempt=setting("attempt", _integer(1, conventions.MAX_INT32), None),
            rank=setting("rank", _integer(0, conventions.MAX_INT32), None),
            target=setting("target", _target, None),
            deadline=setting("deadline", _positive, None),
            config=setting("config", _mapping, None),
            capture_loss=setting("capture_loss", _boolean, True),
            every=setting("every", _integer(1), None),
            overhead_budget=setting("overhead_budget", _share, 0.005),
            start_step=setting("start_step", _integer(0), setting("resume", _step_of_checkpoint, 0)),
            export_interval=setting("export_interval", _positive, 5.0),
            heartbeat_interval=setting("heartbeat_interval", _positive, 5.0),
            endpoint=setting("endpoint", _url, DEFAULT_ENDPOINT),
            headers=_headers("OTEL_EXPORTER_OTLP_HEADERS", environ),
            resource=resource,
            directory=setting("directory", _directory, default_directory(environ)),
            spool_max_bytes=setting("spool_max_bytes", _integer(0), DEFAULT_BYTES),
            exit_timeout=setting("exit_timeout", _positive, 2.0),
            flight_steps=setting("flight_steps", _integer(1), 256),
            stall_after=setting("stall_after", _positive, None),
            capture=setting("capture", _capture, None),
            replay=setting("replay", _reference, None),
            disabled=setting("disabled", _boolean, False),
            preemptible=setting("preemptible", _boolean, False),
            inputs=setting("inputs", _boolean, True),
            collectives=setting("collectives", _boolean, False),
            nvtx=setting("nvtx", _nvtx, None),
        )


def _program() -> str:
    stem = PurePath(sys.argv[0]).stem if sys.argv and sys.argv[0] else ""
    return stem if stem and stem not in {"-c", "-m", "__main__", "ipykernel_launcher"} else "training"


def _text(raw: object) -> str:
    text = str(raw).strip()
    if not text:
        raise ValueError("expected a text that is not empty")
    return text


def _name(raw: object) -> str:
    text = _text(raw)
    if len(text) > conventions.MAX_IDENTITY:
        raise ValueError(f"expected a text of at most {conventions.MAX_IDENTITY} characters")
    return text


def _tier(raw: object) -> str:
    if raw not in _TIERS:
        raise ValueError(f"expected {' or '.join(_TIERS)}")
    return str(raw)


def _integer(least: int, most: int = _MOST) -> Callable[[Any], int]:
    def convert(raw: Any) -> int:
        try:
            number = int(raw)
        except (ValueError, TypeError, OverflowError):
            number = least - 1
        if number < least or isinstance(raw, bool) or (isinstance(raw, float) and raw != number):
            raise ValueError(f"expected a whole number, {least} or more")
        if number > most:
            raise ValueError(f"expected a whole number, at most {most}")
        return number

    return convert


def _positive(raw: Any) -> float:
    try:
        number = float(raw)
    except (ValueError, TypeError):
        number = math.nan
    if not (0 < number < math.inf):
        raise ValueError("expected a number of seconds above 0")
    return number


def _share(raw: Any) -> float:
    try:
        number = float(raw)
    except (ValueError, TypeError):
        number = math.nan
    if not (0 < number <= 1):
        raise ValueError("expected a share of step time above 0 and at most 1, such as 0.005")
    return number


def _boolean(raw: object) -> bool:
    word = str(raw).strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError("expected true or false")


def _nvtx(raw: object) -> NvtxMode | None:
    word = str(raw).strip().lower()
    if word == "layers":
        return "layers"
    try:
        return "step" if word == "step" or _boolean(word) else None
    except ValueError:
        raise ValueError("expected true, false or layers") from None


def _target(raw: object) -> Target:
    return raw if isinstance(raw, Target) else Target.parse(str(raw))


def _directory(raw: object) -> Path:
    return Path(_text(raw)).expanduser().absolute()


def _step_of_checkpoint(raw: object) -> int:
    try:
        step = manifests.read(_directory(raw)).step or 0
    except ManifestError as error:
        raise ValueError(f"expected a checkpoint that gradwatch saved: {error}") from None
    return _integer(0)(step)


def _capture(raw: object) -> str | None:
    if raw in {"off", "none"}:
        return None
    if raw != ON_NONFINITE:
        raise ValueError(f"expected {ON_NONFINITE} or off")
    return ON_NONFINITE


def _reference(raw: object) -> str:
    if callable(raw):
        return f"{getattr(raw, '__module__', '')}:{getattr(raw, '__qualname__', '')}"
    module, _, name = str(raw).partition(":")
    if not module or not name:
        raise ValueError("expected module:function, or the function itself")
    return str(raw)


def _mapping(raw: object) -> Mapping[str, object]:
    if not isinstance(raw, Mapping):
        raise TypeError("expected a mapping of hyper-parameters")
    return dict(raw)


def _url(raw: object) -> str:
    url = str(raw).strip().rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise ValueError(f"expected an http or https URL, such as {DEFAULT_ENDPOINT}")
    return url


def _pairs(variable: str, environ: Mapping[str, str]) -> dict[str, str]:
    # W3C baggage form, as the OpenTelemetry specification asks: key=value,key=value, percent-encoded.
    pairs = {}
    for item in environ.get(variable, "").split(","):
        key, separator, value = item.partition("=")
        if separator and key.strip():
            pairs[unquote(key.strip())] = unquote(value.strip())
    return pairs


def _headers(variable: str, environ: Mapping[str, str]) -> dict[str, str]:
    pairs = _pairs(variable, environ)
    for name, value in pairs.items():
        # Never the value, and not what may be one: it is a secret more often than not.
        if not _HEADER_NAME.fullmatch(name):
            raise SettingsError(f"gradwatch: {variable}: expected name=value,...; a name is none of a header")
        if not _HEADER_VALUE.fullmatch(value):
            raise SettingsError(
                f"gradwatch: {variable}: the value of {name} has a character that no header may have"
            )
    return pairs
