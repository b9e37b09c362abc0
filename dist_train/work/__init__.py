"""Independent pieces of work, shared out over ranks and jobs, and resumed."""
