"""Commands of the launch scripts, and on finished runs."""
