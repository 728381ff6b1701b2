"""An ablation: rows of a table that differ in what a file says, each trained with several seeds and tested on targets.

plan.py       the file: rows, seeds, controls, targets
execute.py    trains what is missing, several runs at once, and tests what is finished
worker.py     the process of one training
results.py    results.jsonl, and the statistics of the table
tables.py     the table, to print and as Markdown
"""
