"""report.html: what a run did and lost, on one page; or several runs side by side."""
