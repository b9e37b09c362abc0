"""Conversations that end where an answer is wanted: from records, without duplicates, divided."""
