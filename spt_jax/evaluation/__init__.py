"""What a soft prompt answers, and how good that is."""
