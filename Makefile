# Everything installs itself into .venv on first use; see scripts/environment.py.
.PHONY: demo test lint environment clean help

demo: environment  ## show the pack at work in a real ComfyUI and in diffusers
	.venv/bin/python scripts/demo.py

# `pytest`, never `python -m pytest`: the latter puts this folder on sys.path, where nodes/ shadows ComfyUI's nodes.py.
test: environment  ## run the tests
	.venv/bin/pytest -n auto --maxprocesses 4 --dist loadfile

lint: environment  ## check format, style and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy -p diffscaler_core

environment:
	@python3 scripts/environment.py

clean:  ## delete everything that was installed, downloaded or built
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)
