"""What one frozen base with many tasks makes possible: known systems, one file each.

Each speaks to a base through `training.denoiser.Denoiser`, which both hosts give.
"""
