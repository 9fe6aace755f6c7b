"""What the verbs share: arguments, tables, progress, the chat's screen."""
