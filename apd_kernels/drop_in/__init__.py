"""The functions of other Re-ID code bases, by their names and with their results, over the operations of this package.

One module for each code base. What a module lacks is not faster here, and stays with its project.
"""
