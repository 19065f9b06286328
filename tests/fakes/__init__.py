"""A backend without a framework, so that the loop and the commands are tested in seconds, in real processes."""
