"""``gradwatch replay``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from torch import nn

    from gradwatch.reproduction.bundle import Bundle
    from gradwatch.reproduction.dense import Visit
    from gradwatch.reproduction.finite_difference import Row
    from gradwatch.reproduction.replay import Verdict

_SAMPLE: Final = 8
_VISITS_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class _Check:
    """Finite differences of a module; ``problem`` says why there are none."""

    module: str
    rows: Sequence[Row] = ()
    output_finite: bool | None = None
    problem: str | None = None


@click.command()
@click.argument("bundle", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", help="module:function that builds the model, or the models by name.")
@click.option(
    "--loss", help="module:function from the model's output to the loss, instead of captured gradients."
)
@click.option("--check", metavar="MODULE", help="Compare this module with finite differences.")
@click.option("--sample", default=_SAMPLE, show_default=True, type=click.IntRange(1), help="Elements a tensor.")
@click.option("--device", default="cpu", show_default=True, help="Where to run it.")
@click.option("--trust", is_flag=True, help="Load objects of any class: only for bundles you know.")
@click.option("--format", "output", default="table", show_default=True, type=click.Choice(["table", "json"]))
def replay(
    bundle: Path,
    model: str | None,
    loss: str | None,
    check: str | None,
    sample: int,
    device: str,
    trust: bool,
    output: str,
) -> None:
    """Run a captured step again and find the module where it went bad.

    The suspect is then compared with finite differences in float64.

    \b
    Example:
      gradwatch replay ~/.local/state/gradwatch/bundle-3f2a-r0-step812.pt --model train:make_model
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise click.ClickException("`gradwatch replay` needs torch: pip install 'gradwatch[torch]'") from error
    from gradwatch.reproduction import bundle as bundles
    from gradwatch.reproduction import replay as replaying

    try:
        torch.device(device)
        step = bundles.load(bundle, device, trusted=trust)
        models = replaying.build(step, model, device)
        criterion = replaying.resolve(loss) if loss is not None else None
        verdict, visits = replaying.replay(step, models, criterion)
        suspect = check or (verdict.layer if verdict.born_in in {"forward", "backward"} else None)
        checked = None if suspect is None else _compare(step, models, suspect, sample)
    except bundles.BundleError as error:
        raise click.ClickException(str(error)) from error
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not here
        raise click.ClickException((str(error) or type(error).__name__).splitlines()[0]) from error
    if output == "json":
        json.dump(_document(step, verdict, visits, checked), sys.stdout, indent=2, allow_nan=False)
        click.echo()
    else:
        _print(step, verdict, visits, checked)


def _compare(step: Bundle, models: dict[str, nn.Module], suspect: str, sample: int) -> _Check:
    from gradwatch.reproduction.bundle import BundleError
    from gradwatch.reproduction.finite_difference import compare
    from gradwatch.reproduction.replay import inputs_of

    found = inputs_of(step, models, suspect)
    if found is None:
        raise BundleError(f"the step calls no module {suspect!r}")
    module, args, kwargs = found
    try:
        compared = compare(module, args, kwargs, sample)
        return _Check(suspect, compared.rows, compared.output_finite)
    except (RuntimeError, TypeError, ValueError) as error:
        return _Check(suspect, problem=f"does not run in float64: {str(error).splitlines()[0]}")


def _print(step: Bundle, verdict: Verdict, visits: Sequence[Visit], checked: _Check | None) -> None:
    click.echo(f"step {step.step} of run {step.run_id}, rank {step.rank}, loss {step.loss}")
    for note in _notes(step):
        click.echo(f"note: {note}")
    click.echo(f"\nborn in  {verdict.born_in or 'not reproduced'}")
    if verdict.layer is not None:
        click.echo(f"layer    {verdict.layer}")
    click.echo(f"why      {verdict.why}")
    striking = [visit for visit in visits if _is_striking(visit)]
    if striking:
        click.echo()
        _table(
            ("MODULE", "CLASS", "INPUTS", "OUTPUT", "GRADIENT IN", "GRADIENT OUT"),
            [_visit_row(visit) for visit in striking[:_VISITS_SHOWN]],
        )
        if len(striking) > _VISITS_SHOWN:
            click.echo(f"and {len(striking) - _VISITS_SHOWN} more")
    if checked is not None:
        click.echo(f"\nfinite differences of {checked.module or 'the model'}, in float64")
        if checked.problem is not None:
            click.echo(checked.problem)
        elif verdict.born_in == "forward" and checked.output_finite:
            click.echo("its output is finite in float64: the values do not fit the precision it ran in")
        _table(
            ("TENSOR", "ELEMENT", "BACKWARD", "DIFFERENCES", "OUTCOME"),
            [
                (
                    row.tensor,
                    ",".join(map(str, row.element)),
                    f"{row.analytic:.6g}",
                    f"{row.numeric:.6g}",
                    row.outcome,
                )
                for row in checked.rows
            ],
        )


def _notes(step: Bundle) -> list[str]:
    notes = []
    if not step.exact:
        whose = f" of {', '.join(step.changed)}" if step.changed else ""
        notes.append(f"the parameters{whose} are those after an update, not those of the step's first pass")
    if any(call.inputs_changed for call in step.calls):
        notes.append("inputs were changed in place after the pass began, and are not what they were")
    import torch

    if step.versions.get("torch") != str(torch.__version__):
        notes.append(f"captured with torch {step.versions.get('torch')}, replayed with {torch.__version__}")
    return notes


def _is_striking(visit: Visit) -> bool:
    gradients = (*visit.gradients_in, *visit.gradients_out)
    return (
        not visit.inputs_finite
        or visit.output_fault is not None
        or not all(gradients)
        or bool(visit.bad_parameters)
    )


def _visit_row(visit: Visit) -> tuple[str, ...]:
    def told(finite: Sequence[bool]) -> str:
        return "-" if not finite else "good" if all(finite) else "bad"

    out = told([*visit.gradients_out, *(False for _ in visit.bad_parameters)])
    return (
        visit.name or "(model)",
        visit.kind.partition(":")[2],
        "good" if visit.inputs_finite else "bad",
        visit.output_fault or "good",
        told(visit.gradients_in),
        out,
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    for row in (headings, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _document(
    step: Bundle, verdict: Verdict, visits: Sequence[Visit], checked: _Check | None
) -> dict[str, Any]:
    return {
        "run_id": step.run_id,
        "attempt": step.attempt,
        "rank": step.rank,
        "step": step.step,
        "loss": _finite(step.loss),
        "loss_nonfinite": step.loss is not None and not math.isfinite(step.loss),
        "exact": step.exact,
        "notes": _notes(step),
        "born_in": verdict.born_in,
        "layer": verdict.layer,
        "why": verdict.why,
        "modules": [
            {
                "module": visit.name,
                "class": visit.kind,
                "inputs_finite": visit.inputs_finite,
                "output_fault": visit.output_fault,
                "gradients_in_finite": all(visit.gradients_in) if visit.gradients_in else None,
                "gradients_out_finite": all(visit.gradients_out) if visit.gradients_out else None,
                "bad_parameters": visit.bad_parameters,
            }
            for visit in visits
        ],
        "finite_differences": None
        if checked is None
        else {
            "module": checked.module,
            "problem": checked.problem,
            "output_finite": checked.output_finite,
            "elements": [
                {
                    "tensor": row.tensor,
                    "element": list(row.element),
                    "backward": _finite(row.analytic),
                    "differences": _finite(row.numeric),
                    "outcome": row.outcome,
                }
                for row in checked.rows
            ],
        },
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
