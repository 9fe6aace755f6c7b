"""A table of exact names as one of transformers' weight renamings: stored name → state key, and back."""

from transformers.core_model_loading import WeightRenaming


class KeyTable(WeightRenaming):  # type: ignore[misc]
    """Renames tensors by table where transformers has patterns: no name can be taken for another.

    Args:
        loading: stored name → state key.
        saving: stored name → state key, those names under which the tensors are saved again.
    """

    def __init__(self, loading: dict[str, str], saving: dict[str, str]) -> None:
        super().__init__("exl2", "exl2")  # patterns that nothing is held against
        self.loading = loading
        self.saving = saving
        self.renamed: set[str] = set()  # state keys that a stored tensor was found for

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name, and what matched; the name itself and None where the table has no entry."""
        if source_key not in self.loading:
            return source_key, None
        self._was_used = True
        self.renamed.add(self.loading[source_key])
        return self.loading[source_key], source_key

    def reverse_transform(self) -> "KeyTable":
        """The table that saving goes by."""
        return KeyTable({key: name for name, key in self.saving.items()}, self.saving)
