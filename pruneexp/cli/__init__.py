"""The command line: what is typed becomes an experiment, or one line that says what is wrong with it."""
