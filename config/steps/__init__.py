"""The loop's five steps. Each file adds one step to the file before it."""
