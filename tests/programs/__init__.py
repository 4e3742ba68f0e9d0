"""Programs over labs that look for lost and wrong bytes: fsx, coherence, real programs. hands.py calls the system for them."""
