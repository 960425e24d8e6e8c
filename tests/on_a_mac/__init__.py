"""What only a Mac can show, in stages. Each stage leaves its part of one report.

``bash .ci/on-a-mac`` runs it (docs/on-a-mac.md). ``--on-the-double`` runs the same code on the
double of Metal, which is how it is tested where there is no Mac.
"""
