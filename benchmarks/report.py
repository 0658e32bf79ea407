from __future__ import annotations


def write_report(folder, report, items, scored, measured):
    pass
