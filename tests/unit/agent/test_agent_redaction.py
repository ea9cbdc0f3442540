"""Secrets do not leave the process, wherever they hide; everything else leaves as it is."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

from gradwatch import conventions as names
from gradwatch.life.endings import ending_of
from gradwatch.redaction import REDACTED, redact, redact_text
from gradwatch.testing import InMemoryExporter

ALNUM = string.ascii_letters + string.digits


def some(alphabet: str, least: int, most: int | None = None) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=least, max_size=most or least + 20)


@st.composite
def planted(draw: st.DrawFn) -> tuple[str, str]:
    """How a secret stands in a text, and the secret itself."""
    key = draw(some(ALNUM, 40, 40))
    upper = draw(some(string.ascii_uppercase + string.digits, 16, 16))
    hexadecimal = draw(some("0123456789abcdef", 40, 40))
    # Five digits or fewer behind a word for tokens are a count of them, and stay.
    password = draw(some(ALNUM + "!#$%^*_-.+", 6, 30))
    user = draw(some(string.ascii_lowercase, 1, 8))
    name = draw(
        st.sampled_from(
            ["password", "db_password", "PGPASSWORD", "api_key", "API-KEY", "apikey", "client_secret",
             "AWS_SECRET_ACCESS_KEY", "hf_token", "authToken", "credentials", "x-api-key", "private_key"]
        )
    )  # fmt: skip
    separator = draw(st.sampled_from(["=", ": ", " = ", "=>", '": "', "='"]))
    return draw(
        st.sampled_from(
            [
                (f"AKIA{upper}", f"AKIA{upper}"),
                (f"ghp_{key}", f"ghp_{key}"),
                (f"hf_{key}", key),
                (f"sk-proj-{key}", key),
                (f"xoxb-{key}", key),
                (f"xapp-1-{key}", key),
                (f"GOCSPX-{key[:28]}", key[:28]),
                (f"glpat-{key}", key),
                (f"eyJ{key}.eyJ{key}.{key}", key),
                (f"Authorization: Bearer {key}", key),
                (f"bearer {key}", key),
                (f"wandb key={hexadecimal}", hexadecimal),
                (f"postgresql://{user}:{password}@db.example.com/runs", password),
                (f"https://{key}@example.com/simple", key),
                (f"{name}{separator}{password}", password),
                (f"--api-key {password}", password),
                (f"-----BEGIN RSA PRIVATE KEY-----\n{key}\n-----END RSA PRIVATE KEY-----", key),
                (
                    f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n{key}\n-----END PGP PRIVATE KEY BLOCK-----",
                    key,
                ),
            ]
        )
    )


words = st.lists(some(string.ascii_letters + string.digits + ".,()[]'/", 1, 12), max_size=8).map(" ".join)


@given(words, planted(), words)
def test_a_secret_planted_anywhere_in_a_text_is_gone(before: str, plant: tuple[str, str], after: str) -> None:
    text, secret = plant
    assume(secret not in before + after)
    cleaned = redact_text(f"{before} {text} {after}")
    assert secret not in cleaned
    assert REDACTED in cleaned
    assert cleaned.startswith(before.split(" ")[0])


@given(words, planted(), words)
@example("", ("password='0000000", "0000000"), "'0")
def test_redacting_twice_is_redacting_once(before: str, plant: tuple[str, str], after: str) -> None:
    once = redact_text(f"{before} {plant[0]} {after}")
    assert redact_text(once) == once


@given(st.text(string.ascii_lowercase + string.digits + " .,()[]{}/_-+%'\"\n", max_size=300))
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "mat1 and mat2 shapes cannot be multiplied (4x8 and 9x2)",
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
        "/home/user/src/tokenizer/train.py",
        "tokenizer=fast tokens=4096 max_token=4096",
        "KeyError: 'token'",
        "commit 3f786850e387550fdab836ed7e6dc881de23001b",
        "3c9f6b0e-2b42-4c3e-9a55-8d6e7f1a2b3c",
        "expected scalar type Float but found Half",
        "https://example.com/simple?x=1",
        "mail user@example.com about it",
        "bearer of bad news, basic assumptions",
        "val_loss<=0.5",
        "transformer.h.0.attn.c_attn.weight",
    ],
)
def test_what_training_says_is_unchanged(text: str) -> None:
    assert redact_text(text) == text


def test_attributes_are_judged_by_name_and_by_value() -> None:
    before: dict[str, Any] = {
        "db.password": "hunter2",
        "aws.secret": "x",
        "note": "token=abcdef",
        "training.token_count": 5,
        "plain": "text",
        "flag": True,
        "data": b"password=x",
    }
    assert redact(before) == {
        **before,
        "db.password": REDACTED,
        "aws.secret": REDACTED,
        "note": f"token={REDACTED}",
    }


def test_a_secret_that_is_cut_off_by_the_length_limit_leaves_no_half_behind() -> None:
    for padding in range(150, 200):
        message = ending_of(RuntimeError("x" * padding + " ghp_" + "a" * 40)).exception_message
        assert message is not None
        assert "ghp_" not in message


def test_of_a_long_message_only_the_beginning_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    monkeypatch.setattr("gradwatch.life.endings.redact_text", lambda text: looked_at.append(text) or text)
    ending_of(ValueError("token_" * 100_000))
    assert [len(text) <= 2000 for text in looked_at] == [True]


def test_nothing_that_is_exported_holds_a_secret(
    watching: Any, exporter: InMemoryExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "OTEL_RESOURCE_ATTRIBUTES", "db.password=planted1,url=https%3A%2F%2Fu%3Aplanted2%40h%2Fx,zone=eu"
    )
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError), watching(model, optimizer, run_id="ordinary"):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        raise RuntimeError("cannot log in with api_key=planted3 at https://u:planted4@host/path")
    everything = repr((exporter.resource, exporter.events, exporter.metrics))
    assert "planted" not in everything
    assert exporter.resource["zone"] == "eu"
    assert exporter.resource["db.password"] == REDACTED
    (ended,) = exporter.find_events(names.RUN_ENDED.name)
    assert ended.attributes[names.EXCEPTION_MESSAGE] == (
        f"cannot log in with api_key={REDACTED} at https://{REDACTED}@host/path"
    )


class Named(nn.Module):
    """A layer and an input whose names nobody should see."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"sk-ant-api03-planted1planted1": nn.Linear(2, 1)})

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        (layer,) = self.layers.values()
        return layer(batch["token=planted2"])


def test_names_of_layers_inputs_models_and_metrics_are_redacted_too(
    watching: Any, exporter: InMemoryExporter
) -> None:
    models = {"password=planted3": Named(), "other": nn.Linear(2, 1)}
    optimizer = torch.optim.SGD([p for model in models.values() for p in model.parameters()], lr=0.1)
    with watching(models, optimizer, every=1) as watch:
        for _ in range(12):
            optimizer.zero_grad()
            batch = {"token=planted2": torch.ones(1, 2)}
            (models["password=planted3"](batch).sum() + models["other"](torch.ones(1, 2)).sum()).backward()
            optimizer.step()
            watch.log(**{"password=planted4": 1.0, "hf_planted5planted5planted5": 2.0})
    everything = repr((exporter.resource, exporter.events, exporter.metrics))
    assert "planted" not in everything
    assert {p.attributes[names.METRIC_NAME] for p in exporter.points(names.LOGGED)} == {
        f"password={REDACTED}", REDACTED
    }  # fmt: skip
    assert exporter.values(names.INPUT_MEAN)
    assert exporter.values(names.WEIGHT_NORM)
