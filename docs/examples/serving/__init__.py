"""The parts of `serve_ray.py` that know nothing of Ray: requests, batches, tasks, pictures."""
