"""``gradwatch.watch``: the one line in a training loop."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

from gradwatch.life.oom import HANDLED_BEFORE
from gradwatch.safety import internal_error, shielded
from gradwatch.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

    from gradwatch.current_run import Block
    from gradwatch.target import Target
    from gradwatch.telemetry import Exporter
    from gradwatch.training_run import Run


class Watch:
    """What ``watch()`` returns. Usable as a context manager; inert in a process it was not made in."""

    def __init__(
        self, run: Run | None, optimizers: Sequence[Optimizer] = (), models: Iterable[nn.Module] = ()
    ) -> None:
        self._run = run
        self._last_step = 0
        self._optimizers = tuple(map(weakref.ref, optimizers))
        self._models = tuple(map(weakref.ref, models))
        # A retry inside `except`: the exception being handled now is not this run's ending. It is marked, not
        # held: its traceback may hold all the memory that the retry is about.
        handled = sys.exc_info()[1]
        if handled is not None:
            vars(handled)[HANDLED_BEFORE] = True
        if run is not None:
            run.watches.append(self)

    def log(self, /, **values: object) -> None:
        """Record numbers: Python or NumPy numbers, or one-element tensors (read without a synchronisation).

        ``loss`` replaces the captured loss of the step in progress, or of the last one if no ``backward()`` was
        seen since; ``lr`` replaces its learning rate. Any other name becomes a metric of its own, and is what
        ``target`` is compared with.
        """
        run = self._run
        if run is not None:
            try:
                run.observer.user_log.log(values)
            except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
                internal_error(error, "watch.log")

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        """Clip the gradients of everything this watch watches, as ``torch.nn.utils.clip_grad_norm_`` does.

        The gradients afterwards and the total norm returned are torch's, bit for bit; it takes less time, since
        the norms are computed once for clipping and for observing. Works on a closed or disabled watch too.
        Call it where torch's would be called: under ``GradScaler`` after ``scaler.unscale_(optimizer)``.

        Args:
            max_norm: Largest total norm the gradients may have.
            norm_type: Order of the norm.
            error_if_nonfinite: Raise if the total norm is NaN or Inf.
            foreach: torch's choice of implementation.

        Returns:
            Total norm of the gradients before clipping, a tensor without dimensions.

        Raises:
            RuntimeError: The total norm is not finite, and ``error_if_nonfinite``.
        """
        from torch.nn.utils import clip_grad_norm_

        optimizers = [one for reference in self._optimizers if (one := reference()) is not None]
        plain = norm_type == 2.0 and foreach is None and not error_if_nonfinite
        if self._run is not None and plain and len(optimizers) == 1:
            total = self._run.observer.clip_capture.clip(optimizers[0], max_norm)
            if total is not None:
                return total
        parameters = self._parameters(optimizers)
        return clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)

    def _parameters(self, optimizers: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
        from gradwatch.loop.watched import parameters_of

        if optimizers:
            return [parameter for one in optimizers for parameter in parameters_of(one)]
        models = [module for model in self._models if (module := model()) is not None]
        return [parameter for module in models for parameter in module.parameters()]

    def data_wait(self) -> AbstractContextManager[None]:
        """Count what happens inside as waiting for data.

        ``torch.utils.data.DataLoader`` is timed by itself; this is for everything else, such as
        ``with watch.data_wait(): x, y = get_batch()``.
        """
        run = self._run
        return nullcontext() if run is None else run.observer.measures.waits.marked()

    @property
    def step(self) -> int:
        """Index of the optimizer step in progress: ``start_step`` plus the steps that ended until `close`."""
        return self._run.observer.roster.step if self._run is not None else self._last_step

    @property
    def run_id(self) -> str | None:
        """The run's id; None for a watch that watches nothing."""
        return self._run.identity.run_id if self._run is not None else None

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Mark evaluation: its time belongs to no step, its losses and gradients are not training's.

        ``with watch.evaluation(): ...``, or as a decorator of the function that evaluates. `log` works as ever.
        """
        run = self._run
        if run is not None:
            run.observer.pause()
        try:
            yield
        finally:
            if run is not None:
                run.observer.resume()

    @contextmanager
    def checkpoint(
        self, path: str | PathLike[str] | None = None, *, step: int | None = None, shared: bool = False
    ) -> Iterator[Path | None]:
        """Mark the writing of a checkpoint: its time belongs to no step. With ``path`` it is also made safe.

        ``with watch.checkpoint("last.pt") as file: torch.save(state, file)``: any saver, of a file or a folder,
        writes to what the block is given. After the block that is at ``path``, on disk, with a manifest of
        checksums; a crash at any moment leaves the checkpoint before. Works on a closed or disabled watch too.

        Args:
            path: Where the checkpoint will be. None only marks the time.
            step: Optimizer steps done, which is where a resumed run goes on; default: ``watch.step``.
            shared: All ranks save into one folder, as ``torch.distributed.checkpoint`` does, on a file system
                that they share. Rank 0 puts it in place once its saver is done.

        Raises:
            OSError: What was saved cannot be put in its place. The saver's own exceptions are passed on as they
                are. The checkpoint before stays what it was.
        """
        with self.evaluation():
            if path is None:
                yield None
                return
            from gradwatch.checkpoints.saving import saving

            run = self._run
            known: dict[str, Any] = {"step": step}
            if run is not None:
                identity = run.identity
                known = {
                    "step": self.step if step is None else int(step),
                    "run_id": identity.run_id,
                    "attempt": identity.attempt,
                    "rank": identity.rank,
                }
            with saving(path, _nobody if run is None else run.report, shared=shared, **known) as place:
                yield place

    def save_checkpoint(self, state: object, path: str | PathLike[str], step: int | None = None) -> None:
        """Save with ``torch.save``, inside `checkpoint`."""
        import torch

        with self.checkpoint(path, step=step) as file:
            torch.save(state, cast("Path", file))

    def close(self) -> None:
        """Stop watching. The last watch of a run to close ends the run and takes all hooks off.

        Called while an exception is being handled (``finally``, ``except``), that exception is the ending.
        """
        error = sys.exc_info()[1]
        self.close_with(None if error is not None and HANDLED_BEFORE in vars(error) else error)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close_with(error)

    @shielded(None)
    def close_with(self, error: BaseException | None) -> None:
        """Stop watching, where this exception, or a normal return, is the ending."""
        run, self._run = self._run, None
        if run is None:
            return
        self._last_step = run.observer.roster.step
        run.watches.remove(self)
        if run.watches:
            run.observer.forget([one for reference in self._optimizers if (one := reference()) is not None])
        else:
            from gradwatch.current_run import close_run
            from gradwatch.life.endings import ending_of

            close_run(run, ending_of(error))

    def __reduce__(self) -> tuple[type[Watch], tuple[None]]:
        """Pickle and deepcopy as a watch that watches nothing: hooks stay with the process."""
        return (Watch, (None,))


def watch(
    model: Any = None,
    optimizer: Any = None,
    *,
    job: str | None = None,
    model_name: str | None = None,
    dataset: str | None = None,
    team: str | None = None,
    tier: str | None = None,
    run_id: str | None = None,
    attempt: int | None = None,
    rank: int | None = None,
    target: str | Target | None = None,
    deadline: float | None = None,
    config: Mapping[str, object] | None = None,
    capture_loss: bool | None = None,
    every: int | None = None,
    overhead_budget: float | None = None,
    start_step: int | None = None,
    resume: str | PathLike[str] | None = None,
    export_interval: float | None = None,
    heartbeat_interval: float | None = None,
    endpoint: str | None = None,
    preemptible: bool | None = None,
    inputs: bool | None = None,
    collectives: bool | None = None,
    nvtx: bool | Literal["layers"] | None = None,
    directory: str | PathLike[str] | None = None,
    spool_max_bytes: int | None = None,
    exit_timeout: float | None = None,
    flight_steps: int | None = None,
    stall_after: float | None = None,
    capture: str | None = None,
    replay: str | Callable[..., Any] | None = None,
    exporter: Exporter | None = None,
) -> Watch:
    """Watch training: gradient norms by layer, NaN and Inf, loss, learning rate, time, memory, and the ending.

    All calls in a process belong to one run; each adds its models and optimizers to it, and settings come from
    the first. Calling twice with the same objects is calling once. Every setting can also be given as
    ``GRADWATCH_<NAME>``; the standard ``OTEL_*`` variables are honoured.

    Args:
        model: A module, several, or a mapping of names to modules. None names layers by optimizer group.
        optimizer: An optimizer (or a wrapper around one), or several. None watches every optimizer that steps
            parameters of the models.
        job: Name of the job; default: the script's name.
        model_name: Name of the model; default: its class.
        dataset: Name of the data set.
        team: Owning team.
        tier: ``production`` or ``experiment`` (default).
        run_id: Id of the run; default: the launcher's, else made.
        attempt: 1-based attempt.
        rank: Global rank.
        target: What the run tries to reach, such as ``val_loss<=0.5``.
        deadline: Seconds within which the target should hold.
        config: Hyper-parameters; only their hash leaves the process.
        capture_loss: Capture the loss where ``backward()`` is called (default True).
        every: Observe gradients at every n-th step; default: as often as the overhead budget allows.
        overhead_budget: Share of step time gradwatch may take on the training thread (default 0.005).
        start_step: Index of the first step, after a resume.
        resume: The checkpoint that training goes on from, such as ``gradwatch.latest_checkpoint(folder)``: its
            manifest says the ``start_step``.
        export_interval: Seconds between exports of metrics (default 5).
        heartbeat_interval: Seconds between signs of life (default 5), of which the collector's ``--lost-after``
            should be six.
        endpoint: Base URL of the OTLP/HTTP collector (default http://127.0.0.1:4318).
        preemptible: SIGTERM means preemption.
        inputs: Report mean, spread and non-finite share of the models' floating inputs twice a minute (default
            True).
        collectives: Time the collective calls of ``torch.distributed``; DDP's own are timed anyway.
        nvtx: Make NVTX ranges for steps, or with ``"layers"`` for the forwards of leaf modules too.
        directory: Where black boxes, bundles and undelivered telemetry are written (default
            ``$XDG_STATE_HOME/gradwatch``).
        spool_max_bytes: Bound on undelivered telemetry on disk (default 256 MiB); 0 keeps it in memory only.
        exit_timeout: Seconds that delivery may hold up the end of the process (default 2).
        flight_steps: Steps that the black box holds (default 256).
        stall_after: Seconds without a step after which the stack of every thread is reported; default: judged
            by the steps and pauses so far.
        capture: ``on_nonfinite`` writes a bundle with which ``gradwatch replay`` runs the first non-finite step
            again. It holds the model's inputs and state, and stays on this host.
        replay: Function without arguments, or ``module:function``, that builds the model for a replay.
        exporter: Where telemetry goes instead, such as ``gradwatch.testing.InMemoryExporter()``.

    Raises:
        SettingsError: A setting cannot be used; the message says what is expected.
        TypeError: ``model``, ``optimizer`` or ``exporter`` is not one.
    """
    if exporter is not None and (isinstance(exporter, type) or not hasattr(exporter, "send_metrics")):
        what = exporter.__name__ if isinstance(exporter, type) else type(exporter).__name__
        raise TypeError(
            "gradwatch.watch: expected an exporter such as gradwatch.testing.InMemoryExporter(), "
            f"got {'the class ' if isinstance(exporter, type) else ''}{what}"
        )
    keywords = {
        name: value for name, value in locals().items() if name not in {"model", "optimizer", "exporter"}
    }
    given = {name: value for name, value in keywords.items() if value is not None}
    settings = _settings(given)
    models, optimizers = _models(model, model_name), _optimizers(optimizer)
    inert = Watch(None, optimizers, models.values())
    if settings.disabled or _in_data_loader_worker() or _is_refused():
        return inert
    return _attach(settings, models, optimizers, exporter) or inert


# Settings of the `run()` around, if there is one.
_inherited: dict[str, Any] = {}


@contextmanager
def run(**settings: Any) -> Iterator[None]:
    """A run of its own in this process, such as a trial of a sweep: `watch` calls inside belong to it.

    It ends with the block and as the block does: failed by an exception, cancelled by Ctrl-C, else succeeded. A
    run that was open before goes on afterwards; nothing inside is its own. It has an id of its own, unless
    ``run_id`` is given: that of the environment or launcher is the process's. Beside a block of another thread
    or task it is not watched, and says so.

    Args:
        settings: Keywords of `watch`, for the calls inside that do not give their own.

    Raises:
        SettingsError: A setting cannot be used.
    """
    global _inherited
    Settings.resolve(settings)
    from gradwatch.current_run import separate_run

    with separate_run() as block:
        if block.refused:
            yield
            return
        before, _inherited = _inherited, settings
        try:
            yield
        finally:
            _inherited = before


def _settings(given: Mapping[str, Any]) -> Settings:
    """What is given, then what the `run()` around gives, then the environment.

    The environment names the run of the process, which one inside a `run()` is not.
    """
    keywords = {**_inherited, **given}
    settings = Settings.resolve(keywords)
    if _block() is None or keywords.get("run_id") is not None:
        return settings
    return replace(settings, run_id=None, attempt=keywords.get("attempt"))


def _is_refused() -> bool:
    block = _block()
    return block is not None and block.refused


def _block() -> Block | None:
    """The `run()` around the caller; nobody can be inside one before the runs are imported."""
    runs = sys.modules.get("gradwatch.current_run")
    return None if runs is None else cast("Block | None", runs.block())


@shielded(None)
def _attach(
    settings: Settings, models: Mapping[str, nn.Module], optimizers: list[Any], exporter: Exporter | None
) -> Watch | None:
    from gradwatch import current_run as runs

    run = runs.current()
    if run is None:
        run = runs.open_run(settings, next(iter(models), None), exporter)
    new: list[Any] = []
    try:
        new_models = [run.add_model(module, name) for name, module in models.items()]
        new += [one for one in optimizers if run.observer.add_optimizer(one)]
        if not optimizers:
            run.observer.adopt_optimizers()
    except Exception as error:
        # Nobody has a watch to close: what was begun would stay, and the next `watch()` would join it.
        if run.watches:
            run.observer.forget(new)
        else:
            runs.close_run(run, runs.not_watched(error))
        raise
    known = run.watches[-1] if run.watches and not new and not any(new_models) else None
    return known or Watch(run, new, models.values())


def _models(model: Any, name: str | None) -> dict[str, nn.Module]:
    """Modules by name."""
    from torch import nn

    if model is None:
        return {}
    if isinstance(model, nn.Module):
        return {name or _class_name(model): model}
    if not isinstance(model, Mapping):
        named: dict[str, nn.Module] = {}
        for module in _items(model, "model"):
            base = _class_name(module)
            unique = next(n for n in _numbered(base) if n not in named)
            named[unique] = module
        model = named
    for module in model.values():
        if not isinstance(module, nn.Module):
            raise TypeError(f"gradwatch.watch: expected a torch.nn.Module, got {type(module).__name__}")
    return dict(model)


def _nobody(*_: object) -> None:
    """To whom a watch reports that watches nothing."""


def _numbered(base: str) -> Iterable[str]:
    yield base
    number = 2
    while True:
        yield f"{base}_{number}"
        number += 1


def _class_name(module: Any) -> str:
    """Class of the module inside DDP's, compile's and similar wrappers."""
    for attribute in ("module", "_orig_mod"):
        inner = getattr(module, attribute, None)
        if inner is not None and hasattr(inner, "named_parameters"):
            return _class_name(inner)
    return type(module).__name__


def _optimizers(optimizer: Any) -> list[Any]:
    from gradwatch.loop.watched import unwrap

    if optimizer is None:
        return []
    several = isinstance(optimizer, (list, tuple, set, frozenset))
    return [unwrap(one) for one in (optimizer if several else (optimizer,))]


def _items(several: Any, what: str) -> list[Any]:
    try:
        return list(several)
    except TypeError:
        raise TypeError(
            f"gradwatch.watch: {what} must be a torch.nn.Module, got {type(several).__name__}"
        ) from None


def _in_data_loader_worker() -> bool:
    data = sys.modules.get("torch.utils.data")
    return data is not None and data.get_worker_info() is not None
