"""What a finished run is used for: recommending, and an exported function that needs nothing of this package."""
