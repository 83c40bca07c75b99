"""From a checkpoint or a graph to a guarded, proved artifact."""
