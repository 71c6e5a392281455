"""Rewrites of a joint graph, one file each. They decide nothing."""
