"""Pictures: from files to what a decoder reads in the place of a picture's tokens, and what else they change about a call."""
