"""Tables and plots for the pages that stages write."""
