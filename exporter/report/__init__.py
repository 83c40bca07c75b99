"""`vlmguard report`: one self-contained page about a guarded folder. `build.py` tells it on one screen."""
