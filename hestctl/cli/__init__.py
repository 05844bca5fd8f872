"""The command line: thin, owns no logic, imports the rest of the program only when a command runs."""
