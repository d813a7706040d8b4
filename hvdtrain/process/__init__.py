"""Before and beside torch: who started this process, where it is, when it must stop, and starting a run again."""
