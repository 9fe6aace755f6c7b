"""A model of transformers with packed linears in it: loading, modules, the native step."""
