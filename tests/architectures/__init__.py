"""The zoo: tiny random models of many architectures, and which FFNs each has by construction.

`row.py` says what a row of the table is, the other modules hold the rows; `measure.py` measures one row on every
capture route, `table.py` prints the results. Run it with `pytest -m zoo`.
"""
