"""The papers' measures that are too long for a notebook, as pure functions of arrays."""
