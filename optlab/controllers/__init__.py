"""What acts on a run from outside its compiled step: rates, batch sizes, new schedules."""
