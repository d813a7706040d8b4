"""Make an environment that trains: torch, MPI, Horovod built from source, and a check with two ranks.

    launch/setup.sh                 from a clone
    python -m hvdtrain.install      what it runs

Standard library only, and nothing of hvdtrain's other rooms: it starts where nothing is installed yet.
"""
