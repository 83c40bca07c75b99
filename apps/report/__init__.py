"""`vlmguard report`: one self-contained page about a guarded folder. `build_report.py` has all of it on one screen."""
