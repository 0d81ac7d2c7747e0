"""The pages for people: what runs do now, what needs attention, and why.

    site.py       all routes, and errors as pages
    render.py     templates to answers, the files below /static, the base of all pages and
                  actions, which are declared with their paths
    forms.py      what browsers send: ids, fields, the CSRF token
    access.py     sign-in, sign-out and the audit log
    overview.py, runs.py, batch.py, deliveries.py, techniques.py, spending.py, webhooks.py and
    health.py     the pages, each with the actions on what it shows
    alerts.py     what of the figures needs attention
    media.py      outputs: pictures, films, links, or text alone

Pages read the database and render it; an action calls a use case. A page works without its scripts:
they keep it up to date, show times in the viewer's time zone and draw the charts.
"""
