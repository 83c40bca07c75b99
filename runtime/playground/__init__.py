"""The page that asks a model in the browser, without and with its guard: its files, its libraries, and who serves them."""
