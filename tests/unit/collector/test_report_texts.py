"""Numbers as people read them, and telemetry that stays text in Markdown and in pages."""

from __future__ import annotations

import html
import re
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from gradwatch_collector.reports import comparison_table, wording
from gradwatch_collector.runs.comparison import Compared
from gradwatch_slo import markdown
from gradwatch_slo.cost import CPU_HOST, Held, PriceTable, cost_of
from gradwatch_slo.problems import printable
from tests.pages import LIVE

HOUR = 3600 * 1_000_000_000


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"), (0.00085, "850 µs"), (0.0125, "12.5 ms"), (0.5, "0.5 s"), (59.94, "59.9 s"),
        (59.96, "1m00s"), (187, "3m07s"), (3599.6, "1h00m"), (93_600, "26h00m"),
        (float("nan"), "NaN"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_durations_are_told_in_units_of_their_size(seconds: float, words: str) -> None:
    assert wording.duration(seconds) == words


@pytest.mark.parametrize(
    ("amount", "words"),
    [
        (Fraction(0), "0.00 EUR"), (Fraction("12.345"), "12.34 EUR"), (Fraction("0.01"), "0.01 EUR"),
        (Fraction(1, 300), "0.0033 EUR"), (Fraction("0.00009"), "0.00009 EUR"),
        (Fraction("1234567.5"), "1234567.50 EUR"),
    ],
)  # fmt: skip
def test_money_is_told_to_the_cent_and_less_with_what_counts(amount: Fraction, words: str) -> None:
    assert wording.money(amount, "EUR") == words


def test_a_cost_that_is_not_known_says_why() -> None:
    held = [Held("H100", "0", 0, 2 * HOUR), Held(CPU_HOST, "a", 0, HOUR // 60)]
    prices = PriceTable("EUR", {"H100": Decimal(2)})
    assert wording.cost(cost_of(held, prices)) == (
        "unknown, there is no price of CPU host: 2.0 h of H100, 1m00s of CPU host"
    )
    assert wording.cost(cost_of(held, None)).startswith("unknown, for want of prices")
    assert wording.cost(cost_of(held[:1], prices)) == "4.00 EUR for 2.0 h of H100"
    assert wording.cost(cost_of([], prices)) == "unknown: no process of it is known"


@pytest.mark.parametrize(
    ("values", "unit", "differs", "change"),
    [
        ((2.0, 3.0), "s", True, 0.5),
        ((-2.0, -3.0), "{loss}", True, -0.5),
        ((2.0, 2.0), "s", False, 0.0),
        ((0.0, 3.0), "s", True, None),
        ((float("nan"), float("nan")), "{loss}", False, None),
        ((1.0, float("nan")), "{loss}", True, None),
        ((None, 1.0), "s", True, None),
        ((1e-308, 1e308), "s", True, None),
        (("a", "b"), None, True, None),
        ((True, False), None, True, None),
    ],
)
def test_a_change_is_relative_to_the_first_run_or_says_nothing(
    values: tuple[float | str | None, ...], unit: str | None, differs: bool, change: float | None
) -> None:
    fact = Compared("section", "name", unit, values)
    assert (fact.differs, fact.change(1), fact.change(0)) == (differs, change, None)


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (None, "s", "-"), (True, None, "yes"), (False, None, "no"), ("x", None, "x"), (0.125, "1", "12.5 %"),
        (90.0, "s", "1m30s"), (12.5, "h", "12.5 h"), (3.0, "EUR", "3.00 EUR"), (1_234_567, "{step}", "1234567"),
        (float("nan"), "{loss}", "NaN"), (0.123456, "{loss}", "0.1235"),
    ],
)  # fmt: skip
def test_values_are_shown_by_their_unit(value: float | str | None, unit: str | None, words: str) -> None:
    assert comparison_table.shown(value, unit) == words


def rendered(text: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)


pieces = st.sampled_from(
    [*"ab_ *`[]()<>|~&;#!\\$-+.1/:@w\n\r\t\x1b\u202e\ud800é層", "https://", "www.", "<!-- -->"]
)


@given(st.lists(pieces, max_size=20).map("".join) | st.text())
@example("&amp; &#42;")
@example("https://evil.example HTTP://e.f WWW.e.f a@b.c @acme/everyone mailto:a@b.c acme/x#1")
def test_any_text_is_itself_in_markdown_and_neither_link_nor_mention(text: str) -> None:
    (shown,) = re.findall(r"\A<p>x(.*)y</p>\n\Z", rendered(f"x{markdown.escaped(text)}y"), re.DOTALL)
    parts = [html.unescape(part) for part in shown.split("<!-- -->")]
    assert "".join(parts) == printable(text)
    assert not any(LIVE.search(part) for part in parts)


@given(st.text(st.sampled_from("a|\\`*<_ "), min_size=1))
def test_any_text_stays_in_its_cell(text: str) -> None:
    shown = rendered(markdown.table(("head", "other"), [(f"x{text}y", "z")]))
    assert [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", shown)] == [f"x{text}y", "z"]
