"""Writes the guarded folder, its time stamp, its signature and its bill of materials."""
