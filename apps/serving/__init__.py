"""`vlmguard serve`: one guarded model behind an OpenAI-compatible HTTP API (extra `serve`).

In the order of a request: `app` (routes), `access` (log line, counts, unexpected errors), `auth`, `admission` (places and
queue), `body`, `parameters` and `chat_request` (what may be asked), `pictures`, `answering` (one answer in a thread), `replies`
(OpenAI's objects), `prometheus_metrics`. `settings` is what the operator decides; `server` opens the port and closes it
with grace.
"""
