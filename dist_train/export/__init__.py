"""`dist-train export`: a drafter as a Hugging Face folder, refused where a server would refuse it."""
