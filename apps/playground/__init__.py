"""`vlmguard playground`: a web page that runs a guarded folder's model in the browser, with and without its guard.

`facts`, `sides` and `samples` create the page's data, `libraries` and `site` list its files, `page_server` serves them; `open`
combines them.
"""
