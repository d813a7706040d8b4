"""What runs have come to: one page of HTML that holds everything it shows, and what tells two runs apart."""
