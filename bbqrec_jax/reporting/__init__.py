"""The report of a run: its figures, their charts, and the page that shows them."""
