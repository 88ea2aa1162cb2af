"""What knows of ranks besides `linalg.vector_space`: starting, wrapping, agreeing, failing together."""
