"""The dashboards, as code: ``make boards`` writes ``dashboards/*.json`` from these files.

Each of ``overview``, ``servers`` and ``reliability`` is one dashboard, its panels in the order in
which they are read. ``queries`` says what is asked of Prometheus, ``panels`` how it is drawn, and
``board`` what every dashboard has: variables, annotations, links.
"""
