"""From the config to the plan: checks, matrices, and what every artifact is made of."""
