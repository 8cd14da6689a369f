"""diffusers pipelines as bases to train on: loading, objective, how each family is called."""
