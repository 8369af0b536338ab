"""Starting a run on many hosts, as plans of commands: TPU VMs, Slurm, Kubernetes."""
