"""Decisions: which rows, which storage. They are data, and change nothing."""
