"""Price tables are validated as files of objectives are: every mistake with its line."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_slo.prices import read_prices
from gradwatch_slo.problems import ObjectiveFileError

PRICE = "expected the price of an hour: 0 to 1000000, with at most 9 decimals"
UNKNOWN_FIELD = (
    "6: cpuhost: found an unknown field, expected one of currency, devices, cpuHost; did you mean 'cpuHost'?"
)
GOOD = """
currency: EUR
devices:
  NVIDIA H100 80GB HBM3: 2.49
  "NVIDIA H200": 3
cpuHost: 0.380
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prices.yaml"


def problems(file: Path, content: str) -> list[str]:
    file.write_text(content)
    with pytest.raises(ObjectiveFileError) as caught:
        read_prices(file)
    return [str(problem).removeprefix(f"{file}:") for problem in caught.value.problems]


def test_a_price_table_is_read_as_it_is_written(file: Path) -> None:
    file.write_text(GOOD)
    table = read_prices(file)
    assert table.currency == "EUR"
    assert table.devices == {"NVIDIA H100 80GB HBM3": Decimal("2.49"), "NVIDIA H200": Decimal(3)}
    assert table.cpu_host == Decimal("0.38")


def test_hosts_and_devices_may_have_no_price(file: Path) -> None:
    file.write_text("currency: USD\n")
    table = read_prices(file)
    assert (table.devices, table.cpu_host) == ({}, None)


def test_every_mistake_is_told_at_once_with_its_line(file: Path) -> None:
    assert problems(
        file,
        """currency: euro
devices:
  A100: cheap
  H100: -1
  V100: 0.1234567890
cpuhost: 1
""",
    ) == [
        "1: currency: found 'euro', expected the three letters of a currency, such as EUR",
        "3: devices.A100: found 'cheap', expected a number",
        f"4: devices.H100: found -1, {PRICE}",
        f"5: devices.V100: found 0.1234567890, {PRICE}",
        UNKNOWN_FIELD,
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "1: found no document, expected a price table"),
        ("devices: {}", "1: currency: found nothing, expected this required field"),
        ("- 1\n- 2", "1: found a list, expected a mapping"),
        ("currency: EUR\n---\ncurrency: USD", "3: found another document, expected one price table"),
        (
            "currency: EUR\ndevices:\n  A: 1\n  A: 2",
            "4: devices.A: found the field twice (first on line 3), expected it once",
        ),
        (
            "currency: EUR\ncpuHost: 1.0e+999999999",
            f"2: cpuHost: found 1.0E+999999999, {PRICE}",
        ),
        (
            "currency: EUR\ncpuHost: 0.0e-999999999",
            f"2: cpuHost: found 0E-1000000000, {PRICE}",
        ),
        (
            "currency: EUR\ncpuHost: .nan",
            "2: cpuHost: found .nan, expected a decimal number, or a text in quotes",
        ),
    ],
)  # fmt: skip
def test_what_is_no_price_table_is_one_clear_line(file: Path, content: str, expected: str) -> None:
    assert problems(file, content) == [expected]


def test_a_file_that_is_not_there_is_one_clear_line(file: Path) -> None:
    with pytest.raises(ObjectiveFileError, match="cannot be read: No such file or directory"):
        read_prices(file)


@given(st.decimals(0, 1_000_000, places=9))
def test_no_digit_of_a_price_is_lost(tmp_path_factory: pytest.TempPathFactory, price: Decimal) -> None:
    file = tmp_path_factory.getbasetemp() / "price.yaml"
    file.write_text(f"currency: EUR\ndevices:\n  card: {price:f}\n")
    assert read_prices(file).devices["card"] == price
