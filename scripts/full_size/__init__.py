"""DBRX's full size without its weights, for developers: stand-in sources, and where the time goes."""
