"""The plan's five steps, each file adding one to the file before."""
