"""From what is written and pictured of items to the features of their modalities."""
