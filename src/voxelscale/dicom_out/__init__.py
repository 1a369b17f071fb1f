"""What was found, as hospitals keep it: DICOM SEG, SR and RTSTRUCT; and CSV, JSON and a page for people.

`original`: the slices that a scan came as. `segments`: findings on these. `codes`: what they are called.
`seg`, `sr`, `rtstruct`: the objects. `objects`: what all of them have. `page`: of HTML. `kinds`: what can
be written. `export`: a case's files.
"""
