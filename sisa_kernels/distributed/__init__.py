"""One sequence over several ranks: pieces, what they send each other, and attention over them."""
