"""The models: a family in each `modeling_*.py`, and a record of each family in `families.py`."""
