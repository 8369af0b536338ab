"""Runs: the workdir, both stages in order, restoring a finished run, and comparing several."""
