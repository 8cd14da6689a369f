"""`diffscaler train` and all that stands round a run on the command line."""
