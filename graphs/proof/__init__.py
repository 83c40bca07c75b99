"""What can be proved about a guarded graph without a runtime, and the models that a proof by running is made of."""
