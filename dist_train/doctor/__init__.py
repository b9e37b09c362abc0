"""`dist-train doctor`: what would stop or slow a run on these machines, found before it starts.

`roll_call` finds the ranks that do not come, `measure` takes figures on each rank, `judge` makes findings of the
gathered tables (pure functions), `inputs` looks at a stage's configuration, `examine` goes through all of it.
"""
