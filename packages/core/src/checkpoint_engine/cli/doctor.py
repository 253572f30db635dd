"""`checkpoint-engine doctor`: is this place ready?"""

import warnings

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from checkpoint_engine.cli.checks import look_everywhere
from checkpoint_engine.cli.common import Json, Verbose, output, print_json
from checkpoint_engine.cli.finding import Finding

__all__ = ["doctor"]

_MARKS = {"ok": ("✓", "green"), "note": ("!", "yellow"), "problem": ("✗", "bold red")}


def doctor(json: Json = False, verbose_: Verbose = False) -> None:
    """Look at devices, limits, network and plugins, and say what stands in the way.

    Run it where the parameter server runs, and again where the engine runs if that is another environment or
    container. Exit code 0: ready. 1: at least one problem.
    """
    del verbose_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they would say is found below
        findings = look_everywhere()
    problems = [finding for finding in findings if finding.status == "problem"]
    if json:
        print_json({"ok": not problems, "findings": findings})
    else:
        _show(findings, len(problems))
    raise typer.Exit(1 if problems else 0)


def _show(findings: list[Finding], problems: int) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column()
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    area = ""
    for finding in findings:
        if finding.area != area:
            area = finding.area
            table.add_row("", Text(area, style="bold"), "")
        mark, style = _MARKS[finding.status]
        found = Text(finding.value)
        if finding.advice:
            found.append(f"\n→ {finding.advice}", style=style)
        table.add_row(Text(mark, style=style), Text(finding.name), found)
    output.print(table)
    if problems:
        output.print(f"[bold red]{problems} problem{'s' if problems > 1 else ''}[/]: see the lines marked ✗")
    else:
        output.print("[bold green]ready[/]")
