"""The command line, as the processes that people and cron run."""
