"""A RUN ON A CLUSTER. In: a run's settings, and what each of its processes may take. Out: the file that the cluster's
own scheduler is given: a job of SLURM, manifests of Kubernetes.

demand.py says what a run asks of a cluster; slurm.py and kubernetes.py write it down. The files start the commands that
a user would type (`async-rl run`, `generate`, `relay`, `train`) and nothing else. Nothing here talks to a cluster.
"""
