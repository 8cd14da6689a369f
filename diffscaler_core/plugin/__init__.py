"""What the diffusers plugin is made of; its entry is `pipelines.py`, which installs it."""
