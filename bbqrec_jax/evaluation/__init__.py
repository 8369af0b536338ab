"""Evaluation: every item of the catalogue is ranked for every user, and judged by item, never by its ID's text."""
