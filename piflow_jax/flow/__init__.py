"""The mathematics of pi-Flow: pure functions and frozen pytrees, independent of any network."""
