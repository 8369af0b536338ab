"""A finished run in use: recommending, the bundle that needs none of the training code, and the server of it."""
