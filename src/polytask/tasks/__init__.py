"""What is to be learned: tasks, schemas, templates, splits, leak checks."""
