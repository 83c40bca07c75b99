"""One folder per runtime that people ship with, and what they share: cases to compare on, and the table of results."""
