"""Run ids that nobody would think of, but somebody sends."""

from typing import Final

# Whatever a resource can hold is a run id.
ODD_IDS: Final = (
    *(
        "a/b",
        "../x",
        "a?b=c&d",
        "a b+c",
        "100%",
        "%2e%2e",
        "ü🔥",
        "line\nbreak\n",
        "\x1b[31m",
        "#",
        ";",
        " ",
        ".",
        "..",
    ),
    *("openapi.json", "\u202e\ufeff", "'; DROP TABLE run; --", "\\", '"', "x" * 256),
)
