"""Stories of faults on whole labs: `tools/prove_repair`. ground.py brings a lab up, load.py keeps it busy."""
