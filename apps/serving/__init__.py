"""`vlmguard serve`: one guarded model behind an OpenAI-compatible HTTP API (extra `serve`).

In the order of a request: `app` (routes), `access` (log line, counts, unexpected errors), `auth`, `admission` (slots and
queue), `body`, `parameters` and `chat_request` (validation), `pictures`, `answering` (one answer in a thread), `replies`
(OpenAI's objects), `prometheus_metrics`. `settings` holds the operator's settings; `server` opens the port and shuts down
gracefully.
"""
