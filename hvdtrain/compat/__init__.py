"""For programs that were written for another library: its names, on the ranks and the exchange of hvdtrain."""
