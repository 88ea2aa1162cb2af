"""Files that others may have made, read as plain values: nothing in them runs, and what is not plain is refused."""
