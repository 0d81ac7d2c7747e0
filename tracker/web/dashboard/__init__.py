"""The pages for people: what runs do now, what needs somebody, and why.

    site.py         all routes together, and errors as pages
    render.py       templates to answers, with their security headers; words.py, values to words
    assets.py       the files below /static, cached for good under their content's hash
    forms.py        what browsers send: queries, form fields, the CSRF token
    signin.py       /login and /logout
    outputs.py      which foreign text becomes a link, an image, a player
    overview.py, runs.py, run.py, deliveries.py, techniques.py, batches.py, sweeps.py   the pages
    figures.py      the overview's numbers; health.py, how the parts stand and what needs somebody
    said.py         what an action has to say for itself

Pages read the database and render; what changes something calls a use case. A page works without
its scripts; they keep it up to date, tell times in the viewer's zone and draw the charts.
"""
