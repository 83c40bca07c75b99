"""Lowerings: ways of writing the guard's arithmetic into a graph, one module each; `table.py` lists them."""
