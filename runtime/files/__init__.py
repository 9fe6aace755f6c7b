"""Our own files: written whole or not at all, read with every field checked."""
