"""The two files as an operator types them, for tests of a mistake in one line of them."""

from pathlib import Path

CONFIG = """\
listen: 127.0.0.1:0
database: proxy.db
models: models.yaml
free_credits: {amount: 1000, days: 30}
default_tier: free
max_body_mb: 32
log: text
tiers:
  free: {requests_per_minute: 10, parallel: 4, keys: 2}
  unlimited: {}
upstreams:
  echo: {builtin: echo}
  ollama: {base_url: http://127.0.0.1:1/v1}
"""

MODELS = """\
owned_by: somebody
tiers:
  lightweight: {multiplier: 0.5, title: Light}
  mid: {multiplier: 1.5, title: Mid}
models:
  echo: {tier: lightweight, upstream: echo}
  llama3.2:3b: {tier: lightweight, upstream: ollama, aliases: [llama], created: 1700000000, context_window: 4096}
  qwen:7b: {tier: mid, upstream: [ollama, echo]}
"""


def type_files(folder: Path, config: str = CONFIG, models: str = MODELS) -> Path:
    """Both files in this folder; the path of the config."""
    (folder / "models.yaml").write_text(models)
    (folder / "config.yaml").write_text(config)
    return folder / "config.yaml"
