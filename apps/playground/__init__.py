"""`vlmguard playground`: a page that asks a guarded folder's model in the browser, with its guard and without it.

`facts`, `sides` and `samples` make what the page reads, `libraries` and `site` list its files, `page_server` serves them;
`open` puts them together.
"""
