"""Is an answer what its schema says?

By a validator that is compiled: what the API may answer at most takes one that is interpreted half a minute.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema_rs

from gradwatch_collector import schemas as of_collector
from gradwatch_slo import schemas as of_slo


@cache
def _validator(schema: str) -> Any:
    owner = of_slo if schema in of_slo.SCHEMAS else of_collector
    return jsonschema_rs.validator_for(owner.load_schema(schema), validate_formats=True)


def valid(answer: Any, schema: str) -> Any:
    """Return the answer; raise ``jsonschema_rs.ValidationError`` if it is not valid."""
    _validator(schema).validate(answer)
    return answer
