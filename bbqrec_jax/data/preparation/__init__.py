"""From logs, product tables, pictures and published dumps to a data set in the project's own format."""
