"""The base of every validated model: all that is wrong at once, in words of what was found and expected.

pydantic stops a model's own checks at its first wrong field; here fields and the checks between them are
reported together, so that a file is put right in one go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from gradwatch_slo.durations import Duration, parse_length
from gradwatch_slo.problems import one_of, suggestion

T = TypeVar("T")

# A field's path relative to the model, and what is wrong there.
Mismatch = tuple[tuple[str | int, ...], str]

_TRANSLATED: Final = "gradwatch"
_EXPECTED: Final = {
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "too_short": "at least {min_length} of them",
    "too_long": "only {max_length} of them",
    "string_too_short": "a text that is not empty",
    "string_too_long": "at most {max_length} characters",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
}


class StrictModel(BaseModel):
    """Immutable, camelCase in files, no conversions, no unknown fields, every mistake reported.

    An optional field that is null is one that was not given: ``labels:`` with nothing after it.
    """

    example: ClassVar[str] = ""  # of a mapping, for the message where something else was found

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, alias_generator=to_camel, arbitrary_types_allowed=True
    )

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:  # noqa: ARG003 - for subclasses
        """Yield what is wrong between fields; ``fields`` are as written, not validated yet."""
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _report_everything(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, dict):
            data = cls._given(data)
        details: list[InitErrorDetails] = []
        model: Self | None = None
        try:
            model = handler(data)
        except ValidationError as error:
            details += [_detail(e["loc"], cls._words(e), e["input"]) for e in error.errors(include_url=False)]
        if isinstance(data, dict):
            details += [_detail(path, message, data) for path, message in cls.mismatches(data)]
        if model is None or details:
            raise ValidationError.from_exception_data(cls.__name__, details)
        return model

    @classmethod
    def _given(cls, fields: dict[str, Any]) -> dict[str, Any]:
        optional = {info.alias or name for name, info in cls.model_fields.items() if not info.is_required()}
        return {name: value for name, value in fields.items() if value is not None or name not in optional}

    @classmethod
    def _words(cls, error: ErrorDetails) -> str:
        kind, found = error["type"], shown(error["input"])
        if kind == _TRANSLATED:
            return error["msg"]
        if kind == "missing":
            return "found nothing, expected this required field"
        if kind == "extra_forbidden":
            fields = [info.alias or name for name, info in cls.model_fields.items()]
            return (
                f"found an unknown field, expected {one_of(fields)}{suggestion(str(error['loc'][-1]), fields)}"
            )
        context = error.get("ctx", {})
        if kind == "literal_error":
            words = re.findall(r"'([^']*)'", context["expected"])
            return f"found {found}, expected {one_of(words)}{suggestion(str(error['input']), words)}"
        if kind in ("too_short", "too_long"):
            found = str(context["actual_length"])
        if kind == "model_type" and cls.example:
            return f"found {found}, expected a mapping such as {cls.example}"
        return f"found {found}, expected {_EXPECTED[kind].format(**context)}"


def _detail(path: tuple[str | int, ...], message: str, found: Any) -> InitErrorDetails:
    return InitErrorDetails(type=refusal(message), loc=path, input=found)


def refusal(message: str) -> PydanticCustomError:
    """Return what a check of a field raises: a message that says what was found and what was expected."""
    # The message is a value of the template, so that braces in a user's text are not read as fields.
    return PydanticCustomError(_TRANSLATED, "{message}", {"message": message})


def shown(value: Any) -> str:
    """Return a value as a message shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}...'"
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else str(value)


def given(fields: Mapping[str, Any], *names: str) -> list[str]:
    """Return those of ``names`` that have a value."""
    return [name for name in names if fields.get(name) is not None]


def exactly_one(fields: Mapping[str, Any], *names: str) -> Iterator[Mismatch]:
    """Yield a mismatch unless exactly one of the fields has a value."""
    found = given(fields, *names)
    if len(found) != 1:
        what = " and ".join(found) if found else "none of them"
        yield (tuple(found[1:2]), f"found {what}, expected exactly one of {', '.join(names)}")


def _number(value: Any) -> Decimal:
    # A binary float has lost what was written: only text-born decimals and integers are exact.
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        return Decimal(value)
    raise refusal(f"found {shown(value)}, expected a number")


def _parsed(parse: Callable[[str], T]) -> Callable[[Any], T]:
    def validate(value: Any) -> T:
        if not isinstance(value, str):
            raise refusal(f"found {shown(value)}, expected a text such as 28d")
        try:
            return parse(value)
        except ValueError as error:
            raise refusal(f"found {shown(value)}, expected {error}") from error

    return validate


def _name(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._|/\\-]{0,253}[A-Za-z0-9])?", value):
        return value
    raise refusal(
        f"found {shown(value)}, expected a name: up to 255 letters, digits and any of - . _ | / \\ between them"
    )


Number = Annotated[Decimal, BeforeValidator(_number)]
ShorthandDuration = Annotated[Duration, BeforeValidator(_parsed(Duration.parse))]
Length = Annotated[timedelta, BeforeValidator(_parsed(parse_length))]
Name = Annotated[str, BeforeValidator(_name)]
