"""One folder per runtime that people ship with, and what they share: the cases that each is compared on, and the table of results."""
