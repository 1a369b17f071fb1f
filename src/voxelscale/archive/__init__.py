"""Archives: scans come from one, and the results go back to it.

`dicomweb` (QIDO-RS, WADO-RS, STOW-RS), `inbox` and `dimse` (C-STORE) are where scans come from and results
go; `identity` sees to it that nothing is of another patient. `listen` answers new series, with `rules`
(which), `ledger` (what became of each), `answer` (the model) and `health`; `fetched` is for one study.
"""
