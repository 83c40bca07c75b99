"""The shapes that benchmarks of engines build for: up to 4 prompts, as `vlmguard engine` does, on shorter sequences."""

from __future__ import annotations

from dataclasses import replace

from vlmguard.exporter.engines.profile import EngineProfile, Span

PREFILL = EngineProfile("prefill", Span(1, 1, 4), Span(1, 256, 512), Span(0, 0, 0))
DECODE = EngineProfile("decode", Span(1, 1, 4), Span(1, 1, 1), Span(1, 512, 1024))
DECODE_OF_ONE_ROW = replace(DECODE, batch=Span(1, 1, 1))
