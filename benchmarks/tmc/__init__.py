"""How the transition-metal data set is made: species, structures, DFT labels, filter.

``species`` draws the complexes, ``build`` places their ligands, ``sampling`` finds the geometries
with GFN2-xTB, ``dft`` labels them with PySCF, ``archive`` and ``generate`` keep a resumable run,
``filter`` and ``report`` turn a run into a data set. The command line is ``make_tmc.py`` beside it.
"""
