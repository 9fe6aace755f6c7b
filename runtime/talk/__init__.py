"""Conversations: templates, streamed text, the server."""
