"""Utilities: settings, files, processes, signals, messages, the compilation cache."""
