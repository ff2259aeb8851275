"""What an answer is checked for, one kind of rule to a file."""
