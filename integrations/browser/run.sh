#!/usr/bin/env bash
# The page of `vlmguard playground` in headless Chromium, from the repository's root, or by `make integration NAME=browser`.
# Playwright comes with the `test` extra, the page's libraries from the npm registry into the user's cache, once.
set -euo pipefail
PYTHONPATH=tests PYTHONDONTWRITEBYTECODE=1 python -m integrations.browser.check
