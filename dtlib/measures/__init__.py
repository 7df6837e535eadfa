"""The papers' measures as pure functions of arrays: one file a research question."""
