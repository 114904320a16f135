"""Rows as a model reads them: one rule makes tokens of texts and chats, whether they are trained, scored or sampled."""
