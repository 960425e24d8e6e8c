"""``python -m umfa bench``: umfa and other libraries by turns, in one process.

`cases` says what is measured, `peers` who takes part, `measure` how, `report` and `chart` show it.
Nothing here imports a framework or matplotlib before it is asked for.
"""
