"""The guard as a step of other people's tools: each module is imported by its tool only, or needs it to be of use."""
