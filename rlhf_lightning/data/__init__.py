"""Reads rows, and tokenises texts and chats by the same rules for training, scoring and sampling."""
