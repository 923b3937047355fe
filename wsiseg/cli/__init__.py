"""The command line: click, one small file per command group, no logic."""
