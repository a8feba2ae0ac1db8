"""The two files of the proxy under test: tiers and models for every situation, laid over what a test asks for."""

from collections.abc import Callable, Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import yaml

from tests.support.postgres import database_for

TODAY = date.today()
UPSTREAM_KEY = "upstream-secret-key"

TIERS: dict[str, Any] = {
    "unlimited": {},
    "two-a-minute": {"requests_per_minute": 2},
    "hundred-a-minute": {"requests_per_minute": 100},
    "one-at-a-time": {"parallel": 1},
    "two-keys": {"keys": 2},
}

MODELS: dict[str, Any] = {
    "echo": {"tier": "one", "upstream": "echo"},
    "plain": {"tier": "one", "upstream": "main"},
    "half": {"tier": "half", "upstream": "main"},
    "mid": {"tier": "mid", "upstream": "main"},
    "dear": {"tier": "dear", "upstream": "main"},
    "gratis": {"tier": "one", "multiplier": 0, "upstream": "main"},
    "thousandth": {"tier": "one", "multiplier": 0.001, "upstream": "main"},
    "windowed": {"tier": "one", "upstream": "main", "context_window": 4096},
    "capped": {"tier": "one", "upstream": "main", "max_output_tokens": 100},
    "embedder": {"tier": "half", "upstream": "main", "kind": "embedding"},
    "vendor/named:7b": {
        "tier": "mid",
        "upstream": "main",
        "aliases": ["nickname"],
        "kind": "code",
        "created": 1700000000,
    },
    "renamed": {"tier": "one", "upstream": "main", "upstream_model": "real-name:latest"},
    "impatient": {"tier": "one", "upstream": "impatient"},
    "impatient-pair": {"tier": "one", "upstream": ["impatient", "backup"]},
    "silent": {"tier": "one", "upstream": "silent"},
    "pair": {"tier": "one", "upstream": ["main", "backup"]},
    "absent": {"tier": "one", "upstream": "absent"},
    "absent-pair": {"tier": "one", "upstream": ["absent", "backup"]},
    "off": {"tier": "one", "upstream": "off"},
    "retiring": {
        "tier": "one",
        "upstream": "main",
        "deprecated": {
            "announced": TODAY - timedelta(days=10),
            "sunset": TODAY + timedelta(days=50),
            "replacement": "plain",
        },
    },
    "retired": {
        "tier": "one",
        "upstream": "main",
        "deprecated": {
            "announced": TODAY - timedelta(days=90),
            "sunset": TODAY - timedelta(days=1),
            "replacement": "plain",
        },
    },
    "announced-later": {
        "tier": "one",
        "upstream": "main",
        "deprecated": {
            "announced": TODAY + timedelta(days=10),
            "sunset": TODAY + timedelta(days=90),
            "replacement": "plain",
        },
    },
}

MODEL_TIERS: dict[str, Any] = {
    "half": {"multiplier": 0.5, "title": "Half"},
    "one": {"multiplier": 1.0, "title": "One"},
    "mid": {"multiplier": 1.5, "title": "Mid"},
    "dear": {"multiplier": 3.5, "title": "Dear"},
}

OPTIONS: dict[str, Any] = {
    "listen": "127.0.0.1:0",
    "database": "proxy.db",
    "models": "models.yaml",
    "free_credits": {"amount": 0, "days": 30},
    "default_tier": "unlimited",
    "hold_output_tokens": 100,
    "drain_seconds": 5,
    "tiers": TIERS,
}


def catalog(models: Mapping[str, Any]) -> dict[str, Any]:
    return {"owned_by": "tests", "tiers": MODEL_TIERS, "models": dict(models)}


def write_yaml(path: Path, content: Any) -> None:
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    )


def edit_yaml(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a YAML file, in one step."""
    content = yaml.safe_load(path.read_text())
    change(content)
    fresh = path.with_suffix(".new")
    write_yaml(fresh, content)
    fresh.rename(path)


def write_files(folder: Path, options: Mapping[str, Any], models: Mapping[str, Any]) -> Path:
    """Write both files, models only if their upstreams are there; return the path of config.yaml."""
    known = options["upstreams"]

    def usable(model: dict[str, Any]) -> bool:
        names = model["upstream"] if isinstance(model["upstream"], list) else [model["upstream"]]
        return all(name in known for name in names)

    database = database_for(folder, options.get("database", "proxy.db"))
    write_yaml(folder / "config.yaml", {**options, "database": database})
    write_yaml(folder / "models.yaml", catalog({name: m for name, m in models.items() if usable(m)}))
    return folder / "config.yaml"
