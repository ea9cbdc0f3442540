"""The shipped alerts as objects of the Prometheus operator (`monitoring.coreos.com`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

_GROUP: Final = "monitoring.coreos.com"
# The operator picks objects by labels that each cluster chooses; these are Kubernetes' own.
_LABELS: Final = {"app.kubernetes.io/name": "gradwatch", "app.kubernetes.io/component": "alerts"}
# The operator puts our route beside those of others, below one root: it must not take their alerts.
_OURS: Final = {"name": "alertname", "matchType": "=~", "value": "Gradwatch.+"}
_MATCHER: Final = re.compile(r'\s*(\w+)\s*(=~|!~|!=|=)\s*"(.*)"\s*')


def prometheus_rule(name: str, rules: Mapping[str, Any]) -> dict[str, Any]:
    """Return the PrometheusRule that holds a rule file: its groups are the same, key by key."""
    return _object(f"{_GROUP}/v1", "PrometheusRule", name, {"groups": rules["groups"]})


def alertmanager_config(name: str, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return the AlertmanagerConfig of a configuration of Alertmanager.

    It has no place for template files: the Alertmanager object mounts those, from a ConfigMap.
    """
    spec = {
        "route": {**_route(configuration["route"]), "matchers": [_OURS]},
        "inhibitRules": [_inhibition(rule) for rule in configuration["inhibit_rules"]],
        "receivers": [_camel(receiver) for receiver in configuration["receivers"]],
    }
    return _object(f"{_GROUP}/v1alpha1", "AlertmanagerConfig", name, spec)


def _object(version: str, kind: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, "labels": dict(_LABELS)},
        "spec": dict(spec),
    }


def _route(route: Mapping[str, Any]) -> dict[str, Any]:
    converted: dict[str, Any] = _camel({k: v for k, v in route.items() if k not in ("matchers", "routes")})
    if "matchers" in route:
        converted["matchers"] = _matchers(route["matchers"])
    if "routes" in route:
        converted["routes"] = [_route(each) for each in route["routes"]]
    return converted


def _inhibition(rule: Mapping[str, Any]) -> dict[str, Any]:
    equal = {"equal": rule["equal"]} if "equal" in rule else {}
    return {
        "sourceMatch": _matchers(rule["source_matchers"]),
        "targetMatch": _matchers(rule["target_matchers"]),
        **equal,
    }


def _matchers(told: Iterable[str]) -> list[dict[str, str]]:
    return [_matcher(each) for each in told]


def _matcher(told: str) -> dict[str, str]:
    found = _MATCHER.fullmatch(told)
    assert found, f"{told} is no matcher as they are shipped"
    name, match_type, value = found.groups()
    return {"name": name, "matchType": match_type, "value": value}


def _camel(value: Any) -> Any:
    """Return the same with keys in the operator's spelling: `group_by` is `groupBy` there."""
    if isinstance(value, Mapping):
        return {re.sub("_(.)", lambda m: m[1].upper(), key): _camel(each) for key, each in value.items()}
    return [_camel(each) for each in value] if isinstance(value, list) else value
