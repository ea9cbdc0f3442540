"""Price tables: what an hour of a device costs, by its name. Validated as files of objectives are.

.. code-block:: yaml

    currency: EUR
    devices:
      NVIDIA H100 80GB HBM3: 2.49
    cpuHost: 0.38
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from gradwatch_slo.cost import PriceTable
from gradwatch_slo.problems import ObjectiveFileError
from gradwatch_slo.reader import field_problems
from gradwatch_slo.strict import Number, StrictModel, refusal, shown
from gradwatch_slo.yaml_lines import read_yaml

_HIGHEST: Final = 1_000_000
_MOST_DECIMALS: Final = 9


def _currency(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[A-Z]{3}", value):
        return value
    raise refusal(f"found {shown(value)}, expected the three letters of a currency, such as EUR")


def _price(value: Decimal) -> Decimal:
    exponent = value.as_tuple().exponent
    # An exponent of a billion would be a number of a billion digits once it is exact.
    if 0 <= value <= _HIGHEST and isinstance(exponent, int) and -_MOST_DECIMALS <= exponent <= 6:
        return value
    raise refusal(
        f"found {value}, expected the price of an hour: 0 to {_HIGHEST}, with at most {_MOST_DECIMALS} decimals"
    )


_Currency = Annotated[str, BeforeValidator(_currency)]
_Price = Annotated[Number, AfterValidator(_price)]


class _PriceFile(StrictModel):
    currency: _Currency
    devices: dict[str, _Price] = Field(default_factory=dict)
    cpu_host: _Price | None = None


def read_prices(path: Path) -> PriceTable:
    """Read a file of prices.

    Raises:
        ObjectiveFileError: with every problem of the file.
    """
    first, *others = read_yaml(path, expected="a price table")
    problems = [each.problem((), "found another document, expected one price table") for each in others]
    content: _PriceFile | None = None
    try:
        content = _PriceFile.model_validate(first.value)
    except ValidationError as error:
        problems += field_problems(first, error)
    problems += first.problems.values()
    if content is None or problems:
        raise ObjectiveFileError(sorted(problems, key=lambda problem: (problem.line, problem.field)))
    return PriceTable(content.currency, content.devices, content.cpu_host)
