"""The HTML report of a run.

contents.py  the data of a report and its JSON form
page.py      the report as an HTML page: write, read, render
charts.py    line charts as SVG
"""
