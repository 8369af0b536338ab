"""A run: its workdir, both stages in order, and reading a finished one back."""
