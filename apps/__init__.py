"""Applications on top of a guarded folder: the report, the playground, the server. They do not import one another."""
