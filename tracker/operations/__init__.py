"""What operators need: the doctor, metrics, logs, traces and retention."""
