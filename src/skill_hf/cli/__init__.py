"""The command line: `skill-hf COMMAND`, one module for each command."""
