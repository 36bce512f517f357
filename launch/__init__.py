"""`python -m launch`: a graph of stages on Slurm, on this machine, or in this process."""
